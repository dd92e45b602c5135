"""A function of pictures run another way: on tiles of a large picture, or on its eight symmetries.

Both take the network as a function of pictures (B, C, H, W), so that a bare network, one prepared
by `repeat` and one of BasicSR's models do alike, and one can be given to the other.
"""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]

# Mirrored left to right, mirrored top to bottom, rows taken as columns: each is its own inverse,
# and together they make the eight symmetries of a square.
_SYMMETRIES: tuple[Run, ...] = (
    lambda picture: picture.flip(-1),
    lambda picture: picture.flip(-2),
    lambda picture: picture.transpose(-1, -2).contiguous(),
)


def self_ensemble(run: Run, picture: Tensor) -> Tensor:
    """Return the mean of `run` over the eight flips and rotations of a picture, each turned back.

    Args:
        run: Maps (B, C, H, W) to (B, C', s·H, s·W), for pictures on their side too.
        picture: (B, C, H, W).

    Returns:
        (B, C', s·H, s·W). A `run` that turns with the picture is unchanged, to the bit: means are
        taken of two at a time.
    """
    return _ensemble(run, picture, _SYMMETRIES)


def _ensemble(run: Run, picture: Tensor, symmetries: Sequence[Run]) -> Tensor:
    if not symmetries:
        return run(picture)
    turn, *others = symmetries
    plain = _ensemble(run, picture, others)
    turned = turn(_ensemble(run, turn(picture), others))
    return (plain + turned) / 2


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: evenly, at least `overlap` shared, all inside."""
    if length <= tile:
        return [0]
    steps = ceil((length - tile) / (tile - overlap))
    return [i * (length - tile) // steps for i in range(steps + 1)]


def _join(whole: Tensor, piece: Tensor, start: int, end: int, margin: int, axis: int) -> None:
    """Lay a piece into the whole along an axis, blended with what is there up to `end`.

    In the overlap, `margin` values at the edge of each side have no weight, and the weights rise
    between. Equal values stay what they are, to the bit.

    Args:
        whole: Is written to.
        piece: Has the whole's size but along `axis`.
        start: Where the piece begins.
        end: Where what is there ends; 0 for nothing.
        margin: Values at the edge of a tile that the other tile gives.
        axis: 2 or 3, of (B, C, H, W).
    """
    if end:
        first, last = start + margin, end - margin
        shape = [-1 if axis == each else 1 for each in range(4)]
        steps = torch.arange(1, last - first + 1, device=piece.device, dtype=piece.dtype)
        weights = (steps / (last - first + 1)).view(shape)
        there = whole.narrow(axis, first, last - first)
        there += (piece.narrow(axis, margin, last - first) - there) * weights
    else:
        last = start
    rest = start + piece.shape[axis] - last
    whole.narrow(axis, last, rest).copy_(piece.narrow(axis, last - start, rest))


def run_in_tiles(
    run: Run,
    picture: Tensor,
    scale: int,
    tile: int,
    overlap: int,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return `run` of a picture, computed on overlapping squares that are blended.

    Besides the result, memory holds one tile and one row of them. All tiles have one size. In an
    overlap, the outer quarter at the edge of a tile has no weight, and between the weights of the
    two tiles rise and fall and sum to 1: where pixels depend on neighbours at most `overlap // 4`
    away, the result is that of the whole picture.

    Args:
        run: Maps (B, C, h, w) to (B, C', scale·h, scale·w).
        picture: (B, C, H, W) of any size; along a side shorter than a tile there is one.
        scale: How much larger the result is.
        tile: Side of a tile, in pixels of `picture`.
        overlap: What neighbouring tiles share at least, in pixels of `picture`.
        on_tile: Called after each tile with the number of tiles done and of all.

    Returns:
        (B, C', scale·H, scale·W), where `run` leaves it and in its dtype.

    Raises:
        ValueError: An argument is out of range, or `run` gives another size than `scale` says.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(
            f"tile must be 1 or more, and overlap 0 or more and less than tile; got {tile=}, "
            f"{overlap=}"
        )
    batch, _, height, width = picture.shape
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    tall, wide = min(tile, height), min(tile, width)
    margin = overlap // 4 * scale
    whole: Tensor | None = None
    below = 0  # where what is done ends
    for i, top in enumerate(tops):
        row: Tensor | None = None
        right = 0
        for j, left in enumerate(lefts):
            piece = run(picture[..., top : top + tall, left : left + wide].contiguous())
            if piece.shape[0] != batch or piece.shape[2:] != (scale * tall, scale * wide):
                raise ValueError(
                    f"at {scale=} a tile of {wide}x{tall} pixels becomes one of "
                    f"{scale * wide}x{scale * tall}; the network gave the shape "
                    f"{tuple(piece.shape)}"
                )
            if row is None:
                row = piece.new_empty(*piece.shape[:3], scale * width)
            _join(row, piece, scale * left, right, margin, 3)
            right = scale * (left + wide)
            if on_tile is not None:
                on_tile(i * len(lefts) + j + 1, len(tops) * len(lefts))
        if whole is None:
            whole = row.new_empty(*row.shape[:2], scale * height, scale * width)
        _join(whole, row, scale * top, below, margin, 2)
        below = scale * (top + tall)
    return whole
