"""LMDBs of images as BasicSR's data sets read them, complete or absent.

A database is a folder: `data.mdb`, images as PNG by key; `meta_info.txt`, BasicSR's list of
them; and, of those made here, `recipe.json`, what it was made from. It is made under another name
and renamed when it is complete; after an interruption the next run continues it.
"""

import errno
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import lmdb

from dlgsanet_arch._basicsr import shared_environments
from dlgsanet_arch.data.images import ANY_GROWTH, MAX_GROWTH, stored_size
from dlgsanet_arch.data.making import PNG_COMPRESSION, Recipe, fits, made_before
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import (
    RECIPE,
    read_json,
    replace_folder,
    unfinished,
    write_atomically,
    write_json,
)
from dlgsanet_arch.hints import quoted

DATA = "data.mdb"
META_INFO = "meta_info.txt"
AGAIN = "copy it again, or make it again"

# Where a database starts and what it is doubled from whenever it is full. LMDB reserves as many
# addresses, not memory; BasicSR's 1 TiB is refused where addresses are limited.
FIRST_MAP_SIZE = 2**26
# Bytes that an entry takes at least: its place in a page, its header and a key of one byte.
SMALLEST_ENTRY = 11
# A disk with fewer bytes free than one transaction may write counts as full.
FULL = 2**26


def is_database(path: Path) -> bool:
    """Whether a folder is an LMDB."""
    return (path / DATA).exists()


@contextmanager
def open_database(path: Path) -> Iterator[lmdb.Environment]:
    """Open a finished database for reading, or use the environment that a data set holds open.

    UserError if it is missing or damaged; errors inside the block count too.
    """
    if not (path / DATA).is_file():
        raise UserError(f"{path} is not an LMDB: it holds no data.mdb")
    shared = shared_environments.get(os.path.realpath(path))  # lmdb opens a file once
    try:
        if shared is not None:
            yield shared
            return
        # lock=False: nobody writes a finished database, and its folder may be read-only
        with lmdb.open(
            str(path), readonly=True, lock=False, create=False, readahead=False, max_readers=1
        ) as environment:
            # LMDB does not check this itself: reading past the file's end would kill the process
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            size = (path / DATA).stat().st_size
            if size < needed:
                raise UserError(f"{path} is cut short, {size:,} of {needed:,} bytes: {AGAIN}")
            if needed > max(ANY_GROWTH, MAX_GROWTH * stored_size(path / DATA)):
                raise UserError(f"{path} is damaged: most of its bytes are not there; {AGAIN}")
            yield environment
    except lmdb.Error as error:
        raise UserError(f"{path} is damaged or cut short ({error}): {AGAIN}") from error


def _listed_keys(path: Path) -> list[str]:
    """The keys of a database's list, as BasicSR reads a line: all before the first dot, or ""."""
    lines = (path / META_INFO).read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.split(".")[0] if line.strip() else "" for line in lines]


def _entry_keys(path: Path) -> list[str]:
    """All keys of a database by its pages; damaged ones may lead around in circles."""
    with open_database(path) as environment, environment.begin() as read:
        claimed = environment.stat()["entries"]
        most = min(claimed, (path / DATA).stat().st_size // SMALLEST_ENTRY)
        stored = islice(read.cursor().iternext(values=False), most + 1)
        keys = [bytes(key).decode(errors="replace") for key in stored]
    if len(keys) != claimed:
        raise UserError(
            f"{path} is damaged: it does not hold the {claimed:,} entries that it claims; {AGAIN}"
        )
    return keys


@contextmanager
def open_entry(path: Path, key: str) -> Iterator[memoryview]:
    """The value of a key, empty if it is missing or LMDB cannot have such a key."""
    with open_database(path) as environment, environment.begin(buffers=True) as read:
        try:
            value = read.get(key.encode(), b"")
        except lmdb.BadValsizeError:  # a key that is empty, or too long
            value = b""
        yield memoryview(value)


def check_keys(path: Path) -> tuple[list[str], list[str]]:
    """Compare the list of a database with the keys of its entries.

    Returns the keys that are in both, sorted, and faults, phrases that follow the database's name.
    """
    entries = set(_entry_keys(path))
    try:
        keys = _listed_keys(path)
    except OSError:
        return sorted(entries), [f"has no {META_INFO}, by which BasicSR knows the keys"]
    listed, faults = Counter(key for key in keys if key), []
    if blank := keys.count(""):
        faults.append(f"has {blank} blank lines in {META_INFO}, each of which is taken for a key")
    if twice := sorted(key for key, count in listed.items() if count > 1):
        faults.append(f"lists keys more than once, or with more behind a dot: {quoted(twice)}")
    unlisted = sorted(entries - listed.keys())
    if missing := sorted(listed.keys() - entries):
        dots = any(key.split(".")[0] in listed for key in unlisted)
        reason = " (keys end at their first dot: name them without)" if dots else ""
        faults.append(f"lists keys that it does not hold{reason}: {quoted(missing)}")
    elif unlisted:
        faults.append(
            f"holds {len(unlisted)} images that {META_INFO} does not list and that are never "
            f"read: {quoted(unlisted)}"
        )
    return sorted(entries & listed.keys()), faults


def is_finished(path: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Whether a database of this recipe is there, complete; see `made_before`."""

    def change(stored: Recipe) -> str:
        with open_database(path) as environment:
            count = environment.stat()["entries"]
        lines = len(_listed_keys(path))
        if count == lines == stored["entries"]:
            return ""
        return f"{count} entries, {lines} lines in {META_INFO}, {stored['entries']} written"

    return made_before(path, recipe, change, overwrite=overwrite) is not None


@contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    """Turn LMDB's report of a full or failing disk into the OSError that files would raise."""
    try:
        yield
    except lmdb.MapFullError:
        raise
    except lmdb.Error as error:
        # Where a part of a page still fitted, LMDB speaks of an input/output error.
        full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free < FULL
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


class DatabaseWriter:
    """Makes one database; `finish` gives it its name, and `close` leaves it to be continued.

    `recipe` is all that decides about its content, in JSON types: an unfinished database of the
    same recipe is continued, one of another is thrown away.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self._path, self._recipe, self._folder = path, dict(recipe), unfinished(path)
        if not fits(read_json(self._folder / RECIPE), self._recipe):
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / RECIPE, self._recipe)
        with _os_errors(self._folder):
            self._environment = lmdb.open(
                str(self._folder), map_size=FIRST_MAP_SIZE, readahead=False
            )
        self.close = self._environment.close

    def has(self, key: str) -> bool:
        """Whether a key is there, from this run or an earlier one."""
        with self._environment.begin() as transaction:
            return transaction.cursor().set_key(key.encode("ascii"))

    def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Write keys with their PNG files, all or none; OSError if the disk is full or fails."""
        while True:
            try:
                with _os_errors(self._folder), self._environment.begin(write=True) as transaction:
                    for key, data in entries:
                        transaction.put(key.encode("ascii"), data)
                return
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])

    def finish(self) -> None:
        """Write `meta_info.txt`, add the number of entries to the recipe, rename the database."""
        lines = []
        with self._environment.begin() as transaction:
            for key, data in transaction.cursor():
                width, height = struct.unpack(">II", data[16:24])  # of a PNG file
                lines.append(f"{key.decode('ascii')}.png ({height},{width},3) {PNG_COMPRESSION}\n")
        self.close()
        write_atomically(self._folder / META_INFO, "".join(lines).encode("ascii"))
        write_json(self._folder / RECIPE, {**self._recipe, "entries": len(lines)})
        (self._folder / "lock.mdb").unlink(missing_ok=True)
        replace_folder(self._folder, self._path)
