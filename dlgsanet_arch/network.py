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

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlgsanet_arch import cpu, fused
from dlgsanet_arch.arguments import BLOCKS, check_arguments
from dlgsanet_arch.as_built import has_layers, is_as_built, register
from dlgsanet_arch.hub import HubMixin
from dlgsanet_arch.layers import (
    Conv1x1,
    Conv3x3,
    DepthwiseConv,
    LayerNorm,
    Mixer,
    add_mixed,
    normed,
)
from dlgsanet_arch.ops import channel_attention, dynamic_dwconv, gdfn_gate, projected_dwconv
from dlgsanet_arch.precision import cast, cast_together, full_precision
from dlgsanet_arch.tlc import windowed_attention

_RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, subtracted from three-channel input


@register
class GDFN(Mixer):
    """Gated depthwise feed-forward network: project_out(gelu(a) · b), exact GELU, no biases.

    Args:
        channels: C.
        hidden: e, half the channels within.
    """

    fused_form = staticmethod(fused.add_gdfn)

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.project_in = Conv1x1(channels, 2 * hidden, 1, bias=False)
        self.dwconv = DepthwiseConv(
            2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False
        )
        self.project_out = Conv1x1(hidden, channels, 1, bias=False)

    def has_settings(self) -> bool:
        """Return whether it has the layers that it was built with."""
        return has_layers(self, (Conv1x1, 1, False), (DepthwiseConv, 3, False), (Conv1x1, 1, False))

    def forward(self, x: Tensor, norm: LayerNorm | None = None) -> Tensor:
        project_in, dwconv = self.project_in, self.dwconv
        known = type(norm) is LayerNorm and self.has_settings()
        if known and is_as_built(norm, project_in, dwconv):
            body = norm.body
            gated = gdfn_gate(x, body.weight, body.bias, project_in.weight, dwconv.weight)
        else:
            a, b = dwconv(normed(x, norm, project_in)).chunk(2, dim=1)
            gated = F.gelu(a) * b
        return self.project_out(gated)


@register
class BaseFFN(Mixer):
    """Plain feed-forward: 1x1, GELU, 1x1, with biases.

    Args:
        channels: C.
        hidden: e, the channels within.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Conv1x1(channels, hidden, 1, bias=True),
            nn.GELU(),
            Conv1x1(hidden, channels, 1, bias=True),
        )

    def forward(self, x: Tensor, norm: LayerNorm | None = None) -> Tensor:
        return self.body(x if norm is None else norm(x))


_FEED_FORWARDS: dict[str, Callable[[int, int], Mixer]] = {"GDFN": GDFN, "BaseFFN": BaseFFN}


@register
class FilterGenerator(nn.Module):
    """Predict and apply a K x K filter for each pixel and each of G groups of channels (MHDLSA).

    Maps (B, C, H, W) to (B, C, H, W). The filters are not in memory as a map, unless the last
    convolution is hooked or replaced: one operator makes and uses them.

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
            Conv1x1(channels, hidden, 1, bias=True),
            DepthwiseConv(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=True),
        )
        self.conv2 = nn.Sequential(Conv1x1(hidden, groups * kernel**2, 1, bias=True))

    def has_settings(self) -> bool:
        """Return whether its two stages have the layers that they were built with."""
        return (
            has_layers(self, nn.Sequential, nn.Sequential)
            and has_layers(self.conv1, (Conv1x1, 1, True), (DepthwiseConv, self.kernel, True))
            and has_layers(self.conv2, (Conv1x1, 1, True))
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(x)
        if has_layers(self.conv2, (Conv1x1, 1, True)) and is_as_built(self.conv2):
            weight, bias = cast(self.conv2[0].weight).flatten(1), cast(self.conv2[0].bias)
            return projected_dwconv(x, hidden, weight, bias, self.kernel)
        filters = self.conv2(hidden)
        return dynamic_dwconv(x, filters.unflatten(1, (-1, self.kernel, self.kernel)))


@register
class MHDLSA(Mixer):
    """Multi-head dynamic local self-attention: each pixel is filtered by a filter of its own.

    Args:
        channels: C.
        channels_per_filter: Channels that share one filter; the published option files call this
            the number of heads. There are G = C // channels_per_filter filters a pixel.
        kernel: K, odd.
        dynamic: If false, a plain depthwise convolution replaces the dynamic one.
    """

    def __init__(self, channels: int, channels_per_filter: int, kernel: int, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.conv0 = Conv1x1(channels, channels, 1, bias=False)
        self.conv1 = Conv1x1(channels, channels, 1, bias=False)
        if dynamic:
            self.conv = FilterGenerator(channels, channels // channels_per_filter, kernel)
        else:
            self.conv = DepthwiseConv(
                channels, channels, kernel, padding=kernel // 2, groups=channels, bias=True
            )

    def has_settings(self) -> bool:
        """Return whether it has the layers that it was built with."""
        kind = FilterGenerator if self.dynamic else DepthwiseConv
        kinds = (Conv1x1, 1, False), (Conv1x1, 1, False), kind
        return has_layers(self, *kinds) and self.conv0.out_channels == self.conv0.in_channels

    @property
    def fused_form(self) -> Callable[[Tensor, LayerNorm, Mixer], Tensor] | None:
        return fused.add_mhdlsa if type(self.conv) is FilterGenerator else None

    def forward(self, x: Tensor, norm: LayerNorm | None = None) -> Tensor:
        return self.conv1(self.conv(normed(x, norm, self.conv0)))


@register
class SparseGSA(Mixer):
    """Sparse global self-attention over channels; with a softmax it is Restormer's MDTA.

    act(q̂ k̂ᵀ · temperature) v for each head, with q̂ and k̂ of unit length over the pixels. In eval
    mode with `window` given, attention is computed within windows of that side and overlaps are
    averaged (TLC); training attends over the whole patch.

    Args:
        channels: C.
        heads: h; c = C // h channels each.
        activation: A key of the activations: relu (the paper), gelu, sigmoid or softmax.
        window: Side of the test-time windows in pixels, or None for none.
    """

    fused_form = staticmethod(fused.add_attention)

    def __init__(self, channels: int, heads: int, activation: str, window: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.activation = activation
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = Conv1x1(channels, 3 * channels, 1, bias=False)
        self.qkv_dwconv = DepthwiseConv(
            3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False
        )
        self.project_out = Conv1x1(channels, channels, 1, bias=False)

    def has_settings(self) -> bool:
        """Return whether it has the layers that it was built with."""
        kinds = (Conv1x1, 1, False), (DepthwiseConv, 3, False), (Conv1x1, 1, False)
        return (
            has_layers(self, *kinds)
            and self.qkv.out_channels == 3 * self.qkv.in_channels
            and self.temperature.shape == (self.heads, 1, 1)
        )

    def forward(self, x: Tensor, norm: LayerNorm | None = None) -> Tensor:
        qkv = self.qkv_dwconv(normed(x, norm, self.qkv))
        window = self.eval_window()
        with full_precision(x.device.type):
            if window is None or max(qkv.shape[2:]) <= window:
                y = channel_attention(qkv, self.temperature, self.heads, self.activation)
            else:
                y = windowed_attention(qkv, self.temperature, self.heads, self.activation, window)
        return self.project_out(y)

    def eval_window(self) -> int | None:
        """Return the side of the windows that attention is computed in now, None for none."""
        return None if self.training else self.window


class LocalLayer(nn.Module):
    """x + MHDLSA(LN(x)), then x + FFN(LN(x)). Maps (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, mixer: MHDLSA, feed_forward: Mixer) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.IDynamicDWConv = mixer
        self.norm2 = LayerNorm(channels)
        self.IDynamic_ffn = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = add_mixed(x, self.norm1, self.IDynamicDWConv)
        return add_mixed(x, self.norm2, self.IDynamic_ffn)


class GlobalLayer(nn.Module):
    """x + SparseGSA(LN(x)), then x + FFN(LN(x)). Maps (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, mixer: SparseGSA, feed_forward: Mixer) -> None:
        super().__init__()
        self.norm3 = LayerNorm(channels)
        self.restormer_attn = mixer
        self.norm4 = LayerNorm(channels)
        self.restormer_ffn = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = add_mixed(x, self.norm3, self.restormer_attn)
        return add_mixed(x, self.norm4, self.restormer_ffn)


class RHDTG(nn.Module):
    """Residual hybrid dynamic-Transformer group: layers, a 3x3 convolution, a skip around all."""

    def __init__(self, channels: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers, Conv3x3(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class ShallowFeatures(nn.Module):
    """A 3x3 convolution without bias. Maps (B, in_chans, H, W) to (B, C, H, W)."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.proj = Conv3x3(in_chans, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DLGSANet(HubMixin, nn.Module):
    """The super-resolution network. Maps (B, in_chans, H, W) to (B, in_chans, H·s, W·s).

    Values are in [0, 1] in and out (not clipped); any H and W from 1 up, any batch. s is
    `upscale`, or 1 without an upsampler. Argument names and defaults are the published ones, so
    that published option files build unchanged. The three published networks share
    `buildblock_type='sparseedge'`, `upsampler='pixelshuffledirect'` and the other defaults, with
    (dim, groups, blocks) of (48, 3, 3) Tiny, (48, 4, 3) Light and (90, 6, 4) Large.

    Args:
        in_chans: Channels of the image; 3 are taken as RGB and have DIV2K's mean subtracted.
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

    Attributes:
        config: All arguments, by name.

    Raises:
        ValueError: For a value that cannot be built; the message names argument and value.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 60,
        groups: int = 4,
        blocks: int = 3,
        buildblock_type: str = "edge",
        window_size: int = 7,
        idynamic_num_heads: int = 6,
        idynamic_ffn_type: str = "GDFN",
        idynamic_ffn_expansion_factor: float = 2.0,
        idynamic: bool = True,
        restormer_num_heads: int = 6,
        restormer_ffn_type: str = "GDFN",
        restormer_ffn_expansion_factor: float = 2.0,
        tlc_flag: bool = True,
        tlc_kernel: int = 48,
        activation: str = "relu",
        upscale: int = 4,
        img_range: float = 1.0,
        upsampler: str = "",
        body_norm: bool = False,
        input_resolution: object = None,
    ) -> None:
        config = dict(locals())
        del config["self"], config["__class__"]
        check_arguments(config)
        super().__init__()
        self.config = config

        def local_layer() -> LocalLayer:
            mixer = MHDLSA(dim, idynamic_num_heads, window_size, dynamic=idynamic)
            hidden = int(dim * idynamic_ffn_expansion_factor)
            return LocalLayer(dim, mixer, _FEED_FORWARDS[idynamic_ffn_type](dim, hidden))

        def global_layer() -> GlobalLayer:
            act = activation if buildblock_type == "sparseedge" else "softmax"
            mixer = SparseGSA(dim, restormer_num_heads, act, tlc_kernel if tlc_flag else None)
            hidden = int(dim * restormer_ffn_expansion_factor)
            return GlobalLayer(dim, mixer, _FEED_FORWARDS[restormer_ffn_type](dim, hidden))

        makers = {"local": local_layer, "global": global_layer}
        block = [makers[layer] for layer in BLOCKS[buildblock_type]]
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
            Conv3x3(dim, dim, 3, padding=1),
        )
        self.reconstruction = self._add_reconstruction(upsampler, dim, in_chans, upscale)

    def _add_reconstruction(
        self, upsampler: str, dim: int, in_chans: int, upscale: int
    ) -> tuple[str, ...]:
        """Make the layers from features to an image; return their names in the order of calls."""
        if upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                Conv3x3(dim, upscale**2 * in_chans, 3, padding=1), nn.PixelShuffle(upscale)
            )
            return ("upsample",)
        if upsampler == "":
            self.conv_last = Conv3x3(dim, in_chans, 3, padding=1)
            return ("conv_last",)
        wide = 64
        self.conv_before_upsample = nn.Sequential(
            Conv3x3(dim, wide, 3, padding=1), nn.LeakyReLU(0.01)
        )
        self.upsample = nn.Sequential()
        for factor in [3] if upscale == 3 else [2] * (upscale.bit_length() - 1):
            self.upsample.append(Conv3x3(wide, factor**2 * wide, 3, padding=1))
            self.upsample.append(nn.PixelShuffle(factor))
        self.conv_last = Conv3x3(wide, in_chans, 3, padding=1)
        return "conv_before_upsample", "upsample", "conv_last"

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge images (B, in_chans, H, W) in [0, 1] to (B, in_chans, H·s, W·s), not clipped.

        Raises:
            ValueError: If `x` has another number of axes or channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            got = tuple(x.shape)
            raise ValueError(f"DLGSANet takes images (B, {self.in_chans}, H, W); got {got}")
        x = (x - self.mean) * self.img_range
        if not cpu.can_run(x):
            # Norms and 1x1 convolutions then find a pixel's channels side by side.
            x = x.contiguous(memory_format=torch.channels_last)
        with cast_together(self._weights(), x.device.type):
            x = self.overlap_embed(x)
            x = self.deep_feature_extraction(x) + x
            for stage in self.reconstruction:
                x = getattr(self, stage)(x)
        return (x / self.img_range + self.mean).contiguous()

    def _weights(self) -> Iterator[Tensor]:
        kinds = (Conv1x1, Conv3x3, DepthwiseConv, nn.LayerNorm)
        for module in self.modules():
            if type(module) in kinds:
                yield from module.parameters(recurse=False)
