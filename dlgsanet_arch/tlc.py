"""Windows of the test-time local converter (TLC), as DLGSANet uses it.

A map is cut into windows of a fixed side, each is attended over by itself, and overlapping results
are averaged. Along an axis of length L with k = min(L, side): n = ceil(L / k) windows would do;
they start at 0, step, 2·step, … with step = ceil((L - k) / (n - 1)), the last at exactly L - k.

A window's attention is one matrix a head, made from sums over the window's pixels, and acts on each
pixel alone. So a pixel under several windows meets the mean of their matrices, and no window is
ever cut out: `membership` says over which positions a window's sums go, `shares` which mean acts
where. Both need only the cells between all cuts, in which the windows are the same.

Source: Chu et al., "Improving Image Restoration by Revisiting Global Information Aggregation",
ECCV 2022, in the variant of the published DLGSANet.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch.ops import attention_weights


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

    def windows(self) -> list[slice]:
        """List the positions under each window."""
        starts = (min(i * self.step, self.length - self.side) for i in range(self.count))
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
        starts = torch.arange(self.count, device=positions.device) * self.step
        starts = starts.clamp(max=self.length - self.side)[:, None]
        return ((starts <= positions) & (positions < starts + self.side)).float()

    def shares(self, positions: Tensor) -> Tensor:
        """Return the weight of each window in the mean over a position; as `membership`."""
        membership = self.membership(positions)
        return membership / membership.sum(0)


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
    down, across = (torch.arange(axis.length, device=qkv.device) for axis in (rows, columns))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    # (B, 3, h, c, H, W), and below m for windows of rows, n for windows of columns, w for columns.
    qkv = qkv.unflatten(1, (3, heads, -1))
    members = columns.membership(across).to(wide)
    weights = []
    for seen in rows.windows():
        qk = qkv[:, :2, ..., seen, :].permute(1, 0, 5, 2, 3, 4).to(wide)  # (2, B, W, h, c, rows)
        product = torch.einsum("nw,bwhcd->bnhcd", members, qk[0] @ qk[1].mT)
        squares = torch.einsum("nw,kbwhc->bnkhc", members, qk.square().sum(-1))
        weights.append(attention_weights(product, squares, temperature, activation))
    weights = torch.einsum(
        "nw,bmnhcd->mbwhcd", columns.shares(across).to(wide), torch.stack(weights, 1)
    )
    bands = []
    for cell in rows.cells():
        share = rows.shares(down[cell.start : cell.start + 1]).to(wide)[:, 0]
        acting = torch.einsum("m,mbwhcd->bwhcd", share, weights).to(qkv.dtype)
        bands.append(acting @ qkv[:, 2, ..., cell, :].permute(0, 4, 1, 2, 3))
    return torch.cat(bands, -1).permute(0, 2, 3, 4, 1).flatten(1, 2)
