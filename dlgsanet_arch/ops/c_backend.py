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

from dlgsanet_arch.cpu import run
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.ops.shapes import PROJECTED, parse, sizes

# Slices of a sum over all pixels, at most: as many threads can share it.
MOST_SLICES = 32
_SLICE_PIXELS = 1024  # at least
# Rows of a tile of the dynamic convolution's forward: K - 1 rows around it are read again.
_TILE_ROWS = 32
_TILE_COLUMNS = 256

_POINTWISE = "x: B C H W; weight: O C 1 1; bias: O"
_DEPTHWISE = "x: B C H W; weight: C 1 K K; bias: C"
_GATED = "x: B 2E H W; weight: 2E 1 K K"
_GATE = "x: B C H W; weight: 2E C 1 1; bias: 2E; filters: 2E 1 K K"
_PATTERNS = {
    "pointwise": _POINTWISE,
    "pointwise_backward": f"{_POINTWISE}; grad: B O H W",
    "depthwise": _DEPTHWISE,
    "depthwise_backward": f"{_DEPTHWISE}; grad: B C H W",
    "gated_depthwise": _GATED,
    "gated_depthwise_backward": f"{_GATED}; grad: B E H W",
    "gdfn_gate": _GATE,
    "gdfn_gate_backward": f"{_GATE}; grad: B E H W",
    "head_products": "a: B hc H W; b: B hc H W; squares: B 2hc",
    "head_apply": "matrices: B h nc nc; x: B nhc H W; out: B nhc H W",
    "projected_dwconv": PROJECTED,
    "projected_dwconv_backward": f"{PROJECTED}; grad: B GS H W",
}
_PARSED = {operator: parse(pattern) for operator, pattern in _PATTERNS.items()}


def _sizes(operator: str, *tensors: Tensor | None, **known: int) -> list[int]:
    """Return the sizes of the letters of an operator's pattern, K last if filters have a side."""
    found = sizes(operator, _PARSED[operator], *tensors, **known)
    if "K" in _PATTERNS[operator]:
        kernel = known.get("K", found[-1])
        if kernel < 1 or kernel % 2 == 0 or kernel > LARGEST_KERNEL:
            wanted = f"odd filters of at most {LARGEST_KERNEL}"
            raise ValueError(f"{operator} needs {wanted}; got {kernel}")
    return found


def _planes(x: Tensor) -> Tensor:
    """Return `x` (B, C, H, W), or a copy, with its channels' pixels side by side."""
    _, _, height, width = x.shape
    if (x.stride(3) == 1 or width == 1) and (x.stride(2) == width or height == 1):
        return x
    return x.contiguous()


def _steps(*maps: Tensor) -> list[int]:
    return [stride for each in maps for stride in each.stride()[:2]]


def _new(x: Tensor, channels: int | None = None) -> Tensor:
    batch, own, height, width = x.shape
    return x.new_empty((batch, own if channels is None else channels, height, width))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _like(given: tuple[Tensor, ...], *results: Tensor) -> tuple[Tensor, ...]:
    """Return results in the layouts of what they belong to, which the declaration promises."""
    return tuple(
        result if each.is_contiguous() else torch.empty_like(each).copy_(result)
        for each, result in zip(given, results, strict=True)
    )


def _for_bias(bias: Tensor | None, grad: Tensor) -> Tensor:
    return grad.new_empty(0) if bias is None else _like((bias,), grad)[0]


def _sum(parts: Tensor, *shapes: torch.Size | tuple[int, ...]) -> Iterator[Tensor]:
    """Sum (slices, n) over the slices in order, and yield the sums as tensors of these shapes."""
    total = parts.new_empty(parts.shape[1])
    run("add_slices", [parts, total], parts.shape)
    for part, shape in zip(total.split([math.prod(s) for s in shapes]), shapes, strict=True):
        yield part.reshape(shape).clone()  # an operator's results share no memory


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, normalise: bool) -> Tensor:
    """Compute the 1x1 convolution of x (B, C, H, W) by weight (O, C, 1, 1).

    If `normalise`, x is standardised over its channels before: LayerNorm without weight and bias.
    """
    batch, channels, height, width, outs = _sizes("pointwise", x, weight, bias)
    x, out = _planes(x), _new(x, outs)
    numbers = [batch, height * width, channels, outs, *_steps(x), normalise]
    run("pointwise", [x, weight.contiguous(), _dense(bias), out], numbers)
    return out


def pointwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (O, C, 1, 1) and bias (O)."""
    given = x, weight
    batch, channels, height, width, outs = _sizes("pointwise_backward", x, weight, bias, grad)
    grad, x = _planes(grad), _planes(x)
    grad_x = _new(x)
    slices = max(1, min(MOST_SLICES, batch * height * width // _SLICE_PIXELS))
    parts = x.new_empty(slices, outs * (channels + 1))
    numbers = [batch, height * width, channels, outs, *_steps(x), normalise, *_steps(grad), slices]
    run("pointwise_backward", [grad, x, weight.contiguous(), grad_x, parts], numbers)
    grad_weight, grad_bias = _sum(parts, weight.shape, (outs,))
    return *_like(given, grad_x, grad_weight), _for_bias(bias, grad_bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the depthwise convolution of x (B, C, H, W) by weight (C, 1, K, K)."""
    numbers = _sizes("depthwise", x, weight, bias)
    x, out = _planes(x), _new(x)
    tensors = [x, weight.contiguous(), _dense(bias), out]
    run("depthwise_convolution", tensors, [*numbers, *_steps(x)])
    return out


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (C, 1, K, K) and bias (C,)."""
    given = x, weight
    numbers = _sizes("depthwise_backward", x, weight, bias, grad)
    grad, x = _planes(grad), _planes(x)
    grad_x, grad_weight, grad_bias = _new(x), x.new_empty(weight.shape), x.new_empty(len(weight))
    tensors = [grad, x, weight.contiguous(), grad_x, grad_weight, grad_bias]
    run("depthwise_backward", tensors, [*numbers, *_steps(x, grad)])
    return *_like(given, grad_x, grad_weight), _for_bias(bias, grad_bias)


def gated_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Compute gelu(a) · b, (a, b) the halves of the depthwise convolution of x (B, 2E, H, W)."""
    batch, hidden, height, width, kernel = _sizes("gated_depthwise", x, weight)
    x, out = _planes(x), _new(x, hidden)
    numbers = [batch, hidden, height, width, kernel, *_steps(x)]
    run("gated_convolution", [x, weight.contiguous(), out], numbers)
    return out


def gated_depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight (2E, 1, K, K)."""
    given = x, weight
    numbers = _sizes("gated_depthwise_backward", x, weight, grad)
    grad, x = _planes(grad), _planes(x)
    grad_x, grad_weight = _new(x), x.new_empty(weight.shape)
    tensors = [grad, x, weight.contiguous(), grad_x, grad_weight]
    run("gated_backward", tensors, [*numbers, *_steps(x, grad)])
    return _like(given, grad_x, grad_weight)


def gdfn_gate(x: Tensor, weight: Tensor, bias: Tensor, filters: Tensor) -> Tensor:
    """Compute the gate of x standardised and expanded by the 1x1 convolution; as ops.gdfn_gate."""
    _sizes("gdfn_gate", x, weight, bias, filters)
    return gated_depthwise(pointwise(x, weight, bias, True), filters)


def gdfn_gate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, filters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of all, after expanding x once more: the widest map is not kept."""
    _sizes("gdfn_gate_backward", x, weight, bias, filters, grad)
    expanded = pointwise(x, weight, bias, True)
    grad_expanded, grad_filters = gated_depthwise_backward(grad, expanded, filters)
    return *pointwise_backward(grad_expanded, x, weight, bias, True), grad_filters


def head_products(a: Tensor, b: Tensor, heads: int, squares: Tensor | None = None) -> Tensor:
    """Return Σ a bᵀ over the pixels for each head, (B, h, c, c), of maps a and b (B, C, H, W).

    `squares` (B, 2C) is set to Σ a² and Σ b² of each channel.
    """
    batch, share, height, width = _sizes("head_products", a, b, squares, h=heads)
    a, b = _planes(a), _planes(b)
    out = a.new_empty(batch, heads, share, share)
    numbers = [batch, height * width, heads, share, *_steps(a, b)]
    run("head_products", [a, b, out, squares], numbers)
    return out


def head_apply(matrices: Tensor, x: Tensor, out: Tensor, maps: int = 1) -> None:
    """Set `out` to what each head's matrix makes of its channels.

    Args:
        matrices: (B, h, n·c, n·c).
        x: (B, n·C, H, W), n maps one behind the other.
        out: The same shape, with the pixels of a channel side by side.
        maps: n, 1 or more.
    """
    batch, heads, share, height, width = _sizes("head_apply", matrices, x, out, n=maps)
    x = _planes(x)
    numbers = [batch, height * width, heads, share, maps, *_steps(x, out)]
    run("head_apply", [x, matrices.contiguous(), out], numbers)


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute the convolution; shapes as in `reference.projected_dwconv_reference`."""
    given = (x,)
    groups, depth, batch, height, width, _ = _sizes(
        "projected_dwconv", weight, bias, hidden, x, K=kernel
    )
    x, hidden = _planes(x), _planes(hidden)
    channels, out = x.shape[1], _new(x)
    tile = min(height, _TILE_ROWS), min(width, _TILE_COLUMNS)
    numbers = [batch, height, width, *tile, channels, depth, groups, kernel, *_steps(x, hidden)]
    tensors = [x, hidden, weight.contiguous(), bias.contiguous(), out]
    run("projected_convolution", tensors, numbers)
    return _like(given, out)[0]


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, ...]:
    """Compute the gradients of `x`, `hidden`, `weight` and `bias`."""
    groups, depth, batch, height, width, _ = _sizes(
        "projected_dwconv_backward", weight, bias, hidden, x, grad, K=kernel
    )
    given = x, hidden, weight, bias
    grad, x, hidden = map(_planes, (grad, x, hidden))
    # What is computed twice, in the rows around a band, should be little; yet there should be work
    # for some threads.
    bands = -(-height // (64 if batch >= 4 else 24))
    slices = min(batch * bands, MOST_SLICES)
    grad_x, grad_hidden = _new(x), _new(hidden)
    parts = x.new_empty(slices, len(bias) * (depth + 1))
    tensors = [grad, x, hidden, weight.contiguous(), bias.contiguous(), grad_x, grad_hidden, parts]
    numbers = [batch, height, width, x.shape[1], depth, groups, kernel]
    run("projected_backward", tensors, [*numbers, *_steps(x, hidden, grad), bands, slices])
    return _like(given, grad_x, grad_hidden, *_sum(parts, weight.shape, bias.shape))
