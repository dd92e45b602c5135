"""Option files, read and checked before anything is created.

`problems` compares options with the table of `schema` in one pass (`walk`), then checks what must
fit together (`checks`) and that files exist (`paths`), on values that passed. A new key is a row of
the table; a rule that spans keys is a generator in `checks.CHECKS`. What images and weights hold is
checked by the pipeline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.options import checks
from dlgsanet_arch.options.context import Context, OptionsError, Registered
from dlgsanet_arch.options.load import load, override, parse_value
from dlgsanet_arch.options.paths import missing_files
from dlgsanet_arch.options.walk import compare

__all__ = [
    "Context",
    "OptionsError",
    "Registered",
    "load",
    "override",
    "parse_value",
    "problems",
    "refuse",
]


def problems(
    options: Mapping[str, Any],
    *,
    train: bool,
    root: Path,
    registered: Registered | None,
) -> list[str]:
    """List what is wrong with options, one line a problem: the key's path, the fault, the fix.

    Args:
        options: As `load` returns them.
        train: Whether they are to train, else to test.
        root: The folder that relative paths start from.
        registered: What is in BasicSR's registries "arch", "model", "dataset", "metric" and
            "loss" by name; one that is absent, or None for all, is not checked.
    """
    found: list[str] = []
    sound = compare(Context(options, train, root, registered), found)
    context = Context(sound, train, root, registered)
    return found + [line for find in (*checks.CHECKS, missing_files) for line in find(context)]


def refuse(found: Sequence[str]) -> None:
    """Raise an OptionsError that lists all problems, if there are any."""
    if found:
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        raise OptionsError("\n  ".join([f"the options have {count}:", *found]))
