"""An option file compared with the table: missing keys, keys that nothing reads, wrong values."""

import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args, get_origin

from dlgsanet_arch.hints import nearest, shown, suggest
from dlgsanet_arch.options import values
from dlgsanet_arch.options.context import Context, comes_from, is_number, join
from dlgsanet_arch.options.schema import KEYS, WHEN, Key, known_dataset, known_model

_MISSPELT = 0.8  # how near a name must be where any name may stand
_GIVEN = {"metric": ("img", "img2"), "optimizer": ("params",)}  # arguments that are not options


class _Known(NamedTuple):
    """The keys that a section may have."""

    rows: list[Key]  # those that apply before others of the name
    reader: str = "BasicSR"  # for messages
    open: bool = False  # others may be read; only what looks like a misspelling is refused then
    thing: Any = None  # whose source may name others


def compare(
    context: Context, found: list[str], at: str = "", content: Mapping[Any, Any] | None = None
) -> dict[str, Any]:
    """Compare the section `content` at a path, by default all options, with the table.

    Adds one line a problem to `found`, and returns the content with None for wrong values.
    """
    content = context.options if content is None else content
    known = _known_in(context, at)
    missing = _missing(context, at, known, content) if known else {}
    found += [f"{join(at, key)}: {fault}" for key, fault in missing.items()]
    sound: dict[str, Any] = {}
    for key, value in content.items():
        path, fault = join(at, key), ""
        if not isinstance(key, str) or ":" in key:
            fault = f"a key must be text without a colon; write '{str(key).replace(':', '_')}'"
        elif known is not None and key not in missing:
            row = next((each for each in known.rows if fnmatchcase(key, each.name)), None)
            fault = _of_value(context, row, value) if row else _unknown(path, key, known)
        if fault:
            found.append(f"{path}: {fault}")
            value = None
        is_section = isinstance(value, Mapping)
        sound[str(key)] = compare(context, found, path, value) if is_section else value
    return sound


def _missing(
    context: Context, at: str, known: _Known, content: Mapping[Any, Any]
) -> dict[str, str]:
    """Return the keys that a section lacks or has empty, with what to write."""
    missing: dict[str, str] = {}
    for row in known.rows:
        there = content.get(row.name) is not None or (row.empty and row.name in content)
        of_others = known.open and row.by
        if there or of_others or row.name in missing or not WHEN[row.needed](context, at):
            continue
        example = row.example.replace("$scale", shown(context.options.get("scale", 4)))
        fix = f"write `{row.name}: {example}`"
        fix = fix if example else f"{known.reader} has no default for it"
        missing[row.name] = f"{'empty' if row.name in content else 'missing'}; {fix}"
    return missing


def _of_value(context: Context, row: Key, value: Any) -> str:
    """Say what is wrong with the value of a key, or return nothing."""
    if value is None:
        return "" if row.empty else "is empty (~); write a value, or leave it out"
    fault, names = row.kind(value), context.names_in(row.registry)
    if fault or names is None or value in names:
        return fault
    hint = suggest(value, names) or "; is the package that registers it imported?"
    return f"no {row.registry} is registered as {shown(value)}{hint}"


def _unknown(path: str, key: str, known: _Known) -> str:
    """Say what is wrong with a key outside the table, or nothing where it may be read."""
    names = [row.name.replace("_*", "_g") for row in known.rows]
    meant = nearest(key, [n for n in names if "*" not in n], _MISSPELT if known.open else 0.6)
    if known.open and (meant is None or _source_names(known.thing, key)):
        return ""
    readers = next((row.by for row in KEYS if row.path == path), ())
    hint = f"did you mean {meant!r}?" if meant else "delete it"
    would = f", {', '.join(readers)} would" if readers and not meant else ""
    return f"{known.reader} does not read it{would}; {hint}"


def _known_in(context: Context, section: str) -> _Known | None:
    """Return the keys that a section may have, None where nothing is known of it."""
    depth, kind = section.count(":"), context.section(section).get("type")
    rows = [
        row for row in KEYS if row.section.count(":") == depth and fnmatchcase(section, row.section)
    ]
    types = [row for row in rows if row.name == "type"]
    registry = types[0].registry if types else ""
    if not rows:
        return None
    if section in ("", "path", "train", "val"):
        reader = str(context.options.get("model_type"))
        thing, is_open = context.registered_as("model", reader), known_model(context) is None
    elif registry == "dataset":
        reader = str(kind)
        thing, is_open = context.registered_as("dataset", kind), not known_dataset(context, kind)
    elif registry:
        return _taken_by(context, rows, kind, registry)
    elif not types:
        return _Known(rows)
    elif kind == "disk" or any(kind in row.by for row in rows):
        reader, thing, is_open = str(kind), None, False
    else:
        return _Known(types, open=True)
    rows = rows if is_open else [row for row in rows if not row.by or reader in row.by]
    return _Known(rows, reader, is_open, thing)


def _taken_by(context: Context, rows: list[Key], kind: Any, registry: str) -> _Known:
    """Return what a class or function takes. BasicSR's own that take anything pass nothing on."""
    thing = context.registered_as(registry, kind)
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):  # not registered; or written in C, without a signature
        return _Known([row for row in rows if row.name == "type"], open=True)
    arguments = {
        name: each
        for name, each in parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and name not in _GIVEN.get(registry, ())
    }
    ours = comes_from(thing, "basicsr", "dlgsanet_arch", "torch")
    extra = ("type", "better") if registry == "metric" else ("type",)
    keys = [row for row in rows if row.name in extra or (ours and row.name in arguments)]
    keys += [_of_argument(name, each, registry == "arch") for name, each in arguments.items()]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    is_open = takes_all and not comes_from(thing, "basicsr")
    if registry == "optimizer" and not known_model(context):  # which may take some out itself
        is_open, thing = True, context.registered_as("model", context.options.get("model_type"))
    return _Known(keys, str(kind), is_open, thing)


def _of_argument(name: str, entry: inspect.Parameter, of_network: bool) -> Key:
    """Return the row of an argument, as its annotation or its default says."""
    default, hint = entry.default, entry.annotation
    kind = values.anything
    if get_origin(hint) is Literal:
        kind = values.choice(*get_args(hint))
    elif hint is bool or isinstance(default, bool):
        kind = values.yes_no
    elif hint is int:
        kind = values.whole()
    elif hint is float or is_number(default):
        kind = values.number()
        if of_network and hint is not float:  # a square may be given by both of its sides
            kind = values.either(kind, values.listed(kind))
    elif isinstance(default, tuple) and all(map(is_number, default)):
        kind = values.either(values.listed(values.number()), values.number())
    elif isinstance(default, str):
        kind = values.text
    needed = "always" if default is entry.empty else ""
    empty = default is None or kind in (values.anything, values.text)
    return Key(name, kind, needed=needed, empty=empty)


def _source_names(thing: Any, name: str) -> bool:
    """Whether the source of a class, its bases, or a function holds `name` in quotes.

    So a key that someone else's data set or model reads is known by itself.
    """
    for owner in inspect.getmro(thing) if inspect.isclass(thing) else (thing,):
        try:
            source = inspect.getsource(inspect.getmodule(owner))
        except (OSError, TypeError):  # defined where there is no file
            continue
        if not comes_from(owner, "torch") and (f"'{name}'" in source or f'"{name}"' in source):
            return True
    return False
