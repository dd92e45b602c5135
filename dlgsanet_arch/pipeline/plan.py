"""How far BasicSR's training loop will run, told before it starts.

BasicSR 1.4.2 plans its epochs from a number of batches rounded up, while its loader drops the
last, incomplete batch, and while several GPUs of one process enlarge the batch. The loop then
ends early, says nothing, and saves what it has as the result. The arithmetic below is that
loop's own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlgsanet_arch.errors import UserError

# Which folder of a data set of BasicSR lists its samples.
_COUNTED_FOLDERS = {"PairedImageDataset": "dataroot_gt", "SingleImageDataset": "dataroot_lq"}


def count_samples(dataset: Mapping[str, Any], root: Path) -> int | None:
    """Count the samples of a training set as BasicSR does: LMDB, meta file or folder listing.

    Args:
        dataset: The data set's part of the option file.
        root: Folder that relative paths are below.

    Returns:
        The number, or None where the type is none of BasicSR's two plain picture sets.
    """
    folder_key = _COUNTED_FOLDERS.get(dataset["type"])
    if folder_key is None:
        return None
    if dataset["io_backend"]["type"] == "lmdb":
        listing = root / Path(dataset["dataroot_lq"]).expanduser() / "meta_info.txt"
    elif dataset.get("meta_info_file") is not None:
        listing = root / dataset["meta_info_file"]
    else:
        folder = root / Path(dataset[folder_key]).expanduser()
        return sum(item.is_file() and not item.name.startswith(".") for item in folder.iterdir())
    with listing.open() as lines:
        return sum(1 for _ in lines)


@dataclass(frozen=True)
class Plan:
    """What BasicSR's loop is bounded by.

    Args:
        samples: Number of training samples.
        batch: Samples that one process takes an iteration by the option file.
        gpus: GPUs of one process that is not distributed, which take `batch` each; else 1.
        world: Processes of a distributed run; else 1.
        total_iter: Iterations asked for.
    """

    samples: int
    batch: int
    gpus: int
    world: int
    total_iter: int

    def batches_an_epoch(self, ratio: float) -> int:
        """Batches that an epoch really has, at this `dataset_enlarge_ratio`."""
        return math.ceil(self.samples * ratio / self.world) // (self.batch * self.gpus)

    def reached(self, ratio: float, epoch: int = 0, iteration: int = 0) -> int:
        """Return the iteration at which the loop ends when it starts at `epoch`, `iteration`."""
        planned_an_epoch = math.ceil(self.samples * ratio / (self.batch * self.world))
        epochs = math.ceil(self.total_iter / planned_an_epoch) + 1
        steps = max(0, epochs - epoch) * self.batches_an_epoch(ratio)
        return max(iteration, min(iteration + steps, self.total_iter))

    def smallest_ratio(self, epoch: int = 0, iteration: int = 0) -> int:
        """Return the smallest whole `dataset_enlarge_ratio` with which the loop runs through."""
        ratio = 1
        while self.reached(ratio, epoch, iteration) < self.total_iter:
            ratio += 1
        return ratio


def check_length(plan: Plan, ratio: float, epoch: int = 0, iteration: int = 0) -> None:
    """Refuse a training run that BasicSR's loop would end before `total_iter`.

    Args:
        plan: What bounds the loop.
        ratio: The training set's `dataset_enlarge_ratio`.
        epoch: Epoch that the run goes on from.
        iteration: Iteration that the run goes on from.

    Raises:
        UserError: Naming the iteration and the smallest ratio that mends it.
    """
    if plan.samples == 0:
        raise UserError("datasets:train: there are no samples; fill its list, or correct the path")
    reached = plan.reached(ratio, epoch, iteration)
    if reached >= plan.total_iter:
        return
    batch = plan.batch * plan.gpus * plan.world
    if plan.batches_an_epoch(ratio) == 0:
        what = (
            f"datasets:train has {plan.samples} samples x dataset_enlarge_ratio {ratio}, less than "
            f"one batch of {batch}: BasicSR would train 0 iterations and save the untrained "
            "network as the result"
        )
    else:
        what = (
            f"BasicSR would end this run at iteration {reached} of train:total_iter "
            f"{plan.total_iter}: it plans its epochs with the incomplete last batch of "
            f"{plan.samples} samples x dataset_enlarge_ratio {ratio} (batches of {batch}), and "
            "drops that batch"
        )
    smallest = plan.smallest_ratio(epoch, iteration)
    raise UserError(f"{what}; set datasets:train:dataset_enlarge_ratio to {smallest}")
