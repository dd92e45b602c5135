"""Draw loss, learning rate and validation scores of training runs in one figure.

    python examples/curves.py experiments/tiny_x4 experiments/light_x4 -o curves.png

Reads `log.jsonl` in each run's folder; needs matplotlib.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

Curve = dict[int, float]  # values by iteration
LOWER_IS_BETTER = ("lpips", "niqe", "dists", "fid")


def values_of(entry: dict) -> dict[str, object]:
    """Return the values in one line of the log, by name: "lr", "l_pix", "Set5 psnr", ….

    "seconds" are those of an iteration, without validations and saves.
    """
    if entry["event"] == "train":
        return {"lr": entry["lr"][0], "seconds": entry.get("time", math.nan), **entry["losses"]}
    if entry["event"] == "validation":
        return {f"{entry['dataset']} {name}": value for name, value in entry["metrics"].items()}
    return {}


def read_run(run: Path) -> dict[str, Curve]:
    """Return the curves of a run by name, given its folder or its log.

    What was logged after the iteration that the run later resumed from is left out.
    """
    path = run / "log.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"curves.py: {path} cannot be read ({error}); give the folder of a run")
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:  # cut short when a run was killed or its disk was full
            continue
        try:
            if entry["event"] == "start":
                for name, curve in curves.items():
                    curves[name] = {at: value for at, value in curve.items() if at <= entry["iter"]}
            for name, value in values_of(entry).items():
                curves.setdefault(name, {})[int(entry["iter"])] = float(value)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            sys.exit(f"curves.py: {path}:{number} is not a line of a training log ({error!r})")
    return {name: curve for name, curve in curves.items() if curve}


def best(curve: Curve, metric: str) -> tuple[int, float]:
    """Return iteration and value of the best finite value, the first of equal ones."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    finite = [each for each in curve.items() if math.isfinite(each[1])]
    return max(finite, key=lambda each: sign * each[1], default=(0, math.nan))


def draw(runs: dict[str, dict[str, Curve]], loss: str, metric: str, smooth: int) -> Figure:
    """Draw the panels one above the other; faint lines are losses before the moving average."""
    figure = Figure(figsize=(9, 10), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for index, (run, curves) in enumerate(runs.items()):
        colour = f"C{index}"
        lines = {name: (np.array([*curve]), [*curve.values()]) for name, curve in curves.items()}
        at, seconds = lines["seconds"]
        hours = np.diff(at, prepend=0) @ np.array(seconds) / 3600
        if math.isfinite(hours):
            print(f"{run}: {at[-1]:,} iterations in {hours:.2f} hours")
        steps, values = lines[loss]
        width = min(smooth or max(1, len(values) // 25), len(values))
        means = np.convolve(values, np.full(width, 1 / width), mode="valid")
        panels[0].plot(steps, values, color=colour, alpha=0.2)
        panels[0].plot(steps[width // 2 :][: len(means)], means, color=colour, label=run)
        panels[1].plot(*lines["lr"], color=colour)
        for number, name in enumerate(name for name in curves if name.endswith(f" {metric}")):
            step, value = best(curves[name], metric)
            label = f"{run}, {name}: best {value:.4g} at {step:,}"
            print(label)
            style = ("-", "--", ":", "-.")[number % 4]
            panels[2].plot(*lines[name], style, color=colour, label=label)
            panels[2].plot(step, value, "*", color=colour)
    panels[0].set_yscale("log")
    panels[2].set_xlabel("iteration")
    for axes, title in zip(panels, (loss, "learning rate", metric), strict=True):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def main() -> None:
    """Read the runs and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders such as experiments/tiny_x4")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"))
    parser.add_argument("--loss", default="l_pix", help="name of the loss (default: l_pix)")
    parser.add_argument("--metric", default="psnr", help="name of the metric (default: psnr)")
    parser.add_argument("--smooth", type=int, default=0, help="logged losses in a moving average")
    arguments = parser.parse_args()
    runs = {str(run): read_run(run) for run in arguments.runs}
    for run, curves in runs.items():
        if arguments.loss not in curves:
            known = ", ".join(curves) or "nothing"
            sys.exit(f"curves.py: {run} has no {arguments.loss} in its log, which has {known}")
    figure = draw(runs, arguments.loss, arguments.metric, max(0, arguments.smooth))
    try:
        figure.savefig(arguments.output, dpi=150)
    except (OSError, ValueError) as error:
        sys.exit(f"curves.py: {arguments.output} cannot be written: {error}")


if __name__ == "__main__":
    main()
