"""Progress bars on stderr."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from dlgsanet_arch.hints import printable

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(
    what: str,
    total: int,
    unit: str,
    *,
    done: int = 0,
    transient: bool = False,
    hidden: bool = False,
) -> tqdm:
    """Return a progress bar of `total` units, to be used in a `with` statement.

    On a terminal it moves; in a log file it leaves a line every half minute. `what` is its label,
    unit ``B`` shows bytes as KiB, MiB and so on, and `done` units do not count as speed. A
    `transient` bar disappears at its end, and shows nothing in a file.
    """
    from tqdm import tqdm

    moving = sys.stderr.isatty()
    in_bytes = unit == "B"
    # Containers and notebooks may not know their terminal's width, and tqdm then shows nothing.
    knows_width = False
    with suppress(OSError):
        knows_width = moving and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm(
        desc=printable(what) or None,
        total=total,
        initial=done,
        unit=unit if in_bytes else f" {unit}",
        unit_scale=in_bytes,
        unit_divisor=1024,
        file=sys.stderr,
        disable=hidden or (transient and not moving),
        leave=not transient,
        dynamic_ncols=knows_width,
        ncols=80 if moving and not knows_width else None,
        mininterval=0.1 if moving else 30,
        maxinterval=10 if moving else 60,
    )
