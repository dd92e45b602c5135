"""The dynamic depthwise convolution by Triton: its kernels are launched, for maps of any layout.

Maps are dense in channels_last, as the network's are on a GPU; those that have another layout are
copied. With TRITON_INTERPRET=1 everything runs on a CPU.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlgsanet_arch.ops.triton_kernels import (
    COLUMNS,
    GROUPS,
    convolve_kernel,
    hidden_gradient_kernel,
    projection_gradient_kernel,
)

MOST_CHANNELS = 8  # of each group of a program
# The projection's gradients are summed by this many programs for each column of the filters, each
# with a share of the tiles; then the partial sums are added. The number does not depend on the
# machine, so neither does the order of the sum.
PROJECTION_SPLITS = 192


class Spec(NamedTuple):
    """What a kernel is compiled for: nothing of it depends on the image's size.

    In a list of sizes or in `static_range`, Triton 3.6 and 3.7 take a field only by a name of its
    own, annotated tl.constexpr.
    """

    channels: int  # C
    groups: int  # G
    per_group: int  # C // G
    kernel: int  # K
    taps: int  # of a column that a step has, a power of two; products need at least 2 of 8 groups
    used: int  # of these: K if that is less
    blocks: int  # of taps in a column
    rows: int  # of pixels of a program, 8 columns wide
    features: int  # D
    padded: int  # D + 1, as the bias is the last feature, padded to a power of two
    run: int  # features that one load takes: as many as are aligned
    pack: int  # values of the input's dtype in 32 bits
    vector: int  # channels of a group that one load takes
    vectors: int  # of each group that a program has at a time
    precision: str  # how tensor cores multiply float32, "tf32" or "tf32x3"
    index: tl.dtype  # of offsets


def dot_precision(dtype: torch.dtype) -> str:
    """Return how float32 is multiplied: "tf32", or "ieee" where 1x1 convolutions keep all bits.

    For half precision, which is multiplied as it is, "tf32".
    """
    cudnn = torch.backends.cudnn
    # From PyTorch 2.9 on, fp32_precision decides; once it is set, reading allow_tf32 raises.
    precision = getattr(getattr(cudnn, "conv", None), "fp32_precision", None)
    allowed = cudnn.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed or dtype != torch.float32 else "ieee"


def offset_type(*maps: Tensor) -> tl.dtype:
    """Return the type of offsets: wider than 32 bits only where a map needs it."""
    # Half the range is left for tiles and taps that reach outside the image.
    return tl.int64 if max(each.numel() for each in maps) > 1 << 30 else tl.int32


def ceil_div(size: int, block: int) -> int:
    """Return how many blocks cover a size."""
    return -(-size // block)  # triton.cdiv takes 5 µs


@functools.cache
def _spec(
    channels: int, outputs: int, features: int, kernel: int, bits: int, precision: str, index: Any
) -> Spec:
    """Derive the sizes of a layer with C channels and G·K² outputs.

    Without TF32, the tensor cores take three products of it, whose sum is right to 21 bits.
    """
    groups = outputs // kernel**2
    per_group = channels // groups
    together = max(n for n in range(1, MOST_CHANNELS + 1) if per_group % n == 0)
    vector = math.gcd(together, 128 // bits)
    # As many as registers allow: products of float32 take more.
    most_taps, rows = (8, 4) if bits == 16 else (4, 2) if precision == "tf32" else (2, 2)
    taps = min(max(2, triton.next_power_of_2(kernel)), most_taps)
    padded = max(16, triton.next_power_of_2(features + 1))
    run = math.gcd(features, padded // 4, 128 // bits)
    sizes = (channels, groups, per_group, kernel)
    tile = (taps, min(taps, kernel), ceil_div(kernel, taps), rows)
    loads = (features, padded, run, 32 // bits, vector, together // vector)
    return Spec(*sizes, *tile, *loads, "tf32" if precision == "tf32" else "tf32x3", index)


def _prepare(weight: Tensor, kernel: int, x: Tensor, *maps: Tensor) -> tuple[Spec, list[Tensor]]:
    """Return what to compile for, and the maps in channels_last, copied where needed."""
    bits = 8 * x.element_size()
    types = dot_precision(x.dtype), offset_type(x, *maps)
    spec = _spec(x.shape[1], *weight.shape, kernel, bits, *types)
    return spec, [each.contiguous(memory_format=torch.channels_last) for each in (x, *maps)]


def _restore(values: Tensor, like: Tensor) -> Tensor:
    """Return the map `values`, which is dense, in the layout of torch.empty_like(like)."""
    return values if values.stride() == like.stride() else torch.empty_like(like).copy_(values)


def _tiles(x: Tensor, spec: Spec) -> int:
    batch, _, height, width = x.shape
    return batch * ceil_div(height, spec.rows) * ceil_div(width, COLUMNS.value)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    # Without maxnreg, the assembler spills to save registers for more warps at a time. The default
    # of enable_fp_fusion changes in Triton 3.10.
    options = {"num_warps": 1, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}
    kernel[grid](*arguments, **options)


def _convolve(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, spec: Spec, transposed: bool
) -> Tensor:
    """Return the convolution of `x`; if transposed, `x` is grad out and the result is grad x."""
    out = torch.empty_like(x)
    together = spec.vector * spec.vectors
    blocks = ceil_div(spec.groups, GROUPS.value), spec.per_group // together
    tensors = (x, hidden, weight.contiguous(), bias.contiguous(), out)
    _launch(convolve_kernel, (_tiles(x, spec), *blocks), *tensors, *x.shape[2:], spec, transposed)
    return out


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute `ops.projected_dwconv`."""
    with torch.cuda.device_of(x):  # it need not be the current one
        spec, (dense_x, dense_hidden) = _prepare(weight, kernel, x, hidden)
        return _restore(_convolve(dense_x, dense_hidden, weight, bias, spec, transposed=False), x)


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of all tensors, in their dtypes and layouts."""
    with torch.cuda.device_of(x):
        spec, (dense_x, dense_hidden, grad) = _prepare(weight, kernel, x, hidden, grad)
        grad_x = _convolve(grad, dense_hidden, weight, bias, spec, transposed=True)
        grad_hidden, tiles, size = torch.empty_like(dense_hidden), _tiles(x, spec), x.shape[2:]
        tensors = (grad, dense_x, weight.contiguous(), grad_hidden)
        _launch(hidden_gradient_kernel, (tiles,), *tensors, *size, spec)

        splits = min(PROJECTION_SPLITS, tiles)
        grid = (splits, kernel * spec.blocks, ceil_div(spec.groups, GROUPS.value))
        partial = x.new_empty((splits, len(bias), spec.features + 1), dtype=torch.float32)
        tensors = (grad, dense_x, dense_hidden, partial)
        _launch(projection_gradient_kernel, grid, *tensors, *size, tiles, spec)
        projection = partial.sum(0)  # the gradients of weight and bias side by side
        return (
            _restore(grad_x, x),
            _restore(grad_hidden, hidden),
            torch.empty_like(weight).copy_(projection[:, :-1]),
            torch.empty_like(bias).copy_(projection[:, -1]),
        )
