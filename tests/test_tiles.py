from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dlgsanet_arch.tiles import rows_in_tiles, run_in_tiles, self_ensemble

SCALE = 2


def upsample(image: Tensor) -> Tensor:
    return image.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)


def network(radius: int, out_channels: int = 4):
    """A network that sees `radius` pixels around and makes SCALE x SCALE out of each."""
    side = 2 * radius + 1
    weight = torch.randn(out_channels * SCALE**2, 3, side, side, generator=torch.manual_seed(1))

    def run(image: Tensor) -> Tensor:
        # Whole numbers: sums are exact, in whatever order they are taken.
        return F.pixel_shuffle(F.conv2d(image, weight.mul(4).round(), padding=radius), SCALE)

    return run


def whole_numbers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape).float()


def dihedral(run, image: np.ndarray) -> np.ndarray:
    """The mean over rotations by quarters, with and without a mirror, in float64."""
    results = []
    for turns in range(4):
        for mirrored in (False, True):
            given = np.rot90(image, turns, (2, 3))
            given = given[..., ::-1] if mirrored else given
            made = run(torch.from_numpy(given.copy())).numpy()
            made = made[..., ::-1] if mirrored else made
            results.append(np.rot90(made, -turns, (2, 3)))
    return np.mean(results, 0)


@pytest.mark.parametrize("shape", [(1, 3, 9, 14), (2, 3, 11, 6), (1, 3, 1, 5)])
def test_the_ensemble_is_the_mean_of_eight(shape):
    weight, image = torch.randn(12, 3, 3, 3).double(), torch.rand(shape).double()

    def run(given):
        return F.pixel_shuffle(F.conv2d(given, weight, padding=1).tanh(), SCALE)

    expected = dihedral(run, image.numpy())
    np.testing.assert_allclose(self_ensemble(run, image).numpy(), expected, rtol=0, atol=1e-14)


def test_the_ensemble_runs_eight_times_and_keeps_what_turns_with_the_image():
    image, seen = torch.randn(2, 3, 7, 12), []

    def run(given):
        seen.append(given.clone())
        return upsample(given) * 1.1

    assert torch.equal(self_ensemble(run, image), upsample(image) * 1.1)
    assert len({(tuple(given.shape), tuple(given.flatten().tolist())) for given in seen}) == 8
    assert all(given.is_contiguous() for given in seen)


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("overlap", [8, 11])
@pytest.mark.parametrize("tile", [16, 23])
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 61, 90), (2, 3, 17, 16), (1, 3, 5, 70), (1, 3, 23, 4), (1, 3, 1, 1), (1, 3, 24, 47)],
)
def test_tiles_give_the_whole_image(shape, tile, overlap, radius):
    image, run = whole_numbers(*shape), network(radius)
    assert torch.equal(run_in_tiles(run, image, SCALE, tile, overlap), run(image))


@pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (5, 0), (4, 1), (7, 6), (6, 5), (9, 3)])
def test_every_pixel_comes_from_its_place(tile, overlap):
    image = torch.rand(1, 3, 29, 41)
    assert torch.equal(run_in_tiles(upsample, image, SCALE, tile, overlap), upsample(image))


def test_tiles_that_see_too_little_are_blended_without_a_seam():
    count = iter(range(100))
    image = torch.zeros(1, 1, 16, 60)

    def run(given):  # each tile is brighter than the one before
        return upsample(given) + next(count)

    rows = run_in_tiles(run, image, SCALE, tile=24, overlap=12)[0, 0].unique(dim=0)
    assert len(rows) == 1
    steps = rows[0].diff()
    # Half of the overlap's 24 pixels rise from 0 to 1; a cut would be a step of 1.
    assert steps.min() >= 0
    assert steps.max().item() == pytest.approx(1 / 13, abs=1e-6)
    assert (rows[0, 0], rows[0, -1]) == (0, 3)


def test_the_edge_of_a_tile_has_no_weight():
    image = torch.rand(1, 3, 40, 56)

    def run(given):
        spoilt = torch.full_like(result := upsample(given), 1e6)
        spoilt[..., 4:-4, 4:-4] = result[..., 4:-4, 4:-4]
        return spoilt

    result = run_in_tiles(run, image, SCALE, tile=20, overlap=8)
    assert torch.equal(result[..., 4:-4, 4:-4], upsample(image)[..., 4:-4, 4:-4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    image = torch.rand(1, 3, 30, 41).to(dtype)
    result = run_in_tiles(partial(self_ensemble, upsample), image, SCALE, 16, 4)
    assert result.dtype == dtype
    assert torch.equal(result, upsample(image))


@pytest.mark.parametrize(
    ("scale", "tile", "overlap", "said"),
    [
        (2, 0, 0, "tile=0, overlap=0"),
        (2, 8, 8, "tile=8, overlap=8"),
        (2, 8, -1, "tile=8, overlap=-1"),
        (3, 8, 2, r"at scale=3 a tile of 8x8 .* 24x24; .*\(1, 3, 16, 16\)"),
    ],
)
def test_arguments_that_cannot_be(scale, tile, overlap, said):
    with pytest.raises(ValueError, match=said):
        run_in_tiles(upsample, torch.rand(1, 3, 20, 20), scale, tile, overlap)


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_rows_come_from_the_top_and_tiles_of_one_size_are_computed_together(batch):
    lefts, shapes, counted = [], [], []
    image, plain = whole_numbers(2, 3, 37, 50), network(1)
    image[:, 0] = torch.arange(50.0)

    def run(given):
        lefts.extend(given[::2, 0, 0, 0].int().tolist())
        shapes.append(tuple(given.shape[2:]))
        return plain(given)

    rows = list(rows_in_tiles(run, image, SCALE, 16, 6, lambda *done: counted.append(done), batch))
    assert len(rows) == 4
    assert torch.equal(torch.cat(rows, 2), plain(image))
    assert set(shapes) == {(16, 16)}
    assert len(shapes) == 4 * -(-5 // batch)
    assert len(counted) == len(shapes)
    assert counted[-1] == (20, 20)
    assert lefts[:5] == sorted(set(lefts))
    assert all(a + 16 - b >= 6 for a, b in pairwise(lefts[:5]))
