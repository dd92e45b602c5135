"""Figures of crops as papers show them: one detail by several methods, beside the whole image.

PSNR and SSIM under a crop are of the whole image, as papers have them: the Y channel (BT.601), a
border of `scale` pixels cut off. Crops are magnified by a whole factor, each pixel a square.
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
from dlgsanet_arch.files import disk_faults_named, written_atomically

ImageArray = NDArray[np.uint8]  # (H, W, 3) in RGB

FORMATS = ("png", "pdf", "svg")
_LEAST_BOX = 4
# Sizes in pixels of a figure as `save` writes it.
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


class Panel(NamedTuple):
    """A result and its scores; HR itself has none."""

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

    Raises:
        ValueError: The sizes differ, or the images are too small.
    """
    pair = [torch.from_numpy(each).permute(2, 0, 1)[None].float() / 255 for each in (image, hr)]
    return metrics.compare(*pair, crop_border=scale, y_channel=True)


def _panel(label: str, image: ImageArray, hr: ImageArray, scale: int) -> Panel:
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


def most_different_crop(panels: Sequence[Panel], side: int) -> Box:
    """Find the square where methods differ most; which of them is better does not matter.

    Args:
        panels: Bicubic's first and HR last. Bicubic is left out beside two other methods: it
            differs from all, wherever there is detail. A single method is compared with HR.
        side: Of the square, in pixels.

    Returns:
        Where the variance of Y over the methods has its largest sum; of equals the topmost.

    Raises:
        UserError: The square is larger than the image.
    """
    *results, hr = panels
    check_box(Box(0, 0, side), hr.image)
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
        box: The detail; or its side, and the place is where methods differ most. By default its
            side is a fifth of HR's shorter side, 32 or more.

    Raises:
        UserError: A size does not fit, the box lies outside, or an image is too small.
    """
    panels = [_panel(label, image, hr, scale) for label, image in results.items()]
    panels.append(Panel("HR", hr))
    if not isinstance(box, Box):
        shorter = min(hr.shape[:2])
        usual = min(shorter, max(32, shorter // 5))
        box = most_different_crop(panels, usual if box is None else box)
    check_box(box, hr)
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


class _Layout(NamedTuple):
    """A comparison by pixels, counted from its top left corner."""

    width: int
    height: int
    images: Sequence[tuple[ImageArray, int, int, int, int]]  # left, top, width, height; whole first
    texts: Sequence[tuple[Sequence[str], float, int, str]]  # lines, x, top, alignment


def _wrapped(text: str, width: int) -> list[str]:
    """Break text into lines of `width` pixels: at spaces, after hyphens and underscores."""
    wrapper = textwrap.TextWrapper(max(8, int(width / _LETTER)))
    wrapper.wordsep_re = re.compile(r"(\s+|[^\s_-]*[_-]+)")
    return wrapper.wrap(text) or [""]


def _lay_out(name: str, scale: int, panels: Sequence[Panel], box: Box) -> _Layout:
    rows = 1 if len(panels) <= 3 else 2
    columns = -(-len(panels) // rows)
    zoom = max(1, round(_PANEL / box.side))
    side = zoom * box.side
    labels = [_wrapped(panel.label, side) for panel in panels]
    captions = (max(map(len, labels)) + 1) * _LINE
    row_height = side + captions + _GAP

    hr = panels[-1].image
    bottom = rows * row_height - _GAP - captions  # of the last row's crops
    ratio = min(bottom / hr.shape[0], max(_WIDEST * _PANEL * rows, bottom) / hr.shape[1])
    width, height = (max(1, round(hr.shape[axis] * ratio)) for axis in (1, 0))
    title = _wrapped(f"{name} (x{scale})", width)
    images = [(hr, _GAP, _GAP, width, height)]
    texts = [(title, _GAP + width / 2, _GAP + height, "center")]

    left = width + 2 * _GAP
    for number, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        row, column = divmod(number, columns)
        x, y = left + column * (side + _GAP), _GAP + row * row_height
        crop = panel.image[box.top : box.top + box.side, box.left : box.left + box.side]
        images.append((crop.repeat(zoom, 0).repeat(zoom, 1), x, y, side, side))
        texts.append(([*label, panel.scores], x + side / 2, y + side, "center"))
    total = left + columns * (side + _GAP)
    below = max(rows * row_height, height + (len(title) + 1) * _LINE) + _GAP
    note = (
        f"PSNR in dB / SSIM of the whole image: Y channel, {scale} pixels at each side left "
        f"out. Crops: {box.side}x{box.side} pixels at {box.left}, {box.top}, magnified {zoom}x."
    )
    lines = _wrapped(note, total - 2 * _GAP)
    texts.append((lines, _GAP, below, "left"))
    return _Layout(total, below + len(lines) * _LINE + _GAP, images, texts)


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches; no window is opened.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "figures need matplotlib, which is not installed; run: pip install "
            "'dlgsanet-arch[tools]' (or pip install matplotlib)"
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def draw(comparisons: Sequence[Comparison]) -> Any:
    """Draw for each comparison the whole image with the detail marked, and each panel's crop.

    Returns:
        A figure of matplotlib's, the comparisons one below the other.

    Raises:
        UserError: matplotlib is not installed.
    """
    layouts = [_lay_out(*each) for each in comparisons]
    width, height = max(each.width for each in layouts), sum(each.height for each in layouts)
    figure = new_figure(width / _DOTS_PER_INCH, height / _DOTS_PER_INCH)
    figure.set_layout_engine("none")
    start = 0
    for layout, comparison in zip(layouts, comparisons, strict=True):
        for number, (image, left, top, wide, tall) in enumerate(layout.images):
            bottom = height - start - top - tall
            axes = figure.add_axes((left / width, bottom / height, wide / width, tall / height))
            axes.imshow(image, interpolation="none" if number else "antialiased", aspect="auto")
            axes.set_axis_off()
            if not number:
                _mark(axes, comparison.box)
        for lines, x, top, align in layout.texts:
            for number, line in enumerate(lines):
                y = height - start - top - (number + 0.5) * _LINE
                text = figure.text(x / width, y / height, line, ha=align, va="center")
                text.set(fontsize=_POINTS, parse_math=False)  # names may hold dollar signs
        start += layout.height
    return figure


def _mark(axes: Any, box: Box) -> None:
    from matplotlib.patches import Rectangle

    corner = (box.left - 0.5, box.top - 0.5)
    for colour, thick in (("white", 3.0), (_MARK, 1.4)):
        axes.add_patch(
            Rectangle(corner, box.side, box.side, fill=False, edgecolor=colour, linewidth=thick)
        )


def check_path(path: Path) -> None:
    """Raise a UserError where a figure cannot have this name."""
    if path.suffix[1:].lower() not in FORMATS:
        raise UserError(f"{path}: the name of a figure ends in .{', .'.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; make it first")


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format that its name ends in, complete or not at all.

    Raises:
        UserError: The name ends in no known format, or the file cannot be written.
    """
    check_path(path)
    with disk_faults_named(f"{path} cannot be written"), written_atomically(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=_DOTS_PER_INCH)
