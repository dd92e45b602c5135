"""Option files for a user's own pictures, drafted from the shipped ones.

The shipped files are edited as text, so that their comments stay. What is kept of the published
recipe, and what is fitted to the pictures and to the memory there is, `fit` and `schedule` say.
"""

import math
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from dlgsanet_arch import cpu
from dlgsanet_arch.data.databases import DATA, META_INFO
from dlgsanet_arch.data.known_sets import set_name
from dlgsanet_arch.data.pictures import find_pictures
from dlgsanet_arch.data.sub_images import HR_MULTIPLE, SCALES, starts
from dlgsanet_arch.data.training_sets import Cutting, Source, database_name, find_sources
from dlgsanet_arch.data.wording import named
from dlgsanet_arch.data.workers import usable_cores
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import (
    disk_faults_named,
    replace_folder,
    unfinished,
    write_whole,
)
from dlgsanet_arch.inference import memory
from dlgsanet_arch.options import load, shipped
from dlgsanet_arch.pipeline import weights
from dlgsanet_arch.pipeline.scan import Header, read_header

VARIANTS = ("tiny", "light", "large")

# The published recipe: patches an iteration, their side in LR pixels, iterations, and the
# sub-images of DIV2K that these go over.
BATCH, PATCH, ITERATIONS, SUB_IMAGES = 16, 48, 500_000, 32_592
SMALLER_PATCHES = (40, 32, 24)

# Peak memory of a training step, beyond weights and images: so many maps of `dim` channels of
# float32 for each block, and bytes that do not grow with the pixels. Measured on an AMD EPYC as the
# growth of the resident memory (VmHWM, float32, one step of Adam): by PyTorch's operators 51 to 53
# maps for Tiny and Light, 46 to 48 for Large; by the C library 29 to 34 for Tiny and Light, Large
# not measured. tests/test_new_options.py measures it again.
_MAPS_A_BLOCK, _FIXED = 54, 16 << 20
_C_MAPS_A_BLOCK, _C_FIXED = 35, 8 << 20
_SHARE = 0.5  # of the free memory: others want some, allocators lose some, GPUs were not measured

_FEWEST_ITERATIONS = 50_000
_FINE_TUNING = 5  # from trained weights: so many times fewer iterations, at a fifth of the rate
_FINE_TUNING_RATE = "!!float 1e-4"
_HELD_OUT, _MOST_HELD_OUT = 10, 20  # one picture in so many is held out, and so many at most
_MOST_WORKERS = 6
_TILE = 256
_GIB = 2**30


def step_bytes(network: Mapping[str, Any], pixels: int, in_c: bool = False) -> int:
    """Return about how many bytes one training step takes at its peak.

    Args:
        network: Arguments of DLGSANet: `dim`, `groups` and `blocks`.
        pixels: LR pixels that are worked on at once, of all patches.
        in_c: Whether the C library computes it: in float32 on a CPU that has it.
    """
    maps, fixed = (_C_MAPS_A_BLOCK, _C_FIXED) if in_c else (_MAPS_A_BLOCK, _FIXED)
    return fixed + 4 * maps * network["groups"] * network["blocks"] * network["dim"] * pixels


@dataclass(frozen=True)
class Fit:
    """Patches that fit into memory.

    Args:
        patch: Side of a patch in LR pixels.
        accumulation: Into how many parts a batch of 16 patches is divided.
        bytes: About what a step takes.
    """

    patch: int
    accumulation: int
    bytes: int


def fit(network: Mapping[str, Any], free: int, patch: int | None = None, in_c: bool = False) -> Fit:
    """Choose how a batch is worked on so that it takes half of the free memory at most.

    The published 16 patches of 48x48 stay where they fit; then they are worked on in 2, 4, 8 or 16
    parts, which changes nothing but rounding; only then patches become smaller: 40, 32, 24.

    Args:
        network: Arguments of DLGSANet.
        free: Bytes that are free.
        patch: Side of a patch in LR pixels that is not to be changed.
        in_c: As in `step_bytes`.

    Raises:
        UserError: Not even one patch fits.
    """
    sides = (PATCH, *SMALLER_PATCHES) if patch is None else (patch,)
    parts = [2**power for power in range(BATCH.bit_length())]
    for side in sides:
        for accumulation in parts if side in (PATCH, patch) else parts[-1:]:
            needed = step_bytes(network, BATCH // accumulation * side**2, in_c)
            if needed <= _SHARE * free:
                return Fit(side, accumulation, needed)
    raise UserError(
        f"a training step on one patch of {sides[-1]}x{sides[-1]} takes about "
        f"{needed / _GIB:.2f} GiB, and half of {free / _GIB:.2f} GiB is to be used: free some "
        "memory, take a smaller --variant or --patch, or name the memory of another machine with "
        "--memory"
    )


@dataclass(frozen=True)
class Schedule:
    """How long a training is.

    Args:
        iterations: In all.
        enlarge_ratio: So many times over the sub-images all iterations fall into one epoch.
        period: Iterations between two validations, and between two checkpoints.
    """

    iterations: int
    enlarge_ratio: int
    period: int

    @property
    def milestones(self) -> list[int]:
        """Iterations after which the rate is halved: at the published parts of the whole."""
        return [max(1, round(part * self.iterations)) for part in (0.5, 0.8, 0.9, 0.95)]


def schedule(
    count: int, worth: float, *, fine_tuning: bool = False, iterations: int | None = None
) -> Schedule:
    """Choose the length of a training by its pictures.

    Each pixel is seen as often as the published 500,000 iterations see one of DIV2K's 32,592
    sub-images, in 50,000 to 500,000 iterations; from trained weights in a fifth of that.

    Args:
        count: Number of sub-images.
        worth: Their pixels, in sub-images of 480x480.
        fine_tuning: Whether it starts from trained weights.
        iterations: Instead of what follows from the pictures.
    """
    if iterations is None:
        seen = round(ITERATIONS * worth / SUB_IMAGES, -3)
        iterations = int(min(ITERATIONS, max(_FEWEST_ITERATIONS, seen)))
        iterations //= _FINE_TUNING if fine_tuning else 1
    return Schedule(
        iterations,
        enlarge_ratio=math.ceil(iterations * BATCH / count),
        period=max(1, iterations // 100),
    )


def _written(value: object) -> str:
    """Write a scalar as YAML, on one line, in quotes where a reader could take it for another."""
    if not isinstance(value, str):
        return yaml.safe_dump(value).removesuffix("\n...\n").strip()
    if re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value:
        return value
    quoted = yaml.safe_dump(value, default_style='"', width=math.inf, allow_unicode=True)
    return quoted.strip()


class _Text:
    """An option file's text, changed key by key; all else stays as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def set(
        self, path: str, value: object, comment: str | None = None, *, raw: bool = False
    ) -> None:
        """Give the key at "a:b" another value.

        Args:
            path: Of a key that is there and holds no section.
            value: A scalar, or YAML's text for it where it is `raw`.
            comment: Instead of what is behind the value on its line.
            raw: Whether the value is text of YAML.
        """
        node = yaml.compose(self.text, Loader=yaml.SafeLoader)
        for key in path.split(":"):
            node = next(below for name, below in node.value if name.value == key)
        start, end = node.start_mark.index, node.end_mark.index
        written = value if raw else _written(value)
        if comment is not None:
            end = self.text.index("\n", start)
            written = f"{written}  # {comment}" if comment else written
        self.text = f"{self.text[:start]}{written}{self.text[end:]}"

    def replace(self, pattern: str, text: str) -> None:
        """Replace the one place that a pattern fits.

        Raises:
            ValueError: There is none, or several: the shipped files have changed.
        """
        self.text, count = re.subn(pattern, lambda _: text, self.text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{pattern!r} is in the option file {count} times")


@dataclass(frozen=True)
class Validation:
    """What a training is validated on.

    Args:
        name: Of the set.
        hr: Folder of HR pictures, there or to be made.
        lr: Folder of LR pictures of the same names.
        pixels: HR pixels of the largest picture, 0 where it is not known.
    """

    name: str
    hr: Path
    lr: Path
    pixels: int = 0


@dataclass(frozen=True)
class Data:
    """What a training works on.

    Args:
        name: Of the training set.
        hr: LMDB of HR sub-images, there or to be made.
        lr: LMDB of LR sub-images.
        count: Number of sub-images.
        worth: Their pixels, in sub-images of 480x480.
        pictures: Number of the pictures they are cut from; None where that is not known.
        validation: What it is validated on.
        commands: What makes it, in order; empty where all is there.
        links: Symbolic links to be made, and what they lead to.
        notes: What a user should know.
    """

    name: str
    hr: Path
    lr: Path
    count: int
    worth: float
    pictures: int | None
    validation: Validation
    commands: tuple[tuple[str, ...], ...] = ()
    links: tuple[tuple[Path, Path], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What is to be drafted.

    Args:
        hr: A folder of HR pictures, or what `dlgsanet data train` made.
        scale: HR side over LR side.
        variant: One of `VARIANTS`.
        lr: A folder of LR pictures; of prepared data an LMDB. None: made by bicubic.
        val: A folder of HR pictures to validate on, or a prepared test set. None: see `find_data`.
        name: Of the run; None makes one of variant, scale and folder.
        start: Weights to start from.
        patch: Side of patches in LR pixels; None is the published 48, or less where memory lacks.
        iterations: None makes them of the pictures.
        root: The folder that holds datasets/ and experiments/.
        free: Bytes of memory to count on; None asks the device.
        overwrite: Whether files of the same names are replaced.
    """

    hr: Path
    scale: int
    variant: str = "tiny"
    lr: Path | None = None
    val: Path | None = None
    name: str | None = None
    start: Path | None = None
    patch: int | None = None
    iterations: int | None = None
    root: Path = Path()
    free: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Draft:
    """Option files, and what belongs to them.

    Args:
        name: Of the run, and of the files.
        train: Text of the one to train.
        test: Text of the one to test.
        data: What they name.
        notes: What was decided, and why.
    """

    name: str
    train: str
    test: str
    data: Data
    notes: tuple[str, ...]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-") or "own"


def _header(path: Path, least: int) -> Header | str:
    """Read a picture's header, or say why the picture cannot be used."""
    try:
        header = read_header(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path} cannot be read: {error}"
    if min(header.height, header.width) < least:
        return (
            f"{path} is {header.width}x{header.height}, smaller than one patch of {least}x{least}"
        )
    return header


def _headers(paths: Sequence[Path], least: int) -> list[Header]:
    """Read the headers of pictures.

    Raises:
        UserError: Lists those that cannot be used.
    """
    found = [_header(path, least) for path in paths]
    faults = [each for each in found if isinstance(each, str)]
    if faults:
        raise UserError(
            f"{len(faults)} of {len(paths)} pictures cannot be used; mend or move them"
            f"{', or take a smaller --patch' if least > 1 else ''}: {named(faults, 10)}"
        )
    return [each for each in found if isinstance(each, Header)]


def _count(headers: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """Count the sub-images of pictures of these heights and widths, and what they are worth."""
    cutting, count, pixels = Cutting(), 0, 0
    for sides in headers:
        height, width = (side // HR_MULTIPLE * HR_MULTIPLE for side in sides)
        here = math.prod(len(starts(side, cutting.crop, cutting.step)) for side in (height, width))
        count += here
        pixels += here * min(height, cutting.crop) * min(width, cutting.crop)
    return count, pixels / cutting.crop**2


def _listed(database: Path) -> dict[str, tuple[int, int]]:
    """Return the heights and widths of an LMDB's pictures by key, of its list.

    Raises:
        UserError: There is no list, or it is none of BasicSR's.
    """
    try:
        lines = (database / META_INFO).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{database / META_INFO} cannot be read ({error}): make the LMDB again"
        ) from (error)
    found = {}
    for line in lines:
        match = re.fullmatch(r"([^.\s]+)\.\w+ \((\d+),\s*(\d+),\s*\d+\) \d+", line)
        if not match:
            raise UserError(
                f"{database / META_INFO} has the line {line!r}, which BasicSR's lists do not have: "
                "make the LMDB again"
            )
        found[match[1]] = (int(match[2]), int(match[3]))
    if not found:
        raise UserError(f"{database} holds no pictures: make it again")
    return found


def _prepared(request: Request) -> tuple[Path, Path] | None:
    """Return the LMDBs of HR and LR where they are given, None where pictures are.

    Raises:
        UserError: HR's is there and LR's is not.
    """
    places = (request.hr, request.hr / database_name(1))
    hr = next((place for place in places if (place / DATA).is_file()), None)
    if hr is None:
        return None
    lr = request.lr or hr.with_name(database_name(request.scale))
    if not (lr / DATA).is_file():
        raise UserError(
            f"{hr} is an LMDB, and there is none of its LR at {lr}: make it with `dlgsanet data "
            f"train … --scale {request.scale}`, or name it with --lr"
        )
    for path in (hr, lr):
        if path.suffix != ".lmdb":
            raise UserError(f"{path} is an LMDB, whose name must end in .lmdb: rename it")
    return hr, lr


def _validation(request: Request, given: Path) -> tuple[Validation, tuple[tuple[str, ...], ...]]:
    """Find what to validate on, and the command that makes it where it has to be made."""
    for folder in (given / f"X{request.scale}", given):
        hr, lr = folder / "HR", folder / "LR"
        if hr.is_dir() and lr.is_dir():
            files = find_pictures(hr)
            headers = _headers([file.path for file in files], 1)
            name = given.parent.name if given.name == f"X{request.scale}" else given.name
            return Validation(_slug(name), hr, lr, max(x.height * x.width for x in headers)), ()
    files = find_pictures(given)
    headers = _headers([file.path for file in files], 1)
    return _test_set(request, set_name(_slug(given.name)), given, headers)


def _test_set(
    request: Request, name: str, pictures: Path, headers: Sequence[Header]
) -> tuple[Validation, tuple[tuple[str, ...], ...]]:
    place = request.root / "datasets" / "benchmark" / name / f"X{request.scale}"
    largest = max(header.height * header.width for header in headers)
    command = ("data", *_root(request), "benchmark", "--name", name, "--hr", _word(pictures))
    command += ("--scale", str(request.scale))
    return Validation(name, place / "HR", place / "LR", largest), (command,)


def _word(path: Path) -> str:
    """Write a path for a command line in the current folder."""
    path, here = path.absolute(), Path.cwd()
    if path != here and path.is_relative_to(here):
        relative = str(path.relative_to(here))
        return f"./{relative}" if relative.startswith("-") else relative
    return str(path)


def _root(request: Request) -> tuple[str, ...]:
    here = request.root.absolute() == Path.cwd()
    return () if here else ("--root", _word(request.root))


def _of_databases(request: Request, hr: Path, lr: Path) -> Data:
    large, small = _listed(hr), _listed(lr)
    if large.keys() != small.keys():
        lonely = sorted(large.keys() ^ small.keys())
        raise UserError(f"{hr} and {lr} differ in their keys: {named(lonely)}; make them again")
    wrong = [
        key
        for key, sides in large.items()
        if tuple(side * request.scale for side in small[key]) != sides
    ]
    if wrong:
        raise UserError(
            f"{lr} is not {hr} at scale {request.scale}: {named(wrong)} differ in size; name "
            "another --scale or --lr"
        )
    least = (request.patch or PATCH) * request.scale
    short = [key for key, sides in large.items() if min(sides) < least]
    if short:
        raise UserError(
            f"{len(short)} sub-images of {hr} are smaller than one patch of {least}x{least}: "
            f"{named(short)}; make the LMDB again without them, or take a smaller --patch"
        )
    count = len(large)
    worth = sum(math.prod(sides) for sides in large.values()) / Cutting().crop ** 2
    name, notes = _slug(hr.parent.name), []
    benchmark = request.root / "datasets" / "benchmark"
    own, commands = benchmark / f"{name}_val", ()
    if request.val:
        validation, commands = _validation(request, request.val)
    elif (own / f"X{request.scale}").is_dir():
        validation, commands = _validation(request, own)
    else:
        folder = benchmark / "Set5" / f"X{request.scale}"
        validation = Validation("Set5", folder / "HR", folder / "LR")
        notes = ["validation is on Set5; --val FOLDER takes pictures of your own"]
        if not folder.is_dir():
            notes[0] += (
                f"; {folder} is not there yet: `dlgsanet data benchmark --name Set5 --hr FOLDER "
                f"--scale {request.scale}` makes it"
            )
    return Data(name, hr, lr, count, worth, None, validation, commands, (), tuple(notes))


def _flat(folder: Path, source: Source, scale: int) -> list[tuple[Path, Path]]:
    """Return the links for a picture: HR, and its LR where it is given, by equal names."""
    name = f"{source.key}{source.hr.suffix.lower()}"
    links = [(folder / "HR" / name, source.hr.absolute())]
    if source.lr:
        links.append((folder / "LR" / name, source.lr[scale].absolute()))
    return links


def _hold_out(
    sources: Sequence[Source], headers: Sequence[Header], scale: int
) -> list[tuple[Source, Header]]:
    """Choose pictures to validate on, evenly spread."""
    usable = []
    for source, header in zip(sources, headers, strict=True):
        if source.lr:
            lr = _header(source.lr[scale], 1)
            sides = (header.height // scale, header.width // scale)
            if isinstance(lr, str) or (lr.height, lr.width) != sides:
                continue
        usable.append((source, header))
    count = min(_MOST_HELD_OUT, max(1, len(sources) // _HELD_OUT), len(usable))
    if not count or len(sources) < 2:
        raise UserError(
            f"{len(sources)} pictures are too few to hold one out, or no LR is HR over {scale}: "
            "name a folder to validate on with --val"
        )
    return [usable[(2 * index + 1) * len(usable) // (2 * count)] for index in range(count)]


def _of_pictures(request: Request) -> Data:
    sources = find_sources(request.hr, request.lr, [request.scale])
    least = (request.patch or PATCH) * request.scale
    headers = _headers([source.hr for source in sources], least)
    _headers([path for source in sources for path in source.lr.values()], 1)
    name = _slug(request.hr.absolute().name)
    place = request.root.absolute() / "datasets" / name
    if place.is_relative_to(request.hr.absolute()):
        name, place = f"{name}_sub", place.with_name(f"{name}_sub")
    if place.is_relative_to(request.hr.absolute()):
        raise UserError(
            f"{place} is to hold the prepared data, and is within {request.hr}: name the folder "
            "that holds the pictures alone"
        )
    hr, lr, links, notes = request.hr, request.lr, [], []
    if request.val:
        validation, commands = _validation(request, request.val)
        if lr:
            notes.append("LR of --val is made by bicubic, that of training is your own")
        kept = list(zip(sources, headers, strict=True))
    else:
        held = _hold_out(sources, headers, request.scale)
        out = {source.key for source, _ in held}
        kept = [
            (source, header)
            for source, header in zip(sources, headers, strict=True)
            if source.key not in out
        ]
        for part, some in (("train", kept), ("val", held)):
            for source, _ in some:
                links += _flat(place / "pictures" / part, source, request.scale)
        hr = place / "pictures" / "train" / "HR"
        lr = place / "pictures" / "train" / "LR" if lr else None
        notes.append(
            f"{len(held)} of {len(sources)} pictures are held out for validation, by links in "
            f"{_word(place / 'pictures')}; --val FOLDER takes others"
        )
        folder = place / "pictures" / "val"
        if lr:
            largest = max(header.height * header.width for _, header in held)
            validation = Validation(f"{name}_val", folder / "HR", folder / "LR", largest)
            commands = ()
        else:
            validation, commands = _test_set(
                request, f"{name}_val", folder / "HR", [header for _, header in held]
            )
    making = ("data", "train", "--hr", _word(hr), *(("--lr", _word(lr)) if lr else ()))
    making += ("--scale", str(request.scale))
    if request.patch and request.patch != Cutting().patch:
        making += ("--patch", str(request.patch))
    commands = ((*making, "--out", _word(place)), *commands)
    count, worth = _count([(header.height, header.width) for _, header in kept])
    return Data(
        name,
        place / database_name(1),
        place / database_name(request.scale),
        count,
        worth,
        len(kept),
        validation,
        commands,
        tuple(links),
        tuple(notes),
    )


def find_data(request: Request) -> Data:
    """Look at the pictures by their headers; nothing is written.

    Without `val`, one of 10 pictures is held out to validate on, 1 to 20 of them, evenly spread;
    prepared data is validated on what was held out of it before, else on Set5.

    Raises:
        UserError: Pictures are missing, cannot be read, or are smaller than a patch.
    """
    prepared = _prepared(request)
    return _of_databases(request, *prepared) if prepared else _of_pictures(request)


def _in_file(path: Path, root: Path) -> str:
    """Write a path for an option file: from the root where it is below."""
    path, root = path.absolute(), root.absolute()
    relative = str(path.relative_to(root)) if path.is_relative_to(root) else "~"
    return str(path) if relative.startswith("~") else relative  # ~ would be a home folder


def _check(request: Request) -> None:
    for what, value in (
        *(("--hr", request.hr), ("--lr", request.lr), ("--val", request.val)),
        *(("--weights", request.start), ("--root", request.root), ("--name", request.name)),
    ):
        text = str(value)
        if value is not None and not (text.isprintable() and text):
            raise UserError(f"{what}: {text!r} cannot be written into an option file: rename it")
    if request.scale not in SCALES or request.variant not in VARIANTS:
        raise UserError(
            f"there is no DLGSANet {request.variant} x{request.scale}: variants are "
            f"{', '.join(VARIANTS)}, scales {', '.join(map(str, SCALES))}"
        )
    if request.name is not None and not re.fullmatch(r"\w[\w.+-]*", request.name):
        raise UserError(
            f"--name {request.name!r} cannot be a run's name: use letters, digits, -, _ and ."
        )
    for what, value in (("--patch", request.patch), ("--iterations", request.iterations)):
        if value is not None and value < 1:
            raise UserError(f"{what} {value}: must be 1 or more")


def _edit_shared(text: _Text, request: Request, name: str, data: Data, tile: bool) -> None:
    """Change what both files have: names, validation, tiles."""
    phase = "val" if "\n  val:\n" in text.text else "test_1"
    text.set("name", name)
    text.set(f"datasets:{phase}:name", data.validation.name)
    text.set(f"datasets:{phase}:dataroot_gt", _in_file(data.validation.hr, request.root))
    text.set(f"datasets:{phase}:dataroot_lq", _in_file(data.validation.lr, request.root))
    if tile:
        text.replace(
            r"(?<=^val:\n)", f"  tile: {_TILE}  # LR pixels: whole pictures would not fit memory\n"
        )


def _origin(data: Data) -> list[str]:
    """Say in comments how the data was made."""
    lines = [f"#   {shlex.join(('dlgsanet', *words))}" for words in data.commands]
    return ["# The data is made by:", *lines] if lines else []


def _train_text(
    request: Request, name: str, data: Data, chosen: Fit, plan: Schedule, tile: bool
) -> str:
    text = _Text(shipped.path_of(f"{request.variant}_x{request.scale}", train=True).read_text())
    _edit_shared(text, request, name, data, tile)
    text.replace(
        r"^# The published recipe, on DIV2K:\n(#.*\n)+",
        "\n".join([f"# On {data.name}, written by `dlgsanet new-options`.", *_origin(data), ""]),
    )
    if torch.cuda.device_count() > 1:
        text.set("num_gpu", 1, "docs/training.md says how several share a batch")
    text.set("datasets:train:name", data.name)
    text.set("datasets:train:dataroot_gt", _in_file(data.hr, request.root))
    text.set("datasets:train:dataroot_lq", _in_file(data.lr, request.root))
    what = f"{data.count:,} sub-images"
    if data.pictures is None:
        text.replace(r"^    # Sub-images of the 800 training.*\n", f"    # {what}.\n")
    else:
        text.replace(
            r"Sub-images of the 800 training pictures",
            f"{what} of {data.pictures:,} pictures",
        )
    text.set(
        "datasets:train:gt_size",
        chosen.patch * request.scale,
        f"HR patches; {chosen.patch}x{chosen.patch} in LR",
    )
    text.set("datasets:train:num_worker_per_gpu", min(_MOST_WORKERS, usable_cores() // 2))
    text.set("datasets:train:dataset_enlarge_ratio", plan.enlarge_ratio)
    text.replace(
        r"^    # 250 times DIV2K's(.*\n)    # 500,000 fall into one epoch: (?=BasicSR)",
        f"    # {plan.enlarge_ratio:,} times {what} are {plan.enlarge_ratio * data.count:,} "
        f"patches: all\n    # {plan.iterations:,} iterations fall into one epoch: ",
    )
    if request.start:
        text.set("path:pretrain_network_g", _in_file(request.start, request.root))
        text.set("train:optim_g:lr", _FINE_TUNING_RATE, raw=True)
    if chosen.accumulation > 1:
        text.set("model_type", "DLGSANetModel")
        text.replace(
            r"(?<=^train:\n)",
            f"  accumulation: {chosen.accumulation}  # a batch in so many parts, for less memory: "
            "the same numbers\n",
        )
    text.set("train:total_iter", plan.iterations)
    text.set("train:scheduler:milestones", str(plan.milestones), raw=True)
    text.set("val:val_freq", plan.period)
    text.set("logger:save_checkpoint_freq", plan.period)
    text.set("logger:print_freq", min(100, plan.period))
    return text.text


def _test_text(request: Request, name: str, data: Data, tile: bool) -> str:
    text = _Text(shipped.path_of(f"{request.variant}_x{request.scale}", train=False).read_text())
    _edit_shared(text, request, name, data, tile)
    text.replace(
        r":\n#   python test.py .*\n# Data: .*\n# To test",
        f".\n# On {data.validation.name}, written by `dlgsanet new-options`.\n# To test",
    )
    text.replace(r"^  test_2:\n(.*\n)*?(?=network_g:)", "")
    text.set("path:pretrain_network_g", f"experiments/{name}/models/net_g_latest.pth")
    return text.text


def _memory_note(chosen: Fit, free: int, where: str) -> str:
    note = f"about {chosen.bytes / _GIB:.1f} GiB a step, of {free / _GIB:.1f} GiB {where}: "
    if chosen.accumulation == 1:
        return f"{note}{BATCH} patches of {chosen.patch}x{chosen.patch} at once"
    note += f"{BATCH} patches of {chosen.patch}x{chosen.patch} in {chosen.accumulation} parts"
    if chosen.patch < PATCH:
        note += "; smaller patches than the published 48x48 cost some accuracy"
    return note


def draft(request: Request) -> Draft:
    """Draft option files to train and to test; nothing is written.

    Raises:
        UserError: Something about pictures, weights or memory is wrong.
    """
    _check(request)
    data = find_data(request)
    options = load(shipped.path_of(f"{request.variant}_x{request.scale}", train=True))
    network = {"in_chans": 3, **options["network_g"]}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = memory.free_memory(device) if request.free is None else request.free
    where = {"cuda": "free on the GPU", "cpu": "free here"}[device.type]
    in_c = device.type == "cpu" and request.free is None and not cpu.why_not()
    chosen = fit(network, free, request.patch, in_c)
    plan = schedule(
        data.count,
        data.worth,
        fine_tuning=request.start is not None,
        iterations=request.iterations,
    )
    name = request.name or f"{request.variant}_x{request.scale}_{data.name}"
    pixels = data.validation.pixels // request.scale**2
    tile = pixels * memory.bytes_a_pixel(network, device) > _SHARE * free
    notes = [
        f"{data.count:,} sub-images, {plan.iterations:,} iterations",
        _memory_note(chosen, free, where if request.free is None else "of --memory"),
        *data.notes,
    ]
    if device.type == "cpu" and request.free is None:
        notes.append("no GPU is found: on a CPU count seconds an iteration; see --iterations")
    made = Draft(
        name,
        _train_text(request, name, data, chosen, plan, tile),
        _test_text(request, name, data, tile),
        data,
        tuple(notes),
    )
    if request.start is not None:
        _check_weights(request, made)
    return made


def _check_weights(request: Request, made: Draft) -> None:
    """Raise a UserError where the training could not start from the weights."""
    start = request.start
    if not start.is_file():
        raise UserError(f"--weights: there is no file {start}: correct the path")
    if start.suffix == ".safetensors":
        target = _word(start.with_suffix(".pth"))
        raise UserError(
            f"--weights: BasicSR starts from .pth files: `dlgsanet convert "
            f"{shlex.quote(_word(start))} {shlex.quote(target)}` makes one"
        )
    options = yaml.safe_load(made.train)
    found = weights.check(options, request.root.absolute(), train=True, registered={}, resumed={})
    if found.problems:
        raise UserError(f"--weights: {'; '.join(found.problems)}")


def _make_links(data: Data, root: Path, *, overwrite: bool) -> None:
    """Make the links to the pictures to train and to validate on, all or none."""
    folder = root.absolute() / "datasets" / data.name / "pictures"
    wanted = {str(link.relative_to(folder)): str(target) for link, target in data.links}
    inside = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if not all(path.is_symlink() for path in inside):
        raise UserError(
            f"{folder} is to hold links to the pictures, and holds other files: move them away"
        )
    there = {str(path.relative_to(folder)): str(path.readlink()) for path in inside}
    if there == wanted:
        return
    if there and not overwrite:
        raise UserError(
            f"{folder} holds links to other pictures: move it away, or replace it with --overwrite"
        )
    beside = unfinished(folder)
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    for link, target in data.links:
        path = beside / link.relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    replace_folder(beside, folder)


def paths(made: Draft, folder: Path) -> tuple[Path, Path]:
    """Return where the option files of a draft go: to train, to test."""
    return tuple(folder / verb / f"{made.name}.yml" for verb in ("train", "test"))


def write(request: Request, made: Draft, folder: Path) -> None:
    """Write the option files, FOLDER/train/NAME.yml and FOLDER/test/NAME.yml, and the links.

    Raises:
        UserError: There are such files, or they cannot be written.
    """
    targets = paths(made, folder)
    there = [str(path) for path in targets if path.exists()]
    if there and not request.overwrite:
        raise UserError(
            f"{' and '.join(there)} exist already: give another --name, or replace them with "
            "--overwrite"
        )
    with disk_faults_named("the option files cannot be written"):
        if made.data.links:
            _make_links(made.data, request.root, overwrite=request.overwrite)
        for path, text in zip(targets, (made.train, made.test), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())


def next_commands(request: Request, made: Draft, folder: Path) -> list[str]:
    """Return what to run next, in order, as lines for a shell in the current folder."""
    train, test = (_word(path) for path in paths(made, folder))
    commands = [
        *made.data.commands,
        ("train", *_root(request), "-opt", train, "--auto_resume"),
        ("test", *_root(request), "-opt", test),
    ]
    return [shlex.join(("dlgsanet", *words)) for words in commands]
