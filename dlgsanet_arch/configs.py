"""Configurations of DLGSANet: the published ones, and the one that a state dict's sizes show."""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlgsanet_arch.arguments import check_arguments
from dlgsanet_arch.hints import cut, named
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.storage import CheckpointError

# A name that every DLGSANet's weights have, by which they are found among others.
ANCHOR = "overlap_embed.0.proj.weight"
DEFAULTS = {name: each.default for name, each in inspect.signature(DLGSANet).parameters.items()}
LARGEST_SCALE = 64

_DEEP = "deep_feature_extraction"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAST_TENSORS = 8  # a layer has at least these
_SIZES = ("in_chans", "dim", "groups", "blocks")

TLC_KERNELS = {2: 96, 3: 72, 4: 48}  # by scale
_VARIANTS = {"Tiny": (48, 3, 3), "Light": (48, 4, 3), "Large": (90, 6, 4)}
# What the published networks share.
_PUBLISHED = DEFAULTS | {"buildblock_type": "sparseedge", "upsampler": "pixelshuffledirect"}
del _PUBLISHED["input_resolution"]
_NOT_IN_WEIGHTS = ("tlc_flag", "tlc_kernel", "activation", "img_range")


def published_configs() -> dict[str, dict[str, Any]]:
    """Return the nine published configurations by name, such as "DLGSANet Tiny x4"."""
    return {
        f"DLGSANet {variant} x{scale}": {
            **_PUBLISHED,
            **dict(zip(("dim", "groups", "blocks"), sizes, strict=True)),
            **{"upscale": scale, "tlc_kernel": kernel},
        }
        for variant, sizes in _VARIANTS.items()
        for scale, kernel in TLC_KERNELS.items()
    }


def _size(weights: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Return one size of a tensor that must be there."""
    sizes = tuple(weights[name].shape) if name in weights else None
    if sizes is None or len(sizes) <= axis or not sizes[axis]:
        found = "is absent" if sizes is None else f"has the shape {sizes}"
        raise CheckpointError(f"these are not weights of a DLGSANet: {name} {found}")
    return sizes[axis]


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Count the different entries that follow `prefix` in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def _feed_forward(weights: Mapping[str, Tensor], dim: int, layer: str, kind: str) -> dict[str, Any]:
    """Read the type and the expansion of the feed-forward network at `layer`."""
    if f"{layer}.body.0.weight" in weights:
        name, hidden = "BaseFFN", _size(weights, f"{layer}.body.0.weight", 0)
    else:
        name, hidden = "GDFN", _size(weights, f"{layer}.project_out.weight", 1)
    factor = hidden / dim  # the simplest; but the network takes int(dim * factor), which may round
    factor = factor if int(dim * factor) == hidden else (hidden + 0.5) / dim
    return {f"{kind}_ffn_type": name, f"{kind}_ffn_expansion_factor": factor}


def _local_layer(weights: Mapping[str, Tensor], dim: int, layer: str) -> dict[str, Any]:
    """Read the arguments of a layer with MHDLSA."""
    mixer, found = f"{layer}.IDynamicDWConv.conv", {"idynamic": False}
    if f"{mixer}.conv2.0.weight" in weights:
        window = _size(weights, f"{mixer}.conv1.1.weight", 3)
        filters = _size(weights, f"{mixer}.conv2.0.weight", 0) // window**2
        found = {"idynamic": True, "idynamic_num_heads": dim // max(1, filters)}
    else:
        window = _size(weights, f"{mixer}.weight", 3)
    return {
        "window_size": window,
        **found,
        **_feed_forward(weights, dim, f"{layer}.IDynamic_ffn", "idynamic"),
    }


def _reconstruction(weights: Mapping[str, Tensor], in_chans: int) -> dict[str, Any]:
    """Read the upsampler and its scale; without one, `upscale` is 1."""
    if "conv_before_upsample.0.weight" in weights:
        rows, columns = (_size(weights, "upsample.0.weight", axis) for axis in (0, 1))
        stages = _count(weights, "upsample.")  # pixel shuffles have no weights
        return {"upsampler": "pixelshuffle", "upscale": math.isqrt(rows // columns) ** stages}
    if "upsample.0.weight" in weights:
        upscale = math.isqrt(_size(weights, "upsample.0.weight", 0) // in_chans)
        return {"upsampler": "pixelshuffledirect", "upscale": upscale}
    return {"upsampler": "", "upscale": 1}


def _detected(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments that names and sizes of weights show; see `infer_config`."""
    dim, in_chans = (_size(weights, ANCHOR, axis) for axis in (0, 1))
    body_norm = f"{_DEEP}.0.body.weight" in weights
    first_group = f"{_DEEP}.{int(body_norm)}.body."
    has_local = f"{first_group}0.IDynamicDWConv.conv0.weight" in weights
    first_global = f"{first_group}{int(has_local)}"
    heads = f"{first_global}.restormer_attn.temperature"
    has_global = heads in weights
    if not (has_local or has_global):
        raise CheckpointError(f"these are not weights of a DLGSANet: no layer at {first_group}0")
    both = "sparseedge" if has_local and has_global else None
    found = {
        "in_chans": in_chans,
        "dim": dim,
        "groups": _count(weights, f"{_DEEP}.") - 1 - 2 * body_norm,
        "blocks": (_count(weights, first_group) - 1) // (has_local + has_global),
        "buildblock_type": both or ("idynamic" if has_local else "restormer"),
        "body_norm": body_norm,
    }
    if has_local:
        found |= _local_layer(weights, dim, f"{first_group}0")
    if has_global:
        found["restormer_num_heads"] = _size(weights, heads, 0)
        found |= _feed_forward(weights, dim, f"{first_global}.restormer_ffn", "restormer")
    return found | _reconstruction(weights, in_chans)


def infer_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Detect the arguments of DLGSANet from its weights, all but `input_resolution`.

    What is not in the weights is as published: `activation` relu, `img_range` 1, `tlc_flag` true,
    `tlc_kernel` 96, 72 or 48 by scale (48 for other scales), and of "sparseedge" and "edge", which
    have equal names and sizes, "sparseedge". So are arguments of layers that the network lacks.

    Raises:
        CheckpointError: The weights are not of a DLGSANet; the message says by which tensor.
    """
    found = _detected(weights)
    kernel = TLC_KERNELS.get(found["upscale"], 48)
    shared = math.gcd(found["dim"], _PUBLISHED["idynamic_num_heads"])  # it must divide dim
    return {**_PUBLISHED, "tlc_kernel": kernel, "idynamic_num_heads": shared, **found}


def name_of(config: Mapping[str, Any]) -> str:
    """Return the name of the published network that weights of a configuration may be of.

    That is "DLGSANet" where there is none.
    """
    for name, published in published_configs().items():
        shown = published.keys() - _NOT_IN_WEIGHTS
        if all(config[each] == published[each] for each in shown):
            return name
    return "DLGSANet"


def described(config: Mapping[str, Any], names: Sequence[str]) -> str:
    """Name a network, with some of its arguments as an option file has them."""
    values = ((name, config[name]) for name in names)
    arguments = ", ".join(
        f"{name}: {f'{value:.4g}' if isinstance(value, float) else cut(json.dumps(value), 60)}"
        for name, value in values
    )
    return f"{name_of(config)} ({arguments})"


def check_compatible(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse weights that a DLGSANet of `config` does not take with strict=True.

    `config` has valid arguments of DLGSANet, as an option file's `network_g`: `type` is ignored.

    Raises:
        CheckpointError: The weights are of another configuration: the message names both (the
            published variant where it is one) by the arguments that differ. Or they are not of a
            DLGSANet that this package can build, or not floating-point numbers.
    """
    for name, tensor in weights.items():
        if tensor.dtype not in _FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} is of {dtype}; weights are of float32, float16, bfloat16 or float64"
            )
    asked = DEFAULTS | {name: value for name, value in config.items() if name != "type"}
    check_arguments(asked)
    inferred, found = infer_config(weights), _detected(weights)
    wanted, expected = {name: asked[name] for name in _SIZES}, None
    least = asked["groups"] * asked["blocks"] * _LEAST_TENSORS
    numbers = sum(tensor.numel() for tensor in weights.values())
    if least <= len(weights) and asked["in_chans"] * asked["dim"] <= numbers:  # not too large
        try:
            with torch.device("meta"):
                expected = DLGSANet(**asked).state_dict()
        except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
            raise CheckpointError(f"no DLGSANet can be as large as {cut(str(asked))}") from error
        wanted = _detected(expected)
    differing = [name for name in wanted if name in found and found[name] != wanted[name]]
    if differing:
        raise CheckpointError(
            f"the weights are of another configuration: they are {described(inferred, differing)}; "
            f"asked for is {described(asked, differing)}"
        )
    if expected is None:
        raise CheckpointError(f"{len(weights)} tensors cannot be {described(asked, _SIZES)}")
    both = expected.keys() & weights.keys()
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += sorted(name for name in both if expected[name].shape != weights[name].shape)
    if wrong:
        raise CheckpointError(
            f"the weights do not fit {name_of(asked)}; absent, unknown or of another size: "
            f"{named(wrong, 3)}"
        )


def nearest_published(config: Mapping[str, Any]) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """Find the published network that a configuration is most like.

    Returns its name, and the arguments that differ: by name the configuration's value, and its own.
    """
    found = []
    for variant, published in published_configs().items():
        differing = {
            name: (config[name], value)
            for name, value in published.items()
            if config[name] != value
        }
        apart = sum(abs(config[name] - published[name]) for name in ("dim", "groups", "blocks"))
        found.append((len(differing), apart, variant, differing))
    return min(found, key=lambda each: each[:2])[2:]
