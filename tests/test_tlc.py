"""Windows of the test-time converter against a loop over windows."""

import pytest
import torch
from definition import window_starts

from dlgsanet_arch.tlc import Windows

SIZES = [
    ((1, 1), 4),
    ((4, 4), 4),
    ((5, 4), 4),  # a second window that overlaps all but one row
    ((9, 6), 4),
    ((13, 23), 6),
    ((29, 3), 4),
    ((50, 47), 48),
    ((61, 113), 48),
]


def loop_over_windows(x: torch.Tensor, side: int) -> list[torch.Tensor]:
    rows, height = window_starts(x.shape[2], side)
    columns, width = window_starts(x.shape[3], side)
    return [x[:, :, r : r + height, c : c + width] for r in rows for c in columns]


def as_pixels(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_cut_equals_a_loop_over_windows(size, side):
    x = torch.rand(2, 3, *size)
    expected = torch.stack([as_pixels(w) for w in loop_over_windows(x, side)], 1)
    windows = Windows(size, side)
    assert len(windows) == expected.shape[1]
    assert torch.equal(windows.cut(as_pixels(x)), expected.flatten(0, 1))


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_merge_averages_what_overlaps(size, side):
    windows = Windows(size, side)
    expected = torch.zeros(2, 3, *size, dtype=torch.float64)
    count = torch.zeros(size, dtype=torch.float64)
    parts = [torch.rand_like(w) for w in loop_over_windows(expected, side)]
    for part, place, covered in zip(
        parts,
        loop_over_windows(expected, side),
        loop_over_windows(count[None, None], side),
        strict=True,
    ):
        place += part
        covered += 1
    given = torch.stack([as_pixels(part) for part in parts], 1).flatten(0, 1)
    torch.testing.assert_close(windows.merge(given), as_pixels(expected / count))


def test_merge_undoes_cut_and_keeps_dtype_and_gradient():
    windows = Windows((13, 10), 6)
    x = torch.rand(3, 130, 5, dtype=torch.bfloat16, requires_grad=True)
    merged = windows.merge(windows.cut(x))
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, x)
    merged.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
