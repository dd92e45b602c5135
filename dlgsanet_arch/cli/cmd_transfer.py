"""`dlgsanet transfer`: weights of one scale as a start for another."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.checkpoint import read_checkpoint, save_checkpoint, transfer
from dlgsanet_arch.cli import exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet transfer",
        description="Make x3 or x4 weights to start training from, out of x2.",
        epilog="All weights are kept but the upsampler's, which start anew. Train with "
        "path: pretrain_network_g: OUT.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help=".pth or .safetensors")
    parser.add_argument("--scale", type=int, required=True, help="to be trained for, such as 4")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT", help=".pth, to be trained from"
    )
    parser.add_argument(
        "--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new weights (default: 0)")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Write the start."""
    arguments = build_parser().parse_args(argv)
    checkpoint = read_checkpoint(arguments.weights, arguments.param_key)
    start = transfer(checkpoint, arguments.scale, arguments.seed)
    save_checkpoint(start, arguments.out)
    print(f"{arguments.out}: {start.name}, a start from {checkpoint.name}; the upsampler is new")
    return 0
