"""An option file compared with the table: missing keys, keys that nothing reads, wrong values."""

from collections.abc import Mapping
from typing import Any

from dlgsanet_arch.hints import suggest, suggest_or_list
from dlgsanet_arch.options.context import Context, join
from dlgsanet_arch.options.readers import Known, known_in, rows_of
from dlgsanet_arch.options.schema import KEYS, WHEN, Key
from dlgsanet_arch.options.values import Named, section, shown


def compare(context: Context) -> tuple[list[str], dict[str, Any]]:
    """Compare options with the table, in one pass.

    Returns:
        One line a problem; and the options without what is wrong: wrong values are None.
    """
    found: list[str] = []
    return found, _walk(context, "", context.options, found)


def _walk(
    context: Context, at: str, content: Mapping[Any, Any], found: list[str]
) -> dict[str, Any]:
    """Check the keys of a section and of those within it."""
    known = known_in(context, at)
    missing = _missing(context, at, known, content) if known else {}
    found += [f"{join(at, key)}: {fault}" for key, fault in missing.items()]
    sound: dict[str, Any] = {}
    for key, value in content.items():
        path = join(at, key)
        fault = ""
        if not isinstance(key, str) or ":" in key:
            fault = f"a key must be text without a colon; write '{str(key).replace(':', '_')}'"
        elif known is not None and key not in missing:
            row = known.find(key)
            fault = _of_value(context, row, value) if row else _unknown(at, key, value, known)
        if fault:
            found.append(f"{path}: {fault}")
        recurse = isinstance(value, Mapping) and not fault
        sound[str(key)] = _walk(context, path, value, found) if recurse else value
        if fault:
            sound[str(key)] = None
    return sound


def _missing(context: Context, at: str, known: Known, content: Mapping[Any, Any]) -> dict[str, str]:
    """Return the keys that a section lacks or has empty, with what to write."""
    missing: dict[str, str] = {}
    for row in known.keys:
        there = content.get(row.name) is not None or (row.empty and row.name in content)
        if (
            there
            or row.name in missing
            or (known.open and row.by)
            or not WHEN[row.needed](context, at)
        ):
            continue
        what = "empty" if row.name in content else "missing"
        if row.example:
            example = row.example.replace("$scale", shown(context.options.get("scale", 4)))
            missing[row.name] = f"{what}; write `{row.name}: {example}`"
        elif row.kind is section:
            path = join(at, row.name)
            below = [
                each.name
                for each in rows_of(path)
                if not each.by and WHEN[each.needed](context, path)
            ]
            missing[row.name] = f"{what}; write a section with {', '.join(dict.fromkeys(below))}"
        else:
            missing[row.name] = f"{what}; {known.reader} has no default for it"
    return missing


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
    if known.is_call:
        return f"{known.reader} has no such argument{hint or suggest_or_list(key, known.names)}"
    if at == "path" and value is not None:
        return f"not known; BasicSR would make a folder {shown(value)}{hint}"
    rows = (row for row in KEYS if row.section == at and at in ("", "train") and key == row.name)
    if readers := next((row.by for row in rows), ()):
        return f"{known.reader} does not read it, {', '.join(readers)} would; delete it"
    backend = "the backend " if at.endswith(":io_backend") else ""
    who = f"{backend}{known.reader} does not read it" if known.reader else "not known"
    return f"{who}{hint or '; delete it'}"
