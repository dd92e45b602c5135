"""Which keys a section of a given option file may have: rows of the table, and signatures."""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

from dlgsanet_arch.hints import nearest
from dlgsanet_arch.options import values
from dlgsanet_arch.options.context import Context, comes_from, is_number
from dlgsanet_arch.options.schema import KEYS, Key, known_dataset, known_model

_MISSPELT = 0.8  # how near a name must be where any name may stand
_GIVEN = {"metric": ("img", "img2"), "optimizer": ("params",)}  # arguments that are not options


@dataclass(frozen=True)
class Known:
    """The keys of a section."""

    keys: tuple[Key, ...]  # rows of the table, those that apply before others of the name
    reader: str = ""  # who reads them, for messages; "" where it is BasicSR or the pipeline
    thing: Any = None  # what may read others, where that is known
    open: bool = False  # others may be read; only what looks like a misspelling is refused then
    is_call: bool = False  # they are arguments of the reader

    def find(self, name: str) -> Key | None:
        """Return the row of a key."""
        return next((key for key in self.keys if fnmatchcase(name, key.name)), None)

    @property
    def names(self) -> list[str]:
        """The names of keys, with g for any network."""
        names = dict.fromkeys(key.name.replace("_*", "_g") for key in self.keys)
        return [name for name in names if "*" not in name]

    def misspelt(self, name: str) -> str | None:
        """Return why a key is refused: the nearest name, "" without one; None where it is fine."""
        if self.find(name):
            return None
        if not self.open:
            return nearest(name, self.names) or ""
        meant = nearest(name, self.names, _MISSPELT)
        read = self.thing is not None and _source_names(self.thing, name)
        return None if meant is None or read else meant


@functools.lru_cache(maxsize=65536)
def matches(path: str, pattern: str) -> bool:
    """Whether a path is one of a pattern's, where * stands for a part of one name."""
    return path.count(":") == pattern.count(":") and fnmatchcase(path, pattern)


@functools.cache
def rows_of(section: str) -> tuple[Key, ...]:
    """Return all rows of the table for a section."""
    return tuple(key for key in KEYS if matches(section, key.section))


def known_in(context: Context, section: str) -> Known | None:
    """Return the keys that a section may have, None where nothing is known of it."""
    rows, kind = rows_of(section), context.section(section).get("type")
    if not rows:
        return None
    kinds = [row.kind for row in rows if row.name == "type"]
    registry = kinds[0].registry if kinds and isinstance(kinds[0], values.Named) else ""
    of_type_alone = Known(tuple(row for row in rows if row.name == "type"), open=True)
    if section in ("", "path", "train", "val"):
        registry, reader = "model", str(context.options.get("model_type"))
        is_known = known_model(context) is not None
    elif registry == "dataset":
        reader, is_known = str(kind), known_dataset(context, kind) is not None
    elif registry:
        thing = context.registered_as(registry, kind)
        known = None if thing is None else _taken_by(thing, str(kind), rows, registry)
        if registry == "optimizer" and known and not known_model(context):
            model = context.registered_as("model", context.options.get("model_type"))
            return Known(known.keys, known.reader, model, open=True, is_call=True)
        return known or of_type_alone
    elif kinds or section == "train:scheduler":
        reader = str(kind)
        if kind != "disk" and not any(kind in row.by for row in rows):
            return of_type_alone
        is_known = True
    else:
        return Known(rows)
    if not is_known:
        return Known(rows, reader, context.registered_as(registry, reader), open=True)
    rows = tuple(row for row in rows if not row.by or reader in row.by)
    return Known(rows, reader, is_call=section == "train:scheduler")


@functools.cache
def _signature(thing: Any) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(thing).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None


def parameters_of(thing: Any) -> dict[str, inspect.Parameter]:
    """Return what a class or function takes by name; nothing where its signature is not known."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: entry for name, entry in (_signature(thing) or {}).items() if entry.kind in by_name
    }


def _taken_by(thing: Any, reader: str, rows: tuple[Key, ...], registry: str) -> Known | None:
    """Return what a callable takes. BasicSR's own that take anything pass nothing on."""
    if _signature(thing) is None:
        return None
    given = _GIVEN.get(registry, ())
    arguments = {key: each for key, each in parameters_of(thing).items() if key not in given}
    ours = comes_from(thing, "basicsr", "dlgsanet_arch", "torch")
    extra = ("type", "better") if registry == "metric" else ("type",)
    keys = [row for row in rows if row.name in extra or (ours and row.name in arguments)]
    keys += [_of_argument(key, each, registry == "arch") for key, each in arguments.items()]
    kinds = {entry.kind for entry in (_signature(thing) or {}).values()}
    is_open = inspect.Parameter.VAR_KEYWORD in kinds and not comes_from(thing, "basicsr")
    return Known(tuple(keys), reader, thing, is_open, is_call=True)


def _of_argument(name: str, entry: inspect.Parameter, of_network: bool) -> Key:
    """Return the row of an argument, as its annotation or its default says."""
    default, hint = entry.default, entry.annotation
    kind = values.anything
    if get_origin(hint) is Literal:
        kind = values.choice(*get_args(hint))
    elif hint is bool or isinstance(default, bool):
        kind = values.yes_no
    elif hint is int:
        kind = values.whole("(-inf, inf)")
    elif hint is float or is_number(default):
        kind = values.number()
        if of_network and hint is not float:  # a square may be given by both of its sides
            kind = values.either(kind, values.listed(kind, "[1, 1]"))
    elif isinstance(default, tuple) and all(map(is_number, default)):
        kind = values.either(values.listed(values.number(), str(list(default))), values.number())
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
        if comes_from(owner, "builtins", "torch"):
            continue
        try:
            source = inspect.getsource(inspect.getmodule(owner))
        except (OSError, TypeError):  # defined where there is no file
            continue
        if f"'{name}'" in source or f'"{name}"' in source:
            return True
    return False
