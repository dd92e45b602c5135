"""`dlgsanet complexity`: what networks cost, beside what is published."""

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.tools.published import DATASETS


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(int(found[1]), int(found[2])) < 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 720x1280")
    return int(found[1]), int(found[2])


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet complexity",
        description="Count and measure networks: parameters, MACs, activations, time, memory.",
        epilog="MACs are counted by PyTorch's FlopCounterMode over a forward in train mode: norms, "
        "activation functions, gates and additions are not in them. Activations are the elements "
        "that convolutions and linear layers put out. Time is the median of float32 forwards in "
        "eval mode, MiB the peak beyond weights and input. BasicSR's networks are shown where it "
        "is installed.",
    )
    parser.add_argument(
        "--network",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only those whose names have this in them, such as tiny or edsr (default: all)",
    )
    parser.add_argument(
        "--scale", type=int, nargs="+", choices=(2, 3, 4), default=[2, 3, 4], help="default: all"
    )
    parser.add_argument(
        "--size",
        type=_size,
        default=(720, 1280),
        metavar="HxW",
        help="size to upscale to (default: 720x1280, as in papers)",
    )
    parser.add_argument("--no-time", action="store_true", help="count only: seconds, not minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--runs", type=int, metavar="N", help="timed forwards (default: 3 or 10)")
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="Urban100",
        help="of the published PSNR in table and plot (default: Urban100)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw published PSNR against MACs: .png, .pdf or .svg",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="table.json of `dlgsanet reproduce`, whose PSNR is drawn beside the published",
    )
    return parser


def _read_measured(path: Path | None, dataset: str) -> dict[tuple[str, int], float]:
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


def _print_csv(records: Sequence[dict]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


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
    import torch

    from dlgsanet_arch.hints import suggest_or_list
    from dlgsanet_arch.tools import complexity, figures

    if arguments.plot is not None:
        figures.check_figure_path(arguments.plot)
        figures.new_figure(1, 1)  # says now that matplotlib is absent
    measured = _read_measured(arguments.measured, arguments.dataset)
    device = None if arguments.no_time else arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; `dlgsanet doctor` says more")
    networks = complexity.available()
    for name in arguments.network:
        if not any(name.lower() in network.name.lower() for network in networks):
            names = [network.name for network in complexity.NETWORKS]
            hint = suggest_or_list(name, names)
            raise UserError(
                f"--network {name}: there is none here{hint} (all but DLGSANet need BasicSR)"
            )
    chosen = [
        network
        for network in networks
        if not arguments.network
        or any(name.lower() in network.name.lower() for name in arguments.network)
    ]
    rows = []
    for network in chosen:
        for scale in sorted(set(arguments.scale)):
            if device is not None:
                print(f"measuring {network.name} x{scale}", file=sys.stderr, flush=True)
            rows.append(
                complexity.evaluate(
                    network, scale, arguments.size, device=device, runs=arguments.runs
                )
            )
    records = [row.record() for row in rows]
    if arguments.json:
        print(json.dumps(records, indent=2))
    elif arguments.csv:
        _print_csv(records)
    else:
        print(complexity.table(rows, arguments.dataset))
        absent = [each.name for each in complexity.NETWORKS if each not in networks]
        if absent:
            print(f"not shown, since BasicSR is not installed: {', '.join(absent)}")
    if arguments.plot is not None:
        figures.save_figure(complexity.draw(rows, arguments.dataset, measured), arguments.plot)
        print(f"written: {arguments.plot}", file=sys.stderr)
    return int(any(row.fault for row in rows))
