"""The paper's table, measured: each cell next to what is published.

PSNR and SSIM are of the Y channel (BT.601, 8-bit images), a border of `scale` pixels cut off, as in
the paper and in BasicSR. images.csv records the scores of each image with the hashes of weights and
images, so that no image is measured twice.
"""

import csv
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch.checkpoint import nearest_published, read_checkpoint
from dlgsanet_arch.data.benchmark import folder_sha256
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, write_atomically
from dlgsanet_arch.inference import Upscaler
from dlgsanet_arch.progress import progress_bar
from dlgsanet_arch.tools.figure import compare_images
from dlgsanet_arch.tools.published import DATASETS, PUBLISHED, RETRAINED

IMAGES = "images.csv"
_PARTS = ("HR", "LR")
_PROTOCOL = (
    "PSNR in dB / SSIM (11x11 Gaussian windows inside the image, as in BasicSR) of the Y channel "
    "(BT.601) of 8-bit images, a border of `scale` pixels cut off. A cell counts as reproduced if "
    "its PSNR is within {:g} dB of the published one. 're-trained' is the authors' own second "
    "training. *: weights of another configuration, next to the nearest published one."
)
# The columns of images.csv: where the image stands, its scores (PSNR in dB, inf for identical
# images), and what must be the same for the scores to hold: SHA-256 of weights and files; kind of
# device, precision, tiles, ensemble.
_CONDITIONS = ("dataset", "image", "weights", "hr", "lr", "how")
_COLUMNS = ("network", "scale", "dataset", "image", "psnr", "ssim", *_CONDITIONS[2:])

Scores = dict[str, float]
Records = dict[tuple[str, ...], dict[str, Any]]  # rows by conditions
Cell = dict[str, Any]  # as in table.json
Table = dict[str, Any]  # table.json


def _read_records(path: Path) -> Records:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        for row in rows:
            row |= {"psnr": float(row["psnr"]), "ssim": float(row["ssim"])}
        return {tuple(row[name] for name in _CONDITIONS): row for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by this verb ({error!r}); remove it, or give another "
            "folder by -o"
        ) from error


def _write_records(path: Path, records: Records) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records.values())
    with disk_faults_named(f"{path} cannot be written"):
        write_atomically(path, text.getvalue().encode())


class Weights(NamedTuple):
    """Weights to be measured, and the row of the table that they belong to."""

    path: Path
    network: str  # "DLGSANet Tiny": its own name, or the nearest published
    scale: int
    is_published: bool  # whether it is the published configuration
    upscaler: Upscaler
    digest: str  # SHA-256 over them
    how: str  # as in images.csv


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of weights, whatever file they are from."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def load(path: Path, *, param_key: str | None = None, **options: Any) -> Weights:
    """Read weights, and find the row of the table that they belong to.

    `path` and `param_key` are those of `read_checkpoint`, the options `Upscaler`'s: device, dtype,
    tile, ensemble.
    """
    checkpoint = read_checkpoint(path, param_key)
    nearest, differing = nearest_published(checkpoint.config)
    upscaler = Upscaler(checkpoint, **options)
    how = f"{upscaler.device.type}, {options.get('dtype', 'fp32')}"
    how += f", tile {options.get('tile', 'auto')}" + ", ensemble" * bool(options.get("ensemble"))
    network, digest = nearest.rpartition(" x")[0], _digest(checkpoint.weights)
    return Weights(path, network, checkpoint.scale, not differing, upscaler, digest, how)


def _test_set(name: str, scale: int, folder: Path) -> tuple[list[str], str]:
    """Return the names of a test set's images; or none, and why it cannot be measured on."""
    hr, lr = (sorted(path.stem for path in (folder / part).glob("*.png")) for part in _PARTS)
    if hr and hr == lr:
        return hr, ""
    fault = f"{folder / 'HR'} has no PNG images"
    if hr:
        fault = f"{folder}: {min({*hr} ^ {*lr})} is in one of HR and LR alone"
    command = f"dlgsanet data benchmark --name {name} --hr FOLDER --scale {scale}"
    return [], f"{fault}; {command} makes it"


def _measure(
    weights: Weights, dataset: str, folder: Path, name: str, file: Path, records: Records
) -> Scores:
    """Return the row of an image of a test set; a new one goes into records and file."""
    paths = [folder / part / f"{name}.png" for part in _PARTS]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    conditions = (dataset, name, weights.digest, *digests, weights.how)
    if conditions not in records:
        hr, lr = (read_8_bits(path, least=1).pixels[..., ::-1].copy() for path in paths)
        try:
            compared = compare_images(weights.upscaler(lr), hr, weights.scale)
            scores = compared.psnr().item(), compared.ssim().item()
        except ValueError as error:
            raise UserError(f"{paths[1]}: {error}") from error
        row = (weights.network, weights.scale, dataset, name, *scores, *conditions[2:])
        records[conditions] = dict(zip(_COLUMNS, row, strict=True))
        _write_records(file, records)
    return records[conditions]


def make_cell(
    network: str,
    scale: int,
    dataset: str,
    measured: Sequence[Scores] = (),
    tolerance: float = 0.05,
    **more: Any,
) -> Cell:
    """Make a cell of the table out of the images of a test set.

    Identical images are left out of the mean PSNR. The verdict is "missing", "nothing published",
    "reproduced" where PSNR is within `tolerance` dB of the published one, else "below" or "above".
    """
    published = PUBLISHED[network, scale].scores.get(dataset)
    psnr, ssim, difference, verdict = None, None, None, "missing"
    finite = [each["psnr"] for each in measured if math.isfinite(each["psnr"])]
    if measured:
        psnr = fmean(finite) if finite else math.inf
        ssim = fmean(each["ssim"] for each in measured)
        verdict = "nothing published"
    if measured and published:
        difference = psnr - published[0], ssim - published[1]
        apart = "below" if difference[0] < 0 else "above"
        verdict = "reproduced" if abs(difference[0]) <= tolerance else apart
    return {
        **{"network": network, "scale": scale, "dataset": dataset, "weights": ""},
        **{"is_published": True, "psnr": psnr, "ssim": ssim, "missing": ""},
        **{"images": len(measured), "identical": len(measured) - len(finite)},
        "published": published,
        "retrained": RETRAINED.get((network, scale), {}).get(dataset),
        "difference": difference,
        "verdict": verdict,
        **more,
    }


def reproduce(
    weights: Sequence[Weights],
    folder: Path,
    out: Path,
    *,
    datasets: Sequence[str] = DATASETS,
    tolerance: float = 0.05,
) -> Table:
    """Measure the cells of the paper's table; write nothing but `out`/images.csv.

    Args:
        weights: As `load` returns them.
        folder: Holds test sets as `dlgsanet data benchmark` makes them.
        out: Folder of images.csv, with which a second call continues an interrupted one.
        datasets: Names of test sets, the columns.
        tolerance: In dB. Published figures are rounded to 0.01, and libraries differ by less; two
            trainings of the authors differ by up to 0.2.

    Returns:
        The content of table.json.

    Raises:
        UserError: An image cannot be measured, or `out` cannot be written.
    """
    with disk_faults_named(f"{out} cannot be made"):
        out.mkdir(parents=True, exist_ok=True)
    records = _read_records(out / IMAGES)
    wanted = [
        (each, name, folder / name / f"X{each.scale}") for each in weights for name in datasets
    ]
    sets = {path: _test_set(name, each.scale, path) for each, name, path in wanted}
    cells = []
    with progress_bar("reproduce", sum(len(sets[path][0]) for *_, path in wanted), "image") as bar:
        for each, name, path in wanted:
            images, missing = sets[path]
            measured = []
            for image in images:
                measured.append(_measure(each, name, path, image, out / IMAGES, records))
                bar.update()
            more = {"weights": str(each.path), "is_published": each.is_published}
            cell = make_cell(each.network, each.scale, name, measured, tolerance, **more)
            cells.append(cell | {"missing": missing})
    given = {(each.network, each.scale) for each in weights}
    for network in PUBLISHED.keys() - given:
        missing = "no weights of {} x{} are given; --weights FILE measures them".format(*network)
        empty = [make_cell(*network, name, missing=missing) for name in datasets]
        cells += [cell for cell in empty if cell["published"]]
    cells.sort(key=lambda cell: [*PUBLISHED].index((cell["network"], cell["scale"])))  # stable
    return {
        "protocol": _PROTOCOL.format(tolerance),
        "tolerance_db": tolerance,
        "how": {str(each.path): each.how for each in weights},
        "sets": {
            f"{name} x{each.scale}": {part: folder_sha256(path / part) for part in _PARTS}
            for each, name, path in wanted
            if sets[path][0]
        },
        "cells": cells,
    }


def _pair(pair: Sequence[float] | None, sign: str = "") -> str:
    return f"{pair[0]:{sign}.2f} / {pair[1]:{sign}.4f}" if pair else "–"


def _line(cell: Cell) -> list[str]:
    measured = None if cell["psnr"] is None else (cell["psnr"], cell["ssim"])
    note = f" ({cell['identical']} identical left out)" if cell["identical"] else ""
    return [
        f"{cell['network']} x{cell['scale']}" + "*" * (not cell["is_published"]),
        cell["dataset"],
        _pair(cell["published"]),
        _pair(cell["retrained"]),
        _pair(measured) + note,
        _pair(cell["difference"], "+"),
        cell["verdict"],
    ]


def markdown(table: Table, *, only_measured: bool = False) -> str:
    """Write the table, the sets' hashes and what is missing as Markdown."""
    cells = [cell for cell in table["cells"] if cell["psnr"] is not None or not only_measured]
    head = ["network", "set", "published", "re-trained", "measured", "difference", "verdict"]
    lines = [head, ["---"] * len(head), *map(_line, cells)]
    text = [table["protocol"], "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    digests = [
        f"{name} {part}: `{digest}`"
        for name, parts in table["sets"].items()
        for part, digest in parts.items()
    ]
    missing = dict.fromkeys(cell["missing"] for cell in cells if cell["missing"])
    for title, items in (
        ("SHA-256 over names and pixels of the test sets:", digests),
        ("Missing:", missing),
    ):
        if items:
            text += [title, "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(text) + "\n"
