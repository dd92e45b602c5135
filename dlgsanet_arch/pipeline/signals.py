"""Signals that ask a run to end: it finishes the iteration, saves, and says how to continue."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dlgsanet_arch.errors import Interrupted

# Ctrl-C; what kill and Slurm's pre-emption send; what `sbatch --signal` sends ahead of the limit.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Whether a signal has asked this process to end; `signal` is its number, else 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._at_once = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; the second Ctrl-C does not wait any longer."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self._at_once:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """Return what to raise: exit status 130 after Ctrl-C, 143 after any other signal."""
        name = signal.Signals(self.signal).name
        return Interrupted(f"stopped by {name}", 130 if self.signal == signal.SIGINT else 143)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block by `Interrupted`: for work that can be done again."""
        if self.signal:
            raise self.interrupted()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Collect the signals of the block; outside the main thread there are none to collect."""
    request, before = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
