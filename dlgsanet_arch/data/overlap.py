"""Which training pictures a test picture shares pixels with, and which pictures are the same.

A training picture leaves a few hashed patches behind: of each `CELL` x `CELL` places, the
`PATCH` x `PATCH` pixels with the most detail. A test picture is hashed at every place, so
neither's offset matters: a training picture may lie inside the test picture, contain it, or
share a part of it. Sure to be found are overlaps of `SURE` x `SURE` pixels or more: they hold
all places of a cell. Two things are not, as they would accuse pictures that only look alike:
cells without detail, such as white sky, and overlaps where less than half of the patches agree.

Pixels must be equal. Pictures that were compressed with loss, resized, or changed in colour are
not found; flipped or rotated ones only when asked with the test picture turned likewise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data.pictures import Pixels

# A power of two: windows are hashed by doubling.
PATCH = 16
# 13 x 13 cells in a sub-image of 480 x 480, of 20 bytes each.
CELL = 36
# From anywhere, the next cell starts within CELL - 1 pixels and its patches end CELL + PATCH - 1
# after that.
SURE = 2 * CELL + PATCH - 2

# A patch is detailed when so many of its 256 pixels differ from their left and their upper
# neighbour both: constants and stripes have none.
DETAILED = 64
# Patches that are found more often tell no place: in all training pictures, where sub-images
# share each pixel with three others, and in the test picture.
OFTEN_TRAINED = 64
OFTEN_TESTED = 16

# Odd numbers without pattern, to be multiplied modulo 2^64.
MIX_FIRST = np.uint64(0x9E6C63D0876A9A35)
MIX_SECOND = np.uint64(0xD1342543DE82EF95)
ACROSS = 0xB5AD4ECEDA1CE2A9
DOWN = 0x8CB92BA72F3D8DD7

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Patches:
    """What is kept of a training picture.

    Args:
        hashes: (N,) uint64.
        rows: (N,) int32, where each patch's upper left pixel is.
        columns: (N,) int32.
        size: Height and width of the picture.
    """

    hashes: Hashes
    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    size: tuple[int, int]


@dataclass(frozen=True)
class Overlap:
    """Pixels that a test picture and a training picture share.

    Args:
        name: The training picture's.
        row: Where its upper left pixel lies in the test picture; negative when outside.
        column: The same, to the right.
        size: Height and width of the part that both have.
        agreeing: How many of its patches in that part are equal in the test picture.
        patches: How many patches it has there.
    """

    name: str
    row: int
    column: int
    size: tuple[int, int]
    agreeing: int
    patches: int


def pixel_digest(picture: Pixels) -> str:
    """Hash shape, type and pixels: equal for equal pictures, whatever files they came from.

    Returns:
        SHA-256, 64 hex digits.
    """
    digest = sha256(f"{picture.shape} {picture.dtype.name} ".encode())
    digest.update(np.ascontiguousarray(picture))
    return digest.hexdigest()


def _mixed(picture: Pixels) -> Hashes:
    """Make one number of each pixel's colours, with every bit used."""
    bits = np.uint64(8 * picture.itemsize)
    blue, green, red = (picture[..., colour].astype(np.uint64) for colour in range(3))
    mixed = ((red << bits | green) << bits | blue) + np.uint64(1)
    mixed *= MIX_FIRST
    mixed ^= mixed >> np.uint64(32)
    mixed *= MIX_SECOND
    mixed ^= mixed >> np.uint64(29)
    return mixed


def _doubled(hashes: Hashes, base: int) -> Hashes:
    """Hash every PATCH numbers along the first axis: Σ hashes[i + k]·base^(PATCH - 1 - k)."""
    length = 1
    while length < PATCH:
        factor = np.uint64(pow(base, length, 2**64))
        hashes = hashes[:-length] * factor + hashes[length:]
        length *= 2
    return hashes


def _window_hashes(picture: Pixels) -> Hashes:
    """Hash the patch at every place: (H - PATCH + 1, W - PATCH + 1)."""
    return _doubled(_doubled(_mixed(picture), DOWN).T, ACROSS).T


def _detail(picture: Pixels) -> NDArray[np.int32]:
    """Count the pixels that differ from their left and upper neighbours, in every patch."""
    down = (picture[1:, 1:] != picture[:-1, 1:]).any(2)
    across = (picture[1:, 1:] != picture[1:, :-1]).any(2)
    sums = cv2.integral((down & across).astype(np.uint8))
    # a patch's first row and column have no neighbours inside it
    side = PATCH - 1
    return sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]


def _check(picture: Pixels) -> None:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"a picture is (H, W, 3) in uint8 or uint16, got {picture.shape=}, {picture.dtype=}"
        )


def patches_of(picture: Pixels) -> Patches:
    """Choose and hash the patches of a training picture.

    Args:
        picture: (H, W, 3), uint8 or uint16; none are chosen where a side is below `PATCH`.

    Raises:
        ValueError: `picture` is of another shape or dtype.
    """
    _check(picture)
    size = picture.shape[:2]
    if min(size) < PATCH:
        nothing = np.zeros(0, np.int32)
        return Patches(nothing.astype(np.uint64), nothing, nothing, size)
    detail = _detail(picture)
    # cells as rows: (cells down, cells across, places); what fills the last ones is never chosen
    padding = [(0, -side % CELL) for side in detail.shape]
    cells = np.pad(detail, padding, constant_values=-1)
    down, across = (side // CELL for side in cells.shape)
    cells = cells.reshape(down, CELL, across, CELL).swapaxes(1, 2).reshape(down, across, -1)
    best = cells.argmax(2)
    rows = (np.arange(down)[:, None] * CELL + best // CELL).ravel()
    columns = (np.arange(across) * CELL + best % CELL).ravel()
    detailed = cells.max(2).ravel() >= DETAILED
    rows, columns = rows[detailed], columns[detailed]

    reach = np.arange(PATCH)
    pixels = picture[rows[:, None, None] + reach[:, None], columns[:, None, None] + reach]
    mixed = _mixed(pixels.reshape(-1, PATCH, 3)).reshape(-1, PATCH, PATCH)
    hashes = _doubled(_doubled(mixed.transpose(1, 2, 0), DOWN)[0], ACROSS)[0]
    return Patches(hashes, rows.astype(np.int32), columns.astype(np.int32), size)


class TrainingPatches:
    """The patches of a training set, to be asked which of its pictures share pixels with another.

    It keeps 24 bytes a patch, and at most one patch for every cell of a picture.

    Args:
        pictures: Name and patches of each training picture.
    """

    def __init__(self, pictures: Iterable[tuple[str, Patches]]) -> None:
        pairs = list(pictures)
        kept = [patches for _, patches in pairs]
        self._names = [name for name, _ in pairs]
        self._sizes = [patches.size for patches in kept]
        self._ends = np.cumsum([len(patches.hashes) for patches in kept], dtype=np.int64)
        nothing = np.zeros(0, np.int32)
        self._rows = np.concatenate([nothing, *(patches.rows for patches in kept)])
        self._columns = np.concatenate([nothing, *(patches.columns for patches in kept)])
        hashes = np.concatenate([np.zeros(0, np.uint64), *(patches.hashes for patches in kept)])
        # patches by their hash, and back: where among the sorted hashes each patch's is
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._order = order.astype(np.int32)
        self._places = np.empty_like(self._order)
        self._places[order] = np.arange(len(order), dtype=np.int32)

    def _hits(self, windows: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find equal hashes that are rare enough to tell a place: patches, and flat windows."""
        flat = windows.ravel()
        # sorted, neighbouring searches touch the same memory
        by_hash = np.argsort(flat)
        wanted = flat[by_hash]
        first = np.searchsorted(self._hashes, wanted)
        known = first < len(self._hashes)
        known[known] = self._hashes[first[known]] == wanted[known]
        wanted, first, by_hash = wanted[known], first[known], by_hash[known]
        trained = np.searchsorted(self._hashes, wanted, side="right") - first
        tested = np.searchsorted(wanted, wanted, side="right") - np.searchsorted(wanted, wanted)
        telling = (trained <= OFTEN_TRAINED) & (tested <= OFTEN_TESTED)
        first, trained, by_hash = first[telling], trained[telling], by_hash[telling]
        # one row for each of the patches that a window equals
        within = np.arange(trained.sum()) - np.repeat(np.cumsum(trained) - trained, trained)
        return self._order[np.repeat(first, trained) + within], np.repeat(by_hash, trained)

    def _overlap(self, windows: Hashes, picture: int, row: int, column: int) -> Overlap:
        """Compare all patches of a training picture that lies at this place."""
        end = int(self._ends[picture])
        begin = int(self._ends[picture - 1]) if picture else 0
        rows, columns = self._rows[begin:end] + row, self._columns[begin:end] + column
        height, width = windows.shape
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        hashes = self._hashes[self._places[begin:end][inside]]
        agreeing = windows[rows[inside], columns[inside]] == hashes
        size = tuple(
            min(start + own, tested + PATCH - 1) - max(start, 0)
            for start, own, tested in zip(
                (row, column), self._sizes[picture], windows.shape, strict=True
            )
        )
        name = self._names[picture]
        return Overlap(name, row, column, size, int(agreeing.sum()), int(inside.sum()))

    def find(self, picture: Pixels) -> list[Overlap]:
        """Find the training pictures that share pixels with a test picture.

        Args:
            picture: (H, W, 3), uint8 or uint16; none are found where a side is below `PATCH`.

        Returns:
            One overlap a training picture, that with most equal patches, in the training set's
            order. Those where less than half of the patches are equal are left out: a logo or a
            frame is common to pictures that are not the same.

        Raises:
            ValueError: `picture` is of another shape or dtype.
        """
        _check(picture)
        if min(picture.shape[:2]) < PATCH or not len(self._hashes):
            return []
        windows = _window_hashes(picture)
        patches, places = self._hits(windows)
        pictures = np.searchsorted(self._ends, patches, side="right")
        rows, columns = np.divmod(places, windows.shape[1])
        starts = np.stack(
            [pictures, rows - self._rows[patches], columns - self._columns[patches]], axis=1
        )
        best: dict[int, Overlap] = {}
        for number, row, column in np.unique(starts, axis=0).tolist():
            overlap = self._overlap(windows, number, row, column)
            if 2 * overlap.agreeing < overlap.patches:
                continue
            if number not in best or overlap.agreeing > best[number].agreeing:
                best[number] = overlap
        return list(best.values())
