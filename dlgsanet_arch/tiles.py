"""A function of images run another way: on tiles of a large image, or on its eight symmetries.

Both take the network as a function of images (B, C, H, W), so that a bare network and one of
BasicSR's models do alike, and one can be given to the other.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]

# Mirrored left to right, mirrored top to bottom, rows taken as columns: each is its own inverse,
# and together they make the eight symmetries of a square.
_SYMMETRIES: tuple[Run, ...] = (
    lambda image: image.flip(-1),
    lambda image: image.flip(-2),
    lambda image: image.transpose(-1, -2).contiguous(),
)


def self_ensemble(run: Run, image: Tensor, symmetries: Sequence[Run] = _SYMMETRIES) -> Tensor:
    """Return the mean of `run` over the eight flips and rotations of an image, each turned back.

    `run` maps (B, C, H, W) to (B, C', s·H, s·W). If it turns with the image, its result is
    unchanged, to the bit: means are taken of two at a time.
    """
    if not symmetries:
        return run(image)
    turn, *others = symmetries
    plain = self_ensemble(run, image, others)
    turned = turn(self_ensemble(run, turn(image), others))
    return (plain + turned) / 2


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: evenly, at least `overlap` shared, all inside."""
    if length <= tile:
        return [0]
    steps = ceil((length - tile) / (tile - overlap))
    return [i * (length - tile) // steps for i in range(steps + 1)]


def _blend(held: Tensor, piece: Tensor, margin: int, axis: int) -> Tensor:
    """Blend the start of a piece with what is held of the one before.

    `margin` values at the edge of each have no weight, and the weights rise between. Equal values
    stay what they are, to the bit.
    """
    mixed = held.shape[axis] - 2 * margin
    steps = torch.arange(1, mixed + 1, device=piece.device, dtype=piece.dtype)
    weights = (steps / (mixed + 1)).view([-1 if axis == each else 1 for each in range(4)])
    old, new = (each.narrow(axis, margin, mixed) for each in (held, piece))
    last = margin + mixed
    rest = piece.narrow(axis, last, piece.shape[axis] - last)
    return torch.cat([held.narrow(axis, 0, margin), old + (new - old) * weights, rest], axis)


def _blended(
    pieces: Iterator[Tensor], starts: Sequence[int], end: int, margin: int, axis: int
) -> Iterator[Tensor]:
    """Yield pieces (B, C, H, W) that overlap along an axis as parts that do not, in order.

    `starts` has where each piece begins, and `end` where the last ends; see `_blend`.
    """
    held: Tensor | None = None  # what the next piece shares
    for start, following in pairwise([*starts, end]):
        piece = next(pieces)
        if held is not None:
            piece = _blend(held, piece, margin, axis)
        finished = following - start
        yield piece.narrow(axis, 0, finished)
        held = piece.narrow(axis, finished, piece.shape[axis] - finished).clone()
        del piece  # before the next one is computed


def _joined(parts: Iterator[Tensor], length: int, axis: int) -> Tensor:
    """Join parts along an axis as they are made, which takes less memory than torch.cat."""
    whole, done = None, 0
    for part in parts:
        if whole is None:
            whole = part.new_empty([*part.shape[:axis], length, *part.shape[axis + 1 :]])
        whole.narrow(axis, done, part.shape[axis]).copy_(part)
        done += part.shape[axis]
    return whole


def rows_in_tiles(
    run: Run,
    image: Tensor,
    scale: int,
    tile: int,
    overlap: int,
    on_tile: Callable[[int, int], None] | None = None,
    batch: int = 1,
) -> Iterator[Tensor]:
    """Return the rows of what `run_in_tiles` returns, from the top, as they are finished.

    Memory holds the tiles that are computed together and at most three rows of tiles. `batch`
    neighbouring tiles are given to `run` at once, as (batch·B, C, h, w); `on_tile` is called with
    the number of tiles done and of all. Results, (B, C', n, scale·W) with all n summing to
    scale·H, are not to be written to.
    """
    if tile < 1 or not 0 <= overlap < tile or batch < 1:
        raise ValueError(
            "tile and batch must be 1 or more, and overlap 0 or more and less than tile; got "
            f"{tile=}, {overlap=}, {batch=}"
        )
    height, width = image.shape[2:]
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    tall, wide = min(tile, height), min(tile, width)
    margin = overlap // 4 * scale
    done = 0

    def enlarged(strip: Tensor) -> Iterator[Tensor]:
        nonlocal done
        for first in range(0, len(lefts), batch):
            tiles = [strip[..., left : left + wide] for left in lefts[first : first + batch]]
            made = run(torch.cat(tiles))
            expected = (len(tiles) * len(image), scale * tall, scale * wide)
            if (made.shape[0], *made.shape[2:]) != expected:
                raise ValueError(
                    f"at {scale=} a tile of {wide}x{tall} pixels becomes one of "
                    f"{scale * wide}x{scale * tall}; the network gave the shape {tuple(made.shape)}"
                )
            done += len(tiles)
            if on_tile is not None:
                on_tile(done, len(tops) * len(lefts))
            yield from made.split(len(image))

    def rows() -> Iterator[Tensor]:
        starts = [scale * left for left in lefts]
        for top in tops:
            tiles = enlarged(image[:, :, top : top + tall])
            parts = _blended(tiles, starts, scale * width, margin, 3)
            yield _joined(parts, scale * width, 3)

    return _blended(rows(), [scale * top for top in tops], scale * height, margin, 2)


def run_in_tiles(run: Run, image: Tensor, scale: int, tile: int, overlap: int) -> Tensor:
    """Return `run` of an image, computed on overlapping squares of one size that are blended.

    In an overlap, the outer quarter at the edge of a tile has no weight, and between the weights of
    the two tiles rise and fall and sum to 1: where pixels depend on neighbours at most
    `overlap // 4` away, the result is that of the whole image.

    Args:
        run: Maps (B, C, h, w) to (B, C', scale·h, scale·w).
        image: (B, C, H, W) of any size.
        scale: How much larger the result is.
        tile: Side of a tile, in pixels of `image`.
        overlap: What neighbouring tiles share at least, in pixels of `image`.

    Raises:
        ValueError: An argument is out of range, or `run` gives another size than `scale` says.
    """
    rows = rows_in_tiles(run, image, scale, tile, overlap)
    return _joined(rows, scale * image.shape[2], 2)
