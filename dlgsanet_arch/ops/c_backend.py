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
from dlgsanet_arch.ops.shapes import Pattern, sizes

# Slices of a sum over all pixels, at most: as many threads can share it.
MOST_SLICES = 32
_SLICE_PIXELS = 1024  # at least
# Rows of a tile of the dynamic convolution's forward: K - 1 rows around it are read again.
_TILE_ROWS = 32
_TILE_COLUMNS = 256

_PATTERNS = {
    "pointwise": "x: B C H W; weight: O C 1 1; bias: O; grad: B O H W",
    "depthwise": "x: B C H W; weight: C 1 K K; bias: C; grad: B C H W",
    "gdfn_gate": "x: B C H W; weight: 2E C 1 1; bias: 2E; filters: 2E 1 K K; grad: B E H W",
    "head_sums": "qk: B 2hc H W; grad_products: B h c c; grad_squares: B 2h c",
    "head_apply": "matrices: B h c c; x: B hc H W; grad: B hc H W",
    "projected_dwconv": "weight: GKK D; bias: GKK; hidden: B D H W; x: B GS H W; grad: B GS H W",
}
_PARSED = {operator: Pattern(pattern) for operator, pattern in _PATTERNS.items()}


def _sizes(operator: str, *tensors: Tensor | None, **known: int) -> tuple[int, ...]:
    """Return the sizes of an operator's letters, K last; gradients are left out in the forward."""
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
    x, out = _planes(x), x.new_empty(batch, outs, height, width)
    numbers = [batch, height * width, channels, outs, *_steps(x), normalise]
    run("pointwise", [x, weight.contiguous(), _dense(bias), out], numbers)
    return out


def pointwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    given = x, weight
    batch, channels, height, width, outs = _sizes("pointwise", x, weight, bias, grad)
    grad, x, grad_x = _planes(grad), _planes(x), x.new_empty(x.shape)
    slices = max(1, min(MOST_SLICES, batch * height * width // _SLICE_PIXELS))
    parts = x.new_empty(slices, outs * (channels + 1))
    numbers = [batch, height * width, channels, outs, *_steps(x), normalise, *_steps(grad), slices]
    run("pointwise_backward", [grad, x, weight.contiguous(), grad_x, parts], numbers)
    grad_weight, grad_bias = _sum(parts, weight.shape, (outs,))
    return *_like(given, grad_x, grad_weight), _for_bias(bias, grad_bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the depthwise convolution of x (B, C, H, W) by weight (C, 1, K, K)."""
    numbers = _sizes("depthwise", x, weight, bias)
    x, out = _planes(x), x.new_empty(x.shape)
    tensors = [x, weight.contiguous(), _dense(bias), out]
    run("depthwise_convolution", tensors, [*numbers, *_steps(x)])
    return out


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    given = x, weight
    numbers = _sizes("depthwise", x, weight, bias, grad)
    grad, x, grad_x = _planes(grad), _planes(x), x.new_empty(x.shape)
    grad_weight, grad_bias = x.new_empty(weight.shape), x.new_empty(len(weight))
    tensors = [grad, x, weight.contiguous(), grad_x, grad_weight, grad_bias]
    run("depthwise_backward", tensors, [*numbers, *_steps(x, grad)])
    return *_like(given, grad_x, grad_weight), _for_bias(bias, grad_bias)


def gate(expanded: Tensor, filters: Tensor) -> Tensor:
    """Compute gelu(a) · b, (a, b) the halves of a map (B, 2E, H, W) convolved by filters."""
    batch, channels, height, width = expanded.shape
    out = expanded.new_empty(batch, channels // 2, height, width)
    numbers = [batch, channels // 2, height, width, filters.shape[3], *_steps(expanded)]
    run("gated_convolution", [expanded, filters.contiguous(), out], numbers)
    return out


def gate_backward(grad: Tensor, expanded: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the map and of the filters (2E, 1, K, K)."""
    grad = _planes(grad)
    grad_expanded, grad_filters = grad.new_empty(expanded.shape), grad.new_empty(filters.shape)
    tensors = [grad, expanded, filters.contiguous(), grad_expanded, grad_filters]
    numbers = [*grad.shape, filters.shape[3], *_steps(expanded, grad)]
    run("gated_backward", tensors, numbers)
    return grad_expanded, _like((filters,), grad_filters)[0]


def gdfn_gate(x: Tensor, weight: Tensor, bias: Tensor, filters: Tensor) -> Tensor:
    """Compute the gate of x (B, C, H, W) standardised and expanded by the 1x1 convolution."""
    _sizes("gdfn_gate", x, weight, bias, filters)
    return gate(pointwise(x, weight, bias, True), filters)


def gdfn_gate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, filters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of all, after expanding x once more: the widest map is not kept."""
    _sizes("gdfn_gate", x, weight, bias, filters, grad)
    expanded = pointwise(x, weight, bias, True)
    grad_expanded, grad_filters = gate_backward(grad, expanded, filters)
    return *pointwise_backward(grad_expanded, x, weight, bias, True), grad_filters


def _products(a: Tensor, b: Tensor, heads: int, squares: Tensor | None = None) -> Tensor:
    """Return Σ a bᵀ over the pixels for each head, (B, h, c, c), of maps a and b (B, C, H, W).

    `squares` (B, 2h, c) is set to Σ a² and Σ b² of each channel.
    """
    batch, channels, height, width = a.shape
    a, b = _planes(a), _planes(b)
    out = a.new_empty(batch, heads, channels // heads, channels // heads)
    numbers = [batch, height * width, heads, channels // heads, *_steps(a, b)]
    run("head_products", [a, b, out, squares], numbers)
    return out


def _apply(matrices: Tensor, x: Tensor, maps: int = 1) -> Tensor:
    """Return what each head's matrix (B, h, n·c, n·c) makes of its channels.

    x (B, n·C, H, W) is n maps one behind the other.
    """
    batch, heads, share = matrices.shape[:3]
    x, out = _planes(x), x.new_empty(x.shape)
    numbers = [batch, x.shape[2:].numel(), heads, share // maps, maps, *_steps(x, out)]
    run("head_apply", [x, matrices.contiguous(), out], numbers)
    return out


def head_sums(qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return Σ q kᵀ (B, h, c, c), and Σ q² and Σ k² (B, 2h, c), of qk (B, 2·h·c, H, W)."""
    batch, share, *_ = _sizes("head_sums", qk, h=heads)
    squares = qk.new_empty(batch, 2 * heads, share)
    return _products(*qk.chunk(2, 1), heads, squares), squares


def head_sums_backward(
    grad_products: Tensor, grad_squares: Tensor, qk: Tensor, heads: int
) -> Tensor:
    """Return the gradient of qk."""
    _, share, *_ = _sizes("head_sums", qk, grad_products, grad_squares, h=heads)
    # Of (q; k), [[2·diag, grad], [gradᵀ, 2·diag]] (q; k).
    diagonal = 2 * grad_squares.unflatten(1, (2, heads)).transpose(1, 2).flatten(2)
    both = torch.diag_embed(diagonal)
    both[..., :share, share:] = grad_products
    both[..., share:, :share] = grad_products.mT
    return _like((qk,), _apply(both, qk, maps=2))[0]


def head_apply(matrices: Tensor, x: Tensor) -> Tensor:
    """Return what each head's matrix (B, h, c, c) makes of its channels of x (B, h·c, H, W)."""
    _sizes("head_apply", matrices, x)
    return _apply(matrices, x)


def head_apply_backward(grad: Tensor, matrices: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of matrices and x."""
    _sizes("head_apply", matrices, x, grad)
    given = _products(grad, x, matrices.shape[1]), _apply(matrices.mT, grad)
    return _like((matrices, x), *given)


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute `ops.projected_dwconv`."""
    given = (x,)
    groups, depth, batch, height, width, _ = _sizes(
        "projected_dwconv", weight, bias, hidden, x, K=kernel
    )
    x, hidden, out = _planes(x), _planes(hidden), x.new_empty(x.shape)
    tile = min(height, _TILE_ROWS), min(width, _TILE_COLUMNS)
    numbers = [batch, height, width, *tile, x.shape[1], depth, groups, kernel, *_steps(x, hidden)]
    tensors = [x, hidden, weight.contiguous(), bias.contiguous(), out]
    run("projected_convolution", tensors, numbers)
    return _like(given, out)[0]


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, ...]:
    """Compute the gradients of `x`, `hidden`, `weight` and `bias`."""
    groups, depth, batch, height, width, _ = _sizes(
        "projected_dwconv", weight, bias, hidden, x, grad, K=kernel
    )
    given = x, hidden, weight, bias
    grad, x, hidden = map(_planes, (grad, x, hidden))
    # What is computed twice, in the rows around a band, should be little; yet there should be work
    # for some threads.
    bands = -(-height // (64 if batch >= 4 else 24))
    slices = min(batch * bands, MOST_SLICES)
    grad_x, grad_hidden = x.new_empty(x.shape), x.new_empty(hidden.shape)
    parts = x.new_empty(slices, len(bias) * (depth + 1))
    tensors = [grad, x, hidden, weight.contiguous(), bias.contiguous(), grad_x, grad_hidden, parts]
    numbers = [batch, height, width, x.shape[1], depth, groups, kernel]
    run("projected_backward", tensors, [*numbers, *_steps(x, hidden, grad), bands, slices])
    return _like(given, grad_x, grad_hidden, *_sum(parts, weight.shape, bias.shape))
