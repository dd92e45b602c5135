"""Which samples each iteration trains on, from any point of a run.

An epoch is a shuffled list of positions, the same for every number of processes and workers. Each
iteration takes the next `batch * world` positions, and each process its own piece of those. So
processes together draw the batch that a single one would, and a run resumes at any position without
reading what was drawn before.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Draw(NamedTuple):
    """One sample: its position in an epoch of all processes, and its index in the data set."""

    epoch: int
    position: int
    index: int


class Place(NamedTuple):
    """How far a run has come: `position` positions of an epoch are done, epochs count from 0."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Sampling:
    """How a training set is drawn."""

    samples: int  # of the data set
    ratio: float  # `dataset_enlarge_ratio`: how often an epoch has each of them
    batch: int  # samples that one process takes an iteration
    world: int = 1
    rank: int = 0
    seed: int = 0  # shuffles the epochs

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

    def _start_of_next(self, place: Place) -> Place:
        if place.position + self.taken > self.epoch_length:
            return Place(place.epoch + 1, 0)
        return place

    def after(self, place: Place) -> Place:
        """Return the place after one more iteration."""
        start = self._start_of_next(place)
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

    def batches(self, place: Place, count: int) -> Iterator[list[Draw]]:
        """Yield this process's next `count` batches after a place."""
        epoch, order = -1, np.empty(0, np.int64)
        for _ in range(count):
            start = self._start_of_next(place)
            if start.epoch != epoch:
                epoch, order = start.epoch, self.shuffled(start.epoch)
            first = start.position + self.rank * self.batch
            positions = range(first, first + self.batch)
            yield [Draw(epoch, position, int(order[position])) for position in positions]
            place = self.after(place)
