"""Files and folders of images: which are enlarged into what, decoded, written; bad ones named."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dlgsanet_arch.data.finding import SUFFIXES
from dlgsanet_arch.data.images import Pixels, StoredImage, read_stored
from dlgsanet_arch.errors import UserError
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

# The suffixes that are read, and those of images that are counted where they are left out.
READ = frozenset(SUFFIXES).union(*FORMATS.values())
NOT_READ = frozenset(
    f".{name}"
    for name in (
        *(
            "heic",
            "heif",
            "avif",
            "jxl",
            "jp2",
            "j2k",
            "gif",
            "tga",
            "ico",
            "qoi",
            "svg",
            "psd",
            "xcf",
        ),
        *(
            "exr",
            "hdr",
            "ppm",
            "pgm",
            "pnm",
            "dng",
            "cr2",
            "cr3",
            "nef",
            "arw",
            "orf",
            "raf",
            "rw2",
        ),
    )
)


@dataclass(frozen=True)
class Job:
    """An image to be enlarged.

    Args:
        source: Its file.
        target: What is to be written.
        instead: What is written where the target's format cannot hold the image; None for nothing.
        fault: Why it cannot be done, where that is known before it is read.
    """

    source: Path
    target: Path
    instead: Path | None = None
    fault: str = ""


# Which images, into which files


def _walk(folder: Path, out: str | None) -> tuple[list[Path], list[Job], Counter[str]]:
    """Find the images below a folder, each folder read once, outside of the folder of results.

    Returns:
        The images, sorted; folders that cannot be read, as jobs; and how many files there are with
        each suffix of `NOT_READ`.
    """
    found, left, errors = [], Counter(), []
    pending, seen = [folder], set()
    for top in pending:  # grows: links come last, what is reachable without one is named so
        for current, folders, names in os.walk(top, onerror=errors.append):
            real = os.path.realpath(current)
            if real in seen or (out and f"{real}/".startswith(f"{out}/")):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            links = (Path(current, name) for name in folders)
            pending += [path for path in links if path.is_symlink()]
            for name in names:
                path, suffix = Path(current, name), os.path.splitext(name)[1].lower()
                is_link = os.path.islink(path)  # a link to nothing is named when it is read
                if name.startswith(".") or not (os.path.isfile(path) or is_link):
                    continue
                if suffix in READ:
                    found.append(path)
                left[suffix] += suffix in NOT_READ
    faults = [
        Job(Path(each.filename), Path(), fault=f"cannot be read: {each.strerror}")
        for each in errors
    ]
    return sorted(found), faults, +left


def _job(source: Path, folder: Path, suffix: str, format: str | None) -> Job:
    kept = format_of(source)
    ending = source.suffix if kept and format in (None, kept) else FORMATS[format or "png"][0]
    target = folder / f"{source.stem}{suffix}{ending}"
    return Job(source, target, target.with_suffix(".png") if format is None else None)


def _without_results(jobs: Sequence[Job], suffix: str) -> list[Job]:
    """Leave out images that are the results of others, from a run before."""
    results = set()
    for job in jobs:
        folder = os.path.realpath(job.target.parent)
        names = {job.target.name, job.instead.name if job.instead else job.target.name}
        if suffix:  # of another --format as well
            names |= {job.target.stem + each for each in READ}
        results |= {os.path.join(folder, name) for name in names} - {os.path.realpath(job.source)}
    return [job for job in jobs if os.path.realpath(job.source) not in results]


def _with_faults(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield jobs, with a fault where two have one result or a result is an image."""
    count = Counter(job.target for job in jobs)
    sources = {os.path.realpath(job.source) for job in jobs}
    for job in jobs:
        if job.instead in count or (job.instead and os.path.realpath(job.instead) in sources):
            job = replace(job, instead=None)
        if os.path.realpath(job.target) == os.path.realpath(job.source):
            fault = "would be replaced by its result: name another folder, or a --suffix"
            yield replace(job, fault=fault)
        elif count[job.target] > 1:
            others = [each.source.name for each in jobs if each.target == job.target]
            fault = f"would share the result {job.target} with others ({', '.join(others)}): "
            yield replace(job, fault=fault + "rename one of them")
        else:
            yield job


def plan(
    source: Path, out: Path, *, suffix: str = "", format: str | None = None
) -> tuple[list[Job], Counter[str]]:
    """Say which images are enlarged into which files.

    Args:
        source: An image, or a folder, of which all images below are taken, but for results.
        out: A folder, whose tree becomes that of `source`; or for one image a file, if it ends
            in the suffix of a format and is not a folder.
        suffix: Put behind the names, before their endings.
        format: A key of `FORMATS`. None keeps each image's own, and takes PNG where this is not
            written or cannot hold the depth, transparency or size.

    Returns:
        The images, those that cannot be done with a fault; and the number of files left out by
        their suffix, as they are images that are not read.

    Raises:
        UserError: The image or folder is missing, or holds no images; or `out` cannot be meant.
    """
    if any(each in suffix for each in (os.sep, os.altsep, "\0") if each):
        raise UserError(f"--suffix {suffix!r} is part of a name: it cannot lead to another folder")
    left: Counter[str] = Counter()
    faults: list[Job] = []
    if os.path.isdir(source):
        real = os.path.realpath(out)
        found, faults, left = _walk(source, None if real == os.path.realpath(source) else real)
        jobs = [_job(path, out / path.parent.relative_to(source), suffix, format) for path in found]
        jobs = _without_results(jobs, suffix)
        if not jobs and not faults:
            raise UserError(
                f"no images below {source}: looked for {', '.join(sorted(READ))}{_more(left)}"
            )
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


def _more(left: Counter[str]) -> str:
    return f"; there are files that are not read: {listed(left)}" if left else ""


def listed(left: Counter[str]) -> str:
    """Return files by their suffixes: "2 .heic, 1 .gif"."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(left.items()))


def _target(job: Job, image: StoredImage, scale: float) -> tuple[Path, str]:
    """Decide on the file of a result before it is computed, and make its folder.

    Returns:
        The file, and why it is not the one of the plan.

    Raises:
        WriteError: It cannot hold the image, or cannot be written.
    """
    height, width, channels = image.pixels.shape
    shape = (round(height * scale), round(width * scale), channels)
    target = job.target
    reason = why_not(format_of(target), shape, image.pixels.dtype)
    if reason and not job.instead:
        raise WriteError(f"{target} cannot be written: {reason}; use a name that ends in .png")
    if reason:
        target = job.instead
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise WriteError(f"{target} cannot be written: it is a folder")
        with suppress(FileNotFoundError):
            target.stat()  # fails on a name that is too long
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise WriteError(f"{target} cannot be written: {error.strerror or error}") from error
    return target, f"{reason}: {target.name} is written" if reason else ""


class Run:
    """Enlarges images one after another; those of one size together, as many as its batch.

    Args:
        upscaler: What enlarges them.
        tell: Called with what happened to an image, its path and a text: "written" with the
            result, "skipped" as its result is there, "bad" with its fault; once for each image.
            Before, any number of times: "notice" with a sentence.
        progress: Called with an image's path, and the number of its tiles done and of all.
        skip_existing: Whether images whose results are there are skipped.
        quality: Of JPEG and WebP, 1 to 100.
    """

    def __init__(
        self,
        upscaler: Upscaler,
        tell: Callable[[str, Path, str], None],
        progress: Callable[[Path, int, int], None],
        *,
        skip_existing: bool = False,
        quality: int = QUALITY,
    ) -> None:
        self._upscaler = upscaler
        self._tell = tell
        self._progress = progress
        self._skips = skip_existing
        self._quality = quality

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Enlarge the images of what `plan` returned."""
        group: list[tuple[Job, Path, StoredImage]] = []
        for job in jobs:
            there = (job.target, job.instead or job.target)
            if self._skips and not job.fault and any(map(os.path.isfile, there)):
                self._tell("skipped", job.source, "")
                continue
            read = self._read(job)
            if read is None:
                continue
            pixels, others = read[2].pixels, group[0][2].pixels if group else read[2].pixels
            if pixels.shape != others.shape or pixels.dtype != others.dtype:
                self._finish(group)
                group = []
            group.append(read)
            # What goes in tiles has enough of them to be computed together.
            in_tiles = self._upscaler.choose_tile(*pixels.shape[:2], len(group) + 1)
            if len(group) >= self._upscaler.batch or in_tiles:
                self._finish(group)
                group = []
        self._finish(group)

    def _read(self, job: Job) -> tuple[Job, Path, StoredImage] | None:
        """Decode an image and decide on its result; None where that fails."""
        try:
            if job.fault:
                raise UserError(job.fault)
            image = read_stored(job.source)
            target, notice = _target(job, image, self._upscaler.scale)
        except (UserError, MemoryError) as error:
            self._tell("bad", job.source, str(error) or "is larger than the memory")
            return None
        deep_tiff = image.pixels.dtype == np.uint16 and format_of(target) == "tiff"
        left_out = "has EXIF data, which 16-bit TIFF files go without"
        for each in (*image.notices, notice, left_out if image.exif and deep_tiff else ""):
            if each:
                self._tell("notice", job.source, each)
        return job, target, image

    def _finish(self, group: Sequence[tuple[Job, Path, StoredImage]]) -> None:
        """Enlarge images of one shape and depth together, and write them."""
        if not group:
            return
        last = group[-1][0].source
        try:
            made = self._upscaler.many(
                [image.pixels for _, _, image in group],
                lambda done, total: self._progress(last, done, total),
            )
        except UserError as error:
            for job, _, _ in group:
                self._tell("bad", job.source, str(error))
            return
        for (job, target, image), pixels in zip(group, made, strict=True):
            try:
                self._write(job.source, target, image, pixels)
            except UserError as error:
                self._tell("bad", job.source, str(error))

    def _write(self, source: Path, target: Path, image: StoredImage, pixels: Pixels) -> None:
        lossless = format_of(target) == "webp" and is_lossless_webp(source)
        kept = {"icc": image.icc, "exif": image.exif}
        write_image(target, pixels, **kept, quality=self._quality, lossless=lossless)
        before, after = (f"{each.shape[1]}x{each.shape[0]}" for each in (image.pixels, pixels))
        self._tell("written", source, f"{target} ({before} to {after})")
