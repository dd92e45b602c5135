"""`dlgsanet data <what>`: also behind datasets/prepare.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from dlgsanet_arch.data import demo
    except ImportError as error:
        raise UserError(
            f"building data sets needs BasicSR's bicubic and LMDB writer, and their import fails "
            f"({error}); `dlgsanet doctor` says what to do"
        ) from error
    folder = arguments.root / "datasets" / "demo"
    built = demo.prepare(folder)
    print(f"{folder}: {'built' if built else 'complete already, nothing to do'}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb: a sub-command for each data set it can build."""
    parser = argparse.ArgumentParser(prog="dlgsanet data", description="Build data sets.")
    root = "the folder that holds datasets/ (default: the current folder)"
    parser.add_argument("--root", type=Path, default=Path(), metavar="FOLDER", help=root)
    # A sub-command's default would replace the value given before it.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--root", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    sets = parser.add_subparsers(required=True, metavar="WHAT")
    demo = sets.add_parser(
        "demo", parents=[common], help="a small set from the photographs in scikit-image's wheel"
    )
    demo.set_defaults(build=_demo)
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Build the data set that `argv` names."""
    arguments = build_parser().parse_args(argv)
    arguments.build(arguments)
    return 0
