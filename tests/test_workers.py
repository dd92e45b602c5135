import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlgsanet_arch.data.workers import AHEAD, ordered
from dlgsanet_arch.errors import UserError

SCRIPT = """
import time
from dlgsanet_arch.data.workers import ordered

if __name__ == "__main__":
    for _ in ordered(time.sleep, [0] + [60] * 10, 2):
        print("begun", flush=True)
"""


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
def test_workers_end_with_a_killed_parent(tmp_path, repository):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        # the server that forks them, two workers, and the module's own tracker
        workers = descendants(process.pid)
        assert len(workers) >= 4
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
