import math
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from dlgsanet_arch.data import alignment
from dlgsanet_arch.data.alignment import Alignment, measure, summarise
from dlgsanet_arch.data.bicubic import bicubic

# LR of 75 to 150 pixels a side, as sub-images have.
SIDE = 300
SCALES = (2, 3, 4)


@pytest.fixture(scope="module")
def photographs(shared_data) -> list[np.ndarray]:
    paths = sorted(shared_data.glob("data/BSDS400/*.jpg"))[::60]
    if not paths:
        pytest.skip(f"no photographs in {shared_data / 'data/BSDS400'}")
    return [cv2.imread(str(path)) for path in paths]


def middle(picture: np.ndarray, side: int = SIDE) -> np.ndarray:
    top, left = ((each - side) // 2 for each in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def opencv(picture: np.ndarray, scale: int, method: int) -> np.ndarray:
    side = SIDE // scale
    return cv2.resize(picture, (side, side), interpolation=method)


def degraded(picture: np.ndarray, scale: int) -> np.ndarray:
    blurred = cv2.GaussianBlur(picture, (0, 0), 0.8 * scale)
    noise = np.random.default_rng(scale).normal(0, 10, (SIDE // scale, SIDE // scale, 3))
    return jpeg((bicubic(blurred, 1 / scale) + noise).clip(0, 255).astype(np.uint8), 60)


CENTRED = {
    "matlab": lambda hr, scale: bicubic(hr, 1 / scale),
    "pillow": lambda hr, scale: np.asarray(
        Image.fromarray(hr).resize((SIDE // scale,) * 2, Image.Resampling.BICUBIC)
    ),
    "area": lambda hr, scale: opencv(hr, scale, cv2.INTER_AREA),
    "linear": lambda hr, scale: opencv(hr, scale, cv2.INTER_LINEAR),
    "cubic": lambda hr, scale: opencv(hr, scale, cv2.INTER_CUBIC),
    "degraded": degraded,
    "darkened": lambda hr, scale: (bicubic(hr, 1 / scale) * 0.6 + 20).astype(np.uint8),
}


def error(found: Alignment, *truth: float) -> float:
    return max(abs(a - b) for a, b in zip(found.displacement, truth, strict=True))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", CENTRED)
def test_other_reductions_are_not_displacements(photographs, scale, method):
    found = {}
    for number, photograph in enumerate(photographs):
        hr = middle(photograph)
        found[str(number)] = measure(CENTRED[method](hr, scale), hr, scale)
    told = [each for each in found.values() if each.displacement]
    assert len(told) >= len(photographs) - 2
    assert max(error(each, 0, 0) for each in told) < 0.1
    assert not summarise(found).displaced
    assert summarise(found).unrelated == summarise(found).strays == ()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("pixels", [(1, 1), (-1, 0), (2, -3), (0, 7), (-10, 9)])
def test_displacements_are_found_with_their_sign(photographs, scale, pixels):
    for photograph in photographs:
        top, left = (10 - each for each in pixels)
        # further up in the photograph is further down in the crop
        lr = bicubic(photograph[top : top + SIDE, left : left + SIDE], 1 / scale)
        hr = photograph[10 : 10 + SIDE, 10 : 10 + SIDE]
        found = measure(lr, hr, scale)
        assert error(found, *(each / scale for each in pixels)) < 0.03
        assert found.correlation > 0.99


@pytest.mark.parametrize("scale", SCALES)
def test_slicing_displaces_by_half_a_scale_less_one(photographs, scale):
    found = {}
    for number, photograph in enumerate(photographs):
        hr = middle(photograph)
        found[str(number)] = measure(hr[::scale, ::scale], hr, scale)
    summary = summarise(found)
    truth = (scale - 1) / (2 * scale)
    assert summary.displaced
    assert summary.telling >= len(photographs) - 2
    assert summary.displacement == pytest.approx((truth, truth), abs=0.03)


@pytest.mark.parametrize("scale", SCALES)
def test_sub_images_of_bicubic_lr_differ_at_their_border_alone(photographs, scale):
    whole = middle(photographs[0], 312)
    lr = bicubic(whole, 1 / scale)[2 : 2 + SIDE // scale, 2 : 2 + SIDE // scale]
    hr = whole[2 * scale : 2 * scale + SIDE, 2 * scale : 2 * scale + SIDE]
    assert not np.array_equal(lr, bicubic(hr, 1 / scale))
    found = measure(lr, hr, scale)
    assert found.difference < 1e-3  # one rounding in a thousand
    assert error(found, 0, 0) < 1e-2
    assert found.correlation > 0.999


def test_difference_is_in_8_bit_levels(photographs):
    hr = middle(photographs[0]) // 2
    lr = bicubic(hr, 1 / 2)
    assert measure(lr, hr, 2).difference == 0
    assert measure(lr + 3, hr, 2).difference == pytest.approx(3)
    one_colour = lr.copy()
    one_colour[..., 1] += 3
    assert measure(one_colour, hr, 2).difference == pytest.approx(1)


def test_16_bits_are_measured_as_8(photographs):
    hr = middle(photographs[0])
    lr = bicubic(hr, 1 / 2)
    deep = measure(lr.astype(np.uint16) * 257, hr.astype(np.uint16) * 257, 2)
    assert deep.difference < 0.3  # rounding of lr
    assert error(deep, 0, 0) < 0.01


@pytest.mark.parametrize("scale", SCALES)
def test_another_picture_is_unrelated(photographs, scale):
    pictures = [middle(photograph) for photograph in photographs]
    found = {
        str(number): measure(bicubic(pictures[number - 1], 1 / scale), hr, scale)
        for number, hr in enumerate(pictures)
    }
    assert all(each.displacement is None for each in found.values())
    summary = summarise(found)
    assert summary.displacement is None
    assert not summary.displaced
    assert summary.telling == 0
    judged = [name for name, each in found.items() if each.correlation is not None]
    assert summary.unrelated == tuple(judged)
    assert len(judged) >= len(pictures) - 2


def test_a_turned_picture_is_unrelated(photographs):
    hr = middle(photographs[0])
    assert measure(bicubic(hr, 1 / 2)[::-1].copy(), hr, 2).unrelated
    assert not measure(bicubic(hr, 1 / 2), hr, 2).unrelated


def test_black_lr_of_a_detailed_picture_is_unrelated(photographs):
    hr = middle(photographs[0])
    found = measure(np.zeros((SIDE // 2, SIDE // 2, 3), np.uint8), hr, 2)
    assert found.unrelated
    assert found.displacement is None


def test_constant_pictures_do_not_tell():
    hr = np.full((SIDE, SIDE, 3), 200, np.uint8)
    found = measure(bicubic(hr, 1 / 2), hr, 2)
    assert found == Alignment(None, math.inf, 0.0, None)
    assert not found.unrelated


@pytest.mark.parametrize("axis", [0, 1])
def test_stripes_do_not_tell(axis):
    wave = 128 + 90 * np.sin(np.arange(SIDE) / 9) + 30 * np.sin(np.arange(SIDE) / 23)
    lines = np.expand_dims(wave.astype(np.uint8), 1 - axis)
    hr = np.ascontiguousarray(np.broadcast_to(lines[..., None], (SIDE, SIDE, 3)))
    noise = np.random.default_rng(0).integers(-1, 2, (SIDE // 2, SIDE // 2, 3))
    lr = (bicubic(hr, 1 / 2) + noise).astype(np.uint8)
    found = measure(lr, hr, 2)
    assert found.displacement is None
    assert found.uncertainty > alignment.CERTAIN
    assert not found.unrelated


def test_a_repeating_texture_lies_where_the_least_displacement_puts_it():
    y, x = np.mgrid[:240, :240] * 2 * np.pi / 16  # a period of 8 LR pixels
    hr = np.dstack([128 + 50 * np.sin(y) + 50 * np.sin(x)] * 3).astype(np.uint8)
    assert error(measure(bicubic(hr, 1 / 2), hr, 2), 0, 0) < 0.01
    one_period = bicubic(np.roll(hr, (16, 16), (0, 1)), 1 / 2)
    assert error(measure(one_period, hr, 2), 0, 0) < 0.01


def test_a_repeating_texture_with_marks_lies_where_the_marks_are():
    y, x = np.mgrid[:280, :280] * 2 * np.pi / 16
    marks = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 60, (280, 280)), (0, 0), 2)
    levels = 128 + 50 * np.sin(y) + 50 * np.sin(x) + marks
    scene = np.dstack([levels.clip(0, 255).astype(np.uint8)] * 3)
    found = measure(bicubic(scene[24:264, 24:264], 1 / 2), scene[40:280, 40:280], 2)
    assert error(found, 8, 8) < 0.01


@pytest.mark.parametrize("pixels", [24, 30, 60])
def test_displacements_out_of_reach_are_not_told(photographs, pixels):
    hr = photographs[0][:96, :96]
    lr = bicubic(photographs[0][pixels : pixels + 96, :96], 1 / 2)
    assert measure(lr, hr, 2).displacement is None


@pytest.mark.parametrize("side", [1, 2, 4, 5, 16, 31, 32, 33])
def test_small_pictures_are_measured_without_a_displacement_where_too_small(side):
    hr = np.random.default_rng(0).integers(0, 256, (2 * side, 3 * side * 2, 3), np.uint8)
    found = measure(bicubic(hr, 1 / 2), hr, 2)
    assert found.difference == 0
    assert (found.displacement is None) == (side < 32)


def test_large_pictures_are_fitted_in_their_middle(photographs, monkeypatch):
    hr = middle(photographs[0])
    lr = bicubic(hr, 1 / 2)
    lr[:30] = lr[:, :30] = 0
    assert measure(lr, hr, 2).uncertainty > 0.01
    monkeypatch.setattr(alignment, "MOST", 60)
    assert error(measure(lr, hr, 2), 0, 0) < 1e-3


def test_sizes_that_do_not_fit_are_refused():
    lr = np.zeros((40, 50, 3), np.uint8)
    for shape in [(80, 101, 3), (79, 100, 3), (80, 100), (80, 100, 4)]:
        with pytest.raises(ValueError, match=r"lr.shape=\(40, 50, 3\).*scale=2"):
            measure(lr, np.zeros(shape, np.uint8), 2)


def lying(rows: float, columns: float, difference: float = 1.0) -> Alignment:
    return Alignment((rows, columns), 0.01, difference, 0.9)


def test_a_set_is_judged_by_its_median_and_strays_are_named():
    silent = Alignment(None, math.inf, 9.0, None)
    other = Alignment(None, 1.0, 50.0, 0.1)
    summary = summarise(
        {
            "a": lying(0.37, -0.01),
            "b": lying(0.38, 0.0),
            "c": lying(0.39, 0.01),
            "far": lying(0.38, 3.0),
            "low": lying(-1.0, 0.0),
            "flat": silent,
            "other": other,
        }
    )
    assert (summary.pairs, summary.telling) == (7, 5)
    assert summary.displacement == (0.38, 0.0)
    assert summary.displaced
    assert summary.difference == 1.0
    assert summary.strays == ("far", "low")
    assert summary.unrelated == ("other",)


def test_one_displaced_pair_does_not_displace_its_set():
    summary = summarise({"a": lying(0, 0), "b": lying(0.01, 0), "c": lying(1, 1)})
    assert not summary.displaced
    assert summary.strays == ("c",)


def test_a_set_without_pairs_says_nothing():
    summary = summarise({})
    assert (summary.pairs, summary.telling, summary.displacement) == (0, 0, None)
    assert (summary.difference, summary.strays, summary.unrelated) == (0.0, (), ())
    assert not summary.displaced
