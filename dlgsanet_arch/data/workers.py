"""One function over many items in several processes, results in order."""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.context import BaseContext
from typing import TypeVar

from dlgsanet_arch.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Results wait for their turn in memory: no more than this many a worker.
AHEAD = 2


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin_worker() -> None:
    """Set up a worker process: one thread, deaf to Ctrl-C, gone when its parent is."""
    import cv2

    cv2.setNumThreads(0)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    # The parent hears of the interrupt too, and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    # After kill -9 of the parent a worker would wait for its next task forever.
    threading.Thread(target=follow, daemon=True).start()


def process_context(function: Callable) -> BaseContext:
    """How worker processes start: forked off one process that has imported what they need.

    That import takes place once instead of once a worker. Forking this process would not do:
    threads, as those of OpenCV and PyTorch, do not survive a fork.

    Args:
        function: What the workers are to run.
    """
    if not sys.platform.startswith("linux"):  # Windows has no forks, macOS none that are safe
        return multiprocessing.get_context("spawn")
    module = getattr(function, "func", function).__module__
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module])
    # Ctrl-C reaches all processes of a terminal; only this one is to answer.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Apply a function to items in worker processes, and yield the results in the items' order.

    At most ``AHEAD * workers`` items are in flight, so memory does not grow with their number.
    With one worker or less nothing is started and the function runs in this process.

    Args:
        function: Importable by name, or a `functools.partial` of such a function; what it raises
            is raised here, at its item's turn.
        items: Anything that can be pickled, as can the results.
        workers: Number of processes.

    Raises:
        UserError: A worker died, for example because memory ran out.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    pending: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers, process_context(function), _begin_worker)
    try:
        pending.extend(pool.submit(function, item) for item in islice(remaining, AHEAD * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
            yield result
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most likely because memory ran out: "
            f"run again with fewer than --workers {workers}; finished work is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
