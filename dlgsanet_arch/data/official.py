"""DIV2K and Flickr2K as their makers publish them: found, or fetched and unpacked.

DIV2K: E. Agustsson and R. Timofte, "NTIRE 2017 Challenge on Single Image Super-Resolution:
Dataset and Study", CVPR Workshops 2017. Flickr2K: B. Lim et al., "Enhanced Deep Residual Networks
for Single Image Super-Resolution", CVPR Workshops 2017. Both come with LR by MATLAB's bicubic.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dlgsanet_arch.data.archives import extract
from dlgsanet_arch.data.downloads import download
from dlgsanet_arch.data.training_sets import Source, pair
from dlgsanet_arch.errors import UserError


class Part(NamedTuple):
    """HR or LR images: the archive, and the folders that they may lie in."""

    archive: str
    folders: tuple[str, ...]


class OfficialSet(NamedTuple):
    """A published set: its name, number of images, server, and parts by scale; 1 is HR."""

    name: str
    images: int
    server: str
    part: Callable[[int], Part]


def _div2k(scale: int) -> Part:
    if scale == 1:
        return Part("DIV2K_train_HR.zip", ("DIV2K_train_HR",))
    name, together = f"DIV2K_train_LR_bicubic_X{scale}", f"DIV2K_train_LR_bicubic/X{scale}"
    return Part(f"{name}.zip", (together, f"{name}/X{scale}", f"{name}/{together}", name))


def _flickr2k(scale: int) -> Part:
    inside = "Flickr2K_HR" if scale == 1 else f"Flickr2K_LR_bicubic/X{scale}"
    return Part("Flickr2K.tar", (inside, f"Flickr2K/{inside}"))


DIV2K = OfficialSet("DIV2K", 800, "https://data.vision.ee.ethz.ch/cvl/DIV2K/", _div2k)
FLICKR2K = OfficialSet("Flickr2K", 2650, "https://cv.snu.ac.kr/research/EDSR/", _flickr2k)
# SHA-256 of the archives on DIV2K's own server, as TensorFlow Datasets lists them.
PUBLISHED = {
    f"DIV2K_train_{name}.zip": sha256
    for name, sha256 in (
        ("HR", "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
        ("LR_bicubic_X2", "a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850"),
        ("LR_bicubic_X3", "ad5c8e5507e2765823d3c2c5bd0934842efcd487c5370604c224090898b3163a"),
        ("LR_bicubic_X4", "f006b837f4eb52b82909aa01478e6d6d199eefce932179491d0c9dbb706dde3a"),
    )
}


def _find(names: Sequence[str], places: Sequence[Path]) -> Path | None:
    """The first of some files or folders that is in one of the places."""
    paths = (place / name for place in places for name in names)
    return next((path for path in paths if path.exists()), None)


def _download_missing(parts: Sequence[Part], places: Sequence[Path], server: str) -> None:
    missing = [part for part in parts if not _find([*part.folders, part.archive], places)]
    names = list(dict.fromkeys(part.archive for part in missing))
    for number, name in enumerate(names, 1):
        try:
            sha256 = PUBLISHED.get(name) if server == DIV2K.server else None
            download(server + name, places[0] / name, sha256)
        except UserError as error:
            more = ", ".join(names[number:])
            after = f"\nWanted from {server} after that: {more}" if more else ""
            raise UserError(f"{error}{after}") from error


def _located(part: Part, places: Sequence[Path]) -> Path:
    """The folder of a set's images, unpacked from its archive if it is not there yet."""
    if folder := _find(part.folders, places):
        return folder
    archive = _find([part.archive], places)
    extract(archive, places[0] / archive.stem)
    if folder := _find(part.folders, places[:1]):
        return folder
    raise UserError(
        f"{archive} was unpacked and holds none of the folders {', '.join(part.folders)}: "
        "it is not the official archive; delete it, then run this again"
    )


def sources(
    official: OfficialSet, scales: Sequence[int], places: Sequence[Path], mirror: str | None
) -> list[Source]:
    """The images of a published set, HR and their official LR, downloaded and unpacked as needed.

    They are looked for in `places`; what is downloaded or unpacked goes into the first. UserError
    if there are not as many as were published.
    """
    server = official.server if mirror is None else mirror.rstrip("/") + "/"
    parts = {scale: official.part(scale) for scale in (1, *scales)}
    _download_missing([*parts.values()], places, server)
    hr, *lr = (_located(part, places) for part in parts.values())
    found = pair(hr, dict(zip(scales, lr, strict=True)))
    if len(found) != official.images:
        raise UserError(
            f"{official.name} has {official.images} training images and {hr} holds {len(found)}: "
            "unpack its archive again, or use `train --hr` for a part of it"
        )
    return found
