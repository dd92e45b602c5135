"""Whether LR is the bicubic of HR, and whether test images are among training images.

Copies are found by thumbnails: 16x16 gray levels. Compression, resizing and conversion to gray
change them less than `TOLERANCE`. Not found are images that were flipped, rotated, changed in
brightness or cropped by 1 % or more, and images without contrast. Of crops, only those from the
upper left corner of a test image are found, since the first sub-image of an image is one.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from hashlib import sha256

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.making import ImageArray

# Of bicubic downscaling, in LR pixels: LR of a sub-image was made from HR beyond its border.
REACH = 2
SIDE = 16
# Mean absolute difference of two thumbnails over the standard deviation of one. Between crops of
# 414 photographs it was 0.19 or more; after JPEG of quality 30 or halving, 0.05 or less.
TOLERANCE = 0.1
# Standard deviation, in levels, of thumbnails that say too little: clear sky, blank paper.
FLAT = 4

Size = tuple[int, int]  # height and width
Levels = NDArray[np.int16]  # a thumbnail, (SIDE²,)
WHOLE = (0, 0)


def thumbnail(image: ImageArray) -> Levels:
    """Shrink an image (H, W, 3) in BGR."""
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    levels = cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return levels.ravel().astype(np.int16)


def corner_thumbnails(image: ImageArray, sizes: Iterable[Size]) -> dict[Size, Levels]:
    """Shrink the upper left parts of an image that have one of some sizes, and all of it, WHOLE."""
    parts = {WHOLE: thumbnail(image)}
    for height, width in sizes:
        if height <= image.shape[0] and width <= image.shape[1]:
            parts[height, width] = thumbnail(image[:height, :width])
    return parts


def by_size(
    thumbnails: Mapping[str, tuple[Size, Levels]],
) -> dict[Size, tuple[NDArray[np.str_], NDArray[np.int16]]]:
    """Group the names and thumbnails of images by their sizes."""
    groups = defaultdict(list)
    for name, (size, levels) in thumbnails.items():
        groups[size].append((name, levels))
    return {size: tuple(map(np.array, zip(*each, strict=True))) for size, each in groups.items()}


def find_copies(
    training: Mapping[Size, tuple[NDArray[np.str_], NDArray[np.int16]]],
    corners: Mapping[Size, Levels],
) -> set[str]:
    """Name the copies among training images, from `by_size`, of a test image or its corners."""
    found = set()
    for size, (names, levels) in training.items():
        for part in {WHOLE, size} & corners.keys():
            contrast = corners[part].std()
            if contrast >= FLAT:
                difference = np.abs(levels - corners[part]).mean(1)
                found.update(names[difference <= TOLERANCE * contrast].tolist())
    return found


def pixel_digest(image: ImageArray) -> str:
    """SHA-256 of shape and pixels, equal for equal images whatever files they came from."""
    digest = sha256(f"{image.shape} ".encode())
    digest.update(np.ascontiguousarray(image))  # no copy, as `tobytes` makes one
    return digest.hexdigest()


def psnr_to_bicubic(lr: ImageArray, hr: ImageArray, scale: int) -> float:
    """PSNR in dB of LR to MATLAB's bicubic of HR, without a border of `REACH` pixels; 361 if equal.

    `lr` is (h, w, 3) in BGR, `hr` (h·scale, w·scale, 3).
    """
    edge = REACH if min(lr.shape[:2]) > 2 * REACH else 0
    inside = tuple(slice(edge, side - edge) for side in lr.shape[:2])
    return cv2.PSNR(lr[inside], bicubic(hr, 1 / scale)[inside])
