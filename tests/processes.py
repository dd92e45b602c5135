"""Processes to be killed, forked as worker processes are: without seconds of imports."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from dlgsanet_arch.data.workers import process_context


@contextmanager
def started(function: Callable, *arguments: object) -> Iterator[BaseProcess]:
    """Run a function in a process of its own; at the end of the block it is killed by SIGKILL."""
    process = process_context(function).Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def imported_of(names):
    """Return which of these modules this process has imported."""
    return [name for name in names if name in sys.modules]
