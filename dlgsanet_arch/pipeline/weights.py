"""The weights that a run starts from: which key of a file, compared with the network, loaded.

BasicSR finds out what is wrong when it loads, after the old run was renamed, or never: with a
misspelt `param_key_g` it takes other weights, and with `strict_load_g: false` it continues when no
tensor fits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dlgsanet_arch.averaging import bare
from dlgsanet_arch.checkpoint import check_compatible, read_weights
from dlgsanet_arch.hints import named
from dlgsanet_arch.options import Context
from dlgsanet_arch.pipeline.checkpoints import Start
from dlgsanet_arch.storage import CheckpointError, is_safetensors, read_complete

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


def _named(context: Context, key: str) -> Source | None:
    """Read the weights that the options name for a network, if they name any.

    Where the options do not name the key in the file, BasicSR always takes `params`; a test then
    takes the averaged weights `params_ema` where the file has them, as training validated those.
    """
    paths, label = context.section("path"), key.removeprefix("network_")
    given = paths.get(f"pretrain_{key}")
    if not isinstance(given, str) or not (file := context.weights(given)).is_file():
        return None  # the check of the options reports a missing file
    content = {} if is_safetensors(file) else read_complete(file)[0]
    keys = list(content) if isinstance(content, Mapping) else []
    wanted = _KEYS_TO_TRAIN if context.train else _KEYS_TO_TEST
    there = next((each for each in wanted if each in keys), None)
    used = paths.get(f"param_key_{label}", there) if keys else None
    if used is None and there is not None:
        raise CheckpointError(
            f"{file} is not a bare state dict, as path:param_key_{label} ~ says; write "
            f"param_key_{label}: {there}"
        )
    weights = averaged = read_weights(file, used)
    if context.train and "params_ema" in keys:
        averaged = read_weights(file, "params_ema")
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

    What is wrong with the options by themselves is passed over; the networks of `start` replace the
    options'. Returns the weights by option key ("network_g"); problems; and notes for the log.
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
    there, kind, where = network.state_dict(), section["type"], f"{source.option}: {source.file}"
    fits = {n: w for n, w in weights.items() if n in there and w.shape == there[n].shape}
    differing = {
        "absent from the file": [name for name in there if name not in weights],
        "unknown to the network": [name for name in weights if name not in there],
        "of another size": [name for name in weights if name in there and name not in fits],
    }
    if source.strict and any(differing.values()):
        try:
            if kind == "DLGSANet":  # then the difference can be stated in its arguments
                check_compatible(weights, section)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        parts = "; ".join(f"{what}: {named(n, 3)}" for what, n in differing.items() if n)
        raise CheckpointError(
            f"{where}: the weights are of another network than this {kind}; {parts}"
        )
    if there and not fits:
        raise CheckpointError(
            f"{where}: none of its {len(weights)} tensors fits this {kind}; with strict_load false "
            "BasicSR would continue with random weights"
        )
    return fits


def load(model: Any, options: Mapping[str, Any], found: Mapping[str, Source]) -> list[str]:
    """Load weights that `sources` returned into a model's networks and their averages.

    Weights of other networks are a CheckpointError. Returns notes for the log.
    """
    notes = []
    for key, source in found.items():
        label = key.removeprefix("network_")
        for name, weights in (("", source.weights), ("_ema", source.averaged)):
            network = getattr(model, f"net_{label}{name}", None)
            if not isinstance(network, nn.Module):
                continue
            network = bare(network)
            fits = _fitting(network, weights, source, options[key])
            network.load_state_dict(fits, strict=source.strict)
            if not source.strict and not name:
                notes.append(
                    f"{key}: loads {len(fits)} of {len(network.state_dict())} tensors of "
                    f"{source.file}, as path:strict_load_{label} is false"
                )
    return notes
