"""Every image of data sets decoded, and compared with the others: `dlgsanet data verify`.

Beyond what `check` finds before a run it asks whether each image can be read, whether LR is the
bicubic of HR, and whether images occur twice, or in a training set and a test set at once. Images
are read by processes of their own, as a damaged LMDB may crash its reader.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dlgsanet_arch.data.databases import (
    DATA,
    DatabaseWriter,
    is_database,
    is_finished,
    open_entry,
)
from dlgsanet_arch.data.discovery import known_name
from dlgsanet_arch.data.finding import SUFFIXES, check_folder, walk_folders
from dlgsanet_arch.data.images import decode_8_bits
from dlgsanet_arch.data.listing import (
    Checked,
    PairSet,
    list_images,
    read_image,
    read_sample,
    size_faults,
)
from dlgsanet_arch.data.making import ImageArray, encode_png
from dlgsanet_arch.data.similarity import (
    WHOLE,
    Levels,
    Size,
    by_size,
    corner_thumbnails,
    find_copies,
    pixel_digest,
    psnr_to_bicubic,
)
from dlgsanet_arch.data.workers import ordered, with_progress
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import OLD, UNFINISHED, disk_faults_named, one_writer

MOST_LISTED = 50
# Folders of images to test on.
TESTING = ("benchmark", "test", "val", "valid", "validation")
# PSNR of LR to the bicubic of HR, in dB: Pillow's bicubic, which differs in rounding, had 54 or
# more on 35 photographs at x2, x3 and x4, other kernels 47 or less, LR of other images 15 or less.
BICUBIC = 50
UNRELATED = 15


def _holdings(path: Path) -> Iterator[Path]:
    """Yield every LMDB and every folder with images in it, at and below a path."""
    for current, folders, files in walk_folders(path):
        if DATA in files:
            folders.clear()
        if DATA in files or any(Path(name).suffix.lower() in SUFFIXES for name in files):
            yield current
        folders[:] = [each for each in folders if not each.endswith((UNFINISHED, OLD))]


def _hr_for(lr: Path) -> tuple[Path, int | None] | None:
    """Where HR of an LR lies by the names of the data tree, and the scale that they state."""
    named = re.fullmatch(r"(.*)LR(?:_[A-Za-z]+)?_X(\d)(.*)", lr.name)
    if named:
        return lr.with_name(f"{named[1]}HR{named[3]}"), int(named[2])
    if lr.name.startswith("LR"):
        scale = re.fullmatch(r"[Xx](\d)", lr.parent.name)
        return lr.with_name(f"HR{lr.name[2:]}"), int(scale[1]) if scale else None
    return None


def _role(path: Path) -> str:
    """Whether a folder is one to test on, by the names on the way to it."""
    tests = any(part.casefold() in TESTING or known_name(part) for part in path.parts)
    return "test" if tests else "train"


def sets_of_paths(paths: Sequence[Path]) -> list[PairSet]:
    """The data sets below folders, HR and LR put together by the names of the data tree."""
    by_place: dict[Path, Path] = {}
    for path in paths:
        check_folder(path, "name LMDBs, folders of images, or of data sets")
        below = list(_holdings(path))
        if not below:
            raise UserError(f"no LMDBs or images below {path}: name a folder that holds some")
        for each in below:
            by_place.setdefault(each.resolve(), each)
    found = [*by_place.values()]
    pairs, paired = [], set()
    for path in found:
        partner = _hr_for(path)
        # LR in a database is of no use alone; a folder may be called LR for other reasons
        if partner and (partner[0] in found or is_database(path)):
            hr, scale = partner
            pairs.append(PairSet(str(path), hr, path, scale, template=None, role=_role(hr)))
            paired |= {hr, path}
    return pairs + [PairSet(str(p), p, None, role=_role(p)) for p in found if p not in paired]


class Sample(NamedTuple):
    """Findings about a sample."""

    faults: Sequence[str]  # why it cannot be used, clauses that begin with HR or LR
    scale: int | None = None  # HR side over LR side, if there are two sides
    digest: str | None = None  # of the pixels of the first side
    psnr: float | None = None  # of LR to the bicubic of HR, in dB
    size: Size = WHOLE  # of HR
    corners: Mapping[Size, Levels] = {}  # of HR, see `corner_thumbnails`
    stored: int = 0  # bytes of its entries in LMDBs


def _pixels(path: Path, name: str) -> ImageArray:
    return decode_8_bits(read_image(path, name), path / name, least=1).pixels


def _examine(names: Sequence[str], each: PairSet, sizes: Sequence[Size]) -> Sample:
    """Decode a sample, by its name on each side, and check it; `sizes` as for `_verify_set`."""
    images, faults = read_sample(each, names, _pixels)
    if faults:
        return Sample([*faults.values()])
    hr, lr, scale, psnr = images.get("hr"), images.get("lr"), None, None
    if hr is None:
        return Sample([], digest=pixel_digest(lr))
    if lr is not None:
        scale = each.scale or max(1, round(hr.shape[0] / lr.shape[0]))
    faults = size_faults(each, scale, hr.shape, None if lr is None else lr.shape)
    if lr is not None and not faults:
        psnr = psnr_to_bicubic(lr, hr[: lr.shape[0] * scale, : lr.shape[1] * scale], scale)
    corners = corner_thumbnails(hr, sizes if each.role == "test" else ())
    return Sample([*faults.values()], scale, pixel_digest(hr), psnr, hr.shape[:2], corners)


def _judge(checked: Checked, samples: Mapping[str, Sample]) -> None:
    """Note what is wrong with samples, each by itself and among the others."""
    checked.scale = next((one.scale for one in samples.values() if one.scale), None)
    psnrs = [one.psnr for one in samples.values() if one.psnr is not None]
    middle = median(psnrs) if psnrs else 0
    if middle >= BICUBIC:
        checked.notes.append("LR is MATLAB's bicubic of HR")
    elif psnrs:
        checked.add(
            "kernel",
            f"LR is not the bicubic of HR: PSNR {middle:.1f} dB, the median of the images; it is "
            "shifted, or made by another kernel. Make LR from HR again, as `train --hr` does",
        )
    least = BICUBIC if middle >= BICUBIC else UNRELATED
    first: dict[str, str] = {}
    for name, one in samples.items():
        faults = [*one.faults]
        if not faults and one.scale != checked.scale:
            faults.append(f"HR is {one.scale} times as large as LR, others {checked.scale}")
        if one.psnr is not None and one.psnr < least:
            faults.append(f"LR is not the bicubic of its HR image: PSNR {one.psnr:.1f} dB")
        if one.digest is not None and first.setdefault(one.digest, name) != name:
            faults.append(f"has the same pixels as {first[one.digest]}")
        if faults:
            checked.bad[name] = faults


def _stored(path: Path, name: str) -> int:
    """Return how many bytes an LMDB's entry claims, 0 for an image of a folder."""
    if not is_database(path):
        return 0
    with open_entry(path, name) as value:
        return len(value)


def _examine_counted(names: Sequence[str], each: PairSet, sizes: Sequence[Size]) -> Sample:
    stored = sum(map(_stored, each.paths.values(), names))
    return _examine(names, each, sizes)._replace(stored=stored)


def _verify_set(
    each: PairSet, workers: int, sizes: Sequence[Size]
) -> tuple[Checked, dict[str, Sample]]:
    """Check every image of a set; `sizes` are those of the training images to compare with."""
    isolated = any(map(is_database, each.paths.values()))
    samples: dict[str, Sample] = {}
    try:
        [checked] = ordered(list_images, [each], 1, isolated=isolated)
        examine = partial(_examine_counted, each=each, sizes=sizes)
        found = with_progress(examine, checked.pairs, workers, each.name, isolated=isolated)
        databases = [path / DATA for path in each.paths.values() if is_database(path)]
        left = sum(path.stat().st_size for path in databases)
        with closing(found):
            for (name, *_), one in found:
                samples[name], left = one, left - one.stored
                if left < 0:
                    raise UserError("its entries claim more bytes than it has: it is damaged")
    except UserError as error:
        checked, samples = Checked(each), {}
        paths = " and ".join(map(str, each.paths.values()))
        checked.add(next(iter(each.paths)), f"{paths} cannot be read: {error}")
    if samples:
        _judge(checked, samples)
    return checked, samples


def _image_of(name: str) -> str:
    """The image that a sub-image is of: ``0001_s002`` is the second of 0001."""
    return re.sub(r"_s\d+$", "", name)


def verify(sets: Sequence[PairSet], workers: int) -> list[Checked]:
    """Check every image of some sets, and the sets against each other."""
    checked: dict[PairSet, Checked] = {}
    training: dict[Path, tuple[Checked, Mapping]] = {}
    reported: set[tuple[str, str]] = set()  # test sets of several scales hold the same
    for each in sorted(sets, key=lambda each: each.role == "test"):
        sizes = sorted({size for _, small in training.values() for size in small})
        checked[each], samples = _verify_set(each, workers, sizes)
        if each.role == "train":  # HR of several scales is one database
            small = {name: (s.size, s.corners[WHOLE]) for name, s in samples.items() if s.corners}
            training[each.hr] = checked[each], by_size(small)
            continue
        for path, (trained, small) in training.items():
            for name, sample in samples.items() if path != each.hr else ():
                copies = {_image_of(copy) for copy in find_copies(small, sample.corners)}
                for copy, *_ in trained.pairs if copies else ():
                    if _image_of(copy) in copies and (copy, name) not in reported:
                        reported.add((copy, name))
                        text = f"shows the same as the test image {each.hr / name}"
                        trained.bad[copy].append(text)
    return [checked[each] for each in sets]


def report(verified: Sequence[Checked]) -> str:
    """What was found, for the terminal: each set, what is wrong with it and what to do."""
    lines = []
    for each in verified:
        scale = f" at scale {each.scale}" if each.scale else ""
        state = "good" if each.is_good else "NOT GOOD"
        lines += [f"{each.set.name}: {len(each.pairs)} {each.what}{scale}: {state}"]
        lines += [f"  {note}" for note in each.notes]
        lines += [f"  wrong: {text}" for _, text in each.faults]
        bad = [
            f"  wrong: {(each.set.hr or each.set.lr) / name}: {reason}"
            for name, reasons in each.bad.items()
            for reason in reasons
        ]
        lines += bad[:MOST_LISTED]
        if len(bad) > MOST_LISTED:
            lines.append(f"  and {len(bad) - MOST_LISTED} lines more of this kind")
        if each.bad:
            count = f"{len(each.bad)} of {len(each.pairs)}"
            lines.append(f"  {count} {each.what} are bad: fix or remove them")
    good = sum(each.is_good for each in verified)
    return "\n".join([*lines, f"{good} of {len(verified)} data sets are good"])


def _copy(path: Path, keys: Sequence[str]) -> Path:
    """Write an LMDB of some entries of another one."""
    fixed = path.with_name(f"{path.name.removesuffix('.lmdb')}_fixed.lmdb")
    digest = sha256("\n".join(keys).encode()).hexdigest()
    recipe = {"fixed": str(path.resolve()), "images": digest}
    with disk_faults_named(f"{fixed} cannot be written"), one_writer(path.parent):
        if not is_finished(fixed, recipe, True):
            with closing(DatabaseWriter(fixed, recipe)) as writer:
                for key in keys:
                    data = read_image(path, key)
                    is_png = data.startswith(b"\x89PNG")
                    writer.put([(key, data if is_png else encode_png(_pixels(path, key)))])
                writer.finish()
    return fixed


def fix(verified: Sequence[Checked]) -> list[Path]:
    """Copy the good images of LMDBs that have bad ones to `NAME_fixed.lmdb`, and name the copies.

    Sets that share HR, as the scales of a training set do, lose the same images. LR by another
    kernel is not fixed. UserError if none of a set's images is good.
    """
    by_first: dict[Path, list[Checked]] = defaultdict(list)
    for each in verified:
        paths = [*each.set.paths.values()]
        if each.pairs and all(map(is_database, paths)):
            by_first[paths[0]].append(each)
    written = []
    for first, sets in by_first.items():
        parts = {part for each in sets for part, _ in each.faults}
        if parts <= {"kernel"} and not any(each.bad for each in sets):
            continue
        keys = ({key for key, *_ in each.pairs} - each.bad.keys() for each in sets)
        good = sorted(set.intersection(*keys))
        if not good:
            raise UserError(f"{first}: all images are bad, so a new set would be empty")
        paths = dict.fromkeys(path for each in sets for path in each.set.paths.values())
        written += [_copy(path, good) for path in paths]
    return written
