"""What tests of whole trainings share: small runs, run here or in a process that can be killed."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from dlgsanet_arch import cli, pipeline
from dlgsanet_arch.pipeline.processes import Processes

SWINIR = {"type": "SwinIR", "upscale": 2, "img_size": 16, "window_size": 4, "embed_dim": 8}
SWINIR |= {"depths": [1], "num_heads": [2], "upsampler": "pixelshuffledirect"}
SAMPLES = 7  # an odd number, so that an epoch of pairs has an incomplete last batch


class NoisyNet(nn.Module):
    """A network of a third party that draws at random and has statistics of its own."""

    def __init__(self, width: int = 8, channels: int = 3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.3)
        )
        self.up = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.body(x))


if "NoisyNet" not in ARCH_REGISTRY:
    ARCH_REGISTRY.register(NoisyNet)


def make_root(folder: Path) -> Path:
    """Make a root folder with images to train on."""
    helpers.write_pairs(folder / "data", SAMPLES)
    return folder


def small_options(
    name: str, *, total: int = 12, save_every: int = 5, validates: bool = True, **train_set: Any
) -> dict[str, Any]:
    """Options of a 12-iteration run that crosses epochs, whose workers and validation run too."""
    options = helpers.small_train_options(Path("data"))
    options["name"] = name
    options["train"]["total_iter"] = total
    options["train"]["scheduler"]["milestones"] = [3 if total < 50_000 else total // 2]
    options["val"]["val_freq"] = 4
    options["logger"] |= {"print_freq": 1, "save_checkpoint_freq": save_every}
    options["datasets"]["train"] |= {"num_worker_per_gpu": 1, **train_set}
    if not validates:
        del options["val"], options["datasets"]["val"]
    return options


def train(root: Path, options: Mapping[str, Any], *flags: str) -> None:
    """Train in this process."""
    file = helpers.write_options(root / f"{options['name']}.yml", options)
    pipeline.train(root, ["-opt", str(file), *flags])


def weights(root: Path, name: str, label: str = "net_g_latest") -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by key and name."""
    path = root / "experiments" / name / "models" / f"{label}.pth"
    content = torch.load(path, weights_only=True)
    return {f"{key}/{n}": tensor for key, part in content.items() for n, tensor in part.items()}


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def events(root: Path, name: str, event: str) -> list[dict[str, Any]]:
    """Return the lines of a run's log.jsonl that tell of `event`."""
    path = root / "experiments" / name / "log.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # what a full disk or a kill cut short
            found.append(json.loads(line))
    return [entry for entry in found if entry["event"] == event]


class Forked:
    """A command in a process of its own, which has all modules already.

    `environment` is added to its own, and `before` is called in it before it starts.
    """

    def __init__(
        self,
        root: Path,
        options: Mapping[str, Any],
        *flags: str,
        verb: str = "train",
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._root, self._name = root, options["name"]
        file = helpers.write_options(root / f"{options['name']}.yml", options)
        rank = next((v for k, v in (environment or {}).items() if "RANK" in k or "PROCID" in k), "")
        self.output = root / f"{options['name']}{rank}.out"
        self._lines = len(events(root, self._name, "train"))
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()  # a group of its own, as a terminal and a scheduler give it
            with self.output.open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.stdout = sys.stderr = out
                faulthandler.register(signal.SIGUSR2, out)  # where it hangs, if it does
                os.environ |= environment or {}
                if before is not None:
                    before()
                status = cli.main([verb, "-opt", str(file), "--root", str(root), *flags])
        except BaseException:
            os.write(2, traceback.format_exc().encode())  # sys.stderr is closed by now
        finally:
            os._exit(status)

    @property
    def said(self) -> str:
        """What it wrote, the last of it."""
        return self.output.read_text()[-12000:]

    def wait(self, seconds: float = 60) -> int:
        """Return its exit status, negative for a signal; killed when it takes too long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGUSR2)
        time.sleep(0.5)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"the run hangs:\n{self.said}")

    def reaches(self, iterations: int, seconds: float = 60) -> None:
        """Wait until it has logged that many iterations."""
        until = time.monotonic() + seconds
        while len(events(self._root, self._name, "train")) - self._lines < iterations:
            assert time.monotonic() < until, self.said
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            assert not pid, f"it ended with {status}:\n{self.said}"
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Send a signal to it and its workers, as a terminal and a scheduler do."""
        os.killpg(self.pid, number)


@dataclass(frozen=True)
class Thread(Processes):
    """One of several processes, in threads of this one."""

    distributed = True
    board: tuple[threading.Barrier, list] = ()

    def gather(self, value: Any) -> list:
        barrier, values = self.board
        values[self.rank] = value
        barrier.wait(timeout=60)
        gathered = list(values)
        barrier.wait(timeout=60)
        return gathered


def in_ranks(world: int, run: Callable[[Processes], Any]) -> list:
    """Call run(processes) once for each of several ranks; return results or errors."""
    board = threading.Barrier(world), [None] * world

    def call(rank: int) -> Any:
        try:
            return run(Thread(rank, world, board=board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as ranks:
        return list(ranks.map(call, range(world)))
