"""What a validation or a test found: rows, means, BasicSR's lines and records, files."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from basicsr.utils import get_root_logger

from dlgsanet_arch.files import disk_faults_named, write_atomically, write_json
from dlgsanet_arch.pipeline.logs import readable

_SETTLED = 0.01  # part of the first weights in their average that no longer shows


class Row(NamedTuple):
    """One image: its name, and the figure of each metric.

    PSNR is inf for identical images; figures are nan where the network's output was not finite.
    """

    name: str
    values: dict[str, float]
    bicubic: dict[str, float] = {}  # noqa: RUF012 - of LR enlarged so, in a first validation


@dataclass(frozen=True)
class Evaluation:
    """What a validation or a test found."""

    dataset: str  # its name
    iteration: int | str  # in a test the name of the run
    rows: tuple[Row, ...]  # in the order of paths; none of a model with its own validation
    means: dict[str, float]  # of each metric, without identical images; inf where all are
    identical: int = 0  # images that equal the ground truth, so that their PSNR is inf
    bicubic: dict[str, float] = field(default_factory=dict)  # means, of a first validation


def _mean(values: Sequence[float], *, rises: bool = True) -> float:
    """Return the mean of all but the identical images' figures, the same in whatever order."""
    counted = [value for value in values if not (rises and value == math.inf)]
    return math.fsum(counted) / len(counted) if counted else math.inf


def _rises(metric: Mapping[str, Any]) -> bool:
    return metric.get("better", "higher") == "higher"


def summarise(
    dataset: str,
    iteration: int | str,
    rows: Sequence[Row],
    wanted: Mapping[str, Mapping[str, Any]],
) -> Evaluation:
    """Return the means of all images' rows over `val:metrics`, and of bicubic's figures."""
    means = {
        name: _mean([row.values[name] for row in rows], rises=_rises(metric))
        for name, metric in wanted.items()
        if all(name in row.values for row in rows)
    }
    identical = [
        sum(row.values[name] == math.inf for row in rows) for name in means if _rises(wanted[name])
    ]
    bicubic = {name: _mean([row.bicubic[name] for row in rows]) for name in rows[0].bicubic}
    return Evaluation(dataset, iteration, tuple(rows), means, max(identical, default=0), bicubic)


def keep(model: Any, found: Evaluation) -> None:
    """Note means and bests on the model, as BasicSR does."""
    model.metric_results = dict(found.means)
    if not hasattr(model, "best_metric_results"):
        model.best_metric_results = {}
    record = model.best_metric_results.setdefault(found.dataset, {})
    for name, metric in (model.opt["val"].get("metrics") or {}).items():
        better, rises = metric.get("better", "higher"), _rises(metric)
        worst = -math.inf if rises else math.inf
        best = record.setdefault(name, {"better": better, "val": worst, "iter": -1})
        value = found.means.get(name, math.nan)
        if value >= best["val"] if rises else value <= best["val"]:
            best |= {"val": value, "iter": found.iteration}


def log(model: Any, found: Evaluation, tb_logger: Any) -> None:
    """Write BasicSR's lines to the log and its scalars to TensorBoard."""
    if not found.means:
        return
    lines = [f"Validation {found.dataset}\n"]
    for name, value in found.means.items():
        line = f"\t # {name}: {value:.4f}"
        if model.opt["is_train"]:
            best = model.best_metric_results[found.dataset][name]
            line += f"\tBest: {best['val']:.4f} @ {best['iter']} iter"
        if name in found.bicubic:
            line += f"\tbicubic: {found.bicubic[name]:.4f}"
        if found.identical and any(row.values[name] == math.inf for row in found.rows):
            line += f"\tidentical (inf, not in the mean): {found.identical} of {len(found.rows)}"
        lines.append(f"{line}\n")
        if tb_logger is not None:
            tb_logger.add_scalar(f"metrics/{found.dataset}/{name}", value, found.iteration)
    get_root_logger().info("".join(lines))
    if note := _averages_note(model, found):
        get_root_logger().info(note)


def _averages_note(model: Any, found: Evaluation) -> str:
    """Say that averaged weights are young, where a run validates them for the first time."""
    decay, paths = getattr(model, "ema_decay", 0), model.opt["path"]
    starts = paths.get("pretrain_network_g") or paths.get("resume_state")
    if not found.bicubic or starts or not 0 < decay < 1:
        return ""
    left = decay ** int(found.iteration)
    if left < _SETTLED:
        return ""
    return (
        f"what is validated is the average of the weights (train:ema_decay {decay}), of which "
        f"{left:.0%} are still the random weights of the start; figures are low until about "
        f"iteration {math.ceil(math.log(_SETTLED) / math.log(decay)):,}"
    )


def write(evaluations: Sequence[Evaluation], folder: Path) -> None:
    """Write all figures of a test: `<data set>.csv` by image, and `evaluation.json` with means.

    Figures that are not finite are written as ``inf`` and ``nan``; earlier reports are replaced.
    """
    content = {}
    with disk_faults_named(f"the reports in {folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        for each in evaluations:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["image", *each.means])
            for row in each.rows:
                table.writerow([row.name, *(row.values[name] for name in each.means)])
            write_atomically(folder / f"{each.dataset}.csv", text.getvalue().encode())
            content[each.dataset] = {
                "iteration": each.iteration,
                "means": each.means,
                "identical": each.identical,
                "images": [{"image": row.name, **row.values} for row in each.rows],
            }
        write_json(folder / "evaluation.json", readable(content))
