"""Losses watched: a run ends at the first that is infinite or not a number."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named
from dlgsanet_arch.pipeline.logs import readable
from dlgsanet_arch.pipeline.processes import Processes

_KEPT = 1000  # iterations after which losses on a device are fetched at the latest


class NonFiniteError(UserError):
    """A loss became infinite or not a number."""


class _Batch(NamedTuple):
    iteration: int
    samples: Sequence[str]
    losses: dict[str, float | Tensor]


def _on_device(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and not value.is_cpu


class FiniteLosses:
    """Watches the losses of a run.

    Losses on a GPU are kept there until `check`, so that no iteration waits for them; others are
    checked when they come. With several processes nothing is raised before `check`.

    Attributes:
        folder: Gets `non_finite_<iteration>.json`: the run's, None where it is not made yet.
    """

    def __init__(self, processes: Processes) -> None:
        self.folder: Path | None = None
        self._processes = processes
        self._kept: list[_Batch] = []
        self._first: _Batch | None = None

    def watch(
        self, iteration: int, samples: Sequence[str], losses: Mapping[str, float | Tensor]
    ) -> None:
        """Take in an iteration: the names of its samples, its losses as numbers or tensors.

        Raises:
            NonFiniteError: As `check`, where a loss is a number or on the CPU, in a single process.
        """
        values = {
            name: value.detach() if _on_device(value) else float(value)
            for name, value in losses.items()
        }
        self._kept.append(_Batch(iteration, samples, values))
        if not any(map(_on_device, values.values())) or len(self._kept) >= _KEPT:
            self._fetch()
        if not self._processes.distributed and self._first is not None:
            self.check()

    def check(self) -> None:
        """Check all losses before anything is printed, saved or validated; every process calls.

        Raises:
            NonFiniteError: A loss is not finite. Iteration, losses and the names of the samples of
                the first such batch, with several processes of all that met it, are in the file.
        """
        self._fetch()
        batches = [each for each in self._processes.gather(self._first) if each is not None]
        if not batches:
            return
        iteration, _, losses = min(batches, key=lambda batch: batch.iteration)
        samples = [n for batch in batches if batch.iteration == iteration for n in batch.samples]
        report = {"iteration": iteration, "losses": losses, "samples": samples}
        where = named(samples)
        if self.folder is not None:
            with suppress(OSError):  # the message has what matters
                file = self.folder / f"non_finite_{iteration}.json"
                if self._processes.is_main:
                    text = json.dumps(readable(report), indent=2)
                    file.write_text(f"{text}\n", encoding="utf-8")
                where += f", see {file}"
        values = ", ".join(f"{name} {value}" for name, value in losses.items())
        raise NonFiniteError(
            f"iteration {iteration} gave a value that is not finite ({values}); the batch's "
            f"samples: {where}. Check them, lower the learning rate or clip the gradients "
            "(train:clip_grad_norm), and resume from the last checkpoint"
        )

    def _fetch(self) -> None:
        """Bring the losses that are kept to the host, all at once, and check them."""
        kept, self._kept = self._kept, []
        on_device = [
            (batch.losses, name)
            for batch in kept
            for name, value in batch.losses.items()
            if _on_device(value)
        ]
        if on_device:
            means = torch.stack([losses[name].float().mean() for losses, name in on_device])
            for (losses, name), number in zip(on_device, means.tolist(), strict=True):
                losses[name] = number
        for batch in kept:
            if self._first is None and not all(map(math.isfinite, batch.losses.values())):
                self._first = batch
