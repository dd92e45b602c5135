"""How messages name many things."""

from collections.abc import Sequence


def named(names: Sequence[str], most: int = 5) -> str:
    """Name the first few of many things, and count the others."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
