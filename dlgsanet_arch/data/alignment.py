"""Whether LR shows what HR shows, and where HR shows it.

A displacement is (rows, columns) in LR pixels: what MATLAB's bicubic makes of HR at (y, x), LR
shows at (y + rows, x + columns). Reduced by slicing, ``hr[::s, ::s]``, LR is displaced by
(s - 1)/(2·s) in both directions; 0 is right.

Method: phase correlation to the whole pixel, then Gauss-Newton steps (Lucas and Kanade) between
blurred lumas, free in contrast and brightness. Blur, noise, compression and other reductions
that are centred are no displacement.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.pictures import Pixels

# Bicubic reduction reaches 2 LR pixels around each one: that near the border of a sub-image,
# pixels that LR was made from have been cut away.
BORDER = 2
# Of the Gaussian before the fit, in LR pixels: its standard deviation takes the aliases and noise
# away on which the fit would follow; its taps end where they are below 0.1 % of the middle's.
BLUR = 1.0
RADIUS = 4
# Around the fitted part: what the taps reach, and two pixels for the way from the start.
MARGIN = BORDER + RADIUS + 2
WAY = 1.5
# Side of the part that is fitted, in LR pixels: with less, nothing is said; more than the largest
# adds time and no certainty.
LEAST = 16
MOST = 1024

# The constants below were measured on 40 photographs of BSDS400 at x2, x3 and x4, whole and cut to
# LR of 80x80 and 48x48: centred reductions (MATLAB, Pillow, three of OpenCV's), blur with noise of
# 15 or 25 levels and JPEG of quality 40 to 50, slicing, displacements of 0.25 to 3.3 pixels.

# A displacement is told where its uncertainty is below: the largest error then was 0.09 pixels on
# whole photographs, 0.20 at 80x80 and 0.26 at 48x48; 95 of 100 were below 0.06, 0.07 and 0.11.
CERTAIN = 0.05
# Residuals below this root mean square, in levels, are rounding.
ROUNDING = 0.3
# Blurred pixels are not independent: one counts for 4·π·BLUR² of them.
SHARED = 4 * np.pi * BLUR**2
# The median of a set counts as displaced from here on: the medians of centred reductions were
# 0.02 at most, and the smallest displacement that a mistake makes is 0.25 (slicing at x2).
DISPLACED = 0.1
# A pair further than this from its set's median is named; one honest pair of 4,000 was.
STRAY = 0.2
# Slopes of HR of less than this many levels a pixel do not tell one picture from another under
# noise; from here on, LR of this picture correlated by 0.56 or more, of another by 0.35 or less.
DETAIL = 3.0
RELATED = 0.45

Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Alignment:
    """How LR lies on HR.

    Args:
        displacement: (rows, columns) in LR pixels, see the module; None where the content does
            not tell: flat, striped, too small, or LR of another picture. On a repeating texture
            the smallest displacement that fits.
        uncertainty: Standard error of `displacement` in the direction that the content tells
            least about, in LR pixels; infinite where nothing was fitted.
        difference: Mean absolute difference of LR and bicubic HR over pixels and colours, in
            8-bit levels; a border of `BORDER` LR pixels is left out.
        correlation: Of the slopes of LR, its displacement undone, and bicubic HR, -1 to 1; None
            where HR has too little detail to tell.
    """

    displacement: tuple[float, float] | None
    uncertainty: float
    difference: float
    correlation: float | None

    @property
    def unrelated(self) -> bool:
        """Whether LR shows another picture than HR, or another part of it."""
        return self.correlation is not None and self.correlation < RELATED


@dataclass(frozen=True)
class Summary:
    """How the pairs of one set lie.

    Args:
        pairs: How many there are.
        telling: How many of them have a displacement.
        displacement: Median of the displacements, in LR pixels; None where no pair tells.
        difference: Median of the differences, in 8-bit levels; 0 without pairs.
        strays: Names of pairs displaced otherwise than the median, by more than `STRAY`.
        unrelated: Names of pairs whose LR shows another picture.
    """

    pairs: int
    telling: int
    displacement: tuple[float, float] | None
    difference: float
    strays: tuple[str, ...]
    unrelated: tuple[str, ...]

    @property
    def displaced(self) -> bool:
        """Whether LR of this set is displaced as a whole."""
        return self.displacement is not None and max(map(abs, self.displacement)) > DISPLACED


@dataclass(frozen=True, eq=False)
class _Fit:
    move: tuple[float, float]
    uncertainty: float
    residual: float
    correlation: float


def _levels(picture: Pixels) -> Plane:
    """8-bit levels, not rounded."""
    levels = picture.astype(np.float32)
    return levels / 257 if picture.dtype == np.uint16 else levels


def _taps(shift: float = 0.0) -> NDArray[np.float64]:
    """A Gaussian around `shift`: blurs and moves at once."""
    taps = np.exp(-0.5 * ((np.arange(-RADIUS, RADIUS + 1) - shift) / BLUR) ** 2)
    return taps / taps.sum()


def _slope_taps() -> NDArray[np.float64]:
    """Blur and derivative: exact on straight lines."""
    places = np.arange(-RADIUS, RADIUS + 1)
    taps = places * _taps()
    return taps / (taps @ places)


def _filtered(plane: Plane, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Plane:
    return cv2.sepFilter2D(plane, cv2.CV_32F, columns, rows, borderType=cv2.BORDER_REPLICATE)


def _blurred_at(plane: Plane, move: NDArray[np.float64], margin: int) -> Plane:
    """Blur, and read at (y, x) + move what lies `margin` inside."""
    whole = np.rint(move).astype(int)
    blurred = _filtered(plane, *(_taps(shift) for shift in move - whole))
    top, left = margin + whole
    height, width = (side - 2 * margin for side in plane.shape)
    return blurred[top : top + height, left : left + width]


def _slopes(plane: Plane) -> NDArray[np.float32]:
    return np.concatenate([np.diff(plane, axis=axis).ravel() for axis in (0, 1)])


def _correlation(one: Plane, other: Plane) -> float:
    """Of the slopes: a difference of brightness between two halves relates no two pictures."""
    first, second = _slopes(one), _slopes(other)
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norm if norm else 0.0


def _whole_pixels(lr: Plane, expected: Plane) -> tuple[int, int]:
    """Displacement to the whole pixel, by phase correlation with a Gaussian passband."""
    window = np.outer(*(np.hanning(side) for side in lr.shape))
    lr_waves, waves = (np.fft.rfft2((plane - plane.mean()) * window) for plane in (lr, expected))
    cross = lr_waves * waves.conj()
    down, across = np.fft.fftfreq(lr.shape[0]), np.fft.rfftfreq(lr.shape[1])
    passband = np.exp(-2 * (np.pi * BLUR) ** 2 * np.add.outer(down**2, across**2))
    surface = np.fft.irfft2(cross * passband / (np.abs(cross) + 1e-9), lr.shape)
    # only as far as enough is left to fit
    reaches = [(side - LEAST) // 2 - MARGIN for side in lr.shape]
    rows, columns = (np.arange(-reach, reach + 1) for reach in reaches)
    part = surface[np.ix_(rows, columns)]
    row, column = np.unravel_index(np.argmax(part), part.shape)
    return int(rows[row]), int(columns[column])


def _fit(lr: Plane, expected: Plane, start: tuple[int, int]) -> _Fit | None:
    """Move LR onto the expected picture; None where the steps lead away or LR has no contrast.

    Lr at (y, x) + move = gain · expected + offset - gain · ∇expected · (what is left to move).
    The slopes are those of the expected picture, which has no noise: noise in them would make
    displacements too small.
    """
    margin = MARGIN + max(map(abs, start))
    even, slope = _taps(), _slope_taps()
    base, down, across = (
        _filtered(expected, *taps)[margin:-margin, margin:-margin]
        for taps in ((even, even), (slope, even), (even, slope))
    )
    parts = np.stack([each.ravel() for each in (base, np.ones_like(base), down, across)])
    parts = parts.astype(np.float64)
    products = parts @ parts.T
    move = np.array(start, np.float64)
    for _ in range(12):
        target = _blurred_at(lr, move, margin)
        gain, _, *slopes = np.linalg.lstsq(products, parts @ target.ravel(), rcond=None)[0]
        if gain < 0.05:
            return None
        step = np.clip(-np.array(slopes) / gain, -0.5, 0.5)
        move += step
        if np.abs(move - start).max() > WAY:
            return None
        if np.abs(step).max() < 1e-3:
            break
    target = _blurred_at(lr, move, margin)
    levels = np.linalg.lstsq(products[:2, :2], parts[:2] @ target.ravel(), rcond=None)[0]
    residual = float(np.sqrt(np.mean((target.ravel() - levels @ parts[:2]) ** 2)))
    weakest = float(np.linalg.eigvalsh(products[2:, 2:])[0]) / SHARED  # of the structure tensor
    error = max(residual, ROUNDING) / max(float(levels[0]), 0.05)
    uncertainty = error / np.sqrt(weakest) if weakest > 1e-6 else np.inf
    return _Fit(tuple(move.tolist()), float(uncertainty), error, _correlation(target, base))


def _middle(plane: Plane) -> Plane:
    top, left = (max(0, side - MOST) // 2 for side in plane.shape)
    return plane[top : top + MOST, left : left + MOST]


def measure(lr: Pixels, hr: Pixels, scale: int) -> Alignment:
    """Compare LR with what MATLAB's bicubic makes of HR.

    Displacements up to a half of LR's smaller side less 16 pixels are found; LR that is displaced
    further looks unrelated. On sides below 32 LR pixels only the difference is measured.

    Args:
        lr: (h, w, 3) in BGR, uint8 or uint16.
        hr: (h·scale, w·scale, 3) in BGR, uint8 or uint16.
        scale: HR side over LR side.

    Raises:
        ValueError: The sizes do not belong together.
    """
    if hr.shape != (lr.shape[0] * scale, lr.shape[1] * scale, 3) or lr.shape[2:] != (3,):
        raise ValueError(f"sizes do not fit: got {lr.shape=}, {hr.shape=}, {scale=}")
    levels, expected = _levels(lr), _levels(bicubic(hr, 1 / scale))
    edge = BORDER if min(lr.shape[:2]) > 2 * BORDER else 0
    inside = tuple(slice(edge, side - edge) for side in lr.shape[:2])
    difference = float(np.abs(levels - expected)[inside].mean())
    if min(lr.shape[:2]) < LEAST + 2 * MARGIN:
        return Alignment(None, np.inf, difference, None)

    lumas = [_middle(cv2.cvtColor(each, cv2.COLOR_BGR2GRAY)) for each in (levels, expected)]
    even = _taps()
    slopes = _slopes(_filtered(lumas[1], even, even)[MARGIN:-MARGIN, MARGIN:-MARGIN])
    telling = np.sqrt(2 * np.mean(slopes**2)) >= DETAIL
    start = _whole_pixels(*lumas)
    fits = [_fit(*lumas, place) for place in dict.fromkeys([(0, 0), start])]
    found = [fit for fit in fits if fit]
    if not found:
        return Alignment(None, np.inf, difference, 0.0 if telling else None)
    best = found[0]
    # a texture fits again one period further: only what fits clearly better beats the near one
    if found[-1].residual < 0.9 * best.residual:
        best = found[-1]
    certain = best.uncertainty < CERTAIN and best.correlation >= RELATED
    return Alignment(
        best.move if certain else None,
        best.uncertainty,
        difference,
        best.correlation if telling else None,
    )


def summarise(alignments: Mapping[str, Alignment]) -> Summary:
    """Judge a set by the median of its pairs, so that no single picture decides.

    Args:
        alignments: The measurement of each pair, by the pair's name.
    """
    told = {name: each.displacement for name, each in alignments.items() if each.displacement}
    displacement = None
    if told:
        displacement = tuple(median(place) for place in zip(*told.values(), strict=True))
    return Summary(
        pairs=len(alignments),
        telling=len(told),
        displacement=displacement,
        difference=median([each.difference for each in alignments.values()] or [0.0]),
        strays=tuple(
            name
            for name, place in told.items()
            if max(abs(a - b) for a, b in zip(place, displacement, strict=True)) > STRAY
        ),
        unrelated=tuple(name for name, each in alignments.items() if each.unrelated),
    )
