"""The weights that a fused form reads of a norm and a mixer, and how their shapes fit together."""

from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dlgsanet_arch.ops.shapes import Pattern, sizes

if TYPE_CHECKING:
    from dlgsanet_arch.network import LayerNorm

# The weights of a mixer, by name, with their shapes.
_NORM = "x: B C H W; norm.weight: C; norm.bias: C; "
_PATTERNS = {
    "add_gdfn": "project_in.weight: 2E C 1 1; dwconv.weight: 2E 1 3 3; project_out.weight: C E 1 1",
    "add_mhdlsa": (
        "conv0.weight: C C 1 1; conv.conv1.0.weight: D C 1 1; conv.conv1.0.bias: D; "
        "conv.conv1.1.weight: D 1 K K; conv.conv1.1.bias: D; conv.conv2.0.weight: GKK D 1 1; "
        "conv.conv2.0.bias: GKK; conv1.weight: C C 1 1"
    ),
    "add_attention": (
        "qkv.weight: 3C C 1 1; qkv_dwconv.weight: 3C 1 3 3; project_out.weight: C hc 1 1"
    ),
}
_PARSED = {operator: Pattern(_NORM + pattern) for operator, pattern in _PATTERNS.items()}


def read(
    operator: str, x: Tensor, norm: "LayerNorm", mixer: nn.Module, **known: int
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return x and the weights that an operator takes, and the sizes of its pattern's letters.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit together.
    """
    pattern, body = _PARSED[operator], norm.body
    own = (attrgetter(name)(mixer) for name, _ in pattern.tensors[3:])
    tensors = [x, body.weight, body.bias, *own]
    return tensors, sizes(operator, pattern, *tensors, **known)


def read_mhdlsa(
    x: Tensor, norm: "LayerNorm", mhdlsa: nn.Module
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return what `read` does for add_mhdlsa; the groups G must share the channels evenly."""
    tensors, numbers = read("add_mhdlsa", x, norm, mhdlsa)
    channels, groups = numbers[1], numbers[-1]
    if groups < 1 or channels % groups:
        raise ValueError(f"add_mhdlsa cannot share {groups} filters among {channels} channels")
    return tensors, numbers
