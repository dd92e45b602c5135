"""The folders, LMDBs, lists and weights that an option file names must be there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlgsanet_arch.options.context import Context
from dlgsanet_arch.options.schema import known_dataset

_ROLES = {"train": "training", "val": "validation", "test": "test"}
_CONTENTS = {"dataroot_gt": "HR", "dataroot_lq": "LR"}
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _folder_fault(folder: Path, in_lmdb: bool, listed: bool) -> str:
    """Say what keeps `folder` from being an LMDB, or a folder of images; or return nothing."""
    if in_lmdb and folder.suffix != ".lmdb":
        return "is not an LMDB by its name, which must end in .lmdb; for images write `type: disk`"
    if not folder.is_dir():
        return "is not a folder" if folder.exists() else "does not exist"
    if in_lmdb:
        lacks = [each for each in ("data.mdb", "meta_info.txt") if not _has_content(folder / each)]
        return f"has no {lacks[0]}, or an empty one" if lacks else ""
    if (folder / "data.mdb").exists():
        return "is an LMDB: write `io_backend: {type: lmdb}`"
    if not listed and not any(each.suffix.lower() in _IMAGE_SUFFIXES for each in folder.iterdir()):
        return "holds no images (sub-folders are not searched)"
    return ""


def _has_content(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except (OSError, ValueError):  # a name that is too long, or has NUL within
        return False


def owner(phase: str, dataset: Mapping[str, Any]) -> str:
    """Name a data set for messages: "the validation set Set5"."""
    return f"the {_ROLES.get(phase.split('_')[0], phase)} set {dataset.get('name')}"


def data_faults(context: Context, phase: str, dataset: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the places that the images of a data set are read from."""
    reads = known_dataset(context, dataset.get("type"))
    backend = context.value(f"datasets:{phase}:io_backend:type")
    if reads is None or backend not in ("disk", "lmdb"):
        return
    listing = dataset.get(reads.listing) if backend == "disk" and reads.listing else None
    if listing is not None and not _has_content(file := context.resolve(listing)):
        what = f"datasets:{phase}:{reads.listing}: the list of {owner(phase, dataset)}"
        yield f"{what}: {file} does not exist or is empty; correct the path"
    for key in reads.folders:
        if dataset.get(key) is None:
            continue
        folder = context.resolve(dataset[key])
        try:
            fault = _folder_fault(folder, backend == "lmdb", listing is not None)
        except (OSError, ValueError) as error:  # ValueError: NUL within
            fault = f"cannot be read ({getattr(error, 'strerror', error)})"
        if fault:
            yield (
                f"datasets:{phase}:{key}: the {_CONTENTS[key]} images of {owner(phase, dataset)}: "
                f"{folder} {fault}; correct the path, or get the data as datasets/README.md says"
            )


def missing_files(context: Context) -> Iterator[str]:
    """Yield what is wrong with the data sets, and with the files of weights and states.

    A resumed run takes its weights from its own folder.
    """
    for phase, dataset in context.datasets():
        yield from data_faults(context, phase, dataset)
    paths = context.section("path")
    resumed = context.train and paths.get("resume_state")
    for key in ["resume_state"] if resumed else [key for key in paths if "pretrain_network" in key]:
        find = context.resolve if key == "resume_state" else context.weights
        if paths[key] and not _has_content(file := find(paths[key])):
            yield (
                f"path:{key}: {file} does not exist or is empty; correct the path (training "
                "writes weights to experiments/<name>/models)"
            )
