"""One function over many items in several processes, results in order."""

import errno
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import islice
from multiprocessing.context import BaseContext
from typing import TypeVar

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import OPEN_FILES
from dlgsanet_arch.progress import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Results wait for their turn in memory: no more than this many a worker.
AHEAD = 2
# The modules whose functions run in workers; the server that forks them is started once.
PRELOADED = [f"dlgsanet_arch.data.{name}" for name in ("benchmark", "training_sets", "verify")]
# Fewer than this many items a process are done before another process has started.
ITEMS_A_WORKER = 8


def usable_cores() -> int:
    """How many cores this process may run on."""
    has_affinity = hasattr(os, "sched_getaffinity")  # on Linux alone
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


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
    """How processes that run a function start: forked off one that has imported what they need.

    Forking this process would not do: threads, as those of OpenCV, do not survive a fork.
    """
    if not sys.platform.startswith("linux"):  # Windows has no forks, macOS none that are safe
        return multiprocessing.get_context("spawn")
    module = getattr(function, "func", function).__module__
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, module])
    # Ctrl-C reaches all processes of a terminal; only this one is to answer.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _cause_of_death(exit_codes: Iterable[int | None], workers: int) -> str:
    """Say how a worker ended: the others are sent SIGTERM when one has died."""
    codes = [code for code in exit_codes if code not in (None, 0, -signal.SIGTERM)]
    if -signal.SIGKILL in codes:
        how = "it was killed (SIGKILL), most likely because memory ran out"
        return f"{how}: run again with fewer than --workers {workers}"
    if codes and codes[0] < 0:
        return f"{signal.Signals(-codes[0]).name}: a library crashed, most likely on a damaged file"
    return f"it ended with exit status {codes[0] if codes else 'unknown'}"


def _by_processes(
    function: Callable[[Item], Result], remaining: Iterator[Item], workers: int
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers, process_context(function), _begin_worker)
    try:
        pending.extend(pool.submit(function, item) for item in islice(remaining, AHEAD * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
            yield result
    except BrokenProcessPool as error:
        processes = [*(pool._processes or {}).values()]  # no public way to their exit codes
        pool.shutdown(wait=True, cancel_futures=True)
        cause = _cause_of_death((each.exitcode for each in processes), workers)
        raise UserError(f"a worker process died, {cause}; finished work is kept") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    isolated: bool = False,
) -> Iterator[Result]:
    """Apply a function to items in worker processes, and yield the results in the items' order.

    `function` is importable by name, or a `functools.partial` of such a function; what it raises is
    raised here, at its item's turn. At most ``AHEAD * workers`` items are in flight, so memory does
    not grow with their number. With one worker or none the function runs in this process, unless
    it is `isolated`, because what it reads may crash it. UserError if memory ran out or a worker
    died.
    """
    workers, remaining = max(1, workers), iter(items)
    try:
        if workers == 1 and not isolated:
            yield from map(function, remaining)
        else:
            yield from _by_processes(function, remaining, workers)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise UserError(f"{OPEN_FILES}, or use --workers 1") from error
    except MemoryError as error:
        raise UserError(
            f"memory ran out with --workers {workers}: run again with fewer, or with more "
            "memory; finished work is kept"
        ) from error


def with_progress(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    what: str,
    *,
    isolated: bool = False,
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result as `ordered` does, with a progress bar.

    Processes are started only where they have enough to do.
    """
    workers = min(workers, len(items) // ITEMS_A_WORKER)
    results = ordered(function, items, workers, isolated=isolated)
    with progress_bar(what, len(items), "images") as bar, closing(results):
        for item, result in zip(items, results, strict=True):
            yield item, result
            bar.update()
