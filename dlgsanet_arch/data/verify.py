"""Every image of data sets decoded, and compared with the others: `dlgsanet data verify`.

Beyond what `check` finds before a run it asks whether each image can be read, whether LR is the
bicubic of HR, and whether images occur twice, or in a training set and a test set at once. Images
are read by processes of their own, as a damaged LMDB may crash its reader.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePath
from statistics import median
from typing import NamedTuple

from dlgsanet_arch.data.benchmarks import known_name
from dlgsanet_arch.data.databases import DATA, DatabaseWriter, encode_png, is_finished
from dlgsanet_arch.data.finding import SUFFIXES, image_key
from dlgsanet_arch.data.images import ImageError, decode_8_bits
from dlgsanet_arch.data.listing import Checked, PairSet, Side, list_images, size_faults
from dlgsanet_arch.data.similarity import (
    Thumbnail,
    TrainingImages,
    corner_thumbnails,
    pixel_digest,
    psnr_to_bicubic,
    thumbnail,
)
from dlgsanet_arch.data.sub_images import ImageArray
from dlgsanet_arch.data.workers import with_progress
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import OLD, UNFINISHED, disk_faults_named, one_writer
from dlgsanet_arch.progress import progress_bar

MOST_LISTED = 50
# Folders of images to test on, and of none to train on.
TESTING = ("benchmark", "test", "val", "valid", "validation")
# PSNR of LR to the bicubic of HR, in dB: Pillow's bicubic, which differs in rounding, had 54 or
# more on 35 photographs at x2, x3 and x4, other kernels 47 or less, LR of other images 15 or less.
BICUBIC = 50
UNRELATED = 15


def _holdings(path: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield every LMDB and every folder with images in it, at and below a path, once."""
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    if (path / DATA).exists():
        yield path
        return
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    if any(entry.is_file() and entry.suffix.lower() in SUFFIXES for entry in entries):
        yield path
    for entry in entries:
        if entry.is_dir() and entry.suffix not in (UNFINISHED, OLD):
            yield from _holdings(entry, seen)


def _hr_for(lr: Path) -> tuple[Path, int | None] | None:
    """Where HR of an LR lies by the names of the data tree, and the scale they say."""
    named = re.fullmatch(r"(.*)LR(?:_[A-Za-z]+)?_X(\d)(.*)", lr.name)
    if named:
        return lr.with_name(f"{named[1]}HR{named[3]}"), int(named[2])
    named = re.fullmatch(r"LR(.*)", lr.name)
    if named:
        scale = re.fullmatch(r"[Xx](\d)", lr.parent.name)
        return lr.with_name(f"HR{named[1]}"), int(scale[1]) if scale else None
    return None


def _role(path: Path) -> str:
    """Whether a folder is one to test on, by the names on the way to it."""
    tests = any(part.casefold() in TESTING or known_name(part) for part in path.parts)
    return "test" if tests else "train"


def sets_of_paths(paths: Sequence[Path]) -> list[PairSet]:
    """The data sets below folders, HR and LR put together by the names of the data tree.

    Raises:
        UserError: The folder does not exist or is empty.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            reason = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {reason}: name LMDBs, folders of images, or of data sets")
        before = len(seen)
        below = list(_holdings(path, seen))
        if not below and len(seen) > before:
            raise UserError(f"there are no LMDBs or images below {path}")
        found += below
    pairs, paired = [], set()
    for path in found:
        partner = _hr_for(path)
        # LR in a database is of no use alone; a folder may be called LR for other reasons
        if partner and (partner[0] in found or (path / DATA).exists()):
            hr, scale = partner
            pairs.append(PairSet(str(path), hr, path, scale, template=None, role=_role(hr)))
            paired |= {hr, path}
    alone = [PairSet(str(path), path, None, role=_role(path)) for path in found]
    return pairs + [each for each in alone if each.hr not in paired]


class Found(NamedTuple):
    """Findings about a sample.

    Args:
        faults: Why it cannot be used, as clauses that begin with HR or LR.
        scale: HR side over LR side; None where there is one side.
        digest: Of the pixels of HR, of LR in a set without HR.
        psnr: Of LR to the bicubic of HR, in dB.
        thumbnail: Of HR.
        corners: As `corner_thumbnails` returns them, of HR images of a test set.
    """

    faults: Sequence[str]
    scale: int | None = None
    digest: str | None = None
    psnr: float | None = None
    thumbnail: Thumbnail | None = None
    corners: Mapping[tuple[int, int], Thumbnail] = {}


@dataclass
class Verified(Checked):
    """Findings of both modes, and about each sample by its first name."""

    found: dict[str, Found] = field(default_factory=dict)


def _decode(side: Side, name: str, faults: list[str]) -> ImageArray | None:
    what = side.part.upper()
    try:
        return decode_8_bits(side.read(name), side.path / name, least=1).pixels
    except ImageError as error:
        faults.append(f"{what} {error.reason}")
    except MemoryError:
        faults.append(f"{what} takes more memory than there is")
    return None


def examine(
    names: Sequence[str],
    each: PairSet,
    sides: Sequence[Side],
    sizes: frozenset[tuple[int, int]],
) -> Found:
    """Decode a sample, by its name on each side, and check it; `sizes` as for `verify_set`."""
    faults: list[str] = []
    images = [_decode(side, name, faults) for side, name in zip(sides, names, strict=True)]
    if faults:
        return Found(faults)
    digest = pixel_digest(images[0])
    if each.hr is None:
        return Found(faults, digest=digest)
    hr, *rest = images
    scale, psnr, lr = None, None, rest[0] if rest else None
    if lr is not None:
        scale = each.scale or max(1, round(hr.shape[0] / lr.shape[0]))
    faults = [*size_faults(each, scale, hr.shape, None if lr is None else lr.shape).values()]
    if lr is not None and not faults:
        covered = hr[: lr.shape[0] * scale, : lr.shape[1] * scale]
        psnr = psnr_to_bicubic(lr, covered, scale)
    corners = corner_thumbnails(hr, sizes) if each.role == "test" else {}
    return Found(faults, scale, digest, psnr, thumbnail(hr), corners)


def _judge_lr(verified: Verified) -> None:
    """Judge a set by its median, and single pairs where they differ from that."""
    psnrs = {name: one.psnr for name, one in verified.found.items() if one.psnr is not None}
    if not psnrs:
        return
    middle = median(psnrs.values())
    if middle >= BICUBIC:
        verified.notes.append("LR is MATLAB's bicubic of HR")
    else:
        verified.add(
            "lr",
            f"LR is not the bicubic of HR: PSNR {middle:.1f} dB, the median of the images; it is "
            "shifted, or made by another kernel. Make LR from HR again, as `train --hr` does",
        )
    least = BICUBIC if middle >= BICUBIC else UNRELATED
    for name, psnr in psnrs.items():
        if psnr < least:
            text = f"LR is not the bicubic of its HR image: PSNR {psnr:.1f} dB"
            verified.bad.setdefault(name, []).append(text)


def _judge_duplicates(verified: Verified) -> None:
    first: dict[str, str] = {}
    for name, one in verified.found.items():
        if one.digest is not None and first.setdefault(one.digest, name) != name:
            text = f"has the same pixels as {first[one.digest]}"
            verified.bad.setdefault(name, []).append(text)


def verify_set(each: PairSet, workers: int, sizes: frozenset[tuple[int, int]]) -> Verified:
    """Check every image of a set; `sizes` are those of the training images to compare with."""
    verified = Verified(**vars(list_images(each, complete=True)))
    if not verified.pairs:
        return verified
    look = partial(examine, each=each, sides=verified.sides, sizes=sizes)
    isolated = any(side.is_database for side in verified.sides)
    samples = with_progress(look, verified.pairs, workers, each.name, isolated=isolated)
    try:
        verified.found = {name: one for (name, *_), one in samples}
    except UserError as error:
        places = " and ".join(str(side.path) for side in verified.sides)
        verified.add(verified.sides[0].part, f"{places} cannot be read: {error}")
        verified.pairs = []
    verified.scale = next((one.scale for one in verified.found.values() if one.scale), None)
    for name, one in verified.found.items():
        if one.faults:
            verified.bad[name] = [*one.faults]
        elif one.scale != verified.scale:
            text = f"HR is {one.scale} times as large as LR, others {verified.scale}"
            verified.bad[name] = [text]
    _judge_lr(verified)
    _judge_duplicates(verified)
    return verified


def _find_in_training(
    training: Mapping[Path, tuple[Verified, TrainingImages]], tested: Verified, reported: set
) -> None:
    """Search the training sets for the HR images of a test set; what is found is bad there."""
    for path, (trained, images) in training.items():
        for name, one in tested.found.items() if path != tested.set.hr else ():
            for copy in images.find(one.corners):
                if (path, copy, name) not in reported:  # test sets of several scales hold the same
                    reported.add((path, copy, name))
                    text = f"shows the same as the test image {tested.sides[0].path / name}"
                    trained.bad.setdefault(copy, []).append(text)


def verify(sets: Sequence[PairSet], workers: int) -> list[Verified]:
    """Check every image of some sets, and the sets against each other."""
    verified: dict[PairSet, Verified] = {}
    training: dict[Path, tuple[Verified, TrainingImages]] = {}
    reported: set[tuple[Path, str, str]] = set()
    for each in sorted(sets, key=lambda each: each.role == "test"):
        sizes = frozenset[tuple[int, int]]().union(*(found.sizes for _, found in training.values()))
        one = verified[each] = verify_set(each, workers, sizes)
        small = {name: found.thumbnail for name, found in one.found.items() if found.thumbnail}
        if each.role == "test":
            _find_in_training(training, one, reported)
        elif small:  # HR of several scales is one database
            training[each.hr] = one, TrainingImages(small)
    return [verified[each] for each in sets]


def _report_on(each: Verified) -> Iterator[str]:
    what = "pairs" if each.set.hr and each.set.lr else "images"
    scale = f" at scale {each.scale}" if each.scale else ""
    state = "good" if each.is_good else "NOT GOOD"
    yield f"{each.set.name}: {len(each.pairs)} {what}{scale}: {state}"
    yield from (f"  {note}" for note in each.notes)
    yield from (f"  wrong: {fault.text}" for fault in each.faults)
    bad = [
        f"  wrong: {each.sides[0].path / name}: {reason}"
        for name, reasons in each.bad.items()
        for reason in reasons
    ]
    yield from bad[:MOST_LISTED]
    if len(bad) > MOST_LISTED:
        yield f"  and {len(bad) - MOST_LISTED} lines more of this kind"
    if each.bad:
        yield (
            f"  {len(each.bad)} of {len(each.pairs)} {what} are bad: fix them, or leave them out "
            "by --fix"
        )


def report(verified: Sequence[Verified]) -> str:
    """What was found, for the terminal: each set, what is wrong with it and what to do."""
    good = sum(each.is_good for each in verified)
    lines = [line for each in verified for line in _report_on(each)]
    return "\n".join([*lines, f"{good} of {len(verified)} data sets are good"])


def _write_fixed(side: Side, names: Mapping[str, str]) -> Path:
    """Write the good images of one side; they have their names there, by their new keys."""
    path = side.path.with_name(f"{side.path.name.removesuffix('.lmdb')}_fixed.lmdb")
    digest = sha256("\n".join(f"{key} {name}" for key, name in names.items()).encode())
    recipe = {"fixed": str(side.path.resolve()), "images": digest.hexdigest()}
    with one_writer(path.parent), disk_faults_named(f"{path} cannot be written"):
        if is_finished(path, recipe, overwrite=True):
            return path
        with (
            DatabaseWriter(path, recipe) as writer,
            progress_bar(f"writing {path.name}", len(names), "images") as bar,
        ):
            for key, name in names.items():
                data = side.read(name)
                if not data.startswith(b"\x89PNG"):
                    data = encode_png(decode_8_bits(data, side.path / name, least=1).pixels)
                writer.put([(key, data)])
                bar.update()
            writer.finish()
    return path


def fix(verified: Sequence[Verified]) -> list[Path]:
    """Write new databases of the good images of the sets that have bad ones.

    Sets that share HR, as the scales of a training set do, lose the same images. The old ones
    stay as they are. What concerns a set as a whole, such as LR by another kernel, is not fixed.

    Args:
        verified: As `verify` returns them.

    Returns:
        The new databases, `NAME_fixed.lmdb` beside each old one.

    Raises:
        UserError: None of a set's images is good, or a database cannot be written.
    """
    by_hr: dict[Path, list[Verified]] = defaultdict(list)
    for each in verified:
        if each.sides:
            by_hr[each.sides[0].path].append(each)
    written = []
    for path, sets in by_hr.items():
        if not any(each.bad or each.fixable for each in sets):
            continue
        bad = {name for each in sets for name in each.bad}
        paired = [{pair[0]: pair for pair in each.pairs} for each in sets]
        good = [name for name in paired[0] if all(name in each for each in paired)]
        good = [name for name in good if name not in bad]
        if not good:
            raise UserError(f"{path}: no image is good, there is nothing to write")
        is_database = sets[0].sides[0].is_database
        keys = {name: name if is_database else image_key(PurePath(name)) for name in good}
        written.append(_write_fixed(sets[0].sides[0], {keys[name]: name for name in good}))
        for each, pairs in zip(sets, paired, strict=True):
            if len(each.sides) == 2:
                names = {keys[name]: pairs[name][1] for name in good}
                written.append(_write_fixed(each.sides[1], names))
    return written
