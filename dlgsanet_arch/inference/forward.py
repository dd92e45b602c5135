"""One run of the network on tiles: device, precision, channels, the mean over eight turns."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from dlgsanet_arch.checkpoint import Checkpoint
from dlgsanet_arch.memory import UpscaleError
from dlgsanet_arch.tiles import self_ensemble

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LUMA = (0.299, 0.587, 0.114)  # BT.601, the Y that super-resolution is measured on


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of a name; None takes CUDA where it is available, else MPS, else the CPU.

    Raises:
        UpscaleError: The device cannot be used here.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each kind of device fails in its own way
        raise UpscaleError(
            f"the device {str(name)!r} cannot be used here ({str(error).splitlines()[0]}); "
            "`dlgsanet doctor` lists those that can"
        ) from error
    return device


class Forward:
    """Maps images (B, 1 or 3, h, w) to float32 results in [0, 1] on the network's device.

    Args:
        checkpoint: Weights for 1 or 3 channels. A network for colour sees gray as three equal
            channels, and the luma of its result is taken; one for gray sees each channel alone.
        device: Where the network runs.
        dtype: "fp32", or "bf16" or "fp16" by autocast.
        ensemble: Whether the mean over eight flips and rotations is taken.

    Raises:
        UpscaleError: The weights are for other channels, or the device cannot compute in `dtype`.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: Precision, ensemble: bool
    ) -> None:
        if dtype not in get_args(Precision):
            raise UpscaleError(f"dtype must be fp32, bf16 or fp16; got {dtype!r}")
        self.channels = checkpoint.config["in_chans"]
        if self.channels not in (1, 3):
            raise UpscaleError(f"these weights take {self.channels} channels, not gray or RGB")
        self.device = device
        self.dtype = dtype
        self.net = checkpoint.network().to(device)
        self._run = partial(self_ensemble, self._once) if ensemble else self._once
        if dtype != "fp32":
            self._check_precision()

    def _once(self, images: Tensor) -> Tensor:
        return self.net(images)

    def _precision(self) -> AbstractContextManager[object]:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.dtype])

    def _check_precision(self) -> None:
        """Refuse what the device cannot compute."""
        fault = None
        if self.device.type == "cuda" and self.dtype == "bf16":
            fault = None if torch.cuda.get_device_capability(self.device)[0] >= 8 else "too old"
        try:
            with torch.no_grad(), self._precision():
                self.net(torch.zeros(1, self.channels, 8, 8, device=self.device))
        except Exception as error:  # what a device lacks shows in many ways
            fault = str(error).splitlines()[0]
        if fault:
            raise UpscaleError(
                f"{self.device} cannot compute this network in {self.dtype} ({fault}): use fp32"
            )

    def __call__(self, images: Tensor, peak: float) -> Tensor:
        """Compute images with values from 0 to `peak`, of any dtype and on any device.

        Raises:
            UpscaleError: The results are not finite.
        """
        given = images.to(self.device).float() / peak
        count, channels = given.shape[:2]
        if self.channels > channels:
            given = given.expand(-1, self.channels, -1, -1)
        elif self.channels < channels:
            given = given.reshape(-1, 1, *given.shape[2:])
        with torch.no_grad(), self._precision():
            result = self._run(given.contiguous()).float()
        if self.channels > channels:
            weights = torch.tensor(_LUMA, device=result.device).view(1, -1, 1, 1)
            result = (result * weights).sum(1, keepdim=True)
        elif self.channels < channels:
            result = result.reshape(count, channels, *result.shape[2:])
        if not bool(result.isfinite().all()):
            raise UpscaleError(
                f"the network's results are not numbers in {self.dtype}: {self._why()}"
            )
        return result.clamp_(0, 1)

    def _why(self) -> str:
        if not all(bool(each.isfinite().all()) for each in self.net.state_dict().values()):
            return "the weights are damaged, which `dlgsanet weights inspect` shows"
        return "its weights are too large" if self.dtype == "fp32" else "use fp32"
