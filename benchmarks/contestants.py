"""The networks that are compared, and the plainer forms of ours that share its weights.

`definition` is DLGSANet by its formulas, with the dynamic convolution through unfold.
`PyTorch's own operators` is our network where there is no C library, so by its formula.
`published-style` does what the published code does: the filters' map in memory and one naive
float32 kernel, norms on transposed copies, windows in a Python loop, the allocator's cache emptied
in every attention. Both replace the forwards of a built DLGSANet, so that weights pass as they are.
"""

import functools
import importlib.util
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import published_kernels
import reporting
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# DLGSANet with its repairs, which BasicSR's imports below need.
from dlgsanet_arch import DLGSANet, cpu, network
from dlgsanet_arch.ops import reference
from dlgsanet_arch.ops.attention import ACTIVATIONS
from dlgsanet_arch.tlc import Axis

DEFINITION = "definition"
PUBLISHED = "published-style"
OURS = "ours"
OURS_CHANNELS_LAST = "ours, channels_last"
PYTORCH = "PyTorch's own operators"
PYTORCH_MAP = "PyTorch's own operators, filters in memory"
SWINIR = "SwinIR-light"
EDSR = "EDSR-baseline"

VARIANTS = ("tiny", "light", "large")
SCALES = (2, 3, 4)
QUICK = "quick"  # a variant that runs in milliseconds and has every part, to test scripts

Dynamic = Callable[[Tensor, Tensor], Tensor]


def _swinir_light(scale: int) -> nn.Module:
    from basicsr.archs.swinir_arch import SwinIR

    return SwinIR(
        img_size=64,
        embed_dim=60,
        depths=(6, 6, 6, 6),
        num_heads=(6, 6, 6, 6),
        window_size=8,
        mlp_ratio=2,
        upscale=scale,
        img_range=1.0,
        upsampler="pixelshuffledirect",
    )


def _edsr_baseline(scale: int) -> nn.Module:
    from basicsr.archs.edsr_arch import EDSR

    return EDSR(3, 3, num_feat=64, num_block=16, upscale=scale, res_scale=1.0)


PEERS = {SWINIR: _swinir_light, EDSR: _edsr_baseline}


def tiny(quick: bool) -> str:
    """Return the variant that most sections measure."""
    return QUICK if quick else "tiny"


def configuration(variant: str, scale: int) -> dict[str, Any]:
    """Return the arguments of a DLGSANet, as its option file has them."""
    name = "tiny" if variant == QUICK else variant
    path = reporting.ROOT / "options" / "train" / f"{name}_x{scale}.yml"
    config = yaml.safe_load(path.read_text())["network_g"]
    del config["type"]
    if variant == QUICK:
        config |= {"dim": 12, "groups": 1, "blocks": 1, "window_size": 3, "tlc_kernel": 8}
    return config


def title(cell: dict[str, Any]) -> str:
    """Name the network of a cell, for tables."""
    if cell["contestant"] in PEERS:
        return f"{cell['contestant']} x{cell['scale']}"
    return f"{cell['variant'].capitalize()} x{cell['scale']}, {cell['contestant']}"


def blocks(variant: str, scale: int) -> int:
    """Return how many blocks a DLGSANet has in all its groups."""
    config = configuration(variant, scale)
    return config["groups"] * config["blocks"]


def absent(device: str) -> dict[str, str]:
    """Return the contestants that cannot take part on `device`, each with the reason."""
    reasons = {PUBLISHED: published_kernels.why_not(device)}
    if importlib.util.find_spec("basicsr") is None:
        reasons |= dict.fromkeys(PEERS, "BasicSR is not installed")
    return {name: reason for name, reason in reasons.items() if reason}


def taking_part(device: str, forms: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Leave out of forms, which begin with a contestant, those that are absent."""
    missing = absent(device)
    return [form for form in forms if form[0] not in missing]


def absence_notes(device: str, names: list[str]) -> list[str]:
    """Say which of `names` are left out on `device`, and why."""
    reasons = absent(device)
    return [f"Left out: {name}, since {reasons[name]}." for name in names if name in reasons]


def _attend(self: network.SparseGSA, qkv: Tensor) -> Tensor:
    """Attend over the channels of q, k and v (B, 3C, H, W), q and k normalised as maps."""
    size = qkv.shape[2:]
    q, k, v = (each.unflatten(1, (self.heads, -1)).flatten(3) for each in qkv.chunk(3, dim=1))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attended = ACTIVATIONS[self.activation](q @ k.transpose(-2, -1) * self.temperature) @ v
    return attended.flatten(1, 2).unflatten(2, size)


def _attention(self: network.SparseGSA, x: Tensor) -> Tensor:
    qkv = self.qkv_dwconv(self.qkv(x))
    if self.window is None or self.training:
        return self.project_out(_attend(self, qkv))
    rows, columns = (Axis.plan(length, self.window).windows() for length in qkv.shape[2:])
    places = [(..., row, column) for row in rows for column in columns]
    parts = [_attend(self, qkv[place]) for place in places]
    total, count = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for place, part in zip(places, parts, strict=True):
        total[place] += part
        count[place] += 1
    return self.project_out(total / count)


def _attention_emptying_cache(self: network.SparseGSA, x: Tensor) -> Tensor:
    out = _attention(self, x)
    if x.is_cuda:
        torch.cuda.empty_cache()
    return out


def _norm(self: network.LayerNorm, x: Tensor) -> Tensor:
    return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def _norm_of_copies(self: network.LayerNorm, x: Tensor) -> Tensor:
    pixels = x.flatten(2).transpose(1, 2).contiguous()
    return self.body(pixels).transpose(1, 2).contiguous().view(x.shape)


def _gated_feed_forward(self: network.GDFN, x: Tensor) -> Tensor:
    a, b = self.dwconv(self.project_in(x)).chunk(2, dim=1)
    return self.project_out(F.gelu(a) * b)


def _local_attention(self: network.MHDLSA, x: Tensor, dynamic: Dynamic) -> Tensor:
    y = self.conv0(x)
    if self.dynamic:
        kernel = self.conv.kernel
        y = dynamic(y, self.conv.conv2(self.conv.conv1(y)).unflatten(1, (-1, kernel, kernel)))
    else:
        y = self.conv(y)
    return self.conv1(y)


def _local_layer(self: network.LocalLayer, x: Tensor) -> Tensor:
    x = self.IDynamicDWConv(self.norm1(x)) + x
    return self.IDynamic_ffn(self.norm2(x)) + x


def _global_layer(self: network.GlobalLayer, x: Tensor) -> Tensor:
    x = self.restormer_attn(self.norm3(x)) + x
    return self.restormer_ffn(self.norm4(x)) + x


def _whole(self: DLGSANet, x: Tensor) -> Tensor:
    x = (x - self.mean) * self.img_range
    x = self.overlap_embed(x)
    x = self.deep_feature_extraction(x) + x
    for stage in self.reconstruction:
        x = getattr(self, stage)(x)
    return x / self.img_range + self.mean


_PLAIN: dict[type[nn.Module], Callable[..., Tensor]] = {
    network.Conv1x1: nn.Conv2d.forward,
    network.Conv3x3: nn.Conv2d.forward,
    network.DepthwiseConv: nn.Conv2d.forward,
    network.LayerNorm: _norm,
    network.GDFN: _gated_feed_forward,
    network.SparseGSA: _attention,
    network.LocalLayer: _local_layer,
    network.GlobalLayer: _global_layer,
    network.RHDTG: lambda self, x: self.body(x) + x,
    DLGSANet: _whole,
}


def _replace_forwards(
    net: DLGSANet, forwards: dict[type[nn.Module], Callable[..., Tensor]], dynamic: Dynamic
) -> DLGSANet:
    forwards = {**forwards, network.MHDLSA: functools.partial(_local_attention, dynamic=dynamic)}
    for module in net.modules():
        forward = forwards.get(type(module))
        if forward:
            module.forward = types.MethodType(forward, module)
    return net


def as_definition(net: DLGSANet) -> DLGSANet:
    """Let a built DLGSANet compute by its formulas; it is changed and returned."""
    return _replace_forwards(net, _PLAIN, reference.dynamic_dwconv_reference)


def as_published(
    net: DLGSANet, dynamic: Dynamic = published_kernels.dynamic_dwconv_naive
) -> DLGSANet:
    """Let a built DLGSANet compute as the published code does; it is changed and returned.

    Tests without a GPU give another dynamic convolution.
    """
    slower = {network.LayerNorm: _norm_of_copies, network.SparseGSA: _attention_emptying_cache}
    return _replace_forwards(net, {**_PLAIN, **slower}, dynamic)


def _never(*_: object) -> bool:
    return False


def operators(contestant: str) -> AbstractContextManager[object]:
    """Leave the C library out where a contestant is to do without; its backward needs that, too."""
    if contestant in (PYTORCH, PYTORCH_MAP):
        return mock.patch.object(cpu, "can_run", _never)  # a mock would keep its arguments
    return nullcontext()


def build(contestant: str, variant: str, scale: int) -> nn.Module:
    """Build a contestant with random weights, which are equal for all forms of DLGSANet.

    It is to compute within `operators`.
    """
    torch.manual_seed(0)
    if contestant in PEERS:
        return PEERS[contestant](scale)
    net = DLGSANet(**configuration(variant, scale))
    if contestant == DEFINITION:
        return as_definition(net)
    if contestant == PUBLISHED:
        return as_published(net)
    if contestant == PYTORCH_MAP:
        for module in net.modules():
            if isinstance(module, network.FilterGenerator):  # a hook might read the filters' map
                module.conv2[0].register_forward_hook(lambda *_: None)
    if contestant == OURS_CHANNELS_LAST:
        return net.to(memory_format=torch.channels_last)
    return net


def input_size(contestant: str, height: int, width: int) -> tuple[int, int]:
    """Return what a contestant takes of an image; SwinIR needs multiples of 8."""
    if contestant == SWINIR:
        return -(-height // 8) * 8, -(-width // 8) * 8
    return height, width


def images(
    contestant: str, batch: int, height: int, width: int, device: str, dtype: torch.dtype
) -> Tensor:
    """Make random images (batch, 3, H, W) in the layout that a contestant is given."""
    x = torch.rand(batch, 3, *input_size(contestant, height, width), device=device).to(dtype)
    if contestant == OURS_CHANNELS_LAST:
        x = x.to(memory_format=torch.channels_last)
    return x


@functools.cache
def operations(
    contestant: str, variant: str, scale: int, size: tuple[int, int, int], training: bool = False
) -> int:
    """Count floating-point operations by PyTorch's FlopCounterMode, without computing.

    All forms of DLGSANet are counted as its formula in train mode, whatever is computed twice:
    where TLC's windows overlap, or in a backward. Norms, activations, gates and additions are not
    counted. `size` is (B, H, W); `training` counts the forward three times, for its backward too.
    """
    if contestant not in PEERS:
        contestant = OURS
    net = build(contestant, variant, scale).train().to("meta")
    x = torch.empty(size[0], 3, *input_size(contestant, *size[1:]), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    # The counter takes the backward of a depthwise convolution for that of a dense one.
    return counter.get_total_flops() * (3 if training else 1)
