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
    Findings,
    Source,
    checked_scales,
    file_hashes,
    images_sha256,
    made_before,
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
            agrees = known.agrees(each.scale, each.bicubic)
            verdict = "agrees" if agrees else "differs: other images, or another protocol"
            line += f"  known {known.bicubic[each.scale]}  {verdict}"
        lines.append(line)
        state = "written" if each.written else "was finished, left alone"
        folders.append(f"  x{each.scale}  {each.folder}  {state}")
        sums += [f"  X{each.scale}/{part}  {x}" for part, x in each.recipe["sha256"].items()]
    return "\n".join([*lines, *folders, *sums, *summary.lines()]) + "\n"
