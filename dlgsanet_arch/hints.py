"""How messages name things: what is near an unknown name, and the first few of many."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like `name`, letter case aside, if any is like it.

    `cutoff` is how like a name must be, from 0 to 1.
    """
    lowered = {str(entry).lower(): str(entry) for entry in known}
    near = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=cutoff)
    return lowered[near[0]] if near else None


def suggest(name: object, known: Iterable[object]) -> str:
    """Return "; did you mean …?" with the nearest known name, or nothing."""
    found = nearest(name, known)
    return "" if found is None else f"; did you mean {found!r}?"


def suggest_or_list(name: object, known: Iterable[object]) -> str:
    """Return the nearest name as `suggest` does, or all of them."""
    known = list(known)
    return suggest(name, known) or f"; there are: {', '.join(map(repr, known))}"


def cut(text: str, most: int = 1000) -> str:
    """Leave out the middle of text that is too long to be read, such as a key in a hostile file."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def shown(value: Any) -> str:
    """Return a value as YAML spells it, shortened."""
    special = {"True": "true", "False": "false", "None": "~"}
    return special.get(repr(value), cut(repr(value), 60))


def named(names: Sequence[str], most: int = 5) -> str:
    """Name the first few of many things, and count the others."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(cut, names[:most])) + more


def quoted(names: Iterable[str], most: int = 5) -> str:
    """Name the first few of many things in quotation marks, and count the others."""
    return named([repr(name) for name in names], most)


def printable(text: str) -> str:
    """Escape control sequences and invalid characters, so that a terminal shows them as text."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )
