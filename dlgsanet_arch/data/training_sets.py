"""Training sets: matching sub-images of HR and LR images in LMDBs.

    OUT/train_HR_sub.lmdb                  one for all scales: HR is cut to a multiple of 12
    OUT/train_LR_bicubic_X{2,3,4}_sub.lmdb equal keys

Every image is opened before anything is written. An image's sub-images go into the databases in
one transaction each: what a killed run had written is found by its keys and not made again.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from dlgsanet_arch.data import SCALES
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.databases import DATA, DatabaseWriter, encode_png, is_finished
from dlgsanet_arch.data.finding import find_images
from dlgsanet_arch.data.images import ImageError, read_8_bits, read_bytes
from dlgsanet_arch.data.making import Recipe, checked_scales, notice_lines, refuse_bad
from dlgsanet_arch.data.sub_images import HR_MULTIPLE, crop_to_multiple, sub_images
from dlgsanet_arch.data.workers import with_progress
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import RECIPE, disk_faults_named, one_writer, read_json
from dlgsanet_arch.hints import named

# To be raised when the same images and settings give other databases than before.
RECIPE_VERSION = 1

# PNG files by key, by scale; 1 is HR.
Entries = dict[int, list[tuple[str, bytes]]]


def database_name(scale: int) -> str:
    """The folder of the sub-images whose HR is `scale` times their side; 1 is HR itself."""
    return "train_HR_sub.lmdb" if scale == 1 else f"train_LR_bicubic_X{scale}_sub.lmdb"


@dataclass(frozen=True)
class Source:
    """An image to train on: its name in the data set, its HR file, and given LR files by scale."""

    key: str
    hr: Path
    lr: Mapping[int, Path] = field(default_factory=dict)


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
                    f"to match; take {near}"
                )


@dataclass
class Summary:
    """What was made: sub-images by database, HR first, and images used, `cut` by this run.

    `skipped` says why images were left out; `notices` has files by what was changed on reading.
    """

    databases: dict[Path, int] = field(default_factory=dict)
    images: int = 0
    cut: int = 0
    skipped: list[str] = field(default_factory=list)
    notices: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def _lr_folder(folder: Path, scale: int, alone: bool) -> Path:
    """Where LR of a scale lies: in X4, in *_X4, or, of one scale, in the folder itself."""
    ending = f"X{scale}"
    inside = [
        path for path in folder.iterdir() if path.is_dir() and path.name.upper().endswith(ending)
    ]
    if len(inside) == 1:
        return inside[0]
    if inside or not alone:
        raise UserError(
            f"{folder} holds no folder {ending}, or more than one: LR of several scales is looked "
            "for in X2, X3 and X4; name the folder of one with --lr and --scale"
        )
    return folder


def _partners(hr: Path, lr: Path, scale: int) -> dict[str, Path]:
    """LR images by HR's keys; a and a.png or ax4.png are one."""
    by_key = {file.key: file.path for file in find_images(lr)}
    partners, lonely = {}, []
    for file in find_images(hr):
        names = (file.key, f"{file.key}x{scale}", f"{file.key}X{scale}")
        match = next((name for name in names if name in by_key), None)
        if match is None:
            lonely.append(str(file.path.relative_to(hr)))
        else:
            partners[file.key] = by_key.pop(match)
    without = [str(path.relative_to(lr)) for path in by_key.values()]
    said = [
        f"{len(names)} in {where} have none: {named(names)}"
        for names, where in ((lonely, hr), (without, lr))
        if names
    ]
    if said:
        raise UserError(
            f"HR and LR images of scale {scale} do not pair by name (a and a or ax{scale}): "
            f"{'; '.join(said)}"
        )
    return partners


def find_sources(hr: Path, lr: Path | None, scales: Sequence[int]) -> list[Source]:
    """Find HR images and, where LR is given, the LR images that belong to them.

    LR has HR's name or that and the scale, as in ``0001x4.png``, in the same sub-folders. For
    several scales it lies in folders ``X2``, ``X3``, ``X4``.

    Raises:
        UserError: A folder is missing or empty, or images have no partner.
    """
    found = find_images(hr)
    if lr is None:
        return [Source(file.key, file.path) for file in found]
    if not lr.is_dir():
        raise UserError(f"{lr} does not exist or is not a folder: name a folder of LR images")
    partners = {
        scale: _partners(hr, _lr_folder(lr, scale, alone=len(scales) == 1), scale)
        for scale in scales
    }
    return [
        Source(file.key, file.path, {scale: partners[scale][file.key] for scale in scales})
        for file in found
    ]


def _file_sha256(path: Path) -> str:
    try:
        return sha256(read_bytes(path)).hexdigest()
    except ImageError:
        return "cannot be read"  # the scan says why


def _hashes(source: Source) -> dict[int, str]:
    """SHA-256 of the files that decide about an image's sub-images, by scale."""
    hr = f"{source.key} {_file_sha256(source.hr)}"
    given = {scale: f"{hr} {_file_sha256(path)}" for scale, path in source.lr.items()}
    return {scale: given.get(scale, hr) for scale in (1, *SCALES)}


def _recipes(
    sources: Sequence[Source], scales: Sequence[int], cutting: Cutting
) -> dict[int, Recipe]:
    """All that decides about the databases, by scale; 1 is HR."""
    hashes = [value for _, value in with_progress(_hashes, sources, 1, "looking for changes")]
    return {
        scale: {
            "version": RECIPE_VERSION,
            "scale": scale,
            "crop": cutting.crop,
            "step": cutting.step,
            "images": sha256("\n".join(each[scale] for each in hashes).encode()).hexdigest(),
        }
        for scale in (1, *scales)
    }


def _is_lr_of(hr: Sequence[int], lr: Sequence[int], scale: int) -> bool:
    """Whether LR covers HR cut to `HR_MULTIPLE`, and no more than HR rounded up."""
    return all(
        large // HR_MULTIPLE * HR_MULTIPLE <= small * scale < large + scale
        for large, small in zip(hr, lr, strict=True)
    )


def _scan(source: Source, least: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Read an image's files: why it cannot be used, and notices with the file's name."""
    faults, notices, sizes = [], [], {}
    for scale, path in ((1, source.hr), *source.lr.items()):
        try:
            # 1 for LR: its size is compared with HR's
            image = read_8_bits(path, least=least if scale == 1 else 1)
        except ImageError as error:
            faults.append(str(error))
            continue
        sizes[scale] = image.pixels.shape[:2]
        notices += [(notice, str(path)) for notice in image.notices]
    height, width = sizes.pop(1, (0, 0))
    for scale, size in sizes.items():
        if height and not _is_lr_of((height, width), size, scale):
            faults.append(
                f"{source.lr[scale]} has {size[0]} x {size[1]} pixels, and {source.hr} has "
                f"{height} x {width}: at scale {scale} LR must have {height // scale} x "
                f"{width // scale}"
            )
    return faults, notices


def _scan_all(
    sources: Sequence[Source], least: int, workers: int, skip_bad: bool, summary: Summary
) -> list[Source]:
    """Open every image; the good ones are returned, what was found goes into the summary."""
    good = []
    scan = partial(_scan, least=least)
    for source, (faults, notices) in with_progress(scan, sources, workers, "opening"):
        summary.skipped += faults
        for notice, name in notices:
            summary.notices[notice].append(name)
        if not faults:
            good.append(source)
    refuse_bad(summary.skipped, len(sources) - len(good), len(sources), skip=skip_bad)
    return good


def _lacks_others(path: Path, left_out: Sequence[str], overwrite: bool) -> bool:
    """Whether a finished database lacks other images than those left out now: keys would differ.

    Raises:
        UserError: It does, and is not to be overwritten.
    """
    before = read_json(path / RECIPE)["skipped"]
    if before != left_out and not overwrite:
        raise UserError(
            f"{path} was made without {named(before) or 'leaving out any image'}, and now "
            f"{named(left_out) or 'none'} would be left out: keys would not match; make all "
            "scales again with --overwrite"
        )
    return before != left_out


def sub_image_key(source: Source, index: int) -> str:
    """The key of an image's sub-image, counted from 1 as BasicSR's script counts."""
    return f"{source.key}_s{index:03d}"


def _cut(source: Source, scales: Sequence[int], cutting: Cutting) -> Entries:
    hr = crop_to_multiple(read_8_bits(source.hr).pixels, HR_MULTIPLE)
    entries: Entries = {}
    for scale in scales:
        if scale in source.lr:
            height, width = (side // scale for side in hr.shape[:2])
            image = read_8_bits(source.lr[scale]).pixels[:height, :width]
        else:
            image = hr if scale == 1 else bicubic(hr, 1 / scale)
        parts = sub_images(image, cutting.crop, cutting.step, scale)
        entries[scale] = [
            (sub_image_key(source, index), encode_png(part)) for index, part in enumerate(parts, 1)
        ]
    return entries


def _write(
    sources: Sequence[Source],
    recipes: Mapping[Path, Recipe],
    cutting: Cutting,
    workers: int,
    summary: Summary,
) -> None:
    """Cut the images that a run before has not cut, and write their sub-images into databases."""
    with ExitStack() as stack:
        writers = {
            recipe["scale"]: stack.enter_context(DatabaseWriter(path, recipe))
            for path, recipe in recipes.items()
        }
        # an image's sub-images come in one transaction: where the first is, all are
        remaining = [
            source
            for source in sources
            if not all(writer.has(sub_image_key(source, 1)) for writer in writers.values())
        ]
        cut = partial(_cut, scales=tuple(writers), cutting=cutting)
        for _, made in with_progress(cut, remaining, workers, "cutting"):
            for scale, entries in made.items():
                writers[scale].put(entries)
        summary.cut = len(remaining)
        for writer in writers.values():
            writer.finish(sources=len(sources))


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

    Args:
        sources: The images, each key once.
        scales: HR side over LR side, from `SCALES`.
        out: The folder they go into.
        cutting: How images are cut; `Cutting()` when None.
        workers: Processes that read and cut.
        skip_bad: Leave out images that cannot be used.
        overwrite: Replace databases of other images or settings.

    Raises:
        UserError: Images cannot be used, a database is there that was made otherwise, another
            run is at work on `out`, or the disk is full. What is written is kept, under another
            name until it is complete.
        ValueError: A scale is not one of `SCALES`, or two images have one key.
    """
    cutting, scales = cutting or Cutting(), checked_scales(scales)
    if len({source.key for source in sources}) < len(sources):
        raise ValueError("images to train on share a key")
    cutting.check(scales)
    summary = Summary()
    recipes = _recipes(sources, scales, cutting)
    paths = {scale: out / database_name(scale) for scale in recipes}
    with one_writer(out), disk_faults_named(f"{out} cannot be written"):
        missing = [
            scale
            for scale, recipe in recipes.items()
            if not is_finished(paths[scale], recipe, overwrite=overwrite)
        ]
        if missing:
            good = _scan_all(sources, cutting.patch * max(scales), workers, skip_bad, summary)
            left_out = sorted({source.key for source in sources} - {source.key for source in good})
            wanted = {
                paths[scale]: {**recipe, "skipped": left_out}
                for scale, recipe in recipes.items()
                if scale in missing or _lacks_others(paths[scale], left_out, overwrite)
            }
            _write(good, wanted, cutting, workers, summary)
        stored = {path: read_json(path / RECIPE) for path in paths.values()}
    summary.databases = {path: recipe["entries"] for path, recipe in stored.items()}
    summary.images = stored[paths[1]]["sources"]
    summary.skipped = summary.skipped or stored[paths[1]]["skipped"]
    return summary


def report(summary: Summary) -> str:
    """What was made, for the terminal: databases, what was changed or left out."""
    lines = [
        f"{count:>7} sub-images {(path / DATA).stat().st_size / 2**20:>8.1f} MiB  {path}"
        for path, count in summary.databases.items()
    ]
    made = f"{summary.images} images"
    if summary.cut < summary.images:
        made += f", {summary.images - summary.cut} of them cut already by a run before"
    lines += [made, *notice_lines(summary.notices)]
    if summary.skipped:
        lines += [f"left out, {len(summary.skipped)} faults:", *summary.skipped]
    return "\n".join(lines)
