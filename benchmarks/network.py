"""Time, memory and accuracy of the whole network, beside its plainer forms and light networks.

Without a section: Tiny x4 for a 1280x720 output with all contestants, and on a GPU then all
published configurations. Golden and operator tests run first: figures of a network that computes
something else are not worth a table.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import contestants
import limits
import measuring
import reporting
import torch
import torch.nn.functional as F
from contestants import DEFINITION, EDSR, OURS, OURS_CHANNELS_LAST, PUBLISHED, PYTORCH
from measuring import DTYPES, Cell, Record, Section, Setting
from torch import Tensor
from torch.profiler import ProfilerActivity

from dlgsanet_arch import DLGSANet, cpu
from dlgsanet_arch.checkpoint import infer_config, read_weights

OUTPUT = (720, 1280)  # height and width
# Powers of two and a size beside them that is not: in a cache such rows can be in each other's way.
CURVE_SIZES = ((64, 64), (180, 320), (256, 256), (1024, 1024), (2000, 2040), (2048, 2048))
FORMULA_SIZES = ((180, 320), (1024, 1024))
FORMULA_SECONDS = 5.0  # begin no further sample after this: bf16 is slow on many processors
ONCE_PIXELS = 512**2  # of an image that a CPU takes many seconds for
WARM_UP_SIDE = 16  # loads the libraries, and leaves memory for images untouched
QUICK_SIDE = 24
PROFILED_FORWARDS = 5
PROFILED_OPERATORS = 12  # in the table
WEIGHTS = "DLGSANET_BENCHMARK_WEIGHTS"  # the variable that holds the path behind --weights
ACCURACY_CROP = 96  # of the input that float64 is asked for: several windows
# The dtype that ours is compared in.
BASE_DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def _forward_cell(contestant: str, variant: str, scale: int, dtype: str, size: Any) -> Cell:
    return {
        "measure": "network:forward",
        "contestant": contestant,
        "variant": variant,
        "scale": scale,
        "dtype": dtype,
        "size": list(size),
    }


def forward(cell: Cell, setting: Setting) -> Record:
    """Time forwards of one image in eval mode, with random weights."""
    contestant, device, dtype = cell["contestant"], setting.device, DTYPES[cell["dtype"]]
    net = contestants.build(contestant, cell["variant"], cell["scale"]).eval()
    # SwinIR adds float32 masks to its maps: in half precision it needs autocast.
    cast = contestant == contestants.SWINIR and dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if cast else dtype
    net = net.to(device, dtype)
    height, width = cell["size"]
    x = contestants.images(contestant, 1, height, width, device, dtype)
    autocast = torch.autocast(device, DTYPES[cell["dtype"]] if cast else None, enabled=cast)
    own = contestants.operators(contestant)
    with torch.no_grad(), measuring.numerics(cell["dtype"], device), autocast, own:
        net(contestants.images(contestant, 1, WARM_UP_SIDE, WARM_UP_SIDE, device, dtype))
        once = cell.get("once", False)
        measured = measuring.measure(
            lambda: functools.partial(net, x),
            Setting(device, 1) if once else setting,
            warm_ups={"cpu": 0, "cuda": 1}[device] if once else None,
        )
    parameters = sum(each.numel() for each in net.parameters())
    out = x.numel() * cell["scale"] ** 2
    return {
        **measured,
        "parameters": parameters,
        "operations": contestants.operations(
            contestant, cell["variant"], cell["scale"], (1, height, width)
        ),
        "bytes": (parameters + x.numel() + out) * DTYPES[cell["dtype"]].itemsize,
    }


_COLUMNS = "network | input | dtype | parameters | GMACs | ms | range | ratio | of limit"
_COLUMNS += " | ms a block | MiB"


def _rows(device: str, record: Record, records: list[Record]) -> list[list[str]]:
    cell, seconds = record["cell"], measuring.median(record)
    base = {**cell, "contestant": OURS, "dtype": BASE_DTYPE[device]}
    blocks = contestants.blocks(cell["variant"], cell["scale"])
    is_peer = cell["contestant"] in contestants.PEERS
    row = [
        contestants.title(cell),
        f"{cell['size'][1]}x{cell['size'][0]}",
        cell["dtype"],
        f"{record['parameters'] / 1e3:.0f} K" if "parameters" in record else "–",
        measuring.times(record.get("operations", math.nan) / 2e9, ".1f"),
        *measuring.milliseconds(record),
        measuring.times(seconds / measuring.median_of(records, base)),
        measuring.times(seconds / limits.Limits(records).seconds(record)),
        "–" if is_peer else measuring.times(1e3 * seconds / blocks, ".3g"),
        measuring.mebibytes(record),
    ]
    return [row]


def _notes(device: str, records: list[Record], more: list[str]) -> list[str]:
    if device == "cuda":
        more = ["Forwards follow each other; the GPU is waited for after each 20 ms of them."]
    return [
        "One image a forward. Times are medians over all processes; MiB is the peak beyond the",
        "loaded process with weights and input.",
        f"'ratio' is to ours in {BASE_DTYPE[device]} of that configuration, for the light networks "
        "to Tiny's;",
        "'of limit' to the larger of operations / product rate and bytes / bandwidth, with bytes",
        "of weights, input and output. GMACs are those of the formula, by FlopCounterMode, without",
        "norms, activations, additions and what is computed twice; a block is a local and a global",
        "layer. SwinIR-light gets rows and columns up to multiples of 8, and autocast in half",
        "precision.",
        *more,
        limits.Limits(records).note(),
        *contestants.absence_notes(device, [PUBLISHED, *contestants.PEERS]),
    ]


def _contestants(device: str, everywhere: bool) -> list[tuple[str, str]]:
    """Return contestants and dtypes: all of them, or those that are measured in each size."""
    if device == "cpu":
        every = [(OURS, "fp32")]
        if everywhere:
            return every
        others = [(name, "fp32") for name in (PYTORCH, contestants.SWINIR, EDSR)]
        return [(DEFINITION, "fp32"), *every, *others]
    every = [
        *((OURS, dtype) for dtype in ("bf16", "fp16", "tf32", "fp32")),
        (PUBLISHED, "tf32"),
        (DEFINITION, "fp32"),
    ]
    if everywhere:
        return every
    return [
        *every,
        (PUBLISHED, "fp32"),
        *((OURS_CHANNELS_LAST, dtype) for dtype in ("bf16", "fp16")),
        *((peer, dtype) for peer in contestants.PEERS for dtype in ("bf16", "tf32", "fp32")),
    ]


def _group(cell: Cell) -> object:
    return cell.get("variant"), cell.get("scale"), str(cell.get("size")), cell["measure"]


def _input(scale: int, quick: bool) -> tuple[int, int]:
    if quick:
        return QUICK_SIDE, QUICK_SIDE + 8
    return OUTPUT[0] // scale, OUTPUT[1] // scale


def _forward_section(
    asked: argparse.Namespace, cells: list[Cell], more: list[str], **given: Any
) -> Section:
    return Section(
        cells=[*limits.cells(asked.device, cells, asked.quick), *cells],
        columns=_COLUMNS,
        rows=functools.partial(_rows, asked.device),
        notes=lambda records: _notes(asked.device, records, more),
        group=_group,
        **given,
    )


def network_section(asked: argparse.Namespace) -> Section:
    """Tiny x4 for a 1280x720 output, with all contestants."""
    variant = contestants.tiny(asked.quick)
    cells = [
        _forward_cell(name, variant, 4, dtype, _input(4, asked.quick))
        for name, dtype in contestants.taking_part(asked.device, _contestants(asked.device, False))
    ]
    title = "Tiny x4 and light networks to 1280x720"
    return _forward_section(asked, cells, [], name="network", title=title)


def configurations_section(asked: argparse.Namespace) -> Section:
    """All published configurations for a 1280x720 output."""
    on_cpu = asked.device == "cpu"
    variants = [contestants.QUICK] if asked.quick else contestants.VARIANTS
    peers = [(peer, dtype) for peer in contestants.PEERS for dtype in ("bf16", "tf32")]
    cells = []
    for variant in variants:
        names = _contestants(asked.device, True)
        if not on_cpu and variant == variants[0]:
            names += peers
        for scale in reversed(contestants.SCALES):
            for name, dtype in contestants.taking_part(asked.device, names):
                cell = _forward_cell(name, variant, scale, dtype, _input(scale, asked.quick))
                cells.append({**cell, "once": True} if on_cpu else cell)
    return _forward_section(
        asked,
        cells,
        ["Each process times a single forward."] if on_cpu else [],
        name="configurations",
        title="All configurations to 1280x720",
        rounds=measuring.ROUNDS if on_cpu else 1,
    )


@contextmanager
def _recorded_kernels() -> Iterator[None]:
    """Let the profiler see the fused layers in C, which are not operators of PyTorch."""
    run = cpu.run

    def recorded(name: str, *given: Any) -> None:
        with torch.profiler.record_function(name):
            run(name, *given)

    cpu.run = recorded
    yield
    cpu.run = run


def profile(cell: Cell, setting: Setting) -> Record:
    """Find the operators that a forward's time goes to."""
    net = contestants.build(OURS, cell["variant"], cell["scale"]).eval()
    net = net.to(setting.device, DTYPES[cell["dtype"]])
    size = (1, *cell["size"], setting.device, DTYPES[cell["dtype"]])
    x = contestants.images(OURS, *size)
    activity = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}[setting.device]
    with torch.no_grad(), measuring.numerics(cell["dtype"], setting.device):
        run = measuring.measure(lambda: lambda: net(x), setting)
        with _recorded_kernels(), torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(PROFILED_FORWARDS):
                net(x)
            measuring.synchronize(setting.device)
    spent = "self_cpu_time_total" if setting.device == "cpu" else "self_device_time_total"
    operators = [
        {
            "name": event.key,
            "seconds": getattr(event, spent) / 1e6 / PROFILED_FORWARDS,
            "calls": event.count / PROFILED_FORWARDS,
        }
        for event in profiler.key_averages()
    ]
    operators.sort(key=lambda operator: -operator["seconds"])
    return {**run, "operators": operators}


def profile_section(asked: argparse.Namespace) -> Section:
    """Where the time of Tiny x4 goes, operator by operator."""
    dtype = BASE_DTYPE[asked.device]
    size = _input(4, asked.quick)
    cell = _forward_cell(OURS, contestants.tiny(asked.quick), 4, dtype, size)

    def rows(record: Record, _: list[Record]) -> list[list[str]]:
        operators = record.get("operators", [])
        total = sum(each["seconds"] for each in operators)
        return [
            [
                *(f"`{each['name']}`", f"{each['calls']:.0f}", f"{1e3 * each['seconds']:.3g}"),
                f"{each['seconds'] / total:.1%}",
            ]
            for each in operators[:PROFILED_OPERATORS]
        ]

    return Section(
        name="profile",
        title="Where the time of Tiny x4 goes",
        cells=[{**cell, "measure": "network:profile"}],
        columns="operator | calls | ms | share",
        rows=rows,
        notes=lambda records: [
            f"A forward to 1280x720 in {dtype}: time of its own, the mean of {PROFILED_FORWARDS},",
            "with the profiler's own cost. Not profiled, the forward took",
            f"{', '.join(measuring.milliseconds(record)[0] for record in records)} ms.",
        ],
        rounds=1,
    )


def _draw_curve(records: list[Record], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines: dict[str, list[Record]] = {}
    for record in records:
        if "seconds" in record:
            cell = record["cell"]
            lines.setdefault(f"{cell['contestant']}, {cell['dtype']}", []).append(record)
    for name, line in lines.items():
        pixels = [math.prod(record["cell"]["size"]) for record in line]
        panels[0].plot(pixels, [1e3 * measuring.median(r) for r in line], "o-", label=name)
        panels[1].plot(pixels, [r["memory"] / measuring.MIB for r in line], "o-", label=name)
    for panel, quantity in zip(panels, ("ms", "MiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="pixels of the input", ylabel=quantity)
        panel.grid(alpha=0.3)
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _size_section(
    asked: argparse.Namespace,
    forms: list[tuple[str, ...]],
    scale: int,
    sizes: Sequence[tuple[int, int]],
    **given: Any,
) -> Section:
    """Return a section with every form, a contestant and a dtype, at every size."""
    cells = []
    for name, dtype in contestants.taking_part(asked.device, forms):
        for size in ((16, 16), (24, 30)) if asked.quick else sizes:
            cell = _forward_cell(name, contestants.tiny(asked.quick), scale, dtype, size)
            once = asked.device == "cpu" and math.prod(size) >= ONCE_PIXELS
            cells.append({**cell, "once": True} if once else cell)
    columns = "network | dtype | input | ms | µs a pixel | MiB | bytes a pixel"
    return Section(cells=cells, columns=columns, rows=_size_rows, **given)


def _size_rows(record: Record, _: list[Record]) -> list[list[str]]:
    cell, pixels = record["cell"], math.prod(record["cell"]["size"])
    row = [
        contestants.title(cell),
        cell["dtype"],
        f"{cell['size'][1]}x{cell['size'][0]}",
        measuring.milliseconds(record)[0],
        measuring.times(1e6 * measuring.median(record) / pixels, ".3f"),
        measuring.mebibytes(record),
        measuring.times(record.get("memory", math.nan) / pixels, ".0f"),
    ]
    return [row]


def curve_section(asked: argparse.Namespace) -> Section:
    """Time and memory of Tiny x2 against the pixels of the input, powers of two among them."""
    on_gpu = [(OURS, "bf16"), (OURS, "tf32"), (PUBLISHED, "tf32")]
    return _size_section(
        asked,
        on_gpu if asked.device == "cuda" else [(OURS, "fp32")],
        2,
        CURVE_SIZES,
        name="curve",
        title="Tiny x2 against the input's pixels",
        notes=lambda _: [
            "Medians of a few forwards; on a CPU, of the large inputs, one a process. Cost grows",
            "linearly where the figures a pixel level off. MiB is the peak beyond the loaded",
            "process with weights and input.",
            *contestants.absence_notes(asked.device, [PUBLISHED]),
        ],
        group=_group,
        draw=_draw_curve,
    )


def formula_section(asked: argparse.Namespace) -> Section:
    """Time and memory of the formula, PyTorch's own operators without gradients, by dtype."""
    return _size_section(
        asked,
        [(PYTORCH, dtype) for dtype in ("fp32", "fp64", "bf16")],
        4,
        FORMULA_SIZES,
        name="formula",
        title="The formula of Tiny x4 without gradients",
        notes=lambda _: [
            "What runs where the C library does not: in other dtypes, or where it was not built.",
            "In eval mode, with TLC. Medians of a few forwards; of the large inputs, one. MiB is",
            "the peak beyond the loaded process with weights and input.",
        ],
        rounds=1,
        seconds=FORMULA_SECONDS,
    )


def _weights(named: str | None, quick: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments and the weights of a DLGSANet: from a file, golden, or random."""
    if named:
        state = read_weights(Path(os.environ[WEIGHTS]))
        return infer_config(state), state
    golden = reporting.shared_folder() / "golden" / "tiny_x4.npz"
    if golden.is_file() and not quick:
        import numpy as np

        stored = np.load(golden)
        names = (name for name in stored if name.startswith("param/"))
        state = {name[len("param/") :]: torch.from_numpy(stored[name]) for name in names}
        return json.loads(str(stored["config"])), state
    net = contestants.build(OURS, contestants.tiny(quick), 4)
    return contestants.configuration(contestants.tiny(quick), 4), net.state_dict()


def set14() -> list[Path]:
    """Return the files of Set14, none where it is not at hand."""
    return sorted((reporting.shared_folder() / "data" / "Set14" / "HR").glob("*.png"))


def pairs(paths: Sequence[Path], scale: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images as pairs (3, H, W) in [0, 1]: reduced `scale` times, and as they are."""
    import cv2

    for path in paths:
        image = torch.from_numpy(cv2.imread(str(path))[..., ::-1].copy())
        height, width = (side - side % scale for side in image.shape[:2])
        high = image[:height, :width].permute(2, 0, 1).float() / 255
        low = F.interpolate(
            high[None], scale_factor=1 / scale, mode="bicubic", antialias=True
        ).clamp(0, 1)
        yield (255 * low[0]).round() / 255, high


def luma(image: Tensor) -> Tensor:
    """Return Y of YCbCr (BT.601), in 16 to 235, of images (..., 3, H, W) in [0, 1]."""
    factors = torch.tensor([65.481, 128.553, 24.966], dtype=image.dtype)
    return 16 + (image * factors.to(image.device)[:, None, None]).sum(-3)


def psnr(a: Tensor, b: Tensor, border: int) -> float:
    """Return the PSNR in dB of Y of two images, `border` pixels on each side left out."""
    inner = (..., slice(border, -border), slice(border, -border))
    error = (luma(a.double()) - luma(b.double()))[inner].square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _as_saved(image: Tensor) -> Tensor:
    return (255 * image.float().clamp(0, 1)).round() / 255


def accuracy(cell: Cell, setting: Setting) -> Record:
    """Compare a dtype with float32 on real images, and with the definition in float64."""
    device, dtype = setting.device, DTYPES[cell["dtype"]]
    config, state = _weights(cell["weights"], cell["quick"])

    def load(dtype: torch.dtype) -> DLGSANet:
        net = DLGSANet(**config)
        net.load_state_dict(state)
        return net.eval().to(device, dtype)

    tested, full = load(dtype), load(torch.float32)
    judge = contestants.as_definition(load(torch.float64))
    known = [] if cell["quick"] else list(pairs(set14(), config["upscale"]))
    side = QUICK_SIDE if cell["quick"] else ACCURACY_CROP
    crop = known[0][0][:, :side, : side - 8] if known else torch.rand(3, side, side - 8)
    with torch.no_grad():
        x = crop[None].to(device)
        expected = judge(x.double())
        with measuring.numerics(cell["dtype"], device):
            error = tested(x.to(dtype)).double() - expected
        figures: Record = {
            "relative": (error.norm() / expected.norm()).item(),
            "worst": (error.abs().max() / expected.abs().max()).item(),
            "images": [],
        }
        for low, high in known:
            x, high = low[None].to(device), high.to(device)
            with measuring.numerics("fp32", device):
                wide = full(x)[0]
            with measuring.numerics(cell["dtype"], device):
                out = tested(x.to(dtype))[0].float()
            border = config["upscale"]
            figures["images"].append(
                {
                    "fp32": psnr(_as_saved(wide), high, border),
                    "this": psnr(_as_saved(out), high, border),
                    "between": psnr(out, wide, border),
                }
            )
    return figures


def accuracy_section(asked: argparse.Namespace) -> Section:
    """What precision costs, with equal weights."""
    weights = asked.weights.name if asked.weights else None  # results name no one's folders
    if asked.weights:
        os.environ[WEIGHTS] = str(asked.weights.resolve())  # for the processes that measure
    cells = [
        {"measure": "network:accuracy", "dtype": dtype, "weights": weights, "quick": asked.quick}
        for dtype in limits.served_dtypes(asked.device)
    ]

    def rows(record: Record, _: list[Record]) -> list[list[str]]:
        dtype, images = record["cell"]["dtype"], record.get("images")
        if "relative" not in record:
            return [[dtype, record["error"]]]
        row = [dtype, f"{record['relative']:.1e}", f"{record['worst']:.1e}"]
        if images:
            apart = [each["this"] - each["fp32"] for each in images]
            row += [f"{statistics.mean(each['this'] for each in images):.3f}"]
            row += [f"{statistics.mean(apart):+.4f}", f"{max(apart, key=abs):+.4f}"]
            row += [measuring.times(min(each["between"] for each in images), ".1f")]
        return [row]

    if weights:
        source = f"the checkpoint {weights}"
    elif (reporting.shared_folder() / "golden" / "tiny_x4.npz").is_file() and not asked.quick:
        source = "the golden file's random weights of Tiny x4, so PSNR itself says nothing"
    else:
        source = "random weights, so PSNR itself says nothing"
    return Section(
        name="accuracy",
        title="Accuracy by dtype",
        cells=cells,
        columns="dtype | error, norms | error, largest | Y-PSNR | minus fp32's | on the worst image"
        " | least Y-PSNR between the two",
        rows=rows,
        notes=lambda records: [
            f"With {source}. Errors are relative to the definition in float64 on a crop; PSNR in",
            "dB is the mean over Set14, reduced by antialiased bicubic interpolation, results",
            "rounded to 8 bits; 'between the two' compares outputs with fp32's, unrounded.",
            *(
                ["Set14 is not at hand: only the errors are measured."]
                if records and not any(record.get("images") for record in records)
                else []
            ),
        ],
        group=lambda cell: "accuracy",
        rounds=1,
        options=["--weights", weights] if weights else [],
    )


def _sections(asked: argparse.Namespace) -> list[Section]:
    if asked.section:
        return [asked.section(asked)]
    if asked.device == "cuda" and not asked.only_tiny:
        return [network_section(asked), configurations_section(asked)]
    return [network_section(asked)]


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    for flag, section in (
        ("--all", configurations_section),
        ("--curve", curve_section),
        ("--formula", formula_section),
        ("--profile", profile_section),
        ("--accuracy", accuracy_section),
    ):
        which.add_argument(
            flag, dest="section", action="store_const", const=section, help=section.__doc__
        )
    which.add_argument("--only-tiny", action="store_true", help=network_section.__doc__)
    parser.add_argument("--weights", type=Path, help="a checkpoint for --accuracy")
    return measuring.run(_sections, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
