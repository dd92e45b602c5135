"""Training sets: matching sub-images of HR and LR images in LMDBs.

    OUT/train_HR_sub.lmdb                  one for all scales: HR is cut to a multiple of 12
    OUT/train_LR_bicubic_X{2,3,4}_sub.lmdb equal keys

Every image is opened before anything is written. An image's sub-images go into the databases in
one transaction each: what a killed run had written is found by its keys and not made again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.databases import DATA, DatabaseWriter, is_finished
from dlgsanet_arch.data.finding import check_folder, find_images
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.data.making import (
    HR_MULTIPLE,
    Findings,
    ImageArray,
    Recipe,
    Source,
    checked_scales,
    crop_to_multiple,
    encode_png,
    file_hashes,
    images_sha256,
)
from dlgsanet_arch.data.workers import with_progress
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import RECIPE, disk_faults_named, one_writer, read_json
from dlgsanet_arch.hints import named

# To be raised when the same images and settings give other databases than before.
RECIPE_VERSION = 1


def database_name(scale: int) -> str:
    """The folder of the sub-images whose HR is `scale` times their side; 1 is HR itself."""
    return "train_HR_sub.lmdb" if scale == 1 else f"train_LR_bicubic_X{scale}_sub.lmdb"


class Cutting(NamedTuple):
    """Side of a sub-image and distance of two in HR pixels, side of a training patch in LR's."""

    crop: int = 480
    step: int = 240
    patch: int = 48

    def check(self, scales: Sequence[int]) -> None:
        """Raise a UserError where LR cannot be cut to match at one of the scales."""
        for name, value in (("--crop", self.crop), ("--step", self.step)):
            wrong = [scale for scale in scales if value < 1 or value % scale]
            if wrong:
                multiple = math.lcm(*scales)
                near = max(multiple, round(value / multiple) * multiple)
                raise UserError(
                    f"{name} {value} is not a multiple of scale {wrong[0]}: LR could not be cut "
                    f"to match; use {near}"
                )


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where windows of `size` start along `length`: every `step`, the last flush with the end.

    The rule of BasicSR's `extract_subimages.py` with a `thresh_size` of 0. A `length` less than
    `size` is one window.
    """
    if length <= size:
        return [0]
    return sorted({*range(0, length - size + 1, step), length - size})


def _sub_images(image: ImageArray, cutting: Cutting, scale: int) -> Iterator[ImageArray]:
    """Cut an image, HR or `scale` times smaller, into parts that show equal places, row by row."""
    size = cutting.crop // scale
    rows, columns = (_starts(side * scale, *cutting[:2]) for side in image.shape[:2])
    for top in (row // scale for row in rows):
        for left in (column // scale for column in columns):
            yield image[top : top + size, left : left + size]


@dataclass
class Summary(Findings):
    """What was made: the number of sub-images by database, HR first; of images, cut by this run."""

    databases: dict[Path, int] = field(default_factory=dict)
    images: int = 0
    cut: int = 0


def _lr_folder(folder: Path, scale: int, alone: bool) -> Path:
    """Where LR of a scale lies: in X4, in *_X4, or, of one scale, in the folder itself."""
    inside = [path for path in folder.glob(f"*[xX]{scale}") if path.is_dir()]
    if len(inside) == 1:
        return inside[0]
    if inside or not alone:
        raise UserError(
            f"{folder} holds no folder X{scale}, or more than one: LR of several scales is looked "
            "for in X2, X3 and X4; name the folder of one with --lr and --scale"
        )
    return folder


def pair(hr: Path, lr: Mapping[int, Path]) -> list[Source]:
    """Find HR images, and LR of the same names in a folder for each scale: a or ax4 is LR of a."""
    sources = [Source(key, path, {}) for key, path in find_images(hr).items()]
    for scale, folder in lr.items():
        found, lonely = find_images(folder), []
        for each in sources:
            names = (each.key, f"{each.key}x{scale}", f"{each.key}X{scale}")
            match = next((name for name in names if name in found), None)
            if match is None:
                lonely.append(str(each.hr))
            else:
                each.lr[scale] = found.pop(match)
        lonely += map(str, found.values())
        if lonely:
            raise UserError(
                f"HR and LR images of scale {scale} do not pair by name (a and a or ax{scale}); "
                f"{len(lonely)} have no partner: {named(lonely)}"
            )
    return sources


def find_sources(hr: Path, lr: Path | None, scales: Sequence[int]) -> list[Source]:
    """Find HR images as `pair` does, with LR in a folder that has X2, X3, X4 for several scales."""
    if lr is None:
        return pair(hr, {})
    check_folder(lr, "name a folder of LR images")
    return pair(hr, {scale: _lr_folder(lr, scale, alone=len(scales) == 1) for scale in scales})


def _cut(
    source: Source, scales: Sequence[int], cutting: Cutting
) -> dict[int, list[tuple[str, bytes]]]:
    """The sub-images of an image by scale, 1 for HR: PNG files and keys, numbered from 1."""
    hr = crop_to_multiple(read_8_bits(source.hr).pixels, HR_MULTIPLE)
    entries = {}
    for scale in scales:
        if scale in source.lr:
            height, width = (side // scale for side in hr.shape[:2])
            image = read_8_bits(source.lr[scale]).pixels[:height, :width]
        else:
            image = hr if scale == 1 else bicubic(hr, 1 / scale)
        parts = _sub_images(image, cutting, scale)
        entries[scale] = [
            (f"{source.key}_s{index:03d}", encode_png(part)) for index, part in enumerate(parts, 1)
        ]
    return entries


def _write(
    sources: Sequence[Source], recipes: Mapping[Path, Recipe], cutting: Cutting, workers: int
) -> int:
    """Cut the images that no earlier run has cut, write their sub-images, and count them."""
    with ExitStack() as stack:
        writers = {
            recipe["scale"]: stack.enter_context(closing(DatabaseWriter(path, recipe)))
            for path, recipe in recipes.items()
        }
        # an image's sub-images come in one transaction: where the first is, all are
        remaining = [
            source
            for source in sources
            if not all(writer.has(f"{source.key}_s001") for writer in writers.values())
        ]
        cut = partial(_cut, scales=tuple(writers), cutting=cutting)
        for _, made in with_progress(cut, remaining, workers, "cutting"):
            for scale, entries in made.items():
                writers[scale].put(entries)
        for writer in writers.values():
            writer.finish()
    return len(remaining)


def build(
    sources: Sequence[Source],
    scales: Sequence[int],
    out: Path,
    *,
    cutting: Cutting | None = None,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Make the databases of a training set that are not there yet.

    What is written is kept if the run ends early, under another name until it is complete.
    `skip_bad` leaves out images that cannot be used, `overwrite` replaces databases of other images
    or settings, `workers` is a number of processes. UserError if images cannot be used, a database
    was made otherwise, another run is at work on `out`, or the disk is full; ValueError if a scale
    is not one of `SCALES`, or two images have one key.
    """
    cutting, scales, summary = cutting or Cutting(), checked_scales(scales), Summary()
    if len({source.key for source in sources}) < len(sources):
        raise ValueError("images to train on share a key")
    cutting.check(scales)
    least = cutting.patch * max(scales)
    if skip_bad:
        sources = summary.scan(sources, least, workers, skip=True)
    hashes = file_hashes(sources)
    recipes = {
        out / database_name(scale): {
            "version": RECIPE_VERSION,
            "scale": scale,
            "crop": cutting.crop,
            "step": cutting.step,
            "images": images_sha256(sources, scale, hashes),
        }
        for scale in (1, *scales)
    }
    with disk_faults_named(f"{out} cannot be written"), one_writer(out):
        finished = {path for path in recipes if is_finished(path, recipes[path], overwrite)}
        missing = {path: recipe for path, recipe in recipes.items() if path not in finished}
        if missing and not skip_bad:
            summary.scan(sources, least, workers)
        if missing:
            summary.cut = _write(sources, missing, cutting, workers)
        summary.databases = {path: read_json(path / RECIPE)["entries"] for path in recipes}
    summary.images = len(sources)
    return summary


def report(summary: Summary) -> str:
    """What was made, for the terminal: databases, what was changed or left out."""
    lines = [
        f"{count:>7} sub-images {(path / DATA).stat().st_size / 2**20:>8.1f} MiB  {path}"
        for path, count in summary.databases.items()
    ]
    made = f"{summary.images} images"
    if summary.cut < summary.images:
        made += f", {summary.images - summary.cut} of them cut already by an earlier run"
    return "\n".join([*lines, made, *summary.lines()])
