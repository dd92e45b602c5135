"""What networks cost: parameters, multiply-adds, activations, time and memory.

Counts are of the real forward in train mode, run on tensors without content: in eval mode the
windows of TLC overlap and add to them. Time and memory are measured in eval mode.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch import _basicsr
from dlgsanet_arch.checkpoint import published_configs
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.tools import figures
from dlgsanet_arch.tools.published import PUBLISHED, Figures

OUTPUT = (720, 1280)  # height and width, as papers have it
SCALES = (2, 3, 4)
_WARM_UPS = {"cpu": 1, "cuda": 3}
_RUNS = {"cpu": 3, "cuda": 10}
_MIB = 2**20


def _dlgsanet(variant: str, scale: int) -> nn.Module:
    return DLGSANet(**published_configs()[f"DLGSANet {variant} x{scale}"])


def _swinir_light(scale: int) -> nn.Module:
    from basicsr.archs.swinir_arch import SwinIR

    return SwinIR(
        img_size=64,
        embed_dim=60,
        depths=(6, 6, 6, 6),
        num_heads=(6, 6, 6, 6),
        window_size=8,
        mlp_ratio=2,
        upscale=scale,
        img_range=1.0,
        upsampler="pixelshuffledirect",
    )


def _edsr(features: int, blocks: int, res_scale: float, scale: int) -> nn.Module:
    from basicsr.archs.edsr_arch import EDSR

    return EDSR(3, 3, num_feat=features, num_block=blocks, upscale=scale, res_scale=res_scale)


def _rcan(scale: int) -> nn.Module:
    from basicsr.archs.rcan_arch import RCAN

    return RCAN(3, 3, num_group=10, num_block=20, upscale=scale)


@dataclass(frozen=True)
class Network:
    """A network that is counted.

    Attributes:
        name: Without the scale.
        build: Makes it for a scale.
        multiple: Height and width of its input are multiples of this.
        from_basicsr: Whether it is BasicSR's.
        reads_tensors: Whether its constructor reads values of tensors, which the meta device lacks.
    """

    name: str
    build: Callable[[int], nn.Module]
    multiple: int = 1
    from_basicsr: bool = True
    reads_tensors: bool = False

    def build_for_counting(self, scale: int) -> nn.Module:
        """Make it without content where it can be made so, which takes no time."""
        with torch.device("cpu" if self.reads_tensors else "meta"):
            return self.build(scale)


NETWORKS = (
    Network("DLGSANet Tiny", lambda scale: _dlgsanet("Tiny", scale), from_basicsr=False),
    Network("DLGSANet Light", lambda scale: _dlgsanet("Light", scale), from_basicsr=False),
    Network("DLGSANet Large", lambda scale: _dlgsanet("Large", scale), from_basicsr=False),
    Network("SwinIR-light", _swinir_light, multiple=8, reads_tensors=True),
    Network("EDSR-baseline", lambda scale: _edsr(64, 16, 1.0, scale)),
    Network("EDSR", lambda scale: _edsr(256, 32, 0.1, scale)),
    Network("RCAN", _rcan),
)


def available() -> list[Network]:
    """Return the networks that are here: BasicSR's only where it is installed."""
    installed = _basicsr.basicsr_installed()
    return [network for network in NETWORKS if installed or not network.from_basicsr]


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


@dataclass(frozen=True)
class Counts:
    """What a forward of one image does.

    Attributes:
        parameters: The network's.
        macs: Multiply-adds of products and convolutions; norms, activation functions, gates and
            additions are not counted.
        activations: Elements of the outputs of convolutions and linear layers.
    """

    parameters: int
    macs: int
    activations: int


def count(net: nn.Module, height: int, width: int) -> Counts:
    """Count a forward of an image (1, 3, H, W) in train mode; `net` is left on the meta device."""
    parameters = sum(each.numel() for each in net.parameters())
    net = net.train().to("meta")
    x = torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        net(x)
    with torch.no_grad(), _Activations() as activations:
        net(x)
    return Counts(parameters, flops.get_total_flops() // 2, activations.count)


def _of_process(name: str) -> int:
    """Read a figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class _Peak:
    """The most memory in use from now on, beyond what is in use now; None where none can tell."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before: int | None = None
        gc.collect()
        if device == "cuda":
            self.forget()
            self._before = torch.cuda.memory_allocated()
            return
        try:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)  # what the C library keeps of freed memory would hide later use
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._before = _of_process("VmRSS")
        except (OSError, TypeError):
            return  # not Linux, or not allowed

    def forget(self) -> None:
        """Leave out what a GPU needed so far: cuDNN's trials are not part of the work."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> int | None:
        """Return it in bytes."""
        if self._before is None:
            return None
        on_gpu = self._device == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else _of_process("VmHWM")
        return peak - self._before


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Keep TF32 out of float32 products, and let cuDNN choose by trying."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def measure(
    net: nn.Module, height: int, width: int, device: str = "cpu", runs: int | None = None
) -> tuple[float, int | None]:
    """Measure forwards of an image (1, 3, H, W) in eval mode and float32.

    Args:
        net: The network; it is moved to the device.
        height: H.
        width: W.
        device: cpu or cuda.
        runs: How many are timed, after a warm-up.

    Returns:
        The median time in seconds; and the peak of memory in bytes beyond weights and input, None
        where the system does not tell.
    """
    net = net.eval().to(device)
    x = torch.rand(1, 3, height, width, device=device)
    seconds = []
    with torch.no_grad(), _exact_float32():
        peak = _Peak(device)
        for _ in range(_WARM_UPS[device]):
            net(x)
        peak.forget()
        for _ in range(runs or _RUNS[device]):
            start = time.perf_counter()
            net(x)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak.read()


@dataclass(frozen=True)
class Row:
    """A network at a scale.

    Attributes:
        network: Its name.
        scale: Its scale.
        size: Height and width of its input.
        counts: What was counted.
        published: What papers print.
        seconds: Of a forward, None where it was not measured.
        memory: Peak in bytes, likewise.
        fault: Why it was not measured.
    """

    network: str
    scale: int
    size: tuple[int, int]
    counts: Counts
    published: Figures
    seconds: float | None = None
    memory: int | None = None
    fault: str = ""

    def record(self) -> dict[str, Any]:
        """Return one flat record, for JSON and CSV."""
        return {
            "network": self.network,
            "scale": self.scale,
            "input_height": self.size[0],
            "input_width": self.size[1],
            "parameters": self.counts.parameters,
            "macs": self.counts.macs,
            "activations": self.counts.activations,
            "seconds": self.seconds,
            "peak_memory_bytes": self.memory,
            "published_parameters": self.published.parameters,
            "published_gmacs": self.published.gmacs,
            **{f"published_psnr_{name}": value for name, value in self.published.psnr.items()},
        }


def evaluate(
    network: Network,
    scale: int,
    output: tuple[int, int] = OUTPUT,
    *,
    device: str | None = None,
    runs: int | None = None,
) -> Row:
    """Count a network at a scale, and measure it where a device is named.

    Args:
        network: One of NETWORKS.
        scale: Its scale.
        output: Height and width to reach; the input has a scale-th of each, rounded down, then up
            to what the network takes.
        device: cpu or cuda; None for counts only.
        runs: Timed forwards.
    """
    height, width = (
        math.ceil(side // scale / network.multiple) * network.multiple for side in output
    )
    counts = count(network.build_for_counting(scale), height, width)
    # What papers print is of their size alone.
    published = PUBLISHED.get((network.name, scale), Figures())
    if output != OUTPUT:
        published = Figures(published.parameters, None, published.psnr)
    seconds, memory, fault = None, None, ""
    if device is not None:
        try:
            seconds, memory = measure(network.build(scale), height, width, device, runs)
        except torch.OutOfMemoryError:
            fault = "out of memory"
    return Row(network.name, scale, (height, width), counts, published, seconds, memory, fault)


HEADINGS = ("network", "input", "parameters", "GMACs", "M activations", "ms", "MiB")
PUBLISHED_HEADINGS = ("published parameters", "published GMACs")


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table(rows: Sequence[Row], dataset: str) -> str:
    """Return a table for the terminal, with the published PSNR on one data set."""
    lines = [[*HEADINGS, *PUBLISHED_HEADINGS, f"published dB, {dataset}"]]
    for row in rows:
        milliseconds = None if row.seconds is None else row.seconds * 1e3
        lines.append(
            [
                f"{row.network} x{row.scale}",
                f"{row.size[1]}x{row.size[0]}",
                f"{row.counts.parameters:,}",
                f"{row.counts.macs / 1e9:,.2f}",
                f"{row.counts.activations / 1e6:,.1f}",
                row.fault or _shown(milliseconds, ",.1f"),
                _shown(None if row.memory is None else row.memory / _MIB, ",.0f"),
                _shown(row.published.parameters, ","),
                _shown(row.published.gmacs, ",.1f"),
                _shown(row.published.psnr.get(dataset), ".2f"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


Measured = Mapping[tuple[str, int], float]


def draw(rows: Sequence[Row], dataset: str, measured: Measured | None = None) -> Any:
    """Draw PSNR against counted multiply-adds; areas are proportional to parameters.

    Args:
        rows: Those without a PSNR on the data set are left out.
        dataset: Of the PSNR.
        measured: PSNR in dB by network and scale, drawn as rings beside the published discs.

    Returns:
        A figure of matplotlib's, a panel a scale.

    Raises:
        UserError: matplotlib is absent, or no row has such a PSNR.
    """
    measured = measured or {}
    shown = [
        row for row in rows if dataset in row.published.psnr or (row.network, row.scale) in measured
    ]
    if not shown:
        raise UserError(f"no network of these has a published PSNR on {dataset}: nothing to draw")
    scales = sorted({row.scale for row in shown})
    names = list(dict.fromkeys(row.network for row in shown))
    figure = figures.new_figure(5.5 * len(scales), 5.8)
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    for axes, scale in zip(panels, scales, strict=True):
        _draw_scale(axes, [row for row in shown if row.scale == scale], names, dataset, measured)
        how = "as published; rings: measured" if measured else "as published"
        axes.set_ylabel(f"PSNR on {dataset}, dB, {how}")
    return figure


def _draw_scale(
    axes: Any, rows: Sequence[Row], names: Sequence[str], dataset: str, measured: Measured
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for row in rows:
        colour = figures.COLOURS[names.index(row.network) % len(figures.COLOURS)]
        parameters = row.counts.parameters
        gmacs, area = row.counts.macs / 1e9, parameters / 8e3
        published = row.published.psnr.get(dataset)
        if published is not None:
            axes.scatter(gmacs, published, s=area, color=colour, alpha=0.65, linewidths=0)
        ours = measured.get((row.network, row.scale))
        if ours is not None:
            axes.scatter(gmacs, ours, s=area, facecolors="none", edgecolors=colour, linewidths=2)
        axes.scatter([], [], s=50, color=colour, label=f"{row.network}, {parameters / 1e6:.3g} M")
    axes.set_xscale("log")
    axes.margins(0.18)
    gmacs = [row.counts.macs for row in rows]
    few = max(gmacs) < 10 * min(gmacs)  # or within a decade there is one number on the axis
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if few else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    height, width = rows[0].size
    scale = rows[0].scale
    axes.set_xlabel(f"GMACs of a forward to about {width * scale}x{height * scale}, as counted")
    axes.set_title(f"x{scale}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=2,
        frameon=False,
        fontsize="small",
        title="area: parameters",
    )
