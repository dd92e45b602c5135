import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from dlgsanet_arch.errors import Interrupted
from dlgsanet_arch.pipeline.signals import stop_on_signals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_a_signal_is_noted_and_ends_with_its_status(number, status):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.signal
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert stop.interrupted().status == status
        assert number.name in str(stop.interrupted())
    assert signal.getsignal(number) is before


def send(number: int) -> None:
    """Send this process a signal; nothing that handles errors may take it for one."""
    try:
        os.kill(os.getpid(), number)
    except Exception:
        pytest.fail("taken for an error")


def test_a_second_ctrl_c_does_not_wait():
    with stop_on_signals():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    with stop_on_signals() as stop:  # schedulers send theirs twice
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


def test_work_that_can_be_done_again_ends_at_once():
    with stop_on_signals() as stop:
        with pytest.raises(Interrupted), stop.at_once():
            send(signal.SIGTERM)
        with pytest.raises(Interrupted), stop.at_once():  # asked for before it began
            pytest.fail("the block ran")


def test_other_threads_have_no_signals():
    with ThreadPoolExecutor(1) as other, other.submit(stop_on_signals).result() as stop:
        assert stop.signal == 0
