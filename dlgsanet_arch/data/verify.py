"""Whether data sets are what BasicSR and the user take them for.

Every image is decoded. Of pairs it is asked whether sizes and names fit and whether LR is the
bicubic of HR; of sets, whether images occur twice, or in a training set and a test set at once.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePath
from statistics import median
from typing import Any, NamedTuple

from dlgsanet_arch.data.benchmarks import known_name
from dlgsanet_arch.data.databases import DATA, DatabaseWriter, encode_png, is_finished
from dlgsanet_arch.data.images import SUFFIXES, ImageError, decode_8_bits, image_key
from dlgsanet_arch.data.progress import progress_bar
from dlgsanet_arch.data.similarity import (
    Thumbnail,
    TrainingImages,
    pixel_digest,
    psnr_to_bicubic,
    thumbnail,
)
from dlgsanet_arch.data.stored import Reader, Stored, look_into
from dlgsanet_arch.data.sub_images import ImageArray
from dlgsanet_arch.data.workers import ordered
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import OLD, UNFINISHED, disk_faults_named, one_writer
from dlgsanet_arch.hints import named

MOST_LISTED = 50
# Folders of images to test on, and of none to train on.
TESTING = ("benchmark", "test", "val", "valid", "validation")
# PSNR of LR to the bicubic of HR, in dB: Pillow's bicubic, which differs in rounding, had 54 or
# more on 35 photographs at x2, x3 and x4, other kernels 47 or less, LR of other images 15 or less.
BICUBIC = 50
UNRELATED = 15


@dataclass(frozen=True)
class PairSet:
    """HR and LR images of one data set, or one of the two.

    Args:
        name: What to call it.
        hr: HR images.
        lr: LR images.
        scale: HR side over LR side; None where it is to be found out.
        template: LR's name for HR's, as in BasicSR's `filename_tmpl`; None where it is to be
            found out.
        gt_size: Side of the HR patches that are cut from it; None where none are.
        role: "train" or "test", "" where that is not known.
    """

    name: str
    hr: Path | None
    lr: Path | None
    scale: int | None = None
    template: str | None = "{}"
    gt_size: int | None = None
    role: str = ""

    def __post_init__(self) -> None:
        if self.hr is None and self.lr is None:
            raise ValueError("a set has neither HR nor LR")


def _dataset(phase: str, options: Mapping[str, Any], scale: int | None, root: Path) -> PairSet:
    def folder(key: str) -> Path | None:
        return None if options.get(key) is None else root / str(options[key])

    hr, lr = folder("dataroot_gt"), folder("dataroot_lq")
    if hr is None and lr is None:
        raise UserError(f"datasets:{phase} names neither dataroot_gt nor dataroot_lq")
    training = phase.split("_")[0] == "train"
    return PairSet(
        name=f"{phase} ({options.get('name', 'unnamed')})",
        hr=hr,
        lr=lr,
        scale=scale,
        template=str(options.get("filename_tmpl", "{}")),
        gt_size=options.get("gt_size") if training else None,
        role="train" if training else "test",
    )


def sets_of_options(options: Mapping[str, Any], root: Path) -> list[PairSet]:
    """The data sets that an option file names.

    Args:
        options: As `dlgsanet_arch.options.load` returns them.
        root: The folder that relative paths start from.

    Raises:
        UserError: It names none.
    """
    sets = options.get("datasets")
    if not isinstance(sets, dict) or not sets:
        raise UserError("the option file names no data sets: it has no `datasets`")
    return [_dataset(phase, each, options.get("scale"), root) for phase, each in sets.items()]


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
        UserError: There is no such folder, or nothing in it.
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


class Pair(NamedTuple):
    """One image's files, undecoded; None where the set has no such side."""

    key: str
    hr: bytes | None
    lr: bytes | None


@dataclass(frozen=True)
class Looks:
    """What every pair of a set is asked.

    Args:
        scale: HR side over LR side; None where there is one side only.
        gt_size: The least side of HR in pixels.
    """

    scale: int | None
    gt_size: int


@dataclass(frozen=True)
class Found:
    """What was found out about a pair.

    Args:
        key: Its name.
        faults: Why it cannot be used, as clauses that begin with HR or LR.
        digest: Of the pixels of HR, of LR in a set without HR; None where they are unreadable.
        psnr: Of LR to the bicubic of HR, in dB; None where there is one side only.
        thumbnail: Of HR; None in a set without.
    """

    key: str
    faults: tuple[str, ...]
    digest: str | None = None
    psnr: float | None = None
    thumbnail: Thumbnail | None = None


def _decode(side: str, data: bytes | None, faults: list[str]) -> ImageArray | None:
    if data is None:
        return None
    try:
        return decode_8_bits(data, Path(side), least=1).pixels
    except ImageError as error:
        faults.append(f"{side} {error.reason}")
        return None


def examine(pair: Pair, looks: Looks) -> Found:
    """Decode a pair and look at it."""
    faults: list[str] = []
    hr, lr = _decode("HR", pair.hr, faults), _decode("LR", pair.lr, faults)
    first = lr if hr is None else hr
    if faults or first is None:
        return Found(pair.key, tuple(faults))
    digest = pixel_digest(first)
    if hr is not None and min(hr.shape[:2]) < looks.gt_size:
        height, width = hr.shape[:2]
        faults.append(f"HR has {height} x {width} pixels, less than gt_size {looks.gt_size}")
    psnr = None
    if hr is not None and lr is not None:
        scale = looks.scale
        wanted = tuple(side * scale for side in lr.shape[:2])
        if hr.shape[:2] != wanted:
            faults.append(
                f"HR has {hr.shape[0]} x {hr.shape[1]} pixels, and LR's {lr.shape[0]} x "
                f"{lr.shape[1]} times {scale} are {wanted[0]} x {wanted[1]}"
            )
        else:
            psnr = psnr_to_bicubic(lr, hr, scale)
    small = None if hr is None else thumbnail(hr)
    return Found(pair.key, tuple(faults), digest, psnr, small)


@dataclass
class Verified:
    """What was found out about a set.

    Args:
        set: The set.
        scale: HR side over LR side, None where there is one side.
        sides: What holds its images: HR, LR, or both.
        partners: LR's names by HR's, of the images that have both where there are both.
        faults: What is wrong with the set as a whole, a line each.
        bad: Why images cannot be used, by HR's key.
        notes: What a user should know without it being wrong.
        digests: Keys by the digest of their pixels.
        thumbnails: Of HR, by key.
        fixable: Whether writing it anew fixes some of the faults.
    """

    set: PairSet
    scale: int | None
    sides: list[Stored]
    partners: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    digests: dict[str, list[str]] = field(default_factory=dict)
    thumbnails: dict[str, Thumbnail] = field(default_factory=dict)
    fixable: bool = False

    @property
    def is_good(self) -> bool:
        """Whether nothing was found to be wrong."""
        return not (self.faults or self.bad)


def _template(hr: Sequence[str], lr: Collection[str], scale: int | None) -> str:
    """LR's name for HR's where nobody says it: the same, or with the scale, as in ``0001x4``."""
    with_scale = f"{{}}x{scale}"
    return with_scale if any(with_scale.format(key) in lr for key in hr) else "{}"


def _partners(verified: Verified) -> dict[str, str]:
    """LR's name for each of HR's that has a partner; what has none is a fault."""
    hr, lr = verified.sides
    there = set(lr.keys)
    template = verified.set.template
    if template is None:
        template = _template(hr.keys, there, verified.set.scale)
    elif hr.is_database:
        template = "{}"  # in an LMDB both have one key
    wanted = {key: template.format(key) for key in hr.keys}
    without = [key for key, name in wanted.items() if name not in there]
    unwanted = sorted(there - set(wanted.values()))
    for names, has, lacks in ((without, hr, lr), (unwanted, lr, hr)):
        if names:
            verified.fixable = True
            verified.faults.append(
                f"{len(names)} of {len(has.keys)} images in {has.path} have no partner in "
                f"{lacks.path}: {named(names)}; rename or make them, or drop them by --fix"
            )
    return {key: name for key, name in wanted.items() if name in there}


def _infer_scale(hr: Reader, lr: Reader, partners: Mapping[str, str]) -> int | None:
    """HR side over LR side, of the first pair that says it."""
    for key, name in partners.items():
        try:
            large = decode_8_bits(hr(key), Path("HR"), least=1).pixels
            small = decode_8_bits(lr(name), Path("LR"), least=1).pixels
        except ImageError:
            continue
        return max(1, round(large.shape[0] / small.shape[0]))
    return None


def _judge_lr(verified: Verified, psnrs: Mapping[str, float]) -> None:
    """Judge a set by its median, and single pairs where they differ from that."""
    if not psnrs:
        return
    middle = median(psnrs.values())
    if middle >= BICUBIC:
        verified.notes.append("LR is MATLAB's bicubic of HR")
    else:
        verified.faults.append(
            f"LR is not the bicubic of HR: PSNR {middle:.1f} dB, the median of the images; it is "
            "shifted, or made by another kernel. Make LR from HR again, by `train --hr` for example"
        )
    least = BICUBIC if middle >= BICUBIC else UNRELATED
    for key, psnr in psnrs.items():
        if psnr < least:
            verified.bad.setdefault(key, []).append(
                f"LR is not the bicubic of its HR image: PSNR {psnr:.1f} dB"
            )


def _judge_duplicates(verified: Verified) -> None:
    for first, *others in verified.digests.values():
        for key in others:
            verified.bad.setdefault(key, []).append(f"has the same pixels as {first}")


def _look_into(each: PairSet) -> Verified:
    """Open the sides of a set; with one that cannot be opened, nothing more is checked."""
    verified = Verified(each, None, [])
    for path in (each.hr, each.lr):
        if path is not None:
            try:
                verified.sides.append(look_into(path))
            except UserError as error:
                verified.faults.append(str(error))
    if verified.faults:
        verified.sides = []
    for side in verified.sides:
        verified.fixable |= bool(side.faults)
        verified.faults += [f"{side.path} {fault}" for fault in side.faults]
    return verified


def _pairs(readers: Sequence[Reader], partners: Mapping[str, str], has_hr: bool) -> Iterator[Pair]:
    for key, name in partners.items():
        if len(readers) == 2:
            yield Pair(key, readers[0](key), readers[1](name))
        elif has_hr:
            yield Pair(key, readers[0](key), None)
        else:
            yield Pair(key, None, readers[0](key))


def verify_set(each: PairSet, workers: int) -> Verified:
    """Look at every image of a set.

    Args:
        each: The set.
        workers: Processes that decode and compare.
    """
    verified = _look_into(each)
    if not verified.sides:
        return verified
    with ExitStack() as stack:
        readers = [stack.enter_context(side.reader()) for side in verified.sides]
        if len(readers) == 2:
            verified.partners = _partners(verified)
            verified.scale = each.scale or _infer_scale(*readers, verified.partners)
        else:
            verified.partners = {key: key for key in verified.sides[0].keys}
        looks = Looks(verified.scale, each.gt_size or 1)
        pairs = _pairs(readers, verified.partners, each.hr is not None)
        count = len(verified.partners)
        found = ordered(partial(examine, looks=looks), pairs, min(workers, count // 20))
        psnrs = {}
        with progress_bar(each.name, count, "images") as bar, closing(found):
            for one in found:
                bar.update()
                if one.faults:
                    verified.bad[one.key] = list(one.faults)
                if one.digest is not None:
                    verified.digests.setdefault(one.digest, []).append(one.key)
                if one.psnr is not None:
                    psnrs[one.key] = one.psnr
                if one.thumbnail is not None:
                    verified.thumbnails[one.key] = one.thumbnail
    _judge_lr(verified, psnrs)
    _judge_duplicates(verified)
    return verified


def _find_in_training(training: Sequence[Verified], testing: Sequence[Verified]) -> None:
    """Look for the test sets' HR images in the training sets; what is found is bad there."""
    for trained in training:
        images = TrainingImages(trained.thumbnails)
        told = set()  # test sets of several scales hold the same images
        for tested in testing:
            if not tested.sides or tested.set.hr is None or tested.set.hr == trained.set.hr:
                continue
            hr = tested.sides[0]
            what = f"{hr.path} in {trained.sides[0].path}"
            with hr.reader() as read, progress_bar(what, len(hr.keys), "images") as bar:
                for key in hr.keys:
                    bar.update()
                    try:
                        image = decode_8_bits(read(key), hr.place(key), least=1).pixels
                    except ImageError:
                        continue  # named already
                    for name in images.find(image):
                        if (name, key) not in told:
                            told.add((name, key))
                            trained.bad.setdefault(name, []).append(
                                f"shows the same as the test image {hr.place(key)}"
                            )


def verify(sets: Sequence[PairSet], workers: int) -> list[Verified]:
    """Look at every image of some sets, and at the sets beside each other.

    Args:
        sets: The sets; what is missing or empty is a fault of its set.
        workers: Processes that decode and compare.
    """
    result = [verify_set(each, workers) for each in sets]
    # HR of several scales is one database
    training = {
        each.set.hr: each for each in result if each.set.role == "train" and each.thumbnails
    }
    testing = {each.set.hr: each for each in result if each.set.role == "test"}
    _find_in_training(list(training.values()), list(testing.values()))
    return result


def _report_on(each: Verified) -> Iterator[str]:
    what = "pairs" if each.set.hr and each.set.lr else "images"
    scale = f" at scale {each.scale}" if each.scale else ""
    state = "good" if each.is_good else "NOT GOOD"
    yield f"{each.set.name}: {len(each.partners)} {what}{scale}: {state}"
    yield from (f"  {note}" for note in each.notes)
    yield from (f"  wrong: {fault}" for fault in each.faults)
    bad = [
        f"  wrong: {each.sides[0].place(key)}: {reason}"
        for key, reasons in each.bad.items()
        for reason in reasons
    ]
    yield from bad[:MOST_LISTED]
    if len(bad) > MOST_LISTED:
        yield f"  and {len(bad) - MOST_LISTED} lines more of this kind"
    if each.bad:
        yield (
            f"  {len(each.bad)} of {len(each.partners)} {what} are bad: fix them, or leave them "
            "out by --fix"
        )


def report(verified: Sequence[Verified]) -> str:
    """What was found, for the terminal: each set, what is wrong with it and what to do."""
    good = sum(each.is_good for each in verified)
    lines = [line for each in verified for line in _report_on(each)]
    return "\n".join([*lines, f"{good} of {len(verified)} data sets are good"])


def _fixed_path(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.lmdb')}_fixed.lmdb")


def _write_fixed(side: Stored, names: Mapping[str, str]) -> Path:
    """Write the images of one side that are good.

    Args:
        side: HR or LR.
        names: Their names there, by their keys in the new database.
    """
    path = _fixed_path(side.path)
    digest = sha256("\n".join(f"{key} {name}" for key, name in names.items()).encode())
    recipe = {"fixed": str(side.path.resolve()), "images": digest.hexdigest()}
    with (
        one_writer(path.parent),
        disk_faults_named(f"{path} cannot be written"),
        side.reader() as read,
    ):
        if is_finished(path, recipe, overwrite=True):
            return path
        with DatabaseWriter(path, recipe) as writer:
            with progress_bar(f"writing {path.name}", len(names), "images") as bar:
                for key, name in names.items():
                    data = read(name)
                    if not side.is_database:
                        data = encode_png(decode_8_bits(data, side.place(name), least=1).pixels)
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
        bad = {key for each in sets for key in each.bad}
        good = [key for key in sets[0].partners if all(key in each.partners for each in sets)]
        good = [key for key in good if key not in bad]
        if not good:
            raise UserError(f"{path}: no image is good, there is nothing to write")
        keys = {key: image_key(PurePath(f"{key}.png")) for key in good}
        if sets[0].sides[0].is_database:
            keys = {key: key for key in good}
        written.append(_write_fixed(sets[0].sides[0], {keys[key]: key for key in good}))
        for each in sets:
            if len(each.sides) == 2:
                names = {keys[key]: each.partners[key] for key in good}
                written.append(_write_fixed(each.sides[1], names))
    return written
