"""Images in folders: which there are, and what they are called in a data set."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path, PurePath
from urllib.parse import quote

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named

# The suffixes that make a file an image, in lower case, and the format that each announces.
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
SUFFIXES |= {".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WebP", ".bmp": "BMP"}
# Suffixes of images that are not read: they are counted.
_OTHERS = """.heic .heif .avif .jxl .jp2 .j2k .gif .tga .ico .qoi .svg .psd .xcf .exr .hdr .ppm .pgm
.pnm .dng .cr2 .cr3 .nef .arw .orf .raf .rw2"""
_NOT_READ = frozenset(_OTHERS.split())

# A key is also a file's name, of 255 bytes at most: this leaves room for `_s00001` and `.png`.
KEY_LENGTH = 200


def image_key(relative: PurePath) -> str:
    """The key of an image, given by its path from the data set's folder, in LMDBs and test sets.

    BasicSR encodes keys as ASCII, ends them at the first dot or space of a `meta_info.txt` line,
    and names results by what follows the last slash. So letters, digits, `-` and `_` stay, `+`
    stands for the slash, and every other character's UTF-8 bytes are written as `%` and two hex
    digits: ``city/night 1.png`` has the key ``city+night%201``. A long key ends in `~` and a hash.
    """
    # é may be one character or two, by the system that wrote it
    name = unicodedata.normalize("NFC", relative.with_suffix("").as_posix())
    # surrogateescape: names that are not UTF-8 come from the file system with surrogates
    parts = (quote(part, safe="", errors="surrogateescape") for part in name.split("/"))
    key = "+".join(parts).replace(".", "%2E").replace("~", "%7E")
    if len(key) <= KEY_LENGTH:
        return key
    digest = sha256(key.encode("ascii")).hexdigest()[:16]
    return f"{key[: KEY_LENGTH - len(digest) - 1]}~{digest}"


def _natural_order(relative: PurePath) -> tuple[list[str | int], str]:
    """Sort numbers by value, and upper and lower case together."""
    pieces = re.split("([0-9]+)", relative.as_posix().casefold())
    return [int(each) if n % 2 else each for n, each in enumerate(pieces)], str(relative)


def check_folder(path: Path, fix: str) -> None:
    """Raise a UserError that states the fix unless a path is a folder."""
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {reason}: {fix}")


def walk_folders(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each visible folder at and below one, once, with its folders and its files.

    Links are followed. Folders that are removed from the list are not entered. OSError if one
    cannot be read.
    """

    def failed(error: OSError) -> None:
        raise error

    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        current, real = Path(name), os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # links last: images in folders beside them are named without them
        visible = (each for each in folders if not each.startswith("."))
        folders[:] = sorted(visible, key=lambda each: ((current / each).is_symlink(), each))
        yield current, folders, sorted(each for each in files if not each.startswith("."))


def not_read(paths: Iterable[PurePath]) -> str:
    """Count the images that are not read by their suffixes: "2 .heic, 1 .gif"; "" without any."""
    left = Counter(path.suffix.lower() for path in paths)
    return ", ".join(f"{left[each]} {each}" for each in sorted(left.keys() & _NOT_READ))


def left_out(counted: str) -> str:
    """Return the closing line on what `not_read` counted."""
    return f"left out, as these are not read: {counted}; convert them to PNG first"


def no_images(folder: Path, counted: str) -> UserError:
    """Return the error of a folder without images that are read; see `not_read`."""
    more = f"; there are files that are not read: {counted}" if counted else ""
    return UserError(f"no images below {folder}: looked for {', '.join(SUFFIXES)}{more}")


def walk_files(folder: Path) -> list[Path]:
    """Return all visible files below a folder; UserError if it is missing or cannot be read."""
    check_folder(folder, "name a folder of images")
    try:
        return [current / name for current, _, files in walk_folders(folder) for name in files]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def left_out_of(*folders: Path | None) -> list[str]:
    """Return the line of `left_out` on all images below some folders, if any are not read."""
    files = {path for folder in folders if folder for path in walk_files(folder)}
    return [left_out(counted)] if (counted := not_read(files)) else []


def walk_images(folder: Path) -> list[Path]:
    """Find all images below a folder, by `SUFFIXES`: paths from there, ``a2`` before ``a10``.

    UserError if the folder is missing, cannot be read, or holds no images.
    """
    files = walk_files(folder)
    # A link to nothing counts, and reading it says so: an image is missing there.
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise no_images(folder, not_read(files))
    return sorted((path.relative_to(folder) for path in paths), key=_natural_order)


def sharing(keys: Mapping[object, str]) -> str:
    """Name the things that have one key, given by thing: "a.JPG and a.png"; "" if none do."""
    by_key = defaultdict(list)
    for thing, key in keys.items():
        by_key[key].append(str(thing))
    return named([" and ".join(group) for group in by_key.values() if len(group) > 1], 3)


def find_images(folder: Path) -> dict[str, Path]:
    """Find all images below a folder as `walk_images` does, by their keys, which must differ."""
    keys = {relative: image_key(relative) for relative in walk_images(folder)}
    if equal := sharing(keys):
        raise UserError(
            f"images in {folder} differ in their suffixes only, and would share one name in the "
            f"data set: {equal}; rename or remove one of each"
        )
    return {key: folder / relative for relative, key in keys.items()}
