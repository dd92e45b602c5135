"""How long work shows that it continues."""

import sys

from tqdm import tqdm


def progress_bar(what: str, total: int, unit: str) -> tqdm:
    """A progress bar on stderr, to be used in a `with` statement.

    On a terminal it moves; in a log file it leaves a line every half minute.

    Args:
        what: What is done, in front of the bar.
        total: How many units make the whole.
        unit: What is counted; ``B`` shows bytes as KiB, MiB and so on.
    """
    moving = sys.stderr.isatty()
    in_bytes = unit == "B"
    return tqdm(
        desc=what,
        total=total,
        unit=unit if in_bytes else f" {unit}",
        unit_scale=in_bytes,
        unit_divisor=1024,
        file=sys.stderr,
        dynamic_ncols=moving,
        mininterval=0.1 if moving else 30,
        maxinterval=10 if moving else 60,
    )
