"""Pack training images and a test set into one archive, for a machine without a network.

    python scripts/pack_training_data.py --hr BSDS400 CID22 --test Set14 --most 50 -o images.tar

Training images become WebP at the highest quality of 95 to 90 with which all of it takes at most
--most megabytes; a file that is smaller already stays as it is. The test set keeps every pixel. The
archive has train/FOLDER/NAME and test/FOLDER/NAME; docs/recipe.md shows how to train on it.
"""

import argparse
import bisect
import io
import os
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from dlgsanet_arch.data.finding import find_images
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import write_atomically

QUALITIES = range(95, 89, -1)
METHOD = 4  # of WebP: 6 is four times slower
BLOCK = tarfile.BLOCKSIZE  # of a header; contents are filled up to whole blocks

Files = dict[str, bytes]  # by name in the archive


def found_in(folders: list[Path], part: str) -> dict[str, Path]:
    """Return the images of folders by their names in the archive, without suffixes."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"folders need different names; got {', '.join(names)}")
    return {
        f"{part}/{name}/{path.relative_to(folder).with_suffix('')}": path
        for name, folder in zip(names, folders, strict=True)
        for path in find_images(folder).values()
    }


def encoded(path: Path, quality: int | None) -> tuple[str, bytes]:
    """Return a suffix and an image as WebP, lossless with None, or its file if that is smaller."""
    rgb, file = read_8_bits(path).pixels[..., ::-1], io.BytesIO()
    settings = {"lossless": True} if quality is None else {"quality": quality}
    Image.fromarray(rgb.copy()).save(file, "WEBP", method=METHOD, **settings)
    made, given = file.getvalue(), path.read_bytes()
    return (".webp", made) if len(made) < len(given) else (path.suffix, given)


def blocks(data: bytes) -> int:
    """Return what a file takes in an archive."""
    return BLOCK + -(-len(data) // BLOCK) * BLOCK


def encode(images: dict[str, Path], quality: int | None, most: float) -> Files | None:
    """Encode images; None as soon as they take more than `most` bytes."""
    made: Files = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(partial(encoded, quality=quality), images.values())
        for name, (suffix, data) in zip(images, files, strict=True):
            made[name + suffix] = data
            most -= blocks(data)
            if most < 0:
                pool.shutdown(cancel_futures=True)
                return None
    return made


def archived(files: Files) -> bytes:
    """Return a tar archive of files; equal files give equal archives."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def report(files: Files) -> None:
    """Print number and size of the images of each folder."""
    for folder in dict.fromkeys("/".join(name.split("/")[:2]) for name in files):
        sizes = [len(data) for name, data in files.items() if name.startswith(f"{folder}/")]
        print(f"{folder:<24} {len(sizes):>5} images {sum(sizes) / 1e6:>7.1f} MB")


def pack(arguments: argparse.Namespace) -> None:
    """Encode, print sizes and write the archive."""
    started, most = time.monotonic(), arguments.most * 1e6 - tarfile.RECORDSIZE
    test = encode(found_in(arguments.test, "test"), None, most) or {}
    train, made = found_in(arguments.hr, "train"), {}

    def fits(quality: int) -> bool:
        made[quality] = encode(train, quality, most - sum(map(blocks, test.values())))
        return made[quality] is not None

    index = bisect.bisect_left(QUALITIES, True, key=fits)
    if index == len(QUALITIES) or (arguments.test and not test):
        raise UserError(
            f"--most {arguments.most:g}: more is needed even at quality {QUALITIES[-1]}; raise it, "
            "or leave out a folder"
        )
    quality = QUALITIES[index]
    files = made[quality] | test
    report(files)
    data = archived(files)
    write_atomically(arguments.output, data)
    seconds = time.monotonic() - started
    print(f"{arguments.output}: {len(data) / 1e6:.1f} MB at quality {quality}, {seconds:.0f} s")


def main() -> None:
    """Read the command line; exit with 1 and a message if the images do not fit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hr", type=Path, nargs="+", required=True, help="folders to train on")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help="folders of test sets")
    parser.add_argument("--most", type=float, required=True, help="size of the archive in MB")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the archive, a .tar file")
    try:
        pack(parser.parse_args())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
