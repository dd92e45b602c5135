"""Which samples each iteration trains on, from any point of a run.

An epoch is a shuffled list of positions, the same for every number of processes and workers. Each
iteration takes the next `batch * world` positions, and each process its own piece of those: so
processes together draw the batch that a single one of the same size would, and a run continues at
any position without reading what was drawn before.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dlgsanet_arch.pipeline.samples import Draw


class Place(NamedTuple):
    """How far a run has come in its samples.

    Args:
        epoch: Counted from 0.
        position: Positions of that epoch that are done.
    """

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Sampling:
    """How a training set is drawn.

    Args:
        samples: Number of samples of the data set.
        ratio: Its `dataset_enlarge_ratio`: how often an epoch has each of them.
        batch: Samples that one process takes an iteration.
        world: Number of processes.
        rank: Number of this process.
        seed: Shuffles the epochs.
    """

    samples: int
    ratio: float
    batch: int
    world: int = 1
    rank: int = 0
    seed: int = 0

    @property
    def epoch_length(self) -> int:
        """Positions of an epoch."""
        return math.ceil(self.samples * self.ratio)

    @property
    def taken(self) -> int:
        """Samples that all processes take an iteration."""
        return self.batch * self.world

    @property
    def batches_an_epoch(self) -> int:
        """Iterations of an epoch; an incomplete last batch is left out."""
        return self.epoch_length // self.taken

    def start_of_next(self, place: Place) -> Place:
        """Return where the next iteration begins: at `place`, or in the next epoch."""
        if place.position + self.taken > self.epoch_length:
            return Place(place.epoch + 1, 0)
        return place

    def after(self, place: Place) -> Place:
        """Return the place after one more iteration."""
        start = self.start_of_next(place)
        return Place(start.epoch, start.position + self.taken)

    def place_of(self, iteration: int) -> Place:
        """Return the place after `iteration` iterations of this batch from the very start."""
        if iteration == 0:
            return Place()
        epoch, batch = divmod(iteration - 1, self.batches_an_epoch)
        return Place(epoch, (batch + 1) * self.taken)

    def shuffled(self, epoch: int) -> np.ndarray:
        """Return the indices of an epoch's samples, position by position."""
        # NumPy's old generator: it draws the same in every version, and a run may outlive one.
        generator = np.random.RandomState([self.seed % 2**32, epoch])
        return generator.permutation(self.epoch_length) % self.samples


class Batches:
    """Sampler of batches for a DataLoader: from a place on, as many as are asked for."""

    def __init__(self, sampling: Sampling, place: Place, count: int) -> None:
        self._sampling = sampling
        self._place = place
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Draw]]:
        sampling, place, epoch, order = self._sampling, self._place, -1, np.empty(0, np.int64)
        for _ in range(self._count):
            start = sampling.start_of_next(place)
            if start.epoch != epoch:
                epoch, order = start.epoch, sampling.shuffled(start.epoch)
            first = start.position + sampling.rank * sampling.batch
            positions = range(first, first + sampling.batch)
            yield [Draw(epoch, position, int(order[position])) for position in positions]
            place = sampling.after(place)
