"""The paper's table, measured: each cell beside what is published.

PSNR and SSIM are of the Y channel (BT.601, 8-bit images), a border of `scale` pixels cut off, as
the paper has them and BasicSR computes them. images.csv records the scores of each image with the
hashes of weights and images, so that no image is measured twice.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch import metrics
from dlgsanet_arch.checkpoint import nearest_published, read_checkpoint
from dlgsanet_arch.data.benchmark import folder_sha256
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, write_atomically
from dlgsanet_arch.inference import Upscaler
from dlgsanet_arch.tools.figure import compare_images
from dlgsanet_arch.tools.published import DATASETS, PUBLISHED, RETRAINED

IMAGES = "images.csv"
_PARTS = ("HR", "LR")
# SSIM has two definitions that people mix; the first is BasicSR's, and the paper's.
SSIM_BASICSR = "11x11 Gaussian windows inside the image (BasicSR)"
SSIM_UNIFORM = "7x7 uniform windows, sample covariance (scikit-image's default)"


class Measured(NamedTuple):
    """One image, enlarged and measured: a line of images.csv."""

    network: str
    scale: int
    dataset: str
    image: str  # its name, without suffix
    psnr: float  # in dB, inf for identical images
    ssim: float  # by SSIM_BASICSR
    ssim_uniform: float | None  # by SSIM_UNIFORM; None without scikit-image
    weights: str  # SHA-256 over them
    hr: str  # SHA-256 of the file
    lr: str  # SHA-256 of the file
    how: str  # kind of device, precision, tiles, ensemble

    @property
    def conditions(self) -> tuple[str, ...]:
        """What must be the same for the scores to hold."""
        return (self.dataset, self.image, self.weights, self.hr, self.lr, self.how)


Records = dict[tuple[str, ...], Measured]  # by conditions


def read_records(path: Path) -> Records:
    """Read images.csv; one that is absent is empty.

    Raises:
        UserError: The file is not one of this verb.
    """
    if not path.exists():
        return {}
    kinds = dict.fromkeys(Measured._fields, str) | {"scale": int, "psnr": float, "ssim": float}
    kinds["ssim_uniform"] = lambda text: float(text) if text else None
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = [
                Measured(**{name: kinds[name](text) for name, text in row.items()})
                for row in csv.DictReader(file)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a file of this verb's ({error!r}); remove it, or give another "
                "folder by -o"
            ) from error
    return {row.conditions: row for row in rows}


def _write_records(path: Path, records: Records) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([Measured._fields, *records.values()])
    with disk_faults_named(f"{path} cannot be written"):
        write_atomically(path, text.getvalue().encode())


@dataclass(frozen=True)
class Cell:
    """A network on a test set; psnr is None where nothing was measured."""

    network: str  # "DLGSANet Tiny"
    scale: int
    dataset: str
    weights: str = ""  # the file that was measured; empty without one
    is_published: bool = True  # False: the weights' network is another, and this the nearest
    psnr: float | None = None  # mean in dB of the images that are not identical
    ssim: float | None = None  # mean by SSIM_BASICSR
    ssim_uniform: float | None = None  # mean by SSIM_UNIFORM
    images: int = 0  # how many were measured
    identical: int = 0  # how many of them equal HR, and are not in the mean PSNR
    missing: str = ""  # what would fill an empty cell

    @property
    def published(self) -> tuple[float, float] | None:
        """PSNR and SSIM of the paper."""
        return PUBLISHED[self.network, self.scale].scores.get(self.dataset)

    @property
    def retrained(self) -> tuple[float, float] | None:
        """PSNR and SSIM of the weights that its authors trained again."""
        return RETRAINED.get((self.network, self.scale), {}).get(self.dataset)

    @property
    def difference(self) -> tuple[float, float] | None:
        """Measured less published."""
        if self.psnr is None or self.ssim is None or self.published is None:
            return None
        return self.psnr - self.published[0], self.ssim - self.published[1]

    def verdict(self, tolerance: float) -> str:
        """Return "reproduced", "below" or "above", against a tolerance in dB; else why not."""
        if self.psnr is None:
            return "missing"
        if self.difference is None:
            return "nothing published"
        if abs(self.difference[0]) <= tolerance:
            return "reproduced"
        return "below" if self.difference[0] < 0 else "above"


def _fault(name: str, scale: int, folder: Path) -> str:
    """Say why a test set cannot be measured on; empty where it can."""
    command = f"dlgsanet data benchmark --name {name} --hr FOLDER --scale {scale} makes it"
    if not folder.is_dir():
        return f"{folder} does not exist; {command}"
    hr, lr = ({path.stem for path in (folder / part).glob("*.png")} for part in _PARTS)
    if not hr:
        return f"{folder / 'HR'} has no PNG images; {command}"
    if hr != lr:
        return f"{folder}: {min(hr ^ lr)} is in one of HR and LR alone; {command}"
    return ""


def _images(folder: Path) -> list[str]:
    """Return the names of a test set's images, without suffix."""
    return sorted(path.stem for path in (folder / "HR").glob("*.png"))


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of weights, whatever file they are from."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _uniform_ssim(compared: metrics.Compared) -> float | None:
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    planes = [each[0, 0].double().numpy() for each in (compared.output, compared.target)]
    if min(planes[0].shape) < 7:
        return None
    return float(structural_similarity(*planes, data_range=255))


@dataclass(frozen=True)
class Weights:
    """Weights that are measured, and the row of the table that they belong to."""

    path: Path
    network: str  # "DLGSANet Tiny": its own name, or the nearest published
    is_published: bool  # whether it is the published configuration
    upscaler: Upscaler
    digest: str  # SHA-256 over them
    how: str  # as in Measured

    @property
    def scale(self) -> int:
        """How many times larger the sides become."""
        return self.upscaler.checkpoint.scale


def load(path: Path, *, param_key: str | None = None, **options: Any) -> Weights:
    """Read weights, and find the row of the table that they belong to.

    Args:
        path: `.pth` or `.safetensors`.
        param_key: As in `read_checkpoint`.
        options: `Upscaler`'s: device, dtype, tile, ensemble.

    Raises:
        CheckpointError: The file cannot be used.
    """
    checkpoint = read_checkpoint(path, param_key)
    nearest, differing = nearest_published(checkpoint.config)
    upscaler = Upscaler(checkpoint, **options)
    how = f"{upscaler.device.type}, {options.get('dtype', 'fp32')}"
    how += f", tile {options.get('tile', 'auto')}" + ", ensemble" * bool(options.get("ensemble"))
    network = nearest.rpartition(" x")[0]
    return Weights(path, network, not differing, upscaler, _digest(checkpoint.weights), how)


def _measure(weights: Weights, paths: Sequence[Path]) -> tuple[float, float, float | None]:
    """Enlarge LR, and return PSNR in dB and SSIM by both definitions against HR."""
    hr, lr = (read_8_bits(path, least=1).pixels[..., ::-1].copy() for path in paths)
    try:
        compared = compare_images(weights.upscaler(lr), hr, weights.scale)
        return compared.psnr().item(), compared.ssim().item(), _uniform_ssim(compared)
    except ValueError as error:
        raise UserError(f"{paths[1]}: {error}") from error


def _measure_set(
    weights: Weights, dataset: str, folder: Path, file: Path, records: Records
) -> Iterator[Measured]:
    """Yield each image of a test set as measured; those that are new go into records and file."""
    for name in _images(folder):
        paths = [folder / part / f"{name}.png" for part in _PARTS]
        hr, lr = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
        measured = records.get((dataset, name, weights.digest, hr, lr, weights.how))
        if measured is None:
            measured = Measured(
                *(weights.network, weights.scale, dataset, name),
                *_measure(weights, paths),
                *(weights.digest, hr, lr, weights.how),
            )
            records[measured.conditions] = measured
            _write_records(file, records)
        yield measured


def fill(cell: Cell, measured: Sequence[Measured]) -> Cell:
    """Fill a cell with the means over a test set, identical images left out of PSNR."""
    finite = [each.psnr for each in measured if math.isfinite(each.psnr)]
    uniform = [each.ssim_uniform for each in measured]
    return replace(
        cell,
        psnr=fmean(finite) if finite else math.inf,
        ssim=fmean(each.ssim for each in measured),
        ssim_uniform=None if None in uniform else fmean(uniform),
        images=len(measured),
        identical=len(measured) - len(finite),
    )


def _cells_without_weights(cells: Sequence[Cell], datasets: Sequence[str]) -> list[Cell]:
    given = {(cell.network, cell.scale) for cell in cells}
    missing = "no weights of {} x{} are given; --weights FILE measures them"
    empty = [
        Cell(network, scale, name, missing=missing.format(network, scale))
        for network, scale in PUBLISHED
        if network.startswith("DLGSANet") and (network, scale) not in given
        for name in datasets
    ]
    return [cell for cell in empty if cell.published]


@dataclass(frozen=True)
class Reproduction:
    """The table."""

    cells: Sequence[Cell]  # network by network, scale by scale, set by set
    sets: Mapping[str, Mapping[str, str]]  # SHA-256 of HR and LR, by set and scale ("Set5 x4")
    tolerance: float  # in dB, up to which a cell counts as reproduced
    how: Mapping[str, str]  # as in Measured, by file


def reproduce(
    weights: Sequence[Weights],
    folder: Path,
    out: Path,
    *,
    datasets: Sequence[str] = DATASETS,
    tolerance: float = 0.05,
    progress: Callable[[int], Callable[[], object]] = lambda total: lambda: None,
) -> Reproduction:
    """Measure the cells of the paper's table; write nothing but `out`/images.csv.

    Args:
        weights: As `load` returns them.
        folder: Holds test sets as `dlgsanet data benchmark` makes them.
        out: Folder of images.csv, which makes a second call continue where the first was cut off.
        datasets: Names of test sets, the columns.
        tolerance: In dB. Published figures are rounded to 0.01, and libraries differ by less; two
            trainings of the authors differ by up to 0.2.
        progress: Takes the number of images, and returns what is called for each.

    Raises:
        UserError: An image cannot be measured, or `out` cannot be written.
    """
    with disk_faults_named(f"{out} cannot be made"):
        out.mkdir(parents=True, exist_ok=True)
    records = read_records(out / IMAGES)
    wanted = [(each, name) for each in weights for name in datasets]
    sets = {(name, each.scale): folder / name / f"X{each.scale}" for each, name in wanted}
    faults = {key: _fault(*key, path) for key, path in sets.items()}
    counts = {key: 0 if faults[key] else len(_images(path)) for key, path in sets.items()}
    step = progress(sum(counts[name, each.scale] for each, name in wanted))
    cells = []
    for each, name in wanted:
        cell = Cell(each.network, each.scale, name, str(each.path), each.is_published)
        path, fault = sets[name, each.scale], faults[name, each.scale]
        if fault:
            cells.append(replace(cell, missing=fault))
            continue
        measured = []
        for image in _measure_set(each, name, path, out / IMAGES, records):
            measured.append(image)
            step()
        cells.append(fill(cell, measured))
    cells += _cells_without_weights(cells, datasets)
    order = list(PUBLISHED)
    cells.sort(key=lambda cell: order.index((cell.network, cell.scale)))  # stable
    hashes = {
        f"{name} x{scale}": {part: folder_sha256(path / part) for part in _PARTS}
        for (name, scale), path in sets.items()
        if not faults[name, scale]
    }
    return Reproduction(cells, hashes, tolerance, {str(each.path): each.how for each in weights})


def _pair(pair: tuple[float, float] | None, sign: str = "") -> str:
    return "–" if pair is None else f"{pair[0]:{sign}.2f} / {pair[1]:{sign}.4f}"


HEADINGS = ("network", "set", "published", "re-trained", "measured", "difference", "verdict")


def _line(cell: Cell, tolerance: float) -> list[str]:
    ours = None if cell.psnr is None or cell.ssim is None else (cell.psnr, cell.ssim)
    star = "" if cell.is_published else "*"
    note = f" ({cell.identical} identical left out)" if cell.identical else ""
    return [
        f"{cell.network} x{cell.scale}{star}",
        cell.dataset,
        _pair(cell.published),
        _pair(cell.retrained),
        _pair(ours) + note,
        _pair(cell.difference, "+"),
        cell.verdict(tolerance),
    ]


def _notes(result: Reproduction) -> list[str]:
    """Say what the scores are, in sentences."""
    notes = [
        "PSNR in dB / SSIM of the Y channel (BT.601) of 8-bit images, a border of `scale` pixels "
        "cut off.",
        f"SSIM: {SSIM_BASICSR}.",
        f"A cell counts as reproduced if its PSNR is within {result.tolerance:g} dB of the "
        "published one. 're-trained' is the authors' own second training.",
    ]
    if any(not cell.is_published for cell in result.cells):
        notes.append("*: weights of another configuration, beside the nearest published one.")
    return notes


def markdown(result: Reproduction, *, only_measured: bool = False) -> str:
    """Write the table, the other SSIM, the sets' hashes and what is missing as Markdown."""
    cells = [cell for cell in result.cells if cell.psnr is not None or not only_measured]
    lines = [list(HEADINGS), ["---"] * len(HEADINGS)]
    lines += [_line(cell, result.tolerance) for cell in cells]
    text = ["\n".join(_notes(result)), "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    lists = {
        f"SSIM by the other common definition, {SSIM_UNIFORM}:": [
            f"{cell.network} x{cell.scale} on {cell.dataset}: {cell.ssim_uniform:.4f}"
            for cell in cells
            if cell.ssim_uniform is not None
        ],
        "SHA-256 over names and pixels of the test sets:": [
            f"{name} {part}: `{digest}`"
            for name, parts in result.sets.items()
            for part, digest in parts.items()
        ],
        "Missing:": dict.fromkeys(cell.missing for cell in cells if cell.missing),
    }
    for title, items in lists.items():
        if items:
            text += [title, "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(text) + "\n"


_LATEX = str.maketrans({"_": r"\_", "&": r"\&", "%": r"\%", "#": r"\#", "–": "--"})


def latex(result: Reproduction) -> str:
    """Write the measured and the published cells as a LaTeX table (booktabs)."""
    lines = [_line(cell, result.tolerance)[:-1] for cell in result.cells]
    body = [" & ".join(each.translate(_LATEX) for each in line) + r" \\" for line in lines]
    head = " & ".join(HEADINGS[:-1]) + r" \\"
    columns = "ll" + "c" * (len(HEADINGS) - 3)
    text = [*(f"% {note}" for note in _notes(result)), rf"\begin{{tabular}}{{{columns}}}"]
    text += [r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(text)


def record(result: Reproduction) -> dict[str, Any]:
    """Return everything, for JSON."""
    return {
        "protocol": " ".join(_notes(result)),
        "ssim": SSIM_BASICSR,
        "ssim_uniform": SSIM_UNIFORM,
        "tolerance_db": result.tolerance,
        "how": result.how,
        "sets": result.sets,
        "cells": [
            {
                **asdict(cell),
                **{name: getattr(cell, name) for name in ("published", "retrained", "difference")},
                "verdict": cell.verdict(result.tolerance),
            }
            for cell in result.cells
        ],
    }


def write(result: Reproduction, out: Path, *, only_measured: bool = False) -> list[Path]:
    """Write table.md, table.tex and table.json into a folder, and return their paths.

    Raises:
        UserError: They cannot be written.
    """
    texts = {
        "table.md": markdown(result, only_measured=only_measured),
        "table.tex": latex(result),
        "table.json": json.dumps(record(result), indent=1, allow_nan=True) + "\n",
    }
    with disk_faults_named(f"{out} cannot be written"):
        for name, text in texts.items():
            write_atomically(out / name, text.encode())
    return [out / name for name in texts]
