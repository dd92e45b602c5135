"""Whether what a run writes can be written, and has room."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlgsanet_arch.averaging import bare
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline.adapter import networks_of

_BYTES = 4  # of a value, in float32
_ADAM_STATES = 2  # values of an optimizer's state for each of the network's
_BYTES_A_TENSOR = 400  # of a file, beside the tensor's values
_FEWEST_PAIRS = 2  # there must be room for: the old one stays until the new one is complete


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_folder(folder: Path) -> None:
    """Check that a folder, which may not be there yet, can be written to.

    Raises:
        UserError: It cannot.
    """
    there = _nearest_existing(folder)
    if not there.is_dir():
        raise UserError(f"{there} is not a folder, but {folder} is to be written; rename it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{there} cannot be written to, but {folder} is to be; choose another --root"
        )


def _pair_size(model: Any) -> int:
    """Return about how many bytes a saved pair has: all networks, and the state."""
    size = 0
    for network in networks_of(model).values():
        tensors = bare(network).state_dict().values()
        size += sum(_BYTES * tensor.numel() + _BYTES_A_TENSOR for tensor in tensors)
    for optimizer in model.optimizers:
        trained = [each for group in optimizer.param_groups for each in group["params"]]
        size += _ADAM_STATES * sum(_BYTES * each.numel() + _BYTES_A_TENSOR for each in trained)
    return size


def room_warning(model: Any, opt: Mapping[str, Any]) -> str:
    """Return a warning where a run's checkpoints will not all fit on the disk, or "".

    Raises:
        UserError: The disk cannot hold two.
    """
    run, logger = Path(opt["path"]["experiments_root"]), opt["logger"]
    size = _pair_size(model)
    saved = max(1, int(opt["train"]["total_iter"] // logger["save_checkpoint_freq"]))
    count = min(saved, logger.get("keep_last") or saved) + 1  # and what the end or the best leaves
    free = shutil.disk_usage(_nearest_existing(run)).free
    text = (
        f"{run} has {free / 1e9:.3g} GB free, and a checkpoint of weights and state takes about "
        f"{size / 1e9:.3g} GB"
    )
    if free < _FEWEST_PAIRS * size:
        needed = _FEWEST_PAIRS * size / 1e9
        raise UserError(f"logger: {text}: make room for at least two, {needed:.3g} GB")
    if free < count * size:
        return (
            f"logger:keep_last: {text}, {count * size / 1e9:.3g} GB for {count}; they will not all "
            "fit: write a number to keep, or save less often"
        )
    return ""
