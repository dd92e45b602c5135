"""Every data set of an option file checked before a run begins, and the room for what it writes.

Names and counts are checked in full; sizes and colours by the headers of at most `MOST_HEADERS`
images of a set, evenly spread. An LMDB that has as many entries as its list, and holds those
images, passes: its keys are listed only to name what is wrong, as lmdb reads each from the disk.
BasicSR meets what is wrong here hours into a run, when it reads that sample, or says nothing: a
list that names fewer images than there are, HR that is cropped to fit LR, 16 bits read as 8.
"""

import io
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
from PIL import Image

from dlgsanet_arch._basicsr import shared_environments
from dlgsanet_arch.data.databases import META_INFO, open_database
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named
from dlgsanet_arch.options import Context, Registered
from dlgsanet_arch.options.context import is_number, is_whole
from dlgsanet_arch.options.paths import data_faults, owner
from dlgsanet_arch.options.schema import DatasetKeys, known_dataset
from dlgsanet_arch.pipeline import weights

MOST_HEADERS = 2000
_HEADS = (1 << 12, 1 << 16)  # bytes of an image that are tried before all of it
_REMEDY = "make it again, or a new one by `dlgsanet data verify --fix`"
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS = 258
_FFHQ_IMAGES = 70_000  # that BasicSR's FFHQDataset has in folders, whatever is there

_BYTES = 4  # of a value, in float32
_ADAM_STATES = 2  # values of an optimizer's state for each of the network's
_BYTES_A_TENSOR = 400  # of a file, beside the tensor's values
_FEWEST_PAIRS = 2  # there must be room for: the old one stays until the new one is complete
_GIGABYTE = 1e9


@dataclass
class Scan:
    """What was found out about the data sets.

    Args:
        problems: What is wrong, one a line: the option's path, what is wrong, the fix.
        warnings: What BasicSR changes in images without a word, one a line.
        notes: How much was checked, a line for each data set.
        samples: Number of samples by phase ("train", "val", …), of the sets that were listed.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)


class Header(NamedTuple):
    """What an image's header says.

    Args:
        height: Rows, as BasicSR reads it: turned by its EXIF orientation.
        width: Columns.
        gray: Whether it has one channel.
        alpha: Whether it has transparency.
        deep: Whether its samples have more than 8 bits.
    """

    height: int
    width: int
    gray: bool
    alpha: bool
    deep: bool


def read_header(source: Path | io.BytesIO) -> Header:
    """Read an image's header; no pixel is decoded.

    Raises:
        OSError: It cannot be opened, or is not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(source) as image:
            width, height = image.size
            deep = image.mode.startswith(("I", "F"))
            if image.format == "PNG":
                deep = any("16" in str(tile[3]) for tile in image.tile)
            elif image.format == "TIFF":
                bits = image.tag_v2.get(_TIFF_BITS, 1)
                deep = max(bits if isinstance(bits, tuple) else (bits,)) > 8
            # Pillow decodes a whole PNG to look for EXIF behind the pixels.
            if image.format == "JPEG" and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
                width, height = height, width
            return Header(
                height,
                width,
                gray=image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"),
                alpha=image.mode in ("LA", "PA", "RGBA", "La", "RGBa")
                or "transparency" in image.info,
                deep=deep,
            )


@dataclass(frozen=True)
class _Side:
    """HR or LR images of a data set.

    Args:
        option: The path of the option that names their place.
        place: The folder or LMDB.
        names: What BasicSR calls the images, sample by sample.
        header: Reads the header of one of those that are checked; raises OSError.
    """

    option: str
    place: Path
    names: Sequence[str]
    header: Callable[[str], Header]


def _spread(names: Sequence[str]) -> Sequence[str]:
    """Return at most MOST_HEADERS of some names, evenly spread."""
    step = math.ceil(len(names) / MOST_HEADERS) or 1
    return names[::step]


def _quoted(names: Sequence[str]) -> str:
    return named([repr(name) for name in names], 3)


@dataclass(frozen=True)
class _Database:
    """What was found in an LMDB.

    Args:
        keys: Its list's, as BasicSR reads them: in order, and as often as they are listed.
        faults: What is wrong, a phrase behind the database's name each.
        headers: By key, of those that are checked; an OSError where one cannot be read.
    """

    keys: list[str]
    faults: list[str]
    headers: dict[str, Header | OSError]


@contextmanager
def _environment(path: Path) -> Iterator[lmdb.Environment]:
    """Open an LMDB, or take the environment of data sets that hold it open: lmdb opens it once."""
    shared = shared_environments.get(os.path.realpath(path))
    try:
        with nullcontext(shared) if shared is not None else open_database(path) as environment:
            yield environment
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read: {error}; copy or make it anew") from error


def _value(read: lmdb.Transaction, key: str) -> memoryview | None:
    try:
        return read.get(key.encode())
    except lmdb.BadValsizeError:  # the key is empty, or too long for LMDB
        return None


def _list_faults(lines: Sequence[str], entries: Set[str], empty: Sequence[str]) -> Iterator[str]:
    """Compare the lines of a meta_info.txt with the keys of an LMDB.

    Args:
        lines: Of the list.
        entries: The keys that are there.
        empty: Keys whose entries have no content.
    """
    listed = Counter(line.split(".")[0] for line in lines if line.strip())
    blank = sum(not line.strip() for line in lines)
    if blank:
        yield f"has {blank} blank lines in {META_INFO}, each of which is taken for a key"
    twice = sorted(key for key, count in listed.items() if count > 1)
    if twice:
        yield f"lists keys more than once, or with more behind a dot: {_quoted(twice)}"
    missing_keys = sorted(listed.keys() - entries)
    if missing_keys:
        dots = any(key.split(".")[0] in listed for key in entries if "." in key)
        reason = " (keys end at their first dot: name them without)" if dots else ""
        yield f"lists keys that it does not hold{reason}: {_quoted(missing_keys)}"
    silent = sorted(entries - listed.keys())
    if silent and not missing_keys:
        yield (
            f"holds {len(silent)} images that {META_INFO} does not list and that are never read: "
            f"{_quoted(silent)}"
        )
    if empty:
        yield f"holds entries without content: {_quoted(empty)}"


def _header_of(value: memoryview) -> Header | OSError:
    """Read the header of an image in an LMDB, and no more of its pages than that takes."""
    for size in (*_HEADS, len(value)):
        try:
            return read_header(io.BytesIO(value[:size]))
        except OSError as error:
            fault = error
    return fault


def _lines(listing: Path) -> list[str]:
    return listing.read_text(encoding="utf-8", errors="replace").splitlines()


def _read_database(path: Path) -> _Database:
    lines = _lines(path / META_INFO)
    keys = [line.split(".")[0] for line in lines if line.strip()]
    entries = set(keys)
    with _environment(path) as environment, environment.begin(buffers=True) as read:
        complete = environment.stat()["entries"] == len(entries)
        headers, empty = {}, []
        for key in _spread(sorted(entries)):
            value = _value(read, key)
            if value:
                headers[key] = _header_of(value)
            elif value is None:
                complete = False
            else:
                empty.append(key)
        if not complete:
            stored = read.cursor().iternext(values=False)
            entries = {bytes(key).decode(errors="replace") for key in stored}
    return _Database(keys, list(_list_faults(lines, entries, empty)), headers)


def _files_in(folder: Path) -> list[str]:
    """Return the names of the files that BasicSR finds in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_file())


def _partner(name: str, template: str) -> str:
    """Return LR's file name for HR's, by `filename_tmpl`.

    Raises:
        UserError: It is not a template.
    """
    base, suffix = os.path.splitext(os.path.basename(name))
    try:
        return f"{template.format(base)}{suffix}"
    except (LookupError, ValueError) as error:
        raise UserError(
            f"filename_tmpl {template!r} is not a template: write '{{}}', or such as '{{}}x4'"
        ) from error


def _header_in(folder: Path) -> Callable[[str], Header]:
    return lambda name: read_header(folder / name)


def _known_header(headers: Mapping[str, Header | OSError]) -> Callable[[str], Header]:
    def header(key: str) -> Header:
        found = headers[key]
        if isinstance(found, OSError):
            raise found
        return found

    return header


class _SetScan:
    """Looks at one data set."""

    def __init__(
        self,
        context: Context,
        phase: str,
        reads: DatasetKeys,
        databases: dict[Path, _Database],
        scan: Scan,
    ) -> None:
        self._phase = phase
        self._path = f"datasets:{phase}"
        self._options = context.section(self._path)
        self._subject = context
        self._reads = reads
        self._databases = databases
        self._scan = scan
        self._owner = owner(phase, self._options)
        self._training = phase.split("_")[0] == "train"

    def run(self) -> None:
        """Look at the set; what is found goes into the scan."""
        sides = self._sides()
        if not sides or any(side is None for side in sides):
            return
        whole = [side for side in sides if side is not None]
        count = len(whole[0].names)
        self._scan.samples[self._phase] = count
        if not count:
            self._problem(whole[0].option, f"{whole[0].place} lists no images; fill the list")
            return
        self._look(whole)

    def _problem(self, option: str, text: str) -> None:
        self._scan.problems.append(f"{option}: {self._owner}: {text}")

    def _sides(self) -> list[_Side | None]:
        backend = self._subject.section(f"{self._path}:io_backend").get("type")
        folders = {key: self._subject.resolve(self._options[key]) for key in self._reads.folders}
        if backend == "lmdb":
            return self._from_databases(folders)
        listing = self._reads.listing and self._options.get(self._reads.listing)
        names = self._from_list(listing) if listing else self._from_folders(folders)
        return [
            _Side(f"{self._path}:{key}", folder, names[key], _header_in(folder))
            for key, folder in folders.items()
            if key in names
        ]

    def _from_databases(self, folders: Mapping[str, Path]) -> list[_Side | None]:
        sides: list[_Side | None] = []
        for key, folder in folders.items():
            option = f"{self._path}:{key}"
            place = Path(os.path.realpath(folder))
            if place not in self._databases:
                self._databases[place] = _read_database(folder)
            database = self._databases[place]
            for fault in database.faults:
                self._problem(option, f"{folder} {fault}; {_REMEDY}")
            sides.append(
                None
                if database.faults
                else _Side(option, folder, sorted(database.keys), _known_header(database.headers))
            )
        if len(sides) == 2 and sides[0] and sides[1] and sides[0].names != sides[1].names:
            self._unequal(sides[0], sides[1])
            return []
        return sides

    def _unequal(self, hr: _Side, lr: _Side) -> None:
        """Report LMDBs whose keys are not the same."""
        parts = [
            f"{_quoted(sorted(set(one.names) - set(other.names)))} not in {other.place}"
            for one, other in ((hr, lr), (lr, hr))
            if set(one.names) - set(other.names)
        ]
        self._problem(
            lr.option,
            f"{hr.place} has {len(hr.names)} keys and {lr.place} {len(lr.names)}, which must be "
            f"the same: {'; '.join(parts)}",
        )

    def _from_list(self, listing: Any) -> dict[str, list[str]]:
        """Return the names that a list gives each folder."""
        lines = _lines(self._subject.resolve(listing))
        option = f"{self._path}:{self._reads.listing}"
        blank = sum(not line.strip() for line in lines)
        if blank:
            self._problem(option, f"{listing} has {blank} blank lines, each an image; remove them")
        lines = [line.strip() for line in lines if line.strip()]
        keys = self._reads.folders
        if self._reads.listing == "meta_info" and len(keys) == 2:
            pairs = [line.split(", ") for line in lines]
            wrong = [line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2]
            if wrong:
                self._problem(
                    option, f"{listing}: write `HR, LR` in each line; {wrong[0]!r} is not"
                )
                return {}
            names = {key: [pair[at] for pair in pairs] for at, key in enumerate(keys)}
        else:
            first = [line.split(" ")[0] for line in lines]
            names = dict.fromkeys(keys, first)
            if len(keys) == 2:
                template = str(self._options.get("filename_tmpl", "{}"))
                names[keys[1]] = [_partner(name, template) for name in first]
        return names if self._all_there(names) else {}

    def _all_there(self, names: Mapping[str, Sequence[str]]) -> bool:
        """Report images of a list that are not there."""
        fine = True
        for key, listed in names.items():
            folder = self._subject.resolve(self._options[key])
            gone = [name for name in listed if not os.path.isfile(folder / name)]
            if gone:
                fine = False
                self._problem(
                    f"{self._path}:{key}",
                    f"{len(gone)} of {len(listed)} listed images are not in {folder}: "
                    f"{_quoted(gone)}; correct the list, or filename_tmpl",
                )
        return fine

    def _from_folders(self, folders: Mapping[str, Path]) -> dict[str, list[str]]:
        """Return the names in folders, those of LR in HR's order."""
        there = {key: _files_in(folder) for key, folder in folders.items()}
        if len(there) == 1:
            return there
        hr_key, lr_key = folders
        hr, lr = there[hr_key], there[lr_key]
        template = str(self._options.get("filename_tmpl", "{}"))
        partners = [_partner(name, template) for name in hr]
        lr_names = set(lr)
        without = [name for name, other in zip(hr, partners, strict=True) if other not in lr_names]
        spare = sorted(set(lr) - set(partners))
        if not without and not spare:
            return {hr_key: hr, lr_key: partners}
        parts = [f"{len(hr)} files in {folders[hr_key]}, {len(lr)} in {folders[lr_key]}"]
        if without:
            parts.append(f"HR without LR: {_quoted(without)}, with filename_tmpl {template!r}")
        if spare:
            parts.append(f"LR without HR: {_quoted(spare)}")
        self._problem(f"{self._path}:{lr_key}", f"{'; '.join(parts)}; rename or remove files")
        return {}

    def _look(self, sides: Sequence[_Side]) -> None:
        """Look at headers: of each side by itself, then of pairs."""
        positions = _spread(range(len(sides[0].names)))
        headers = [self._headers(side, positions) for side in sides]
        looked = "all" if len(positions) == len(sides[0].names) else f"{len(positions):,}"
        what = "pairs" if len(sides) == 2 else "images"
        self._scan.notes.append(
            f"{self._path}: {len(sides[0].names):,} {what}; checked the headers of {looked}"
        )
        for side, found in zip(sides, headers, strict=True):
            self._warn_of_colours(side, found)
        if self._reads.folders[0] == "dataroot_gt":
            self._small(sides[0], headers[0])
        if len(sides) == 2:
            self._unfitting(sides, headers)

    def _headers(self, side: _Side, positions: Sequence[int]) -> dict[int, Header]:
        """Read headers by position; those that cannot be read are reported."""
        headers, unreadable = {}, []
        for position in positions:
            try:
                headers[position] = side.header(side.names[position])
            except OSError:
                unreadable.append(side.names[position])
        if unreadable:
            self._problem(
                side.option,
                f"{len(unreadable)} of {len(positions)} files checked in {side.place} are not "
                f"images that can be read: {_quoted(unreadable)}; remove or replace them",
            )
        return headers

    def _warn_of_colours(self, side: _Side, headers: Mapping[int, Header]) -> None:
        for kind, what, done in (
            ("gray", "are gray", "BasicSR makes three equal channels of them"),
            ("alpha", "have transparency", "BasicSR drops it"),
            ("deep", "have more than 8 bits", "BasicSR reads 8 of them"),
        ):
            names = [side.names[at] for at, header in headers.items() if getattr(header, kind)]
            if names:
                self._scan.warnings.append(
                    f"{side.option}: {len(names)} of {len(headers)} images checked in "
                    f"{side.place} {what}: {_quoted(names)}; {done}"
                )

    def _small(self, side: _Side, headers: Mapping[int, Header]) -> None:
        """HR must hold a patch to train on, and something inside the border to measure."""
        metrics = self._subject.section("val:metrics")
        borders = [
            self._subject.section(f"val:metrics:{name}").get("crop_border") for name in metrics
        ]
        border = max((each for each in borders if is_whole(each)), default=0)
        least, why = 2 * border + 1, f"of which crop_border {border} leaves nothing"
        if self._training:
            if self._options["type"] == "RealESRGANDataset":
                return  # which fills small images up
            least, why = self._options.get("gt_size"), "gt_size"
        if not is_whole(least):
            return
        small = [at for at, header in headers.items() if min(header[:2]) < least]
        if small:
            height, width = headers[small[0]][:2]
            self._problem(
                side.option,
                f"{len(small)} of {len(headers)} images checked in {side.place} are smaller "
                f"than {least} x {least} pixels, {why}: "
                f"{_quoted([side.names[at] for at in small])}, the first {height} x {width}; leave "
                "them out",
            )

    def _unfitting(self, sides: Sequence[_Side], headers: Sequence[Mapping[int, Header]]) -> None:
        """HR must be LR times the scale; for a test it may be larger by less than one LR pixel."""
        scale = self._subject.options.get("scale")
        if not is_whole(scale) or scale < 1:
            return
        spare = 0 if self._training else scale - 1
        unfitting = []
        for at in headers[0].keys() & headers[1].keys():
            hr, lr = headers[0][at], headers[1][at]
            rests = (hr.height - lr.height * scale, hr.width - lr.width * scale)
            if not all(0 <= rest <= spare for rest in rests):
                unfitting.append(at)
        if not unfitting:
            return
        first = min(unfitting)
        hr, lr = headers[0][first], headers[1][first]
        names = [sides[0].names[at] for at in sorted(unfitting)]
        self._problem(
            sides[1].option,
            f"{len(unfitting)} of {len(headers[0])} pairs checked are not LR and HR {scale} "
            f"times as large: {_quoted(names)}; the first has HR {hr.height} x {hr.width} and LR "
            f"{lr.height} x {lr.width}, a scale of {_scale_of(hr, lr)}; make LR again, or correct "
            "the path or the scale",
        )


def _scale_of(hr: Header, lr: Header) -> str:
    return " and ".join(
        dict.fromkeys(f"{side / other:.4g}" for side, other in zip(hr[:2], lr[:2], strict=True))
    )


def scan(
    options: Mapping[str, Any],
    root: Path,
    *,
    train: bool,
    registered: Registered | None = None,
) -> Scan:
    """Look at every data set of BasicSR's types for single images; no pixel is decoded.

    Args:
        options: As `dlgsanet_arch.options.load` returns them. What is wrong with them by
            themselves, places that are not there included, is passed over here.
        root: Folder that relative paths are below.
        train: Whether they are to train, else to test.
        registered: What is in BasicSR's registries: sets of somebody else's type are left alone.
    """
    context = Context(options, train, root, registered)
    databases: dict[Path, _Database] = {}
    found = Scan()
    for phase, dataset in context.datasets():
        reads = known_dataset(context, dataset.get("type"))
        backend = context.section(f"datasets:{phase}:io_backend").get("type")
        known = reads is not None and backend in ("disk", "lmdb")
        named_all = known and all(isinstance(dataset.get(key), str) for key in reads.folders)
        if not named_all or any(data_faults(context, phase, dataset)):
            continue
        if backend == "disk" and dataset["type"] == "FFHQDataset":
            found.samples[phase] = _FFHQ_IMAGES
            continue
        if (
            backend == "disk"
            and dataset["type"] == "RealESRGANDataset"
            and not dataset.get("meta_info")
        ):
            continue
        try:
            _SetScan(context, phase, reads, databases, found).run()
        except (OSError, UserError) as error:
            found.problems.append(f"datasets:{phase}: {error}")
    return found


def batch_problems(
    options: Mapping[str, Any], samples: Mapping[str, int], copies: int
) -> list[str]:
    """Say whether an epoch has no complete batch: then there is nothing to train on.

    Args:
        options: Of a training.
        samples: Of each phase, as `scan` counted them.
        copies: Processes, or GPUs of one process, that take a batch each.
    """
    dataset = Context(options, True, Path(), None).section("datasets:train")
    batch, ratio = dataset.get("batch_size_per_gpu"), dataset.get("dataset_enlarge_ratio", 1)
    count = samples.get("train")
    if not count or not is_whole(batch) or not is_number(ratio):
        return []
    positions = math.ceil(count * ratio)
    if positions >= batch * copies:
        return []
    whole = f"{batch} samples" + (f" for each of {copies} processes or GPUs" if copies > 1 else "")
    return [
        f"datasets:train:batch_size_per_gpu: {count} samples times dataset_enlarge_ratio {ratio} "
        f"are less than one batch of {whole}; raise the ratio to "
        f"{math.ceil(batch * copies / count)}, or write a smaller batch"
    ]


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _folder_problem(folder: Path) -> str:
    """Say why nothing can be written below a folder that may not be there yet, or nothing."""
    there = _nearest_existing(folder)
    if not there.is_dir():
        return f"{there} is not a folder, but {folder} is to be written; rename it"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to, but {folder} is to be; choose another --root"
    return ""


def _pair_size(context: Context) -> int:
    """Return the bytes of a saved pair, all networks and the state, as far as it can be told."""
    average = context.section("train").get("ema_decay", 0)
    size = 0
    for key in context.networks():
        network = weights.build(context, key)
        if network is not None:
            copies = 2 if key == "network_g" and is_number(average) and average > 0 else 1
            size += _BYTES * (network.values * copies + network.trained * _ADAM_STATES)
            size += _BYTES_A_TENSOR * len(network.shapes) * (copies + _ADAM_STATES)
    return size


def check_disk(
    options: Mapping[str, Any], root: Path, *, train: bool, registered: Registered | None = None
) -> tuple[list[str], list[str]]:
    """Look whether what a run writes can be written, and has room.

    Args:
        options: Checked options.
        root: Folder of `experiments` and `results`.
        train: Whether they are to train, else to test.
        registered: What is in BasicSR's registries; None looks there.

    Returns:
        Problems and warnings, one a line.
    """
    run = root / ("experiments" if train else "results") / options["name"]
    problem = _folder_problem(run)
    if problem or not train:
        return [problem] if problem else [], []
    context = Context(options, train, root, registered or weights.registered_networks())
    size = _pair_size(context)
    logger, total = context.section("logger"), context.section("train")["total_iter"]
    saved = max(1, int(total // logger["save_checkpoint_freq"]))
    count = min(saved, logger.get("keep_last") or saved) + 1  # and what the end or the best leaves
    free = shutil.disk_usage(_nearest_existing(run)).free
    gigabytes = f"{run} has {free / _GIGABYTE:.3g} GB free, and a checkpoint of weights and state "
    gigabytes += f"takes about {size / _GIGABYTE:.3g} GB"
    if free < _FEWEST_PAIRS * size:
        needed = _FEWEST_PAIRS * size / _GIGABYTE
        return [f"logger: {gigabytes}: make room for at least two, {needed:.3g} GB"], []
    if free < count * size:
        return [], [
            f"logger:keep_last: {gigabytes}, {count * size / _GIGABYTE:.3g} GB for {count}; they "
            "will not all fit: write a number to keep, or save less often"
        ]
    return [], []
