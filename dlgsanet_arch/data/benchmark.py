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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from dlgsanet_arch.data.benchmarks import KNOWN, set_name
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.databases import encode_png
from dlgsanet_arch.data.discovery import find_layout
from dlgsanet_arch.data.images import ImageError, read_8_bits
from dlgsanet_arch.data.making import checked_scales, made_before, notice_lines, refuse_bad
from dlgsanet_arch.data.scores import Scores, measure
from dlgsanet_arch.data.sub_images import crop_to_multiple
from dlgsanet_arch.data.workers import with_progress
from dlgsanet_arch.files import (
    RECIPE,
    disk_faults_named,
    one_writer,
    replace_folder,
    unfinished,
    write_json,
)

# Of what is written: another number makes finished folders count as made by another recipe.
RECIPE_VERSION = 1
RECIPE_KIND = "test set"
# Side of SSIM's Gaussian window: what is left of HR without its border must hold one.
WINDOW = 11


@dataclass
class Scale:
    """One scale of a test set: the set's name, where HR and LR go, originals by their name.

    The recipe distinguishes the folder from one made otherwise; once it is finished, it also holds
    figures and hashes. `written` is False where a finished folder was left alone.
    """

    name: str
    scale: int
    folder: Path
    originals: Mapping[str, Path]
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
        """What they are for this set; None where that is not known."""
        return KNOWN[self.name].bicubic[self.scale] if self.name in KNOWN else None

    @property
    def agrees(self) -> bool | None:
        """Whether they are that, up to the set's tolerance; None where that is not known."""
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
    count: int = 0
    skipped: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)


class _Inspected(NamedTuple):
    """What the recipe says of an image file, and notices."""

    facts: dict[str, Any]
    notices: tuple[str, ...]


def _least_side(scale: int) -> int:
    """The smallest side whose multiple of `scale` holds SSIM's window between two borders."""
    return math.ceil((WINDOW + 2 * scale) / scale) * scale


def _inspect(item: tuple[Path, int]) -> _Inspected | ImageError:
    """Decode an image as a whole; what is wrong with it is returned, so that others continue."""
    path, least = item
    try:
        image = read_8_bits(path, least=least)
    except ImageError as error:
        return error
    digest = sha256(path.read_bytes()).hexdigest()
    return _Inspected({"size": [*image.pixels.shape[:2]], "sha256": digest}, image.notices)


def _inspect_all(
    summary: Summary, originals: Mapping[int, Mapping[str, Path]], workers: int, skip_bad: bool
) -> dict[Path, _Inspected]:
    """Decode all images; what was found goes into the summary, the good ones are returned."""
    least: dict[Path, int] = {}
    for scale, each in originals.items():
        for path in each.values():
            least[path] = max(least.get(path, 0), _least_side(scale))
    good, notices = {}, defaultdict(list)
    label = f"{summary.name}: reading"
    for (path, _), result in with_progress(_inspect, list(least.items()), workers, label):
        if isinstance(result, ImageError):
            summary.skipped.append(str(result))
            continue
        good[path] = result
        for notice in result.notices:
            notices[notice].append(path.name)
    summary.notices += notice_lines(notices)
    for each in originals.values():
        bad = sum(path not in good for path in each.values())
        refuse_bad(summary.skipped, bad, len(each), skip=skip_bad)
    return good


class _Task(NamedTuple):
    key: str
    path: Path
    scale: int
    folder: Path


def _make(task: _Task) -> Scores:
    """Write one image's HR and LR, and measure how bicubic restores it."""
    hr = crop_to_multiple(read_8_bits(task.path).pixels, task.scale)
    lr = bicubic(hr, 1 / task.scale)
    for part, image in (("HR", hr), ("LR", lr)):
        (task.folder / part / f"{task.key}.png").write_bytes(encode_png(image))
    return measure(bicubic(lr, task.scale), hr, task.scale)


def _means(scores: Sequence[Scores]) -> dict[str, Any]:
    """Mean scores; the PSNR of images without an error is infinite: counted, and left out."""
    finite = [score.psnr for score in scores if math.isfinite(score.psnr)]
    means = {
        "psnr": fmean(finite) if finite else math.inf,
        "ssim": fmean(score.ssim for score in scores),
    }
    return {"bicubic": means, "exact": len(scores) - len(finite)}


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


def _finished(each: Scale, overwrite: bool) -> dict[str, Any] | None:
    """The recipe of a scale that is finished, None where it is to be built."""

    def change(stored: Mapping[str, Any]) -> str:
        try:
            return "" if _both_sha256(each.folder) == stored.get("sha256") else "other images"
        except ImageError as error:
            return str(error)

    if all(path.parent == each.folder / "HR" for path in each.originals.values()):
        # Made from what was written there: changed images are nothing to make it from again.
        remedy = "move it away, and name the set's images with --hr FOLDER"
        wanted = {"kind": RECIPE_KIND}
        return made_before(each.folder, wanted, change, overwrite=False, remedy=remedy)
    return made_before(each.folder, each.recipe, change, overwrite=overwrite)


def _build_scales(name: str, scales: Sequence[Scale], workers: int) -> None:
    """Build scales, one after the other."""
    for each in scales:
        shutil.rmtree(unfinished(each.folder), ignore_errors=True)
        for part in ("HR", "LR"):
            (unfinished(each.folder) / part).mkdir(parents=True)
    # one stream for all scales, so that worker processes start once
    tasks = [
        _Task(key, path, each.scale, unfinished(each.folder))
        for each in scales
        for key, path in each.originals.items()
    ]
    made = with_progress(_make, tasks, workers, f"{name}: writing")
    for each in scales:
        scores = [score for _, score in islice(made, len(each.originals))]
        growing = unfinished(each.folder)
        each.recipe = {**each.recipe, **_means(scores), "sha256": _both_sha256(growing)}
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
    """Make a test set's tree, or find that it is there already.

    HR is cropped at the bottom and the right to a multiple of the scale, LR is its MATLAB-equal
    bicubic, both with 8 bits. All images are read before anything is written. A scale that an
    interrupted run left behind is built anew; one that is finished is left alone.

    Args:
        name: See `set_name`.
        source: A folder in any of the layouts in which sets circulate: `HR`, `GT`, `original` or
            `GTmod12`, `X4/HR`, SelfExSR's `image_SRF_4`, or images in the folder itself; or a
            folder that holds one such folder. LR images that it holds are not used.
        target: Such as ``datasets/benchmark/Set5``; may be the source.
        scales: Some of 2, 3 and 4; None for those that the source has HR images for.
        workers: Number of processes.
        skip_bad: Leave out images that cannot be read or are too small.
        overwrite: Replace scales that were made from other images or changed since, but
            nothing that this function did not make.

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
    inspected = _inspect_all(summary, layout.hr, workers, skip_bad)
    for scale, found in layout.hr.items():
        originals = {key: path for key, path in found.items() if path in inspected}
        recipe = {"kind": RECIPE_KIND, "version": RECIPE_VERSION, "scale": scale}
        recipe["sources"] = {key: inspected[path].facts for key, path in originals.items()}
        summary.scales.append(Scale(name, scale, target / f"X{scale}", originals, recipe))
    summary.count = max(len(each.originals) for each in summary.scales)
    if name in KNOWN and summary.count != KNOWN[name].count:
        summary.notices.append(f"{name} has {KNOWN[name].count} images, here are {summary.count}")

    with disk_faults_named(f"{target} cannot be written"), one_writer(target):
        missing = []
        for each in summary.scales:
            stored = _finished(each, overwrite)
            if stored is None:
                missing.append(each)
            each.recipe = stored or each.recipe
        _build_scales(name, missing, workers)
    return summary


def _figures(scores: Scores) -> str:
    return f"{scores.psnr:.2f} dB / {scores.ssim:.4f}"


def report(summary: Summary) -> str:
    """Write a summary for the terminal: figures beside the known ones, folders, sums, notices."""
    lines = [
        f"{summary.name}: {summary.count} images from {summary.source}",
        "bicubic's mean PSNR / SSIM (Y channel, a border of the scale cut off):",
    ]
    for each in summary.scales:
        line = f"  x{each.scale}  {_figures(each.bicubic)}"
        if each.known is not None:
            verdict = "agrees" if each.agrees else "differs: other images, or another protocol"
            line += f"  known {_figures(each.known)}  {verdict}"
        lines.append(line)
    lines.append("folders:")
    for each in summary.scales:
        state = "written" if each.written else "was finished, left alone"
        lines.append(f"  x{each.scale}  {each.folder}  {state}")
    lines.append("SHA-256 over names and pixels:")
    for each in summary.scales:
        lines += [f"  X{each.scale}/{part}  {value}" for part, value in each.sha256.items()]
    notices = [*summary.notices]
    notices += [
        f"x{each.scale}: bicubic restores {exact} images without an error, as it does one colour; "
        "they are not in the mean PSNR"
        for each in summary.scales
        if (exact := each.recipe["exact"])
    ]
    if notices:
        lines += ["notices:", *(f"  {notice}" for notice in notices)]
    if summary.skipped:
        lines += [f"left out ({len(summary.skipped)}):", *(f"  {line}" for line in summary.skipped)]
    return "\n".join(lines) + "\n"
