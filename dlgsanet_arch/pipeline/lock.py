"""One run of a name at a time, on one machine or on several that share a file system.

The lock is a file beside the run's folder, because a new run renames an old folder. The kernel
releases it when the process ends, however it ends. The file names its holder, for messages; a run
that ends empties it.
"""

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


def _lock(file: IO[bytes]) -> None:
    """Take the kernel's lock, or raise an OSError.

    `lockf` and not `flock`, which forked workers inherit: those that outlive a killed run by some
    seconds would hold its lock.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def one_run(path: Path, what: str) -> Iterator[str]:
    """Exclude other processes from a run inside the block.

    Where files cannot be locked, a file that names a holder counts as locked until somebody
    deletes it.

    Args:
        path: The lock's file; its folder is created.
        what: What is locked, for the message: "the run NAME".

    Yields:
        A warning, or "". The last holder was on another host and did not empty the file: it was
        killed, or it still works and the file system does not share locks between hosts.

    Raises:
        LockedError: Another process is working on the run; its pid and host are named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    try:
        opened = path.open("a+b", buffering=0)
    except OSError as error:
        raise LockedError(
            f"the lock {path} cannot be opened ({error.strerror}); remove it, or choose another "
            "`name`"
        ) from error
    with opened as file:
        failure = None
        try:
            _lock(file)
        except OSError as error:
            failure = error
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
        warning = ""
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
