from fractions import Fraction

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils.matlab_functions import imresize

from dlgsanet_arch.data import bicubic as module
from dlgsanet_arch.data.benchmark import Scores, measure
from dlgsanet_arch.data.bicubic import bicubic

SCALES = [1 / 2, 1 / 3, 1 / 4, 2, 3, 4]


def unrounded(image: np.ndarray, scale: float) -> np.ndarray:
    peak = np.iinfo(image.dtype).max
    return imresize(image.astype(np.float32) / peak, scale) * peak


def assert_equals_imresize(image: np.ndarray, scale: float) -> float:
    """Compare all values, and return the share of those that differ."""
    ours, exact = bicubic(image, scale), unrounded(image, scale)
    expected = exact.round().clip(0, np.iinfo(image.dtype).max).astype(image.dtype)
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    # Half-way between two levels the order of the sum decides, and BasicSR's is the BLAS's.
    halfway = np.abs(exact % 1 - 0.5) < 1e-4 * np.iinfo(image.dtype).max / 255
    different = ours != expected
    assert not (different & ~halfway).any(), (
        f"{(different & ~halfway).sum()} of {different.size} differ at {scale=}; ours, and "
        f"imresize's before rounding: {ours[different][:5]}, {exact[different][:5]}"
    )
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
    return different.mean()


def made(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    """Noise on black and white: sums fall outside the range, and are to be clipped."""
    rng = np.random.default_rng(sum(shape))
    peak = np.iinfo(dtype).max
    return rng.choice([0, peak, peak // 3, peak // 2], shape).astype(dtype)


# Below 1/2 imresize mirrors a side only if it is 1 or as long as what it adds to it.
@pytest.mark.parametrize("scale", [*SCALES, 0.7, 1.5, 1])
@pytest.mark.parametrize(
    "shape", [(37, 53, 3), (48, 60), (1, 43, 3), (41, 1), (35, 22, 1), (24, 29, 4)]
)
def test_made_images_equal_imresize(shape, scale):
    assert_equals_imresize(made(*shape), scale)


@pytest.mark.parametrize("folder", ["Set14/HR", "BSDS400"])
def test_photographs_and_scores_equal_basicsr_s(shared_data, folder):
    paths = sorted((shared_data / "data" / folder).glob("*.*"))[:10]
    if not paths:
        pytest.skip(f"no images at {shared_data / 'data' / folder} (set DLGSANET_SHARED)")
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR) for path in paths]
    for scale in (1 / 2, 1 / 3, 1 / 4):
        assert np.mean([assert_equals_imresize(each, scale) for each in images]) < 1e-5
    options = {"crop_border": 4, "test_y_channel": True}
    for hr in images[:2]:
        hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
        enlarged = bicubic(bicubic(hr, 1 / 4), 4)
        expected = [f(enlarged, hr, **options) for f in (calculate_psnr, calculate_ssim)]
        assert measure(enlarged, hr, 4) == pytest.approx(expected, abs=1e-9)
        assert measure(hr, hr, 4) == Scores(np.inf, 1.0)


def definition(image: np.ndarray, scale: Fraction) -> np.ndarray:
    """The sums along both axes as MATLAB's manual has them, pixel by pixel in float64."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (1.5 * x - 2.5) * x * x + 1
        return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0

    def matrix(length: int) -> np.ndarray:
        result = np.zeros((-int(-length * scale // 1), length))
        stretch = min(scale, 1)
        for row, weights in enumerate(result):
            centre = (row + Fraction(1, 2)) / scale - Fraction(1, 2)
            for position in range(int(centre - 2 / stretch) - 2, int(centre + 2 / stretch) + 3):
                mirrored = position
                while not 0 <= mirrored < length:
                    mirrored = -1 - mirrored if mirrored < 0 else 2 * length - 1 - mirrored
                weights[mirrored] += kernel(float((centre - position) * stretch))
        return result / result.sum(1, keepdims=True)

    height, width = (matrix(length) for length in image.shape)
    return height @ image.astype(np.float64) @ width.T


@pytest.mark.parametrize("scale", [Fraction(1, 4), Fraction(1, 3), Fraction(5, 8), Fraction(3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(2, 3), (5, 2), (23, 19)])
def test_images_shorter_than_the_kernel_are_mirrored_again(shape, dtype, scale):
    image = made(*shape, dtype=dtype)
    ours = bicubic(image, scale)
    exact = definition(image, scale).clip(0, np.iinfo(dtype).max)
    assert ours.dtype == dtype
    assert ours.shape == exact.shape
    # Half a level, and positions in float32 as imresize has them: near 23 they are 2e-6 off.
    assert np.abs(ours - exact).max() < 0.5 + 4e-6 * np.iinfo(dtype).max


@pytest.mark.parametrize("scale", SCALES)
def test_strips_leave_no_seam(monkeypatch, scale):
    image = made(330, 61, 3)
    monkeypatch.setattr(module, "STRIP", 10_000)
    whole = bicubic(image, scale)
    monkeypatch.setattr(module, "STRIP", 64)
    assert np.array_equal(bicubic(image, scale), whole)


@pytest.mark.parametrize("scale", [1 / 3, 2])
def test_views_and_channels_are_resized_one_by_one(scale):
    image = made(31, 45, 5)
    whole = bicubic(image, scale)
    for channel in range(5):
        assert np.array_equal(bicubic(image[:, :, channel], scale), whole[:, :, channel])
    assert np.array_equal(bicubic(image[:, :, ::-1], scale), whole[:, :, ::-1])


@pytest.mark.parametrize(
    ("image", "scale", "named"),
    [
        (made(4, 4).astype(np.float32), 2, "float32"),
        (made(4), 2, r"\(4,\)"),
        (made(1, 4, 4, 3), 2, r"\(1, 4, 4, 3\)"),
        (made(0, 4, 3), 2, r"\(0, 4, 3\)"),
        *((made(4, 4), scale, f"scale={scale}") for scale in (0, -0.5, np.nan, np.inf)),
    ],
)
def test_what_cannot_be_resized_is_named(image, scale, named):
    with pytest.raises(ValueError, match=named):
        bicubic(image, scale)
