import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dlgsanet_arch.pipeline import lock
from dlgsanet_arch.pipeline.lock import LockedError, one_run

HOLD = """
import sys, time, os, signal
from pathlib import Path
from dlgsanet_arch.pipeline.lock import one_run
with one_run(Path(sys.argv[1]), "the run small"):
    child = os.fork()  # as a loader's worker, which lives on for a while
    if child:
        print("held", child, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_dies_though_its_workers_live(tmp_path):
    path = tmp_path / "experiments" / ".small.lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said, child = process.stdout.readline().split()
        assert said == "held"
        before = path.read_text()
        message = rf"the run small is .* process {process.pid} on {socket.gethostname()}; wait"
        with pytest.raises(LockedError, match=message), one_run(path, "the run small"):
            pass
        assert path.read_text() == before
        process.kill()
        process.wait()
        with one_run(path, "the run small"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        os.kill(int(child), signal.SIGKILL)
    assert not path.exists()


@pytest.mark.parametrize("touched", [True, False])
def test_a_holder_on_another_machine_counts_while_it_touches_the_file(
    tmp_path, monkeypatch, touched
):
    path = tmp_path / ".small.lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    monkeypatch.setattr(lock, "_STALE_SECONDS", 2.5)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if touched:
            os.utime(path, (time.time() + 5, time.time() + 5))
        real_sleep(0.3)

    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", sleep)
    if touched:
        with pytest.raises(LockedError, match="process 1 on elsewhere"), one_run(path, "the run"):
            pass
    else:
        with one_run(path, "the run"):
            assert json.loads(path.read_text())["host"] == socket.gethostname()
    assert naps


def test_a_stale_holder_on_another_machine_costs_no_wait(tmp_path, monkeypatch):
    path = tmp_path / ".small.lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    os.utime(path, (0, 0))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with one_run(path, "the run"):
        pass


def test_the_file_is_touched_while_the_lock_is_held(tmp_path, monkeypatch):
    path = tmp_path / ".small.lock"
    monkeypatch.setattr(lock, "_TOUCH_SECONDS", 0.05)
    with one_run(path, "the run"):
        os.utime(path, (0, 0))
        until = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0
