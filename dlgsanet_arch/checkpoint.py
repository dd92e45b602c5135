"""Files of weights: found by path or name, read, checked, written, averaged.

`.pth` and `.safetensors` are distinguished by their content. Code in a file is never run, and what
a file claims to hold is compared with its size before anything is built from it.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgsanet_arch.configs import (  # noqa: F401 - a way to them
    ANCHOR,
    DEFAULTS,
    LARGEST_SCALE,
    TLC_KERNELS,
    check_compatible,
    described,
    infer_config,
    name_of,
    nearest_published,
    published_configs,
)
from dlgsanet_arch.hints import named, shown, suggest_or_list
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.storage import (
    CheckpointError,
    check_complete,  # noqa: F401
    is_safetensors,
    read_complete,
    read_safetensors,
    save_complete,
    write_safetensors,
)

# Where trainers keep weights: BasicSR's averaged ones first, then its own, then others'.
WEIGHT_KEYS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net_g")
# What wrappers put before all names: DataParallel and DDP, compilers, modules of trainers.
_PREFIXES = ("module.", "_orig_mod.", "net_g.", "model.")
_ARCHITECTURE = "DLGSANet"  # as stated with the configuration
# What is stored with weights and is not a note; "format" is the library's own.
_NOT_NOTES = ("architecture", "config", "iteration", "checksum", "format")
_NOT_WRITTEN = (*_NOT_NOTES, "params", "params_ema")


def bundled_weights() -> dict[str, Path]:
    """Return the files of weights that come with the package by name, such as "tiny_x4"."""
    folder = Path(str(resources.files("dlgsanet_arch"))) / "weights"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find_weights(weights: Path | str) -> Path:
    """Return the file that a path or the name of bundled weights means; paths come first."""
    path, known = Path(weights), bundled_weights()
    if os.path.isfile(path):  # pathlib raises where a name is too long
        return path
    if os.path.lexists(path):
        raise CheckpointError(f"the weights {path} cannot be read: it is not a file")
    if str(weights) in known:
        return known[str(weights)]
    hint = "" if path.suffix else suggest_or_list(weights, known)
    raise CheckpointError(f"the weights {path} cannot be read: No such file{hint}")


def _is_state_dict(content: object) -> bool:
    return (isinstance(content, Mapping) and bool(content)) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _state_dict_in(content: Any, path: Path, param_key: str | None) -> Mapping[str, Tensor]:
    """Find the state dict in what a file holds; see `read_weights`."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a network's weights (a state dict)"
        )
    if param_key is None:
        param_key = next((key for key in WEIGHT_KEYS if key in content), None)
    weights = content if param_key is None else content.get(param_key)
    if _is_state_dict(weights):
        return weights
    keys = [key for key in content if isinstance(key, str)]
    contents = "it has no keys"
    if keys:
        contents = (
            f"it has the keys {named(keys, 6)}; name the one with the weights, as by --param-key"
        )
    if _is_state_dict(content):
        contents = "it is a bare state dict; write `param_key_g: ~`, or leave out --param-key"
    elif "optimizers" in content:
        contents = "it is a training state; the weights are beside it in models/"
    where = f" under {param_key!r}" if param_key else ""
    raise CheckpointError(f"{path} has no weights{where}: {contents}")


def _check_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse kinds of tensors that hold no plain numbers, and sizes that the file cannot hold."""
    for name, tensor in weights.items():
        kinds = {"quantised": tensor.is_quantized, "meta": tensor.is_meta}
        kinds |= {"nested": tensor.is_nested, "negated": tensor.is_neg()}
        layout = str(tensor.layout).removeprefix("torch.")
        kind = next((kind for kind, holds in kinds.items() if holds), layout)
        if kind != "strided":
            raise CheckpointError(f"{path}: {name} is a {kind} tensor; save it as a plain one")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if claimed > 2 * path.stat().st_size:  # some layers share a tensor, which is in the file once
        raise CheckpointError(
            f"{path} claims {claimed:,} bytes of weights and is a file of {path.stat().st_size:,}"
        )


def _bare(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Take off what wrappers put before the names, and what they keep with the network."""
    bare = {name.replace("_orig_mod.", ""): each for name, each in weights.items()}
    anchors = [name.removesuffix(ANCHOR) for name in bare if name.endswith(f".{ANCHOR}")]
    if len(anchors) > 1 and ANCHOR not in bare:
        raise CheckpointError(
            f"{path} holds several networks ({named(anchors)}): save the weights of one alone"
        )
    if anchors and ANCHOR not in bare:
        inside = {name: each for name, each in bare.items() if name.startswith(anchors[0])}
        return {name.removeprefix(anchors[0]): each for name, each in inside.items()}
    bare.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel's
    while bare and any(all(name.startswith(each) for name in bare) for each in _PREFIXES):
        bare = {name.partition(".")[2]: each for name, each in bare.items()}
    return bare


def _read(path: Path, param_key: str | None) -> tuple[dict[str, Tensor], Mapping[Any, Any]]:
    """Read a state dict, and what else is in the file."""
    if is_safetensors(path):
        weights, extra = read_safetensors(path)
    else:
        extra, _ = read_complete(path)
        weights = _state_dict_in(extra, path, param_key)
    _check_tensors(weights, path)
    return _bare(weights, path), extra


def read_weights(path: Path | str, param_key: str | None = None) -> dict[str, Tensor]:
    """Read a network's state dict, on the CPU and without the prefixes that wrappers put to names.

    Args:
        path: The name of bundled weights, a `.safetensors` file, or one of torch.save: state dicts
            under `params_ema` or `params`, as BasicSR writes them, or under the keys of other
            trainers, or a bare state dict.
        param_key: The key that holds the weights; without effect on `.safetensors`. None takes
            the first of `WEIGHT_KEYS` that is there, else the file as a bare state dict.

    Raises:
        CheckpointError: The file cannot be read, is damaged or not a checkpoint, holds objects
            other than tensors, or has no weights under `param_key` (the keys are listed).
    """
    return _read(find_weights(path), param_key)[0]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network's weights and what is known about them.

    DLGSANet(**config) takes the weights with strict=True. Where the file does not state the
    configuration, it is detected from the weights, and what these do not show is as published.
    """

    weights: Mapping[str, Tensor]  # on the CPU
    config: Mapping[str, Any]
    is_stated: bool = False  # whether the configuration was in the file
    iteration: int | None = None  # how many it was trained for
    notes: Mapping[str, str] = field(default_factory=dict)  # such as its licence

    @property
    def scale(self) -> int:
        """How many times larger the sides become."""
        return self.config["upscale"] if self.config["upsampler"] else 1

    @property
    def name(self) -> str:
        """The published variant and scale where it is one, such as "DLGSANet Tiny x4"."""
        return name_of(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def network(self) -> DLGSANet:
        """Build the network with these weights, on the CPU in eval mode."""
        network = DLGSANet(**self.config)
        network.load_state_dict(self.weights, strict=True)
        return network.eval()


def _complete(
    weights: Mapping[str, Tensor], extra: Mapping[Any, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Complete a configuration by the file's own and by the weights, and compare it with them.

    Returns it, and whether the file states one; those of other programs do not.
    """
    stated = extra.get("config") if extra.get("architecture") == _ARCHITECTURE else {}
    with suppress(ValueError, RecursionError):
        stated = json.loads(stated) if isinstance(stated, str) else stated
    if not isinstance(stated, dict):
        raise CheckpointError("its configuration is not a JSON object: it is damaged")
    given = {**stated, **config}
    if unknown := [name for name in given if name not in DEFAULTS]:
        hint = suggest_or_list(unknown[0], DEFAULTS)
        raise CheckpointError(f"DLGSANet has no argument {shown(unknown[0])}{hint}")
    try:
        complete = {**infer_config(weights), **given}
        check_compatible(weights, complete)
        json.dumps(complete)  # as it is written into files
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"its configuration makes no DLGSANet: {error}") from error
    return complete, bool(stated)


def read_checkpoint(
    path: Path | str, param_key: str | None = None, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Read weights of a DLGSANet as `read_weights` does, and detect which network they are of.

    `config` has arguments of DLGSANet that are known better than the file states them.

    Raises:
        CheckpointError: The file cannot be read or is not of a DLGSANet, or the configuration in
            it or in `config` is not that of its weights.
    """
    path = find_weights(path)
    weights, extra = _read(path, param_key)
    try:
        complete, is_stated = _complete(weights, extra, config or {})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # Where the file does not state it, it is in BasicSR's names.
    iteration = re.fullmatch("([0-9]{1,18})", str(extra.get("iteration", "")))
    iteration = iteration or re.fullmatch(r"net_\w+?_([0-9]{1,18})", path.stem)
    notes = {
        name: text
        for name, text in extra.items()
        if isinstance(name, str) and isinstance(text, str) and name not in _NOT_NOTES
    }
    trained = int(iteration[1]) if iteration else None
    return Checkpoint(weights, complete, is_stated, trained, notes)


def save_checkpoint(checkpoint: Checkpoint, path: Path | str) -> None:
    """Write weights with their configuration: after a crash the file is the old or the new one.

    `.pth` is written as BasicSR reads it, the weights under `params` and `params_ema`, once in the
    file; `.safetensors` has the configuration and the notes as metadata. UserError for another
    suffix, or where the file cannot be written.
    """
    path = Path(path)
    for name, text in checkpoint.notes.items():
        if name in _NOT_WRITTEN or text.startswith("crc32:"):
            raise CheckpointError(f"{name}={text} cannot be a note: files hold this by themselves")
        if f"{name}{text}".encode(errors="ignore").decode() != f"{name}{text}":
            raise CheckpointError(f"the note {name}={text} is not UTF-8 text: write it again")
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    known = {"architecture": _ARCHITECTURE, "config": json.dumps(dict(checkpoint.config))}
    extra = {**checkpoint.notes, **known}
    if checkpoint.iteration is not None:
        extra["iteration"] = str(checkpoint.iteration)
    if path.suffix == ".pth":
        save_complete({"params": weights, "params_ema": weights, **extra}, path)
    elif path.suffix == ".safetensors":
        write_safetensors(weights, extra, path)
    else:
        raise CheckpointError(f"{path} is to be written: its suffix must be .pth or .safetensors")


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return the mean of one or more checkpoints of one configuration; the last iteration."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        names = [name for name in first.config if first.config[name] != other.config.get(name)]
        if names:
            raise CheckpointError(
                "only checkpoints of one configuration have a mean: the first is "
                f"{described(first.config, names)}, another is {described(other.config, names)}"
            )
    weights = {}
    for name, tensor in first.weights.items():
        total = sum(each.weights[name].double() for each in checkpoints)
        weights[name] = (total / len(checkpoints)).to(tensor.dtype)
    known = [each.iteration for each in checkpoints if each.iteration is not None]
    return replace(first, weights=weights, iteration=max(known, default=None))


def transfer(checkpoint: Checkpoint, scale: int) -> Checkpoint:
    """Return a start for training another scale: the same weights, the upsampler's resized.

    The filters of a pixel shuffle are interpolated linearly between its sub-pixels. A second
    shuffle that the weights lack ('pixelshuffle' at x4 from x2) repeats pixels. CheckpointError
    where the network has no upsampler, or one that cannot make this scale.
    """
    if not checkpoint.config["upsampler"]:
        raise CheckpointError("these weights have no upsampler: they keep the size of an image")
    if not 1 <= scale <= LARGEST_SCALE:
        raise CheckpointError(f"scale must be 1 to {LARGEST_SCALE}; got {scale}")
    kernel = TLC_KERNELS.get(scale, checkpoint.config["tlc_kernel"])  # as published for the scale
    config = {**checkpoint.config, "upscale": scale, "tlc_kernel": kernel}
    try:
        with torch.device("meta"):
            empty = DLGSANet(**config).state_dict()
    except ValueError as error:
        raise CheckpointError(f"the network cannot make x{scale}: {error}") from error
    last = checkpoint.weights.get("conv_last.weight")  # after the shuffles of 'pixelshuffle'
    channels = config["in_chans"] if last is None else last.shape[1]
    weights = {
        name: _resized(checkpoint.weights.get(name), new.shape, channels)
        if name.startswith("upsample.")
        else checkpoint.weights[name]
        for name, new in empty.items()
    }
    return Checkpoint(weights, config, checkpoint.is_stated)


def _resized(old: Tensor | None, shape: torch.Size, channels: int) -> Tensor:
    """Return filters (C·s², D, 3, 3) or biases (C·s²) before a pixel shuffle of C channels.

    They are interpolated from those of another s; None gives a shuffle that repeats pixels.
    """
    if old is None:
        new = torch.zeros(shape)
        if len(shape) > 1:  # the middle of each filter
            new[..., 1, 1] = torch.eye(channels).repeat_interleave(shape[0] // channels, 0)
        return new
    side, wanted = (math.isqrt(rows // channels) for rows in (len(old), shape[0]))
    grid = old.double().reshape(channels, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bilinear")
    return grid.permute(0, 2, 3, 1).reshape(shape).to(old.dtype)
