"""Which images a data set has: folders, lists and LMDBs read, HR and LR paired.

`check` continues with headers, before a run; `verify` decodes every image.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dlgsanet_arch.data.databases import (
    DATA,
    META_INFO,
    entry_keys,
    find_entry,
    list_faults,
    listed_keys,
    open_database,
)
from dlgsanet_arch.data.finding import SUFFIXES
from dlgsanet_arch.data.images import MAX_BYTES, ImageError, read_bytes
from dlgsanet_arch.data.workers import ordered
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named, quoted

FIX = "a new one by `dlgsanet data verify --fix`"
READ_BY_OPENCV = {*SUFFIXES, ".pgm", ".ppm"}


@dataclass(frozen=True)
class PairSet:
    """HR and LR images of one data set, or one of the two, in folders or LMDBs."""

    name: str
    hr: Path | None
    lr: Path | None
    scale: int | None = None  # HR side over LR side; None if it is to be detected
    template: str | None = "{}"  # BasicSR's `filename_tmpl`; None if it is to be detected
    least: int | None = None  # the smallest side of HR that is of use, in pixels
    why: str = "gt_size"  # what `least` follows from
    role: str = "train"  # or "test"
    listing: Path | None = None  # a list of images, None if all are meant
    lists_pairs: bool = False  # whether it is of pairs


class Fault(NamedTuple):
    """What is wrong, and with what: "hr", "lr", "list", "template" or LR's "kernel"."""

    part: str
    text: str


@dataclass(frozen=True)
class Side:
    """HR or LR images: "hr" or "lr", where they are, and what BasicSR calls them, sorted."""

    part: str
    path: Path
    is_database: bool
    names: Sequence[str] = ()

    def read(self, name: str) -> bytes:
        """Read an image's file, empty if an LMDB has no such entry.

        Raises:
            ImageError: It cannot be read, or is larger than any image.
        """
        if not self.is_database:
            return read_bytes(self.path / name)
        with open_database(self.path) as environment, environment.begin(buffers=True) as read:
            value = find_entry(read, name) or b""
            if len(value) > min(MAX_BYTES, (self.path / DATA).stat().st_size):
                raise ImageError(self.path / name, f"claims {len(value):,} bytes: it is damaged")
            return bytes(value)


@dataclass
class Checked:
    """Findings about a set."""

    set: PairSet
    sides: list[Side] = field(default_factory=list)  # HR, LR, or both; empty if one has no names
    pairs: list[tuple[str, ...]] = field(default_factory=list)  # names of samples on each side
    faults: list[Fault] = field(default_factory=list)  # of the set as a whole
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by first name
    warnings: list[Fault] = field(default_factory=list)  # what BasicSR changes silently
    notes: list[str] = field(default_factory=list)
    scale: int | None = None  # HR side over LR side, if there are two sides
    smallest: tuple[int, int] | None = None  # height and width, of the HR images checked

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.faults or self.bad)

    @property
    def what(self) -> str:
        """What its samples are."""
        return "pairs" if self.set.hr and self.set.lr else "images"

    def add(self, part: str, text: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(part, text))


def _stored_keys(path: Path, isolated: bool) -> list[str]:
    """The keys of an LMDB; `isolated` reads them in another process, as damage may crash it."""
    if not isolated:
        return entry_keys(path)
    try:
        [keys] = ordered(entry_keys, [path], 1, isolated=True)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path} cannot be read: {error}") from error
    return keys


def _open_database(checked: Checked, part: str, path: Path, isolated: bool) -> Side:
    entries = _stored_keys(path, isolated)
    try:
        keys = listed_keys(path)
        faults = [*list_faults(keys, set(entries))]
    except OSError:
        keys, faults = entries, [f"has no {META_INFO}, by which BasicSR knows the keys"]
    for fault in faults:
        checked.add(part, f"{path} {fault}; make it again, or {FIX}")
    return Side(part, path, True, sorted(set(entries).intersection(keys)))


def _open_folder(checked: Checked, part: str, path: Path) -> Side:
    """Take a folder's files, as BasicSR does."""
    with os.scandir(path) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    inner = [each.name for each in entries if each.is_dir()]
    files = [each.name for each in entries if each.is_file()]
    images = [name for name in files if Path(name).suffix.lower() in READ_BY_OPENCV]
    if inner:
        checked.notes.append(f"BasicSR passes over folders in {path}: {quoted(inner)}")
    if len(images) < len(files):
        others = quoted(sorted({*files}.difference(images)))
        checked.add(
            part,
            f"{path} holds files that are not images, and BasicSR fails when it reads them: "
            f"{others}; move them away",
        )
    return Side(part, path, False, images)


def _open_side(checked: Checked, part: str, path: Path, isolated: bool) -> None:
    if checked.set.listing:
        checked.sides.append(Side(part, path, is_database=False))
        return
    try:
        if not path.is_dir():
            reason = "is not a folder" if path.exists() else "does not exist"
            raise UserError(
                f"{path} {reason}: correct the path, or make the data set (`dlgsanet data --help`)"
            )
        if (path / DATA).exists():
            side = _open_database(checked, part, path, isolated)
        else:
            side = _open_folder(checked, part, path)
        if not side.names and not checked.faults:
            raise UserError(f"{path} holds no images: looked for {', '.join(SUFFIXES)}")
        checked.sides.append(side)
    except OSError as error:
        checked.add(part, f"{path} cannot be read: {error.strerror or error}")
    except UserError as error:
        checked.add(part, str(error))


def open_set(each: PairSet, *, isolated: bool) -> Checked:
    """List the images of a set; `isolated` reads LMDBs in processes of their own."""
    checked = Checked(each)
    paths = {part: path for part, path in (("hr", each.hr), ("lr", each.lr)) if path is not None}
    for part, path in paths.items():
        _open_side(checked, part, path, isolated)
    if len(checked.sides) < len(paths):
        checked.sides = []
    return checked


# Pairs


def _partner(name: str, template: str) -> str:
    """LR's file name for HR's as BasicSR makes it."""
    base, suffix = os.path.splitext(os.path.basename(name))
    return f"{template.format(base)}{suffix}"


def _listed_pairs(checked: Checked) -> Iterator[tuple[str, ...]]:
    """Pairs as a list of file names states them."""
    each = checked.set
    lines = each.listing.read_text(encoding="utf-8", errors="replace").splitlines()
    blank = sum(not line.strip() for line in lines)
    if blank:
        checked.add("list", f"{each.listing} has {blank} blank lines, each an image; remove them")
    for line in (line.strip() for line in lines if line.strip()):
        name = line.split(" ")[0]
        if each.lists_pairs:
            pair = tuple(line.split(", "))
            if len(pair) != 2:
                checked.add("list", f"{each.listing}: write `HR, LR` in each line; {line!r} is not")
                return
            yield pair
        else:
            yield (name, _partner(name, each.template))[: len(checked.sides)]


def _pair_by_list(checked: Checked) -> None:
    checked.pairs = list(_listed_pairs(checked))
    for index, side in enumerate(checked.sides):
        gone = [pair[index] for pair in checked.pairs if not (side.path / pair[index]).is_file()]
        if gone:
            checked.add(
                side.part,
                f"{len(gone)} of {len(checked.pairs)} listed images are not in {side.path}: "
                f"{quoted(gone)}; correct the list, or filename_tmpl",
            )
    if not checked.pairs and not checked.faults:
        checked.add("list", f"{checked.set.listing} lists no images; fill the list")


def _pair_by_name(checked: Checked) -> None:
    """Pair HR with LR; images without a partner are faults."""
    hr, lr = checked.sides
    there, template = set(lr.names), checked.set.template
    if template is None:  # HR's names, or those with the scale, as in ``0001x4``
        template = f"{{}}x{checked.set.scale}"
        if not any(_partner(name, template) in there for name in hr.names):
            template = "{}"
    # in LMDBs both have one key
    partners = {name: name if hr.is_database else _partner(name, template) for name in hr.names}
    without = [name for name, partner in partners.items() if partner not in there]
    spare = sorted(there.difference(partners.values()))
    for names, has, lacks in ((without, hr, lr), (spare, lr, hr)):
        if names:
            how = "" if hr.is_database else f", with filename_tmpl {template!r}"
            checked.add(
                "lr",
                f"{len(names)} of {len(has.names)} images in {has.path} have no partner in "
                f"{lacks.path}{how}: {quoted(names)}; rename or make them, or make {FIX}",
            )
    checked.pairs = [(name, partner) for name, partner in partners.items() if partner in there]


def pair_up(checked: Checked) -> None:
    """Find the samples of a set whose sides are open."""
    template = checked.set.template
    try:
        _partner("a", template or "{}")
    except (LookupError, ValueError):
        fix = "write '{}', or such as '{}x4'"
        checked.add("template", f"filename_tmpl {template!r} is not a template: {fix}")
        return
    if not checked.sides:
        return
    if checked.set.listing:
        _pair_by_list(checked)
    elif len(checked.sides) == 2:
        _pair_by_name(checked)
    else:
        checked.pairs = [(name,) for name in checked.sides[0].names]


def check_stems(checked: Checked) -> None:
    """Find images that differ in their suffix only: the results of a test have names without it."""
    by_stem = defaultdict(list)
    for name, *_ in checked.pairs:
        by_stem[os.path.splitext(name)[0]].append(name)
    equal = [" and ".join(map(repr, names)) for names in by_stem.values() if len(names) > 1]
    if equal:
        side = checked.sides[0]
        text = f"images in {side.path} have one name but for the suffix: {named(equal, 3)}"
        checked.add(side.part, f"{text}; rename or remove one of each")


def size_faults(
    each: PairSet, scale: int | None, hr: Sequence[int], lr: Sequence[int] | None
) -> dict[str, str]:
    """What is wrong with the sizes of a sample, by its part; sizes begin with height and width."""
    faults, (height, width, *_) = {}, hr
    if each.least and min(height, width) < each.least:
        text = f"{each.least} x {each.least} pixels, {each.why}"
        faults["hr"] = f"HR has {height} x {width} pixels, smaller than {text}"
    if lr is None or scale is None:
        return faults
    wanted = [side * scale for side in lr[:2]]
    rest = scale - 1 if each.role == "test" else 0  # which BasicSR cuts off when it tests
    if not all(0 <= a - b <= rest for a, b in zip((height, width), wanted, strict=True)):
        faults["lr"] = (
            f"HR has {height} x {width} pixels, and LR's {lr[0]} x {lr[1]} times {scale} are "
            f"{wanted[0]} x {wanted[1]}"
        )
    return faults
