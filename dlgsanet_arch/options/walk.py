"""An option file compared with the table: missing keys, keys that nothing reads, wrong values."""

from collections.abc import Mapping
from typing import Any

from dlgsanet_arch.hints import nearest, suggest, suggest_or_list
from dlgsanet_arch.options.context import Context, join
from dlgsanet_arch.options.readers import Known, known_in, matches, parameters_of
from dlgsanet_arch.options.schema import KEYS, Key
from dlgsanet_arch.options.values import Named, section, shown

_ARGUMENTS = ("network_*", "train:*_opt", "val:metrics:*", "train:optim_*", "train:scheduler")


def compare(context: Context) -> tuple[list[str], dict[str, Any]]:
    """Compare options with the table, in one pass.

    Returns:
        One line a problem; and the options without what is wrong: wrong values are None.
    """
    required = _required(context)
    unfilled = _unfilled(context, required)
    meant = _meant(context, required, unfilled)
    found = [
        f"{path}: {fault}{suggest(meant[path], [meant[path]]) if path in meant else ''}"
        for path, fault in unfilled.items()
    ]
    passed = {*unfilled, *(join(at.rpartition(":")[0], name) for at, name in meant.items())}
    sound = _walk(context, "", context.options, passed, found)
    return found + _arguments(context, required), sound


def _walk(
    context: Context, at: str, content: Mapping[Any, Any], passed: set[str], found: list[str]
) -> dict[str, Any]:
    """Check the keys of a section and of those within it; `passed` are reported already."""
    known = known_in(context, at)
    sound: dict[str, Any] = {}
    for key, value in content.items():
        path = join(at, key)
        fault = ""
        if not isinstance(key, str) or ":" in key:
            fault = f"a key must be text without a colon; write '{str(key).replace(':', '_')}'"
        elif known is not None and path not in passed:
            row = known.find(key)
            fault = _of_value(context, row, value) if row else _unknown(at, key, value, known)
        if fault:
            found.append(f"{path}: {fault}")
        recurse = isinstance(value, Mapping) and not fault
        sound[str(key)] = _walk(context, path, value, passed, found) if recurse else value
        if fault or path in passed:
            sound[str(key)] = None
    return sound


def _of_value(context: Context, row: Key, value: Any) -> str:
    """Say what is wrong with the value of a key, or return nothing."""
    if value is None:
        return "" if row.empty else "is empty (~); write a value, or leave it out"
    fault = row.kind(value)
    if fault or not isinstance(row.kind, Named):
        return fault
    registry, names = row.kind.registry, context.names_in(row.kind.registry)
    if names is None or value in names:
        return ""
    hint = suggest(value, names) or "; is the package that registers it imported?"
    return f"no {registry} is registered as {shown(value)}{hint}"


def _unknown(at: str, key: str, value: Any, known: Known) -> str:
    """Say what an unknown key is taken for, or nothing where it may be read."""
    meant = known.misspelt(key)
    if meant is None:
        return ""
    hint = f"; did you mean {meant!r}?" if meant else ""
    if any(matches(at, pattern) for pattern in _ARGUMENTS):
        return f"{known.reader} has no such argument{hint or suggest_or_list(key, known.names)}"
    if at == "path" and value is not None:
        return f"not known; BasicSR would make a folder {shown(value)}{hint}"
    if readers := read_by(at, key):
        return f"{known.reader} does not read it, {', '.join(readers)} would; delete it"
    backend = "the backend " if at.endswith(":io_backend") else ""
    who = f"{backend}{known.reader} does not read it" if known.reader else "not known"
    return f"{who}{hint or '; delete it'}"


def read_by(at: str, key: str) -> tuple[str, ...]:
    """Return the models that read a key of the file or of `train` which others do not."""
    rows = (row for row in KEYS if row.section == at and at in ("", "train") and key in row.names)
    return next((row.by for row in rows), ())


def _required(context: Context) -> dict[str, Key]:
    """Return the paths that an option file must fill, sections before what they hold."""
    sections = dict(context.sections())
    required: dict[str, Key] = {}
    for row in KEYS:
        for at in [path for path in sections if row.needed and matches(path, row.section)]:
            if row.needed(context, at) and _is_read(context, at, row):
                required |= {join(at, name): row for name in row.names}
                if row.kind is section:
                    sections.setdefault(join(at, row.names[0]), {})
    return required


def _is_read(context: Context, at: str, row: Key) -> bool:
    known = known_in(context, at) if row.by else None
    return not row.by or (known is not None and not known.open and row in known.keys)


def _how_to_fill(context: Context, path: str, required: Mapping[str, Key]) -> str:
    """Say what to write at an unfilled path."""
    below = [entry.removeprefix(f"{path}:") for entry in required if entry.startswith(f"{path}:")]
    if below:
        names = dict.fromkeys(entry.split(":")[0] for entry in below)
        return f"write a section with {', '.join(names)}"
    example = required[path].example.replace("$scale", shown(context.options.get("scale", 4)))
    return f"write `{path.rpartition(':')[2]}: {example}`"


def _unfilled(context: Context, required: Mapping[str, Key]) -> dict[str, str]:
    """Return what is wrong with the paths that are missing or empty."""
    faults: dict[str, str] = {}
    for path, row in required.items():
        at, _, key = path.rpartition(":")
        content = context.value(at)
        if not isinstance(content, Mapping) or content.get(key) is not None:
            continue  # the section above is missing itself, or the key is there
        if not (row.empty and key in content):
            what = "empty" if key in content else "missing"
            faults[path] = f"{what}; {_how_to_fill(context, path, required)}"
    return faults


def _meant(
    context: Context, required: Mapping[str, Key], unfilled: Mapping[str, str]
) -> dict[str, str]:
    """Return the paths of missing keys, each with the unknown key beside it that looks like it."""
    meant = {}
    for path, fault in unfilled.items():
        at, _, key = path.rpartition(":")
        known = known_in(context, at)
        spare = [
            name
            for name in map(str, context.section(at))
            if join(at, name) not in required and (not known or known.misspelt(name) is not None)
        ]
        near = nearest(key, spare) if fault.startswith("missing") else None
        if near is not None:
            meant[path] = near
    return meant


def _arguments(context: Context, required: Mapping[str, Key]) -> list[str]:
    """Networks, losses and metrics must get what they have no default for."""
    found = []
    for at, content in context.sections():
        known = known_in(context, at)
        if known is None or not any(matches(at, pattern) for pattern in _ARGUMENTS[:3]):
            continue
        misspelt = {known.misspelt(str(key)) for key in content}
        for name, entry in parameters_of(known.thing).items():
            there = name in content or name in misspelt or join(at, name) in required
            if entry.default is entry.empty and name not in known.given and not there:
                found.append(f"{at}:{name}: missing; {content['type']} has no default for it")
    return found
