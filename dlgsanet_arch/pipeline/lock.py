"""One run of a name at a time, on one machine or on several that share a file system.

The lock is a file beside the run's folder, since a new run renames an old folder. On one machine
the kernel holds it, and lets go when the process dies in whatever way. Where the holder was on
another machine, which may be lost, what tells is whether it still touches the file.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dlgsanet_arch.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_TOUCH_SECONDS = 15
# A holder on another machine that has not touched the file for so long is gone.
_STALE_SECONDS = 90


class LockedError(UserError):
    """Another process is at work on the run."""


def _refusal(what: str, path: Path, holder: dict[str, Any]) -> LockedError:
    pid, host = holder.get("pid", "unknown"), holder.get("host", "unknown")
    return LockedError(
        f"{what} is being worked on by process {pid} on {host}; wait until it ends, stop it, or "
        f"choose another `name` (if you know that it is gone, delete {path})"
    )


def _read(file: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _lock(file: int) -> bool:
    """Take the kernel's lock; False where another process has it.

    It is the kind that belongs to the process alone: a worker that outlives a killed run by some
    seconds does not hold it. Closing any descriptor of the file would lose it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks: the touched file has to do
    return True


def _opened(path: Path, what: str) -> int:
    """Open and lock the file that is at `path` then, too, and not one that was just removed."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(file):
            refusal = _refusal(what, path, _read(file))
            os.close(file)
            raise refusal
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
        os.close(file)


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    """Whether a holder on another machine still touches its file; may wait to see it happen."""
    if not holder or holder.get("host") == socket.gethostname():
        return False
    seen = path.stat().st_mtime
    until = time.monotonic() + _STALE_SECONDS - max(0.0, min(time.time() - seen, _STALE_SECONDS))
    if time.monotonic() < until:
        print(
            f"{path} is held by {holder.get('host')}; waiting up to {_STALE_SECONDS} s to see "
            "whether that run is still there",
            flush=True,
        )
    while time.monotonic() < until:
        time.sleep(min(1.0, _STALE_SECONDS))
        if path.stat().st_mtime != seen:
            return True
    return False


@contextmanager
def one_run(path: Path, what: str) -> Iterator[None]:
    """Keep every other process off a run for the length of the block.

    Args:
        path: The lock's file; its folder is made.
        what: What is locked, for the message: "the run NAME".

    Raises:
        LockedError: Another process is at work on it; pid and host are named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _opened(path, what)
    try:
        holder = _read(file)
        if _is_alive(path, holder):
            raise _refusal(what, path, holder)
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(file, 0)
        os.pwrite(file, content.encode(), 0)
        ended = threading.Event()

        def touch() -> None:
            while not ended.wait(_TOUCH_SECONDS):
                with suppress(OSError):  # a network file system may be away for a while
                    os.utime(path)

        toucher = threading.Thread(target=touch, daemon=True)
        toucher.start()
        try:
            yield
        finally:
            ended.set()
            toucher.join()
            path.unlink(missing_ok=True)
    finally:
        os.close(file)
