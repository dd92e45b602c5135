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


class RemoteRankError(UserError):
    """Another process of the run has an error, which it reports itself."""


class LostProcessError(UserError):
    """Another process of the run does not answer any longer."""


@contextmanager
def answered(group: Any) -> Iterator[None]:
    """Turn the failure of a collective into a message.

    Args:
        group: None for a single process, whose errors are others.

    Raises:
        LostProcessError: Another process has ended, or waits for something else.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's have no class of their own everywhere
        said = str(error)
        if group is None or not any(each in said for each in ("onnection", "imed out", "NCCL")):
            raise
        raise LostProcessError(
            f"another process of the run has ended ({said.strip().splitlines()[0]}); its own "
            "output says why"
        ) from error


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        rank: Number of this process, from 0.
        world: Number of processes.
        local_rank: Number of this process on its machine, and of the GPU it uses.
        control: CPU group for `gather`; None for a single process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def distributed(self) -> bool:
        """Whether a launcher started this run, be it with one process."""
        return self.control is not None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes in the order of their ranks; each must call."""
        if self.control is None:
            return [value]
        values = [None] * self.world
        with answered(self.control):
            dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, value: Any) -> Any:
        """Return the value that the main process gave; each must call."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def agree(self, error: Exception | None) -> None:
        """Raise on every process if one has an error; each must call.

        Raises:
            Exception: `error` itself, on the process that has it.
            RemoteRankError: On the others.
        """
        found = self.gather(None if error is None else str(error).partition("\n")[0])
        if error is not None:
            raise error
        for rank, text in enumerate(found):
            if text is not None:
                raise RemoteRankError(f"process {rank} stopped: {text}")

    def flag(self) -> "Flag":
        """Return a flag that any process may raise and all see at the same iteration."""
        return Flag(self.control)


class Flag:
    """A number that one process sets and every process learns, without waiting for the answer.

    `exchange` is called once an iteration by every process: it starts to spread this process's
    value, and returns the largest value that was spread by the call before. So all processes see
    it at the same iteration, and the network's delay passes beside the computation.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._sent = torch.zeros((), dtype=torch.int64)
        self._pending: Any = None

    def exchange(self, value: int) -> int:
        """Spread `value`; return the largest of all processes' values, one call late."""
        if self._group is None:
            return value
        largest = 0
        if self._pending is not None:
            with answered(self._group):
                self._pending.wait()
            largest = int(self._sent)
        self._sent = torch.tensor(value)
        self._pending = dist.all_reduce(
            self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return largest

    def settle(self) -> None:
        """Wait for what is still being spread; every process calls it at the same iteration."""
        if self._pending is not None:
            with answered(self._group):
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


def _environment(launcher: str, dist_params: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that torch.distributed reads, as the launcher gives them."""
    names = {
        "pytorch": {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK"},
        "slurm": {
            "RANK": "SLURM_PROCID",
            "WORLD_SIZE": "SLURM_NTASKS",
            "LOCAL_RANK": "SLURM_LOCALID",
        },
    }[launcher]
    for name in names.values():
        if name not in os.environ:
            starter = "torchrun" if launcher == "pytorch" else "srun"
            raise UserError(
                f"--launcher {launcher} needs to be started by {starter}, which sets {name}; it "
                "is not set; for a single process leave the flag out"
            )
    found = {ours: os.environ[theirs] for ours, theirs in names.items()}
    if launcher == "slurm":
        port = str(dist_params.get("port") or os.environ.get("MASTER_PORT", _DEFAULT_PORT))
        host = os.environ.get("MASTER_ADDR") or _first_host(os.environ.get("SLURM_NODELIST", ""))
        found |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    return found


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
    environment = _environment(launcher, dist_params)
    os.environ.update(environment)
    local_rank, gpus = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
    uses_gpu = gpus > 0 and options.get("num_gpu") != 0
    if uses_gpu:
        if local_rank >= gpus:
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {gpus}; start at most "
                f"{gpus} processes on it"
            )
        torch.cuda.set_device(local_rank)
    backend = str(dist_params.get("backend") or "nccl") if uses_gpu else "gloo"
    minutes = dist_params.get("timeout")
    timeout = None if minutes is None else timedelta(minutes=float(minutes))
    dist.init_process_group(backend=backend, timeout=timeout)
    try:
        yield Processes(
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            local_rank=local_rank,
            control=dist.new_group(backend="gloo", timeout=_PATIENCE),
        )
    finally:
        dist.destroy_process_group()
