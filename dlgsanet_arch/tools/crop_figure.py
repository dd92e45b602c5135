"""The figure of crops that papers show: one detail by several methods, beside the whole image.

PSNR and SSIM under a crop are of the whole image, as papers have them: the Y channel (BT.601), a
border of `scale` pixels cut off. Crops are magnified by a whole factor, each pixel a square.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlgsanet_arch import metrics
from dlgsanet_arch.data.images import SUFFIXES, read_8_bits
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named
from dlgsanet_arch.tools import figures

ImageArray = NDArray[np.uint8]

FEWEST, MOST = 2, 8  # panels
_LEAST_BOX = 4
# All sizes are in pixels of a figure as `save_figure` writes it, a magnified pixel being a whole
# number of them.
_DOTS_PER_INCH = 150
_PANEL = 260
_GAP = 14
_LINE = 24
_LETTER = 9.5  # mean width of a letter of a caption
_POINTS = 7.5
_WIDEST = 1.6  # sides of the whole image: wider ones are drawn smaller
_MARK = "#E3242B"


class Box(NamedTuple):
    """A square in pixels of HR: its left column, its top row, its side."""

    left: int
    top: int
    side: int

    def of(self, image: ImageArray) -> ImageArray:
        """Cut the square out of an image (H, W, 3)."""
        return image[self.top : self.top + self.side, self.left : self.left + self.side]


@dataclass(frozen=True, eq=False)
class Panel:
    """An image of the figure, and how close to HR it is.

    Args:
        label: Who made it.
        image: (H, W, 3) in RGB, of HR's size.
        psnr: In dB; None for HR itself.
        ssim: None for HR itself.
    """

    label: str
    image: ImageArray
    psnr: float | None = None
    ssim: float | None = None

    @property
    def figures(self) -> str:
        """What stands under the label."""
        if self.psnr is None or self.ssim is None:
            return "PSNR / SSIM"
        return f"{self.psnr:.2f} / {self.ssim:.4f}"


def read_rgb(path: Path) -> ImageArray:
    """Read an image as (H, W, 3) in RGB, 8 bits.

    Raises:
        ImageError: It cannot be used.
    """
    return np.ascontiguousarray(read_8_bits(path).pixels[..., ::-1])


def scale_between(hr: ImageArray, lr: ImageArray) -> int:
    """Tell how many times larger HR is; it may have rows and columns that make no pixel of LR.

    Raises:
        UserError: LR's sides are not HR's, divided by one whole number.
    """
    scale = hr.shape[0] // lr.shape[0]
    if scale < 1 or tuple(side // scale for side in hr.shape[:2]) != lr.shape[:2]:
        raise UserError(
            f"LR is {lr.shape[1]}x{lr.shape[0]}, which is not a small version of HR, "
            f"{hr.shape[1]}x{hr.shape[0]}"
        )
    return scale


def find_result(place: Path, name: str) -> Path:
    """Find a method's result of an image.

    Args:
        place: The result, or a folder of results.
        name: The image's name without its ending. In a folder the result has this name, or
            begins with it and continues with no letter or digit, or with a scale: `baby_EDSR.png`,
            `baby-x4.png`, `babyx4.png`.

    Raises:
        UserError: There is none, or more than one.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise UserError(f"{place} does not exist: name a result or a folder of results")
    images = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    found = [path for path in images if path.stem == name]
    if not found:
        named_so = re.compile(re.escape(name) + r"([^0-9A-Za-z]|[xX][0-9]).*", re.DOTALL)
        found = [path for path in images if named_so.fullmatch(path.stem)]
    if len(found) == 1:
        return found[0]
    names = [path.name for path in found or images]
    if found:
        raise UserError(f"{place} holds several results of {name}: {named(names)}; name one file")
    there = f"it holds {named(names)}" if names else "it holds no images"
    raise UserError(f"{place} holds no result of {name}: {there}")


def _tensor(image: ImageArray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def _fitted(label: str, image: ImageArray, hr: ImageArray, scale: int) -> ImageArray:
    """Cut a result of uncropped HR to HR's size, which is a multiple of the scale."""
    height, width = hr.shape[:2]
    excess = (image.shape[0] - height, image.shape[1] - width)
    if not all(0 <= each < scale for each in excess):
        raise UserError(
            f"{label} is {image.shape[1]}x{image.shape[0]} and HR is {width}x{height}: they "
            "are not of one image and scale"
        )
    return image[:height, :width]


def panels(hr: ImageArray, results: Mapping[str, ImageArray], scale: int) -> list[Panel]:
    """Measure results against HR.

    Args:
        hr: (H, W, 3) in RGB, sides multiples of `scale`.
        results: By label: of HR's size, or larger by less than `scale` at the right and bottom.
        scale: The border that is left out.

    Returns:
        One panel a result in their order, then HR.

    Raises:
        UserError: There are too few or too many, a size does not fit, or an image is too small.
    """
    if not FEWEST <= len(results) + 1 <= MOST:
        raise UserError(
            f"the figure has {FEWEST} to {MOST} crops, HR and bicubic among them; got "
            f"{len(results) + 1}"
        )
    made = []
    for label, result in results.items():
        image = _fitted(label, result, hr, scale)
        try:
            compared = metrics.compare(
                _tensor(image), _tensor(hr), crop_border=scale, y_channel=True
            )
            made.append(Panel(label, image, float(compared.psnr()), float(compared.ssim())))
        except ValueError as error:
            raise UserError(f"{label} cannot be measured: {error}") from error
    return [*made, Panel("HR", hr)]


def check_box(box: Box, hr: ImageArray) -> None:
    """Raise a UserError where a box does not lie within HR."""
    height, width = hr.shape[:2]
    if box.side < _LEAST_BOX:
        raise UserError(f"a box has sides of {_LEAST_BOX} pixels or more; got {box.side}")
    if min(box.left, box.top) < 0 or box.left + box.side > width or box.top + box.side > height:
        raise UserError(
            f"the box of {box.side}x{box.side} pixels at {box.left}, {box.top} does not lie within "
            f"HR, which is {width}x{height}"
        )


def usual_side(hr: ImageArray) -> int:
    """Return the side of a box that shows a detail: a fifth of HR's shorter side, 32 or more."""
    shorter = min(hr.shape[:2])
    return min(shorter, max(32, shorter // 5))


def most_different_crop(made: Sequence[Panel], side: int) -> Box:
    """Find the square where methods differ most; which of them is the better has no say.

    Args:
        made: What `panels` returned, the bicubic one first. It is left out where two others are
            there: it differs from all, wherever there is detail.
        side: Of the square, in pixels.

    Returns:
        Where the variance of Y over the methods has its largest sum; of equals the topmost.

    Raises:
        UserError: The square is larger than the image.
    """
    check_box(Box(0, 0, side), made[0].image)
    *results, hr = made
    if len(results) > 2:
        results = results[1:]
    elif len(results) == 1:
        results = [*results, hr]
    luma = np.stack([each.image @ np.array([0.299, 0.587, 0.114]) for each in results])
    sums = np.pad(luma.var(0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    within = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    # Cumulated sums differ in their last digits where nothing else does.
    largest = within >= within.max() - 1e-9 * max(1.0, sums[-1, -1])
    top, left = np.unravel_index(np.argmax(largest), within.shape)
    return Box(int(left), int(top), side)


def _grid(count: int) -> tuple[int, int]:
    """Return rows and columns of the crops."""
    rows = 1 if count <= 3 else 2
    return rows, -(-count // rows)


def _wrapped(text: str, width: int) -> list[str]:
    """Break text into lines of `width` pixels: at spaces, after hyphens and underscores."""
    wrapper = textwrap.TextWrapper(max(8, int(width / _LETTER)))
    wrapper.wordsep_re = re.compile(r"(\s+|[^\s_-]*[_-]+)")
    return wrapper.wrap(text) or [""]


class _Sheet:
    """A figure that is filled by pixels, counted from its top left corner.

    Args:
        width: In pixels.
        height: In pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self.figure = figures.new_figure(width / _DOTS_PER_INCH, height / _DOTS_PER_INCH)
        self.figure.set_layout_engine("none")

    def show(
        self, image: ImageArray, left: int, top: int, width: int, height: int, how: str
    ) -> Any:
        """Draw an image into a rectangle, and return its axes."""
        wide, tall = self._size
        place = (left / wide, 1 - (top + height) / tall, width / wide, height / tall)
        axes = self.figure.add_axes(place)
        axes.imshow(image, interpolation=how, aspect="auto")
        axes.set_axis_off()
        return axes

    def write(self, lines: Sequence[str], middle: float, top: int, align: str = "center") -> None:
        """Write lines of text, one below the other."""
        wide, tall = self._size
        for number, line in enumerate(lines):
            self.figure.text(
                middle / wide,
                1 - (top + (number + 0.5) * _LINE) / tall,
                line,
                ha=align,
                va="center",
                fontsize=_POINTS,
                parse_math=False,  # names may hold dollar signs
            )


def draw(made: Sequence[Panel], box: Box, *, name: str, scale: int) -> Any:
    """Draw the whole image with the box marked, and each panel's crop.

    Args:
        made: What `panels` returned.
        box: What is cut out.
        name: Of the image.
        scale: Of the methods.

    Returns:
        A figure of matplotlib's.

    Raises:
        UserError: matplotlib is absent, or the box does not lie within the images.
    """
    hr = made[-1].image
    check_box(box, hr)
    rows, columns = _grid(len(made))
    zoom = max(1, round(_PANEL / box.side))
    side = zoom * box.side
    labels = [_wrapped(panel.label, side) for panel in made]
    deepest = [max(len(each) for each in labels[row * columns :][:columns]) for row in range(rows)]
    heights = [side + (lines + 1) * _LINE + _GAP for lines in deepest]

    body = sum(heights) - _GAP - (deepest[-1] + 1) * _LINE  # the last row's crops end here
    height, width = hr.shape[:2]
    ratio = min(body / height, max(_WIDEST * _PANEL * rows, body) / width)
    whole = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    title = _wrapped(f"{name} (x{scale})", whole[0])
    left = whole[0] + 2 * _GAP
    total = left + columns * (side + _GAP)
    note = _wrapped(
        f"PSNR in dB / SSIM of the whole image: Y channel, {scale} pixels at each side left "
        f"out. Crops: {box.side}x{box.side} pixels at {box.left}, {box.top}, magnified {zoom}x.",
        total - 2 * _GAP,
    )
    below = max(sum(heights), whole[1] + (len(title) + 1) * _LINE) + _GAP

    sheet = _Sheet(total, below + len(note) * _LINE + _GAP)
    axes = sheet.show(hr, _GAP, _GAP, *whole, "antialiased")
    corner = (box.left - 0.5, box.top - 0.5)
    from matplotlib.patches import Rectangle

    for colour, thick in (("white", 3.0), (_MARK, 1.4)):
        axes.add_patch(
            Rectangle(corner, box.side, box.side, fill=False, edgecolor=colour, linewidth=thick)
        )
    sheet.write(title, _GAP + whole[0] / 2, _GAP + whole[1])
    for number, (panel, label) in enumerate(zip(made, labels, strict=True)):
        row, column = divmod(number, columns)
        x, y = left + column * (side + _GAP), _GAP + sum(heights[:row])
        magnified = box.of(panel.image).repeat(zoom, 0).repeat(zoom, 1)
        sheet.show(magnified, x, y, side, side, "none")
        sheet.write([*label, panel.figures], x + side / 2, y + side)
    sheet.write(note, _GAP, below, align="left")
    return sheet.figure
