"""`dlgsanet export`: the network as ONNX or .pt2."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import VERBS, add_common, clean_up_on_sigterm, exit_status, size
from dlgsanet_arch.hints import printable

_TIMED_RUNS = 5


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet export",
        description=VERBS["export"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
With dynamic sizes (the default) the file takes images of any batch, height and width, and
attention looks at the whole image. PyTorch's network looks at windows of it (TLC: 96, 72 or 48
pixels wide for x2, x3 and x4), and how they lie depends on the size: with --size they are in the
file, which then takes images of that size alone, in any batch. Cut larger images into such
tiles. Up to a window's side both are the same.

Half precision is compared with the network in float32: fp16 may differ by 0.01, bf16 by 0.08 (of
values in [0, 1]), fp32 by 0.0001. Before it is compared, the file does not get its name.""",
    )
    add = parser.add_argument
    weights = ".pth, .safetensors or the name of bundled weights"
    add("-m", "--weights", required=True, metavar="WEIGHTS", help=weights)
    output = "ends in .onnx or .pt2"
    add("-o", "--output", type=Path, required=True, metavar="FILE", help=output)
    dtype = "of weights, input and output (default: fp32; bf16 for .pt2 alone)"
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help=dtype)
    fixed = "fix height and width, with the windows of TLC"
    add("--size", type=size, metavar="HxW", help=fixed)
    opset = "version of ONNX's operators (default: 18, the least with all that is needed)"
    add("--opset", type=int, choices=range(18, 24), help=opset)
    timed = f"take times as the best of {_TIMED_RUNS} runs, not of one"
    add("--time", action="store_true", help=timed)
    add_common(parser, "param-key")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Export weights; see `build_parser`."""
    args = build_parser().parse_args(argv)
    clean_up_on_sigterm()
    from dlgsanet_arch.checkpoint import read_checkpoint
    from dlgsanet_arch.export import OPSET, export

    checkpoint = read_checkpoint(args.weights, args.param_key)
    exported = export(
        checkpoint,
        args.output,
        dtype=args.dtype,
        size=args.size,
        opset=args.opset or OPSET,
        repeats=_TIMED_RUNS if args.time else 1,
    )
    print(f"{'input':<18} {'exported':>10} {'PyTorch':>10} {'difference':>11}")
    for shape, difference, seconds, in_pytorch in exported.comparisons:
        sides = "x".join(map(str, shape))
        print(f"{sides:<18} {seconds:>9.3f}s {in_pytorch:>9.3f}s {difference:>11.1e}")
    largest = max(each.difference for each in exported.comparisons)
    said = f"{checkpoint.name}, {exported.path.stat().st_size / 1e6:.1f} MB, exported in "
    said += f"{exported.seconds:.1f} s, differs from PyTorch by {largest:.1e} at most"
    print(printable(f"{exported.path}: {said}"))
    if checkpoint.config["tlc_flag"] and not exported.has_windows:
        side = checkpoint.config["tlc_kernel"]
        print(
            f"without TLC: on images over {side} pixels wide or high PyTorch's network gives "
            "slightly other values; --help explains"
        )
    return 0
