"""What a person and a program read of a run: BasicSR's log, TensorBoard, wandb, JSON lines.

The text log is BasicSR's logger, so that its models write to it; the JSON lines are always there.
TensorBoard and wandb are used where they are asked for and installed.
"""

import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.logger import initialized_logger
from tqdm import tqdm

from dlgsanet_arch.pipeline.processes import Processes

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s: %(message)s")
_NAME = "basicsr"
LOG = "log.jsonl"  # of each run, in its folder
_LONG = 10  # lines of a message, such as a network's modules or all options


class _Console(logging.Handler):
    """Writes lines to stderr, above a progress bar; what is long goes into the file alone."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno > logging.INFO or text.count("\n") < _LONG:
            tqdm.write(text, file=sys.stderr)


class _File(logging.FileHandler):
    """Writes lines to a file; a failure, such as a full disk, becomes a warning."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        tqdm.write(f"the log {self.baseFilename} cannot be written: {error}", file=sys.stderr)


def readable(value: Any) -> Any:
    """Return what JSON can hold: it knows neither infinity nor NaN."""
    if isinstance(value, Mapping):
        return {str(key): readable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [readable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class RunLog:
    """BasicSR's logger as the logs of a run inside a `with` block; at its end it is as it was.

    On a process that is not the main one it only prints errors. What is logged before `open` is
    kept, and shown then: a run that cannot start says why, and nothing else. `tensorboard` is its
    writer, None where it is not used.
    """

    def __init__(self, processes: Processes) -> None:
        self.tensorboard: Any = None
        self._is_main = processes.is_main
        self._kept = MemoryHandler(sys.maxsize, sys.maxsize, flushOnClose=False)
        self._json_lines: Path | None = None
        self._waiting: list[str] = []
        self._logger = logger = logging.getLogger(_NAME)
        self.info, self.warning = logger.info, logger.warning

    def __enter__(self) -> "RunLog":
        logger = self._logger
        self._before = logger.handlers[:], logger.level, logger.propagate, dict(initialized_logger)
        logger.handlers[:] = [self._kept]
        logger.setLevel(logging.INFO if self._is_main else logging.ERROR)
        logger.propagate = False
        initialized_logger[_NAME] = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        for handler in self._logger.handlers:
            handler.close()
        *settings, initialized = self._before
        self._logger.handlers[:], self._logger.level, self._logger.propagate = settings
        initialized_logger.clear()
        initialized_logger.update(initialized)

    def open(self, folder: Path, text_log: str, first: Sequence[str] = ()) -> None:
        """Write to the console and `text_log` in the run's folder, `first` and what was kept."""
        handlers: list[logging.Handler] = [_Console()]
        if self._is_main:
            handlers.append(_File(folder / text_log, "w", encoding="utf-8"))
            self._json_lines = folder / LOG
        for handler in handlers:
            handler.setFormatter(_FORMAT)
        self._logger.handlers[:] = handlers
        for line in first:
            self.info(line)
        for record in self._kept.buffer:
            self._logger.handle(record)
        self._write()

    def record(self, event: str, **values: Any) -> None:  # free-form by nature
        """Append a JSON line: time, event and values."""
        if not self._is_main:
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        content = {"time": now, "event": event, **readable(values)}
        self._waiting.append(json.dumps(content, ensure_ascii=False))
        self._write()

    def _write(self) -> None:
        if self._json_lines is None:
            return
        lines, self._waiting = self._waiting, []
        try:
            with self._json_lines.open("ab+") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a full disk or a kill cut this line short
                        file.write(b"\n")
                file.write("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:  # a checkpoint that cannot be written ends the run, not its log
            self.warning(f"{self._json_lines} cannot be written: {error}")

    def start_trackers(self, opt: dict[str, Any], first: int) -> None:
        """Start wandb and TensorBoard as the options ask; what is missing is one warning.

        TensorBoard's entries from the iteration `first`, the next one, are replaced.
        """
        wanted = opt["logger"]
        if not self._is_main or "debug" in opt["name"]:
            return
        wandb = (wanted.get("wandb") or {}).get("project") is not None
        asked = ["tensorboard"] * bool(wanted.get("use_tb_logger") or wandb) + ["wandb"] * wandb
        if missing := [name for name in asked if find_spec(name) is None]:
            self.warning(
                f"{' and '.join(missing)} asked for in `logger` and not installed (pip install "
                f"{' '.join(missing)}); the run continues without, log.jsonl in its folder has the "
                "same"
            )
        if wandb and "wandb" not in missing:
            self._start_wandb(opt, **wanted["wandb"])  # before TensorBoard's, which it follows
        if asked and "tensorboard" not in missing:
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(opt["root_path"]) / "tb_logger" / opt["name"]
            self.tensorboard = SummaryWriter(str(folder), purge_step=first)

    def _start_wandb(
        self, opt: Mapping[str, Any], project: str, resume_id: str | None = None
    ) -> None:
        """Start wandb as BasicSR does, whose function calls what current wandb no longer has."""
        import wandb

        try:
            wandb.init(
                project=project,
                name=opt["name"],
                id=resume_id,
                resume="allow" if resume_id else "never",
                config=opt["as_given"],
                sync_tensorboard=True,
            )
        except Exception as error:  # such as one who is not logged in
            self.warning(f"wandb does not start ({error}); the run continues without")

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Write figures to TensorBoard, where it is used."""
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, iteration)


class Pace:
    """How fast a training goes, from iteration `start` of `total`, with `samples` an iteration.

    Its user adds seconds: to `waited` for samples, to `paused` for validations and saves.
    """

    def __init__(self, start: int, total: int, samples: int) -> None:
        self._start = self._last = start
        self._total, self._samples = total, samples
        self._began = self._since = time.perf_counter()
        self.waited = self.paused = 0.0

    def take(self, iteration: int) -> dict[str, float]:
        """Return what an iteration took since the last call, and the seconds left for the run."""
        now, count = time.perf_counter(), max(1, iteration - self._last)
        each = max(1e-9, (now - self._since - self.paused) / count)
        overall = (now - self._began) / max(1, iteration - self._start)
        found = {
            "time": each,
            "data_time": self.waited / count,
            "samples_per_second": self._samples / each,
            "eta": overall * (self._total - iteration),
        }
        self._since, self._last, self.waited, self.paused = now, iteration, 0.0, 0.0
        return found


def training_line(name: str, found: Mapping[str, Any]) -> str:
    """Format an iteration's record as BasicSR's line, with pace and GPU memory added."""
    rates = "".join(f"{rate:.3e}," for rate in found["lr"])
    eta, memory = datetime.timedelta(seconds=int(found["eta"])), ""
    if torch.cuda.is_available():
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return (
        f"[{name[:5]}..][epoch:{found['epoch']:3d}, iter:{found['iter']:8,d}, lr:({rates})] "
        f"[eta: {eta}, time (data): {found['time']:.3f} ({found['data_time']:.3f}), "
        f"{found['samples_per_second']:.1f} samples/s{memory}] "
        + "".join(f"{key}: {value:.4e} " for key, value in found["losses"].items())
    )
