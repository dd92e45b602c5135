import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from dlgsanet_arch import metrics

if importlib.util.find_spec("basicsr"):  # where it is absent only the GPU tests run
    from basicsr.metrics import calculate_psnr, calculate_ssim
    from basicsr.metrics.metric_util import to_y_channel
    from basicsr.utils import tensor2img

CLOSE_DB, CLOSE_SSIM = 1e-4, 1e-6


def smooth(height: int, width: int, channels: int = 3) -> Tensor:
    coarse = torch.rand(1, channels, 6, 8)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def nearly(image: Tensor, pixels: int, step: float) -> Tensor:
    """The image with a few pixels changed by a few of 255 steps."""
    changed = image.clone()
    rows = torch.randint(image.shape[-2], (pixels,))
    columns = torch.randint(image.shape[-1], (pixels,))
    changed[..., rows, columns] += step / 255
    return changed


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and targets on which careless arithmetic shows."""
    torch.manual_seed(0)
    noise, clean = torch.rand(1, 3, 70, 90), smooth(70, 90)
    flat = torch.full((1, 3, 48, 52), 250 / 255)
    halves = torch.arange(-16, 528).repeat(64, 4).view(1, 1, 64, -1).expand(1, 3, -1, -1) / 510
    large = smooth(141, 1203)
    two_sides = torch.cat([flat, flat / 50], 3)
    return {
        "noise": (noise, torch.rand(1, 3, 70, 90)),
        "outside the range": (clean * 3 - 1, clean),
        "a little noise": (clean + 0.03 * torch.randn_like(clean), clean),
        "nearly identical": (nearly(clean, 3, 1), clean),
        "flat": (flat, flat - 1 / 255),
        "flat and nearly identical": (nearly(flat, 2, -1), flat),
        "flat and dark beside flat and bright": (nearly(two_sides, 2, 1), two_sides),
        "halves are rounded to even": (halves, halves.flip(2, 3)),
        "several blocks": (large + 0.01 * torch.randn_like(large), large),
        "black and white": (noise.round(), noise.roll(1, 2).round()),
        "grey": (smooth(40, 33, 1), smooth(40, 33, 1)),
    }


PAIRS = pairs()


def of_basicsr(output: Tensor, target: Tensor, crop_border: int, y: bool) -> tuple[float, float]:
    images = tensor2img([output]), tensor2img([target])
    settings = {"crop_border": crop_border, "test_y_channel": y}
    return calculate_psnr(*images, **settings), calculate_ssim(*images, **settings)


def assert_equals_basicsr(output: Tensor, target: Tensor, crop_border: int, y: bool) -> None:
    psnr, ssim = of_basicsr(output, target, crop_border, y)
    compared = metrics.compare(output, target, crop_border=crop_border, y_channel=y)
    ours = compared.psnr(), compared.ssim()
    assert [figure.dtype for figure in ours] == [torch.float64] * 2
    assert [tuple(figure.shape) for figure in ours] == [(1,)] * 2
    assert ours[0].item() == pytest.approx(psnr, rel=0, abs=CLOSE_DB)
    assert ours[1].item() == pytest.approx(ssim, rel=0, abs=CLOSE_SSIM)


@pytest.mark.parametrize("y", [False, True], ids=["RGB", "Y"])
@pytest.mark.parametrize("crop_border", [0, 3])
@pytest.mark.parametrize("kind", PAIRS)
def test_figures_equal_basicsr(kind, crop_border, y):
    assert_equals_basicsr(*PAIRS[kind], crop_border, y)


@pytest.mark.parametrize("kind", PAIRS)
def test_figures_equal_basicsr_without_opencv(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    ours = metrics.compare(*PAIRS[kind], y_channel=True).ssim()
    monkeypatch.undo()
    expected = of_basicsr(*PAIRS[kind], 0, True)[1]
    assert ours.item() == pytest.approx(expected, rel=0, abs=CLOSE_SSIM)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_views_and_the_smallest_images(dtype):
    output, target = (image.to(dtype) for image in PAIRS["a little noise"])
    assert_equals_basicsr(output, target, 2, True)
    apart = torch.stack([output, output], -1)[..., 0].transpose(2, 3)
    assert not apart.is_contiguous()
    assert_equals_basicsr(apart, target.transpose(2, 3), 2, True)
    assert_equals_basicsr(output[..., :15, :16], target[..., :15, :16], 2, True)


def test_y_is_basicsr_s_bit_for_bit():
    rgb = torch.randint(256, (1, 3, 300, 400)) / 255
    ours = metrics.compare(rgb, rgb, y_channel=True).output[0, 0].numpy()
    assert np.array_equal(ours, to_y_channel(tensor2img(rgb))[..., 0])


def test_each_image_of_a_batch_has_its_own_figure():
    one, other = PAIRS["noise"][0], PAIRS["a little noise"][0]
    output = torch.cat([one, other, other])
    target = torch.cat([other, one, other])
    together = metrics.compare(output, target)
    alone = [metrics.compare(output[i : i + 1], target[i : i + 1]) for i in range(3)]
    for measure in (metrics.Compared.psnr, metrics.Compared.ssim):
        expected = [measure(each).item() for each in alone]
        assert measure(together).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("y", [False, True], ids=["RGB", "Y"])
def test_identical_images(y):
    image = PAIRS["noise"][0]
    invisible = image + 1e-6 * (image * 255 % 1 - 0.5).sign()  # same 8 bits
    compared = metrics.compare(invisible, image, y_channel=y)
    assert compared.psnr().tolist() == [math.inf]
    assert compared.ssim().item() == pytest.approx(1, abs=1e-12)


def test_what_is_not_a_number_shows():
    output, target = (image.clone() for image in PAIRS["noise"])
    output[0, 1, 20, 20] = math.nan
    assert metrics.compare(output, target).psnr().isnan().all()
    assert metrics.compare(output, target, y_channel=True).ssim().isnan().all()


@pytest.mark.parametrize(
    ("shape", "other", "crop_border", "message"),
    [
        ((1, 3, 16, 16), (1, 3, 16, 17), 0, r"\(1, 3, 16, 16\).*\(1, 3, 16, 17\)"),
        ((1, 3, 16, 16), (1, 1, 16, 16), 0, "is not the target's"),
        ((3, 16, 16), (3, 16, 16), 0, r"got the shape \(3, 16, 16\)"),
        ((1, 4, 16, 16), (1, 4, 16, 16), 0, r"got the shape \(1, 4, 16, 16\)"),
        ((1, 3, 16, 20), (1, 3, 16, 20), 8, "crop_border must be .*; got 8, of 20x16"),
        ((1, 3, 16, 20), (1, 3, 16, 20), -1, "crop_border must be 0 or more .*; got -1"),
        ((1, 3, 16, 20), (1, 3, 16, 20), 3, "11x11 pixels and .* crop_border is 14x10"),
    ],
)
def test_images_that_cannot_be_compared(shape, other, crop_border, message):
    with pytest.raises(ValueError, match=message):
        metrics.compare(torch.rand(shape), torch.rand(other), crop_border=crop_border).ssim()


@pytest.mark.gpu
@pytest.mark.parametrize("y", [False, True], ids=["RGB", "Y"])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_gpu_gives_the_figures_of_a_cpu(kind, y):
    output, target = PAIRS[kind]
    on_gpu = metrics.compare(output.cuda(), target.cuda(), crop_border=2, y_channel=y)
    on_cpu = metrics.compare(output, target, crop_border=2, y_channel=y)
    assert torch.equal(on_gpu.output.cpu(), on_cpu.output)
    assert on_gpu.psnr().item() == pytest.approx(on_cpu.psnr().item(), abs=1e-9)
    assert on_gpu.ssim().item() == pytest.approx(on_cpu.ssim().item(), abs=1e-9)
