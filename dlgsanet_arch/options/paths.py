"""The folders, LMDBs, lists and weights that an option file names must be there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlgsanet_arch.options.context import Context
from dlgsanet_arch.options.schema import known_dataset

_ROLES = {"train": "training", "val": "validation", "test": "test"}
_CONTENTS = {"dataroot_gt": "HR", "dataroot_lq": "LR"}
_IMAGE_SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_HOW_TO_GET_DATA = "correct the path, or get the data as datasets/README.md says"


def _folder_fault(folder: Path) -> str:
    """Say what keeps `folder` from being a folder of images, or return nothing."""
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is not a folder"
    if (folder / "data.mdb").exists():
        return "is an LMDB: write `io_backend: {type: lmdb}`"
    if not any(entry.suffix.lower() in _IMAGE_SUFFIXES for entry in folder.iterdir()):
        return "holds no images (sub-folders are not searched)"
    return ""


def _lmdb_fault(folder: Path) -> str:
    """Say what keeps `folder` from being an LMDB as BasicSR reads it, or return nothing."""
    if folder.suffix != ".lmdb":
        return "is not an LMDB by its name, which must end in .lmdb; for images write `type: disk`"
    if not folder.exists():
        return "does not exist"
    for name in ("data.mdb", "meta_info.txt"):
        if not (folder / name).is_file():
            return f"has no {name}"
        if not (folder / name).stat().st_size:
            return f"is empty: its {name} has no content"
    return ""


def _list_fault(listing: Path) -> str:
    """Say what keeps `listing` from being a list of images' names, or return nothing."""
    if not listing.is_file():
        return "does not exist"
    return "" if listing.stat().st_size else "is empty"


def owner(phase: str, dataset: Mapping[str, Any]) -> str:
    """Name a data set for messages: "the validation set Set5"."""
    return f"the {_ROLES.get(phase.split('_')[0], phase)} set {dataset.get('name')}"


def data_faults(context: Context, phase: str, dataset: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the places that a data set's images are read from.

    Args:
        context: The options.
        phase: Of the data set.
        dataset: Its section.
    """
    reads = known_dataset(context, dataset.get("type"))
    backend = context.section(f"datasets:{phase}:io_backend").get("type")
    if reads is None or backend not in ("disk", "lmdb"):
        return
    listed = backend == "disk" and reads.listing and dataset.get(reads.listing) is not None
    if listed:
        listing = context.resolve(dataset[reads.listing])
        if fault := _list_fault(listing):
            what = f"datasets:{phase}:{reads.listing}: the list of {owner(phase, dataset)}"
            yield f"{what}: {listing} {fault}; correct the path"
    single = backend == "disk" and dataset.get("type") == "SingleImageDataset"
    if single and dataset.get("meta_info_file", "") is None:
        yield f"datasets:{phase}:meta_info_file: SingleImageDataset fails on ~; leave it out"
    for key in reads.folders:
        if dataset.get(key) is None:
            continue
        folder = context.resolve(dataset[key])
        try:
            if backend == "lmdb":
                fault = _lmdb_fault(folder)
            elif listed:
                fault = "" if folder.is_dir() else "is not a folder"
            else:
                fault = _folder_fault(folder)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            what = f"the {_CONTENTS[key]} images of {owner(phase, dataset)}"
            yield f"datasets:{phase}:{key}: {what}: {folder} {fault}; {_HOW_TO_GET_DATA}"


def _images(context: Context) -> Iterator[str]:
    """Training and test sets must be there, with something in them."""
    for phase, dataset in context.datasets():
        yield from data_faults(context, phase, dataset)


def _weights(context: Context) -> Iterator[str]:
    """Files to start from must be there; a resumed run takes its weights from its own folder."""
    paths = context.section("path")
    resumed = context.train and paths.get("resume_state")
    keys = ["resume_state"] if resumed else [key for key in paths if "pretrain_network" in str(key)]
    for key in keys:
        if paths[key] and not (file := context.resolve(paths[key])).is_file():
            fix = "correct the path"
            if not context.train:
                fix += " (training writes weights to experiments/<name>/models)"
            yield f"path:{key}: there is no file {file}; {fix}"


CHECKS = (_images, _weights)
