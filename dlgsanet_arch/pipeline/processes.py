"""The processes of a run: one, or those that torchrun or Slurm started."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dlgsanet_arch.errors import UserError

# Ranks wait for each other over a group of its own, however long one of them validates or saves:
# a process that died is noticed by its launcher, not by this.
_PATIENCE = timedelta(days=30)
_DEFAULT_PORT = "29500"  # PyTorch's own
# What starts the processes, and the variables that it sets.
_LAUNCHERS = {
    "pytorch": ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
    "slurm": ("srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
}


class RemoteRankError(UserError):
    """Another process of the run has an error, which it reports itself."""


class LostProcessError(UserError):
    """Another process of the run does not answer any longer."""


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
            said = str(error)
            lost = any(each in said for each in ("onnection", "imed out", "NCCL"))
            if not self.distributed or not lost:
                raise
            raise LostProcessError(
                f"another process of the run has ended ({said.strip().splitlines()[0]}); its own "
                "output says why"
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

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Let an exception in the block on one process be a RemoteRankError on the others.

        Each must enter.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # the others wait for this process, and are to learn of it
            error = caught
        found = self.gather(None if error is None else str(error).partition("\n")[0])
        if error is not None:
            raise error
        for rank, text in enumerate(found):
            if text is not None:
                raise RemoteRankError(f"process {rank} stopped: {text}")


class Flag:
    """A number that one process sets and every process learns, without waiting for the answer.

    `exchange` is called once an iteration by every process: it starts to spread this process's
    value, and returns the largest value that was spread by the call before. So all processes see
    it at the same iteration, and the network's delay passes during the computation.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._sent = torch.zeros((), dtype=torch.int64)
        self._pending: Any = None

    def exchange(self, value: int) -> int:
        """Spread `value`; return the largest of all processes' values, one call late."""
        if not self._processes.distributed:
            return value
        self.settle()
        largest = int(self._sent)
        self._sent = torch.tensor(value)
        self._pending = dist.all_reduce(
            self._sent, op=dist.ReduceOp.MAX, group=self._processes.control, async_op=True
        )
        return largest

    def settle(self) -> None:
        """Wait for what is still being spread; every process calls it at the same iteration."""
        if self._pending is not None:
            with self._processes.answered():
                self._pending.wait()
            self._pending = None


def _first_host(hosts: str) -> str:
    """Return the first of Slurm's hosts, whose list may be folded ("node[01-04]")."""
    if "[" not in hosts:
        return hosts.split(",")[0]
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--launcher slurm: `scontrol show hostnames {hosts}` fails ({error}); set MASTER_ADDR "
            "to the name of the first node"
        ) from error
    return names.stdout.split()[0]


def _set_environment(launcher: str, dist_params: Mapping[str, Any]) -> None:
    """Set the variables that torch.distributed reads, as the launcher gives them."""
    starter, names = _LAUNCHERS[launcher]
    for ours, theirs in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), names, strict=True):
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
    """Join the processes of this run; leave them at the end.

    Args:
        launcher: "none", "pytorch" (torchrun) or "slurm" (srun).
        options: The option file's content, of which `dist_params` is read: `backend` (default
            NCCL with CUDA, else gloo), `port` (Slurm) and `timeout` of a collective in minutes.

    Raises:
        UserError: The launcher did not start this process, or it has no GPU of its own.
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
