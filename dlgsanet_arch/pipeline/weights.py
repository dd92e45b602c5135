"""The weights that a run starts from: which key of a file, compared with the network, loaded.

BasicSR finds out what is wrong when it loads, after the old run was renamed, or never: with a
misspelt `param_key_g` it takes other weights, and with `strict_load_g: false` it continues when no
tensor fits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlgsanet_arch.averaging import bare
from dlgsanet_arch.checkpoint import CheckpointError, check_compatible, read_weights
from dlgsanet_arch.hints import named
from dlgsanet_arch.options import Context
from dlgsanet_arch.options.context import is_number
from dlgsanet_arch.pipeline.checkpoints import Start

# Where files keep weights, by what each kind of run wants first.
_KEYS_TO_TRAIN = ("params", "params_ema", "state_dict")
_KEYS_TO_TEST = ("params_ema", "params", "state_dict")


class Source(NamedTuple):
    """Weights of one network."""

    option: str  # that they come from
    file: Path
    key: str | None  # of the file, None for the file itself
    weights: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor]  # in the same file, or the same
    strict: bool = True  # whether all tensors must fit


def _keys_of(file: Path) -> list[str]:
    """Return the top-level keys of a checkpoint, its tensors left on the disk where that works."""
    if file.suffix == ".safetensors":
        return []
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged, or of before PyTorch 1.6: then it cannot be mapped
        read_weights(file)  # says what is wrong with a damaged one
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        read_weights(file)  # says so
    return [str(key) for key in content]


def _key_of(context: Context, file: Path, label: str, keys: Sequence[str]) -> str | None:
    """Return which of a file's keys holds the weights to use, None for the file itself.

    Where the options do not say, BasicSR always takes `params`; a test then takes the averaged
    weights `params_ema` where there are any, as the training's own validation does.
    """
    paths, chosen = context.section("path"), f"param_key_{label}"
    wanted = _KEYS_TO_TRAIN if context.train else _KEYS_TO_TEST
    there = next((key for key in wanted if key in keys), None)
    asked = paths.get(chosen, there)
    if asked is None and there is not None:
        raise CheckpointError(
            f"{file} is not a bare state dict, as path:{chosen} ~ says; write {chosen}: {there}"
        )
    if asked is not None and keys and asked not in keys:
        read_weights(file, str(asked))  # lists the keys that are there
    return asked if keys else None


def _named(context: Context, key: str) -> Source | None:
    """Read the weights that the options name for a network, if they name any."""
    paths, label = context.section("path"), key.removeprefix("network_")
    given = paths.get(f"pretrain_{key}")
    if not isinstance(given, str) or not (file := context.weights(given)).is_file():
        return None  # whether it is there is a question to the options
    keys = _keys_of(file)
    used = _key_of(context, file, label, keys)
    weights = averaged = read_weights(file, used)
    decay = context.section("train").get("ema_decay", 0)
    if keys and context.train and label == "g" and is_number(decay) and decay > 0:
        other = next((each for each in ("params_ema", "params") if each in keys), None)
        if other is None:
            raise CheckpointError(
                f"{file} has neither the key params nor params_ema, one of which BasicSR needs to "
                "start the averaged weights of train:ema_decay; save the state dict under params"
            )
        averaged = weights if other == used else read_weights(file, other)
    strict = bool(paths.get(f"strict_load_{label}", True))
    return Source(f"path:pretrain_{key}", file, used, weights, averaged, strict)


def _saved(key: str, path: Path, content: Any) -> Source:
    """Return the weights of a network that is resumed."""
    if not isinstance(content, Mapping) or not isinstance(content.get("params"), Mapping):
        raise CheckpointError(f"{path} has no 'params'")
    weights = content["params"]
    return Source(key, path, "params", weights, content.get("params_ema", weights))


def sources(context: Context, start: Start) -> tuple[dict[str, Source], list[str], list[str]]:
    """Read the weights that a run starts from.

    Args:
        context: The options; what is wrong with them by themselves is passed over.
        start: The pair that is resumed from, if one is: its networks replace the options'.

    Returns:
        The weights by option key ("network_g"); problems; and notes for the log.
    """
    found, problems, notes = {}, [], []
    for key in context.networks():
        resumed = key in start.networks
        try:
            if resumed:
                found[key] = _saved(key, *start.networks[key])
            elif (context.train or key == "network_g") and (source := _named(context, key)):
                found[key] = source
                does = f"{key} starts from" if context.train else "testing"
                notes.append(f"{does} {source.key or 'the weights'} of {source.file}")
        except CheckpointError as error:
            problems.append(f"{key if resumed else f'path:pretrain_{key}'}: {error}")
    return found, problems, notes


def _fitting(
    network: nn.Module, weights: Mapping[str, Tensor], source: Source, section: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the weights that a network takes, or raise a CheckpointError."""
    there = bare(network).state_dict()
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    both = [name for name in there if name in weights]
    fits = {n: weights[n] for n in both if weights[n].shape == there[n].shape}
    differing = {
        "absent from the file": [name for name in there if name not in weights],
        "unknown to the network": [name for name in weights if name not in there],
        "of another size": [name for name in both if name not in fits],
    }
    if source.strict and any(differing.values()):
        try:
            if section["type"] == "DLGSANet":  # then it can be said by arguments
                check_compatible(weights, section)
        except CheckpointError as error:
            raise CheckpointError(f"{source.file}: {error}") from error
        parts = [f"{what}: {named(names, 3)}" for what, names in differing.items() if names]
        raise CheckpointError(
            f"{source.file}: the weights are of another network than this {section['type']}; "
            f"{'; '.join(parts)}"
        )
    if there and not fits:
        raise CheckpointError(
            f"{source.file}: none of its {len(weights)} tensors fits this {section['type']}; with "
            "strict_load false BasicSR would continue with random weights"
        )
    return fits


def load(model: Any, options: Mapping[str, Any], found: Mapping[str, Source]) -> list[str]:
    """Load weights that `sources` returned into a model's networks, and the average of the first.

    What the model's class loads by itself stays. Returns notes for the log.

    Raises:
        CheckpointError: They are of other networks.
    """
    notes = []
    for key, source in found.items():
        label = key.removeprefix("network_")
        targets = [(f"net_{label}", source.weights)]
        if label == "g":
            targets.append(("net_g_ema", source.averaged))
        for name, weights in targets:
            network = getattr(model, name, None)
            if not isinstance(network, nn.Module):
                continue
            try:
                fits = _fitting(network, weights, source, options[key])
            except CheckpointError as error:
                raise CheckpointError(f"{source.option}: {error}") from error
            bare(network).load_state_dict(fits, strict=source.strict)
            if not source.strict and name != "net_g_ema":
                count = len(bare(network).state_dict())
                notes.append(
                    f"{key}: loads {len(fits)} of {count} tensors of {source.file}, as "
                    f"path:strict_load_{label} is false"
                )
    return notes
