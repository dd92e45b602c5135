"""Whether the weights that a run starts from are whole, and of the network it asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlgsanet_arch.checkpoint import CheckpointError, check_compatible, read_weights
from dlgsanet_arch.network import DLGSANet

# Where BasicSR keeps weights, by what each kind of run wants first.
_KEYS_TO_TRAIN = ("params", "params_ema")
_KEYS_TO_TEST = ("params_ema", "params")


def _is_dlgsanet(options: Mapping[str, Any]) -> bool:
    return options["network_g"]["type"] == "DLGSANet"


def _check_fits(weights: Mapping[str, Tensor], options: Mapping[str, Any], file: Path) -> None:
    if not _is_dlgsanet(options):
        return
    try:
        check_compatible(weights, options["network_g"])
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_fits_partly(
    weights: Mapping[str, Tensor], options: Mapping[str, Any], file: Path
) -> None:
    """With `strict_load_g: false` BasicSR skips what does not fit, be it everything."""
    if not _is_dlgsanet(options):
        return
    arguments = {name: value for name, value in options["network_g"].items() if name != "type"}
    with torch.device("meta"):
        network = DLGSANet(**arguments)
    sizes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if not any(sizes.get(name) == tensor.shape for name, tensor in weights.items()):
        raise CheckpointError(
            f"{file}: none of its {len(weights)} tensors fits network_g; with path:strict_load_g "
            "false BasicSR would go on with random weights"
        )


def check_start_weights(options: Mapping[str, Any], root: Path, *, train: bool) -> list[str]:
    """Check the weights that `path:pretrain_network_g` names, if it names any.

    Args:
        options: Checked options.
        root: Folder that relative paths are below.
        train: Whether they are to be trained further, else tested.

    Returns:
        Entries for BasicSR's ``--force_yml``. Where the options do not say which key of the file
        holds the weights, BasicSR always takes `params`; a test then takes the averaged weights
        `params_ema` where there are any, as the training's own validation does.

    Raises:
        CheckpointError: The file is no whole checkpoint, has not the key that the options name,
            or holds weights of another configuration.
    """
    paths = options["path"]
    if paths.get("pretrain_network_g") is None:
        return []
    file = root / Path(paths["pretrain_network_g"]).expanduser()
    key = paths.get("param_key_g")
    weights = read_weights(file, key)
    check = _check_fits if paths.get("strict_load_g", True) else _check_fits_partly
    check(weights, options, file)
    content = torch.load(file, map_location="cpu", weights_only=True)
    keys = _KEYS_TO_TRAIN if train else _KEYS_TO_TEST
    there = next((name for name in keys if name in content), None)
    if train and there is None and options["train"].get("ema_decay", 0) > 0:
        raise CheckpointError(
            f"{file} has neither the key params nor params_ema, one of which BasicSR needs to "
            "start the averaged weights of train:ema_decay; save the state dict under params"
        )
    return [] if "param_key_g" in paths else [f"path:param_key_g={there or 'none'}"]


def check_resumed_weights(file: Path, options: Mapping[str, Any]) -> None:
    """Check the weights that belong to the state that a run goes on from.

    Args:
        file: ``net_g_<iteration>.pth``.
        options: Checked options.

    Raises:
        CheckpointError: The file is no whole checkpoint, or the options' network is another one
            than the run was started with.
    """
    _check_fits(read_weights(file, "params"), options, file)
