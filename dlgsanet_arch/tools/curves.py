"""Curves of trainings: loss, learning rate and validation of several runs in one figure.

Three sources hold them: the JSON lines of this package, BasicSR's text logs and TensorBoard's
events. `read_run` takes the first of these that a run has.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.options.subject import choose
from dlgsanet_arch.tools import figures

Series = dict[int, float]  # values by iteration, in ascending order

_JSON_LINES = "log.jsonl"
_TEXT_LOGS = "train_*.log"
_EVENTS = "events.out.tfevents.*"

_NUMBER = r"[-+]?(?:nan|inf|\d+\.?\d*(?:[eE][-+]?\d+)?)"
# [tiny_..][epoch:  0, iter:   1,200, lr:(5.000e-04,)] [eta: …, time (data): …] l_pix: 1.2e-02
_TRAIN_LINE = re.compile(rf"iter:\s*(\d[\d,]*), lr:\(({_NUMBER})?[^)]*\)\](?: \[eta: [^]]*\])?(.*)")
_LOSS = re.compile(rf"([^\s:]+): ({_NUMBER})(?=\s|$)")
_VALIDATION = re.compile(r"INFO: Validation (.+)$")
# 	 # psnr: 30.1234	Best: 30.1234 @ 5000 iter
_METRIC = re.compile(rf"^\s+# ([^:]+): ({_NUMBER})(?:\s+Best: ({_NUMBER}) @ (\d+) iter)?")
_MOST_NAMED = 12  # runs in a legend that is still read


@dataclass
class Run:
    """What a run's logs tell, the last word on each iteration.

    Attributes:
        name: The run's.
        source: The files it was read from.
        losses: By name; `l_pix` is BasicSR's.
        rates: The learning rate of the first parameter group.
        validations: By data set and metric.
    """

    name: str
    source: str = ""
    losses: dict[str, Series] = field(default_factory=dict)
    rates: Series = field(default_factory=dict)
    validations: dict[tuple[str, str], Series] = field(default_factory=dict)

    def all_series(self) -> list[Series]:
        """Return every curve."""
        return [*self.losses.values(), self.rates, *self.validations.values()]

    def forget_after(self, iteration: int) -> None:
        """Drop what is later than an iteration: the run went on from there."""
        for series in self.all_series():
            while series and next(reversed(series)) > iteration:
                series.popitem()

    def is_empty(self) -> bool:
        """Return whether nothing was found."""
        return not any(self.all_series())

    def metrics(self) -> list[str]:
        """Return the names of all metrics, sorted."""
        return sorted({metric for _, metric in self.validations})


def _add(series: Series, iteration: int, value: float) -> None:
    """Add a value; one that was later or there before is an earlier attempt's, and goes."""
    while series and next(reversed(series)) >= iteration:
        series.popitem()
    series[iteration] = value


def _read_json_line(run: Run, entry: dict[str, Any]) -> None:
    event = entry.get("event")
    if event == "start":
        run.forget_after(int(entry["iter"]))
    elif event == "train":
        iteration = int(entry["iter"])
        if entry.get("lr"):
            _add(run.rates, iteration, float(entry["lr"][0]))
        for name, value in entry["losses"].items():
            _add(run.losses.setdefault(name, {}), iteration, float(value))
    elif event == "validation":
        for name, value in entry["metrics"].items():
            series = run.validations.setdefault((entry["dataset"], name), {})
            _add(series, int(entry["iter"]), float(value))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read_json_lines(run: Run, paths: Sequence[Path]) -> None:
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a run that was killed, or whose disk was full, wrote half of it
            try:
                if isinstance(entry, dict):
                    _read_json_line(run, entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}:{number}: this is no line of a run's log ({error}); remove it"
                ) from error


def _read_text_logs(run: Run, paths: Sequence[Path]) -> None:
    """Read BasicSR's logs, one for each start of a run, in that order.

    A validation's lines do not tell its iteration: it is that of the best value where this is a
    new best, else that of the last training line.
    """
    for path in paths:
        last, dataset, is_first = 0, "", True
        for line in _lines(path):
            if found := _TRAIN_LINE.search(line):
                last, dataset = int(found[1].replace(",", "")), ""
                if is_first:
                    run.forget_after(last - 1)
                    is_first = False
                if found[2]:
                    _add(run.rates, last, float(found[2]))
                for name, value in _LOSS.findall(found[3]):
                    _add(run.losses.setdefault(name, {}), last, float(value))
            elif found := _VALIDATION.search(line):
                dataset = found[1].strip()
            elif dataset and (found := _METRIC.search(line)):
                is_new_best = found[4] and found[2] == found[3] and int(found[4]) >= last
                series = run.validations.setdefault((dataset, found[1].strip()), {})
                _add(series, int(found[4]) if is_new_best else last, float(found[2]))
            elif line.strip():
                dataset = ""


def _read_events(run: Run, paths: Sequence[Path]) -> None:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ImportError as error:
        raise UserError(
            f"{paths[0]}: TensorBoard's events need a package that is not there: "
            "pip install tensorboard"
        ) from error
    from tensorboard.util.tensor_util import make_ndarray

    for path in paths:
        is_first = True
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.WhichOneof("value") == "tensor" and not value.tensor.tensor_shape.dim:
                    if is_first:
                        run.forget_after(event.step - 1)
                        is_first = False
                    _add_scalar(run, value.tag, event.step, float(make_ndarray(value.tensor)))


def _add_scalar(run: Run, tag: str, iteration: int, value: float) -> None:
    kind, _, rest = tag.partition("/")
    if kind == "losses":
        series = run.losses.setdefault(rest, {})
    elif kind == "metrics":
        dataset, _, metric = rest.rpartition("/")
        series = run.validations.setdefault((dataset, metric), {})
    elif tag == "lr":
        series = run.rates
    else:
        return
    _add(series, iteration, value)


Reader = Callable[[Run, Sequence[Path]], None]


def _sources(place: Path) -> Iterator[tuple[Reader, list[Path]]]:
    """Yield each reader with what a folder, or a single file, has for it; the best first."""
    if place.is_file():
        is_json, is_events = place.suffix == ".jsonl", ".tfevents." in place.name
        yield (
            (_read_json_lines if is_json else _read_events if is_events else _read_text_logs),
            [place],
        )
        return
    yield _read_json_lines, sorted(place.glob(_JSON_LINES))
    # Names end in the time of the start.
    yield _read_text_logs, sorted(place.glob(_TEXT_LOGS))
    # BasicSR keeps events beside experiments/, under the same name.
    for folder in (place, place.resolve().parent.parent / "tb_logger" / place.resolve().name):
        yield _read_events, sorted(folder.glob(_EVENTS))


def read_run(place: Path) -> Run:
    """Read the curves of a run.

    Args:
        place: The run's folder in experiments/ or tb_logger/, or one of the files in it: log.jsonl,
            a text log of BasicSR's, a file of TensorBoard's events.

    Returns:
        The run, named after its folder. What an iteration was logged with last is kept, and of a
        run that went on from an earlier iteration nothing that came after that before.

    Raises:
        UserError: There is no such place, no log in it, or nothing in its logs.
    """
    if not place.exists():
        others = [entry.name for entry in place.parent.glob("*")] if place.parent.is_dir() else []
        hint = choose(place.name, sorted(others)) if others else "; there is no such folder"
        raise UserError(f"there is no run {place}{hint}")
    folder = place if place.is_dir() else place.parent
    found = []
    for read, paths in _sources(place):
        if not paths:
            continue
        run = Run(folder.resolve().name, ", ".join(str(path) for path in paths))
        read(run, paths)
        if not run.is_empty():
            return run
        found += paths
    if found:
        raise UserError(
            f"{place}: its logs hold no iteration yet ({', '.join(map(str, found))}); a run "
            "writes the first after `print_freq` iterations"
        )
    raise UserError(
        f"{place} holds no log of a training ({_JSON_LINES}, {_TEXT_LOGS} or {_EVENTS}); name a "
        "run's folder, such as experiments/tiny_x4"
    )


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Return the mean over `window` values around each, fewer at the ends.

    What is not finite is left out of means, and stays as it is.
    """
    raw = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(raw)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, raw, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(raw))
    start = np.maximum(0, places - (window - 1) // 2)
    end = np.minimum(len(raw), places + window // 2 + 1)
    means = (sums[end] - sums[start]) / np.maximum(1, counts[end] - counts[start])
    return np.where(finite, means, raw)


def _chosen_loss(runs: Sequence[Run], loss: str | None) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.losses))
    if loss is not None and loss not in names:
        raise UserError(f"no run has a loss {loss!r}{choose(loss, names)}")
    ordered = sorted(names, key=lambda name: (name != "l_pix", not name.startswith("l_")))
    return loss or next(iter(ordered), "")


def _check_metric(runs: Sequence[Run], metric: str, dataset: str | None) -> None:
    metrics = sorted({name for run in runs for name in run.metrics()})
    if metrics and metric not in metrics:
        raise UserError(f"no run has a metric {metric!r}{choose(metric, metrics)}")
    datasets = sorted({name for run in runs for name, _ in run.validations})
    if dataset is not None and dataset not in datasets:
        raise UserError(f"no run was validated on {dataset!r}{choose(dataset, datasets)}")


def best(series: Series, metric: str) -> tuple[int, float] | None:
    """Return iteration and value of the best finite value; the lowest of LPIPS, NIQE and DISTS."""
    finite = [(value, step) for step, value in series.items() if math.isfinite(value)]
    if not finite:
        return None
    lowest = metric.lower() in ("lpips", "niqe", "dists", "fid")
    # Of equal values the first: it took the least training.
    value, step = min(finite, key=lambda each: (each[0] if lowest else -each[0], each[1]))
    return step, value


def _unique_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(names, 1)
    ]


def _draw_losses(
    axes: Any, runs: Sequence[Run], names: Sequence[str], loss: str, window: int
) -> None:
    positive = True
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        series = run.losses.get(loss, {})
        if not series:
            continue
        colour = figures.COLOURS[index % len(figures.COLOURS)]
        steps, values = list(series), list(series.values())
        width = window or max(1, len(values) // 25)
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8, zorder=1)
        axes.plot(steps, smoothed(values, width), color=colour, linewidth=1.8, label=name, zorder=2)
        positive &= min((v for v in values if math.isfinite(v)), default=1) > 0
    if positive:
        axes.set_yscale("log")
        _plain_log_ticks(axes)


def _plain_log_ticks(axes: Any) -> None:
    """Label a logarithmic axis also within one power of ten, which losses seldom leave."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    steps = (1,) if decades > 2 else (1, 2, 5) if decades > 0.7 else tuple(range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_rates(axes: Any, runs: Sequence[Run], names: Sequence[str]) -> None:
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = figures.COLOURS[index % len(figures.COLOURS)]
        axes.plot(list(run.rates), list(run.rates.values()), color=colour, label=name)


_DASHES = ("-", "--", ":", "-.")


def _draw_validations(
    axes: Any, runs: Sequence[Run], names: Sequence[str], metric: str, dataset: str | None
) -> None:
    datasets = list(dict.fromkeys(d for run in runs for d, m in run.validations if m == metric))
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = figures.COLOURS[index % len(figures.COLOURS)]
        for (validated, measured), series in run.validations.items():
            if measured != metric or dataset not in (None, validated):
                continue
            dash = _DASHES[datasets.index(validated) % len(_DASHES)]
            top = best(series, metric)
            label = f"{name}, {validated}"
            if top:
                label += f": best {top[1]:.4g} at {top[0]:,}"
                axes.plot(*top, "*", color=colour, markersize=11, zorder=3)
            axes.plot(list(series), list(series.values()), dash, color=colour, label=label)


def draw(
    runs: Sequence[Run],
    *,
    loss: str | None = None,
    metric: str = "psnr",
    dataset: str | None = None,
    window: int = 0,
) -> Any:
    """Draw loss, learning rate and validation of runs, one above the other.

    Args:
        runs: Each gets a colour.
        loss: Its name; None takes `l_pix`, or where no run has it the first.
        metric: Of the validations.
        dataset: Of the validations; None takes all, each with its dashes.
        window: How many logged values are averaged for the smooth curve; 0 takes 1 in 25.

    Returns:
        A figure of matplotlib's.

    Raises:
        UserError: matplotlib is absent, or no run has that loss, metric or data set.
    """
    loss = _chosen_loss(runs, loss)
    _check_metric(runs, metric, dataset)
    names = _unique_names(runs)
    figure = figures.new_figure(9, 10)
    from matplotlib.ticker import EngFormatter

    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 3))
    _draw_losses(panels[0], runs, names, loss, window)
    _draw_rates(panels[1], runs, names)
    _draw_validations(panels[2], runs, names, metric, dataset)
    unit = ", dB" if metric.lower() == "psnr" else ""
    titles = (
        f"training loss {loss}".strip(),
        "learning rate",
        f"validation {metric.upper()}{unit}",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        handles = axes.get_legend_handles_labels()[0]
        if not axes.lines or not any(len(line.get_xdata()) for line in axes.lines):
            said = "not in the logs"
            axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center")
        elif handles and axes is not panels[1]:  # the colours of the others say it
            # Losses fall and metrics rise; to look for the emptiest place takes long.
            place = "upper right" if axes is panels[0] else "lower right"
            axes.legend(handles=handles[:_MOST_NAMED], fontsize="small", loc=place)
    figure.align_ylabels()
    panels[2].set_xlabel("iteration")
    panels[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure
