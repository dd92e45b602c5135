import math
import os
import sys
import time
from pathlib import Path

import pytest
from processes import started

from dlgsanet_arch.data.workers import AHEAD, ordered
from dlgsanet_arch.errors import UserError


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


def test_a_dead_worker_is_reported():
    with pytest.raises(UserError, match=r"worker process died.*fewer than --workers 2"):
        list(ordered(os._exit, [1, 1, 1], 2))


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
