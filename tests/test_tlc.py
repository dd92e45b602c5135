"""Attention within windows (TLC) against windows that are cut out, attended over and merged."""

import itertools

import definition
import numpy as np
import pytest
import torch
from dispatch import LargestTensor

from dlgsanet_arch.ops import channel_attention
from dlgsanet_arch.ops.attention import ACTIVATIONS
from dlgsanet_arch.tlc import Axis, windowed_attention

HEADS = 2
CHANNELS = 6
# (height, width), side of the windows
SIZES = [
    ((1, 1), 4),
    ((3, 2), 4),  # smaller than a window
    ((4, 4), 4),
    ((4, 9), 4),  # cut along one axis only
    ((11, 3), 4),
    ((5, 4), 4),  # a second window that overlaps all but one row
    ((8, 12), 4),  # exact multiples: no overlap
    ((9, 6), 4),
    ((13, 23), 6),
    ((7, 5), 1),  # a window for each pixel
    ((50, 47), 48),
    ((20, 61), 16),
    ((30, 8), 7),
]
# Of the largest value. Weights of bfloat16 lie on v, which has 8 bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def made(size, dtype=torch.float64, batch=2):
    qkv = torch.randn(batch, 3 * CHANNELS, *size, dtype=torch.float64)
    temperature = 1 + torch.rand(HEADS, 1, 1, dtype=torch.float64)
    return qkv.to(dtype), temperature.to(dtype)


def defined(qkv, temperature, activation, side):
    act = definition.ACTIVATIONS[activation]
    given = (each.double().numpy() for each in (qkv, temperature))
    return torch.from_numpy(definition.attend_in_windows(*given, act, side))


def error(actual, expected):
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("size", "side"), SIZES)
def test_windows_equal_the_definition(size, side, dtype):
    qkv, temperature = made(size, dtype)
    out = windowed_attention(qkv, temperature, HEADS, "relu", side)
    assert out.dtype == dtype
    assert out.shape == (2, CHANNELS, *size)
    assert error(out, defined(qkv, temperature, "relu", side)) < TOLERANCES[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("heads", [1, 3, 6])
def test_every_activation_and_number_of_heads(activation, heads):
    qkv, _ = made((13, 9))
    temperature = 1 + torch.rand(heads, 1, 1, dtype=torch.float64)
    out = windowed_attention(qkv, temperature, heads, activation, 5)
    torch.testing.assert_close(out, defined(qkv, temperature, activation, 5))


@pytest.mark.parametrize("layout", ["channels last", "rows apart", "columns apart", "batch apart"])
def test_any_layout(layout):
    qkv, temperature = made((16, 22), batch=4)
    qkv = {
        "channels last": qkv.to(memory_format=torch.channels_last),
        "rows apart": qkv[:, :, ::2],
        "columns apart": qkv[..., ::2],
        "batch apart": qkv[::2],
    }[layout]
    out = windowed_attention(qkv, temperature, HEADS, "relu", 5)
    torch.testing.assert_close(out, defined(qkv, temperature, "relu", 5))


@pytest.mark.parametrize(("size", "side"), [size for size in SIZES if max(size[0]) < 20])
@pytest.mark.parametrize("activation", ["gelu", "softmax"])
def test_gradients_are_those_of_the_result(size, side, activation):
    given = [each.requires_grad_() for each in made(size)]
    assert torch.autograd.gradcheck(
        lambda qkv, temperature: windowed_attention(qkv, temperature, HEADS, activation, side),
        given,
        fast_mode=True,
    )


def test_gradients_of_half_precision_are_near_those_of_float64():
    qkv, temperature = made((13, 9), torch.bfloat16)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        given = [each.detach().to(dtype).requires_grad_() for each in (qkv, temperature)]
        out = windowed_attention(*given, HEADS, "relu", 5)
        found.append(torch.autograd.grad(out.square().mean(), given))
    for expected, actual in zip(*found, strict=True):
        assert actual.dtype == torch.bfloat16
        assert error(actual, expected) < 3e-2


def test_gradients_equal_those_of_cut_windows():
    size, side = (13, 9), 5
    qkv, temperature = (each.requires_grad_() for each in made(size))
    rows, columns = (Axis.plan(length, side).windows() for length in size)
    total, count = 0, 0
    for row, column in itertools.product(rows, columns):
        lies = torch.zeros(size, dtype=torch.float64)
        lies[row, column] = 1
        window = qkv[..., row, column]
        attended = channel_attention(window, temperature, HEADS, "relu")
        border = (column.start, size[1] - column.stop, row.start, size[0] - row.stop)
        total = total + torch.nn.functional.pad(attended, border)
        count = count + lies
    cut = total / count
    joined = windowed_attention(qkv, temperature, HEADS, "relu", side)
    torch.testing.assert_close(joined, cut)
    grad = torch.randn_like(cut)
    expected, found = (torch.autograd.grad(out, (qkv, temperature), grad) for out in (cut, joined))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_axes_are_cut_as_the_definition_cuts_them(size, side):
    for length in size:
        axis = Axis.plan(length, side)
        starts, width = definition.window_starts(length, side)
        windows = axis.windows()
        assert windows == [slice(start, start + width) for start in starts]
        assert len(windows) == axis.count

        over = np.zeros((axis.count, length))
        for number, window in enumerate(windows):
            over[number, window] = 1
        positions = torch.arange(length)
        assert np.array_equal(axis.membership(positions).numpy(), over)
        assert np.allclose(axis.shares(positions).numpy(), over / over.sum(0))

        cells = axis.cells()
        assert [cell.start for cell in cells] == [0, *(cell.stop for cell in cells[:-1])]
        assert cells[-1].stop == length
        for cell in cells:  # the same windows within a cell, other ones beside it
            assert (over[:, cell] == over[:, cell.start : cell.start + 1]).all()
            if cell.stop < length:
                assert (over[:, cell.stop] != over[:, cell.start]).any()


def test_no_position_is_under_three_windows():
    for length in range(1, 100):
        for side in range(1, length + 1):
            axis = Axis.plan(length, side)
            over = axis.membership(torch.arange(length)).sum(0)
            assert over.min() >= 1
            assert over.max() <= 2


def test_no_side_is_one_window_over_all():
    assert Axis.plan(13, None).windows() == [slice(0, 13)]
    qkv, temperature = made((13, 9))
    whole = channel_attention(qkv, temperature, HEADS, "relu")
    torch.testing.assert_close(windowed_attention(qkv, temperature, HEADS, "relu", 13), whole)


@pytest.mark.parametrize(
    ("dtype", "value", "size", "side"),
    [
        # In bfloat16 a sum of ones stops at 256: q and k would not be of unit length.
        (torch.bfloat16, 1, (64, 32), 32),
        (torch.float16, 30, (96, 96), 90),  # an image's sums overflow
    ],
)
def test_sums_over_pixels_are_kept_in_float32(dtype, value, size, side):
    qkv = torch.full((1, 3 * CHANNELS, *size), float(value), dtype=dtype)
    temperature = torch.ones(HEADS, 1, 1, dtype=dtype)
    out = windowed_attention(qkv, temperature, HEADS, "relu", side)
    assert torch.equal(out, torch.full_like(out, value * CHANNELS // HEADS))


def test_no_map_of_all_windows_is_made():
    qkv, temperature = made((61, 130), torch.float32, batch=1)
    with LargestTensor() as largest:
        windowed_attention(qkv, temperature, HEADS, "relu", 32)
    assert largest.elements <= qkv.numel()


def test_an_image_s_sums_do_not_overflow_float16():
    ones = torch.full((1, 3 * CHANNELS, 96, 96), 30.0, dtype=torch.float16)
    temperature = torch.ones(HEADS, 1, 1, dtype=torch.float16)
    out = windowed_attention(ones, temperature, HEADS, "relu", 90)
    assert torch.equal(out, torch.full_like(out, 30 * CHANNELS // HEADS))
