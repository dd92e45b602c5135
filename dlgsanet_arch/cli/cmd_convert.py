"""`dlgsanet convert`: weights from one file format into another."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dlgsanet_arch.checkpoint import read_checkpoint, save_checkpoint
from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError


def _argument(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, the value as option files have it."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as tlc_flag=false")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is no value of an option file") from error


def _note(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TEXT, such as licence=Apache-2.0")
    return name, value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet convert",
        description="Write weights as .safetensors or as BasicSR's .pth.",
        epilog="Both hold the configuration, so that the network is told whole from then on; "
        "--set says what the weights do not tell: activation, img_range, tlc_flag, tlc_kernel, "
        "and buildblock_type where it is edge.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help=".pth or .safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="its suffix decides on the format")
    parser.add_argument(
        "--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)"
    )
    parser.add_argument(
        "--set",
        type=_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the network, such as tlc_flag=false; may be given again",
    )
    parser.add_argument(
        "--note",
        type=_note,
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="what the file should say of itself, such as licence=Apache-2.0; may be given again",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16"),
        help="of the weights (default: as they are); half of the size in fp16, rounded to 11 bits",
    )
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file."""
    arguments = build_parser().parse_args(argv)
    checkpoint = read_checkpoint(arguments.weights, arguments.param_key, dict(arguments.set))
    weights = dict(checkpoint.weights)
    if arguments.dtype:
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[arguments.dtype]
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        for name, tensor in checkpoint.weights.items():
            if not torch.equal(weights[name].isfinite(), tensor.isfinite()):
                raise UserError(f"--dtype fp16 cannot hold the weights of {name}: keep fp32")
    notes = {**checkpoint.notes, **dict(arguments.note)}
    checkpoint = replace(checkpoint, weights=weights, notes=notes)
    save_checkpoint(checkpoint, arguments.out)
    print(f"{arguments.out}: {checkpoint.name}, {checkpoint.parameters:,} parameters")
    return 0
