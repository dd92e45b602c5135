"""Figures of crops as papers show them: one detail by several methods, beside the whole image.

PSNR and SSIM under a crop are of the whole image, as in papers: the Y channel (BT.601), a border
of `scale` pixels cut off. Crops are magnified by a whole factor, each pixel a square.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dlgsanet_arch import metrics
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_target, disk_faults_named, written_atomically

ImageArray = NDArray[np.uint8]  # (H, W, 3) in RGB

FORMATS = ("png", "pdf", "svg")
_LEAST_BOX = 4
# Sizes in pixels of a figure as `save` writes it.
_DOTS_PER_INCH = 150
_PANEL = 260
_GAP = 14
_LINE = 24
_LETTER = 9.5  # mean width of a letter of a caption
_WIDEST = 1.6  # panels: a wider whole image is drawn smaller


class Box(NamedTuple):
    """A square in pixels of HR: its left column, its top row, its side."""

    left: int
    top: int
    side: int


class Panel(NamedTuple):
    """A result and its scores; HR itself has no scores."""

    label: str
    image: ImageArray
    psnr: float | None = None
    ssim: float | None = None

    @property
    def scores(self) -> str:
        """PSNR and SSIM as they stand under the label."""
        return "PSNR / SSIM" if self.psnr is None else f"{self.psnr:.2f} / {self.ssim:.4f}"


class Comparison(NamedTuple):
    """An image by several methods: results in order, HR last, and the detail that is shown."""

    name: str
    scale: int
    panels: Sequence[Panel]
    box: Box


def compare_images(image: ImageArray, hr: ImageArray, scale: int) -> metrics.Compared:
    """Prepare the Y channels of a result and HR, without their borders, to be measured.

    ValueError where the sizes differ, or the images are too small.
    """
    pair = [torch.from_numpy(each).permute(2, 0, 1)[None].float() / 255 for each in (image, hr)]
    return metrics.compare(*pair, crop_border=scale, y_channel=True)


def _panel(label: str, image: ImageArray, hr: ImageArray, scale: int) -> Panel:
    """Cut a result to HR's size and measure it."""
    height, width = hr.shape[:2]
    if not all(0 <= image.shape[axis] - hr.shape[axis] < scale for axis in (0, 1)):
        raise UserError(
            f"{label} is {image.shape[1]}x{image.shape[0]} and HR is {width}x{height}: they "
            "are not of one image and scale"
        )
    image = np.ascontiguousarray(image[:height, :width])
    try:
        compared = compare_images(image, hr, scale)
        return Panel(label, image, float(compared.psnr()), float(compared.ssim()))
    except ValueError as error:
        raise UserError(f"{label} cannot be measured: {error}") from error


def _check_box(box: Box, hr: ImageArray) -> None:
    height, width = hr.shape[:2]
    if box.side < _LEAST_BOX:
        raise UserError(f"a box has sides of {_LEAST_BOX} pixels or more; got {box.side}")
    if min(box.left, box.top) < 0 or box.left + box.side > width or box.top + box.side > height:
        raise UserError(
            f"the box of {box.side}x{box.side} pixels at {box.left}, {box.top} does not lie within "
            f"HR, which is {width}x{height}"
        )


def _most_different_crop(panels: Sequence[Panel], side: int) -> Box:
    """Find the square where the variance of Y over the methods is largest; of equals the topmost.

    Bicubic, the first, is left out beside two other methods: it differs from all wherever there is
    detail. A single method is compared with HR, the last.
    """
    *results, hr = panels
    _check_box(Box(0, 0, side), hr.image)
    compared = results[1:] if len(results) > 2 else results if len(results) == 2 else panels
    luma = np.stack([each.image @ np.array([0.299, 0.587, 0.114]) for each in compared])
    sums = np.pad(luma.var(0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    within = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    # Cumulated sums differ in their last digits where nothing else does.
    largest = within >= within.max() - 1e-9 * max(1.0, sums[-1, -1])
    top, left = np.unravel_index(np.argmax(largest), within.shape)
    return Box(int(left), int(top), side)


def compare(
    name: str,
    hr: ImageArray,
    results: Mapping[str, ImageArray],
    scale: int,
    box: Box | int | None = None,
) -> Comparison:
    """Measure results against HR, and choose the detail.

    Args:
        name: Of the image.
        hr: Sides multiples of `scale`.
        results: By label, bicubic's first: of HR's size, or larger by less than `scale` at the
            right and bottom, which is cut off.
        scale: HR side over LR side.
        box: The detail; or its side (by default a fifth of HR's shorter side, 32 or more), and the
            place is where methods differ most.

    Raises:
        UserError: A size does not fit, the box lies outside, or an image is too small.
    """
    panels = [_panel(label, image, hr, scale) for label, image in results.items()]
    panels.append(Panel("HR", hr))
    if not isinstance(box, Box):
        shorter = min(hr.shape[:2])
        usual = min(shorter, max(32, shorter // 5))
        box = _most_different_crop(panels, usual if box is None else box)
    _check_box(box, hr)
    return Comparison(name, scale, panels, box)


def table(comparisons: Sequence[Comparison]) -> str:
    """Write a Markdown table of scores and gains over the first method, and their mean."""
    labels = [panel.label for panel in comparisons[0].panels[:-1]]
    head = ["image", labels[0], *(cell for label in labels[1:] for cell in (label, "gain"))]
    rows = [(each.name, [(p.psnr, p.ssim) for p in each.panels[:-1]]) for each in comparisons]
    columns = zip(*(scores for _, scores in rows), strict=True)
    means = [tuple(map(fmean, zip(*column, strict=True))) for column in columns]
    lines = [head, ["---"] * len(head)]
    for name, (base, *others) in [*rows, ("**mean**", means)]:
        cells = ["{:.2f} dB / {:.4f}".format(*base)]
        for scores in others:
            cells += ["{:.2f} dB / {:.4f}".format(*scores), f"{scores[0] - base[0]:+.2f} dB"]
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Break text into lines of `width` pixels: at spaces, after hyphens and underscores."""
    wrapper = textwrap.TextWrapper(max(8, int(width / _LETTER)))
    wrapper.wordsep_re = re.compile(r"(\s+|[^\s_-]*[_-]+)")
    return wrapper.wrap(text) or [""]


class _Placed(NamedTuple):
    """An image of a figure with the lines below it, in pixels from the top left corner."""

    image: ImageArray
    caption: Sequence[str]
    left: int
    top: int
    width: int
    height: int


def _lay_out(name: str, scale: int, panels: Sequence[Panel], box: Box, top: int) -> list[_Placed]:
    """Place the whole image on the left, and the crops in one row or two, below `top`."""
    rows = 1 if len(panels) <= 3 else 2
    columns = -(-len(panels) // rows)
    zoom = max(1, round(_PANEL / box.side))
    side = zoom * box.side
    labels = [_wrapped(panel.label, side) for panel in panels]
    row_height = side + (max(map(len, labels)) + 1) * _LINE + _GAP

    hr = panels[-1].image
    bottom = (rows - 1) * row_height + side  # of the last row's crops
    ratio = min(bottom / hr.shape[0], max(_WIDEST * _PANEL * rows, bottom) / hr.shape[1])
    width, height = (max(1, round(hr.shape[axis] * ratio)) for axis in (1, 0))
    top += _GAP
    placed = [_Placed(hr, _wrapped(f"{name} (x{scale})", width), _GAP, top, width, height)]
    for number, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        row, column = divmod(number, columns)
        left, down = width + 2 * _GAP + column * (side + _GAP), row * row_height
        crop = panel.image[box.top : box.top + box.side, box.left : box.left + box.side]
        crop = crop.repeat(zoom, 0).repeat(zoom, 1)
        placed.append(_Placed(crop, [*label, panel.scores], left, top + down, side, side))
    return placed


def draw(comparisons: Sequence[Comparison]) -> Any:
    """Draw for each comparison the whole image with the detail marked, and each panel's crop.

    Returns a figure of matplotlib's; UserError where that is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "figures need matplotlib, which is not installed; run: pip install "
            "'dlgsanet-arch[tools]' (or pip install matplotlib)"
        ) from error
    placed, height = [], 0
    for comparison in comparisons:
        block = _lay_out(*comparison, top=height)
        placed += [(each, comparison.box if each is block[0] else None) for each in block]
        height = _GAP + max(each.top + each.height + len(each.caption) * _LINE for each in block)
    width = _GAP + max(each.left + each.width for each, _ in placed)
    figure = Figure((width / _DOTS_PER_INCH, height / _DOTS_PER_INCH), facecolor="white")
    for each, box in placed:
        corner = each.left / width, 1 - (each.top + each.height) / height
        axes = figure.add_axes((*corner, each.width / width, each.height / height))
        axes.imshow(each.image, interpolation="antialiased" if box else "none", aspect="auto")
        axes.set_axis_off()
        if box:
            _mark(axes, box)
        text = axes.text(0.5, -4 / each.height, "\n".join(each.caption), ha="center", va="top")
        text.set(transform=axes.transAxes, fontsize=7.5, parse_math=False)  # names may hold $
    return figure


def _mark(axes: Any, box: Box) -> None:
    from matplotlib.patches import Rectangle

    corner = (box.left - 0.5, box.top - 0.5)
    for colour, thick in (("white", 3.0), ("#E3242B", 1.4)):
        axes.add_patch(Rectangle(corner, box.side, box.side, fill=False, ec=colour, lw=thick))


def check_path(path: Path) -> None:
    """Raise a UserError where a figure cannot have this name."""
    if path.suffix[1:].lower() not in FORMATS:
        raise UserError(f"{path}: the name of a figure ends in .{', .'.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; make it first")
    with disk_faults_named(f"{path} cannot be written"):
        check_target(path)


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format that its name ends in, complete or not at all."""
    check_path(path)
    with disk_faults_named(f"{path} cannot be written"), written_atomically(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=_DOTS_PER_INCH)
