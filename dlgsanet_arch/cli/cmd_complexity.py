"""`dlgsanet complexity`: what networks cost, beside what is published."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status, size
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.tools.published import DATASETS, PUBLISHED, Network


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet complexity",
        description="Count and measure DLGSANet: parameters, MACs, activations, time, memory.",
        epilog="MACs are counted by PyTorch's FlopCounterMode over a forward in train mode: norms, "
        "activation functions, gates and additions are not in them. Activations are the elements "
        "that convolutions and linear layers put out. Time is the median of float32 forwards in "
        "eval mode, MiB the peak beyond weights and input. Of other networks published figures "
        "are shown.",
    )
    add = parser.add_argument
    network = "only those whose names have this in them, such as tiny (default: all)"
    add("--network", nargs="+", default=[], metavar="NAME", help=network)
    add("--scale", type=int, nargs="+", choices=(2, 3, 4), default=[2, 3, 4], help="default: all")
    output = "size to upscale to, height first (default: 720x1280, as in papers)"
    add("--size", type=size, default=(720, 1280), metavar="HxW", help=output)
    add("--no-time", action="store_true", help="count only: seconds, not minutes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--runs", type=int, metavar="N", help="timed forwards (default: 1, or 10 on a GPU)")
    dataset = "of the published PSNR in table and plot (default: Urban100)"
    add("--dataset", choices=DATASETS, default="Urban100", help=dataset)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    plot = "draw published PSNR against MACs: .png, .pdf or .svg"
    add("--plot", type=Path, metavar="FILE", help=plot)
    measured = "table.json of `dlgsanet reproduce`, whose PSNR is drawn beside the published"
    add("--measured", type=Path, metavar="FILE", help=measured)
    return parser


def _read_measured(path: Path | None, dataset: str) -> dict[Network, float]:
    """Take PSNR on a data set out of a table of `dlgsanet reproduce`."""
    if path is None:
        return {}
    try:
        cells = json.loads(path.read_text())["cells"]
        return {
            (cell["network"], cell["scale"]): cell["psnr"]
            for cell in cells
            if cell["dataset"] == dataset and cell["is_published"] and cell["psnr"] is not None
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--measured: {path} is not a table.json of this package ({error})"
        ) from error


def _chosen(names: Sequence[str], scales: Sequence[int]) -> list[Network]:
    from dlgsanet_arch.hints import suggest_or_list

    known = dict.fromkeys(name for name, _ in PUBLISHED)
    for name in names:
        if not any(name.lower() in each.lower() for each in known):
            hint = suggest_or_list(name, known)
            raise UserError(f"--network {name}: no network's name contains this{hint}")
    return [
        (each, scale)
        for each, scale in PUBLISHED
        if scale in scales and (not names or any(name.lower() in each.lower() for name in names))
    ]


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and draw it where that is asked for.

    Returns:
        0, or 1 where a network could not be measured.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.runs is not None and arguments.runs < 1:
        parser.error(f"--runs must be 1 or more; got {arguments.runs}")
    chosen = _chosen(arguments.network, arguments.scale)
    if min(arguments.size) < 4:
        parser.error("--size must be 4x4 or more, so that the input has a pixel")
    import torch

    from dlgsanet_arch.tools import complexity, figure

    if arguments.plot is not None:
        figure.check_path(arguments.plot)
        figure.new_figure(1, 1)  # says now that matplotlib is absent
    measured = _read_measured(arguments.measured, arguments.dataset)
    device = None if arguments.no_time else arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; `dlgsanet doctor` says more")
    records, ours = [], [network for network in chosen if network[0].startswith("DLGSANet")]
    for number, network in enumerate(chosen, start=1):
        if network in ours:
            what = "counting" if device is None else "measuring"
            progress = f"{number}/{len(ours)} {what} {network[0]} x{network[1]}"
            print(progress, file=sys.stderr, flush=True)
        records.append(
            complexity.evaluate(network, arguments.size, device=device, runs=arguments.runs)
        )
    if arguments.json:
        print(json.dumps(records, indent=2))
    elif arguments.csv:
        writer = csv.DictWriter(sys.stdout, [*records[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    else:
        print(complexity.table(records, arguments.dataset))
    if arguments.plot is not None:
        figure.save(complexity.draw(records, arguments.dataset, measured), arguments.plot)
        print(f"written: {arguments.plot}", file=sys.stderr)
    return int(any(record["fault"] for record in records))
