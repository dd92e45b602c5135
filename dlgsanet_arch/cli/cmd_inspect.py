"""`dlgsanet inspect`: what a file of weights holds."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.checkpoint import Checkpoint, nearest_published, read_checkpoint
from dlgsanet_arch.cli import exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet inspect",
        description="Say which network a file of weights is of.",
        epilog="Activation, img_range, tlc_flag, tlc_kernel, and edge against sparseedge are not "
        "in the weights: where the file does not tell them, they are shown as published.",
    )
    parser.add_argument(
        "weights", type=Path, nargs="+", metavar="WEIGHTS", help=".pth or .safetensors"
    )
    parser.add_argument(
        "--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one line a file")
    return parser


def _described(path: Path, checkpoint: Checkpoint) -> dict[str, object]:
    nearest, differing = nearest_published(checkpoint.config)
    dtypes = sorted(
        {str(each.dtype).removeprefix("torch.") for each in checkpoint.weights.values()}
    )
    return {
        "file": str(path),
        "network": checkpoint.name,
        "scale": checkpoint.scale,
        "parameters": checkpoint.parameters,
        "dtype": " ".join(dtypes),
        "iteration": checkpoint.iteration,
        "not_finite": sum(int((~each.isfinite()).sum()) for each in checkpoint.weights.values()),
        "nearest": nearest,
        "differences": {
            name: {"here": here, "published": there} for name, (here, there) in differing.items()
        },
        "notes": dict(checkpoint.notes),
        "config_from": "the file" if checkpoint.is_told else "the weights",
        "config": dict(checkpoint.config),
    }


def _report(facts: dict) -> str:
    rows = {
        "network": facts["network"],
        "scale": f"x{facts['scale']}",
        "parameters": f"{facts['parameters']:,} ({facts['dtype']})",
        "iteration": "not known" if facts["iteration"] is None else f"{facts['iteration']:,}",
        "nearest": facts["nearest"] + ("" if facts["differences"] else ", no difference"),
    }
    lines = [facts["file"], *(f"  {label:<11} {value}" for label, value in rows.items())]
    lines += [
        f"    {name}: {json.dumps(each['here'])} (published: {json.dumps(each['published'])})"
        for name, each in facts["differences"].items()
    ]
    lines += [f"  {name:<11} {text}" for name, text in facts["notes"].items()]
    if facts["not_finite"]:
        lines.append(f"  DAMAGED: {facts['not_finite']:,} weights are infinite or not a number")
    lines.append(f"  configuration, from {facts['config_from']}")
    lines += [f"    {name}: {json.dumps(value)}" for name, value in facts["config"].items()]
    return "\n".join(lines)


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Print what each file holds.

    Returns:
        0, or 1 where a file has weights that are not finite.
    """
    arguments = build_parser().parse_args(argv)
    damaged = 0
    for path in arguments.weights:
        facts = _described(path, read_checkpoint(path, arguments.param_key))
        print(json.dumps(facts) if arguments.json else _report(facts))
        damaged += bool(facts["not_finite"])
    return int(damaged > 0)
