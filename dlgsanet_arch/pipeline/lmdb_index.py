"""The keys of an LMDB with the places of their values, read without the values.

The lmdb package touches every page of a value that it passes, so that listing the keys of a
training set reads all its images: a minute or more from a cold disk. The pages of LMDB's B+ tree
are a ten-thousandth of that. Their format is LMDB's data version 1, which has not changed since
2013: a header of 16 bytes, then the offsets of the page's nodes, then the nodes. As nothing is
opened by LMDB, a database that is open in this process can be read, too.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dlgsanet_arch.errors import UserError

_HEADER = struct.Struct("=QHHHH")  # number, padding, flags, end of the offsets, start of the nodes
_NODE = struct.Struct("=HHHH")  # low and high half of a size or page, flags, length of the key
_META = struct.Struct("=IIQQ")  # magic, version, address, size of the map
_TREE = struct.Struct("=IHHQQQQQ")  # page size, flags, depth, 3 counts of pages, entries, root
_LAST = struct.Struct("=QQ")  # last page, transaction
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF = 0x01, 0x02
_ON_OTHER_PAGES = 0x01  # flag of a node: its value starts on a page of its own
_OTHER_KINDS = 0x06  # flags of nodes that are databases or hold several values
_NO_PAGE = 2**64 - 1


class Value(NamedTuple):
    """Where a value is in `data.mdb`.

    Args:
        start: Its first byte.
        length: Its number of bytes.
    """

    start: int
    length: int


class _Meta(NamedTuple):
    """What one of the two pages at the start of an LMDB says; the one of the later transaction."""

    transaction: int
    page_size: int
    root: int
    last_page: int


def _read_meta(file: BinaryIO, start: int) -> _Meta:
    file.seek(start + _HEADER.size)
    data = file.read(_META.size + 2 * _TREE.size + _LAST.size)
    magic, version, *_ = _META.unpack_from(data)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError("its first page is not of LMDB's data version 1")
    page_size = _TREE.unpack_from(data, _META.size)[0]
    root = _TREE.unpack_from(data, _META.size + _TREE.size)[-1]
    last_page, transaction = _LAST.unpack_from(data, _META.size + 2 * _TREE.size)
    return _Meta(transaction, page_size, root, last_page)


def _nodes(file: BinaryIO, meta: _Meta, number: int) -> Iterator[tuple[bytes, Value]]:
    """Yield the entries at and below a page."""
    if number > meta.last_page:
        raise ValueError(f"it has no page {number}, to which another one points")
    page_start = number * meta.page_size
    file.seek(page_start)
    page = file.read(meta.page_size)
    _, _, flags, end, _ = _HEADER.unpack_from(page)
    if not flags & (_BRANCH | _LEAF):
        raise ValueError(f"its page {number} is neither branch nor leaf")
    for (offset,) in struct.iter_unpack("=H", page[_HEADER.size : end]):
        low, high, node_flags, key_length = _NODE.unpack_from(page, offset)
        key_start = offset + _NODE.size
        if flags & _BRANCH:
            yield from _nodes(file, meta, low | high << 16 | node_flags << 32)
            continue
        if node_flags & _OTHER_KINDS:
            raise ValueError("it holds databases within the database")
        value_start = key_start + key_length
        key, length = page[key_start:value_start], low | high << 16
        if node_flags & _ON_OTHER_PAGES:
            (first,) = struct.unpack_from("=Q", page, value_start)
            yield key, Value(first * meta.page_size + _HEADER.size, length)
        else:
            yield key, Value(page_start + value_start, length)


def read_index(path: Path) -> dict[str, Value]:
    """Return the keys of an LMDB, in its order, with the places of their values.

    Args:
        path: Its `data.mdb`.

    Raises:
        UserError: It is not an LMDB, damaged or cut short.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        try:
            first = _read_meta(file, 0)
            meta = max(first, _read_meta(file, first.page_size))
            size = path.stat().st_size
            needed = (meta.last_page + 1) * meta.page_size
            if size < needed:
                raise ValueError(f"it is cut short, {size:,} of {needed:,} bytes are there")
            nodes = () if meta.root == _NO_PAGE else _nodes(file, meta, meta.root)
            index = {key.decode(errors="replace"): value for key, value in nodes}
            if any(value.start + value.length > size for value in index.values()):
                raise ValueError("it has values behind its end")
        except (struct.error, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}; copy or make it anew") from error
    return index
