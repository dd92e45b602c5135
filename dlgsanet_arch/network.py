"""DLGSANet, the network of Li, Pan, Tang and Dong (ICCV 2023, arXiv 2301.02031).

"DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image
Super-Resolution". Attribute names are the keys of the published checkpoints, so that weights pass
both ways with `strict=True`; classes carry the paper's terms:

| paper                          | class      | attribute path in a checkpoint                     |
| ------------------------------ | ---------- | -------------------------------------------------- |
| shallow features               | Conv2d     | `overlap_embed.0.proj`                             |
| RHDTG, a residual group        | RHDTG      | `deep_feature_extraction.{g}.body`                 |
| HDTB: a local, a global layer  | -          | entries `{2b}` and `{2b+1}` of that body           |
| MHDLSA, dynamic local          | MHDLSA     | `....{2b}.IDynamicDWConv`                          |
| SparseGSA, sparse global       | SparseGSA  | `....{2b+1}.restormer_attn`                        |
| GDFN, gated feed-forward       | GDFN       | `....IDynamic_ffn`, `....restormer_ffn`            |
| reconstruction                 | Upsampler… | `upsample`, `conv_before_upsample`, `conv_last`    |

Letters: B batch, C channels, H height, W width, G filter groups, K filter side, h heads, N pixels.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlgsanet_arch import cpu, strips
from dlgsanet_arch.ops import projected_dwconv
from dlgsanet_arch.precision import full_precision
from dlgsanet_arch.tlc import Windows

BlockType = Literal["sparseedge", "edge", "idynamic", "restormer"]
FeedForwardType = Literal["GDFN", "BaseFFN"]
Activation = Literal["relu", "gelu", "sigmoid"]
UpsamplerType = Literal["pixelshuffledirect", "pixelshuffle", ""]

_RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, subtracted from three-channel input
_SHUFFLED_CHANNELS = 64  # within the 'pixelshuffle' reconstruction
_NORM_FLOOR = 1e-12  # under the L2 norms of q and k, as in torch.nn.functional.normalize

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "softmax": functools.partial(F.softmax, dim=-1),
}


def _pointwise(channels_in: int, channels_out: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1, bias=bias)


def _depthwise(channels: int, kernel: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)


class Conv3x3(nn.Conv2d):
    """3x3 convolution with a border of zeros. Maps (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if cpu.serves(x) and cpu.serves_weights(self):
            return cpu.convolve3x3(x, self.weight, self.bias)
        return super().forward(x)


def _is_observed(module: nn.Module) -> bool:
    """Return whether `module` has hooks, or a forward put in place of its class's."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class LayerNorm(nn.Module):
    """Normalise over the channels of each pixel: biased variance, eps 1e-5, weight and bias.

    Maps (B, C, H, W) to (B, C, H, W). Half precision is normalised in float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """Half a layer, x + mixer(LN(x)), and how that is computed where there are no gradients.

    Maps (B, C, H, W) to (B, C, H, W); given a slice of rows, to these rows alone.

    Args:
        halo: Rows and columns on either side of a pixel that its output depends on.
        widest: Channels of the widest map within, which decides how tall strips are.
        has_kernel: Whether there is a kernel for CPUs that computes x + mixer(LN(x)).
    """

    def __init__(self, *, halo: int, widest: int, has_kernel: bool) -> None:
        super().__init__()
        self.halo = halo
        self.widest = widest
        self.has_kernel = has_kernel

    def add_by_kernel(self, x: Tensor, norm: LayerNorm) -> Tensor:
        """Return x + self(norm(x)), if `has_kernel`."""
        raise NotImplementedError

    def _is_as_built(self, norm: nn.Module) -> bool:
        """Return whether `norm` and all within compute what they were built for, unobserved."""
        known = (nn.Conv2d, nn.LayerNorm, nn.Sequential, LayerNorm, FilterGenerator, type(self))
        return all(
            type(module) in known and cpu.serves_weights(module) and not _is_observed(module)
            for module in (*norm.modules(), *self.modules())
        )

    def add_in_strips(self, x: Tensor, norm: nn.Module, in_place: bool) -> Tensor:
        """Return x + self(norm(x)), written to `x` if `in_place` permits."""
        return strips.add(
            lambda seen, rows: self(norm(seen), rows), x, self.halo, self.widest, in_place
        )

    def add(self, x: Tensor, norm: nn.Module, in_place: bool = False) -> Tensor:
        """Return x + self(norm(x)).

        Without gradients on a CPU, a few rows at a time; then `in_place` permits to write to `x`.
        """
        if not strips.pay_for(x):
            return self(norm(x)) + x
        if self.has_kernel and cpu.serves(x) and self._is_as_built(norm):
            return self.add_by_kernel(x, norm)
        return self.add_in_strips(x.contiguous(memory_format=torch.channels_last), norm, in_place)


class GDFN(Mixer):
    """Gated depthwise feed-forward network: project_out(gelu(a) · b), exact GELU, no biases.

    Args:
        channels: C.
        hidden: e, half the channels within.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(halo=1, widest=2 * hidden, has_kernel=True)
        self.project_in = _pointwise(channels, 2 * hidden, bias=False)
        self.dwconv = _depthwise(2 * hidden, 3, bias=False)
        self.project_out = _pointwise(hidden, channels, bias=False)

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        a, b = strips.depthwise(self.dwconv, self.project_in(x), rows).chunk(2, dim=1)
        gate = F.gelu(a)
        # In strips there are no gradients, and the gate's memory is in cache already.
        return self.project_out(gate * b if rows is None else gate.mul_(b))

    def add_by_kernel(self, x: Tensor, norm: LayerNorm) -> Tensor:
        return cpu.add_gdfn(
            x,
            norm.body.weight,
            norm.body.bias,
            self.project_in.weight,
            self.dwconv.weight,
            self.project_out.weight,
        )


class BaseFFN(Mixer):
    """Plain feed-forward: 1x1, GELU, 1x1, with biases.

    Args:
        channels: C.
        hidden: e, the channels within.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(halo=0, widest=hidden, has_kernel=False)
        self.body = nn.Sequential(
            _pointwise(channels, hidden, bias=True),
            nn.GELU(),
            _pointwise(hidden, channels, bias=True),
        )

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        return self.body(x if rows is None else x[:, :, rows])


_FEED_FORWARDS: dict[str, Callable[[int, int], nn.Module]] = {"GDFN": GDFN, "BaseFFN": BaseFFN}


class FilterGenerator(nn.Module):
    """Predict a K x K filter for each pixel and each of G groups of channels (MHDLSA).

    The filters are never in memory as a map: `convolve` makes and uses them in one operator.

    Args:
        channels: C; filters come from D = C // 4 hidden channels.
        groups: G.
        kernel: K, odd.
    """

    def __init__(self, channels: int, groups: int, kernel: int) -> None:
        super().__init__()
        hidden = channels // 4
        self.kernel = kernel
        self.conv1 = nn.Sequential(
            _pointwise(channels, hidden, bias=True), _depthwise(hidden, kernel, bias=True)
        )
        self.conv2 = nn.Sequential(_pointwise(hidden, groups * kernel**2, bias=True))

    def convolve(self, x: Tensor) -> Tensor:
        """Filter `x` (B, C, H, W) with the filters predicted from it, to (B, C, H, W)."""
        projection = self.conv2[0]
        return projected_dwconv(
            x, self.conv1(x), projection.weight.flatten(1), projection.bias, self.kernel
        )


class MHDLSA(Mixer):
    """Multi-head dynamic local self-attention: each pixel is filtered by a filter of its own.

    Args:
        channels: C.
        channels_per_filter: Channels that share one filter; the published option files call this
            the number of heads. There are G = C // channels_per_filter filters a pixel.
        kernel: K, odd.
        dynamic: If false, a plain depthwise convolution stands in place of the dynamic one.
    """

    def __init__(self, channels: int, channels_per_filter: int, kernel: int, dynamic: bool) -> None:
        # Half of C: strips twice as tall, since the convolution within takes its own and the rows
        # around them, K // 2 on either side, are many.
        super().__init__(
            halo=kernel // 2,
            widest=channels // 2,
            has_kernel=dynamic and kernel <= cpu.LARGEST_KERNEL,
        )
        self.dynamic = dynamic
        self.conv0 = _pointwise(channels, channels, bias=False)
        self.conv1 = _pointwise(channels, channels, bias=False)
        if dynamic:
            self.conv = FilterGenerator(channels, channels // channels_per_filter, kernel)
        else:
            self.conv = _depthwise(channels, kernel, bias=True)

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        y = self.conv0(x)
        y = self.conv.convolve(y) if self.dynamic else self.conv(y)
        return self.conv1(y if rows is None else y[:, :, rows])

    def add_by_kernel(self, x: Tensor, norm: LayerNorm) -> Tensor:
        squeeze, dwconv = self.conv.conv1
        projection = self.conv.conv2[0]
        return cpu.add_mhdlsa(
            x,
            norm.body.weight,
            norm.body.bias,
            self.conv0.weight,
            squeeze.weight,
            squeeze.bias,
            dwconv.weight,
            dwconv.bias,
            projection.weight,
            projection.bias,
            self.conv1.weight,
        )


def attention_weights(
    product: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    temperature: Tensor,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return act(q̂ k̂ᵀ · temperature), the norms dividing the small product and not the maps.

    Args:
        product: q kᵀ, (B, h, c, c).
        q_norm: Length of each row of q, (B, h, c).
        k_norm: Length of each row of k, (B, h, c).
        temperature: (h, 1, 1).
        act: What turns similarities into weights.

    Returns:
        (B, h, c, c) in the dtype of `product`.
    """
    lengths = q_norm.clamp_min(_NORM_FLOOR)[..., None] * k_norm.clamp_min(_NORM_FLOOR)[..., None, :]
    return act(product / lengths * temperature.to(product.dtype))


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attend over channels: act(q̂ k̂ᵀ · temperature) v with q̂, k̂ of unit length over pixels.

    Products and norms are kept in float32 or wider, since a picture's sums overflow float16.

    Args:
        q: (B, h, c, N); c channels a head over N pixels.
        k: (B, h, c, N).
        v: (B, h, c, N).
        temperature: (h, 1, 1).
        act: What turns similarities (B, h, c, c) into weights.

    Returns:
        (B, h, c, N) in the dtype of `v`.
    """
    with full_precision(q.device.type):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        q_norm, k_norm = (torch.linalg.vector_norm(each, dim=-1) for each in (q, k))
        weights = attention_weights(q @ k.mT, q_norm, k_norm, temperature, act)
        return weights.to(v.dtype) @ v


class SparseGSA(Mixer):
    """Sparse global self-attention over channels; with a softmax it is Restormer's MDTA.

    Maps (B, C, H, W) to (B, C, H, W). In eval mode with `window` given, attention is computed
    within windows of that side and overlaps are averaged (TLC); training attends over the whole
    patch.

    Args:
        channels: C.
        heads: h; C // h channels each.
        activation: A key of the activations: relu (the paper), gelu, sigmoid or softmax.
        window: Side of the test-time windows in pixels, or None for none.
    """

    def __init__(self, channels: int, heads: int, activation: str, window: int | None) -> None:
        super().__init__(halo=1, widest=3 * channels, has_kernel=True)
        self.heads = heads
        self.window = window
        self.act = _ACTIVATIONS[activation]
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = _pointwise(channels, 3 * channels, bias=False)
        self.qkv_dwconv = _depthwise(3 * channels, 3, bias=False)
        self.project_out = _pointwise(channels, channels, bias=False)

    def _qkv(self, x: Tensor, rows: slice | None = None) -> Tensor:
        return strips.depthwise(self.qkv_dwconv, self.qkv(x), rows)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Map pixels of q, k and v (B, N, 3C) to the attended pixels of v (B, N, C)."""
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)
        attended = channel_attention(q, k, v, self.temperature, self.act)
        return attended.permute(0, 3, 1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self._qkv(x)
        size = qkv.shape[2:]
        pixels = qkv.permute(0, 2, 3, 1).flatten(1, 2)
        if self.window is None or self.training or max(size) <= self.window:
            pixels = self._attend(pixels)
        else:
            windows = Windows(size, self.window)
            pixels = windows.merge(self._attend(windows.cut(pixels)))
        return self.project_out(pixels.unflatten(1, size).permute(0, 3, 1, 2))

    def _matrices(self, product: Tensor, squares: Tensor) -> Tensor:
        """Turn sums over windows into what acts on v, the projection included.

        Args:
            product: Σ q kᵀ over a window's pixels, (n, h, c, c).
            squares: Σ q² and Σ k², (n, 2C).

        Returns:
            (n, C, C) in the dtype of the weights.
        """
        heads = self.heads
        q_norm, k_norm = squares.sqrt().unflatten(1, (2, heads, -1)).unbind(1)
        weights = attention_weights(product, q_norm, k_norm, self.temperature, self.act)
        projection = self.project_out.weight.flatten(1)
        weights = weights.to(projection.dtype)
        return torch.einsum(
            "ohc,nhcd->nohd", projection.unflatten(1, (heads, -1)), weights
        ).flatten(2)

    def _window(self) -> int | None:
        return None if self.training else self.window

    def add_by_kernel(self, x: Tensor, norm: LayerNorm) -> Tensor:
        return cpu.add_attention(
            x,
            norm.body.weight,
            norm.body.bias,
            self.qkv.weight,
            self.qkv_dwconv.weight,
            self.heads,
            self._matrices,
            self._window(),
        )

    def add_in_strips(self, x: Tensor, norm: nn.Module, in_place: bool) -> Tensor:
        def matrices(product: Tensor, squares: Tensor) -> Tensor:
            product = product.unflatten(1, (self.heads, -1)).unflatten(3, (self.heads, -1))
            product = product.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            return self._matrices(product, squares)

        return strips.add_attention(
            x, lambda seen, rows: self._qkv(norm(seen), rows), matrices, self._window()
        )


class LocalLayer(nn.Module):
    """x + MHDLSA(LN(x)), then x + FFN(LN(x)). Maps (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, mixer: MHDLSA, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.IDynamicDWConv = mixer
        self.norm2 = LayerNorm(channels)
        self.IDynamic_ffn = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = self.IDynamicDWConv.add(x, self.norm1)
        return self.IDynamic_ffn.add(x, self.norm2, in_place=True)


class GlobalLayer(nn.Module):
    """x + SparseGSA(LN(x)), then x + FFN(LN(x)). Maps (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, mixer: SparseGSA, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm3 = LayerNorm(channels)
        self.restormer_attn = mixer
        self.norm4 = LayerNorm(channels)
        self.restormer_ffn = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = self.restormer_attn.add(x, self.norm3)
        return self.restormer_ffn.add(x, self.norm4, in_place=True)


class RHDTG(nn.Module):
    """Residual hybrid dynamic-Transformer group: layers, a 3x3 convolution, a skip around all."""

    def __init__(self, channels: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers, Conv3x3(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class ShallowFeatures(nn.Module):
    """A 3x3 convolution without bias. Maps (B, in_chans, H, W) to (B, C, H, W)."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.proj = Conv3x3(in_chans, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def _pixel_shuffle_stages(channels: int, upscale: int) -> nn.Sequential:
    """Enlarge `upscale` times (2ⁿ or 3) by stages of convolution and pixel shuffle."""
    factors = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
    stages: list[nn.Module] = []
    for factor in factors:
        stages += [Conv3x3(channels, factor**2 * channels), nn.PixelShuffle(factor)]
    return nn.Sequential(*stages)


def _choose(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more; got {value!r}")


def _require_divisible(dim: int, name: str, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"dim must be divisible by {name}; got dim={dim}, {name}={heads}")


def _require_upscale(upsampler: str, upscale: object) -> None:
    if upsampler == "":
        return
    _require_count("upscale", upscale)
    is_power_of_two = upscale & (upscale - 1) == 0
    if upsampler == "pixelshuffle" and upscale != 3 and (upscale == 1 or not is_power_of_two):
        raise ValueError(f"upscale must be 3 or 2, 4, 8, … for 'pixelshuffle'; got {upscale}")


def _hidden(name: str, dim: int, factor: float) -> int:
    """Return a feed-forward's hidden channels, int(dim · factor)."""
    if not 0 < factor < math.inf or int(dim * factor) < 1:
        raise ValueError(f"{name} must give int(dim · {name}) of 1 or more; got {factor!r}")
    return int(dim * factor)


def _suggest_names(init: Callable[..., None]) -> Callable[..., None]:
    """Let an unknown argument's TypeError name the nearest one that exists."""
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: nn.Module, *args: Any, **options: Any) -> None:
        unknown = [name for name in options if name not in names]
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise TypeError(f"DLGSANet has no argument {unknown[0]!r}{hint}")
        init(self, *args, **options)

    return checked


class DLGSANet(nn.Module):
    """The super-resolution network. Maps (B, in_chans, H, W) to (B, in_chans, H·s, W·s).

    Values are in [0, 1] in and out (not clipped); any H and W from 1 up, any batch. s is
    `upscale`, or 1 without an upsampler. Argument names and defaults are the published ones, so
    that published option files build unchanged. The three published networks share
    `buildblock_type='sparseedge'`, `upsampler='pixelshuffledirect'` and the other defaults, with
    (dim, groups, blocks) of (48, 3, 3) Tiny, (48, 4, 3) Light and (90, 6, 4) Large.

    Args:
        in_chans: Channels of the picture; 3 are taken as RGB and have DIV2K's mean subtracted.
        dim: C, channels of the features; 4 or more, and divisible by the heads in use.
        groups: Number of residual groups (RHDTG).
        blocks: Blocks a group; a block is a local and a global layer, or one layer in the types
            'idynamic' and 'restormer'.
        buildblock_type: 'sparseedge' local + SparseGSA (the paper), 'edge' local + softmax,
            'idynamic' local only, 'restormer' softmax only.
        window_size: K, side of the local filters, odd.
        idynamic_num_heads: Channels that share one local filter (so the published files call it).
        idynamic_ffn_type: Feed-forward of the local layers: 'GDFN' or 'BaseFFN'.
        idynamic_ffn_expansion_factor: Its hidden channels over `dim`.
        idynamic: If false, plain depthwise convolutions replace the dynamic ones.
        restormer_num_heads: Heads of the global attention.
        restormer_ffn_type: Feed-forward of the global layers: 'GDFN' or 'BaseFFN'.
        restormer_ffn_expansion_factor: Its hidden channels over `dim`.
        tlc_flag: In eval mode, compute global attention within windows of `tlc_kernel`.
        tlc_kernel: Side of these windows in low-resolution pixels; published: 96, 72 and 48 for
            x2, x3 and x4. It does not follow from `upscale`.
        activation: Of SparseGSA: 'relu' (the paper), 'gelu' or 'sigmoid'.
        upscale: Enlargement s; ignored without an upsampler.
        img_range: Factor on the mean-free input, undone at the end.
        upsampler: 'pixelshuffledirect' (published), 'pixelshuffle' or '' for none.
        body_norm: Put a LayerNorm before and one after the groups.
        input_resolution: Accepted for published option files and ignored.

    Raises:
        ValueError: For a value that cannot be built; the message names argument and value.
        TypeError: For an unknown argument; the message suggests the nearest.
    """

    @_suggest_names
    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 60,
        groups: int = 4,
        blocks: int = 3,
        buildblock_type: BlockType = "edge",
        window_size: int = 7,
        idynamic_num_heads: int = 6,
        idynamic_ffn_type: FeedForwardType = "GDFN",
        idynamic_ffn_expansion_factor: float = 2.0,
        idynamic: bool = True,
        restormer_num_heads: int = 6,
        restormer_ffn_type: FeedForwardType = "GDFN",
        restormer_ffn_expansion_factor: float = 2.0,
        tlc_flag: bool = True,
        tlc_kernel: int = 48,
        activation: Activation = "relu",
        upscale: int = 4,
        img_range: float = 1.0,
        upsampler: UpsamplerType = "",
        body_norm: bool = False,
        input_resolution: object = None,
    ) -> None:
        super().__init__()
        _choose("buildblock_type", buildblock_type, get_args(BlockType))
        _choose("idynamic_ffn_type", idynamic_ffn_type, get_args(FeedForwardType))
        _choose("restormer_ffn_type", restormer_ffn_type, get_args(FeedForwardType))
        _choose("activation", activation, get_args(Activation))
        _choose("upsampler", upsampler, get_args(UpsamplerType))
        for name, value in (
            ("in_chans", in_chans),
            ("dim", dim),
            ("groups", groups),
            ("blocks", blocks),
            ("window_size", window_size),
            ("idynamic_num_heads", idynamic_num_heads),
            ("restormer_num_heads", restormer_num_heads),
            ("tlc_kernel", tlc_kernel),
        ):
            _require_count(name, value)
        for name, flag in (
            ("idynamic", idynamic),
            ("tlc_flag", tlc_flag),
            ("body_norm", body_norm),
        ):
            _choose(name, flag, (True, False))
        if dim < 4:
            raise ValueError(f"dim must be 4 or more (filters come from dim // 4); got {dim}")
        if window_size % 2 == 0:
            raise ValueError(f"window_size must be odd; got {window_size}")
        if not 0 < img_range < math.inf:
            raise ValueError(f"img_range must be positive; got {img_range!r}")
        _require_upscale(upsampler, upscale)
        local_hidden = _hidden("idynamic_ffn_expansion_factor", dim, idynamic_ffn_expansion_factor)
        global_hidden = _hidden(
            "restormer_ffn_expansion_factor", dim, restormer_ffn_expansion_factor
        )

        def local_layer() -> LocalLayer:
            mixer = MHDLSA(dim, idynamic_num_heads, window_size, dynamic=idynamic)
            return LocalLayer(dim, mixer, _FEED_FORWARDS[idynamic_ffn_type](dim, local_hidden))

        def global_layer() -> GlobalLayer:
            act = activation if buildblock_type == "sparseedge" else "softmax"
            window = tlc_kernel if tlc_flag else None
            mixer = SparseGSA(dim, restormer_num_heads, act, window)
            return GlobalLayer(dim, mixer, _FEED_FORWARDS[restormer_ffn_type](dim, global_hidden))

        block: tuple[Callable[[], nn.Module], ...] = {
            "sparseedge": (local_layer, global_layer),
            "edge": (local_layer, global_layer),
            "idynamic": (local_layer,),
            "restormer": (global_layer,),
        }[buildblock_type]
        if local_layer in block:
            _require_divisible(dim, "idynamic_num_heads", idynamic_num_heads)
        if global_layer in block:
            _require_divisible(dim, "restormer_num_heads", restormer_num_heads)

        self.in_chans = in_chans
        self.img_range = img_range
        mean = _RGB_MEAN if in_chans == 3 else (0.0,) * in_chans
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.overlap_embed = nn.Sequential(ShallowFeatures(in_chans, dim))
        self.deep_feature_extraction = nn.Sequential(
            *([LayerNorm(dim)] if body_norm else []),
            *(
                RHDTG(dim, [layer() for _ in range(blocks) for layer in block])
                for _ in range(groups)
            ),
            *([LayerNorm(dim)] if body_norm else []),
            Conv3x3(dim, dim),
        )
        if upsampler == "pixelshuffledirect":
            self.reconstruction = ("upsample",)
            self.upsample = nn.Sequential(
                Conv3x3(dim, upscale**2 * in_chans), nn.PixelShuffle(upscale)
            )
        elif upsampler == "pixelshuffle":
            self.reconstruction = ("conv_before_upsample", "upsample", "conv_last")
            self.conv_before_upsample = nn.Sequential(
                Conv3x3(dim, _SHUFFLED_CHANNELS), nn.LeakyReLU(0.01)
            )
            self.upsample = _pixel_shuffle_stages(_SHUFFLED_CHANNELS, upscale)
            self.conv_last = Conv3x3(_SHUFFLED_CHANNELS, in_chans)
        else:
            self.reconstruction = ("conv_last",)
            self.conv_last = Conv3x3(dim, in_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge pictures (B, in_chans, H, W) in [0, 1] to (B, in_chans, H·s, W·s), not clipped.

        Raises:
            ValueError: If `x` has another number of axes or channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"DLGSANet takes pictures (B, {self.in_chans}, H, W); got {tuple(x.shape)}"
            )
        x = (x - self.mean) * self.img_range
        if not cpu.serves(x):
            # Norms and 1x1 convolutions then find a pixel's channels side by side.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.overlap_embed(x)
        x = self.deep_feature_extraction(x) + x
        for stage in self.reconstruction:
            x = getattr(self, stage)(x)
        return (x / self.img_range + self.mean).contiguous()
