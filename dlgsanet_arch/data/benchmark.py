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
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data import SCALES
from dlgsanet_arch.data.benchmarks import KNOWN, set_name
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.databases import encode_png
from dlgsanet_arch.data.discovery import Layout, Original, find_layout
from dlgsanet_arch.data.images import ImageError, read_8_bits
from dlgsanet_arch.data.scores import Scores, measure
from dlgsanet_arch.data.sub_images import crop_to_multiple
from dlgsanet_arch.data.workers import ordered
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import (
    RECIPE,
    disk_faults_named,
    one_writer,
    read_json,
    replace_folder,
    unfinished,
    write_json,
)
from dlgsanet_arch.hints import named
from dlgsanet_arch.progress import progress_bar

# Of what is written: another number makes finished folders count as made by another recipe.
RECIPE_VERSION = 1
RECIPE_KIND = "test set"
# Side of SSIM's Gaussian window: what is left of HR without its border must hold one.
WINDOW = 11
# A worker process takes seconds to start, which fewer images than this do not repay.
IMAGES_A_WORKER = 50


@dataclass(frozen=True)
class ScaleSummary:
    """One scale of a test set.

    Args:
        scale: HR side over LR side.
        folder: Holds HR and LR.
        written: False where a finished folder was left alone.
        sha256: Of HR and LR, see `folder_sha256`.
        bicubic: Mean scores of the LR images enlarged by bicubic.
        known: What they are for this set; None where that is not known.
        agrees: Whether they are that, up to the known set's tolerance; None without `known`.
        given: How the LR images that the source holds compare with those made here; None
            where it holds none.
        exact: How many images bicubic restores without an error.
    """

    scale: int
    folder: Path
    written: bool
    sha256: Mapping[str, str]
    bicubic: Scores
    known: Scores | None
    agrees: bool | None
    given: str | None
    exact: int


@dataclass(frozen=True)
class Summary:
    """What `build` made, or found finished.

    Args:
        name: The set's name.
        source: The folder where HR was found.
        count: How many images it has.
        skipped: Of each image left out, its path and why.
        notices: What a user should know.
        scales: One entry a scale, in ascending order.
    """

    name: str
    source: Path
    count: int
    skipped: tuple[str, ...]
    notices: tuple[str, ...]
    scales: tuple[ScaleSummary, ...]


def _least_side(scale: int) -> int:
    """The smallest side whose multiple of `scale` holds SSIM's window between two borders."""
    return math.ceil((WINDOW + 2 * scale) / scale) * scale


@dataclass(frozen=True)
class _Inspected:
    """What is known of an image file that can be used: height and width, the file's SHA-256."""

    size: tuple[int, int]
    sha256: str
    notices: tuple[str, ...]


def _inspect(item: tuple[Path, int]) -> _Inspected | ImageError:
    """Decode an image as a whole; what is wrong with it is returned, so that others continue."""
    path, least = item
    try:
        image = read_8_bits(path, least=least)
    except ImageError as error:
        return error
    digest = sha256(path.read_bytes()).hexdigest()
    return _Inspected(image.pixels.shape[:2], digest, image.notices)


def _useful_workers(workers: int, images: int) -> int:
    return min(workers, math.ceil(images / IMAGES_A_WORKER))


def _inspect_all(
    name: str, least: Mapping[Path, int], workers: int
) -> tuple[dict[Path, _Inspected], list[ImageError]]:
    """Decode all images.

    Args:
        name: The set's name.
        least: Each image and the smallest side that is of use.
        workers: Number of processes.

    Returns:
        The images that can be used, and what is wrong with the others.
    """
    items = list(least.items())
    good, bad = {}, []
    with (
        closing(ordered(_inspect, items, _useful_workers(workers, len(items)))) as inspected,
        progress_bar(f"{name}: reading", len(items), "images") as bar,
    ):
        for (path, _), result in zip(items, inspected, strict=True):
            if isinstance(result, ImageError):
                bad.append(result)
            else:
                good[path] = result
            bar.update()
    return good, bad


def _refuse_bad(name: str, bad: Sequence[ImageError]) -> None:
    what = "1 image" if len(bad) == 1 else f"{len(bad)} images"
    lines = "\n".join(f"  {error}" for error in bad)
    raise UserError(
        f"{what} of {name} cannot be used, nothing was written:\n{lines}\n"
        "fix or remove what is named, or leave it out with --skip-bad"
    )


@dataclass(frozen=True)
class _Task:
    original: Original
    scale: int
    folder: Path


def _make(task: _Task) -> Scores:
    """Write one image's HR and LR, and measure how bicubic restores it."""
    key, scale = task.original.key, task.scale
    hr = crop_to_multiple(read_8_bits(task.original.path).pixels, scale)
    lr = bicubic(hr, 1 / scale)
    for part, image in (("HR", hr), ("LR", lr)):
        (task.folder / part / f"{key}.png").write_bytes(encode_png(image))
    return measure(bicubic(lr, scale), hr, scale)


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

    Args:
        folder: Its images have 8 bits a channel.

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


@dataclass(frozen=True)
class _Plan:
    """One scale to build.

    Args:
        scale: HR side over LR side.
        folder: Where it goes.
        originals: What it is made from.
        recipe: What tells it from a folder made otherwise.
    """

    scale: int
    folder: Path
    originals: Sequence[Original]
    recipe: Mapping[str, Any]

    @property
    def unfinished(self) -> Path:
        """The folder in which it is built."""
        return unfinished(self.folder)

    @property
    def is_own_source(self) -> bool:
        """Whether it would be made from the very images that were written there."""
        return all(each.path.parent == self.folder / "HR" for each in self.originals)


def _recipe(
    scale: int, originals: Sequence[Original], inspected: Mapping[Path, _Inspected]
) -> dict[str, Any]:
    sources = {}
    for each in originals:
        found = inspected[each.path]
        sources[each.key] = {"size": list(found.size), "sha256": found.sha256}
    return {"kind": RECIPE_KIND, "version": RECIPE_VERSION, "scale": scale, "sources": sources}


def _read_recipe(folder: Path) -> dict[str, Any]:
    """Read what a folder was made from.

    Raises:
        UserError: The folder was not made by this module.
    """
    recipe = read_json(folder / RECIPE)
    if recipe is None or recipe.get("kind") != RECIPE_KIND:
        raise UserError(
            f"{folder} exists and was not made by this command: it has no recipe.json of a test "
            "set; move it away, then run the command again"
        )
    return recipe


def _is_intact(folder: Path, recipe: Mapping[str, Any]) -> bool:
    try:
        return _both_sha256(folder) == recipe.get("sha256")
    except ImageError:
        return False


def _finished(plan: _Plan, overwrite: bool) -> dict[str, Any] | None:
    """The recipe of a scale that is finished, None where it is to be built.

    Raises:
        UserError: In its place is something else.
    """
    folder = plan.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    recipe = _read_recipe(folder)
    made_so = {key: recipe.get(key) for key in plan.recipe} == plan.recipe
    if not (made_so or plan.is_own_source):
        reason = "was made from other images, or by another version"
    elif not _is_intact(folder, recipe):
        reason = "was changed after it was made"
    else:
        return recipe
    if plan.is_own_source:  # changed images are nothing to make it from again
        raise UserError(
            f"{folder} {reason}: move it away, and name the set's images with --hr FOLDER"
        )
    if overwrite:
        return None
    raise UserError(f"{folder} {reason}: move it away, or replace it with --overwrite")


def _build_plans(name: str, plans: Sequence[_Plan], workers: int) -> dict[int, dict[str, Any]]:
    """Build scales, one after the other.

    Returns:
        By scale, the recipe as it was written.
    """
    if not plans:
        return {}
    for plan in plans:
        if plan.unfinished.exists():
            shutil.rmtree(plan.unfinished)
        for part in ("HR", "LR"):
            (plan.unfinished / part).mkdir(parents=True)
    # one stream for all scales, so that worker processes start once
    tasks = [_Task(each, plan.scale, plan.unfinished) for plan in plans for each in plan.originals]
    recipes = {}
    with (
        closing(ordered(_make, tasks, _useful_workers(workers, len(tasks)))) as results,
        progress_bar(f"{name}: writing", len(tasks), "images") as bar,
    ):
        for plan in plans:
            scores = []
            for score in islice(results, len(plan.originals)):
                scores.append(score)
                bar.update()
            recipe = {
                **plan.recipe,
                **_means(scores),
                "sha256": _both_sha256(plan.unfinished),
            }
            write_json(plan.unfinished / RECIPE, recipe)
            replace_folder(plan.unfinished, plan.folder)
            recipes[plan.scale] = recipe
    return recipes


def _differences(ours: Path, given: Path) -> NDArray[np.int64] | None:
    """Count absolute differences between two images' samples by their size.

    Returns:
        (256,): how many samples differ by 0, 1, 2, … levels; None where sizes are unequal.
    """
    images = [read_8_bits(path, least=1).pixels for path in (ours, given)]
    if images[0].shape != images[1].shape:
        return None
    levels = cv2.absdiff(*images)
    return np.bincount(levels.ravel(), minlength=256)


def _compare_given(plan: _Plan, given: Mapping[tuple[int, str], Path]) -> str | None:
    """Hold the LR images that came with a set against those made here.

    Returns:
        What to tell about them; None where there are none.
    """
    counts = np.zeros(256, np.int64)
    compared, other_sizes, unreadable = 0, 0, 0
    for original in plan.originals:
        path = given.get((plan.scale, original.stem))
        if path is None:
            continue
        try:
            levels = _differences(plan.folder / "LR" / f"{original.key}.png", path)
        except ImageError:
            unreadable += 1
            continue
        if levels is None:
            other_sizes += 1
        else:
            counts += levels
            compared += 1
    parts = []
    if compared:
        largest = int(np.flatnonzero(counts)[-1])
        mean = float(counts @ np.arange(256) / counts.sum())
        if largest == 0:
            text = "given LR equals ours"
        elif largest == 1:
            share = counts[1] / counts.sum()
            text = f"given LR equals ours up to rounding: 1 level in {share:.3%} of the samples"
        else:
            text = (
                f"given LR differs from ours by {mean:.3f} levels in the mean and {largest} at "
                "most: it is not MATLAB's bicubic of these images"
            )
        parts.append(f"{text} ({compared} of {len(plan.originals)} images)")
    if other_sizes:
        parts.append(
            f"given LR of {other_sizes} images has another size than ours: HR was cropped "
            "otherwise for it"
        )
    if unreadable:
        parts.append(f"given LR of {unreadable} images cannot be read")
    return "; ".join(parts) or None


def _summarise_scale(
    name: str, plan: _Plan, recipe: Mapping[str, Any], written: bool, given: str | None
) -> ScaleSummary:
    measured = Scores(**recipe["bicubic"])
    known, agrees = None, None
    if name in KNOWN:
        known, tolerance = KNOWN[name].bicubic[plan.scale], KNOWN[name].tolerance
        agrees = (
            abs(measured.psnr - known.psnr) <= tolerance.psnr
            and abs(measured.ssim - known.ssim) <= tolerance.ssim
        )
    return ScaleSummary(
        scale=plan.scale,
        folder=plan.folder,
        written=written,
        sha256=recipe["sha256"],
        bicubic=measured,
        known=known,
        agrees=agrees,
        given=given,
        exact=recipe["exact"],
    )


def _notices(
    name: str, layout: Layout, inspected: Mapping[Path, _Inspected], count: int
) -> tuple[str, ...]:
    """Put together what a user should know, equal notices of several images as one."""
    by_text = defaultdict(list)
    for path, result in inspected.items():
        for text in result.notices:
            by_text[text].append(path.name)
    notices = list(layout.notices)
    if name in KNOWN and count != KNOWN[name].count:
        notices.append(f"{name} has {KNOWN[name].count} images, here are {count}")
    for text, names in by_text.items():
        notices.append(f"{named(names)}: {text}")
    return tuple(notices)


def build(
    name: str,
    source: Path,
    target: Path,
    scales: Sequence[int] = SCALES,
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
        name: The set's name, see `set_name`.
        source: A folder in any of the layouts in which sets circulate: `HR`, `GT`, `original` or
            `GTmod12`, `X4/HR`, SelfExSR's `image_SRF_4`, or images in the folder itself; or a
            folder that holds one such folder. LR images that it holds are compared, not used.
        target: Such as ``datasets/benchmark/Set5``; may be the source.
        scales: Some of 2, 3 and 4.
        workers: Number of processes.
        skip_bad: Leave out images that cannot be read or are too small.
        overwrite: Replace scales that were made from other images or changed since, but
            nothing that this function did not make.

    Raises:
        UserError: Images are bad, missing or ambiguous, something else is in the place of the
            result, or it cannot be written.
        ValueError: A scale is not 2, 3 or 4.
    """
    scales = sorted(set(scales))
    if not scales or not set(scales) <= set(SCALES):
        raise ValueError(f"scales must be some of 2, 3 and 4, got {scales=}")
    name = set_name(name)
    source, target = source.resolve(), target.resolve()
    layout = find_layout(name, source, target, scales)

    least: dict[Path, int] = {}
    for scale in scales:
        for original in layout.hr[scale]:
            least[original.path] = max(least.get(original.path, 0), _least_side(scale))
    inspected, bad = _inspect_all(name, least, workers)
    if bad and not skip_bad:
        _refuse_bad(name, bad)
    plans = []
    for scale in scales:
        originals = [each for each in layout.hr[scale] if each.path in inspected]
        if not originals:
            _refuse_bad(name, bad)
        recipe = _recipe(scale, originals, inspected)
        plans.append(_Plan(scale, target / f"X{scale}", originals, recipe))

    with disk_faults_named(f"{target} cannot be written"), one_writer(target):
        finished = {plan.scale: _finished(plan, overwrite) for plan in plans}
        to_build = [plan for plan in plans if finished[plan.scale] is None]
        recipes = finished | _build_plans(name, to_build, workers)
    summaries = []
    for plan in plans:
        given = None if plan.is_own_source else _compare_given(plan, layout.given)
        written = plan in to_build
        summaries.append(_summarise_scale(name, plan, recipes[plan.scale], written, given))
    count = max(len(plan.originals) for plan in plans)
    return Summary(
        name,
        layout.where,
        count,
        tuple(map(str, bad)),
        _notices(name, layout, inspected, count),
        tuple(summaries),
    )


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
    notices += [f"x{each.scale}: {each.given}" for each in summary.scales if each.given]
    notices += [
        f"x{each.scale}: bicubic restores {each.exact} images without an error, as it does one "
        "colour; they are not in the mean PSNR"
        for each in summary.scales
        if each.exact
    ]
    if notices:
        lines += ["notices:", *(f"  {notice}" for notice in notices)]
    if summary.skipped:
        lines += [f"left out ({len(summary.skipped)}):", *(f"  {line}" for line in summary.skipped)]
    return "\n".join(lines) + "\n"
