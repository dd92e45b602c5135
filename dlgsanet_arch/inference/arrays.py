"""Arrays and Pillow images as the network takes them: channels, depth, transparency, size."""

import math
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dlgsanet_arch.memory import UpscaleError

Depth = TypeVar("Depth", np.uint8, np.uint16)
DEEP = np.iinfo(np.uint16).max
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked(image: Any) -> NDArray:
    """Return an image as (H, W, C) in native byte order; UpscaleError for what is not an image."""
    if not isinstance(image, np.ndarray):
        got = type(image).__name__
    elif image.dtype not in (np.uint8, np.uint16, np.dtype(np.uint16).newbyteorder()):
        got = str(image.dtype)
    elif image.ndim not in (2, 3) or 0 in image.shape or image[0, 0].size > 4:
        got = f"the shape {image.shape}"
    else:
        image = image.astype(image.dtype.newbyteorder("="), copy=False)
        return image[..., None] if image.ndim == 2 else image
    raise UpscaleError(
        "an image is an array of uint8 or uint16, (H, W) or (H, W, C) with gray, gray and alpha, "
        "RGB, or RGB and alpha; or a tensor of floats in [0, 1], a Pillow image, or the path of a "
        f"file; got {got}"
    )


def check_tensor(images: Tensor) -> None:
    """Refuse a tensor that is not a batch of gray or RGB images in [0, 1].

    Resampling may have put values a little outside of the range.
    """
    kind = "meta" if images.is_meta else str(images.layout).removeprefix("torch.")
    kind = "nested" if images.is_nested else kind
    shape = () if images.is_nested else tuple(images.shape)
    fits = len(shape) == 4 and shape[1] in (1, 3) and 0 not in shape
    if not fits or kind != "strided" or images.dtype not in _FLOATS:
        raise UpscaleError(
            "tensors are (B, 3, H, W) or (B, 1, H, W), floats in [0, 1] of 16 to 64 bits; got the "
            f"shape {shape} and {images.dtype}" + f", {kind}" * (kind != "strided")
        )
    low, high = (float(each) for each in images.aminmax())
    if not -0.25 <= low <= high <= 1.25:  # False for NaN as well
        fix = "divide by 255" if 2 < high <= 255 and low >= 0 else "scale it to that range"
        fix = fix if math.isfinite(high - low) else "replace values that are not finite"
        raise UpscaleError(f"tensors have values in [0, 1]; got {low:g} to {high:g}: {fix}")


def from_pillow(image: Any) -> NDArray:
    """Return the pixels of a Pillow image, upright."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "LA", "RGB", "RGBA", "I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "La":
        return np.asarray(image.convert("LA"))
    has_alpha = image.mode in ("PA", "RGBa") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if has_alpha else "L" if image.mode == "1" else "RGB"))


def _fill(colour: Tensor, seen: Tensor) -> Tensor:
    """Continue colours (1, C, H, W) into where `seen` (1, 1, H, W) is 0, by means around it."""
    if bool((seen > 0).all()):
        return colour
    coarse_seen = F.avg_pool2d(seen, 2, ceil_mode=True)
    sums = F.avg_pool2d(colour * seen, 2, ceil_mode=True)
    coarse = _fill(sums / coarse_seen.clamp_min(1e-12), coarse_seen)
    fine = F.interpolate(coarse, size=colour.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(seen > 0, colour, fine)


def fill_transparent(colour: NDArray[Depth], alpha: NDArray[Depth]) -> NDArray[Depth]:
    """Give transparent pixels the colours around them; those with any opacity keep their own.

    A file often holds black there, which the network would draw into the rim of what is seen.
    """
    if alpha.all() or not alpha.any():
        return colour
    planes = [torch.from_numpy(each.astype(np.float32)) for each in (colour, alpha)]
    filled = _fill(*(each.permute(2, 0, 1)[None] for each in planes))
    return filled[0].permute(1, 2, 0).round().numpy().astype(colour.dtype)


def keep_flat(made: NDArray[Depth], alpha: NDArray[Depth]) -> None:
    """Write alpha where it is the same all around: opaque stays opaque, and clear stays clear.

    The network gives nearly that, and one level less shows what is behind.
    """
    plane = torch.from_numpy(alpha.astype(np.float32)).permute(2, 0, 1)[None]
    most, least = (F.max_pool2d(sign * plane, 3, 1, 1) * sign for sign in (1, -1))
    flat = (most == least)[0, 0].numpy()
    old = np.ix_(*(np.arange(made.shape[i]) * alpha.shape[i] // made.shape[i] for i in (0, 1)))
    np.copyto(made[..., 0], alpha[..., 0][old], where=flat[old])


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) by PyTorch's antialiased bicubic."""
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def resized(image: NDArray[np.uint16], size: tuple[int, int], peak: int) -> NDArray:
    """Resize (H, W, C) by bicubic, and bring it to the depth of `peak`."""
    result = np.empty((*size, image.shape[2]), np.uint8 if peak < DEEP else np.uint16)
    for channel in range(image.shape[2]):  # one at a time, for memory
        plane = bicubic(torch.from_numpy(image[..., channel].astype(np.float32))[None, None], size)
        result[..., channel] = (plane * (peak / DEEP)).round_().clamp_(0, peak)[0, 0].numpy()
    return result
