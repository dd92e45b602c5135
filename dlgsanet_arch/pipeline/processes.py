"""The processes of a run: one, or those of torchrun or Slurm; its lock; the signals that end it."""

import errno
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dlgsanet_arch.errors import Interrupted, UserError
from dlgsanet_arch.files import disk_faults_named

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# Ranks wait for each other over a group of its own, however long one of them validates or saves:
# a process that died is noticed by its launcher, not by this.
_PATIENCE = timedelta(days=30)
_DEFAULT_PORT = "29500"  # PyTorch's own
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # that PyTorch reads
_LAUNCHERS = {
    "pytorch": ("torchrun", _VARIABLES),
    "slurm": ("srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
}
# Ctrl-C; what kill and Slurm's pre-emption send; what `sbatch --signal` sends ahead of the limit.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class RemoteRankError(UserError):
    """Another process of the run has an error, which it reports itself."""


class LostProcessError(UserError):
    """Another process of the run does not answer any longer."""


class LockedError(UserError):
    """Another process is working on the run."""


@dataclass(frozen=True)
class Processes:
    """This process, the one of number `rank`, among the `world` processes of the run."""

    rank: int = 0
    world: int = 1
    control: Any = None  # CPU group for `gather`; None for a single process

    @property
    def distributed(self) -> bool:
        """Whether a launcher started this run, be it with one process."""
        return self.control is not None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Turn the failure of a collective in the block into a LostProcessError."""
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's have no class of their own everywhere
            said = str(error).strip()
            if not self.distributed or not re.search("onnection|imed out|NCCL", said):
                raise
            raise LostProcessError(
                f"another process of the run has ended ({said.splitlines()[0]}); its own output "
                "says why"
            ) from error

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes in the order of their ranks; each must call."""
        if self.control is None:
            return [value]
        values = [None] * self.world
        with self.answered():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, value: Any) -> Any:
        """Return the value that the main process gave; each must call."""
        return self.gather(value if self.is_main else None)[0]

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over all processes, faster than `gather`; each calls."""
        if not self.distributed:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with self.answered():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return found.tolist()

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Let an exception on one process be a RemoteRankError on the others; each must enter."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # the others wait for this process, and are to learn of it
            error = caught
        found = self.gather(error and str(error).partition("\n")[0])
        if error is not None:
            raise error
        for rank, text in enumerate(found):
            if text is not None:
                raise RemoteRankError(f"process {rank} stopped: {text}")


def _first_host(hosts: str) -> str:
    """Return the first of Slurm's hosts, whose list may be folded ("node[01-04]")."""
    if "[" not in hosts:
        return hosts.split(",")[0]
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--launcher slurm: `{' '.join(command)}` fails ({error}); set MASTER_ADDR to the name "
            "of the first node"
        ) from error
    return names.split()[0]


def _set_environment(launcher: str, dist_params: Mapping[str, Any]) -> None:
    """Set the variables that torch.distributed reads, as the launcher gives them."""
    starter, given = _LAUNCHERS[launcher]
    for ours, theirs in zip(_VARIABLES, given, strict=True):
        if theirs not in os.environ:
            raise UserError(
                f"--launcher {launcher} needs to be started by {starter}, which sets {theirs}; it "
                "is not set; for a single process leave the flag out"
            )
        os.environ[ours] = os.environ[theirs]
    if launcher == "slurm":
        port = dist_params.get("port") or os.environ.get("MASTER_PORT", _DEFAULT_PORT)
        host = os.environ.get("MASTER_ADDR") or _first_host(os.environ.get("SLURM_NODELIST", ""))
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


@contextmanager
def started(launcher: str, options: Mapping[str, Any]) -> Iterator[Processes]:
    """Join the processes that a launcher started for this run; leave them at the end.

    `dist_params` of the options has `backend` (default NCCL with CUDA, else gloo), `port` (Slurm)
    and `timeout` of a collective in minutes.
    """
    if launcher == "none":
        yield Processes()
        return
    dist_params = options.get("dist_params") or {}
    _set_environment(launcher, dist_params)
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    backend = "gloo"
    if gpus > 0 and options.get("num_gpu") != 0:
        if local_rank >= gpus:
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {gpus}; start at most "
                f"{gpus} processes on it"
            )
        torch.cuda.set_device(local_rank)
        backend = str(dist_params.get("backend") or "nccl")
    minutes = dist_params.get("timeout")
    timeout = None if minutes is None else timedelta(minutes=float(minutes))
    dist.init_process_group(backend=backend, timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield Processes(dist.get_rank(), dist.get_world_size(), control)
    finally:
        dist.destroy_process_group()


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
        opened.seek(0)  # a pipe cannot
    with opened as file:
        failure: OSError | None = None
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            # Not `flock`: workers that outlive a killed run by some seconds would hold its lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            failure = error
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


class StopRequest:
    """Whether a signal has asked this process to end; `signal` is its number, else 0.

    The run then finishes its iteration, saves, and says how to continue.
    """

    signal = 0
    _at_once = False

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
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
