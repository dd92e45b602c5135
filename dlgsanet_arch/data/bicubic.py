"""Bicubic resizing as MATLAB's imresize does it, which made the images behind published figures.

Antialiased when shrinking, a = -1/2, borders mirrored. In NumPy, with the positions of BasicSR's
`imresize`, which counts from 1 in float32: at x3 that changes pixels. The two differ by a level
where a sum lies half-way between two, about three values in a million: there the order of the sum
decides, which in BasicSR is that of the machine's BLAS, and here always that of the taps. So a
data set has the same bytes on every machine, and making it needs neither PyTorch nor BasicSR.
"""

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Depth = TypeVar("Depth", np.uint8, np.uint16)

STRIP = 256  # rows of the result made at a time: memory for these suffices
_SUPPORT = 4  # positions under the cubic kernel


def _cubic(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Evaluate the kernel of Keys (1981) with a = -1/2."""
    x = np.abs(x)
    x2 = x * x
    x3 = x2 * x
    inner = np.float32(1.5) * x3 - np.float32(2.5) * x2 + 1
    outer = np.float32(-0.5) * x3 + np.float32(2.5) * x2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x <= 2, outer, np.float32(0)))


def _taps(length: int, scale: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """How N = ceil(length·scale) results are summed along an axis: K weights from a position on.

    Returns first positions (N,), which may be outside, and weights (N, K).
    """
    shrink = min(scale, 1.0)
    support = _SUPPORT / shrink
    places = np.arange(1, math.ceil(length * scale) + 1, dtype=np.float32)
    centres = places / np.float32(scale) + np.float32(0.5 * (1 - 1 / scale))
    left = np.floor(centres - np.float32(support / 2))
    offsets = np.arange(math.ceil(support) + 2, dtype=np.float32)
    distances = centres[:, None] - (left[:, None] + offsets)
    weights = np.float32(shrink) * _cubic(distances * np.float32(shrink))
    weights = weights / sum(weights.T)[:, None]  # in order, as all sums here
    # The first and last taps are zero for all positions, or for none that counts.
    used = ~(weights == 0).all(0)
    start, stop = np.flatnonzero(used)[[0, -1]]
    return left.astype(np.int64) - 1 + start, np.ascontiguousarray(weights[:, start : stop + 1])


def _mirrored(positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Positions of an axis that is mirrored at its ends, as often as needed."""
    positions = positions % (2 * length)
    return np.minimum(positions, 2 * length - 1 - positions)


def bicubic(image: NDArray[Depth], scale: float) -> NDArray[Depth]:
    """Resize an image as MATLAB's imresize does: bicubic, antialiased when shrinking.

    Args:
        image: (H, W) or (H, W, C), any C, uint8 or uint16, with pixels; else ValueError.
        scale: New side over old side, positive and finite, else ValueError.

    Returns (ceil(H·scale), ceil(W·scale)) or (..., C), rounded and clipped, of the image's dtype.
    """
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"image must be of uint8 or uint16, got {image.dtype=}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"image must be (H, W) or (H, W, C) with pixels, got {image.shape=}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale=}")
    scale = float(scale)

    height, width = image.shape[:2]
    peak = np.iinfo(image.dtype).max
    (first, weights), across = _taps(height, scale), _taps(width, scale)
    result = np.empty((len(first), len(across[0]), *image.shape[2:]), image.dtype)
    for begin in range(0, len(first), STRIP):
        strip = slice(begin, begin + STRIP)
        top, bottom = first[strip][0], first[strip][-1] + weights.shape[1]
        source = image[_mirrored(np.arange(top, bottom), height)].astype(np.float32)
        source /= np.float32(peak)
        shrunk = _sum(source, first[strip] - top, weights[strip]).swapaxes(0, 1)
        finished = _sum(shrunk, *across).swapaxes(0, 1)
        finished *= np.float32(peak)
        result[strip] = np.clip(np.round(finished), 0, peak)
    return result


def _sum(
    values: NDArray[np.float32], first: NDArray[np.int64], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sum along the first axis, one tap after the other."""
    weights = weights.reshape(*weights.shape, *[1] * (values.ndim - 1))
    total = values[_mirrored(first, len(values))] * weights[:, 0]
    for tap in range(1, weights.shape[1]):
        total += values[_mirrored(first + tap, len(values))] * weights[:, tap]
    return total
