"""What an option file may say: read, overridden and checked before anything is created.

`problems` runs every function of `CHECKS` and lists all they found; `refuse` makes one error of it.
A check is a generator: it takes a `Context` and yields one line a problem, "datasets:train:gt_size:
what is wrong; the fix". To add a check, write it where its like are and name it in that file's
`CHECKS`: `required` has what must be there, `keys` what may be there, `values` what it may be,
`cross_checks` what must fit together, and `paths` the files that are named. A check must bear any
YAML: a section may be absent, empty or no section at all, which `required` alone reports. What
images and weights hold is checked by the pipeline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.options import cross_checks, keys, paths, required, values
from dlgsanet_arch.options.context import Context, OptionsError, Registered
from dlgsanet_arch.options.reading import load, override, parse_value

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

CHECKS = (*required.CHECKS, *keys.CHECKS, *values.CHECKS, *cross_checks.CHECKS, *paths.CHECKS)


def problems(
    options: Mapping[str, Any],
    *,
    train: bool,
    root: Path,
    registered: Registered | None,
) -> list[str]:
    """List what is wrong with options; nothing is read into memory.

    Args:
        options: As `load` returns them.
        train: Whether they are to train, else to test.
        root: The folder that relative paths start from.
        registered: What is in each of BasicSR's registries by name, under "arch", "model",
            "dataset", "metric" and "loss"; a registry that is absent, or None for all, is not
            checked.

    Returns:
        One line a problem: the key's path, what is wrong, the fix.
    """
    context = Context(options, train, root, registered)
    return [problem for find in CHECKS for problem in find(context)]


def refuse(found: Sequence[str]) -> None:
    """Raise one error for all problems, if there are any.

    Raises:
        OptionsError: Lists them, one a line.
    """
    if found:
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        raise OptionsError("\n  ".join([f"the options have {count}:", *found]))
