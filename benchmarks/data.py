"""Pictures a second: bicubic, writing a training set, and reading patches from it by BasicSR.

The pictures have DIV2K's size, 2040x1356, and are laid out of photographs: those in the folder
that --photographs names, else the colour photographs in scikit-image's wheel.
"""

import argparse
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import measuring
import numpy as np
import torch
from measuring import Cell, Record, Section, Setting
from numpy.typing import NDArray

from dlgsanet_arch.data import demo
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.databases import open_database
from dlgsanet_arch.data.finding import find_images
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.data.making import crop_to_multiple
from dlgsanet_arch.data.training_sets import Cutting, build, database_name, find_sources

SIZE = (1356, 2040)
QUICK_SIZE = (240, 300)
PICTURES = 8
WRITTEN = 16  # fewer would not give four workers work
WORKERS = (1, 2, 4)
BATCH = 16
SCALE = 4
PATCH = 48  # LR pixels

OURS = "ours"
IMRESIZE = "BasicSR's imresize"
PILLOW = "Pillow (not MATLAB's)"
OPENCV = "OpenCV (not MATLAB's)"

DATABASE = "LMDB of sub-images"
SUB_IMAGES = "PNG files of the same sub-images"
WHOLE = "PNG files of whole pictures"


@functools.cache
def _photographs(folder: str | None) -> list[NDArray[np.uint8]]:
    if folder is None:
        names = (*demo.TRAIN_IMAGES, *demo.VALIDATION_IMAGES)
        paths = [demo.images_folder() / name for name in names]
    else:
        paths = list(find_images(Path(folder)).values())[: 9 * PICTURES]
    return [read_8_bits(path).pixels for path in paths]


def picture(cell: Cell, index: int) -> NDArray[np.uint8]:
    """Lay a picture out of 3x3 photographs, each repeated to fill its place."""
    height, width = cell["size"]
    photographs = _photographs(cell["photographs"])
    result = np.empty((height, width, 3), np.uint8)
    for place in range(9):
        top, left = place // 3 * height // 3, place % 3 * width // 3
        bottom, right = (place // 3 + 1) * height // 3, (place % 3 + 1) * width // 3
        photograph = photographs[(9 * index + place) % len(photographs)]
        rows = np.arange(bottom - top) % photograph.shape[0]
        columns = np.arange(right - left) % photograph.shape[1]
        result[top:bottom, left:right] = photograph[np.ix_(rows, columns)]
    return result


def _resizer(contestant: str, scale: int) -> Callable[[NDArray[np.uint8]], object]:
    def pillow(hr: NDArray[np.uint8]) -> object:
        from PIL import Image

        size = hr.shape[1] // scale, hr.shape[0] // scale
        return Image.fromarray(hr).resize(size, Image.Resampling.BICUBIC)

    def basicsr(hr: NDArray[np.uint8]) -> object:
        from basicsr.utils.matlab_functions import imresize

        return (imresize(hr.astype(np.float32) / 255, 1 / scale) * 255).round()

    return {
        OURS: lambda hr: bicubic(hr, 1 / scale),
        IMRESIZE: basicsr,
        PILLOW: pillow,
        OPENCV: lambda hr: cv2.resize(
            hr, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_CUBIC
        ),
    }[contestant]


def reduce(cell: Cell, setting: Setting) -> Record:
    """Time bicubic on one thread, as each worker has one."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    hr = crop_to_multiple(picture(cell, 0), 12)
    resize = _resizer(cell["contestant"], cell["scale"])
    return {**measuring.measure(lambda: lambda: resize(hr), setting), "items": 1}


def _save_pictures(cell: Cell, folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        assert cv2.imwrite(str(folder / f"{index:04d}.png"), picture(cell, index))


def _cutting(cell: Cell) -> Cutting:
    return Cutting(96, 48, 24) if cell["size"] == QUICK_SIZE else Cutting()


def write(cell: Cell, setting: Setting) -> Record:
    """Time `datasets/prepare.py train` with all scales, processes' start included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save_pictures(cell, folder / "HR", cell["pictures"])
        sources = find_sources(folder / "HR", None, [2, 3, 4])

        def run() -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            build(
                sources, [2, 3, 4], folder / "out", cutting=_cutting(cell), workers=cell["workers"]
            )

        measured = measuring.measure(lambda: run, setting, warm_ups=0)
    return {**measured, "items": cell["pictures"]}


def _pairs(cell: Cell, folder: Path) -> dict[str, str]:
    """Write the pictures in the form that the cell names; return BasicSR's options for them."""
    _save_pictures(cell, folder / "HR", cell["pictures"])
    if cell["contestant"] == WHOLE:
        (folder / "LR").mkdir()
        for path in (folder / "HR").iterdir():
            hr = crop_to_multiple(read_8_bits(path).pixels, SCALE)
            assert cv2.imwrite(str(path), hr)
            assert cv2.imwrite(str(folder / "LR" / path.name), bicubic(hr, 1 / SCALE))
        roots = (folder / "HR", folder / "LR")
    else:
        build(find_sources(folder / "HR", None, [SCALE]), [SCALE], folder, cutting=_cutting(cell))
        roots = (folder / database_name(1), folder / database_name(SCALE))
        if cell["contestant"] == SUB_IMAGES:
            databases, roots = roots, tuple(root.with_suffix("") for root in roots)
            for database, root in zip(databases, roots, strict=True):
                root.mkdir()
                with open_database(database) as environment, environment.begin() as read:
                    for key, data in read.cursor():
                        (root / f"{key.decode()}.png").write_bytes(data)
    return {"dataroot_gt": str(roots[0]), "dataroot_lq": str(roots[1])}


def read(cell: Cell, setting: Setting) -> Record:
    """Time an epoch of BasicSR's PairedImageDataset, workers' start not included."""
    from basicsr.data.paired_image_dataset import PairedImageDataset

    with tempfile.TemporaryDirectory() as name:
        patch = 12 if cell["size"] == QUICK_SIZE else PATCH
        data_set = PairedImageDataset(
            {
                **_pairs(cell, Path(name)),
                "io_backend": {"type": "lmdb" if cell["contestant"] == DATABASE else "disk"},
                "phase": "train",
                "scale": SCALE,
                "gt_size": patch * SCALE,
                "use_hflip": True,
                "use_rot": True,
            }
        )
        sampler = torch.utils.data.RandomSampler(
            data_set, replacement=True, num_samples=BATCH * cell["batches"]
        )
        loader = torch.utils.data.DataLoader(
            data_set, BATCH, sampler=sampler, num_workers=cell["workers"], persistent_workers=True
        )

        def run() -> None:
            for _ in loader:
                pass

        # The warm-up starts the workers, which open the database.
        measured = measuring.measure(lambda: run, setting)
    return {**measured, "items": BATCH * cell["batches"]}


WORKS = {
    "data:reduce": "bicubic to 1/{scale}, 1 thread",
    "data:write": "pictures into LMDBs of HR, x2, x3, x4",
    "data:read": "patches of {patch} LR pixels, x4",
}


def _rows(record: Record, records: list[Record]) -> list[list[str]]:
    cell = record["cell"]
    seconds = measuring.median(record)
    kind = cell["measure"], cell.get("scale")
    first = next(r for r in records if (r["cell"]["measure"], r["cell"].get("scale")) == kind)
    rate = record.get("items", 0) / seconds
    base = first.get("items", 0) / measuring.median(first)
    row = [
        WORKS[cell["measure"]].format(scale=cell.get("scale"), patch=PATCH),
        cell["contestant"],
        str(cell.get("workers", "–")),
        measuring.times(rate, ".3g"),
        measuring.times(rate / base),
        *measuring.milliseconds(record),
    ]
    return [row]


def _sections(asked: argparse.Namespace) -> list[Section]:
    photographs = asked.photographs and str(asked.photographs.resolve())
    size = QUICK_SIZE if asked.quick else SIZE
    common = {"photographs": photographs, "size": size}
    cells: list[Cell] = [
        {"measure": "data:reduce", "contestant": contestant, "scale": scale, **common}
        for scale in (2, 3, 4)
        for contestant in (OURS, IMRESIZE, PILLOW, OPENCV)
    ]
    written = {"pictures": 1 if asked.quick else WRITTEN}
    read = {"pictures": 1 if asked.quick else PICTURES, "batches": 1 if asked.quick else 40}
    works = [("data:write", OURS, written)]
    works += [("data:read", name, read) for name in (DATABASE, SUB_IMAGES, WHOLE)]
    cells += [
        {"measure": measure, "contestant": contestant, "workers": number, **sizes, **common}
        for measure, contestant, sizes in works
        for number in ((1,) if asked.quick else WORKERS)
    ]
    return [
        Section(
            name="data",
            title="Data",
            cells=cells,
            columns="work | contestant | workers | items a second | x first of its kind | median ms"
            " | range ms",
            rows=_rows,
            notes=lambda records: [
                f"Pictures of {size[1]}x{size[0]} pixels laid out of photographs; "
                f"{os.cpu_count()} cores, files in the temporary folder and in the page cache.",
                "An item is a picture, in the last rows a pair of patches; a median is the time "
                "of one picture in the first rows, of all in the others.",
            ],
            runs=5,
            rounds=1,
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--photographs", type=Path, metavar="FOLDER", help="photographs to lay pictures out of"
    )
    return measuring.run(_sections, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
