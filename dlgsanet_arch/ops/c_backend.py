"""The operators of `ops` in C, for float32 on a CPU: sizes, strides and slices of its kernels.

Maps are read through the strides of batch and channel; what has gaps within a channel is copied.
Results are contiguous, but for those of the dynamic convolution, which have the layout that its
declaration promises. Gradients of weights are summed in slices that depend on shapes alone, so that
they do not depend on the number of threads.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dlgsanet_arch.cpu import require_shapes, run
from dlgsanet_arch.cpu.library import LARGEST_KERNEL

# Slices of a sum over all pixels, at most: as many threads can share it.
MOST_SLICES = 32
_SLICE_PIXELS = 1024  # at least
# Rows of a tile of the dynamic convolution's forward: K - 1 rows around it are read again.
_TILE_ROWS = 32
_TILE_COLUMNS = 256


def _planes(x: Tensor) -> Tensor:
    """Return `x` (B, C, H, W), or a copy, with its channels' pixels side by side."""
    _, _, height, width = x.shape
    if (x.stride(3) == 1 or width == 1) and (x.stride(2) == width or height == 1):
        return x
    return x.contiguous()


def _steps(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def _new(x: Tensor, channels: int | None = None) -> Tensor:
    batch, own, height, width = x.shape
    return x.new_empty((batch, own if channels is None else channels, height, width))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


def _for_bias(bias: Tensor | None, grad: Tensor) -> Tensor:
    return grad.new_empty(0) if bias is None else _in_layout_of(bias, grad)


def _slices(x: Tensor) -> int:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return max(1, min(MOST_SLICES, pixels // _SLICE_PIXELS))


def _sum(parts: Tensor, *shapes: torch.Size | tuple[int, ...]) -> Iterator[Tensor]:
    """Sum (slices, n) over the slices in order, and yield the sums as tensors of these shapes."""
    total = parts.new_empty(parts.shape[1])
    run("add_slices", [parts, total], parts.shape)
    for part, shape in zip(total.split([math.prod(s) for s in shapes]), shapes, strict=True):
        yield part.reshape(shape).clone()  # an operator's results share no memory


def _size(operator: str, x: Tensor) -> torch.Size:
    """Return B, C, H, W of a map, and refuse what is none."""
    if x.dim() != 4:
        raise ValueError(f"{operator} needs a map (B, C, H, W); got {tuple(x.shape)}")
    require_shapes(operator, (x, x.shape))
    return x.shape


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, normalise: bool) -> Tensor:
    """Compute the 1x1 convolution of x (B, C, H, W) by weight (C', C, 1, 1).

    If `normalise`, x is standardised over its channels before: LayerNorm without weight and bias.
    """
    _require_pointwise("pointwise", x, weight, bias)
    x, weight = _planes(x), weight.contiguous()
    outs, channels = weight.shape[:2]
    out = _new(x, outs)
    sizes = [len(x), x.shape[2] * x.shape[3], channels, outs, *_steps(x), normalise]
    run("pointwise", [x, weight, _dense(bias), out], sizes)
    return out


def _require_pointwise(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    outs = weight.shape[:1]
    require_shapes(operator, (weight, (*outs, _size(operator, x)[1], 1, 1)), (bias, outs))


def pointwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (C', C, 1, 1) and bias (C')."""
    _require_pointwise("pointwise_backward", x, weight, bias)
    require_shapes("pointwise_backward", (grad, (len(x), len(weight), *x.shape[2:])))
    likes = x, weight
    grad, x, weight = _planes(grad), _planes(x), weight.contiguous()
    outs, channels = weight.shape[:2]
    grad_x, slices = _new(x), _slices(x)
    parts = x.new_empty(slices, outs * (channels + 1))
    sizes = [len(x), x.shape[2] * x.shape[3], channels, outs, *_steps(x), normalise]
    run("pointwise_backward", [grad, x, weight, grad_x, parts], [*sizes, *_steps(grad), slices])
    grad_weight, grad_bias = _sum(parts, weight.shape, (outs,))
    return *map(_in_layout_of, likes, (grad_x, grad_weight)), _for_bias(bias, grad_bias)


def _require_filters(operator: str, channels: int, weight: Tensor) -> None:
    side = weight.shape[-1:]
    require_shapes(operator, (weight, (channels, 1, *side, *side)))
    kernel = weight.shape[-1]
    if kernel % 2 == 0 or kernel > LARGEST_KERNEL:
        raise ValueError(f"{operator} needs odd filters of at most {LARGEST_KERNEL}; got {kernel}")


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the depthwise convolution of x (B, C, H, W) by weight (C, 1, K, K)."""
    _require_filters("depthwise", _size("depthwise", x)[1], weight)
    require_shapes("depthwise", (bias, weight.shape[:1]))
    x, out = _planes(x), _new(x)
    sizes = [*x.shape, weight.shape[-1], *_steps(x)]
    run("depthwise_convolution", [x, weight.contiguous(), _dense(bias), out], sizes)
    return out


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (C, 1, K, K) and bias (C,)."""
    _require_filters("depthwise_backward", _size("depthwise_backward", x)[1], weight)
    require_shapes("depthwise_backward", (grad, x.shape), (bias, weight.shape[:1]))
    likes = x, weight
    grad, x = _planes(grad), _planes(x)
    grad_x = _new(x)
    grad_weight, grad_bias = x.new_empty(weight.shape), x.new_empty(len(weight))
    sizes = [*x.shape, weight.shape[-1], *_steps(x), *_steps(grad)]
    tensors = [grad, x, weight.contiguous(), grad_x, grad_weight, grad_bias]
    run("depthwise_backward", tensors, sizes)
    return *map(_in_layout_of, likes, (grad_x, grad_weight)), _for_bias(bias, grad_bias)


def _require_pairs(operator: str, channels: int, weight: Tensor) -> None:
    _require_filters(operator, channels, weight)
    if channels % 2:
        raise ValueError(f"{operator} needs an even number of filters; got {channels}")


def gated_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Compute gelu(a) · b, (a, b) the halves of the depthwise convolution of x (B, 2e, H, W)."""
    _require_pairs("gated_depthwise", _size("gated_depthwise", x)[1], weight)
    x, (batch, channels, height, width) = _planes(x), x.shape
    out = _new(x, channels // 2)
    sizes = [batch, channels // 2, height, width, weight.shape[-1], *_steps(x)]
    run("gated_convolution", [x, weight.contiguous(), out], sizes)
    return out


def gated_depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight (2e, 1, K, K)."""
    channels = _size("gated_depthwise_backward", x)[1]
    _require_pairs("gated_depthwise_backward", channels, weight)
    shape = (len(x), channels // 2, *x.shape[2:])
    require_shapes("gated_depthwise_backward", (grad, shape))
    likes = x, weight
    grad, x, (batch, channels, height, width) = _planes(grad), _planes(x), x.shape
    grad_x, grad_weight = _new(x), x.new_empty(weight.shape)
    sizes = [batch, channels // 2, height, width, weight.shape[-1], *_steps(x), *_steps(grad)]
    run("gated_backward", [grad, x, weight.contiguous(), grad_x, grad_weight], sizes)
    return tuple(map(_in_layout_of, likes, (grad_x, grad_weight)))


def gdfn_gate(x: Tensor, weight: Tensor, bias: Tensor, filters: Tensor) -> Tensor:
    """Compute the gate of x standardised and expanded by the 1x1 convolution; as ops.gdfn_gate."""
    _require_pointwise("gdfn_gate", x, weight, bias)
    _require_pairs("gdfn_gate", len(weight), filters)
    return gated_depthwise(pointwise(x, weight, bias, True), filters)


def gdfn_gate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, filters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of all, after expanding x once more: the widest map is not kept."""
    _require_pointwise("gdfn_gate_backward", x, weight, bias)
    _require_pairs("gdfn_gate_backward", len(weight), filters)
    shape = (len(x), len(weight) // 2, *x.shape[2:])
    require_shapes("gdfn_gate_backward", (grad, shape))
    expanded = pointwise(x, weight, bias, True)
    grad_expanded, grad_filters = gated_depthwise_backward(grad, expanded, filters)
    return *pointwise_backward(grad_expanded, x, weight, bias, True), grad_filters


def head_products(a: Tensor, b: Tensor, heads: int, squares: Tensor | None = None) -> Tensor:
    """Return Σ a bᵀ over the pixels for each head, (B, h, c, c), of maps a and b (B, C, H, W).

    `squares` (B, 2C) is set to Σ a² and Σ b² of each channel.
    """
    require_shapes("head_products", (b, a.shape))
    a, b = _planes(a), _planes(b)
    batch, channels, height, width = a.shape
    share = channels // heads
    out = a.new_empty(batch, heads, share, share)
    sizes = [batch, height * width, heads, share, *_steps(a), *_steps(b)]
    run("head_products", [a, b, out, squares], sizes)
    return out


def head_apply(matrices: Tensor, x: Tensor, out: Tensor, maps: int = 1) -> None:
    """Set `out` to what each head's matrix makes of its channels.

    Args:
        matrices: (B, h, n·c, n·c).
        x: (B, n·C, H, W), n maps one behind the other.
        out: The same shape, with the pixels of a channel side by side.
        maps: n, 1 or more.
    """
    x = _planes(x)
    batch, _, height, width = x.shape
    heads, rows = matrices.shape[1:3]
    share = rows // maps
    shape = (batch, maps * heads * share, height, width)
    require_shapes("head_apply", (x, shape), (out, shape), (matrices, (batch, heads, rows, rows)))
    sizes = [batch, height * width, heads, share, maps, *_steps(x), *_steps(out)]
    run("head_apply", [x, matrices.contiguous(), out], sizes)


def _require_projection(
    operator: str, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> None:
    batch, channels, height, width = _size(operator, x)
    depth = _size(operator, hidden)[1]
    require_shapes(
        operator,
        (hidden, (batch, depth, height, width)),
        (bias, (bias.numel(),)),
        (weight, (bias.numel(), depth)),
    )
    groups = len(bias) // kernel**2 if kernel > 0 else 0
    if groups * kernel**2 != len(bias) or groups == 0 or channels % groups or kernel % 2 == 0:
        raise ValueError(
            f"{operator}: {channels} channels and {len(bias)} taps do not fit filters of {kernel}"
        )
    if kernel > LARGEST_KERNEL:
        raise ValueError(f"{operator} needs filters of at most {LARGEST_KERNEL}; got {kernel}")


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute the convolution; shapes as in `reference.projected_dwconv_reference`."""
    _require_projection("projected_dwconv", x, hidden, weight, bias, kernel)
    like, x, hidden = x, _planes(x), _planes(hidden)
    (batch, channels, height, width), out = x.shape, _new(x)
    tile = min(height, _TILE_ROWS), min(width, _TILE_COLUMNS)
    groups = len(bias) // kernel**2
    sizes = [batch, height, width, *tile, channels, hidden.shape[1], groups, kernel]
    tensors = [x, hidden, weight.contiguous(), bias.contiguous(), out]
    run("projected_convolution", tensors, [*sizes, *_steps(x), *_steps(hidden)])
    return _in_layout_of(like, out)


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `x`, `hidden`, `weight` and `bias`."""
    _require_projection("projected_dwconv_backward", x, hidden, weight, bias, kernel)
    require_shapes("projected_dwconv_backward", (grad, x.shape))
    likes = x, hidden, weight, bias
    grad, x, hidden = map(_planes, (grad, x, hidden))
    batch, channels, height, width = x.shape
    outs, depth = weight.shape
    # What is computed twice, in the rows around a band, should be little; yet there should be work
    # for some threads.
    bands = -(-height // (64 if batch >= 4 else 24))
    slices = min(batch * bands, MOST_SLICES)
    grad_x, grad_hidden = _new(x), _new(hidden)
    parts = x.new_empty(slices, outs * (depth + 1))
    tensors = [grad, x, hidden, weight.contiguous(), bias.contiguous()]
    sizes = [batch, height, width, channels, depth, outs // kernel**2, kernel]
    steps = [*_steps(x), *_steps(hidden), *_steps(grad)]
    run(
        "projected_backward",
        [*tensors, grad_x, grad_hidden, parts],
        [*sizes, *steps, bands, slices],
    )
    found = grad_x, grad_hidden, *_sum(parts, weight.shape, bias.shape)
    return tuple(map(_in_layout_of, likes, found))
