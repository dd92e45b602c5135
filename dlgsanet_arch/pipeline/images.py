"""Images of a validation or test set, read by workers and divided among the processes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import Samples, batches, collate, start_worker


class EvaluationError(UserError):
    """An image that cannot be read, run, measured or written; the message names it."""


class Images:
    """A data set's images in the order of their paths, one at a time; made by `build_loader`.

    Iterated over, it gives all of them, as BasicSR's own validations want; `share` gives those of
    this process.

    Args:
        dataset: What is read.
        processes: The processes of the run.
        workers: Number of processes that read for this one; 0 reads in this one.
        pin_memory: As for a DataLoader.
    """

    def __init__(
        self, dataset: Samples, processes: Processes, *, workers: int, pin_memory: bool
    ) -> None:
        self.dataset = dataset
        self.shared = range(processes.rank, len(dataset), processes.world)
        self._workers = workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (batch for _, batch in self._read(range(len(self))))

    def share(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Give number and content of each image of this process: every world-th from its rank.

        Raises:
            EvaluationError: An image cannot be read.
        """
        return self._read(self.shared)

    def _read(self, numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
        loader = DataLoader(
            self.dataset,
            sampler=numbers,
            num_workers=min(self._workers, len(numbers)),
            collate_fn=collate,
            worker_init_fn=start_worker,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # or starting to read would draw from the global one
        )
        for number, (batch, bad) in zip(numbers, batches(loader), strict=True):
            if batch is None:
                fix = "; fix the file or take it out (`dlgsanet data verify` names all)"
                raise EvaluationError(f"{bad[0]}{fix if bad[0].sample else ''}")
            yield number, batch


def build_loader(dataset_opt: Mapping[str, Any], processes: Processes) -> Images:
    """Build a data set of an option file and what reads its images.

    Args:
        dataset_opt: A `val` or `test` entry of `datasets`; `num_worker_per_gpu` (default 1) says
            how many workers read.
        processes: The processes of the run, among which the images are divided.

    Raises:
        EvaluationError: The data set has no image.
    """
    dataset = build_dataset(dataset_opt)
    if len(dataset) == 0:
        raise EvaluationError(f"the data set {dataset_opt['name']} has no image")
    workers = dataset_opt.get("num_worker_per_gpu")
    return Images(
        Samples(dataset),
        processes,
        workers=1 if workers is None else int(workers),
        pin_memory=bool(dataset_opt.get("pin_memory")) and torch.cuda.is_available(),
    )
