"""How everything here is measured: cells that take turns, in processes of their own.

A cell is one thing to measure, as a dictionary that JSON can hold; its entry `measure` names the
function, as "module:function", that measures it, and an entry `threads` says in how many threads
PyTorch works. On a CPU each cell runs in a process of its own, so that its peak memory is its own;
on a GPU, where memory is counted exactly, the cells of a group share one. All cells are measured
once a round, so that a change in the machine's load meets all. What is measured is saved at once,
and a run that was cut off is resumed.
"""

import argparse
import atexit
import ctypes
import functools
import gc
import importlib
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import reporting
import torch

Cell = dict[str, Any]
Record = dict[str, Any]  # {"cell": ..., "rounds": ..., and what was measured}
Run = Callable[[], object]

MIB = 2**20
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
WARM_UPS = {"cpu": 1, "cuda": 3}
ROUNDS = 2
RUNS = {"cpu": 3, "cuda": 10}
# A GPU's sample is as many calls as take this long, so that neither the clock nor the one wait
# at its end tells.
GPU_SAMPLE_SECONDS = 0.02
# How a child starts: importing all that is measured takes seconds, and CUDA cannot be forked.
_START = {"cpu": "forkserver", "cuda": "spawn"}


@dataclass(frozen=True)
class Setting:
    """How a cell is measured."""

    device: str  # cpu or cuda
    runs: int  # timed samples a process
    seconds: float = math.inf  # no sample is begun after this time, but for the first


@dataclass
class Section:
    """One table of RESULTS.md.

    Rows and notes are made of the records so far, in the cells' order, and rows that are too short
    are filled with dashes. The machine's limits have no rows but in their own section.
    """

    name: str  # a key of reporting.SECTIONS
    title: str  # without the device
    cells: list[Cell]
    columns: str  # as in Markdown: "network | input | ms"
    rows: Callable[[Record, list[Record]], list[list[str]]]  # of one record among all
    notes: Callable[[list[Record]], list[str]]  # sentences above the table
    group: Callable[[Cell], object] = lambda cell: cell["measure"]  # in one process on a GPU
    draw: Callable[[list[Record], Path], bool] | None = None  # a plot; returns whether it could
    rounds: int = ROUNDS  # times that each cell is measured
    runs: int | None = None  # timed samples a round, if not RUNS
    seconds: float = math.inf  # as in Setting
    options: Sequence[str] = ()  # of the command line beyond the section's own


@contextmanager
def numerics(dtype: str, device: str) -> Iterator[None]:
    """Let float32 products on a GPU use TF32 for "tf32" alone, and cuDNN choose by trying."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    trying = torch.backends.cudnn.benchmark
    try:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        torch.backends.cudnn.benchmark = device == "cuda"
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
        torch.backends.cudnn.benchmark = trying


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` threads, or None for as many as it would."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def synchronize(device: str) -> None:
    """Wait for all work given to `device`."""
    if device == "cuda":
        torch.cuda.synchronize()


def _of_process(name: str) -> int:
    """Read a memory figure of this process, in bytes.

    VmRSS is the present, VmHWM the peak, RssFile what of the present is pages of files.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class Memory:
    """Peak memory from now on, beyond what is in use now, in bytes.

    On a CPU the libraries' own pages, which come in when their code is first used, are left out.
    On a GPU it is that of PyTorch's allocator, through which all contestants take theirs.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:  # else freed memory that the C library keeps would hide later use
                trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._before = _of_process("VmRSS") - _of_process("RssFile")

    def forget_peak(self) -> None:
        """Leave out what a GPU needed so far: cuDNN's trials are no part of the work."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int]:
        """Return `memory`, beyond what was in use, and `total_memory` with it."""
        if self._device == "cuda":
            total, code = torch.cuda.max_memory_allocated(), 0
        else:
            total, code = _of_process("VmHWM"), _of_process("RssFile")
        return {"memory": total - code - self._before, "total_memory": total}


def sample(run: Run, setting: Setting) -> list[float]:
    """Time `run`, in seconds a call."""
    calls = 1
    if setting.device == "cuda":
        synchronize("cuda")
        start = time.perf_counter()
        run()
        synchronize("cuda")
        calls = max(1, math.ceil(GPU_SAMPLE_SECONDS / (time.perf_counter() - start)))
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < setting.runs:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(setting.device)
        seconds.append((time.perf_counter() - start) / calls)
        if time.perf_counter() - begin > setting.seconds:
            break
    return seconds


def measure(prepare: Callable[[], Run], setting: Setting, warm_ups: int | None = None) -> Record:
    """Measure the time and the memory of what `prepare` returns.

    What is in use when this is called (weights, inputs) is not counted as memory; what `prepare`
    and the warm-up take and keep is.
    """
    memory = Memory(setting.device)
    run = prepare()
    for _ in range(WARM_UPS[setting.device] if warm_ups is None else warm_ups):
        run()
    memory.forget_peak()
    return {"seconds": sample(run, setting), **memory.peak()}


@functools.cache
def _module(name: str) -> ModuleType:
    module = importlib.import_module(name)
    # Else each collection walks through all of the libraries, for a fifth of a second.
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries count on it when they say what has leaked
    return module


def _attempt(cell: Cell, setting: Setting) -> Record:
    module, function = cell["measure"].split(":")
    try:
        with threads(cell.get("threads")):
            return getattr(_module(module), function)(cell, setting)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200], "broken": True}
    finally:
        gc.collect()
        if setting.device == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def answer(cells: list[Cell], setting: Setting, replies: Connection) -> None:
    """Measure `cells` in a child of `take_turns`."""
    for cell in cells:
        reply = _attempt(cell, setting)
        replies.send(reply)
        if "broken" in reply:
            return  # a GPU may be unusable after it; the others get a new process


def in_child(cells: list[Cell], setting: Setting) -> Iterator[Record]:
    """Measure `cells` in a new process; fewer replies than cells say that it ended early."""
    context = multiprocessing.get_context(_START[setting.device])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(cells, setting, sender))
    # Python's server of forks looks for what it is to import here alone.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        child.start()
    sender.close()
    try:
        with suppress(EOFError):
            while True:
                yield receiver.recv()
    finally:
        child.join(10)
        if child.is_alive():
            child.terminate()
        child.join()


def in_this_process(cells: list[Cell], setting: Setting) -> Iterator[Record]:
    """Measure `cells` here."""
    for cell in cells:
        yield _attempt(cell, setting)


def is_limit(record: Record) -> bool:
    """Return whether a record is of the machine and not of a contestant."""
    return record["cell"]["measure"].startswith("limits:")


def key(cell: Cell) -> str:
    """Return a text that tells cells apart."""
    return ", ".join(f"{name} {value}" for name, value in cell.items())


@dataclass
class Report:
    """What is measured of a section so far, by the cells' keys, saved with each addition."""

    section: Section
    device: str
    results: Path
    records: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = f"{self.section.name}_{reporting.label(self.device)}"
        section = self.section
        self._head = reporting.head(section.name, self.device, section.title, section.options)
        stored = reporting.read(self.results / f"{self.name}.json")
        known = stored.get("environment", {})
        words = ("source", "device", "CPU kernels")
        same = all(known.get(word) == self._head["environment"].get(word) for word in words)
        if same and not stored["complete"]:
            self.records = stored["raw"]

    def rounds(self, cell: Cell) -> int:
        """Return how often `cell` was measured."""
        return self.records.get(key(cell), {"rounds": 0})["rounds"]

    def add(self, cell: Cell, reply: Record) -> None:
        """Take in one more round of `cell`."""
        record = self.records.setdefault(key(cell), {"cell": cell, "rounds": 0})
        record["rounds"] += 1
        if "seconds" in reply:
            reply["seconds"] = record.get("seconds", []) + reply["seconds"]
        for name in ("memory", "total_memory"):
            if name in reply and name in record:
                reply[name] = max(reply[name], record[name])
        record |= reply
        self.save()

    def ordered(self) -> list[Record]:
        """Return the records in the order of the section's cells."""
        keys = map(key, self.section.cells)
        return [self.records[each] for each in keys if each in self.records]

    def complete(self) -> bool:
        """Return whether each cell was measured in each round."""
        return all(self.rounds(cell) >= self.section.rounds for cell in self.section.cells)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns and the rows."""
        columns, records = self.section.columns.split(" | "), self.ordered()
        shown = [r for r in records if self.section.name == "limits" or not is_limit(r)]
        rows = [row for record in shown for row in self.section.rows(record, records)]
        return columns, [row + ["–"] * (len(columns) - len(row)) for row in rows]

    def save(self) -> Path:
        """Write what there is, and the plot when all is there."""
        records = self.ordered()
        columns, rows = self.table()
        notes = self.section.notes(records)
        picture = None
        if self.section.draw and self.complete():
            picture = f"{self.name}.png"
            if not self.section.draw(records, self.results / picture):
                picture = None
                notes.append("No plot was drawn: matplotlib is not installed.")
        result = {
            **self._head,
            "complete": self.complete(),
            "notes": notes,
            "columns": columns,
            "rows": rows,
            "picture": picture,
            "raw": self.records,
        }
        return reporting.save(self.name, result, self.results)


def take_turns(
    report: Report, setting: Setting, launch: Callable[[list[Cell], Setting], Iterator[Record]]
) -> None:
    """Measure what `report` lacks, round by round."""
    section = report.section
    modules = {cell["measure"].split(":")[0] for cell in section.cells}
    multiprocessing.set_forkserver_preload(sorted(modules))
    groups: dict[object, list[Cell]] = {}
    for cell in section.cells:
        together = section.group(cell) if setting.device == "cuda" else key(cell)
        groups.setdefault(together, []).append(cell)
    for turn in range(section.rounds):
        for group in groups.values():
            waiting = [cell for cell in group if report.rounds(cell) <= turn]
            while waiting:
                before = len(waiting)
                for reply in launch(list(waiting), setting):
                    cell = waiting.pop(0)
                    report.add(cell, reply)
                    print(
                        f"round {turn + 1} of {section.rounds}: {describe(cell)}, ms: "
                        f"{milliseconds(reply)[0]}",
                        file=sys.stderr,
                        flush=True,
                    )
                if len(waiting) == before:
                    report.add(waiting.pop(0), {"error": "its process died", "broken": True})


def describe(cell: Cell) -> str:
    """Return a cell in a few words, for progress."""
    return " ".join(str(value) for name, value in cell.items() if name != "measure")


def milliseconds(record: Record) -> list[str]:
    """Return the median and the range of a record's times for a table, or what went wrong."""
    if "seconds" not in record:
        return [record.get("error", "–"), "–"]
    times = sorted(1e3 * each for each in record["seconds"])
    return [f"{statistics.median(times):.4g}", f"{times[0]:.4g} to {times[-1]:.4g}"]


def mebibytes(record: Record, name: str = "memory") -> str:
    """Return a record's peak memory for a table."""
    return f"{record[name] / MIB:.0f}" if record.get(name) is not None else "–"


def median(record: Record | None) -> float:
    """Return a record's median time in seconds; NaN where it has none."""
    return statistics.median(record["seconds"]) if record and "seconds" in record else math.nan


def median_of(records: list[Record], cell: Cell) -> float:
    """Return the median time of a cell; NaN where it has none."""
    return median(next((record for record in records if record["cell"] == cell), None))


def times(value: float, digits: str = ".2f") -> str:
    """Return a ratio for a table; a dash where it is unknown."""
    return format(value, digits) if math.isfinite(value) else "–"


def gate_fault(device: str, results: Path = reporting.RESULTS) -> str:
    """Return which test of network and operators fails, or an empty text.

    On a GPU the outcome that `make gpu` stored is used if it is of this code.
    """
    if device == "cuda":
        stored = reporting.gate_fault(device, results)
        if stored is not None:
            return stored
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header"]
    command += [f"tests/{name}.py" for name in reporting.GATE]
    command += ["-m", "gpu" if device == "cuda" else "not gpu"]
    finished = subprocess.run(command, cwd=reporting.ROOT, capture_output=True, text=True)
    return finished.stdout + finished.stderr if finished.returncode else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a script what all have in common."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, help="times that each thing is measured")
    parser.add_argument("--runs", type=int, help="timed runs each time")
    parser.add_argument(
        "--results", type=Path, help="folder of the JSON; RESULTS.md is written beside it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="made-up sizes in one process, to test this script"
    )


def run(
    sections: Callable[[argparse.Namespace], list[Section]],
    parser: argparse.ArgumentParser,
    arguments: list[str] | None = None,
) -> int:
    """Measure the sections that the command line asks for, print the tables and save them.

    The status is 1 where something could not be measured for a reason other than memory.
    """
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    results = asked.results or reporting.RESULTS
    if asked.quick:
        if asked.results is None:
            results = Path(tempfile.mkdtemp(prefix="quick-")) / "results"
    else:
        fault = gate_fault(asked.device, results)
        if fault:
            print(f"{fault}\nnothing is measured while tests fail", file=sys.stderr)
            return 1
    broken = False
    for section in sections(asked):
        section.rounds = 1 if asked.quick else asked.rounds or section.rounds
        runs = 1 if asked.quick else asked.runs or section.runs or RUNS[asked.device]
        report = Report(section, asked.device, results)
        setting = Setting(asked.device, runs, section.seconds)
        try:
            take_turns(report, setting, in_this_process if asked.quick else in_child)
        except KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr)
            return 130
        path = report.save()
        columns, rows = report.table()
        for row in [columns, *rows]:
            print("  ".join(f"{value:>14}" for value in row))
        print(f"written: {path}, {results.parent / 'RESULTS.md'}")
        broken |= any("broken" in record for record in report.records.values())
    return int(broken)
