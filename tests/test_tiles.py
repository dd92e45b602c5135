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
    weight = torch.randn(12, 3, 3, 3, dtype=torch.float64)

    def run(image):
        weights = weight.to(image.dtype)
        return F.pixel_shuffle(F.conv2d(image, weights, padding=1).tanh(), SCALE)

    image = torch.rand(shape, dtype=torch.float64)
    expected = dihedral(run, image.numpy())
    np.testing.assert_allclose(self_ensemble(run, image).numpy(), expected, rtol=0, atol=1e-14)
    single = self_ensemble(run, image.float())
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-6)


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

    result = run_in_tiles(run, image, SCALE, tile=24, overlap=12)[0, 0]
    rows = result.unique(dim=0)
    assert len(rows) == 1
    steps = rows[0].diff()
    # Half of the overlap's 24 pixels rise from 0 to 1; a cut would be a step of 1.
    assert steps.min() >= 0
    assert steps.max().item() == pytest.approx(1 / 13, abs=1e-6)
    assert rows[0, 0] == 0
    assert rows[0, -1] == 3


def test_the_edge_of_a_tile_has_no_weight():
    image = torch.rand(1, 3, 40, 56)

    def run(given):
        result = upsample(given)
        spoilt = result.new_full(result.shape, 1e6)
        inside = (..., slice(4, -4), slice(4, -4))
        spoilt[inside] = result[inside]
        return spoilt

    result = run_in_tiles(run, image, SCALE, tile=20, overlap=8)
    assert torch.equal(result[..., 4:-4, 4:-4], upsample(image)[..., 4:-4, 4:-4])


def test_tiles_have_one_size_are_counted_and_share_the_overlap():
    shapes, counted, image = [], [], torch.zeros(2, 3, 30, 50)
    image[:] = torch.arange(50.0)
    lefts = []

    def run(given):
        shapes.append(tuple(given.shape))
        lefts.append(int(given[0, 0, 0, 0]))
        return upsample(given)

    run_in_tiles(run, image, SCALE, 16, 6, on_tile=lambda *done: counted.append(done))
    assert set(shapes) == {(2, 3, 16, 16)}
    assert counted == [(i + 1, 15) for i in range(15)]
    assert lefts[:5] == sorted(set(lefts))
    assert all(a + 16 - b >= 6 for a, b in pairwise(lefts[:5]))


def test_both_at_once():
    image, run = whole_numbers(1, 3, 37, 29), network(1)
    tiled = run_in_tiles(partial(self_ensemble, run), image, SCALE, 16, 8)
    assert torch.equal(tiled, self_ensemble(run, image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    image = torch.rand(1, 3, 30, 41).to(dtype)
    result = run_in_tiles(partial(self_ensemble, upsample), image, SCALE, 16, 4)
    assert result.dtype == dtype
    assert torch.equal(result, upsample(image))


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_tiles_that_cannot_be(tile, overlap):
    with pytest.raises(ValueError, match=f"tile={tile}, overlap={overlap}"):
        run_in_tiles(upsample, torch.rand(1, 3, 20, 20), SCALE, tile, overlap)


def test_another_scale_than_the_network_s():
    with pytest.raises(ValueError, match=r"at scale=3 a tile of 8x8 .* 24x24; .*\(1, 3, 16, 16\)"):
        run_in_tiles(upsample, torch.rand(1, 3, 20, 20), 3, 8, 2)


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_rows_come_from_the_top_and_tiles_are_computed_together(batch):
    sizes, counted = [], []
    image, plain = whole_numbers(2, 3, 37, 50), network(1)

    def run(given):
        sizes.append(len(given))
        return plain(given)

    def count(*done):
        counted.append(done)

    rows = list(rows_in_tiles(run, image, SCALE, 16, 6, on_tile=count, batch=batch))
    assert len(rows) == 4
    assert torch.equal(torch.cat(rows, 2), plain(image))
    assert sum(sizes) == 2 * 4 * 5
    assert max(sizes) == 2 * min(batch, 5)
    assert counted[-1] == (20, 20)
