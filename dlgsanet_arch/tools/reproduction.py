"""The paper's table, measured: each cell beside what is published.

PSNR and SSIM are of the Y channel (BT.601, 8-bit images), a border of `scale` pixels cut off, as
the paper has them and BasicSR computes them. Images that were measured before are not computed
again: what is known of each stands in images.csv, with the hashes of weights and images.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dlgsanet_arch import metrics
from dlgsanet_arch.checkpoint import Checkpoint, nearest_published, read_checkpoint
from dlgsanet_arch.data.benchmark import folder_sha256
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, write_atomically
from dlgsanet_arch.inference import Upscaler
from dlgsanet_arch.tools.published import DATASETS, PUBLISHED, RETRAINED

IMAGES = "images.csv"
# SSIM has two definitions that people mix; the first is BasicSR's, and the paper's.
SSIM_BASICSR = "11x11 Gaussian windows inside the image (BasicSR)"
SSIM_UNIFORM = "7x7 uniform windows, sample covariance (scikit-image's default)"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """One image, enlarged and measured.

    Attributes:
        network: Published name of the weights' network, or the nearest.
        scale: Of the network.
        dataset: Name of the test set.
        image: Its name, without suffix.
        psnr: In dB, inf for identical images.
        ssim: By SSIM_BASICSR.
        ssim_uniform: By SSIM_UNIFORM; None without scikit-image.
        weights: SHA-256 over the weights.
        hr: SHA-256 of the file of HR.
        lr: SHA-256 of the file of LR.
        how: Tiles, ensemble, precision and kind of device.
    """

    network: str
    scale: int
    dataset: str
    image: str
    psnr: float
    ssim: float
    ssim_uniform: float | None
    weights: str
    hr: str
    lr: str
    how: str

    @property
    def known_by(self) -> tuple[str, ...]:
        """What must be the same for the figures to hold."""
        return (self.dataset, self.image, self.weights, self.hr, self.lr, self.how)


@dataclass(frozen=True)
class Cell:
    """A network on a test set.

    Attributes:
        network: "DLGSANet Tiny".
        scale: Its scale.
        dataset: The test set.
        weights: The file that was measured; empty where there is none.
        is_published: Whether the weights' network is that one; else it is the nearest.
        psnr: Mean in dB of the images that are not identical, None where nothing was measured.
        ssim: Mean by SSIM_BASICSR.
        ssim_uniform: Mean by SSIM_UNIFORM.
        images: How many were measured.
        identical: How many of them equal HR, and are not in the mean PSNR.
        missing: What would fill an empty cell.
    """

    network: str
    scale: int
    dataset: str
    weights: str = ""
    is_published: bool = True
    psnr: float | None = None
    ssim: float | None = None
    ssim_uniform: float | None = None
    images: int = 0
    identical: int = 0
    missing: str = ""

    @property
    def published(self) -> tuple[float, float] | None:
        """PSNR and SSIM of the paper."""
        figures = PUBLISHED.get((self.network, self.scale))
        if figures is None or self.dataset not in figures.ssim:
            return None
        return figures.psnr[self.dataset], figures.ssim[self.dataset]

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


@dataclass(frozen=True)
class BenchmarkSet:
    """A test set at a scale, below <folder>/<name>/X<scale>/{HR,LR}.

    Attributes:
        name: Its name.
        scale: HR side over LR side.
        folder: Holds HR and LR.
    """

    name: str
    scale: int
    folder: Path

    def fault(self) -> str:
        """Say why it cannot be measured on; empty where it can."""
        command = (
            f"dlgsanet data benchmark --name {self.name} --hr FOLDER --scale {self.scale} makes it"
        )
        if not self.folder.is_dir():
            return f"there is no {self.folder}; {command}"
        names = [{path.stem for path in (self.folder / part).glob("*.png")} for part in _PARTS]
        if not names[0]:
            return f"{self.folder / 'HR'} has no PNG images; {command}"
        if names[0] != names[1]:
            odd = sorted(names[0] ^ names[1])
            return f"{self.folder}: {odd[0]} is in one of HR and LR alone; {command}"
        return ""

    def images(self) -> list[str]:
        """Return the names of its images, without suffix."""
        return sorted(path.stem for path in (self.folder / "HR").glob("*.png"))

    def sha256(self) -> dict[str, str]:
        """Return `folder_sha256` of HR and LR, as `dlgsanet data benchmark` prints it."""
        return {part: folder_sha256(self.folder / part) for part in _PARTS}


_PARTS = ("HR", "LR")


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of weights, whatever file they are from."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _tensor(path: Path) -> Tensor:
    """Read an image as (1, 3, H, W) RGB in [0, 1]."""
    pixels = torch.from_numpy(read_8_bits(path, least=1).pixels[..., ::-1].copy())
    return pixels.permute(2, 0, 1)[None].float() / 255


def _uniform_ssim(compared: metrics.Compared) -> float | None:
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    planes = [each[0, 0].cpu().double().numpy() for each in (compared.output, compared.target)]
    if min(planes[0].shape) < 7:
        return None
    return float(structural_similarity(*planes, data_range=255))


def measure(output: Tensor, hr: Tensor, scale: int) -> tuple[float, float, float | None]:
    """Return PSNR in dB, and SSIM by both definitions, of (1, 3, H, W) RGB in [0, 1].

    Raises:
        UserError: The sizes differ, or too little is left inside the border.
    """
    try:
        compared = metrics.compare(output, hr, crop_border=scale, y_channel=True)
        return compared.psnr().item(), compared.ssim().item(), _uniform_ssim(compared)
    except ValueError as error:
        raise UserError(str(error)) from error


class Records:
    """The measured images, kept in a CSV file that is complete at any time.

    Args:
        path: The file; rows of other weights stay in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, ...], Measured] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    figures = {name: float(row[name]) for name in ("psnr", "ssim")}
                    uniform = float(row["ssim_uniform"]) if row["ssim_uniform"] else None
                    known = Measured(
                        **{
                            **{each.name: row[each.name] for each in fields(Measured)},
                            **figures,
                            "scale": int(row["scale"]),
                            "ssim_uniform": uniform,
                        }
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f"{self.path} is not a file of this verb's ({error!r}); remove it, or give "
                        "another folder by -o"
                    ) from error
                self._rows[known.known_by] = known

    def find(self, known_by: tuple[str, ...]) -> Measured | None:
        """Return what was measured of an image under the same conditions."""
        return self._rows.get(known_by)

    def add(self, measured: Measured) -> None:
        """Keep one more image, on the disk."""
        self._rows[measured.known_by] = measured
        text = io.StringIO()
        writer = csv.DictWriter(text, [each.name for each in fields(Measured)])
        writer.writeheader()
        writer.writerows(asdict(each) for each in self._rows.values())
        with disk_faults_named(f"{self.path} cannot be written"):
            write_atomically(self.path, text.getvalue().encode())


@dataclass(frozen=True)
class Weights:
    """Weights that are measured.

    Attributes:
        path: Their file.
        network: "DLGSANet Tiny", without the scale: its own name, or the nearest published.
        is_published: Whether it is the published configuration.
        upscaler: The network.
        digest: SHA-256 over them.
        how: How it computes.
    """

    path: Path
    network: str
    is_published: bool
    upscaler: Upscaler
    digest: str
    how: str

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
    checkpoint: Checkpoint = read_checkpoint(path, param_key)
    nearest, differing = nearest_published(checkpoint.config)
    upscaler = Upscaler(checkpoint, **options)
    how = ", ".join(
        [
            upscaler.device.type,
            str(options.get("dtype", "fp32")),
            f"tile {options.get('tile', 'auto')}",
            *(["ensemble"] if options.get("ensemble") else []),
        ]
    )
    network = nearest.rpartition(" x")[0]
    return Weights(path, network, not differing, upscaler, _digest(checkpoint.weights), how)


def _measure_set(
    weights: Weights, found: BenchmarkSet, records: Records, progress: Callable[[], None]
) -> Iterator[Measured]:
    for name in found.images():
        paths = [found.folder / part / f"{name}.png" for part in _PARTS]
        hr_hash, lr_hash = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
        known_by = (found.name, name, weights.digest, hr_hash, lr_hash, weights.how)
        measured = records.find(known_by)
        if measured is None:
            hr, lr = map(_tensor, paths)
            try:
                figures = measure(weights.upscaler(lr).cpu(), hr, weights.scale)
            except UserError as error:
                raise UserError(f"{paths[1]}: {error}") from error
            measured = Measured(
                weights.network,
                weights.scale,
                found.name,
                name,
                *figures,
                weights.digest,
                hr_hash,
                lr_hash,
                weights.how,
            )
            records.add(measured)
        progress()
        yield measured


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _filled(weights: Weights, name: str, measured: Sequence[Measured]) -> Cell:
    finite = [each.psnr for each in measured if math.isfinite(each.psnr)]
    return Cell(
        weights.network,
        weights.scale,
        name,
        str(weights.path),
        weights.is_published,
        fmean(finite) if finite else math.inf,
        _mean([each.ssim for each in measured]),
        _mean([each.ssim_uniform for each in measured]),
        len(measured),
        len(measured) - len(finite),
    )


@dataclass(frozen=True)
class Reproduction:
    """The table.

    Attributes:
        cells: Network by network, scale by scale, set by set.
        sets: SHA-256 of HR and LR, by test set and scale ("Set5 x4").
        tolerance: In dB, up to which a cell counts as reproduced.
        how: How the networks computed, by file.
    """

    cells: tuple[Cell, ...]
    sets: Mapping[str, Mapping[str, str]]
    tolerance: float
    how: Mapping[str, str]


def reproduce(
    weights: Sequence[Weights],
    folder: Path,
    out: Path,
    *,
    datasets: Sequence[str] = DATASETS,
    tolerance: float = 0.05,
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> Reproduction:
    """Measure what is there of the paper's table; write nothing but `out`/images.csv.

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
    records = Records(out / IMAGES)
    sets = {
        (name, each.scale): BenchmarkSet(name, each.scale, folder / name / f"X{each.scale}")
        for each in weights
        for name in datasets
    }
    faults = {key: found.fault() for key, found in sets.items()}
    usable = [
        (each, sets[name, each.scale])
        for each in weights
        for name in datasets
        if not faults[name, each.scale]
    ]
    step = progress(sum(len(found.images()) for _, found in usable))
    done = {
        (each.path, found.name): _filled(
            each, found.name, list(_measure_set(each, found, records, step))
        )
        for each, found in usable
    }
    cells = []
    for each in weights:
        for name in datasets:
            empty = Cell(
                each.network,
                each.scale,
                name,
                str(each.path),
                each.is_published,
                missing=faults[name, each.scale],
            )
            cells.append(done.get((each.path, name), empty))
    rows = {(each.network, each.scale) for each in weights}
    for network, scale in PUBLISHED:
        if network.startswith("DLGSANet") and (network, scale) not in rows:
            for name in datasets:
                missing = (
                    f"no weights of {network} x{scale} are given; --weights FILE measures them"
                )
                cell = Cell(network, scale, name, missing=missing)
                if cell.published:
                    cells.append(cell)
    order = [*PUBLISHED]
    cells.sort(key=lambda cell: order.index((cell.network, cell.scale)))  # stable
    hashes = {
        f"{name} x{scale}": found.sha256()
        for (name, scale), found in sets.items()
        if not faults[name, scale]
    }
    return Reproduction(
        tuple(cells), hashes, tolerance, {str(each.path): each.how for each in weights}
    )


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
    """Say what the figures are, in sentences."""
    notes = [
        "PSNR in dB / SSIM of the Y channel (BT.601) of 8-bit images, a border of `scale` pixels "
        "cut off.",
        f"SSIM: {SSIM_BASICSR}.",
        f"A cell is reproduced where its PSNR is within {result.tolerance:g} dB of the published "
        "one. 're-trained' is what the paper's authors got when they trained again.",
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
    others = [cell for cell in cells if cell.ssim_uniform is not None]
    if others:
        text.append(
            f"SSIM by the other usual definition, {SSIM_UNIFORM}:\n\n"
            + "\n".join(
                f"- {cell.network} x{cell.scale} on {cell.dataset}: {cell.ssim_uniform:.4f}"
                for cell in others
            )
        )
    if result.sets:
        text.append(
            "SHA-256 over names and pixels of the test sets:\n\n"
            + "\n".join(
                f"- {name} {part}: `{digest}`"
                for name, parts in result.sets.items()
                for part, digest in parts.items()
            )
        )
    missing = [] if only_measured else list(dict.fromkeys(c.missing for c in cells if c.missing))
    if missing:
        text.append("Missing:\n\n" + "\n".join(f"- {each}" for each in missing))
    return "\n\n".join(text) + "\n"


_LATEX = str.maketrans({"_": r"\_", "&": r"\&", "%": r"\%", "#": r"\#", "–": "--"})


def latex(result: Reproduction) -> str:
    """Write the measured and the published cells as a LaTeX table (booktabs)."""
    lines = [_line(cell, result.tolerance)[:-1] for cell in result.cells]
    body = [" & ".join(each.translate(_LATEX) for each in line) + r" \\" for line in lines]
    head = " & ".join(HEADINGS[:-1]) + r" \\"
    return "\n".join(
        [
            *(f"% {note}" for note in _notes(result)),
            r"\begin{tabular}{ll" + "c" * (len(HEADINGS) - 3) + "}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"),
            "",
        ]
    )


def record(result: Reproduction) -> dict[str, Any]:
    """Return all there is, for JSON."""
    return {
        "protocol": " ".join(_notes(result)),
        "ssim": SSIM_BASICSR,
        "ssim_uniform": SSIM_UNIFORM,
        "tolerance_db": result.tolerance,
        "how": dict(result.how),
        "sets": {name: dict(parts) for name, parts in result.sets.items()},
        "cells": [
            {
                **asdict(cell),
                "published": cell.published,
                "retrained": cell.retrained,
                "difference": cell.difference,
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
