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
from typing import Any

from dlgsanet_arch.data.benchmarks import KNOWN, set_name
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.discovery import find_layout
from dlgsanet_arch.data.images import ImageError, read_8_bits
from dlgsanet_arch.data.making import (
    Source,
    checked_scales,
    closing_lines,
    file_hashes,
    images_sha256,
    made_before,
    scan,
)
from dlgsanet_arch.data.scores import Scores, measure
from dlgsanet_arch.data.sub_images import crop_to_multiple, encode_png
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
# Side of SSIM's Gaussian window: HR without its border must hold one.
WINDOW = 11
KIND = {"kind": "test set"}


@dataclass
class Scale:
    """A scale of a test set: the folder of HR and LR, what its recipe states, was it written?"""

    name: str
    scale: int
    folder: Path
    recipe: dict[str, Any]
    written: bool = False

    @property
    def sha256(self) -> Mapping[str, str]:
        """Of HR and LR, see `folder_sha256`."""
        return self.recipe["sha256"]

    @property
    def bicubic(self) -> Scores:
        """Mean scores of the LR images enlarged by bicubic."""
        return Scores(**self.recipe["bicubic"])

    @property
    def known(self) -> Scores | None:
        """The published scores of this set; None if it is not known."""
        return KNOWN[self.name].bicubic[self.scale] if self.name in KNOWN else None

    @property
    def agrees(self) -> bool | None:
        """Whether both are equal up to the set's tolerance; None if the set is not known."""
        if self.known is None:
            return None
        tolerance = KNOWN[self.name].tolerance
        return (
            abs(self.bicubic.psnr - self.known.psnr) <= tolerance.psnr
            and abs(self.bicubic.ssim - self.known.ssim) <= tolerance.ssim
        )


@dataclass
class Summary:
    """What `build` made, or found finished: the set's name, the folder of HR, and what to say."""

    name: str
    source: Path
    skipped: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of images."""
        return max(each.recipe["count"] for each in self.scales)


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the names and pixels of a folder's PNG images.

    Hashed, for each file ``<name>.png``, in ascending order of the names' code points: the name
    in UTF-8, one zero byte, height and width as unsigned 32-bit little-endian integers, and the
    pixels row by row from the top left, each as its three bytes B, G and R.

    Raises:
        ImageError: An image is damaged.
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


def _build_scale(each: Scale, sources: Sequence[Source], workers: int) -> None:
    growing = unfinished(each.folder)
    shutil.rmtree(growing, ignore_errors=True)
    for part in ("HR", "LR"):
        (growing / part).mkdir(parents=True)
    make = partial(_make, scale=each.scale, folder=growing)
    label = f"{each.name} x{each.scale}: writing"
    scores = [score for _, score in with_progress(make, sources, workers, label)]
    # The PSNR of images without an error is infinite.
    finite = [score.psnr for score in scores if math.isfinite(score.psnr)]
    means = {
        "psnr": fmean(finite) if finite else math.inf,
        "ssim": fmean(score.ssim for score in scores),
    }
    each.recipe |= {"count": len(sources), "bicubic": means, "exact": len(scores) - len(finite)}
    each.recipe["sha256"] = _both_sha256(growing)
    write_json(growing / RECIPE, each.recipe)
    replace_folder(growing, each.folder)
    each.written = True


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

    HR is cropped at the bottom and the right to a multiple of the scale, LR is its MATLAB-equal
    bicubic, both with 8 bits. All images are read before anything is written.

    Args:
        name: See `set_name`.
        source: A folder in one of the layouts of `discovery`, or one that holds such a folder.
        target: Such as ``datasets/benchmark/Set5``; may be the source.
        scales: Some of 2, 3 and 4; None for those that the source has HR images for.
        workers: Number of processes.
        skip_bad: Leave out images that cannot be read or are too small.
        overwrite: Replace scales that were made from other images or changed since.

    Raises:
        UserError: Images are bad, missing or ambiguous, something else is in the place of the
            result, or it cannot be written.
        ValueError: A scale is not 2, 3 or 4.
    """
    wanted = None if scales is None else checked_scales(scales)
    name = set_name(name)
    source, target = source.resolve(), target.resolve()
    layout = find_layout(name, source, target, wanted)
    summary = Summary(name, layout.where, notices=[*layout.notices])
    originals = {
        scale: [Source(key, path) for key, path in found.items()]
        for scale, found in layout.hr.items()
    }
    images = [*{source.hr: source for each in originals.values() for source in each}.values()]
    # the smallest side whose multiple of the scale holds SSIM's window between two borders
    largest = max(originals)
    least = math.ceil((WINDOW + 2 * largest) / largest) * largest
    if skip_bad:
        good, summary.skipped, notices = scan(images, least, workers, skip=True)
        summary.notices += notices
        kept = {
            scale: [each for each in sources if each in good]
            for scale, sources in originals.items()
        }
        originals = {scale: each for scale, each in kept.items() if each}
    hashes = file_hashes(images)

    with disk_faults_named(f"{target} cannot be written"), one_writer(target):
        missing = []
        for scale, sources in originals.items():
            folder = target / f"X{scale}"
            recipe = {**KIND, "version": RECIPE_VERSION, "scale": scale}
            recipe["images"] = images_sha256(sources, scale, hashes)
            # Images that were written there are enough to find it finished.
            made_here = all(source.hr.parent == folder / "HR" for source in sources)
            wanted, change = KIND if made_here else recipe, partial(_change, folder)
            stored = made_before(folder, wanted, change, overwrite=overwrite)
            summary.scales.append(Scale(name, scale, folder, stored or recipe))
            if stored is None:
                missing.append((summary.scales[-1], sources))
        if missing and not skip_bad:
            summary.notices += scan(images, least, workers).notices
        for each, sources in missing:
            _build_scale(each, sources, workers)
    if name in KNOWN and summary.count != KNOWN[name].count:
        summary.notices.append(f"{name} has {KNOWN[name].count} images, here are {summary.count}")
    return summary


def _change(folder: Path, stored: Mapping[str, Any]) -> str:
    """How a finished folder was changed since; "" if it was not."""
    try:
        return "" if _both_sha256(folder) == stored.get("sha256") else "other images"
    except ImageError as error:
        return str(error)


def _figures(scores: Scores) -> str:
    return f"{scores.psnr:.2f} dB / {scores.ssim:.4f}"


def report(summary: Summary) -> str:
    """Write a summary for the terminal: figures beside the known ones, folders, sums, notices."""
    lines = [
        f"{summary.name}: {summary.count} images from {summary.source}",
        "bicubic's mean PSNR / SSIM (Y channel, a border of the scale cut off):",
    ]
    notices = [*summary.notices]
    for each in summary.scales:
        line = f"  x{each.scale}  {_figures(each.bicubic)}"
        if each.known is not None:
            verdict = "agrees" if each.agrees else "differs: other images, or another protocol"
            line += f"  known {_figures(each.known)}  {verdict}"
        lines.append(line)
        if exact := each.recipe["exact"]:
            notices.append(
                f"x{each.scale}: bicubic restores {exact} images without an error, as it does one "
                "colour; they are not in the mean PSNR"
            )
    lines.append("folders:")
    for each in summary.scales:
        state = "written" if each.written else "was finished, left alone"
        lines.append(f"  x{each.scale}  {each.folder}  {state}")
    lines.append("SHA-256 over names and pixels:")
    for each in summary.scales:
        lines += [f"  X{each.scale}/{part}  {value}" for part, value in each.sha256.items()]
    return "\n".join([*lines, *closing_lines(notices, summary.skipped)]) + "\n"
