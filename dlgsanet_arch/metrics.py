"""PSNR and SSIM of images where they are, equal to BasicSR's figures of 8-bit images.

BasicSR's `calculate_psnr` and `calculate_ssim` are the definition: images are rounded to 8 bits,
Y is BT.601's, and SSIM has the Gaussian window of 11x11 pixels (Wang et al., 2004), away from the
border. Here they come from tensors on any device, without a NumPy image in between.

For the window's means E, SSIM needs E[a], E[b], E[a² + b²] and E[ab]. With s = a + b and d = a - b
these follow from E[s], E[d], E[s²] and E[d²]: four filters instead of five. They are computed in
float64, because flat regions lose a variance of float32 in the squares of the means.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

WINDOW = 11  # side of SSIM's Gaussian window in pixels
_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_Y_OF_RGB = (65.481, 128.553, 24.966)  # BT.601, for RGB in [0, 1] and Y in [16, 235]
_Y_OFFSET = 16.0
# What is worked on at a time: on a CPU what fits a core's cache, and is less than what PyTorch
# divides among threads, which would wait for cores that a loader's workers use; else what keeps a
# GPU busy and its memory small.
_VALUES_ON_CPU, _COLUMNS_ON_CPU = 60 * 512, 512
_VALUES_ELSEWHERE = 2**22


def to_8_bits(image: Tensor) -> Tensor:
    """Round RGB in [0, 1] to the 256 values of a file, as float32; NaN stays NaN.

    Args:
        image: Any shape and float dtype; values outside [0, 1] are clamped.

    Returns:
        Whole numbers in [0, 255], halves rounded to even.
    """
    scaled = image.detach().float().clamp(0, 1).mul_(255)
    # From 2²³ up float32 has no fractions: the sum is rounded, as `round` does. That wakes threads.
    return scaled.add_(2**23).sub_(2**23)


def _blocks(like: Tensor, margin: int = 0) -> Iterator[tuple[Any, slice, slice]]:
    """Cut (..., H, W) into blocks, to be used as indices, that share `margin` rows and columns."""
    height, width = like.shape[-2:]
    on_cpu = like.device.type == "cpu"
    columns = min(width, _COLUMNS_ON_CPU) if on_cpu else width
    planes = like.numel() // (height * width)
    rows = (_VALUES_ON_CPU if on_cpu else _VALUES_ELSEWHERE) // (planes * columns)
    rows = max(rows, 2 * margin, 1)
    for top in range(0, height - margin, rows - margin):
        for left in range(0, width - margin, columns - margin):
            yield ..., slice(top, top + rows), slice(left, left + columns)


def _luma(channels: Sequence[Tensor]) -> Tensor:
    """Map 8-bit R, G and B, or Y alone, to Y in float32, rounded where BasicSR rounds."""
    # A tensor on the device, as CUDA multiplies by the reciprocal of a Python number.
    white = torch.full((), 255.0, device=channels[0].device)
    if len(channels) == 1:
        return (channels[0] / white).mul_(white)
    red, green, blue = (
        (channel / white).double().mul_(weight)
        for channel, weight in zip(channels, _Y_OF_RGB, strict=True)
    )
    return red.add_(green).add_(blue).add_(_Y_OFFSET).div_(white).float().mul_(white)


def _planes(image: Tensor, *, y_channel: bool) -> Tensor:
    """Return an image (B, C, H, W) in 8 bits, or its Y channel, as float32 in [0, 255]."""
    # Apple's GPUs have no float64
    image = image.detach().cpu() if image.device.type == "mps" else image.detach()
    channels = 1 if y_channel else image.shape[1]
    planes = torch.empty_like(image[:, :channels], dtype=torch.float32)
    for block in _blocks(image[:, 0]):
        rounded = [to_8_bits(plane[block]) for plane in image.unbind(1)]
        for i, values in enumerate([_luma(rounded)] if y_channel else rounded):
            planes[:, i][block] = values
    return planes


@cache
def _weights() -> list[float]:
    distances = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(distances**2 / (-2 * _SIGMA**2))
    return (weights / weights.sum()).tolist()


def _blur(plane: Tensor) -> Tensor:
    """Filter (H, W) float64 by the Gaussian window; (H - 10, W - 10), on any device."""
    if plane.device.type == "cpu":
        with suppress(ImportError):  # without OpenCV it is only slower
            import cv2
            import numpy as np

            window, border = np.array(_weights()), WINDOW // 2
            # sepFilter2D reads the tensor's own memory; its made-up border is cut off.
            blurred = cv2.sepFilter2D(plane.numpy(), -1, window, window)
            return torch.from_numpy(blurred)[border:-border, border:-border]
    for axis in (0, 1):
        size = plane.shape[axis] - WINDOW + 1
        shifted = [plane.narrow(axis, i, size) for i in range(WINDOW)]
        plane = torch.zeros_like(shifted[0])
        for weight, each in zip(_weights(), shifted, strict=True):
            plane.add_(each, alpha=weight)
    return plane


def _ssim_total(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of SSIM over the windows inside two planes (H, W)."""
    a, b = a.double(), b.double()
    s, d = a + b, a - b
    mean_s, mean_d = _blur(s).square_(), _blur(d).square_()  # the means' squares from here on
    var_s, var_d = _blur(s.square_()).sub_(mean_s), _blur(d.square_()).sub_(mean_d)
    # 2·E[a]·E[b] = (E[s]² - E[d]²)/2, and alike for sums of squares, variances and covariance
    above = ((mean_s - mean_d) / 2 + _C1) * ((var_s - var_d) / 2 + _C2)
    below = ((mean_s + mean_d) / 2 + _C1) * ((var_s + var_d) / 2 + _C2)
    return above.div_(below).sum()


@dataclass(frozen=True)
class Compared:
    """Two images as they are measured; made by `compare`.

    Args:
        output: (B, C, H, W) float32 in [0, 255]: whole numbers, or Y.
        target: The same for the ground truth.
    """

    output: Tensor
    target: Tensor

    def psnr(self) -> Tensor:
        """Return PSNR in dB, (B,) float64: inf where the images are identical."""
        errors = torch.zeros(len(self.output), dtype=torch.float64, device=self.output.device)
        for block in _blocks(self.output):
            difference = self.output[block].double() - self.target[block].double()
            errors += difference.square_().sum((1, 2, 3))
        return 10 * torch.log10(255.0**2 / (errors / self.output[0].numel()))

    def ssim(self) -> Tensor:
        """Return the mean SSIM of the channels, (B,) float64.

        Raises:
            ValueError: The images are smaller than the window.
        """
        batch, channels, height, width = self.output.shape
        if min(height, width) < WINDOW:
            raise ValueError(
                f"SSIM needs {WINDOW}x{WINDOW} pixels and what is left of the image after "
                f"crop_border is {width}x{height}"
            )
        totals = torch.zeros(batch, dtype=torch.float64, device=self.output.device)
        for i in range(batch):
            for channel in range(channels):
                a, b = self.output[i, channel], self.target[i, channel]
                for block in _blocks(a, WINDOW - 1):
                    totals[i] += _ssim_total(a[block], b[block])
        return totals / (channels * (height - WINDOW + 1) * (width - WINDOW + 1))


def compare(
    output: Tensor, target: Tensor, *, crop_border: int = 0, y_channel: bool = False
) -> Compared:
    """Make two images ready to be measured, by one metric or several.

    Args:
        output: (B, 3, H, W) or (B, 1, H, W), RGB in [0, 1], any float dtype and device.
        target: The ground truth, of the same shape.
        crop_border: Pixels that are left out at each side.
        y_channel: Whether Y of YCbCr is compared, instead of all channels.

    Raises:
        ValueError: The shapes differ, are not images, or nothing is left after the crop.
    """
    shape = tuple(output.shape)
    if output.shape != target.shape:
        raise ValueError(f"the output's shape {shape} is not the target's {tuple(target.shape)}")
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise ValueError(f"images are (B, 3, H, W) or (B, 1, H, W); got the shape {shape}")
    height, width = shape[2:]
    if not 0 <= 2 * crop_border < min(height, width):
        raise ValueError(
            "crop_border must be 0 or more and leave something of the image; got "
            f"{crop_border}, of {width}x{height}"
        )
    rows, columns = (slice(crop_border, side - crop_border) for side in shape[2:])
    inside = (..., rows, columns)
    return Compared(
        _planes(output[inside], y_channel=y_channel),
        _planes(target.to(output.device)[inside], y_channel=y_channel),
    )
