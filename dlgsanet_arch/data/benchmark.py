"""Test sets: HR cropped to each scale, LR by MATLAB's bicubic, bicubic's figures.

What is written, below the folder given to `build`, is what the files in options/test name:

    X4/HR/<name>.png, X4/LR/<name>.png    8 bits, equal names
    X4/recipe.json                        what they were made from, their SHA-256, their figures

and the same for the other scales. Every scale's folder is built beside its place and renamed at
the end: it is complete or absent.
"""

import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.discovery import find_layout, set_name
from dlgsanet_arch.data.images import ImageError, read_8_bits
from dlgsanet_arch.data.making import (
    Findings,
    ImageArray,
    Source,
    checked_scales,
    crop_to_multiple,
    encode_png,
    file_hashes,
    images_sha256,
    made_before,
)
from dlgsanet_arch.data.workers import with_progress
from dlgsanet_arch.files import (
    RECIPE,
    disk_faults_named,
    one_writer,
    replace_folder,
    unfinished,
    write_json,
)

# To be raised when the same images give other folders than before.
RECIPE_VERSION = 2
KIND = {"kind": "test set"}
WINDOW = 11  # side of SSIM's Gaussian window: HR without its border must hold one


class Scores(NamedTuple):
    """Measured on the Y channel: PSNR in dB, infinite for equal images, and SSIM, 1 for them."""

    psnr: float
    ssim: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} dB / {self.ssim:.4f}"


class KnownSet(NamedTuple):
    """A set that papers test on: its size, a tolerance, bicubic's mean scores by scale."""

    count: int
    tolerance: Scores
    bicubic: Mapping[int, Scores]


# Measured by BasicSR's own imresize and metrics, and rounded: the same functions measure here.
MEASURED = Scores(0.01, 0.0005)
# Printed in papers and measured by MATLAB. On Set5 and B100 such figures are up to 0.02 dB and
# 0.0009 off those of BasicSR's functions; a different LR or protocol costs tenths of a dB.
PRINTED = Scores(0.05, 0.002)
KNOWN = {
    name: KnownSet(count, tolerance, {2: Scores(*x2), 3: Scores(*x3), 4: Scores(*x4)})
    for name, count, tolerance, x2, x3, x4 in (
        ("Set5", 5, MEASURED, (33.68, 0.9305), (30.40, 0.8690), (28.43, 0.8113)),
        ("Set14", 14, MEASURED, (30.33, 0.8700), (27.63, 0.7760), (26.09, 0.7050)),
        ("B100", 100, MEASURED, (29.56, 0.8436), (27.21, 0.7392), (25.96, 0.6682)),
        # Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention
        # Networks", ECCV 2018, table 2; so is Manga109.
        ("Urban100", 100, PRINTED, (26.88, 0.8403), (24.46, 0.7349), (23.14, 0.6577)),
        ("Manga109", 109, PRINTED, (30.80, 0.9339), (26.95, 0.8556), (24.89, 0.7866)),
    )
}

# BT.601 from BGR in [0, 1] to Y in [16, 235], as MATLAB's rgb2ycbcr has it.
_TO_Y = np.array([24.966, 128.553, 65.481])
_GAUSSIAN = cv2.getGaussianKernel(WINDOW, 1.5)
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def _luma(image: ImageArray, border: int) -> NDArray[np.float64]:
    height, width = image.shape[:2]
    inner = image[border : height - border, border : width - border]
    # Rounded to float32 on the way as BasicSR does it.
    y = np.dot(inner.astype(np.float32) / np.float32(255), _TO_Y) + 16.0
    return ((y / 255.0).astype(np.float32) * np.float32(255)).astype(np.float64)


def _blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blur by the Gaussian window (Wang et al., 2004), where it lies within the image."""
    return cv2.sepFilter2D(values, cv2.CV_64F, _GAUSSIAN, _GAUSSIAN)[5:-5, 5:-5]


def measure(image: ImageArray, original: ImageArray, border: int) -> Scores:
    """Measure an image against the original as BasicSR's metrics do with test_y_channel.

    Both are (H, W, 3) in BGR with sides of more than 10 + 2·border pixels; `border` pixels are cut
    off on each side.
    """
    a, b = _luma(image, border), _luma(original, border)
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    structure = (2 * covariance + _C2) / (variances + _C2)
    light = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    error = float(np.mean((a - b) ** 2))
    psnr = 10 * math.log10(255.0**2 / error) if error else math.inf
    return Scores(psnr, float(np.mean(light * structure)))


@dataclass
class Scale:
    """A scale of a test set: the folder of HR and LR, what its recipe states, was it written?"""

    scale: int
    folder: Path
    recipe: dict[str, Any]
    written: bool

    @property
    def bicubic(self) -> Scores:
        """Mean scores of the LR images enlarged by bicubic."""
        return Scores(**self.recipe["bicubic"])


@dataclass
class Summary(Findings):
    """What `build` made, or found finished: the set's name and the folder of HR."""

    name: str = ""
    source: Path = Path()
    scales: list[Scale] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of images."""
        return max(each.recipe["count"] for each in self.scales)


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the names and pixels of a folder's PNG images.

    Hashed, for each file ``<name>.png``, in ascending order of the names' code points: the name
    in UTF-8, one zero byte, height and width as unsigned 32-bit little-endian integers, and the
    pixels row by row from the top left, each as B, G, R. Damaged images raise ImageError.
    """
    result = sha256()
    for name in sorted(path.stem for path in folder.glob("*.png")):
        pixels = read_8_bits(folder / f"{name}.png", least=1).pixels
        result.update(name.encode() + b"\0" + struct.pack("<II", *pixels.shape[:2]))
        result.update(pixels.tobytes())
    return result.hexdigest()


def _both_sha256(folder: Path) -> dict[str, str]:
    return {part: folder_sha256(folder / part) for part in ("HR", "LR")}


def _make(source: Source, scale: int, folder: Path) -> Scores:
    """Write one image's HR and LR, and measure how bicubic restores it."""
    hr = crop_to_multiple(read_8_bits(source.hr).pixels, scale)
    lr = bicubic(hr, 1 / scale)
    for part, image in (("HR", hr), ("LR", lr)):
        (folder / part / f"{source.key}.png").write_bytes(encode_png(image))
    return measure(bicubic(lr, scale), hr, scale)


def _build_scale(each: Scale, sources: Sequence[Source], workers: int, label: str) -> None:
    growing = unfinished(each.folder)
    shutil.rmtree(growing, ignore_errors=True)
    for part in ("HR", "LR"):
        (growing / part).mkdir(parents=True)
    make = partial(_make, scale=each.scale, folder=growing)
    scores = [score for _, score in with_progress(make, sources, workers, label)]
    # The PSNR of images without an error is infinite.
    finite = [score.psnr for score in scores if math.isfinite(score.psnr)]
    ssim = fmean(score.ssim for score in scores)
    each.recipe |= {
        "count": len(sources),
        "bicubic": {"psnr": fmean(finite) if finite else math.inf, "ssim": ssim},
        "exact": len(scores) - len(finite),
        "sha256": _both_sha256(growing),
    }
    write_json(growing / RECIPE, each.recipe)
    replace_folder(growing, each.folder)


def _change(folder: Path, stored: Mapping[str, Any]) -> str:
    """How a finished folder was changed since; "" if it was not."""
    try:
        return "" if _both_sha256(folder) == stored.get("sha256") else "other images"
    except ImageError as error:
        return str(error)


def _open_scale(folder: Path, recipe: dict[str, Any], sources: list[Source], again: bool) -> Scale:
    """Find out whether a scale is finished."""
    # Images that were written there are enough to find it finished.
    made_here = all(source.hr.parent == folder / "HR" for source in sources)
    wanted, change = KIND if made_here else recipe, partial(_change, folder)
    stored = made_before(folder, wanted, change, overwrite=again)
    return Scale(recipe["scale"], folder, stored or recipe, written=stored is None)


def build(
    name: str,
    source: Path,
    target: Path,
    scales: Sequence[int] | None = None,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Make a test set's tree; finished scales are left alone.

    `source` is a folder in one of the layouts of `discovery`, or holds such a folder; `target`,
    such as ``datasets/benchmark/Set5``, may be the same. `scales` are some of 2, 3 and 4, None for
    those that the source has HR for. `skip_bad` leaves out images that cannot be read or are too
    small; `overwrite` replaces scales that were made from other images or changed since. UserError
    if images are bad, missing or ambiguous, something else is in the place of the result, or it
    cannot be written; ValueError if a scale is not 2, 3 or 4.
    """
    wanted = None if scales is None else checked_scales(scales)
    name, source, target = set_name(name), source.resolve(), target.resolve()
    layout = find_layout(name, source, target, wanted)
    summary = Summary(name=name, source=layout.where, notices=[*layout.notices])
    images = [*{source.hr: source for each in layout.hr.values() for source in each}.values()]
    originals, largest = layout.hr, max(layout.hr)
    # the smallest side whose multiple of the scale holds SSIM's window between two borders
    least = math.ceil((WINDOW + 2 * largest) / largest) * largest
    if skip_bad:
        good = {source.hr for source in summary.scan(images, least, workers, skip=True)}
        kept = {s: [x for x in each if x.hr in good] for s, each in originals.items()}
        originals = {scale: each for scale, each in kept.items() if each}
    hashes = file_hashes(images)

    with disk_faults_named(f"{target} cannot be written"), one_writer(target):
        for scale, sources in originals.items():
            recipe = {**KIND, "version": RECIPE_VERSION, "scale": scale}
            recipe["images"] = images_sha256(sources, scale, hashes)
            summary.scales.append(_open_scale(target / f"X{scale}", recipe, sources, overwrite))
        missing = [each for each in summary.scales if each.written]
        if missing and not skip_bad:
            summary.scan(images, least, workers)
        for each in missing:
            label = f"{name} x{each.scale}: writing"
            _build_scale(each, originals[each.scale], workers, label)
    if name in KNOWN and summary.count != KNOWN[name].count:
        summary.notices.append(f"{name} has {KNOWN[name].count} images, here are {summary.count}")
    for each in summary.scales:
        if exact := each.recipe["exact"]:
            summary.notices.append(
                f"x{each.scale}: bicubic restores {exact} images without an error, as it does one "
                "colour; they are not in the mean PSNR"
            )
    return summary


def report(summary: Summary) -> str:
    """Write a summary for the terminal: figures beside the known ones, folders, sums, notices."""
    lines = [
        f"{summary.name}: {summary.count} images from {summary.source}",
        "bicubic's mean PSNR / SSIM (Y channel, a border of the scale cut off):",
    ]
    folders, sums, known = ["folders:"], ["SHA-256 over names and pixels:"], KNOWN.get(summary.name)
    for each in summary.scales:
        line = f"  x{each.scale}  {each.bicubic}"
        if known:
            published = known.bicubic[each.scale]
            differences = np.abs(np.subtract(each.bicubic, published))
            agrees = (differences <= known.tolerance).all()
            verdict = "agrees" if agrees else "differs: other images, or another protocol"
            line += f"  known {published}  {verdict}"
        lines.append(line)
        state = "written" if each.written else "was finished, left alone"
        folders.append(f"  x{each.scale}  {each.folder}  {state}")
        sums += [f"  X{each.scale}/{part}  {x}" for part, x in each.recipe["sha256"].items()]
    return "\n".join([*lines, *folders, *sums, *summary.lines()]) + "\n"
