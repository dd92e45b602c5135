"""The network in use: images in, larger images out.

`Upscaler` and `upscale` work on arrays and tensors and need PyTorch and NumPy alone; `folders`
reads and writes files by Pillow.
"""

from dlgsanet_arch.inference.upscaler import Upscaler, upscale

__all__ = ["Upscaler", "upscale"]
