"""The index of an LMDB, read without its values, equals what the lmdb package finds."""

import lmdb
import numpy as np
import pytest

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline.lmdb_index import read_index


def entries_of(path):
    """What lmdb itself finds."""
    with (
        lmdb.open(str(path), readonly=True, lock=False) as environment,
        environment.begin() as read,
    ):
        return {key.decode(): value for key, value in read.cursor()}


def values_at(path):
    index = read_index(path / "data.mdb")
    content = (path / "data.mdb").read_bytes()
    return {key: content[place.start : place.start + place.length] for key, place in index.items()}


@pytest.mark.parametrize(
    ("count", "longest"), [(0, 1), (1, 0), (1, 100_000), (50, 3000), (5000, 60), (300, 9000)]
)
def test_the_index_is_lmdbs(tmp_path, count, longest):
    """Values within a page and on pages of their own, trees of one to three levels."""
    rng = np.random.default_rng(0)
    with lmdb.open(str(tmp_path), map_size=2**26) as environment:
        for start in range(0, count, 1000):  # several transactions: both meta pages are used
            with environment.begin(write=True) as put:
                for index in range(start, min(start + 1000, count)):
                    key = f"{index * 7919 % 10_007}_{'k' * int(rng.integers(0, 200))}"
                    put.put(key.encode(), rng.bytes(int(rng.integers(0, longest + 1))))
    assert values_at(tmp_path) == entries_of(tmp_path)
    assert list(read_index(tmp_path / "data.mdb")) == list(entries_of(tmp_path))
    assert len(entries_of(tmp_path)) == count


def test_what_was_deleted_and_replaced_is_not_in_the_index(tmp_path):
    with lmdb.open(str(tmp_path), map_size=2**26) as environment:
        for round_ in range(5):
            with environment.begin(write=True) as change:
                for index in range(300):
                    if (index + round_) % 3:
                        change.put(f"{index}".encode(), bytes([round_]) * (index * 37 % 9000))
                    else:
                        change.delete(f"{index}".encode())
    assert values_at(tmp_path) == entries_of(tmp_path)


def test_a_database_that_is_open_in_this_process_is_read(tmp_path):
    with lmdb.open(str(tmp_path)) as environment:
        with environment.begin(write=True) as put:
            put.put(b"a", b"b")
        assert values_at(tmp_path) == {"a": b"b"}


@pytest.fixture
def database(tmp_path):
    with (
        lmdb.open(str(tmp_path), map_size=2**26) as environment,
        environment.begin(write=True) as put,
    ):
        for index in range(2000):
            put.put(f"key{index}".encode(), b"x" * (index % 50))
    return tmp_path / "data.mdb"


def test_damaged_files_are_refused_or_read(database):
    """Whatever is overwritten, the answer is an index or an error that names the file."""
    whole = database.read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(200):
        damaged = bytearray(whole)
        start = int(rng.integers(0, len(damaged)))
        length = int(rng.integers(1, 4000))
        damaged[start : start + length] = rng.bytes(len(damaged[start : start + length]))
        database.write_bytes(damaged)
        try:
            read_index(database)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(str(database) in refusal for refusal in refusals)


@pytest.mark.parametrize("length", [0, 10, 4096, 8192, 40_000])
def test_cut_files_are_refused(database, length):
    database.write_bytes(database.read_bytes()[:length])
    with pytest.raises(UserError, match="cut short" if length == 40_000 else "make it anew"):
        read_index(database)


def test_databases_within_a_database_are_refused(tmp_path):
    with lmdb.open(str(tmp_path), max_dbs=1) as environment:
        environment.open_db(b"inner")
    with pytest.raises(UserError, match="databases within the database"):
        read_index(tmp_path / "data.mdb")
