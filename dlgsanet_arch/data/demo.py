"""A small data set for super-resolution from the photographs inside scikit-image's wheel.

No download: the images are read from the installed package's folder. What is written, below
the folder given to `prepare`:

    train_HR_sub.lmdb, train_LR_bicubic_X4_sub.lmdb    sub-images, equal keys
    val/X4/HR/<name>.png, val/X4/LR/<name>.png         whole images, equal names
"""

from importlib.util import find_spec
from pathlib import Path

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.images import ImageError, read_8_bits
from dlgsanet_arch.data.making import Source, crop_to_multiple, encode_png
from dlgsanet_arch.data.training_sets import Cutting, Summary, build
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, write_atomically

# The two motorcycle images are one scene seen by a stereo camera: they stay on one side. The
# retina is left out: bicubic restores it to 49 dB, so half the patches would teach nothing.
TRAIN_IMAGES = (
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
VALIDATION_IMAGES = ("astronaut.png", "chelsea.png", "coffee.png")

SCALE = 4
CUTTING = Cutting(crop=120, step=60, patch=24)


def images_folder() -> Path:
    """The folder of photographs inside the installed scikit-image; UserError without that."""
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the demo's photographs come from scikit-image's wheel, which is not installed; "
            "run: pip install scikit-image"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _write_validation(folder: Path) -> None:
    """Write the pairs to validate on, whatever was there; a few images take no time."""
    for name in VALIDATION_IMAGES:
        hr = crop_to_multiple(read_8_bits(images_folder() / name).pixels, SCALE)
        for part, image in (("HR", hr), ("LR", bicubic(hr, 1 / SCALE))):
            path = folder / "val" / f"X{SCALE}" / part / f"{Path(name).stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, encode_png(image))


def prepare(folder: Path, *, workers: int = 1) -> Summary:
    """Build what is missing of the demo's data set in a folder, such as ``datasets/demo``.

    UserError if a photograph is missing, or `folder` holds databases that were not made here.
    """
    sources = [Source(Path(name).stem, images_folder() / name) for name in TRAIN_IMAGES]
    summary = build(sources, [SCALE], folder, cutting=CUTTING, workers=workers, overwrite=True)
    try:
        with disk_faults_named(f"{folder} cannot be written"):
            _write_validation(folder)
    except ImageError as error:
        raise UserError(f"{error}; the photographs are part of scikit-image's wheel") from error
    return summary
