"""The folders, LMDBs, lists and weights that an option file names must be there."""

import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dlgsanet_arch.options.context import Context
from dlgsanet_arch.options.schema import known_dataset

_ROLES = {"train": "training", "val": "validation", "test": "test"}
_CONTENTS = {"dataroot_gt": "HR", "dataroot_lq": "LR"}
_IMAGE_SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_VGG_OF_BASICSR = Path("experiments/pretrained_models/vgg19-dcbb9e9d.pth")  # of the current folder


def _folder_fault(folder: Path, listed: bool) -> str:
    """Say what keeps `folder` from being a folder of images, or return nothing."""
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is not a folder"
    if (folder / "data.mdb").exists():
        return "is an LMDB: write `io_backend: {type: lmdb}`"
    if not listed and not any(each.suffix.lower() in _IMAGE_SUFFIXES for each in folder.iterdir()):
        return "holds no images (sub-folders are not searched)"
    return ""


def _lmdb_fault(folder: Path) -> str:
    """Say what keeps `folder` from being an LMDB as BasicSR reads it, or return nothing."""
    if folder.suffix != ".lmdb":
        return "is not an LMDB by its name, which must end in .lmdb; for images write `type: disk`"
    if not folder.exists():
        return "does not exist"
    for name in ("data.mdb", "meta_info.txt"):
        if not _has_content(folder / name):
            return f"has no {name}, or an empty one"
    return ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has NUL within
        return False


def _has_content(path: Path) -> bool:
    return _is_file(path) and path.stat().st_size > 0


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
            in_lmdb = backend == "lmdb"
            fault = _lmdb_fault(folder) if in_lmdb else _folder_fault(folder, listing is not None)
        except (OSError, ValueError) as error:  # ValueError: NUL within
            fault = f"cannot be read ({getattr(error, 'strerror', error)})"
        if fault:
            yield (
                f"datasets:{phase}:{key}: the {_CONTENTS[key]} images of {owner(phase, dataset)}: "
                f"{folder} {fault}; correct the path, or get the data as datasets/README.md says"
            )


def _images(context: Context) -> Iterator[str]:
    """Training and test sets must be there, with something in them."""
    for phase, dataset in context.datasets():
        yield from data_faults(context, phase, dataset)


def _weights(context: Context) -> Iterator[str]:
    """Files to start from must be there; a resumed run takes its weights from its own folder."""
    paths = context.section("path")
    resumed = context.train and paths.get("resume_state")
    keys = ["resume_state"] if resumed else [key for key in paths if "pretrain_network" in key]
    for key in keys:
        find = context.resolve if key == "resume_state" else context.weights
        if paths[key] and not _is_file(file := find(paths[key])):
            fix = "correct the path"
            if not context.train:
                fix += " (training writes weights to experiments/<name>/models)"
            yield f"path:{key}: {file} does not exist; {fix}"


def _vgg(context: Context) -> Iterator[str]:
    """BasicSR downloads the weights of VGG where they are not on the disk."""
    section, torchvision = context.section("train:perceptual_opt"), sys.modules.get("torchvision")
    kind = str(section.get("vgg_type", "vgg19"))
    if not context.train or section.get("type") != "PerceptualLoss" or torchvision is None:
        return
    if kind not in torchvision.models.list_models():
        return  # a wrong type, which is reported
    url = torchvision.models.get_model_weights(kind)["IMAGENET1K_V1"].url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not (_is_file(_VGG_OF_BASICSR) or _is_file(cached) or _answers(url)):
        yield (
            f"train:perceptual_opt: needs {cached.name}, and {url} does not answer; download that "
            f"file elsewhere and put it at {cached}"
        )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            return True
    except (OSError, ValueError):
        return False


CHECKS = (_images, _weights, _vgg)
