"""Whether what a run writes can be written, and has room."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlgsanet_arch.options import Context, Registered
from dlgsanet_arch.options.context import is_number
from dlgsanet_arch.pipeline import weights

_BYTES = 4  # of a value, in float32
_ADAM_STATES = 2  # values of an optimizer's state for each of the network's
_BYTES_A_TENSOR = 400  # of a file, beside the tensor's values
_FEWEST_PAIRS = 2  # there must be room for: the old one stays until the new one is complete
_GIGABYTE = 1e9


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _folder_problem(folder: Path) -> str:
    """Say why nothing can be written below a folder that may not be there yet, or nothing."""
    there = _nearest_existing(folder)
    if not there.is_dir():
        return f"{there} is not a folder, but {folder} is to be written; rename it"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to, but {folder} is to be; choose another --root"
    return ""


def _pair_size(context: Context) -> int:
    """Return the bytes of a saved pair, all networks and the state, as far as it can be told."""
    average = context.section("train").get("ema_decay", 0)
    size = 0
    for key in context.networks():
        network = weights.build(context, key)
        if network is not None:
            copies = 2 if key == "network_g" and is_number(average) and average > 0 else 1
            size += _BYTES * (network.values * copies + network.trained * _ADAM_STATES)
            size += _BYTES_A_TENSOR * len(network.shapes) * (copies + _ADAM_STATES)
    return size


def check_disk(
    options: Mapping[str, Any], root: Path, *, train: bool, registered: Registered | None = None
) -> tuple[list[str], list[str]]:
    """Look whether what a run writes can be written, and has room.

    Args:
        options: Checked options.
        root: Folder of `experiments` and `results`.
        train: Whether they are to train, else to test.
        registered: What is in BasicSR's registries; None looks there.

    Returns:
        Problems and warnings, one a line.
    """
    run = root / ("experiments" if train else "results") / options["name"]
    problem = _folder_problem(run)
    if problem or not train:
        return [problem] if problem else [], []
    context = Context(options, train, root, registered or weights.registered_networks())
    size = _pair_size(context)
    logger, total = context.section("logger"), context.section("train")["total_iter"]
    saved = max(1, int(total // logger["save_checkpoint_freq"]))
    count = min(saved, logger.get("keep_last") or saved) + 1  # and what the end or the best leaves
    free = shutil.disk_usage(_nearest_existing(run)).free
    gigabytes = f"{run} has {free / _GIGABYTE:.3g} GB free, and a checkpoint of weights and state "
    gigabytes += f"takes about {size / _GIGABYTE:.3g} GB"
    if free < _FEWEST_PAIRS * size:
        needed = _FEWEST_PAIRS * size / _GIGABYTE
        return [f"logger: {gigabytes}: make room for at least two, {needed:.3g} GB"], []
    if free < count * size:
        return [], [
            f"logger:keep_last: {gigabytes}, {count * size / _GIGABYTE:.3g} GB for {count}; they "
            "will not all fit: write a number to keep, or save less often"
        ]
    return [], []
