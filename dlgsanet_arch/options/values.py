"""What a value may be: a kind is a function that says what is wrong with a value, or nothing.

Every kind takes any YAML: text, numbers, NaN, infinities, true and false, lists, mappings, dates.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from dlgsanet_arch.hints import shown, suggest_or_list
from dlgsanet_arch.options.context import is_number, is_whole

Kind = Callable[[Any], str]

_LONGEST_NAME = 200  # bytes; the earlier run of a name is renamed to a longer one


def number(interval: str = "[-3e38, 3e38]", kind: str = "number") -> Kind:
    """Return the kind of numbers in an interval such as "[0, 1)", by default what float32 holds.

    `kind` is "number"; "whole number", an integer; or "count", which may also be written 5e3.
    """
    low, high = map(float, interval[1:-1].split(","))
    what = f"{'a number' if kind == 'number' else 'a whole number'} in {interval}"

    def fault(value: Any) -> str:
        if isinstance(value, str):
            return f"must be a number without quotes; got {shown(value)}"
        fits = (
            (is_whole(value) if kind == "whole number" else is_number(value))
            and (low < value or (low == value and interval[0] == "["))
            and (value < high or (value == high and interval[-1] == "]"))
            and (kind != "count" or value == int(value))
        )
        return "" if fits else f"must be {what}; got {shown(value)}"

    return fault


whole = functools.partial(number, kind="whole number")
count = functools.partial(number, kind="count")


def listed(kind: Kind, length: int | None = None) -> Kind:
    """Return the kind of lists of a kind, of a given length or of any."""
    what = "must be a list, [a, b, …]" if length is None else f"must be a list of {length} values"

    def fault(value: Any) -> str:
        if not isinstance(value, list) or length not in (None, len(value)):
            return f"{what}; got {shown(value)}"
        return next(filter(None, map(kind, value)), "")

    return fault


def weights(length: int | None = None) -> Kind:
    """Return the kind of lists of probabilities, not all of them 0."""
    numbers = listed(number("[0, 3e38]"), length)
    return lambda value: numbers(value) or ("" if any(value) else "must not all be 0")


def choice(*choices: Any) -> Kind:
    """Return the kind of some fixed values."""

    def fault(value: Any) -> str:
        known = any(value == entry and type(value) is type(entry) for entry in choices)
        return "" if known else f"{shown(value)} is not known{suggest_or_list(value, choices)}"

    return fault


def either(*kinds: Kind) -> Kind:
    """Return the kind of values that are of one of some kinds; the first names what is wrong."""
    return lambda value: "" if any(not kind(value) for kind in kinds) else kinds[0](value)


def text(value: Any) -> str:
    """Accept text."""
    if isinstance(value, str):
        return ""
    return f"must be text; got {shown(value)}; write it in quotes"


def yes_no(value: Any) -> str:
    """Accept true and false."""
    return "" if isinstance(value, bool) else f"must be true or false; got {shown(value)}"


def section(value: Any) -> str:
    """Accept keys with values."""
    return "" if isinstance(value, Mapping) else f"must be a section of keys; got {shown(value)}"


def anything(value: Any) -> str:
    """Accept everything."""
    return ""


def part_of_name(value: Any) -> str:
    """Accept text that can stand within the name of a file."""
    if fault := text(value):
        return fault
    if "/" in value or os.sep in value or not value.isprintable():
        return f"must have no / and no control characters; got {shown(value)}"
    size = len(os.fsencode(value))
    return f"must have {_LONGEST_NAME} bytes at most; it has {size}" if size > _LONGEST_NAME else ""


def name(value: Any) -> str:
    """Accept the name of a folder."""
    if value in ("", ".", ".."):
        return f"must be the name of a folder; got {shown(value)}"
    return part_of_name(value)


def path(value: Any) -> str:
    """Accept the path of a file or folder, from the root or from a home folder."""
    if fault := text(value):
        return fault
    parts = [len(part.encode(errors="replace")) for part in value.split("/")]
    if not value or "\0" in value or max(parts) > 255 or sum(parts) > 4000:  # Linux's limits
        return f"must be a path; got {shown(value)}"
    if os.path.expanduser(value).startswith("~"):
        return f"names an unknown user: {shown(value)}; for a file of that name write ./{value}"
    return ""


def template(value: Any) -> str:
    """Accept the template of a file's name, with {} for the name that it is made of."""
    if fault := text(value):
        return fault
    try:
        value.format("name")
    except (ValueError, LookupError, AttributeError, TypeError):
        return f"must have {{}} where the name of the HR image goes; got {shown(value)}"
    return ""
