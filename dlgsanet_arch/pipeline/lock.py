"""One run of a name at a time, on one machine or on several that share a file system."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named

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
    """Exclude other processes from a run (`what`) inside the block; a LockedError names the holder.

    The kernel releases the lock of a process that ends, however it ends. The file `path`, outside
    the run's folder, names its holder; where files cannot be locked, one that names a holder counts
    as locked. Yields a warning if the last holder was on another host and did not end properly: it
    was killed, or the file system does not share locks between hosts and it still works. Else "".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host, warning = socket.gethostname(), ""
    with disk_faults_named(f"the lock {path} cannot be opened"):
        opened = path.open("a+b", buffering=0)
    with opened as file:
        failure = _lock(file)
        file.seek(0)
        holder = file.read().decode(errors="replace")
        is_held = isinstance(failure, BlockingIOError | PermissionError)
        if is_held or (failure and holder):
            unsure = "" if is_held else f" ({failure.strerror}: if that has ended, delete {path})"
            raise LockedError(
                f"{what} is being worked on by {holder or 'another process'}{unsure}; wait until "
                "it ends, stop it, or choose another `name`"
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
