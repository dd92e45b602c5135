"""The convolutions and the norm that the network is built of, and the step x + mixer(LN(x)).

Each is PyTorch's own layer, and computes by the operators of `ops` where its settings are those it
was built with.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dlgsanet_arch import fused
from dlgsanet_arch.as_built import has_layers, is_as_built, is_unchanged, register
from dlgsanet_arch.ops import depthwise, normed_pointwise, pointwise
from dlgsanet_arch.ops.convolutions import NORM_EPS
from dlgsanet_arch.precision import cast


def _has_settings(conv: nn.Conv2d, groups: int, kernel: int) -> bool:
    """Return whether a convolution keeps the size, and its weight is what its attributes say."""
    own = conv.__dict__
    weight, bias = conv.weight, conv.bias
    outs, ins = own["out_channels"], own["in_channels"]
    return (
        own["kernel_size"] == (kernel, kernel)
        and own["padding"] == (kernel // 2, kernel // 2)
        and own["stride"] == own["dilation"] == (1, 1)
        and own["groups"] == groups
        and own["padding_mode"] == "zeros"
        and "_conv_forward" not in own
        and weight.shape == (outs, ins // groups, kernel, kernel)
        and (bias is None or bias.shape == (outs,))
    )


# The constructors are PyTorch's: adapters, as peft's, make further layers of a layer's class.


@register
class Conv1x1(nn.Conv2d):
    """1x1 convolution. Maps (B, C, H, W) to (B, C', H, W)."""

    def has_settings(self) -> bool:
        """Return whether its settings are those of a 1x1 convolution."""
        return _has_settings(self, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_settings():
            return pointwise(x, self.weight, self.bias)
        return super().forward(x)


@register
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of an odd side with a border of zeros. Keeps (B, C, H, W)."""

    def has_settings(self) -> bool:
        """Return whether its settings are those of such a convolution."""
        channels, kernel = self.in_channels, self.kernel_size[0]
        return (
            kernel % 2 == 1
            and self.out_channels == channels
            and _has_settings(self, channels, kernel)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.has_settings():
            return depthwise(x, self.weight, self.bias)
        return super().forward(x)


@register
class Conv3x3(nn.Conv2d):
    """3x3 convolution with a border of zeros. Maps (B, C, H, W) to (B, C', H, W)."""

    def has_settings(self) -> bool:
        """Return whether its settings are those of such a convolution."""
        return _has_settings(self, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        # Unchanged, for what counts operators by global hooks, as FlopCounterMode, sees PyTorch's.
        if is_unchanged(self) and fused.can_convolve(x, self.weight, self.bias):
            return fused.convolve3x3(x, self.weight, self.bias)
        return self._conv_forward(x, cast(self.weight), cast(self.bias))


@register
class LayerNorm(nn.Module):
    """Normalise over the channels of each pixel: biased variance, eps 1e-5, weight and bias.

    Maps (B, C, H, W) to (B, C, H, W). Half precision is normalised in float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels, eps=NORM_EPS)

    def has_settings(self) -> bool:
        """Return whether it has the layer that it was built with."""
        return has_layers(self, nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normed(x: Tensor, norm: LayerNorm | None, conv: Conv1x1) -> Tensor:
    """Return conv(norm(x)), in one operator where both are as built; conv(x) without a norm."""
    if norm is None:
        return conv(x)
    if type(norm) is LayerNorm and type(conv) is Conv1x1 and is_as_built(norm, conv):
        body = norm.body
        return normed_pointwise(x, body.weight, body.bias, conv.weight, conv.bias)
    return conv(norm(x))


class Mixer(nn.Module):
    """What a layer adds to its input, from the normalised input: x + mixer(LN(x)).

    Maps (B, C, H, W) to (B, C, H, W); given a norm, normalises x before. Where it or a layer within
    is not as it was built, each is called, as a plain network would.

    Attributes:
        fused_form: Computes x + mixer(LN(x)) in one pass, from x, norm and mixer; None for none.
    """

    fused_form: Callable[[Tensor, LayerNorm, "Mixer"], Tensor] | None = None


def add_mixed(x: Tensor, norm: LayerNorm, mixer: Mixer) -> Tensor:
    """Return x + mixer(norm(x)), fused where that can run."""
    if not isinstance(mixer, Mixer):
        return mixer(norm(x)) + x
    if is_inference() and type(norm) is LayerNorm:
        if mixer.fused_form and fused.can_run(x, norm, mixer):
            return mixer.fused_form(x, norm, mixer)
        if x.is_cpu and len(x) > 1 and is_as_built(norm, mixer):
            # Memory for the maps of one image suffices. Hooks are called once, with the batch.
            return torch.cat([add_mixed(each, norm, mixer) for each in x.split(1)])
    return (mixer(x, norm) if is_unchanged(mixer) else mixer(norm(x))) + x


def is_inference() -> bool:
    """Return whether maps are not kept: no gradients, and nothing that traces or compiles."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
