"""Images as BasicSR's data sets find them: in an LMDB by its list, or in one folder."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dlgsanet_arch.data.databases import DATA, META_INFO, open_database
from dlgsanet_arch.data.images import SUFFIXES
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named


@dataclass
class Stored:
    """The images of an LMDB or of a folder.

    Args:
        path: The LMDB's folder, or the folder of images.
        is_database: Which of the two.
        keys: What BasicSR calls the images, sorted: keys, or file names without suffix.
        files: File names by key; of a folder alone.
        faults: What is wrong with the whole, with the remedy, one a line.
    """

    path: Path
    is_database: bool
    keys: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def place(self, key: str) -> Path:
        """Where an image is, for messages: its file, or its key behind the database's path."""
        return self.path / self.files.get(key, key)

    @contextmanager
    def reader(self) -> Iterator["Reader"]:
        """Open it for reading."""
        if not self.is_database:
            yield Reader(self, None)
            return
        with open_database(self.path) as environment, environment.begin(buffers=False) as read:
            yield Reader(self, read)


class Reader:
    """Reads images, undecoded."""

    def __init__(self, stored: Stored, transaction) -> None:
        self._stored = stored
        self._transaction = transaction

    def __call__(self, key: str) -> bytes:
        """Return the bytes of an image, empty where its entry or file is missing."""
        if self._transaction is not None:
            return self._transaction.get(key.encode()) or b""
        try:
            return self._stored.place(key).read_bytes()
        except OSError:
            return b""


def _quoted(names: Sequence[str]) -> str:
    return named([repr(name) for name in names])


def _database(path: Path) -> Stored:
    stored = Stored(path, is_database=True)
    with open_database(path) as environment, environment.begin() as read:
        entries = {bytes(key).decode(errors="replace") for key, _ in read.cursor()}
    try:
        lines = (path / META_INFO).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        stored.faults.append(
            f"has no {META_INFO}, by which BasicSR knows the keys; make the database again"
        )
        stored.keys = sorted(entries)
        return stored
    blank = sum(not line.strip() for line in lines)
    if blank:
        stored.faults.append(
            f"{META_INFO} has {blank} blank lines, each of which BasicSR takes for a key; remove "
            "them"
        )
    # as BasicSR reads a line: all before the first dot
    listed = Counter(line.split(".")[0] for line in lines if line.strip())
    twice = sorted(key for key, count in listed.items() if count > 1)
    if twice:
        stored.faults.append(
            f"{META_INFO} names keys more than once, or keys that differ only behind a dot: "
            f"{_quoted(twice)}; --fix writes a new database"
        )
    missing_keys = sorted(listed.keys() - entries)
    if missing_keys:
        stored.faults.append(
            f"{META_INFO} names keys that are not in the database: {_quoted(missing_keys)}; --fix "
            "writes a new one without them"
        )
    silent = sorted(entries - listed.keys())
    if silent:
        stored.faults.append(
            f"{len(silent)} entries are not named in {META_INFO} and are never read: "
            f"{_quoted(silent)}; make the database again, or --fix"
        )
    stored.keys = sorted(listed.keys() & entries)
    return stored


def _folder(path: Path) -> Stored:
    stored = Stored(path, is_database=False)
    inner, others = [], []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            inner.append(entry.name)
        elif entry.suffix.lower() not in SUFFIXES:
            others.append(entry.name)
        elif entry.stem in stored.files:
            stored.faults.append(
                f"{stored.files[entry.stem]!r} and {entry.name!r} have one name; remove one"
            )
        else:
            stored.files[entry.stem] = entry.name
    if others:
        stored.faults.append(
            f"holds files that are not images, and BasicSR fails when it reads them: "
            f"{_quoted(others)}; move them away"
        )
    if inner:
        stored.faults.append(
            f"has folders in it, which BasicSR passes over: {_quoted(inner)}; "
            "`train --hr` takes images of all of them"
        )
    stored.keys = sorted(stored.files)
    return stored


def look_into(path: Path) -> Stored:
    """List the images of an LMDB or of a folder.

    Raises:
        UserError: It is neither, cannot be read, or holds nothing.
    """
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {reason}: correct the path, or make the data set (`dlgsanet data --help`)"
        )
    try:
        stored = _database(path) if (path / DATA).exists() else _folder(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not stored.keys and not stored.faults:
        raise UserError(f"{path} holds no images: looked for {', '.join(SUFFIXES)}")
    return stored
