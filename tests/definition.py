"""The whole network in float64 NumPy, written from the formulas: slow, and the judge of ours.

Nothing here uses torch or the package. Maps are (B, C, H, W) float64 arrays; parameters come as
a mapping from checkpoint key to array, so that the keys are judged too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit

Array = NDArray[np.float64]
Parameters = Mapping[str, Array]

MEAN = (0.4488, 0.4371, 0.4040)
DEFAULTS: dict[str, Any] = {
    "in_chans": 3,
    "dim": 60,
    "groups": 4,
    "blocks": 3,
    "buildblock_type": "edge",
    "window_size": 7,
    "idynamic_num_heads": 6,
    "idynamic_ffn_type": "GDFN",
    "idynamic_ffn_expansion_factor": 2.0,
    "idynamic": True,
    "restormer_num_heads": 6,
    "restormer_ffn_type": "GDFN",
    "restormer_ffn_expansion_factor": 2.0,
    "tlc_flag": True,
    "tlc_kernel": 48,
    "activation": "relu",
    "upscale": 4,
    "img_range": 1.0,
    "upsampler": "",
    "body_norm": False,
}


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "sigmoid": expit,
    "softmax": softmax,
}


def convolve(x: Array, p: Parameters, key: str, groups: int = 1) -> Array:
    """Convolve with `key`.weight (O, C / groups, K, K) and its bias, if any; same size."""
    weight = p[f"{key}.weight"]
    kernel = weight.shape[-1]
    border = kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border)))
    batch, channels, height, width = x.shape
    padded = padded.reshape(batch, groups, channels // groups, *padded.shape[2:])
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    out = np.zeros((batch, groups, weight.shape[1], height, width))
    for i in range(kernel):
        for j in range(kernel):
            window = padded[..., i : i + height, j : j + width]
            out += np.einsum("goc,bgchw->bgohw", weight[..., i, j], window)
    out = out.reshape(batch, -1, height, width)
    if f"{key}.bias" in p:
        out += p[f"{key}.bias"][:, None, None]
    return out


def dynamic_convolution(x: Array, filters: Array) -> Array:
    """Σ_ij filters[b, g(c), i, j, y, x] · x[b, c, y + i - K//2, x + j - K//2], pixel by pixel."""
    channels, height, width = x.shape[1:]
    groups, kernel = filters.shape[1:3]
    border = kernel // 2
    out = np.zeros_like(x)
    for c, y, column, i, j in np.ndindex(channels, height, width, kernel, kernel):
        above, left = y + i - border, column + j - border
        if 0 <= above < height and 0 <= left < width:
            tap = filters[:, c // (channels // groups), i, j, y, column]
            out[:, c, y, column] += tap * x[:, c, above, left]
    return out


def layer_norm(x: Array, p: Parameters, key: str) -> Array:
    centred = x - x.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    scale, shift = p[f"{key}.body.weight"], p[f"{key}.body.bias"]
    return normal * scale[:, None, None] + shift[:, None, None]


def feed_forward(x: Array, p: Parameters, key: str) -> Array:
    if f"{key}.project_in.weight" not in p:
        return convolve(gelu(convolve(x, p, f"{key}.body.0")), p, f"{key}.body.2")
    x = convolve(x, p, f"{key}.project_in")
    a, b = np.split(convolve(x, p, f"{key}.dwconv", groups=x.shape[1]), 2, axis=1)
    return convolve(gelu(a) * b, p, f"{key}.project_out")


def mhdlsa(x: Array, p: Parameters, key: str, config: Mapping[str, Any]) -> Array:
    y = convolve(x, p, f"{key}.conv0")
    if not config["idynamic"]:
        return convolve(convolve(y, p, f"{key}.conv", groups=y.shape[1]), p, f"{key}.conv1")
    hidden = convolve(y, p, f"{key}.conv.conv1.0")
    hidden = convolve(hidden, p, f"{key}.conv.conv1.1", groups=hidden.shape[1])
    filters = convolve(hidden, p, f"{key}.conv.conv2.0")
    kernel = config["window_size"]
    groups = config["dim"] // config["idynamic_num_heads"]
    filters = filters.reshape(len(y), groups, kernel, kernel, *y.shape[2:])
    return convolve(dynamic_convolution(y, filters), p, f"{key}.conv1")


def window_starts(length: int, side: int) -> tuple[list[int], int]:
    """Where windows start along an axis, and their side."""
    side = min(length, side)
    count = (length - 1) // side + 1
    step = side if count == 1 else int(np.ceil((length - side) / (count - 1) - 1e-8))
    starts = [0]
    while starts[-1] < length - side:
        starts.append(min(starts[-1] + step, length - side))
    return starts, side


def attend(qkv: Array, temperature: Array, act: Callable[[Array], Array]) -> Array:
    """Attention over channels of one map (3C, H, W): (C, H, W)."""
    heads = len(temperature)
    q, k, v = qkv.reshape(3, heads, -1, qkv.shape[1] * qkv.shape[2])
    out = np.empty_like(v)
    for head in range(heads):
        a = q[head] / np.maximum(np.linalg.norm(q[head], axis=1, keepdims=True), 1e-12)
        b = k[head] / np.maximum(np.linalg.norm(k[head], axis=1, keepdims=True), 1e-12)
        out[head] = act(a @ b.T * temperature[head]) @ v[head]
    return out.reshape(-1, *qkv.shape[1:])


def attend_in_windows(
    qkv: Array, temperature: Array, act: Callable[[Array], Array], side: int | None
) -> Array:
    """Attention of maps (B, 3C, H, W) within windows that are cut out one by one: (B, C, H, W).

    Overlaps are averaged (TLC). Without a side, one window lies over all.
    """
    (rows, height), (columns, width) = (
        window_starts(length, length if side is None else side) for length in qkv.shape[2:]
    )
    total = np.zeros((len(qkv), qkv.shape[1] // 3, *qkv.shape[2:]))
    count = np.zeros(qkv.shape[2:])
    for top in rows:
        for left in columns:
            window = ..., slice(top, top + height), slice(left, left + width)
            count[window] += 1
            for item in range(len(qkv)):
                total[item][window] += attend(qkv[item][window], temperature, act)
    return total / count


def sparse_gsa(
    x: Array, p: Parameters, key: str, config: Mapping[str, Any], training: bool
) -> Array:
    act = "softmax" if config["buildblock_type"] != "sparseedge" else config["activation"]
    qkv = convolve(x, p, f"{key}.qkv")
    qkv = convolve(qkv, p, f"{key}.qkv_dwconv", groups=qkv.shape[1])
    side = config["tlc_kernel"] if config["tlc_flag"] and not training else None
    y = attend_in_windows(qkv, p[f"{key}.temperature"], ACTIVATIONS[act], side)
    return convolve(y, p, f"{key}.project_out")


def pixel_shuffle(x: Array, factor: int) -> Array:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels // factor**2, factor, factor, height, width)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * factor, width * factor)


def reconstruct(x: Array, p: Parameters, config: Mapping[str, Any]) -> Array:
    scale = config["upscale"]
    if config["upsampler"] == "pixelshuffledirect":
        return pixel_shuffle(convolve(x, p, "upsample.0"), scale)
    if config["upsampler"] == "pixelshuffle":
        x = convolve(x, p, "conv_before_upsample.0")
        x = np.where(x > 0, x, 0.01 * x)
        factors = [3] if scale == 3 else [2] * int(np.log2(scale))
        for stage, factor in enumerate(factors):
            x = pixel_shuffle(convolve(x, p, f"upsample.{2 * stage}"), factor)
    return convolve(x, p, "conv_last")


def network(
    x: Array, p: Parameters, options: Mapping[str, Any], *, training: bool = False
) -> Array:
    """The image (B, in_chans, H·s, W·s) that the network of `options` makes of x in [0, 1]."""
    config = {**DEFAULTS, **options}
    mean = np.array(MEAN if config["in_chans"] == 3 else [0.0])[:, None, None]
    layers_a_block = {"idynamic": "l", "restormer": "g"}.get(config["buildblock_type"], "lg")
    body = "deep_feature_extraction"

    shallow = convolve((x - mean) * config["img_range"], p, "overlap_embed.0.proj")
    f = shallow
    index = 0
    if config["body_norm"]:
        f = layer_norm(f, p, f"{body}.0")
        index = 1
    for _ in range(config["groups"]):
        entry = f
        for number, kind in enumerate(layers_a_block * config["blocks"]):
            key = f"{body}.{index}.body.{number}"
            if kind == "l":
                normal = layer_norm(f, p, f"{key}.norm1")
                f = mhdlsa(normal, p, f"{key}.IDynamicDWConv", config) + f
                f = feed_forward(layer_norm(f, p, f"{key}.norm2"), p, f"{key}.IDynamic_ffn") + f
            else:
                normal = layer_norm(f, p, f"{key}.norm3")
                f = sparse_gsa(normal, p, f"{key}.restormer_attn", config, training) + f
                f = feed_forward(layer_norm(f, p, f"{key}.norm4"), p, f"{key}.restormer_ffn") + f
        last = len(layers_a_block) * config["blocks"]
        f = convolve(f, p, f"{body}.{index}.body.{last}") + entry
        index += 1
    if config["body_norm"]:
        f = layer_norm(f, p, f"{body}.{index}")
        index += 1
    f = convolve(f, p, f"{body}.{index}") + shallow
    return reconstruct(f, p, config) / config["img_range"] + mean
