"""`dlgsanet weights <action>`: what files of weights hold, and files made of them."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.cli import VERBS, add_common, clean_up_on_sigterm, exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import printable

_NOT_STORED = "activation, img_range, tlc_flag, tlc_kernel, and edge against sparseedge"
# What each action does: the first line is its line in `--help`.
ACTIONS = {
    "inspect": f"""Say which network a file of weights belongs to.

    The weights alone do not show {_NOT_STORED}: where the file does not state them, they are shown
    as published.""",
    "convert": """Write weights as .safetensors or as BasicSR's .pth.

    Both hold the configuration; --set states what the weights do not show, and the suffix of the
    output decides on the format.""",
    "average": "Average the weights of several checkpoints of one configuration.",
    "transfer": """Make weights of one scale a start for another, such as x2 out of x4.

    All weights are kept but the upsampler's, which are interpolated between its sub-pixels. Train
    with path: pretrain_network_g: OUTPUT.""",
}


def _note(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as tlc_flag=false")
    return name, value


def _argument(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, the value as option files have it."""
    from dlgsanet_arch.options import parse_value

    name, value = _note(text)
    return name, parse_value(value)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb: a sub-command for each action."""
    parser = argparse.ArgumentParser(prog="dlgsanet weights", description=VERBS["weights"])
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(action: str, run: Any, files: str | None) -> Any:
        line = ACTIONS[action].partition("\n")[0]
        added = actions.add_parser(action, help=line, description=ACTIONS[action])
        added.set_defaults(run=run)
        weights = ".pth, .safetensors or a bundled name"
        added.add_argument("weights", nargs=files, metavar="WEIGHTS", help=weights)
        add_common(added, "param-key")
        if run is not _inspect:
            added.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
        return added.add_argument

    inspect = add("inspect", _inspect, "+")
    inspect("--json", action="store_true", help="print JSON, one line a file, instead of YAML")
    convert = add("convert", _convert, None)
    several = {"action": "append", "default": []}
    set_help = "an argument of the network, such as tlc_flag=false; may be repeated"
    convert("--set", type=_argument, **several, metavar="NAME=VALUE", help=set_help)
    note = "a note for the file, such as licence=Apache-2.0; may be repeated"
    convert("--note", type=_note, **several, metavar="NAME=TEXT", help=note)
    dtype = "of the weights (default: unchanged); fp16 halves the size and rounds to 11 bits"
    convert("--dtype", choices=("fp32", "fp16"), help=dtype)
    add("average", _average, "+")
    transfer = add("transfer", _transfer, None)
    transfer("--scale", type=int, required=True, help="to train for, such as 4")
    return parser


def _described(path: str, checkpoint: Any) -> dict[str, Any]:
    from dlgsanet_arch.checkpoint import nearest_published

    nearest, differing = nearest_published(checkpoint.config)
    dtypes = {str(each.dtype).removeprefix("torch.") for each in checkpoint.weights.values()}
    return {
        "file": path,
        "network": checkpoint.name,
        "scale": checkpoint.scale,
        "parameters": checkpoint.parameters,
        "dtype": " ".join(sorted(dtypes)),
        "iteration": checkpoint.iteration,
        "not_finite": sum(int((~each.isfinite()).sum()) for each in checkpoint.weights.values()),
        "nearest": nearest,
        "differences": {
            name: {"here": here, "published": there} for name, (here, there) in differing.items()
        },
        "notes": dict(checkpoint.notes),
        "config_from": "the file" if checkpoint.is_stated else "the weights",
        "config": dict(checkpoint.config),
    }


def _inspect(asked: argparse.Namespace) -> int:
    import yaml

    from dlgsanet_arch.checkpoint import read_checkpoint

    damaged = False
    for path in asked.weights:
        facts = _described(path, read_checkpoint(path, asked.param_key))
        text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
        print(json.dumps(facts) if asked.json else printable(text))
        if facts["not_finite"]:
            fault = (
                f"{path} is DAMAGED: {facts['not_finite']:,} weights are infinite or not a number"
            )
            print(printable(fault), file=sys.stderr)
            damaged = True
    return int(damaged)


def _convert(asked: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    from dlgsanet_arch.checkpoint import read_checkpoint, save_checkpoint

    checkpoint = read_checkpoint(asked.weights, asked.param_key, dict(asked.set))
    weights = dict(checkpoint.weights)
    if asked.dtype:
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[asked.dtype]
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        for name, tensor in checkpoint.weights.items():
            if not torch.equal(weights[name].isfinite(), tensor.isfinite()):
                raise UserError(f"--dtype fp16 cannot hold the weights of {name}: keep fp32")
    notes = {**checkpoint.notes, **dict(asked.note)}
    save_checkpoint(replace(checkpoint, weights=weights, notes=notes), asked.output)
    print(printable(f"{asked.output}: {checkpoint.name}, {checkpoint.parameters:,} parameters"))
    return 0


def _average(asked: argparse.Namespace) -> int:
    from dlgsanet_arch.checkpoint import average, read_checkpoint, save_checkpoint

    mean = average([read_checkpoint(path, asked.param_key) for path in asked.weights])
    save_checkpoint(mean, asked.output)
    print(printable(f"{asked.output}: {mean.name}, the mean of {len(asked.weights)}"))
    return 0


def _transfer(asked: argparse.Namespace) -> int:
    from dlgsanet_arch.checkpoint import read_checkpoint, save_checkpoint, transfer

    checkpoint = read_checkpoint(asked.weights, asked.param_key)
    start = transfer(checkpoint, asked.scale)
    save_checkpoint(start, asked.output)
    said = f"{start.name}, a start from {checkpoint.name}; the upsampler is resized"
    print(printable(f"{asked.output}: {said}"))
    return 0


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Run the action; 1 where an inspected file has weights that are not finite."""
    asked = build_parser().parse_args(argv)
    clean_up_on_sigterm()
    return asked.run(asked)
