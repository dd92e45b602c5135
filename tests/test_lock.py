import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline.lock import LockedError, one_run

HOLD = """
import sys, time, os
from pathlib import Path
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline.lock import one_run
with one_run(Path(sys.argv[1]), "the run small"):
    child = os.fork()  # like a loader's worker, which outlives its parent for a while
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_killed_though_its_workers_live(tmp_path):
    path = tmp_path / "experiments" / ".small.lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        before = path.read_text()
        message = rf"the run small is .* process {process.pid} on {socket.gethostname()}; wait"
        with pytest.raises(LockedError, match=message), one_run(path, "the run small"):
            pass
        assert path.read_text() == before
        process.kill()
        process.wait()
        with one_run(path, "the run small") as warning:
            assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        os.kill(worker, signal.SIGKILL)
    assert not warning
    assert not path.read_text()


def test_a_holder_on_another_host_that_did_not_end_properly_is_warned_of(tmp_path):
    path = tmp_path / ".small.lock"
    path.write_text("process 1 on elsewhere")
    with one_run(path, "the run small") as warning:
        pass
    assert "the run small was last held by process 1 on elsewhere" in warning
    with one_run(path, "the run small") as warning:
        pass
    assert not warning


def test_a_lock_that_cannot_be_opened_is_named(tmp_path):
    path = tmp_path / ".small.lock"
    path.mkdir()
    with pytest.raises(UserError, match=r"small\.lock cannot be opened"), one_run(path, "a run"):
        pass


def test_where_files_cannot_be_locked_a_named_holder_counts_until_the_file_is_deleted(
    tmp_path, monkeypatch
):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    path = tmp_path / ".small.lock"
    with one_run(path, "the run small"):
        message = f"process {os.getpid()} on .*No locks available.*delete {path}"
        with pytest.raises(LockedError, match=message), one_run(path, "the run small"):
            pass
    with one_run(path, "the run small"):
        path.unlink()
        with one_run(path, "the run small"):
            pass
