"""Which images a data set has: folders, lists and LMDBs read, HR and LR paired.

`check` continues with headers, before a run; `verify` decodes every image.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from dlgsanet_arch.data.databases import DATA, check_keys, is_database, open_entry
from dlgsanet_arch.data.finding import SUFFIXES, check_folder, sharing
from dlgsanet_arch.data.images import MAX_BYTES, ImageError, read_bytes
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import quoted, shown

FIX = "a new one by `dlgsanet data verify --fix`"
READ_BY_OPENCV = {*SUFFIXES, ".pgm", ".ppm"}
Result = TypeVar("Result")
HEAD = 2**20  # bytes of an LMDB's entry that hold its header


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

    @property
    def paths(self) -> dict[str, Path]:
        """Where the images are by part, "hr" and "lr"."""
        return {part: path for part, path in (("hr", self.hr), ("lr", self.lr)) if path}


# What is wrong: with "hr", "lr", "list", "template" or LR's "kernel", and a sentence.
Fault = tuple[str, str]


def open_image(path: Path, name: str) -> BinaryIO:
    """Open an image of a folder, or as much of an LMDB's entry as holds its header."""
    if not is_database(path):
        return (path / name).open("rb")
    with open_entry(path, name) as value:
        return BytesIO(value[:HEAD])


def read_image(path: Path, name: str) -> bytes:
    """Read an image's file in a folder, or an LMDB's entry, empty if there is none."""
    if not is_database(path):
        return read_bytes(path / name)
    with open_entry(path, name) as value:
        if len(value) > min(MAX_BYTES, (path / DATA).stat().st_size):
            raise ImageError(path / name, f"claims {len(value):,} bytes: it is damaged")
        return bytes(value)


@dataclass
class Checked:
    """Findings about a set."""

    set: PairSet
    pairs: list[tuple[str, ...]] = field(default_factory=list)  # a sample's name in each path
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
        return "pairs" if len(self.set.paths) == 2 else "images"

    def add(self, part: str, text: str) -> None:
        """Note a fault."""
        self.faults.append((part, text))


def _asked(ask: Callable[[], bool], otherwise: bool) -> bool:
    try:
        return ask()
    except OSError:  # a link that leads around in circles
        return otherwise


def _folder_images(checked: Checked, part: str, path: Path) -> list[str]:
    """The images among a folder's files, all of which BasicSR reads."""
    with os.scandir(path) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    if inner := [each.name for each in entries if _asked(each.is_dir, False)]:
        checked.notes.append(f"BasicSR passes over folders in {path}: {quoted(inner)}")
    files = [each.name for each in entries if _asked(each.is_file, True)]
    images = [name for name in files if Path(name).suffix.lower() in READ_BY_OPENCV]
    if others := sorted({*files}.difference(images)):
        text = f"{path} holds files that are not images, and BasicSR fails when it reads them: "
        checked.add(part, f"{text}{quoted(others)}; move them away")
    return images


def _names(checked: Checked, part: str, path: Path) -> list[str]:
    """The images that BasicSR finds in a folder or an LMDB."""
    check_folder(path, "correct the path, or make the data set (`dlgsanet data --help`)")
    if is_database(path):
        names, faults = check_keys(path)
        for fault in faults:
            checked.add(part, f"{path} {fault}; make it again, or {FIX}")
    else:
        names = _folder_images(checked, part, path)
    if not names and not checked.faults:
        raise UserError(f"{path} holds no images: looked for {', '.join(SUFFIXES)}")
    return names


# Pairs


def _partner(name: str, template: str) -> str:
    """LR's file name for HR's as BasicSR makes it."""
    base, suffix = os.path.splitext(os.path.basename(name))
    return f"{template.format(base)}{suffix}"


def _pair_by_list(checked: Checked) -> None:
    """Pair images as a list of file names states it."""
    each = checked.set
    lines = each.listing.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if blank := len(lines) - len(names):
        checked.add("list", f"{each.listing} has {blank} blank lines, each an image; remove them")
    if not names:
        checked.add("list", f"{each.listing} lists no images; fill the list")
    for line in names:
        pair = tuple(line.split(", "))
        if not each.lists_pairs:
            name = line.split(" ")[0]
            pair = (name, _partner(name, each.template))[: len(each.paths)]
        elif len(pair) != 2:
            checked.add(
                "list", f"{each.listing}: write `HR, LR` in each line; {shown(line)} is not"
            )
            break
        checked.pairs.append(pair)
    for index, (part, path) in enumerate(each.paths.items()):
        gone = [pair[index] for pair in checked.pairs if not (path / pair[index]).is_file()]
        if gone:
            text = f"{len(gone)} of {len(checked.pairs)} listed images are not in {path}: "
            checked.add(part, f"{text}{quoted(gone)}; correct the list, or filename_tmpl")


def _pair_by_name(checked: Checked, hr: Sequence[str], lr: Sequence[str]) -> None:
    """Pair HR with LR; images without a partner are faults."""
    each, there, in_lmdb = checked.set, set(lr), is_database(checked.set.hr)
    template = each.template
    if template is None:  # HR's names, or those with the scale, as in ``0001x4``
        template = f"{{}}x{each.scale}"
        if not any(_partner(name, template) in there for name in hr):
            template = "{}"
    # in LMDBs both have one key
    partners = {name: name if in_lmdb else _partner(name, template) for name in hr}
    checked.pairs = [(name, partner) for name, partner in partners.items() if partner in there]
    if in_lmdb and checked.faults:  # which say what is wrong with the keys
        return
    without = [name for name, partner in partners.items() if partner not in there]
    spare = sorted(there.difference(partners.values()))
    how = "" if in_lmdb else f", with filename_tmpl {template!r}"
    for names, all_names, has, lacks in (
        (without, hr, each.hr, each.lr),
        (spare, lr, each.lr, each.hr),
    ):
        if names:
            text = f"{len(names)} of {len(all_names)} images in {has} have no partner in {lacks}"
            text += f"{how}: {quoted(names)}; rename or make them, or make {FIX}"
            checked.add("lr", text)


def list_images(each: PairSet) -> Checked:
    """Find the images of a set and pair them; faults are those of names and counts."""
    checked, names = Checked(each), []
    try:
        _partner("a", each.template or "{}")
    except (LookupError, ValueError):
        fix = "write '{}', or such as '{}x4'"
        checked.add("template", f"filename_tmpl {each.template!r} is not a template: {fix}")
        return checked
    for part, path in each.paths.items() if each.listing is None else ():
        try:
            names.append(_names(checked, part, path))
        except OSError as error:
            where = error.filename or path
            checked.add(part, f"{where} cannot be read: {error.strerror or error}")
        except UserError as error:
            checked.add(part, str(error))
    if each.listing:
        _pair_by_list(checked)
    elif len(names) == 2:
        _pair_by_name(checked, *names)
    elif len(names) == len(each.paths):
        checked.pairs = [(name,) for name in names[0]]
    # the results of a test have names without the suffix
    equal = sharing({name: os.path.splitext(name)[0] for name, *_ in checked.pairs})
    if equal and each.role == "test":
        part, path = next(iter(each.paths.items()))
        text = f"images in {path} differ in their suffixes only: {equal}"
        checked.add(part, f"{text}; rename or remove one of each")
    return checked


def read_sample(
    each: PairSet, names: Sequence[str], read: Callable[[Path, str], Result]
) -> tuple[dict[str, Result], dict[str, str]]:
    """What `read` returns for a sample's images by part, and faults of those it cannot read."""
    found, faults = {}, {}
    for (part, path), name in zip(each.paths.items(), names, strict=True):
        try:
            found[part] = read(path, name)
        except ImageError as error:
            faults[part] = f"{part.upper()} {error.reason}"
        except OSError as error:
            faults[part] = f"{part.upper()} cannot be opened: {error.strerror}"
        except MemoryError:
            faults[part] = f"{part.upper()} takes more memory than there is"
    return found, faults


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
