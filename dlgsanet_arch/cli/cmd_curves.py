"""`dlgsanet curves`: loss, learning rate and validation of runs, as a figure."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet curves",
        description="Draw loss, learning rate and validation of runs in one figure.",
        epilog="Of a folder, log.jsonl is read, or else BasicSR's text logs, or else TensorBoard's "
        "events. After a resume the later lines count.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="EXPERIMENT",
        help="folder of a run, such as experiments/tiny_x4, or a log",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("curves.png"),
        metavar="FILE",
        help=".png, .pdf or .svg (default: curves.png)",
    )
    parser.add_argument("--loss", metavar="NAME", help="default: l_pix, or else the first")
    parser.add_argument("--metric", default="psnr", metavar="NAME", help="default: psnr")
    parser.add_argument("--dataset", metavar="NAME", help="of the validation (default: all)")
    parser.add_argument(
        "--smooth",
        type=int,
        default=0,
        metavar="N",
        help="average over N logged losses (default: 1 in 25 of them)",
    )
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Write the figure, and print what was read."""
    from dlgsanet_arch.tools import curves, figures

    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.smooth < 0:
        parser.error(f"--smooth: {arguments.smooth} is no number of values")
    figures.check_figure_path(arguments.out)
    runs = [curves.read_run(place) for place in arguments.runs]
    figure = curves.draw(
        runs,
        loss=arguments.loss,
        metric=arguments.metric,
        dataset=arguments.dataset,
        window=arguments.smooth,
    )
    figures.save_figure(figure, arguments.out)
    for run in runs:
        last = max(next(reversed(series)) for series in run.all_series() if series)
        print(f"{run.name}: up to iteration {last:,}, from {run.source}")
        for (dataset, metric), series in run.validations.items():
            top = curves.best(series, metric)
            if metric == arguments.metric and top:
                print(f"  best {metric} on {dataset}: {top[1]:.4f} at {top[0]:,}")
    print(f"written: {arguments.out}")
    return 0
