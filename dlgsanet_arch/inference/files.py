"""Files and folders of images: which are enlarged into what, decoded, written; bad ones named."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dlgsanet_arch.data.finding import SUFFIXES, no_images, not_read
from dlgsanet_arch.data.images import StoredImage, read_stored
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_target
from dlgsanet_arch.inference.upscaler import Upscaler
from dlgsanet_arch.inference.writing import (
    FORMATS,
    QUALITY,
    WriteError,
    format_of,
    is_lossless_webp,
    why_not,
    write_image,
)


@dataclass(frozen=True)
class Job:
    """An image to be enlarged."""

    source: Path
    target: Path
    instead: Path | None = None  # written where the target's format cannot hold the image
    fault: str = ""  # why it cannot be done, where that is known before it is read


def _walk(folder: Path, out: str) -> tuple[list[Path], list[Job], str]:
    """Find the images below a folder, each folder read once, outside of the folder of results.

    Also folders that cannot be read, as jobs; and the images that are not read, counted.
    """
    files, faults, seen = [], [], set()

    def unreadable(error: OSError) -> None:
        faults.append(Job(Path(error.filename), Path(), fault=f"cannot be read: {error.strerror}"))

    for current, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(current)
        if real in seen or f"{real}/".startswith(out):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(current, name) for name in names if not name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    # A link to nothing is named when it is read.
    found = [path for path in images if os.path.isfile(path) or path.is_symlink()]
    return sorted(found), faults, not_read(files)


def _job(source: Path, folder: Path, suffix: str, format: str | None) -> Job:
    kept = format_of(source)
    ending = source.suffix if kept and format in (None, kept) else FORMATS[format or "png"][0]
    target = folder / f"{source.stem}{suffix}{ending}"
    return Job(source, target, target.with_suffix(".png") if format is None else None)


def _without_results(jobs: Sequence[Job], suffix: str) -> list[Job]:
    """Leave out images that are the results of others, from a run before."""
    results = set()
    for job in jobs:
        names = {job.target.name, (job.instead or job.target).name}
        if suffix:  # of another --format as well
            names |= {job.target.stem + each for each in SUFFIXES}
        folder = os.path.realpath(job.target.parent)
        results |= {os.path.join(folder, name) for name in names} - {os.path.realpath(job.source)}
    return [job for job in jobs if os.path.realpath(job.source) not in results]


def _with_faults(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield jobs, with a fault where two have one result or a result is an image."""
    count = Counter(job.target for job in jobs)
    sources = {os.path.realpath(job.source) for job in jobs}
    for job in jobs:
        if job.instead and (job.instead in count or os.path.realpath(job.instead) in sources):
            job = replace(job, instead=None)
        fault = job.fault
        if os.path.realpath(job.target) == os.path.realpath(job.source):
            fault = "would be replaced by its result: name another folder, or a --suffix"
        elif count[job.target] > 1:
            others = ", ".join(each.source.name for each in jobs if each.target == job.target)
            fault = f"would share the result {job.target} with others ({others}): rename one"
        yield replace(job, fault=fault)


def plan(
    source: Path, out: Path, *, suffix: str = "", format: str | None = None
) -> tuple[list[Job], str]:
    """Decide which images are enlarged into which files.

    Args:
        source: An image, or a folder, of which all images below are taken, but for results.
        out: A folder, whose tree becomes that of `source`; or for one image a file, if it ends
            in the suffix of a format and is not a folder.
        suffix: Put behind the names, before their endings.
        format: A key of `FORMATS`. None keeps each image's own, and takes PNG where this is not
            written or cannot hold the depth, transparency or size.

    Returns:
        The images, those that cannot be done with a fault; and images that are not read, counted
        by `not_read`.

    Raises:
        UserError: The image or folder is missing, or holds no images; or `out` cannot be meant.
    """
    if any(each in suffix for each in (os.sep, os.altsep, "\0") if each):
        raise UserError(f"--suffix {suffix!r} is part of a name: it cannot lead to another folder")
    left, faults = "", []
    if os.path.isdir(source):
        real = os.path.realpath(out)
        inside = "\0" if real == os.path.realpath(source) else f"{real}/"
        found, faults, left = _walk(source, inside)
        jobs = [_job(path, out / path.parent.relative_to(source), suffix, format) for path in found]
        jobs = _without_results(jobs, suffix)
        if not jobs and not faults:
            raise no_images(source, left)
    elif not os.path.lexists(source):
        raise UserError(f"{source} does not exist: name an image or a folder of images")
    elif out.suffix and not os.path.isdir(out):
        if format_of(out) is None:
            known = ", ".join(each for suffixes in FORMATS.values() for each in suffixes)
            raise UserError(f"{out} has no suffix of a format that is written: {known}")
        if format not in (None, format_of(out)):
            raise UserError(f"{out} is not named as {format}: leave out one of the two")
        jobs = [Job(source, out.with_stem(out.stem + suffix))]
    else:
        jobs = [_job(source, out, suffix, format)]
    return [*faults, *_with_faults(jobs)], left


def _read(job: Job, scale: float) -> tuple[StoredImage, Path, list[str]]:
    """Decode an image, decide on the file of its result, and make the folder for that.

    Returns them with sentences on what is changed; what cannot be written is found here already.
    """
    if job.fault:
        raise UserError(job.fault)
    image, target, notices = read_stored(job.source), job.target, []
    height, width, channels = image.pixels.shape
    shape = [round(scale * height), round(scale * width), channels]
    if reason := why_not(format_of(target), shape, image.pixels.dtype):
        if not job.instead:
            raise WriteError(f"{target} cannot be written: {reason}; use a name that ends in .png")
        target = job.instead
        notices = [f"{reason}: {target.name} is written"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_target(target)
    except OSError as error:
        raise WriteError(f"{target} cannot be written: {error.strerror or error}") from error
    if image.exif and image.pixels.dtype == np.uint16 and format_of(target) == "tiff":
        notices.append("has EXIF data, which 16-bit TIFF files go without")
    return image, target, [*image.notices, *notices]


def run(
    upscaler: Upscaler,
    jobs: Sequence[Job],
    tell: Callable[[str, Path, str], None],
    progress: Callable[[int, int], None],
    *,
    skip_existing: bool = False,
    quality: int = QUALITY,
) -> None:
    """Enlarge the images of `plan`; those of one size together, as many as the upscaler's batch.

    `tell` is called with what happened to an image, its path and a text: "written" with the result,
    "skipped" as its result is there, "bad" with its fault; once for each image. Before that, any
    number of times: "notice" with a sentence. `progress` is called with the number of an image's
    tiles done and of all; see `write_image` for `quality`.
    """
    group: list[tuple[Path, Path, StoredImage]] = []

    def finish() -> None:
        done, group[:] = list(group), []
        try:
            made = upscaler.many([image.pixels for _, _, image in done], progress)
        except UserError as error:
            made = [error] * len(done)
        for (source, target, image), pixels in zip(done, made, strict=True):
            try:
                if isinstance(pixels, UserError):
                    raise pixels
                lossless = format_of(target) == "webp" and is_lossless_webp(source)
                kept = {"icc": image.icc, "exif": image.exif}
                write_image(target, pixels, **kept, quality=quality, lossless=lossless)
                sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (image.pixels, pixels)]
                tell("written", source, f"{target} ({' to '.join(sizes)})")
            except UserError as error:
                tell("bad", source, str(error))

    for job in jobs:
        there = (job.target, job.instead or job.target)
        if skip_existing and not job.fault and any(map(os.path.isfile, there)):
            tell("skipped", job.source, "")
            continue
        try:
            image, target, notices = _read(job, upscaler.scale)
        except (UserError, MemoryError) as error:
            tell("bad", job.source, str(error) or "is larger than the memory")
            continue
        for each in notices:
            tell("notice", job.source, each)
        kind = (image.pixels.shape, image.pixels.dtype)
        if group and kind != (group[0][2].pixels.shape, group[0][2].pixels.dtype):
            finish()
        group.append((job.source, target, image))
        # What goes in tiles has enough of them to be computed together.
        in_tiles = upscaler.choose_tile(*kind[0][:2], len(group) + 1)
        if len(group) >= upscaler.batch or in_tiles:
            finish()
    if group:
        finish()
