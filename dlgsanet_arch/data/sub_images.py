"""Cutting images into overlapping parts, LR exactly where HR is."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data import SCALES

# HR cut to a multiple of it serves all scales with one and the same database.
HR_MULTIPLE = math.lcm(*SCALES)

ImageArray = NDArray[np.uint8]


def crop_to_multiple(image: ImageArray, multiple: int) -> ImageArray:
    """Cut rows and columns off the bottom and the right so that `multiple` divides both sides."""
    height, width = (side - side % multiple for side in image.shape[:2])
    return image[:height, :width]


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where windows of `size` start along `length`: every `step`, the last flush with the end.

    The rule of BasicSR's `extract_subimages.py` with a `thresh_size` of 0. Where `length` is
    less than `size` there is one window, the whole.
    """
    if length <= size:
        return [0]
    return sorted({*range(0, length - size + 1, step), length - size})


def sub_images(image: ImageArray, size: int, step: int, scale: int = 1) -> Iterator[ImageArray]:
    """Cut an image, HR or LR, into parts that show the same places at every scale, row by row.

    Args:
        image: (H/scale, W/scale, 3), where H x W is HR, both multiples of `scale`.
        size: Side of a part in HR pixels, a multiple of `scale`; a shorter side is taken whole.
        step: Between two parts in HR pixels, a multiple of `scale`.
        scale: HR side over this image's side; 1 for HR itself.

    Yields:
        Views of `image`.
    """
    rows, columns = (_starts(side * scale, size, step) for side in image.shape[:2])
    for top in (row // scale for row in rows):
        for left in (column // scale for column in columns):
            yield image[top : top + size // scale, left : left + size // scale]
