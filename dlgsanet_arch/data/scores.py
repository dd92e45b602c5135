"""PSNR and SSIM as papers on super-resolution take them, on arrays and without PyTorch."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

# BT.601 from BGR in [0, 1] to Y in [16, 235], as MATLAB's rgb2ycbcr has it.
_TO_Y = np.array([24.966, 128.553, 65.481])
_WINDOW = cv2.getGaussianKernel(11, 1.5)
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class Scores(NamedTuple):
    """Measured on the Y channel: PSNR in dB, infinite for equal images, and SSIM, 1 for them."""

    psnr: float
    ssim: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} dB / {self.ssim:.4f}"


def _luma(image: NDArray[np.uint8], border: int) -> NDArray[np.float64]:
    height, width = image.shape[:2]
    inner = image[border : height - border, border : width - border]
    # Rounded to float32 on the way as BasicSR does it.
    y = np.dot(inner.astype(np.float32) / np.float32(255), _TO_Y) + 16.0
    return ((y / 255.0).astype(np.float32) * np.float32(255)).astype(np.float64)


def _blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blur by the Gaussian window (Wang et al., 2004), where it lies within the image."""
    return cv2.sepFilter2D(values, cv2.CV_64F, _WINDOW, _WINDOW)[5:-5, 5:-5]


def measure(image: NDArray[np.uint8], original: NDArray[np.uint8], border: int) -> Scores:
    """Measure an image against the original as BasicSR's metrics do with test_y_channel.

    Args:
        image: (H, W, 3) in BGR.
        original: Of the same shape, with sides of more than 10 + 2·border pixels.
        border: Pixels to cut off on each side.
    """
    a, b = _luma(image, border), _luma(original, border)
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    structure = (2 * covariance + _C2) / (variances + _C2)
    light = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    error = float(np.mean((a - b) ** 2))
    psnr = float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))
    return Scores(psnr, float(np.mean(light * structure)))
