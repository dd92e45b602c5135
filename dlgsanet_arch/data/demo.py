"""A small data set for super-resolution from the photographs inside scikit-image's wheel.

No download: the pictures are read from the installed package's folder. What is written, below
the folder given to `prepare`:

    train_HR_sub.lmdb, train_LR_bicubic_X2_sub.lmdb    sub-images, equal keys
    val/X2/HR/<name>.png, val/X2/LR/<name>.png         whole pictures, equal names
    recipe.json                                        what the files above were made from
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
from basicsr.utils.lmdb_util import LmdbMaker
from numpy.typing import NDArray

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.errors import UserError

# The two motorcycle pictures are one scene seen by a stereo camera: they stay on one side. The
# retina is left out: bicubic restores it to 49 dB, so half the patches would teach nothing.
TRAIN_PICTURES = (
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
VALIDATION_PICTURES = ("astronaut.png", "chelsea.png", "coffee.png")

# One HR database serves the scales 2, 3 and 4 when its pictures and corners are multiples of 12.
HR_MULTIPLE = 12
SUB_IMAGE = 120
SUB_IMAGE_STEP = 60
PNG_COMPRESSION = 1

Picture = NDArray[np.uint8]


def crop_to_multiple(picture: Picture, multiple: int) -> Picture:
    """Cut rows and columns off the bottom and the right so that `multiple` divides both sides."""
    height, width = (side - side % multiple for side in picture.shape[:2])
    return picture[:height, :width]


def starts(length: int, size: int, step: int) -> list[int]:
    """Where windows of `size` start along `length`: every `step`, the last flush with the end."""
    if length <= size:
        return [0]
    regular = list(range(0, length - size + 1, step))
    return regular if regular[-1] == length - size else [*regular, length - size]


def sub_images(hr: Picture, lr: Picture, scale: int) -> Iterator[tuple[Picture, Picture]]:
    """Cut a pair of pictures into overlapping pairs.

    Args:
        hr: (H, W, 3), both sides multiples of `HR_MULTIPLE`.
        lr: (H/scale, W/scale, 3).
        scale: 2, 3 or 4.

    Yields:
        HR and LR of the same place.
    """
    for top in starts(hr.shape[0], SUB_IMAGE, SUB_IMAGE_STEP):
        for left in starts(hr.shape[1], SUB_IMAGE, SUB_IMAGE_STEP):
            hr_part = hr[top : top + SUB_IMAGE, left : left + SUB_IMAGE]
            lr_rows = slice(top // scale, (top + SUB_IMAGE) // scale)
            lr_columns = slice(left // scale, (left + SUB_IMAGE) // scale)
            yield hr_part, lr[lr_rows, lr_columns]


def pictures_folder() -> Path:
    """The folder of photographs inside the installed scikit-image.

    Raises:
        UserError: scikit-image is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the demo's photographs come from scikit-image's wheel, which is not installed; "
            "run: pip install scikit-image"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _read(path: Path) -> Picture:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise UserError(
            f"cannot read the photograph {path}; it is part of scikit-image's wheel: "
            "pip install --force-reinstall scikit-image"
        )
    return picture


def _encode(picture: Picture) -> bytes:
    fine, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION])
    if not fine:
        raise RuntimeError(f"OpenCV could not encode a picture of {picture.shape=}")
    return data.tobytes()


def _write_lmdb(path: Path, pictures: Mapping[str, Picture]) -> None:
    encoded = {key: _encode(picture) for key, picture in pictures.items()}
    # BasicSR's default map of 1 TiB is refused where address space is limited; LMDB's own pages
    # need some room beside the data.
    room = 2 * sum(map(len, encoded.values())) + 2**24
    maker = LmdbMaker(str(path), map_size=room, compress_level=PNG_COMPRESSION)
    with closing(maker):
        for key, data in encoded.items():
            maker.put(data, key, pictures[key].shape)


def _write_training(folder: Path, source: Path, names: Sequence[str], scale: int) -> int:
    hr_pictures, lr_pictures = {}, {}
    for name in names:
        hr = crop_to_multiple(_read(source / name), HR_MULTIPLE)
        lr = bicubic(hr, 1 / scale)
        for index, (hr_part, lr_part) in enumerate(sub_images(hr, lr, scale), start=1):
            key = f"{Path(name).stem}_s{index:03d}"
            hr_pictures[key], lr_pictures[key] = hr_part, lr_part
    _write_lmdb(folder / "train_HR_sub.lmdb", hr_pictures)
    _write_lmdb(folder / f"train_LR_bicubic_X{scale}_sub.lmdb", lr_pictures)
    return len(hr_pictures)


def _write_validation(folder: Path, source: Path, names: Sequence[str], scale: int) -> None:
    for part in ("HR", "LR"):
        (folder / "val" / f"X{scale}" / part).mkdir(parents=True)
    for name in names:
        hr = crop_to_multiple(_read(source / name), scale)
        for part, picture in (("HR", hr), ("LR", bicubic(hr, 1 / scale))):
            path = folder / "val" / f"X{scale}" / part / f"{Path(name).stem}.png"
            path.write_bytes(_encode(picture))


def _recipe(scale: int, train: Sequence[str], validation: Sequence[str]) -> dict[str, Any]:
    return {
        "scale": scale,
        "train": list(train),
        "validation": list(validation),
        "sub_image": [SUB_IMAGE, SUB_IMAGE_STEP],
    }


def _lmdb_entries(path: Path) -> int:
    # lock=False: only the count is read, nobody writes a finished database
    with lmdb.open(str(path), readonly=True, lock=False, create=False) as database:
        return database.stat()["entries"]


def is_complete(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether `folder` holds every file of a preparation by this recipe.

    Args:
        folder: The data set's folder; need not exist.
        recipe: As `prepare` writes it, without the number of sub-images.
    """
    try:
        written = json.loads((folder / "recipe.json").read_text())
        count = written.pop("sub_images")
        scale = recipe["scale"]
        databases = ("train_HR_sub.lmdb", f"train_LR_bicubic_X{scale}_sub.lmdb")
        counts = {_lmdb_entries(folder / name) for name in databases}
    except (OSError, ValueError, KeyError, AttributeError, lmdb.Error):
        return False
    pictures = [f"{Path(name).stem}.png" for name in recipe["validation"]]
    parts = [folder / "val" / f"X{scale}" / part for part in ("HR", "LR")]
    return (
        written == recipe
        and counts == {count}
        and all((part / name).is_file() for part in parts for name in pictures)
    )


def prepare(
    folder: Path,
    *,
    scale: int = 2,
    source: Path | None = None,
    train: Sequence[str] = TRAIN_PICTURES,
    validation: Sequence[str] = VALIDATION_PICTURES,
) -> bool:
    """Build the demo's data set, or find that it is there already.

    Everything is written to a folder beside and renamed at the end, so a preparation that was
    interrupted never counts as done; the next one starts over.

    Args:
        folder: Where the data set goes, such as ``datasets/demo``.
        scale: 2, 3 or 4: HR side over LR side.
        source: Folder of the photographs; scikit-image's own when None.
        train: File names in `source` to train on.
        validation: File names in `source` to validate on.

    Returns:
        True when the data set was built, False when a complete one was reused.

    Raises:
        UserError: A photograph is missing, or `folder` holds something that this function did
            not write.
        ValueError: `scale` is not 2, 3 or 4, or a photograph is on both sides.
    """
    if scale not in (2, 3, 4):
        raise ValueError(f"scale must be 2, 3 or 4, got {scale=}")
    both = sorted(set(train) & set(validation))
    if both:
        raise ValueError(f"to train on and to validate on at once: {', '.join(both)}")
    recipe = _recipe(scale, train, validation)
    if is_complete(folder, recipe):
        return False
    if folder.exists() and any(folder.iterdir()) and not (folder / "recipe.json").is_file():
        raise UserError(
            f"{folder} exists and was not made by this command: it has no recipe.json; "
            "move it away, then run the command again"
        )
    source = pictures_folder() if source is None else source
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    count = _write_training(unfinished, source, train, scale)
    _write_validation(unfinished, source, validation, scale)
    text = json.dumps({**recipe, "sub_images": count}, indent=2)
    (unfinished / "recipe.json").write_text(text + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(unfinished, folder)
    return True
