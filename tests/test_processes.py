"""How a run ends by signals, and the lock that keeps a second run of its name off."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dlgsanet_arch.errors import Interrupted, UserError
from dlgsanet_arch.pipeline.processes import LockedError, one_run, stop_on_signals


def send(number: int) -> None:
    """Send this process a signal; nothing that handles errors may take it for one."""
    try:
        os.kill(os.getpid(), number)
    except Exception:
        pytest.fail("taken for an error")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_a_signal_is_noted_and_ends_with_its_status(number, status):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.signal
        send(number)
        if number == signal.SIGINT:  # a second Ctrl-C does not wait; schedulers send theirs twice
            with pytest.raises(KeyboardInterrupt):
                send(number)
        else:
            send(number)
        assert stop.signal == number
        assert stop.interrupted().status == status
        assert number.name in str(stop.interrupted())
    assert signal.getsignal(number) is before


def test_work_that_can_be_done_again_ends_at_once():
    with stop_on_signals() as stop:
        with pytest.raises(Interrupted), stop.at_once():
            send(signal.SIGTERM)
        with pytest.raises(Interrupted), stop.at_once():  # asked for before it began
            pytest.fail("the block ran")


def test_other_threads_have_no_signals():
    with ThreadPoolExecutor(1) as other, other.submit(stop_on_signals).result() as stop:
        assert stop.signal == 0


HOLD = """
import sys, time, os
from pathlib import Path
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline.processes import one_run
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
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="cannot be opened"), one_run(path, "a run"):
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
