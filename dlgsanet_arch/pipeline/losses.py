"""Losses watched: a run ends at the first that is infinite or not a number."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import write_json
from dlgsanet_arch.hints import named
from dlgsanet_arch.pipeline.logs import readable
from dlgsanet_arch.pipeline.processes import Processes

_KEPT = 1000  # iterations after which losses on a device are fetched at the latest


class NonFiniteError(UserError):
    """A loss became infinite or not a number."""


class _Batch(NamedTuple):
    iteration: int
    samples: Sequence[str]
    losses: dict[str, Tensor | float]


class FiniteLosses:
    """Watches the losses of a run; one that is not finite is a NonFiniteError.

    Losses on a GPU are kept there until `check`, so that no iteration waits for them; others are
    checked when they come. With several processes nothing is raised before `check`. `folder` gets
    `non_finite_<iteration>.json`; it is None until the run's is made.
    """

    def __init__(self, processes: Processes) -> None:
        self.folder: Path | None = None
        self._processes = processes
        self._kept: list[_Batch] = []

    def watch(
        self, iteration: int, samples: Sequence[str], losses: Mapping[str, float | Tensor]
    ) -> None:
        """Take in an iteration: the names of its samples, its losses as numbers or tensors."""
        values = {name: torch.as_tensor(value).detach() for name, value in losses.items()}
        self._kept.append(_Batch(iteration, samples, values))
        waits = any(not each.is_cpu for each in values.values()) and len(self._kept) < _KEPT
        if not self._processes.distributed and not waits:
            self.check()

    def _first_bad(self) -> _Batch | None:
        """Bring the losses to the host, all at once, and return the first batch with a bad one."""
        kept, self._kept = self._kept, []
        tensors = [each.float().mean() for batch in kept for each in batch.losses.values()]
        if not tensors:
            return None
        device = next((each.device for each in tensors if not each.is_cpu), "cpu")
        numbers = iter(torch.stack([each.to(device) for each in tensors]).tolist())
        batches = [
            batch._replace(losses={k: next(numbers) for k in batch.losses}) for batch in kept
        ]
        return next((b for b in batches if not all(map(math.isfinite, b.losses.values()))), None)

    def check(self) -> None:
        """Check all losses before anything is printed, saved or validated; every process calls."""
        found = [each for each in self._processes.gather(self._first_bad()) if each is not None]
        if not found:
            return
        iteration, _, losses = min(found, key=lambda batch: batch.iteration)
        samples = [name for each in found if each.iteration == iteration for name in each.samples]
        where = named(samples)
        if self.folder is not None:
            file = self.folder / f"non_finite_{iteration}.json"
            where += f", see {file}"
            if self._processes.is_main:
                report = {"iteration": iteration, "losses": losses, "samples": samples}
                with suppress(OSError):  # the message has what matters
                    write_json(file, readable(report))
        values = ", ".join(f"{name} {value}" for name, value in losses.items())
        raise NonFiniteError(
            f"iteration {iteration} gave a value that is not finite ({values}); the batch's "
            f"samples: {where}. Check them, lower the learning rate or clip the gradients "
            "(train:clip_grad_norm), and resume from the last checkpoint"
        )
