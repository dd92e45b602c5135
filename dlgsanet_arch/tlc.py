"""Windows of the test-time local converter (TLC), as DLGSANet uses it.

A map is cut into windows of a fixed side, each is worked on by itself, and overlapping results
are averaged. Along an axis of length L with k = min(L, side): n = ceil(L / k) windows would do;
they start at 0, step, 2·step, … with step = ceil((L - k) / (n - 1)), the last at exactly L - k.
All windows are cut into one batch and merged by index arithmetic: no loop over windows, no state,
and a fixed order of summation, so results repeat bit for bit on every device.

Source: Chu et al., "Improving Image Restoration by Revisiting Global Information Aggregation",
ECCV 2022, in the variant of the published DLGSANet.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """How one axis is cut: `count` windows of `side`, `step` apart, the last ending the axis."""

    length: int
    side: int
    step: int
    count: int

    @classmethod
    def plan(cls, length: int, side: int) -> "Axis":
        """Cut an axis of `length` positions into windows of at most `side`."""
        side = min(length, side)
        least = (length - 1) // side + 1
        if least == 1:
            return cls(length, side, side, 1)
        step = -(-(length - side) // (least - 1))
        return cls(length, side, step, -(-(length - side) // step) + 1)

    def starts(self, device: torch.device) -> Tensor:
        """List where the windows start: (count,)."""
        return (torch.arange(self.count, device=device) * self.step).clamp(
            max=self.length - self.side
        )

    def positions(self, device: torch.device) -> Tensor:
        """List the positions within each window: (count, side)."""
        return self.starts(device)[:, None] + torch.arange(self.side, device=device)

    def _covering(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Find the first and the last window over each position: (length,) each."""
        position = torch.arange(self.length, device=device)
        last = torch.where(
            position >= self.length - self.side,
            self.count - 1,
            (position // self.step).clamp(max=max(self.count - 2, 0)),
        )
        first = ((position - self.side) // self.step + 1).clamp(min=0, max=self.count - 1)
        return first, last

    def cover(self, device: torch.device) -> Tensor:
        """Count the windows over each position: (length,)."""
        first, last = self._covering(device)
        return last - first + 1

    def slices(self) -> list[slice]:
        """List the positions under each window."""
        starts = self.starts(torch.device("cpu")).tolist()
        return [slice(start, start + self.side) for start in starts]

    def membership(self, dtype: torch.dtype) -> Tensor:
        """Return which window lies over which position, as zeros and ones: (count, length)."""
        membership = torch.zeros(self.count, self.length, dtype=dtype)
        for window, positions in zip(membership, self.slices(), strict=True):
            window[positions] = 1
        return membership

    def cuts(self) -> list[int]:
        """List where a window starts or ends, both ends of the axis included."""
        return sorted({cut for each in self.slices() for cut in (each.start, each.stop)})

    def bands(self) -> list[tuple[slice, slice]]:
        """Cut the axis where a window starts or ends.

        Returns:
            The longest slices of positions under the same windows, each with these windows.
        """
        slices = self.slices()
        bands = []
        for start, stop in itertools.pairwise(self.cuts()):
            over = [i for i, each in enumerate(slices) if each.start <= start < each.stop]
            bands.append((slice(start, stop), slice(over[0], over[-1] + 1)))
        return bands

    def layers(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, for each layer of overlap, where each position lies in the windows.

        Yields:
            (length,) each: the window's number, the offset in it, and whether there is such a
            window at all; where there is none, number and offset are those of another window.
        """
        position = torch.arange(self.length, device=device)
        first, last = self._covering(device)
        starts = self.starts(device)
        for layer in range(self._deepest_overlap()):
            window = torch.minimum(first + layer, last)
            yield window, position - starts[window], first + layer <= last

    def _deepest_overlap(self) -> int:
        starts = [min(i * self.step, self.length - self.side) for i in range(self.count)]
        return max(sum(s - self.side < other <= s for other in starts) for s in starts)


class Windows:
    """The windows of an H x W map, for maps as rows of pixels: (B, H·W, C).

    Pixels are moved as whole rows of C values.

    Args:
        size: (H, W) of the map.
        side: Largest side of a window, in pixels; 1 or more.

    Attributes:
        rows: How the rows are cut.
        columns: How the columns are cut.
    """

    def __init__(self, size: tuple[int, int], side: int) -> None:
        self.rows = Axis.plan(size[0], side)
        self.columns = Axis.plan(size[1], side)

    def __len__(self) -> int:
        return self.rows.count * self.columns.count

    def cut(self, pixels: Tensor) -> Tensor:
        """Cut (B, H·W, C) into (B · len(self), N, C), the windows of an item one after another."""
        rows, columns = self.rows, self.columns
        row = rows.positions(pixels.device)[:, None, :, None]
        column = columns.positions(pixels.device)[None, :, None, :]
        index = row * columns.length + column
        cut = pixels.index_select(1, index.flatten())
        return cut.unflatten(1, (len(self), -1)).flatten(0, 1)

    def merge(self, windows: Tensor) -> Tensor:
        """Average (B · len(self), N, C) where windows overlap, giving (B, H·W, C)."""
        rows, columns = self.rows, self.columns
        pixels = windows.unflatten(0, (-1, len(self))).flatten(1, 2)
        total = None
        for row_window, row_offset, row_valid in rows.layers(windows.device):
            for column_window, column_offset, column_valid in columns.layers(windows.device):
                window = row_window[:, None] * columns.count + column_window
                offset = row_offset[:, None] * columns.side + column_offset
                part = pixels.index_select(
                    1, (window * rows.side * columns.side + offset).flatten()
                )
                if total is None:  # every pixel has a first window
                    total = part
                else:
                    valid = (row_valid[:, None] & column_valid).flatten()[:, None]
                    total = total + torch.where(valid, part, 0)
        count = rows.cover(windows.device)[:, None] * columns.cover(windows.device)
        return total / count.flatten()[:, None].to(total.dtype)
