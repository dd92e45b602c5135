"""Samples of BasicSR's data sets: which ones an iteration draws, read by workers, named if bad.

An epoch is a shuffled list of positions, the same for every number of processes and workers. Each
iteration takes the next `batch * world` of them, and each process its own piece. What a sample
draws at random depends on (seed, epoch, position) alone. So processes together train on the batch
that a single one would, and a run resumes at any position without reading what was drawn before.
"""

import errno
import math
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dlgsanet_arch.errors import UserError

_MOST_REPLACEMENTS = 16  # bad samples in a row before it is not a matter of single samples


def generators(*, cuda: bool = True) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and PyTorch's generators, with `cuda` the GPU's too."""
    kind, keys, *rest = np.random.get_state()
    found = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore_generators(found: Mapping[str, Any]) -> None:
    """Put the generators into a state that `generators` returned."""
    random.setstate(found["python"])
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(found["torch"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])


@contextmanager
def preserved_generators(*, cuda: bool = True) -> Iterator[None]:
    """Restore the generators at the end; a worker may not ask for CUDA's."""
    before = generators(cuda=cuda)
    try:
        yield
    finally:
        restore_generators(before)


def _seed_all(*numbers: int) -> None:
    """Seed the three generators from numbers, each of which changes all that is drawn."""
    seeds = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    # torch.manual_seed would also seed the GPUs, whose generators belong to the network
    torch.default_generator.manual_seed(int(seeds[2]))


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

    def after(self, place: Place) -> Place:
        """Return the place after one more iteration."""
        if place.position + self.taken > self.epoch_length:
            return Place(place.epoch + 1, self.taken)
        return Place(place.epoch, place.position + self.taken)

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
            place = self.after(place)
            if place.epoch != epoch:
                epoch, order = place.epoch, self.shuffled(place.epoch)
            first = place.position - self.taken + self.rank * self.batch
            positions = range(first, first + self.batch)
            yield [Draw(epoch, position, int(order[position])) for position in positions]


class ReadingError(UserError):
    """A data set cannot be read further; the iterations so far are not touched by it."""


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    dataset: str  # its name in the option file
    sample: str  # file, or LMDB and key; "" where a limit of the system is at fault
    reason: str

    def __str__(self) -> str:
        if not self.sample:
            return self.reason
        return f"{self.sample} of the data set {self.dataset}: {self.reason}"


class Sample(NamedTuple):
    """What was read, None where nothing could be, and the bad samples on the way."""

    content: dict[str, Any] | None
    bad: tuple[BadSample, ...] = ()


Batch = tuple[dict[str, Any] | None, list[BadSample]]  # None: a sample of it could not be read


def system_limit(error: BaseException) -> str:
    """Name the limit of the system that an error comes from, and the fix; "" for other errors."""
    text, number = str(error), getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancdata" in text:
        return (
            "the limit of open files is reached: raise it (ulimit -n 4096), or lower "
            "num_worker_per_gpu of the data sets"
        )
    if any(part in text for part in ("/torch_", "shared memory", "Bus error")):
        return (
            "the shared memory in which workers hand samples over is full: make /dev/shm larger "
            "(in a container by --shm-size), or lower num_worker_per_gpu and prefetch_factor of "
            "the data sets"
        )
    return ""


def _fault(client: Any, place: str, key: str) -> str:
    """Say what is wrong with an encoded image, or return nothing."""
    try:
        data = client.get(place, key)
    except Exception as error:  # whatever a storage backend raises
        return f"cannot be read ({type(error).__name__}: {error})"
    if data is None:
        return "the LMDB has no such key"
    if not len(data):
        return "is empty"
    if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is None:
        return "cannot be decoded: it is damaged or no image"
    return ""


def _files(dataset: Any, index: int) -> Mapping[str, Any]:
    """Return a sample's files by key; empty for a data set that does not name them."""
    paths = getattr(dataset, "paths", None)
    if not isinstance(paths, Sequence) or len(paths) != len(dataset):
        return {}
    return paths[index] if isinstance(paths[index], Mapping) else {"lq_path": paths[index]}


def _describe(dataset: Any, options: Mapping[str, Any], index: int, error: Exception) -> BadSample:
    """Name the sample whose reading failed, and the file at fault where it can be found."""
    name = str(options.get("name", type(dataset).__name__))
    if limit := system_limit(error):
        return BadSample(name, "", limit)
    client = getattr(dataset, "file_client", None)
    in_lmdb = getattr(client, "backend", None) == "lmdb"
    shown = []
    for key, place in _files(dataset, index).items():
        key, place = str(key).removesuffix("_path"), str(place)
        folder = options.get(f"dataroot_{key}")
        shown.append(f"{folder}, key {place!r}" if in_lmdb and folder else place)
        if client is not None and (fault := _fault(client, place, key)):
            return BadSample(name, shown[-1], fault)
    said = " ".join(map(str, error.args))
    return BadSample(name, " and ".join(shown) or f"#{index}", f"{type(error).__name__}: {said}")


class Samples(Dataset):
    """A data set of BasicSR's in the order of its paths, the only kind that workers are given.

    A worker that is spawned imports this package, and with it the repairs, before it unpickles what
    belongs to BasicSR. With `replace_bad`, the next good sample takes the place of a bad one.
    """

    def __init__(self, dataset: Any, seed: int = 0, *, replace_bad: bool = False) -> None:
        self.dataset, self._seed = dataset, seed
        self.opt = getattr(dataset, "opt", None) or {}  # a model finds the name there
        self._attempts = _MOST_REPLACEMENTS if replace_bad else 1
        # BasicSR lists a folder in the order of the disk.
        files = [_files(dataset, index) for index in range(len(dataset))]
        self._order = sorted(range(len(files)), key=lambda i: str(files[i].get("lq_path", "")))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw | int) -> Sample:
        bad, index = [], draw.index if isinstance(draw, Draw) else draw
        with preserved_generators(cuda=False):
            for attempt in range(self._attempts):
                candidate = self._order[(index + attempt) % len(self)]
                if isinstance(draw, Draw):
                    _seed_all(self._seed % 2**32, draw.epoch, draw.position)
                try:
                    return Sample(self.dataset[candidate], tuple(bad))
                except Exception as error:  # a data set may raise anything on a bad file
                    # A worker's traceback would name the line that failed, and never the file.
                    bad.append(_describe(self.dataset, self.opt, candidate, error))
        return Sample(None, tuple(bad))


def collate(samples: Sequence[Sample]) -> Batch:
    """Make a batch of samples, and name the bad ones."""
    bad = [each for sample in samples for each in sample.bad]
    contents = [sample.content for sample in samples]
    if any(content is None for content in contents):
        return None, bad
    try:
        return default_collate(contents), bad
    except RuntimeError as error:
        if limit := system_limit(error):
            return None, [*bad, BadSample("training", "", limit)]
        names = [str(content.get("gt_path", content.get("lq_path"))) for content in contents]
        return None, [*bad, BadSample("training", f"the batch {names}", str(error))]


def load(
    samples: Samples, batches: Iterable[list], workers: int, *, pin_memory: bool, **more: Any
) -> Iterator[Batch]:
    """Read batches, given as draws or indices, by `workers` processes, or by this one if 0.

    `more` is what a DataLoader takes for workers. A worker that dies, or a limit of the system, is
    a ReadingError.
    """
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or starting to read would draw from the global one
        **(more if workers else {}),
    )
    try:
        reader = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise in the middle of a step; `next` finds out as well.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from reader
    except (EOFError, OSError, RuntimeError) as error:
        limit = system_limit(error)
        # A batch may be half-way through a socket when its worker dies.
        cut = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
        if not limit and not (cut and workers) and "DataLoader worker" not in str(error):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        died = f"a worker that reads samples died ({said}); if memory or /dev/shm was full, lower "
        raise ReadingError(limit or f"{died}num_worker_per_gpu of the data sets") from error


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C and a scheduler's signals, which reach all processes, to the main one."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # OpenCV's number of threads stays: to change it in a fork waits for threads that are not there.
