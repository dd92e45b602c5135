"""What DLGSANet costs: parameters, multiply-adds, activations, time and memory.

Counts are of one forward in train mode, run on tensors without content: in eval mode the windows of
TLC overlap and add to them. Time and memory are measured in eval mode.
"""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch.checkpoint import published_configs
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.tools.published import PUBLISHED, Network

OUTPUT = (720, 1280)  # height and width, as papers have it
_WARM_UP = 48  # pixels
_RUNS = {"cpu": 1, "cuda": 10}

Record = dict[str, Any]


class _Activations(TorchDispatchMode):
    """Counts the elements that convolutions and linear layers put out.

    Products within attention are not layers. Of MHDLSA the predicted filters count, which our
    operator never holds in memory, and the output of the convolution with them.
    """

    _LAYERS = ("convolution", "addmm", "mm", "linear", "dynamic_dwconv", "projected_dwconv")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if name in self._LAYERS:
            self.count += result.numel()
        if name == "projected_dwconv":
            _, hidden, weight = args[:3]
            self.count += hidden.numel() // hidden.shape[1] * weight.shape[0]
        return result


class Counts(NamedTuple):
    """What a forward of one image does."""

    parameters: int
    macs: int  # multiply-adds of products and convolutions, not of norms and gates
    activations: int  # elements of the outputs of convolutions and linear layers


def count(net: nn.Module, height: int, width: int) -> Counts:
    """Count a forward of an image (1, 3, H, W) in train mode; `net` is left on the meta device."""
    parameters = sum(each.numel() for each in net.parameters())
    net = net.train().to("meta")
    x = torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, _Activations() as activations:
        net(x)
    return Counts(parameters, flops.get_total_flops() // 2, activations.count)


def _of_process(name: str) -> int:
    """Read a size from /proc/self/status, in bytes: VmRSS is in use, VmHWM its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024


def start_peak(device: str) -> int | None:
    """Reset the peak of memory; return what is in use, None where that is not known."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide use
        Path("/proc/self/clear_refs").write_text("5")
        return _of_process("VmRSS")
    except (OSError, TypeError, AttributeError):  # not Linux and glibc, or not allowed
        return None


def end_peak(device: str, before: int | None) -> int | None:
    """Return the peak since `start_peak` beyond what it returned; None where that is not known."""
    if before is None:
        return None
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _of_process("VmHWM")
    return peak - before


def measure(
    net: nn.Module, height: int, width: int, device: str = "cpu", runs: int | None = None
) -> tuple[float, int | None]:
    """Measure forwards of an image (1, 3, H, W) in eval mode and float32, after a warm-up.

    Returns the median time in seconds of `runs` (by default 1 on a CPU, 10 on a GPU); and the peak
    of memory in bytes beyond weights and input, None where the system does not state it.
    """
    net = net.eval().to(device)
    x = torch.rand(1, 3, height, width, device=device)
    # cuDNN tries its algorithms for each size.
    warm_up = x if device == "cuda" else x[..., :_WARM_UP, :_WARM_UP]
    seconds = []
    with torch.no_grad(), torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
        net(warm_up)
        before = start_peak(device)
        for _ in range(runs or _RUNS[device]):
            start = time.perf_counter()
            net(x)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), end_peak(device, before)


def evaluate(
    network: Network,
    output: tuple[int, int] = OUTPUT,
    *,
    device: str | None = None,
    runs: int | None = None,
) -> Record:
    """Count a network, a key of PUBLISHED, and measure it `runs` times where a device is named.

    `output` is height and width to reach; the input has a scale-th of each, rounded down. Returns a
    flat record for JSON and CSV; None stands for what is not known.
    """
    name, scale = network
    height, width = (side // scale for side in output)
    config = published_configs()[f"{name} x{scale}"]
    with torch.device("meta"):
        net = DLGSANet(**config)
    counts, seconds, memory, fault = count(net, height, width), None, None, ""
    try:
        if device is not None:
            seconds, memory = measure(DLGSANet(**config), height, width, device, runs)
    except torch.OutOfMemoryError:
        fault = "out of memory"
    return {
        **{"network": name, "scale": scale, "input_height": height, "input_width": width},
        **counts._asdict(),
        **{"seconds": seconds, "peak_memory_bytes": memory, "fault": fault},
        "published_parameters": PUBLISHED[network].parameters,
        # of that size alone
        "published_gmacs": PUBLISHED[network].gmacs if output == OUTPUT else None,
    }


# Of a table: heading, key of the record, factor, format.
_COLUMNS = (
    ("parameters", "parameters", 1, ","),
    ("GMACs", "macs", 1e-9, ",.2f"),
    ("M activations", "activations", 1e-6, ",.1f"),
    ("ms", "seconds", 1e3, ",.1f"),
    ("MiB", "peak_memory_bytes", 2**-20, ",.0f"),
    ("published parameters", "published_parameters", 1, ","),
    ("published GMACs", "published_gmacs", 1, ",.1f"),
)


def table(records: Sequence[Record]) -> str:
    """Return a table for the terminal."""
    lines = [["network", "input", *(heading for heading, *_ in _COLUMNS)]]
    for record in records:
        cells = [
            "–" if record[key] is None else format(record[key] * factor, form)
            for _, key, factor, form in _COLUMNS
        ]
        cells[3] = record["fault"] or cells[3]
        size = f"{record['input_height']}x{record['input_width']}"
        lines.append([f"{record['network']} x{record['scale']}", size, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )
