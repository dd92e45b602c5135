"""Time and peak memory of Tiny x4 for a 1280x720 output, beside BasicSR's light networks.

Each network runs in a process of its own, so that its peak memory is its own; the processes take
turns, so that a change in the machine's load meets all networks. Golden and operator tests run
first: figures of a network that computes something else are not worth a table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import BENCHMARKS, environment, save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch import DLGSANet  # and its repairs, which BasicSR's imports below need

HEIGHT, WIDTH = 180, 320  # of the input
MIB = 2**20


def dlgsanet_tiny() -> tuple[nn.Module, int]:
    """Build DLGSANet Tiny x4, the published configuration."""
    net = DLGSANet(
        dim=48,
        groups=3,
        blocks=3,
        buildblock_type="sparseedge",
        upsampler="pixelshuffledirect",
        upscale=4,
        tlc_kernel=48,
    )
    return net, HEIGHT


def swinir_light() -> tuple[nn.Module, int]:
    """Build SwinIR's lightweight x4 configuration from BasicSR; it needs multiples of 8 rows."""
    from basicsr.archs.swinir_arch import SwinIR

    net = SwinIR(
        img_size=64,
        embed_dim=60,
        depths=(6, 6, 6, 6),
        num_heads=(6, 6, 6, 6),
        window_size=8,
        mlp_ratio=2,
        upscale=4,
        img_range=1.0,
        upsampler="pixelshuffledirect",
    )
    return net, -(-HEIGHT // 8) * 8


def edsr_baseline() -> tuple[nn.Module, int]:
    """Build EDSR's baseline x4 configuration from BasicSR: 16 blocks of 64 channels."""
    from basicsr.archs.edsr_arch import EDSR

    return EDSR(3, 3, num_feat=64, num_block=16, upscale=4, res_scale=1), HEIGHT


NETWORKS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "DLGSANet Tiny": dlgsanet_tiny,
    "SwinIR-light": swinir_light,
    "EDSR-baseline": edsr_baseline,
}


def cpu_memory(field: str) -> int:
    """Read a memory figure of this process, in bytes: VmRSS is the present, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str, device: str, runs: int) -> dict[str, Any]:
    """Time `runs` forwards in seconds, and find the memory beyond the weights in bytes."""
    net, height = NETWORKS[name]()
    net = net.eval().to(device)
    x = torch.rand(1, 3, height, WIDTH, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    seconds = []
    with torch.no_grad():
        if device == "cuda":
            for _ in range(3):
                net(x)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = cpu_memory("VmRSS")
        for _ in range(runs):
            start = time.perf_counter()
            net(x)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else cpu_memory("VmHWM")
    return {
        "seconds": seconds,
        "memory": peak - before,
        "parameters": sum(p.numel() for p in net.parameters()),
        "flops": counter.get_total_flops(),
    }


def refuse_red_tests() -> None:
    """Stop when the network does not compute what it should."""
    tests = [str(BENCHMARKS.parent / "tests" / f"test_{name}.py") for name in ("golden", "ops")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *tests]
    finished = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{finished.stdout}\nnothing is measured while tests fail")


def measure_all(device: str, rounds: int, runs: int) -> dict[str, dict[str, Any]]:
    """Let the networks take turns, each in a new process, and gather what they measured."""
    results: dict[str, dict[str, Any]] = {}
    for turn in range(rounds):
        for name in NETWORKS:
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr)
            command = [sys.executable, __file__, "--device", device, "--runs", str(runs)]
            child = subprocess.run(
                [*command, "--only", name], stdout=subprocess.PIPE, text=True, check=True
            )
            measured = json.loads(child.stdout.splitlines()[-1])
            known = results.setdefault(name, measured)
            if known is not measured:
                known["seconds"] += measured["seconds"]
                known["memory"] = max(known["memory"], measured["memory"])
    return results


def main() -> int:
    """Measure, print the table, and write it to results/ and RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=2, help="processes a network")
    parser.add_argument("--runs", type=int, default=3, help="timed forwards a process")
    parser.add_argument("--only", choices=list(NETWORKS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.device, arguments.runs)))
        return 0

    refuse_red_tests()
    results = measure_all(arguments.device, arguments.rounds, arguments.runs)
    ours = statistics.median(results["DLGSANet Tiny"]["seconds"])
    rows = []
    for name, result in results.items():
        median = statistics.median(result["seconds"])
        rows.append(
            [
                name,
                f"{result['parameters'] / 1e3:.0f} K",
                f"{result['flops'] / 2e9:.1f}",
                f"{median * 1e3:.0f}",
                f"{min(result['seconds']) * 1e3:.0f} to {max(result['seconds']) * 1e3:.0f}",
                f"{median / ours:.2f}",
                f"{result['memory'] / MIB:.0f}",
            ]
        )
    result = {
        "title": f"Networks, x4 to 1280x720, float32, {arguments.device}",
        "command": f"python benchmarks/network.py --device {arguments.device}",
        "environment": environment(arguments.device),
        "notes": [
            f"One picture, {WIDTH}x{HEIGHT} in; SwinIR-light gets 4 rows more, since it needs",
            "multiples of 8. Time is the median over all processes, memory the peak beyond weights",
            "and input. GMACs are counted by PyTorch's FlopCounterMode, which does not see",
            "convolutions' additions, norms or activations.",
        ],
        "columns": ["network", "parameters", "GMACs", "ms", "range", "ratio", "MiB"],
        "rows": rows,
        "raw": results,
    }
    path = save(f"network_{arguments.device}", result)
    for row in [result["columns"], *rows]:
        print("  ".join(f"{value:>14}" for value in row))
    print(f"written: {path.relative_to(BENCHMARKS.parent)}, benchmarks/RESULTS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
