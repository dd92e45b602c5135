"""What the makers of training sets and of test sets share: sources, recipes, bad images."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dlgsanet_arch.data import SCALES
from dlgsanet_arch.data.images import ImageError, read_8_bits, read_bytes
from dlgsanet_arch.data.workers import with_progress
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import RECIPE, read_json
from dlgsanet_arch.hints import named

# HR cut to a multiple of it serves all scales with one and the same database.
HR_MULTIPLE = math.lcm(*SCALES)
PNG_COMPRESSION = 1

ImageArray = NDArray[np.uint8]
Recipe = Mapping[str, Any]


class Source(NamedTuple):
    """An image: its name in the data set, its HR file, and given LR files by scale."""

    key: str
    hr: Path
    lr: Mapping[int, Path] = {}


def checked_scales(scales: Iterable[int]) -> list[int]:
    """Return scales in ascending order, each once; ValueError unless all are of `SCALES`."""
    result = sorted(set(scales))
    if not result or not set(result) <= set(SCALES):
        raise ValueError(f"scales must be from {SCALES}, got {scales=}")
    return result


def crop_to_multiple(image: ImageArray, multiple: int) -> ImageArray:
    """Cut rows and columns off the bottom and the right so that `multiple` divides both sides."""
    height, width = (side - side % multiple for side in image.shape[:2])
    return image[:height, :width]


def encode_png(image: ImageArray) -> bytes:
    """Encode an image (H, W, 3) in BGR without loss."""
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION])[1].tobytes()


# Recipes: what a folder was made from


def _file_sha256(path: Path) -> str:
    try:
        return sha256(read_bytes(path)).hexdigest()
    except ImageError:
        return "cannot be read"  # `Findings.scan` says why


def file_hashes(sources: Iterable[Source]) -> dict[Path, str]:
    """SHA-256 of all files of some images."""
    paths = dict.fromkeys(path for each in sources for path in (each.hr, *each.lr.values()))
    return dict(with_progress(_file_sha256, list(paths), 1, "looking for changes"))


def images_sha256(sources: Iterable[Source], scale: int, hashes: Mapping[Path, str]) -> str:
    """SHA-256 over the names and files that decide about images of a scale; 1 is HR."""
    lines = []
    for each in sources:
        files = [each.hr, *([each.lr[scale]] if scale in each.lr else [])]
        lines.append(" ".join([each.key, *(hashes[path] for path in files)]))
    return sha256("\n".join(lines).encode()).hexdigest()


def fits(stored: Recipe | None, wanted: Recipe) -> bool:
    """Whether a folder was made by a recipe; what is stored may hold further facts."""
    return stored is not None and all(stored.get(name) == wanted[name] for name in wanted)


def made_before(
    path: Path, recipe: Recipe, change: Callable[[Recipe], str], *, overwrite: bool
) -> dict[str, Any] | None:
    """Read the recipe of a finished folder, None if the folder is absent or to be replaced.

    `change` says of the stored recipe how the folder was changed since, "" if it was not. Folders
    that were changed or made otherwise are refused, or replaced by `overwrite`; folders that were
    not made by this package are always refused.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    stored = read_json(path / RECIPE)
    if stored is None or stored.get("kind") != recipe.get("kind"):
        raise UserError(
            f"{path} exists and was not made by this command: its {RECIPE} is missing or of "
            "something else; move it away, then run the command again"
        )
    if not fits(stored, recipe):
        differences = [
            f"{name} {stored[name]}, not {value}"
            for name, value in recipe.items()
            if name != "images" and stored.get(name, value) != value
        ]
        how = f"is another data set: {', '.join(differences) or 'of other images'}"
    elif changed := change(stored):
        how = f"was changed after it was made: {changed}"
    else:
        return stored
    if overwrite:
        return None
    raise UserError(f"{path} {how}; move it away, or make all scales again with --overwrite")


# Every image is read before anything is written


def _scan(source: Source, least: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Read an image's files: why it cannot be used, and notices with the file's name."""
    faults, notices, sizes = [], [], {}
    for scale, path in {1: source.hr, **source.lr}.items():
        try:
            # 1 for LR: its size is compared with HR's
            image = read_8_bits(path, least=least if scale == 1 else 1)
        except ImageError as error:
            faults.append(str(error))
            continue
        sizes[scale] = image.pixels.shape[:2]
        notices += [(notice, path.name) for notice in image.notices]
    hr = sizes.pop(1, None)
    for scale, lr in sizes.items() if hr else ():
        # LR covers HR cut to HR_MULTIPLE, and no more than HR rounded up
        if not all(
            large // HR_MULTIPLE * HR_MULTIPLE <= small * scale < large + scale
            for large, small in zip(hr, lr, strict=True)
        ):
            faults.append(
                f"{source.lr[scale]} has {lr[0]} x {lr[1]} pixels, and {source.hr} has "
                f"{hr[0]} x {hr[1]}: at scale {scale} LR must have {hr[0] // scale} x "
                f"{hr[1] // scale}"
            )
    return faults, notices


@dataclass
class Findings:
    """Why images were left out, and what was changed on reading others."""

    skipped: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def scan(
        self, sources: Sequence[Source], least: int, workers: int, *, skip: bool = False
    ) -> list[Source]:
        """Decode every image, and return those that can be used: HR has `least` pixels a side.

        UserError if images cannot be used, unless they are skipped and some remain.
        """
        good, files = [], defaultdict(list)
        read = partial(_scan, least=least)
        for source, (faults, notices) in with_progress(read, sources, workers, "opening"):
            self.skipped += faults
            for notice, name in notices:
                files[notice].append(name)
            if not faults:
                good.append(source)
        if self.skipped and not (skip and good):
            how = "nothing is left" if skip else "--skip-bad leaves them out"
            head = f"{len(sources) - len(good)} of {len(sources)} images cannot be used, nothing "
            head += f"was written; fix or remove them; {how}:"
            raise UserError("\n  ".join([head, *self.skipped]))
        self.notices += [
            f"{len(names)} x {notice}: {named(names)}" for notice, names in files.items()
        ]
        return good

    def lines(self) -> list[str]:
        """The end of a report."""
        parts = {"notices:": self.notices, f"left out ({len(self.skipped)}):": self.skipped}
        lines = []
        for title, found in parts.items():
            lines += [title, *(f"  {each}" for each in found)] if found else []
        return lines
