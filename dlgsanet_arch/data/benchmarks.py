"""The test sets that papers measure on: their names, and how bicubic does on them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from dlgsanet_arch.data.scores import Scores
from dlgsanet_arch.errors import UserError


class KnownSet(NamedTuple):
    """A set that papers test on: its size, bicubic's mean scores by scale, their tolerance."""

    count: int
    bicubic: Mapping[int, Scores]
    tolerance: Scores


# Measured by BasicSR's own imresize and metrics, and rounded: the same functions measure here.
MEASURED = Scores(0.01, 0.0005)
# Printed in papers and measured by MATLAB. On Set5 and B100 such figures are up to 0.02 dB and
# 0.0009 off those of BasicSR's functions; a different LR or protocol costs tenths of a dB.
PRINTED = Scores(0.05, 0.002)

KNOWN = {
    name: KnownSet(count, {scale: Scores(*each) for scale, each in bicubic.items()}, tolerance)
    for name, count, bicubic, tolerance in (
        ("Set5", 5, {2: (33.68, 0.9305), 3: (30.40, 0.8690), 4: (28.43, 0.8113)}, MEASURED),
        ("Set14", 14, {2: (30.33, 0.8700), 3: (27.63, 0.7760), 4: (26.09, 0.7050)}, MEASURED),
        ("B100", 100, {2: (29.56, 0.8436), 3: (27.21, 0.7392), 4: (25.96, 0.6682)}, MEASURED),
        # Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention
        # Networks", ECCV 2018, table 2; so is Manga109.
        ("Urban100", 100, {2: (26.88, 0.8403), 3: (24.46, 0.7349), 4: (23.14, 0.6577)}, PRINTED),
        ("Manga109", 109, {2: (30.80, 0.9339), 3: (26.95, 0.8556), 4: (24.89, 0.7866)}, PRINTED),
    )
}
OTHER_NAMES = {"bsd100": "B100", "bsds100": "B100"}


def known_name(text: str) -> str | None:
    """The name of a set that papers test on, however it is spelled; None for any other text."""
    folded = re.sub(r"[\s_-]", "", text).casefold()
    names = {name.casefold(): name for name in KNOWN} | OTHER_NAMES
    return names.get(folded)


def set_name(text: str) -> str:
    """The name of a test set as the data tree spells it: ``set5`` and ``Set 5`` are Set5.

    Args:
        text: A known set in any spelling, or any other name of letters, digits, - and _.

    Raises:
        UserError: It is neither.
    """
    known = known_name(text)
    if known is None and not re.fullmatch("[A-Za-z0-9_-]+", text):
        raise UserError(
            f"{text!r} cannot be a test set's name: use letters, digits, - and _, "
            f"or one of {', '.join(KNOWN)}"
        )
    return known or text
