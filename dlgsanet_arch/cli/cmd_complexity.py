"""`dlgsanet complexity`: what DLGSANet costs, next to what is published."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence

from dlgsanet_arch.cli import VERBS, exit_status, size
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import suggest_or_list
from dlgsanet_arch.tools.published import PUBLISHED, Network


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet complexity",
        description=VERBS["complexity"],
        epilog="MACs are counted by PyTorch's FlopCounterMode over a forward in train mode, "
        "without norms, activation functions, gates and additions. Activations are the elements "
        "that convolutions and linear layers put out. Time is the median of float32 forwards in "
        "eval mode, MiB the peak beyond weights and input.",
    )
    add = parser.add_argument
    network = "only those whose names contain this, such as tiny (default: all)"
    add("--network", nargs="+", default=[], metavar="NAME", help=network)
    add("--scale", type=int, nargs="+", choices=(2, 3, 4), default=[2, 3, 4], help="default: all")
    output = "size to upscale to, height first (default: 720x1280, as in papers)"
    add("--size", type=size, default=(720, 1280), metavar="HxW", help=output)
    add("--no-time", action="store_true", help="count only: seconds, not minutes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--runs", type=int, metavar="N", help="timed forwards (default: 1, or 10 on a GPU)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    return parser


def _chosen(names: Sequence[str], scales: Sequence[int]) -> list[Network]:
    known = dict.fromkeys(network for network, _ in PUBLISHED)
    chosen = {network for network in known for name in names if name.lower() in network.lower()}
    for name in names:
        if not any(name.lower() in network.lower() for network in known):
            hint = suggest_or_list(name, known)
            raise UserError(f"--network {name}: no network's name contains this{hint}")
    return [each for each in PUBLISHED if each[1] in scales and each[0] in (chosen or known)]


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a network could not be measured."""
    parser = build_parser()
    asked = parser.parse_args(argv)
    if asked.runs is not None and asked.runs < 1:
        parser.error(f"--runs must be 1 or more; got {asked.runs}")
    if min(asked.size) < 4:
        parser.error("--size must be 4x4 or more, so that the input has a pixel")
    chosen = _chosen(asked.network, asked.scale)
    import torch

    from dlgsanet_arch.tools import complexity

    device = None if asked.no_time else asked.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; `dlgsanet doctor` says more")
    records = []
    for network in chosen:
        print(f"{network[0]} x{network[1]}", file=sys.stderr, flush=True)
        records.append(complexity.evaluate(network, asked.size, device=device, runs=asked.runs))
    if asked.json:
        print(json.dumps(records, indent=2))
    elif asked.csv:
        writer = csv.DictWriter(sys.stdout, [*records[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    else:
        print(complexity.table(records))
    return int(any(record["fault"] for record in records))
