"""How much memory is free, and how much a forward takes."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dlgsanet_arch.errors import UserError

# Peak of a forward, in maps of `dim` channels of float32, and in images of the result's size.
# Measured on CPUs in float32, layers fused: 14 maps for small images and 5 for large ones.
# Elsewhere three maps for q, k and v, and their copies, four and two within GDFN, and what is
# normalised.
_FUSED_MAPS = 16
_MAPS = 26
_RESULTS = 4
_SHARE = 0.5  # of the free memory: others want some, and allocators lose some
_UNKNOWN = 2 << 30  # where the system does not say
LEAST_TILE = 16  # below it, memory is not what is lacking

_GROUPS = Path("/sys/fs/cgroup")
# Limit, use and statistics of a Linux control group, and what is there of cached files.
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        *(f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
        "total_inactive_file",
    ),
)
_SAID = re.compile(
    r"out of memory|can't allocate memory|not enough memory|failed to allocate|ALLOC_FAILED", re.I
)


class UpscaleError(UserError, ValueError):
    """An image or a request that cannot be met; the message says why and what would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory did not suffice, of a device's or the machine's."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and bool(_SAID.search(str(error)))
    )


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _of_group() -> int | None:
    """Free memory of the Linux control group, as containers have it; None for no limit."""
    for limit, used, statistics, cached in _LIMITS:
        try:
            most, now = (int((_GROUPS / name).read_text()) for name in (limit, used))
            facts = dict(line.split() for line in (_GROUPS / statistics).read_text().splitlines())
        except (OSError, ValueError):  # absent, or "max"
            continue
        return most - now + int(facts.get(cached, 0))  # cached files make room when asked
    return None


def _of_machine() -> int | None:
    with suppress(ImportError):
        import psutil

        return psutil.virtual_memory().available
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+([0-9]+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) << 10 if found else None
    return None


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device has free; 2 GiB where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = [each for each in (_of_machine(), _of_group()) if each is not None]
    return max(0, min(known, default=_UNKNOWN))


def bytes_a_pixel(config: Mapping[str, Any], device: torch.device, *, fused: bool = True) -> int:
    """Return an upper estimate of a forward's peak memory, in bytes for each pixel that goes in.

    `fused` says whether a CPU computes fused layers, as the C library does in float32.
    """
    maps = _FUSED_MAPS if device.type == "cpu" and fused else _MAPS
    scale = config["upscale"] if config["upsampler"] else 1
    results = _RESULTS * config["in_chans"] * scale**2
    if config["upsampler"] == "pixelshuffle":
        results += 3 * 64 * scale**2
    return 4 * (maps * config["dim"] + results)


def fitting_pixels(config: Mapping[str, Any], device: torch.device, *, fused: bool) -> int:
    """Return how many pixels can go in at once, so that half of the free memory is used."""
    return int(_SHARE * free_memory(device) / bytes_a_pixel(config, device, fused=fused))


def check_room(needed: int) -> None:
    """Raise UpscaleError where `needed` bytes are more than the machine has free."""
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise UpscaleError(
            f"the result needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are "
            "free: cut the image into parts"
        )
