"""A function of images run another way: on tiles of a large image, or on its eight symmetries.

Both take the network as a function of images (B, C, H, W), so that a bare network, one prepared
by `repeat` and one of BasicSR's models do alike, and one can be given to the other.
"""

from collections.abc import Callable, Iterator, Sequence
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


def self_ensemble(run: Run, image: Tensor) -> Tensor:
    """Return the mean of `run` over the eight flips and rotations of an image, each turned back.

    Args:
        run: Maps (B, C, H, W) to (B, C', s·H, s·W), for images on their side too.
        image: (B, C, H, W).

    Returns:
        (B, C', s·H, s·W). A `run` that turns with the image is unchanged, to the bit: means are
        taken of two at a time.
    """
    return _ensemble(run, image, _SYMMETRIES)


def _ensemble(run: Run, image: Tensor, symmetries: Sequence[Run]) -> Tensor:
    if not symmetries:
        return run(image)
    turn, *others = symmetries
    plain = _ensemble(run, image, others)
    turned = turn(_ensemble(run, turn(image), others))
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


def _row_of_tiles(
    run: Run,
    strip: Tensor,
    scale: int,
    lefts: Sequence[int],
    wide: int,
    margin: int,
    batch: int,
    on_tiles: Callable[[int], None],
) -> Tensor:
    """Return `run` of a strip (B, C, h, W) as high as a tile, its tiles blended."""
    count, _, tall, width = strip.shape
    row: Tensor | None = None
    right = 0  # where what is done ends
    for first in range(0, len(lefts), batch):
        together = lefts[first : first + batch]
        tiles = [strip[..., left : left + wide] for left in together]
        pieces = run(torch.cat(tiles) if len(tiles) > 1 else tiles[0].contiguous())
        if pieces.shape[0] != count * len(tiles) or pieces.shape[2:] != (
            scale * tall,
            scale * wide,
        ):
            raise ValueError(
                f"at {scale=} a tile of {wide}x{tall} pixels becomes one of "
                f"{scale * wide}x{scale * tall}; the network gave the shape "
                f"{tuple(pieces.shape)}"
            )
        if row is None:
            row = pieces.new_empty(count, *pieces.shape[1:3], scale * width)
        for left, piece in zip(together, pieces.split(count), strict=True):
            _join(row, piece, scale * left, right, margin, 3)
            right = scale * (left + wide)
        on_tiles(len(tiles))
    return row


def rows_in_tiles(
    run: Run,
    image: Tensor,
    scale: int,
    tile: int,
    overlap: int,
    on_tile: Callable[[int, int], None] | None = None,
    batch: int = 1,
) -> Iterator[Tensor]:
    """Yield the rows of what `run_in_tiles` returns, from the top, as they are finished.

    Memory holds the tiles that are computed together and at most two rows of tiles.

    Args:
        run: As in `run_in_tiles`.
        image: (B, C, H, W), of any dtype and place that `run` takes.
        scale: As in `run_in_tiles`.
        tile: As in `run_in_tiles`.
        overlap: As in `run_in_tiles`.
        on_tile: As in `run_in_tiles`.
        batch: How many neighbouring tiles are given to `run` at once: (batch·B, C, h, w).

    Yields:
        (B, C', n, scale·W); the n sum to scale·H. Not to be written to.

    Raises:
        ValueError: As `run_in_tiles`.
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

    def count(tiles: int) -> None:
        nonlocal done
        done += tiles
        if on_tile is not None:
            on_tile(done, len(tops) * len(lefts))

    held: Tensor | None = None  # rows that the next tiles still have a say in
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        strip = image[:, :, top : top + tall]
        row = _row_of_tiles(run, strip, scale, lefts, wide, margin, batch, count)
        if held is not None:
            joined = torch.empty_like(row)
            joined[:, :, : held.shape[2]] = held
            _join(joined, row, 0, held.shape[2], margin, 2)
            row = joined
        finished = scale * (following - top)
        yield row[:, :, :finished]
        held = row[:, :, finished:].clone()
        del row  # before the next one is computed


def run_in_tiles(
    run: Run,
    image: Tensor,
    scale: int,
    tile: int,
    overlap: int,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return `run` of an image, computed on overlapping squares that are blended.

    Besides the result, memory holds one tile and at most two rows of them. All tiles have one
    size. In an overlap, the outer quarter at the edge of a tile has no weight, and between the
    weights of the two tiles rise and fall and sum to 1: where pixels depend on neighbours at most
    `overlap // 4` away, the result is that of the whole image.

    Args:
        run: Maps (B, C, h, w) to (B, C', scale·h, scale·w).
        image: (B, C, H, W) of any size; along a side shorter than a tile there is one.
        scale: How much larger the result is.
        tile: Side of a tile, in pixels of `image`.
        overlap: What neighbouring tiles share at least, in pixels of `image`.
        on_tile: Called after each tile with the number of tiles done and of all.

    Returns:
        (B, C', scale·H, scale·W), where `run` leaves it and in its dtype.

    Raises:
        ValueError: An argument is out of range, or `run` gives another size than `scale` says.
    """
    whole: Tensor | None = None
    done = 0
    for rows in rows_in_tiles(run, image, scale, tile, overlap, on_tile):
        if whole is None:
            whole = rows.new_empty(*rows.shape[:2], scale * image.shape[2], rows.shape[3])
        whole[:, :, done : done + rows.shape[2]] = rows
        done += rows.shape[2]
    return whole
