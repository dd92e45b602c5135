"""Cutting images into overlapping parts, LR exactly where HR is."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data import SCALES
from dlgsanet_arch.errors import UserError

# HR cut to a multiple of it serves all scales with one and the same database.
HR_MULTIPLE = math.lcm(*SCALES)
PNG_COMPRESSION = 1

ImageArray = NDArray[np.uint8]


def encode_png(image: ImageArray) -> bytes:
    """Encode an image (H, W, 3) in BGR without loss."""
    fine, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION])
    if not fine:
        raise RuntimeError(f"OpenCV could not encode an image of {image.shape=}")
    return data.tobytes()


class Cutting(NamedTuple):
    """Side of a sub-image and distance of two in HR pixels, side of a training patch in LR's."""

    crop: int = 480
    step: int = 240
    patch: int = 48

    def check(self, scales: Sequence[int]) -> None:
        """Raise a UserError where LR cannot be cut to match at one of the scales."""
        for name, value in (("--crop", self.crop), ("--step", self.step)):
            wrong = [scale for scale in scales if value < 1 or value % scale]
            if wrong:
                multiple = math.lcm(*scales)
                near = max(multiple, round(value / multiple) * multiple)
                raise UserError(
                    f"{name} {value} is not a multiple of scale {wrong[0]}: LR could not be cut "
                    f"to match; use {near}"
                )


def crop_to_multiple(image: ImageArray, multiple: int) -> ImageArray:
    """Cut rows and columns off the bottom and the right so that `multiple` divides both sides."""
    height, width = (side - side % multiple for side in image.shape[:2])
    return image[:height, :width]


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where windows of `size` start along `length`: every `step`, the last flush with the end.

    The rule of BasicSR's `extract_subimages.py` with a `thresh_size` of 0. A `length` less than
    `size` is one window.
    """
    if length <= size:
        return [0]
    return sorted({*range(0, length - size + 1, step), length - size})


def sub_images(image: ImageArray, size: int, step: int, scale: int = 1) -> Iterator[ImageArray]:
    """Cut an image, HR or LR, into parts that show the same places at every scale, row by row.

    Args:
        image: (H/scale, W/scale, 3), where H x W is HR; parts are views of it.
        size: Side of a part in HR pixels, a multiple of `scale`; shorter sides are not cut.
        step: Between two parts in HR pixels, a multiple of `scale`.
        scale: HR side over this image's side; 1 for HR itself.
    """
    rows, columns = (_starts(side * scale, size, step) for side in image.shape[:2])
    for top in (row // scale for row in rows):
        for left in (column // scale for column in columns):
            yield image[top : top + size // scale, left : left + size // scale]
