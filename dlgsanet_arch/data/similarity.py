"""Whether LR is the bicubic of HR, and whether test images are among training images.

Copies are found by thumbnails: 16x16 grey levels. Compression, resizing and conversion to grey
change them less than `TOLERANCE`. Not found are images that were flipped, rotated, changed in
brightness or cropped by 1 % or more, and images without contrast. Of crops, only those from the
upper left corner of a test image are found, since the first sub-image of an image is one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.sub_images import ImageArray

# Of bicubic downscaling, in LR pixels: LR of a sub-image was made from HR beyond its border.
REACH = 2
SIDE = 16
# Mean absolute difference of two thumbnails over the standard deviation of one. Between crops of
# 414 photographs it was 0.19 or more; after JPEG of quality 30 or halving, 0.05 or less.
TOLERANCE = 0.1
# Standard deviation, in levels, of thumbnails that say too little: clear sky, blank paper.
FLAT = 4


class Thumbnail(NamedTuple):
    """The size of an image, and its grey levels (`SIDE`²,) as int16."""

    size: tuple[int, int]
    levels: NDArray[np.int16]


def thumbnail(image: ImageArray) -> Thumbnail:
    """Shrink an image (H, W, 3) in BGR."""
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    levels = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return Thumbnail(image.shape[:2], levels.ravel().astype(np.int16))


def corner_thumbnails(
    image: ImageArray, sizes: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], Thumbnail]:
    """Shrink the upper left parts of an image that have one of some sizes; (0, 0) is all of it."""
    parts = {
        (height, width): thumbnail(image[:height, :width])
        for height, width in sizes
        if height <= image.shape[0] and width <= image.shape[1]
    }
    return {(0, 0): thumbnail(image), **parts}


class TrainingImages:
    """Finds test images among training images, given by thumbnails; `sizes` are theirs."""

    def __init__(self, thumbnails: Mapping[str, Thumbnail]) -> None:
        # ``0001_s002`` is the second sub-image of 0001
        self._images = {name: re.sub(r"_s\d+$", "", name) for name in thumbnails}
        self._names = np.array(list(thumbnails))
        self._levels = np.array([each.levels for each in thumbnails.values()])
        rows = defaultdict(list)
        for row, each in enumerate(thumbnails.values()):
            rows[each.size].append(row)
        self._rows = {size: np.array(each) for size, each in rows.items()}
        self.sizes = frozenset(rows)

    def _alike(self, levels: NDArray[np.int16], rows: NDArray[np.int64] | slice) -> set[str]:
        if levels.std() < FLAT:
            return set()
        difference = np.abs(self._levels[rows] - levels).sum(1) / len(levels)
        return {*self._names[rows][difference <= TOLERANCE * levels.std()]}

    def find(self, corners: Mapping[tuple[int, int], Thumbnail]) -> list[str]:
        """Name the copies of a test image, of its upper left part, and their other sub-images.

        Args:
            corners: Of the test image, by `corner_thumbnails` with `sizes` or more.
        """
        found = set()
        for size, each in corners.items():
            rows = slice(None) if size == (0, 0) else self._rows.get(size)
            if rows is not None:
                found |= self._alike(each.levels, rows)
        found = {self._images[name] for name in found}
        return [name for name, image in self._images.items() if image in found]


def pixel_digest(image: ImageArray) -> str:
    """SHA-256 of shape and pixels, equal for equal images whatever files they came from."""
    digest = sha256(f"{image.shape} ".encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def psnr_to_bicubic(lr: ImageArray, hr: ImageArray, scale: int) -> float:
    """PSNR in dB of LR to MATLAB's bicubic of HR, without a border of `REACH` pixels; 361 if equal.

    `lr` is (h, w, 3) in BGR, `hr` (h·scale, w·scale, 3).
    """
    edge = REACH if min(lr.shape[:2]) > 2 * REACH else 0
    inside = tuple(slice(edge, side - edge) for side in lr.shape[:2])
    return cv2.PSNR(lr[inside], bicubic(hr, 1 / scale)[inside])
