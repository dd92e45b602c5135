"""Compile the Triton kernels for GPUs that need not be there, and print what the compiler made.

    python scripts/compile_kernels.py [--target 90] [--only KERNEL] [--dtype bfloat16] [--side 8192]

The functions of CALLERS call operators as the network does, for every published configuration, with
tensors that have no memory. Triton compiles each launch, exactly as a GPU would be given it, and
nothing is launched. A row is one compiled program:
registers of a thread; bytes of stack that it spills to; bytes of shared memory; instructions in
all, and in the longest loop that has no loop inside; of all, how many are multiply-adds (FFMA),
tensor core products (MMA), barriers (BAR) and accesses to shared memory (LDS).
The status is 1 if a program spills. `--side` is that of the image; with 8192, offsets take 64 bits.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dlgsanet_arch.configs import published_configs
from dlgsanet_arch.fused import triton_layers
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.ops import triton_backend

TARGETS = (80, 90, 120)
DTYPES = ("float32", "tf32", "float16", "bfloat16")
COLUMNS = ("registers", "spilled", "shared", "instructions", "loop", "FFMA", "MMA", "BAR", "LDS")
PATTERNS = (r"FFMA2?", r"[HIQ]G?MMA|UTC\wMMA", r"BAR|WARPGROUP", r"LDSM?|STSM?")


def dynamic_convolution(config: dict[str, Any], dtype: torch.dtype, side: int) -> None:
    """Call the dynamic convolution of a network, forward and backward."""
    channels, kernel = config["dim"], config["window_size"]
    x, hidden = (
        torch.empty(1, each, side, side, dtype=dtype, device="meta").to(
            memory_format=torch.channels_last
        )
        for each in (channels, channels // 4)
    )
    outputs = channels // config["idynamic_num_heads"] * kernel**2
    inputs = x, hidden, x.new_empty(outputs, channels // 4), x.new_empty(outputs)
    triton_backend.projected_forward(*inputs, kernel)
    triton_backend.projected_backward(torch.empty_like(x), *inputs, kernel)


def fused_layers(config: dict[str, Any], dtype: torch.dtype, side: int) -> None:
    """Call the halves of the layers of a network without gradients."""
    with torch.device("meta"):
        block = DLGSANet(**config).eval().to(dtype).deep_feature_extraction[0].body
        x = torch.empty(1, config["dim"], side, side, dtype=dtype)
    x, (local, attending, *_) = x.to(memory_format=torch.channels_last), block
    triton_layers.add_mhdlsa(x, local.norm1, local.IDynamicDWConv)
    triton_layers.add_gdfn(x, local.norm2, local.IDynamic_ffn)
    triton_layers.add_attention(x, attending.norm3, attending.restormer_attn)


CALLERS = (dynamic_convolution, fused_layers)


class Driver:
    """What Triton asks of a GPU before it compiles; the target's number is that of the device."""

    target = 0

    def get_current_target(self) -> GPUTarget:  # noqa: D102, named by Triton as the next two
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:  # noqa: D102
        return self.target

    def get_current_stream(self, device: int) -> int:  # noqa: D102
        return 0


def compiled(only: str, call: Any, *arguments: Any) -> list[tuple[str, Any]]:
    """Return the programs that a function would launch, each with its kernel's name and flags."""
    found = []

    def compile_only(self: JITFunction, *values: Any, grid: Any, warmup: bool, **options: Any):
        flags = [n for n, value in zip(self.arg_names, values, strict=False) if value is True]
        name = " ".join([self.fn.__name__.strip("_"), *flags])
        if only in name:
            found.append((name, run(self, *values, grid=grid, warmup=True, **options)))

    run, JITFunction.run = JITFunction.run, compile_only
    try:
        call(*arguments)
    finally:
        JITFunction.run = run
    return found


def measure(program: Any) -> list[int]:
    """Return the numbers of COLUMNS."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tool, how, file.name], capture_output=True, text=True, check=True
            ).stdout
            for how in ("--dump-resource-usage", "--dump-sass")
        )
    used = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    # "/*0a30*/  @P0 BRA 0x5b0 ;"
    lines = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\w+)[^;\n]*?(0x[0-9a-f]+)?\s*;", code
    )
    addresses = [int(address, 16) for address, *_ in lines]
    loops = [
        (int(to, 16), address)
        for (_, name, to), address in zip(lines, addresses, strict=True)
        if name == "BRA" and to and int(to, 16) < address  # the last one jumps to itself
    ]
    inner = [
        sum(start <= address <= end for address in addresses)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    counts = [sum(bool(re.fullmatch(p, name)) for _, name, _ in lines) for p in PATTERNS]
    shared = program.metadata.shared
    return [used["REG"], used["STACK"], shared, len(lines), max(inner, default=0), *counts]


def main(arguments: list[str] | None = None) -> int:
    """Print a table; return 1 if something spills."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=int, nargs="+", default=TARGETS, help="such as 90")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--side", type=int, default=64, help="height and width of the image")
    asked = parser.parse_args(arguments)
    triton.runtime.driver.set_active(Driver())
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':32} {'dim':>3} {'dtype':8} {'sm':>3}", *(f"{each:>12}" for each in COLUMNS))
    seen, spilled = set(), 0
    for Driver.target, config, dtype, caller in itertools.product(
        asked.target, published_configs().values(), asked.dtype, CALLERS
    ):
        torch.backends.cudnn.allow_tf32 = dtype != "float32"
        tensors = getattr(torch, dtype, torch.float32)
        for name, program in compiled(asked.only, caller, config, tensors, asked.side):
            if program.hash not in seen:
                numbers = measure(program)
                labels = f"{name:32} {config['dim']:3} {dtype:8} {Driver.target:3}"
                print(labels, *(f"{each:12}" for each in numbers), flush=True)
                spilled += numbers[1] > 0
                seen.add(program.hash)
    print(f"{len(seen)} programs, {spilled} of them spill")
    return int(spilled > 0 or not seen)


if __name__ == "__main__":
    sys.exit(main())
