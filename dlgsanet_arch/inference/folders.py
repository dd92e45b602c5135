"""Files and folders of images upscaled; bad ones are named and counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dlgsanet_arch.data.finding import walk_images
from dlgsanet_arch.data.images import Pixels, StoredImage, read_stored
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.inference.upscaler import Upscaler
from dlgsanet_arch.inference.writing import FORMATS, QUALITY, format_of, why_not, write_image


@dataclass(frozen=True)
class Job:
    """An image to be enlarged.

    Args:
        source: Its file.
        target: What is to be written.
        may_change: Whether PNG is written instead, where the target's format cannot hold it.
    """

    source: Path
    target: Path
    may_change: bool = False

    @property
    def instead(self) -> Path:
        """What is written where the target's format cannot hold the image."""
        return self.target.with_suffix(".png")

    @property
    def is_done(self) -> bool:
        """Whether the result is there from before."""
        return self.target.is_file() or (self.may_change and self.instead.is_file())


@dataclass(frozen=True)
class Event:
    """Something that happened to an image.

    Args:
        kind: An image was "written", "skipped" as its result is there, or is "bad"; or a "notice"
            about it; or some "tiles" of it are done.
        path: The image.
        text: The fault of a "bad" image, a "notice", the result's file that was "written".
        done: Of "tiles", how many are done,
        total: of how many.
    """

    kind: Literal["written", "skipped", "bad", "notice", "tiles"]
    path: Path
    text: str = ""
    done: int = 0
    total: int = 0


def _target(source: Path, folder: Path, suffix: str, format: str | None) -> Job:
    kept = source.suffix if format_of(source) else ".png"
    ending = kept if format is None else FORMATS[format][0]
    if format is not None and format_of(source) == format:
        ending = source.suffix
    return Job(source, folder / f"{source.stem}{suffix}{ending}", may_change=format is None)


def plan(source: Path, out: Path, *, suffix: str = "", format: str | None = None) -> list[Job]:
    """Say which images are enlarged into which files.

    Args:
        source: An image, or a folder, of which all images below are taken.
        out: A folder, whose tree becomes that of `source`; or for one image a file, if it ends
            in the suffix of a format and is not a folder.
        suffix: Put behind the names, before their endings.
        format: A key of `FORMATS`. None keeps each image's own, and takes PNG where this is not
            written or cannot hold the depth, transparency or size.

    Raises:
        UserError: The image or folder is missing, or holds no images; two images would have
            one result, or a result would replace its image.
    """
    if source.is_dir():
        inside = out.resolve()
        found = [source / each for each in walk_images(source)]
        # Results of a run before are not images of this one.
        is_within = inside != source.resolve() and inside.is_relative_to(source.resolve())
        found = [
            path for path in found if not (is_within and path.resolve().is_relative_to(inside))
        ]
        jobs = [
            _target(path, out / path.parent.relative_to(source), suffix, format) for path in found
        ]
    elif not source.exists():
        raise UserError(f"{source} does not exist: name an image or a folder of images")
    elif out.suffix and not out.is_dir():
        if format_of(out) is None:
            known = ", ".join(each for suffixes in FORMATS.values() for each in suffixes)
            raise UserError(f"{out} has no suffix of a format that is written: {known}")
        if format not in (None, format_of(out)):
            raise UserError(f"{out} is not named as {format}: leave out one of the two")
        jobs = [Job(source, out.with_stem(out.stem + suffix))]
    else:
        jobs = [_target(source, out, suffix, format)]
    _check(jobs)
    return jobs


def _check(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.target.resolve() == job.source.resolve():
            raise UserError(
                f"{job.source} would be replaced by its result: name another folder, or a --suffix"
            )
    count = Counter(job.target for job in jobs)
    for job in jobs:
        if count[job.target] > 1:
            names = [str(other.source) for other in jobs if other.target == job.target]
            raise UserError(
                f"{' and '.join(names)} would have one result, {job.target}: rename one of them"
            )


def shard(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """Return part `index` of `count`, from 1: every count-th image."""
    return list(jobs[index - 1 :: count])


@dataclass(frozen=True)
class Writing:
    """How results are written.

    Args:
        skip_existing: Whether images whose results are there are passed over.
        quality: Of JPEG and WebP, 1 to 100.
        taken: Files that are other images' results.
    """

    skip_existing: bool = False
    quality: int = QUALITY
    taken: frozenset[Path] = frozenset()


Tell = Callable[[Event], None]


def _write(job: Job, image: StoredImage, made: Pixels, writing: Writing, tell: Tell) -> None:
    target = job.target
    reason = why_not(format_of(target), made)
    if reason is not None and job.may_change:
        if job.instead in writing.taken or job.instead.resolve() == job.source.resolve():
            raise UserError(f"{reason}, and {job.instead} is taken: use --suffix or --format png")
        target = job.instead
        tell(Event("notice", job.source, f"{reason}: {target.name} is written"))
    if image.exif and made.dtype == np.uint16 and format_of(target) == "tiff":
        tell(Event("notice", job.source, "has EXIF data, which 16-bit TIFF files go without"))
    write_image(
        target, format_of(target), made, icc=image.icc, exif=image.exif, quality=writing.quality
    )
    tell(Event("written", job.source, str(target)))


def _finish(
    upscaler: Upscaler,
    group: Sequence[tuple[Job, StoredImage]],
    writing: Writing,
    tell: Tell,
) -> None:
    """Enlarge images of one shape and depth together, and write them."""

    def progress(done: int, total: int) -> None:
        tell(Event("tiles", group[-1][0].source, done=done, total=total))

    try:
        made = upscaler.many([image.pixels for _, image in group], progress)
    except UserError as error:
        for job, _ in group:
            tell(Event("bad", job.source, str(error)))
        return
    for (job, image), result in zip(group, made, strict=True):
        try:
            _write(job, image, result, writing, tell)
        except UserError as error:
            tell(Event("bad", job.source, str(error)))


def run(upscaler: Upscaler, jobs: Sequence[Job], writing: Writing, tell: Tell) -> None:
    """Enlarge images one after another; those of one size together, as many as its batch.

    Args:
        upscaler: What enlarges them.
        jobs: What `plan` returned.
        writing: How results are written.
        tell: Is told what happened, "written", "skipped" or "bad" once for each image.
    """
    group: list[tuple[Job, StoredImage]] = []
    for job in jobs:
        if writing.skip_existing and job.is_done:
            tell(Event("skipped", job.source))
            continue
        try:
            image = read_stored(job.source)
        except (UserError, MemoryError) as error:
            tell(Event("bad", job.source, str(error) or "is larger than the memory"))
            continue
        for notice in image.notices:
            tell(Event("notice", job.source, notice))
        if group and not _alike(group[0][1].pixels, image.pixels):
            _finish(upscaler, group, writing, tell)
            group = []
        group.append((job, image))
        tall, wide = image.pixels.shape[:2]
        # What goes in tiles has enough of them to be computed together.
        if len(group) >= upscaler.batch or upscaler.choose_tile(tall, wide, len(group) + 1):
            _finish(upscaler, group, writing, tell)
            group = []
    if group:
        _finish(upscaler, group, writing, tell)


def _alike(one: Pixels, other: Pixels) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
