"""The test sets that papers measure on: their names, and how bicubic does on them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from dlgsanet_arch.data.scores import Scores
from dlgsanet_arch.errors import UserError


class KnownSet(NamedTuple):
    """A set that papers test on: its size, a tolerance, bicubic's mean scores by scale."""

    count: int
    tolerance: Scores
    bicubic: Mapping[int, Scores]

    def agrees(self, scale: int, scores: Scores) -> bool:
        """Whether scores equal the published ones up to the tolerance."""
        differences = zip(scores, self.bicubic[scale], self.tolerance, strict=True)
        return all(abs(ours - known) <= most for ours, known, most in differences)


# Measured by BasicSR's own imresize and metrics, and rounded: the same functions measure here.
MEASURED = Scores(0.01, 0.0005)
# Printed in papers and measured by MATLAB. On Set5 and B100 such figures are up to 0.02 dB and
# 0.0009 off those of BasicSR's functions; a different LR or protocol costs tenths of a dB.
PRINTED = Scores(0.05, 0.002)

KNOWN = {
    name: KnownSet(count, tolerance, {2: Scores(*x2), 3: Scores(*x3), 4: Scores(*x4)})
    for name, count, tolerance, x2, x3, x4 in (
        ("Set5", 5, MEASURED, (33.68, 0.9305), (30.40, 0.8690), (28.43, 0.8113)),
        ("Set14", 14, MEASURED, (30.33, 0.8700), (27.63, 0.7760), (26.09, 0.7050)),
        ("B100", 100, MEASURED, (29.56, 0.8436), (27.21, 0.7392), (25.96, 0.6682)),
        # Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention
        # Networks", ECCV 2018, table 2; so is Manga109.
        ("Urban100", 100, PRINTED, (26.88, 0.8403), (24.46, 0.7349), (23.14, 0.6577)),
        ("Manga109", 109, PRINTED, (30.80, 0.9339), (26.95, 0.8556), (24.89, 0.7866)),
    )
}
SPELLINGS = {name.casefold(): name for name in KNOWN} | {"bsd100": "B100", "bsds100": "B100"}


def known_name(text: str) -> str | None:
    """The name of a set that papers test on, however it is spelled; None for any other text."""
    return SPELLINGS.get(re.sub(r"[\s_-]", "", text).casefold())


def set_name(text: str) -> str:
    """The name of a test set as the data tree spells it: ``set5`` and ``Set 5`` are Set5.

    Raises:
        UserError: It is neither a known set nor made of letters, digits, - and _.
    """
    known = known_name(text)
    if known is None and not re.fullmatch("[A-Za-z0-9_-]+", text):
        raise UserError(
            f"{text!r} cannot be a test set's name: use letters, digits, - and _, "
            f"or one of {', '.join(KNOWN)}"
        )
    return known or text
