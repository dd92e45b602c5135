"""`dlgsanet average`: one checkpoint out of several."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.checkpoint import average, read_checkpoint, save_checkpoint
from dlgsanet_arch.cli import exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet average", description="Average the weights of several checkpoints."
    )
    parser.add_argument(
        "weights",
        type=Path,
        nargs="+",
        metavar="WEIGHTS",
        help=".pth or .safetensors, all of one configuration",
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT", help=".pth or .safetensors"
    )
    parser.add_argument(
        "--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)"
    )
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Write the mean of the files."""
    arguments = build_parser().parse_args(argv)
    mean = average([read_checkpoint(path, arguments.param_key) for path in arguments.weights])
    save_checkpoint(mean, arguments.out)
    print(f"{arguments.out}: {mean.name}, the mean of {len(arguments.weights)}")
    return 0
