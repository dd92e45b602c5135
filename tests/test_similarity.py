import cv2
import numpy as np
import pytest
from PIL import Image

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.similarity import (
    by_size,
    corner_thumbnails,
    find_copies,
    pixel_digest,
    psnr_to_bicubic,
    thumbnail,
)
from dlgsanet_arch.data.verify import BICUBIC, UNRELATED

# LR of an HR image at a scale, and between which PSNRs in dB it must lie.
REDUCTIONS = {
    "matlab": (lambda hr, scale: bicubic(hr, 1 / scale), 361, 362),
    "pillow": (lambda hr, scale: reduced_by_pillow(hr, scale), BICUBIC, 100),
    "area": (lambda hr, scale: reduced_by_opencv(hr, scale, cv2.INTER_AREA), UNRELATED, BICUBIC),
    "cubic": (lambda hr, scale: reduced_by_opencv(hr, scale, cv2.INTER_CUBIC), UNRELATED, BICUBIC),
    "sliced": (lambda hr, scale: hr[::scale, ::scale], UNRELATED, BICUBIC),
    "shifted": (lambda hr, scale: bicubic(np.roll(hr, 1, 0), 1 / scale), UNRELATED, BICUBIC),
    "upside down": (lambda hr, scale: bicubic(hr[::-1], 1 / scale), 0, BICUBIC),
    "black": (lambda hr, scale: bicubic(0 * hr, 1 / scale), 0, UNRELATED),
}


def reduced_by_pillow(hr: np.ndarray, scale: int) -> np.ndarray:
    size = (hr.shape[1] // scale, hr.shape[0] // scale)
    return np.asarray(Image.fromarray(hr).resize(size, Image.Resampling.BICUBIC))


def reduced_by_opencv(hr: np.ndarray, scale: int, method: int) -> np.ndarray:
    return cv2.resize(hr, (hr.shape[1] // scale, hr.shape[0] // scale), interpolation=method)


@pytest.fixture(scope="module")
def photographs(shared_data) -> list[np.ndarray]:
    paths = sorted(shared_data.glob("data/BSDS400/*.jpg"))[:60]
    if not paths:
        pytest.skip(f"no photographs in {shared_data / 'data/BSDS400'}")
    return [cv2.imread(str(path))[:312, :312] for path in paths]


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_psnr_separates_bicubic_from_other_reductions(photographs, scale, reduction):
    reduce, least, most = REDUCTIONS[reduction]
    for hr in photographs[::20]:
        assert least <= psnr_to_bicubic(reduce(hr, scale), hr, scale) < most


def test_psnr_is_of_all_colours_without_the_border(photographs):
    hr = photographs[0]
    lr = bicubic(hr, 1 / 2) // 2
    lr[[0, 1, -1, -2]] = lr[:, [0, 1, -1, -2]] = 0
    expected = bicubic(hr, 1 / 2)[2:-2, 2:-2].astype(float)
    error = np.mean((lr[2:-2, 2:-2] - expected) ** 2)
    assert psnr_to_bicubic(lr, hr, 2) == pytest.approx(10 * np.log10(255**2 / error))
    assert psnr_to_bicubic(bicubic(hr[:6, :8], 1 / 2), hr[:6, :8], 2) > 300


def as_jpeg(image: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1)


COPIES = {
    "equal": lambda image: image,
    "jpeg": as_jpeg,
    "grey": lambda image: np.repeat(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None], 3, 2),
    "halved": lambda image: bicubic(image, 1 / 2),
    "doubled": lambda image: bicubic(image, 2),
    "cropped to a multiple of 4": lambda image: image[:310, :310],
    "upper left part": lambda image: image[:240, :200],
}


def copies(trained: dict[str, np.ndarray], image: np.ndarray) -> set[str]:
    small = by_size({name: (each.shape[:2], thumbnail(each)) for name, each in trained.items()})
    return find_copies(small, corner_thumbnails(image, small))


# What the module says that it does not find.
MISSED = {
    "flipped": lambda image: image[:, ::-1],
    "rotated": lambda image: np.rot90(image),
    "part": lambda image: image[60:, 60:],
    "brighter": lambda image: cv2.convertScaleAbs(image, beta=40),
}


@pytest.mark.parametrize("change", [*COPIES, *MISSED])
def test_copies_are_found_and_other_images_are_not(photographs, change):
    make = {**COPIES, **MISSED}[change]
    trained = {str(n): np.ascontiguousarray(make(photographs[n])) for n in range(30)}
    expected = [{str(n)} if change in COPIES and n < 30 else set() for n in range(60)]
    assert [copies(trained, photograph) for photograph in photographs] == expected


def test_flat_and_tiny_images_are_not_found():
    white = np.full((100, 100, 3), 255, np.uint8)
    assert copies({"white": white}, white) == set()
    assert copies({"a": white[:1, :1]}, white[:2, :2]) == set()


def test_digest_is_of_shape_and_pixels(photographs):
    image = photographs[0][:20, :30]
    digest = pixel_digest(image)
    assert digest == pixel_digest(np.asfortranarray(image))
    changed = image.copy()
    changed[-1, -1, -1] ^= 1
    assert len({digest, pixel_digest(changed), pixel_digest(image.reshape(30, 20, 3))}) == 3
