"""One run of a name at a time, on one machine or on several that share a file system."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dlgsanet_arch.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class LockedError(UserError):
    """Another process is working on the run."""


def _lock(file: IO[bytes]) -> OSError | None:
    """Take the kernel's lock, or return why it cannot be taken."""
    if fcntl is None:
        return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        # Not `flock`: workers that outlive a killed run by some seconds would hold its lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


@contextmanager
def one_run(path: Path, what: str) -> Iterator[str]:
    """Exclude other processes from a run inside the block.

    The kernel releases the lock of a process that ends, however it ends. The file names its holder,
    for messages. Where files cannot be locked, a file that names one counts as locked.

    Args:
        path: The lock's file, outside the run's folder, which a new run renames.
        what: What is locked, for the message: "the run NAME".

    Yields:
        A warning where the last holder was on another host and did not empty the file, else "": it
        was killed, or it still works and the file system does not share locks between hosts.

    Raises:
        LockedError: Another process is working on the run; its pid and host are named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host, warning = socket.gethostname(), ""
    try:
        opened = path.open("a+b", buffering=0)
    except OSError as error:
        raise LockedError(
            f"the lock {path} cannot be opened ({error.strerror}); remove it, or choose another "
            "`name`"
        ) from error
    with opened as file:
        failure = _lock(file)
        file.seek(0)
        holder = file.read().decode(errors="replace")
        if isinstance(failure, (BlockingIOError, PermissionError)):
            raise LockedError(
                f"{what} is being worked on by {holder or 'another process'}; wait until it ends, "
                "stop it, or choose another `name`"
            )
        if failure and holder:
            raise LockedError(
                f"{what} is being worked on by {holder}, or was when that was killed: files cannot "
                f"be locked here ({failure.strerror}); if it has ended, delete {path}"
            )
        if holder and not holder.endswith(f" on {host}"):
            warning = (
                f"{what} was last held by {holder}, which did not end properly: if it still runs, "
                "stop it (some file systems do not share locks between hosts)"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {host}".encode())
        try:
            yield warning
        finally:
            file.truncate(0)
