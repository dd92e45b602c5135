"""Which images a data set has: folders, lists and LMDBs read, HR and LR paired, faults named.

`check` continues with headers, before a run; `verify` decodes every image.
"""

import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
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
from dlgsanet_arch.data.headers import Header, read_header
from dlgsanet_arch.data.images import MAX_BYTES, ImageError, read_bytes
from dlgsanet_arch.data.workers import ordered
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named, quoted

MOST_HEADERS = 2000
REMEDY = "make it again, or a new one by `dlgsanet data verify --fix`"


@dataclass(frozen=True)
class PairSet:
    """HR and LR images of one data set, or one of the two, in folders or LMDBs.

    Args:
        name: What to call it.
        hr: Where HR is.
        lr: Where LR is.
        scale: HR side over LR side; None where it is to be detected.
        template: BasicSR's `filename_tmpl`; None where it is to be detected.
        least: The smallest side of HR that is of use, in pixels.
        why: What `least` follows from.
        role: "train" or "test".
        listing: A list of images, None where all are meant; of pairs with `lists_pairs`.
    """

    name: str
    hr: Path | None
    lr: Path | None
    scale: int | None = None
    template: str | None = "{}"
    least: int | None = None
    why: str = "gt_size"
    role: str = "train"
    listing: Path | None = None
    lists_pairs: bool = False


class Fault(NamedTuple):
    """What is wrong, and with what: "hr", "lr", "list" or "template"."""

    part: str
    text: str


@dataclass(frozen=True)
class Side:
    """HR or LR images: "hr" or "lr", where they are, and what BasicSR calls them, sorted."""

    part: str
    path: Path
    is_database: bool
    names: Sequence[str] = ()

    def headers(self, names: Sequence[str]) -> dict[str, Header | None]:
        """Read headers, None where that fails."""
        if not self.is_database:
            return {name: _header(self.path / name) for name in names}
        with open_database(self.path) as environment, environment.begin(buffers=True) as read:
            return {name: _header(find_entry(read, name)) for name in names}

    def read(self, name: str) -> bytes:
        """Read an image's file, empty where an LMDB has no such entry.

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
    """Findings about a set.

    Args:
        set: The set.
        scale: HR side over LR side, None where there is one side.
        sides: HR, LR, or both; empty where one cannot be opened.
        pairs: The names of each sample, one for each side.
        faults: What is wrong with the set as a whole; whether writing it anew fixes some.
        bad: Why images cannot be used, by HR's name.
        warnings: What BasicSR changes in images without saying so.
        notes: What a user should know without it being wrong.
        smallest: Height and width of the smallest HR image that was checked.
    """

    set: PairSet
    scale: int | None = None
    sides: list[Side] = field(default_factory=list)
    pairs: list[tuple[str, ...]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    smallest: tuple[int, int] | None = None
    fixable: bool = False

    @property
    def is_good(self) -> bool:
        """Whether nothing was found to be wrong."""
        return not (self.faults or self.bad)

    def add(self, part: str, text: str, *, fixable: bool = False) -> None:
        """Note a fault."""
        self.faults.append(Fault(part, text))
        self.fixable |= fixable


def _header(source: Path | memoryview | None) -> Header | None:
    try:
        return read_header(source) if source else None
    except OSError:
        return None


def spread(names: Sequence) -> Sequence:
    """At most MOST_HEADERS of some names, evenly spread."""
    return names[:: math.ceil(len(names) / MOST_HEADERS) or 1]


# Listing what a set holds


def _all_keys(path: Path) -> list[str]:
    """The keys of an LMDB, read by a process of its own."""
    try:
        [keys] = ordered(entry_keys, [path], 1, isolated=True)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path} cannot be read: {error}") from error
    return keys


def _holds_as_many(path: Path, keys: Sequence[str]) -> bool:
    """Whether an LMDB has as many entries as its list, and those whose headers are read."""
    with open_database(path) as environment, environment.begin(buffers=True) as read:
        count = environment.stat()["entries"]
        fits = count == len(keys) == len(set(keys))
        return fits and all(find_entry(read, key) is not None for key in spread(sorted(keys)))


def _database(path: Path, complete: bool) -> tuple[list[str], list[str]]:
    """Names in an LMDB and faults; all keys are read to name what is wrong, or if `complete`."""
    try:
        keys = listed_keys(path)
    except OSError:
        return sorted(_all_keys(path)), [f"has no {META_INFO}, by which BasicSR knows the keys"]
    if not complete and _holds_as_many(path, keys):
        return sorted(keys), []
    entries = set(_all_keys(path))
    return sorted(entries.intersection(keys)), list(list_faults(keys, entries))


def _folder(path: Path, complete: bool) -> tuple[list[str], list[str]]:
    """Names in a folder as BasicSR finds them, and faults that it would meet or pass over."""
    with os.scandir(path) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    names = [entry.name for entry in visible if entry.is_file()]
    if not complete:
        return names, []
    faults = []
    others = [name for name in names if Path(name).suffix.lower() not in SUFFIXES]
    inner = [entry.name for entry in visible if entry.is_dir()]
    if others:
        faults.append(
            "holds files that are not images, and BasicSR fails when it reads them: "
            f"{quoted(others)}; move them away"
        )
    if inner:
        faults.append(
            f"has folders in it, which BasicSR passes over: {quoted(inner)}; `train --hr` takes "
            "images of all of them"
        )
    return [name for name in names if name not in set(others)], faults


def _add_side(checked: Checked, part: str, path: Path, complete: bool) -> None:
    if checked.set.listing:
        checked.sides.append(Side(part, path, is_database=False))
        return
    try:
        if not path.is_dir():
            reason = "is not a folder" if path.exists() else "does not exist"
            raise UserError(
                f"{path} {reason}: correct the path, or make the data set (`dlgsanet data --help`)"
            )
        is_database = (path / DATA).exists()
        names, faults = (_database if is_database else _folder)(path, complete)
        if not names and not faults:
            raise UserError(f"{path} holds no images: looked for {', '.join(SUFFIXES)}")
    except OSError as error:
        checked.add(part, f"{path} cannot be read: {error.strerror or error}")
    except UserError as error:
        checked.add(part, str(error))
    else:
        for fault in faults:
            remedy = f"; {REMEDY}" if is_database else ""
            checked.add(part, f"{path} {fault}{remedy}", fixable=True)
        checked.sides.append(Side(part, path, is_database, names))


# Pairs


def _partner(name: str, template: str) -> str:
    """LR's file name for HR's as BasicSR makes it."""
    base, suffix = os.path.splitext(os.path.basename(name))
    return f"{template.format(base)}{suffix}"


def _listed_pairs(checked: Checked) -> Iterator[tuple[str, ...]]:
    """Pairs as a list of file names states them; images that are not there are faults."""
    each = checked.set
    lines = each.listing.read_text(encoding="utf-8", errors="replace").splitlines()
    blank = sum(not line.strip() for line in lines)
    if blank:
        checked.add("list", f"{each.listing} has {blank} blank lines, each an image; remove them")
    for line in (line.strip() for line in lines if line.strip()):
        if each.lists_pairs:
            pair = tuple(line.split(", "))
            if len(pair) != 2:
                checked.add("list", f"{each.listing}: write `HR, LR` in each line; {line!r} is not")
                return
            yield pair
        elif len(checked.sides) == 2:
            name = line.split(" ")[0]
            yield name, _partner(name, each.template)
        else:
            yield (line.split(" ")[0],)


def _pairs_of_list(checked: Checked) -> None:
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


def _find_template(hr: Sequence[str], lr: Collection[str], scale: int | None) -> str:
    """LR's names where nobody states them: HR's, or with the scale, as in ``0001x4``."""
    with_scale = f"{{}}x{scale}"
    return with_scale if any(_partner(name, with_scale) in lr for name in hr) else "{}"


def _pairs_of_names(checked: Checked) -> None:
    """Pair HR with LR; images without a partner are faults."""
    hr, lr = checked.sides
    there = set(lr.names)
    template = checked.set.template
    if hr.is_database:  # in LMDBs both have one key
        wanted = {name: name for name in hr.names}
    else:
        if template is None:
            template = _find_template(hr.names, there, checked.set.scale)
        wanted = {name: _partner(name, template) for name in hr.names}
    without = [name for name, partner in wanted.items() if partner not in there]
    spare = sorted(there.difference(wanted.values()))
    for names, has, lacks in ((without, hr, lr), (spare, lr, hr)):
        if names:
            how = "" if hr.is_database else f", with filename_tmpl {template!r}"
            checked.add(
                "lr",
                f"{len(names)} of {len(has.names)} images in {has.path} have no partner in "
                f"{lacks.path}{how}: {quoted(names)}; rename or make them, or drop them by "
                "`dlgsanet data verify --fix`",
                fixable=True,
            )
    checked.pairs = [(name, partner) for name, partner in wanted.items() if partner in there]


def _pair_up(checked: Checked) -> None:
    template = checked.set.template
    try:
        _partner("a", template or "{}")
    except (LookupError, ValueError):
        fix = "write '{}', or such as '{}x4'"
        checked.add("template", f"filename_tmpl {template!r} is not a template: {fix}")
        return
    if checked.set.listing:
        _pairs_of_list(checked)
    elif len(checked.sides) == 2:
        _pairs_of_names(checked)
    else:
        checked.pairs = [(name,) for name in checked.sides[0].names]


def _one_name(checked: Checked) -> None:
    """Results are saved under an image's name without its suffix."""
    side = checked.sides[0]
    by_stem = defaultdict(list)
    for name in [] if side.is_database else (pair[0] for pair in checked.pairs):
        by_stem[os.path.splitext(name)[0]].append(name)
    equal = [" and ".join(map(repr, names)) for names in by_stem.values() if len(names) > 1]
    if equal:
        text = f"images in {side.path} have one name but for the suffix: {named(equal, 3)}"
        checked.add(side.part, f"{text}; rename or remove one of each")


def list_images(each: PairSet, *, complete: bool) -> Checked:
    """Open a set and pair its images; `complete` names all that BasicSR would pass over."""
    checked = Checked(each)
    for part, path in (("hr", each.hr), ("lr", each.lr)):
        if path is not None:
            _add_side(checked, part, path, complete)
    if len(checked.sides) < sum(path is not None for path in (each.hr, each.lr)):
        checked.sides = []
    elif complete or not checked.faults:
        _pair_up(checked)
        if complete or each.role == "test":
            _one_name(checked)
    return checked


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
