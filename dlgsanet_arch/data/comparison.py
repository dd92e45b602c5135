"""How super-resolved images compare with bicubic ones: figures, a table, an image to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.scores import Scores, measure, psnr
from dlgsanet_arch.data.sub_images import ImageArray

# Of the image to look at, in pixels.
CROP = 96
ZOOM = 4
MARGIN = 12
CAPTION = 56
FONT = cv2.FONT_HERSHEY_DUPLEX
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)
MARK = (60, 60, 230)


@dataclass(frozen=True)
class Comparison:
    """One image, enlarged by bicubic and in other ways.

    Args:
        name: The image's name.
        scale: HR side over LR side.
        hr: (H, W, 3) in BGR, the original.
        enlarged: (H, W, 3), LR enlarged by MATLAB's bicubic.
        restored: By a short name of the way, such as "Tiny": (H, W, 3), LR enlarged so.
    """

    name: str
    scale: int
    hr: ImageArray
    enlarged: ImageArray
    restored: Mapping[str, ImageArray]

    @classmethod
    def of(
        cls, name: str, lr: ImageArray, restored: Mapping[str, ImageArray], hr: ImageArray
    ) -> "Comparison":
        """Compare restored images with the bicubic enlargement of their LR image.

        Raises:
            ValueError: The images' sizes do not belong together.
        """
        scale = hr.shape[0] // lr.shape[0]
        enlarged = bicubic(lr, scale)
        for way, image in (("bicubic", enlarged), *restored.items()):
            if image.shape != hr.shape:
                raise ValueError(
                    f"sizes of {name} do not fit: got {lr.shape=}, {hr.shape=} and, by {way}, "
                    f"{image.shape}"
                )
        return cls(name, scale, hr, enlarged, restored)

    def scores(self, image: ImageArray) -> Scores:
        """Measure an image of HR's size against HR."""
        return measure(image, self.hr, self.scale)


def table(comparisons: Sequence[Comparison]) -> str:
    """Write a Markdown table: one row an image, and their mean."""
    ways = list(comparisons[0].restored)
    rows = [
        (
            each.name,
            [each.scores(each.enlarged), *(each.scores(each.restored[way]) for way in ways)],
        )
        for each in comparisons
    ]
    columns = zip(*(scores for _, scores in rows), strict=True)
    means = [Scores(fmean(s.psnr for s in each), fmean(s.ssim for s in each)) for each in columns]
    head = ["image", "bicubic", *(cell for way in ways for cell in (way, "gain"))]
    lines = [head, ["---"] * len(head)]
    for name, (base, *others) in [*rows, ("**mean**", means)]:
        cells = [f"{base.psnr:.2f} dB / {base.ssim:.4f}"]
        for ours in others:
            cells += [f"{ours.psnr:.2f} dB / {ours.ssim:.4f}", f"{ours.psnr - base.psnr:+.2f} dB"]
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def telling_place(comparison: Comparison, side: int) -> tuple[int, int]:
    """Find where bicubic loses most: what the network makes of it has no say in the choice.

    Args:
        comparison: An image.
        side: Side of the square to find, in HR pixels; at most the image's.

    Returns:
        Top row and left column.
    """
    error = comparison.enlarged.astype(np.float64) - comparison.hr
    sums = cv2.integral((error**2).sum(2))
    within = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(np.argmax(within), within.shape)
    return int(top), int(left)


def _captioned(image: ImageArray, *lines: str) -> ImageArray:
    """Put lines of text under an image."""
    band = np.full((CAPTION, image.shape[1], 3), BACKGROUND, np.uint8)
    for number, line in enumerate(lines, start=1):
        cv2.putText(band, line, (2, 24 * number - 4), FONT, 0.55, INK, 1, cv2.LINE_AA)
    return np.vstack([image, band])


def _overview(comparison: Comparison, top: int, left: int, side: int) -> ImageArray:
    """Shrink the original into a square of the crops' size, the place of the crop marked."""
    height, width = comparison.hr.shape[:2]
    ratio = side * ZOOM / max(height, width)
    size = (round(width * ratio), round(height * ratio))
    small = cv2.resize(comparison.hr, size, interpolation=cv2.INTER_AREA)
    corners = [
        (round(column * ratio), round(row * ratio))
        for column, row in ((left, top), (left + side, top + side))
    ]
    cv2.rectangle(small, *corners, BACKGROUND, 6)
    cv2.rectangle(small, *corners, MARK, 2)
    square = np.full((side * ZOOM, side * ZOOM, 3), BACKGROUND, np.uint8)
    square[-size[1] :, : size[0]] = small  # at the bottom, above its caption
    return square


def _row(comparison: Comparison) -> ImageArray:
    side = min(CROP, *comparison.hr.shape[:2])
    top, left = telling_place(comparison, side)
    place = (slice(top, top + side), slice(left, left + side))

    def crop(image: ImageArray) -> ImageArray:
        return np.repeat(np.repeat(image[place], ZOOM, axis=0), ZOOM, axis=1)

    def figures(image: ImageArray) -> str:
        here = psnr(image[place], comparison.hr[place])
        return f"{comparison.scores(image).psnr:.2f} dB (this crop {here:.2f})"

    columns = [
        _captioned(
            _overview(comparison, top, left, side), comparison.name, "PSNR of the Y channel"
        ),
        _captioned(
            crop(comparison.enlarged),
            f"LR, bicubic x{comparison.scale}",
            figures(comparison.enlarged),
        ),
        *(
            _captioned(crop(image), f"{way} x{comparison.scale}", figures(image))
            for way, image in comparison.restored.items()
        ),
        _captioned(crop(comparison.hr), "HR, the original", "infinite dB"),
    ]
    gap = np.full((columns[0].shape[0], MARGIN, 3), BACKGROUND, np.uint8)
    parts = [part for column in columns for part in (gap, column)]
    return np.hstack([*parts, gap])


def figure(comparisons: Sequence[Comparison]) -> NDArray[np.uint8]:
    """Draw one row an image: the whole, then crops by bicubic, each way and HR, with PSNR.

    Args:
        comparisons: Images with sides of `CROP` or more, or all of one smaller size.

    Returns:
        An image in BGR, to be written with OpenCV.
    """
    rows = [_row(comparison) for comparison in comparisons]
    gap = np.full((MARGIN, rows[0].shape[1], 3), BACKGROUND, np.uint8)
    return np.vstack([gap, *(part for row in rows for part in (row, gap))])
