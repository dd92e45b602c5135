import errno
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import started

from dlgsanet_arch.data import workers as workers_module
from dlgsanet_arch.data.workers import AHEAD, ITEMS_A_WORKER, ordered, with_progress
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named


def work_for_minutes(begun: Path) -> None:
    for _ in ordered(time.sleep, [0] + [60] * 10, 2):
        begun.touch()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_an_error_at_its_turn(workers):
    taken = []

    def items():
        for item in [9.0, 4.0, 1.0, 0.0, 16.0, -1.0, *range(100)]:
            taken.append(item)
            yield item

    results = ordered(math.sqrt, items(), workers)
    assert [next(results) for _ in range(5)] == [3, 2, 1, 0, 4]
    assert len(taken) <= 5 + workers * AHEAD
    with pytest.raises(ValueError, match=r"math domain error|expected a nonnegative input"):
        next(results)


def die_by(number: int) -> None:
    os.kill(os.getpid(), number)


def run_out_of_memory(number: int) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("function", "item", "said"),
    [
        (os._exit, 3, "a worker process died, it ended with exit status 3"),
        (die_by, signal.SIGKILL, "SIGKILL.*memory ran out: run again with fewer than --workers 2"),
        (die_by, signal.SIGBUS, "SIGBUS: a library crashed, most likely on a damaged file"),
        (run_out_of_memory, 0, "memory ran out with --workers 2: run again with fewer"),
    ],
)
def test_how_a_worker_ended_is_said(function, item, said):
    with pytest.raises(UserError, match=said):
        list(ordered(function, [item, item, item], 2))


def test_a_process_is_started_for_one_worker_where_it_may_crash():
    assert list(ordered(os.getppid, [], 1, isolated=True)) == []
    with pytest.raises(UserError, match="SIGSEGV"):
        list(ordered(die_by, [signal.SIGSEGV], 1, isolated=True))


def test_few_items_start_no_process(monkeypatch):
    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", None)
    items = list(range(2 * ITEMS_A_WORKER - 1))
    assert [result for _, result in with_progress(math.sqrt, items, 8, "")] == [
        *map(math.sqrt, items)
    ]
    with pytest.raises(TypeError, match="not callable"):
        list(with_progress(math.sqrt, [*items, 1], 8, ""))


def status(pid: int | str) -> list[str]:
    """State and parent of a process, empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(parent: int | str) -> list[str]:
    numbers = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    children = [pid for pid in numbers if status(pid)[1:] == [str(parent)]]
    return children + [pid for child in children for pid in descendants(child)]


def alive(pid: str) -> bool:
    return status(pid)[:1] not in ([], ["Z"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are read from /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    with started(work_for_minutes, tmp_path / "begun") as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # the server that forks workers, two of them, and what Python starts for its own needs
        workers = descendants(process.pid)
        assert len(workers) >= 3
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def _without_files(_: int) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def test_the_limit_of_open_files_is_named():
    with pytest.raises(UserError, match="ulimit -n 1024`, or use --workers 1"):
        list(ordered(_without_files, [1], 1))
    with (
        pytest.raises(UserError, match="x cannot be written: too many files are open"),
        disk_faults_named("x cannot be written"),
    ):
        _without_files(1)
