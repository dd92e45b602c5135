"""Windows of the test-time local converter (TLC), as DLGSANet uses it.

A map is cut into windows of a fixed side, each is attended over by itself, and overlapping results
are averaged. Along an axis of length L with k = min(L, side): n = ceil(L / k) windows would do;
they start at 0, step, 2·step, … with step = ceil((L - k) / (n - 1)), the last at exactly L - k.

A window's attention is one matrix for each head, made from sums over the window's pixels, and acts
on each pixel alone. So no window is cut out along the columns: `membership` says over which columns
a window's sums go, and `shares` which mean of matrices acts where.

Source: Chu et al., "Improving Image Restoration by Revisiting Global Information Aggregation",
ECCV 2022, in the variant of the published DLGSANet.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch.ops import attention_weights
from dlgsanet_arch.precision import widened


class Axis(NamedTuple):
    """How one axis is cut: `count` windows of `side`, `step` apart, the last ending the axis."""

    length: int
    side: int
    step: int
    count: int

    @classmethod
    def plan(cls, length: int, side: int | None) -> "Axis":
        """Cut an axis of `length` positions into windows of at most `side`; None for one window."""
        side = length if side is None else min(length, side)
        least = (length - 1) // side + 1
        if least == 1:
            return cls(length, side, side, 1)
        step = -(-(length - side) // (least - 1))
        return cls(length, side, step, -(-(length - side) // step) + 1)

    def starts(self, device: torch.device) -> Tensor:
        """Return where each window starts, (count,)."""
        starts = torch.arange(self.count, device=device) * self.step
        return starts.clamp(max=self.length - self.side)

    def windows(self) -> list[slice]:
        """List the positions under each window."""
        starts = self.starts(torch.device("cpu")).tolist()
        return [slice(start, start + self.side) for start in starts]

    def cells(self) -> list[slice]:
        """List the longest slices of positions under the same windows."""
        cuts = sorted({cut for each in self.windows() for cut in (each.start, each.stop)})
        return [slice(*pair) for pair in itertools.pairwise(cuts)]

    def membership(self, positions: Tensor) -> Tensor:
        """Return which window lies over which position, as zeros and ones.

        Args:
            positions: (n,), whole numbers.

        Returns:
            (count, n) in float32.
        """
        starts = self.starts(positions.device)[:, None]
        return ((starts <= positions) & (positions < starts + self.side)).float()

    def shares(self, positions: Tensor) -> Tensor:
        """Return the weight of each window in the mean over a position; as `membership`."""
        membership = self.membership(positions)
        return membership / membership.sum(0)


class _Cut(NamedTuple):
    """A map cut into m windows of k rows and n windows of columns, as tensors.

    A row is under one or two windows: windows start at least (n - 2) / (n - 1) of their side apart,
    and of three the first ends before the third starts. So the mean over a row is that of the first
    and the last window over it, which may be the same.

    Attributes:
        rows: The rows under each window, one window after the other, (m·k,).
        windows: The first and the last window over each row, (2, H), or (1, H) for m = 1.
        offsets: Where each of these windows has that row, as `windows`.
        members: Which window lies over which column, (n, W).
        shares: The weight of each window in the mean over a column, (W, n).
    """

    rows: Tensor
    windows: Tensor
    offsets: Tensor
    members: Tensor
    shares: Tensor


def _cut(rows: Axis, columns: Axis, dtype: torch.dtype, device: torch.device) -> _Cut:
    down, across = (torch.arange(axis.length, device=device) for axis in (rows, columns))
    starts = rows.starts(device)[:, None]
    first = (starts + rows.side <= down).sum(0)
    last = (starts <= down).sum(0) - 1
    windows = torch.stack([first, last] if rows.count > 1 else [first])
    return _Cut(
        rows=(starts + torch.arange(rows.side, device=device)).flatten(),
        windows=windows,
        offsets=down - starts[windows, 0],
        members=columns.membership(across).to(dtype),
        shares=columns.shares(across).to(dtype).T.contiguous(),
    )


@functools.lru_cache(maxsize=64)
def _cached_cut(rows: Axis, columns: Axis, dtype: torch.dtype, device: torch.device) -> _Cut:
    with torch.inference_mode(False):  # what is made in it could not be used in training
        return _cut(rows, columns, dtype, device)


def _is_traced(qkv: Tensor) -> bool:
    """Return whether tensors must not be kept: for tracers, and in the memory of a CUDA graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(qkv) is not Tensor:
        return True
    return qkv.is_cuda and torch.cuda.is_current_stream_capturing()


def windowed_attention(
    qkv: Tensor, temperature: Tensor, heads: int, activation: str, window: int
) -> Tensor:
    """Attend over channels within windows, overlaps averaged.

    Args:
        qkv: (B, 3C, H, W), as for `ops.channel_attention`.
        temperature: (h, 1, 1).
        heads: h, of c = C // h channels each.
        activation: A key of `ops.attention.ACTIVATIONS`.
        window: Side of the windows in pixels.

    Returns:
        (B, C, H, W) in the dtype of `qkv`.
    """
    rows, columns = (Axis.plan(length, window) for length in qkv.shape[2:])
    make_cut = _cut if _is_traced(qkv) else _cached_cut
    cut = make_cut(rows, columns, widened(qkv.dtype), qkv.device)
    batch, share = qkv.shape[0], qkv.shape[1] // (3 * heads)
    qkv = qkv.unflatten(1, (3, heads, share))

    # q and k of each window of rows and each column: (B, m, W, h, 2c, k).
    qk = qkv[:, :2].index_select(4, cut.rows).unflatten(4, (rows.count, rows.side))
    qk = qk.permute(0, 4, 6, 2, 1, 3, 5)
    qk = qk.to(widened(qk.dtype), memory_format=torch.contiguous_format).flatten(4, 5)
    # Σ q kᵀ beside Σ q² and Σ k², on the diagonal: (B, m, n, h, 2c, 2c).
    sums = (qk @ qk.mT).flatten(3).flatten(0, 1)
    sums = torch.bmm(cut.members.expand(sums.shape[0], -1, -1), sums)
    sums = sums.view(batch, rows.count, columns.count, heads, 2 * share, 2 * share)
    squares = sums.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, share)).transpose(-3, -2)
    weights = attention_weights(sums[..., :share, share:], squares, temperature, activation)
    weights = weights.flatten(3).flatten(0, 1)
    acting = torch.bmm(cut.shares.expand(weights.shape[0], -1, -1), weights).to(qkv.dtype)
    acting = acting.view(batch, rows.count, columns.length, heads, share, share)

    v = qkv[:, 2].index_select(3, cut.rows).unflatten(3, (rows.count, rows.side))
    out = acting @ v.permute(0, 3, 5, 1, 2, 4)  # (B, m, W, h, c, k)
    out = out[:, cut.windows, :, :, :, cut.offsets].mean(0)  # (H, B, W, h, c)
    return out.permute(1, 3, 4, 0, 2).flatten(1, 2)
