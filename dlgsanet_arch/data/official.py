"""DIV2K and Flickr2K as their makers publish them: found, or fetched and unpacked.

DIV2K: E. Agustsson and R. Timofte, "NTIRE 2017 Challenge on Single Image Super-Resolution:
Dataset and Study", CVPR Workshops 2017. Flickr2K: B. Lim et al., "Enhanced Deep Residual Networks
for Single Image Super-Resolution", CVPR Workshops 2017. Both come with LR by MATLAB's bicubic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlgsanet_arch.data.archives import extract
from dlgsanet_arch.data.downloads import download
from dlgsanet_arch.data.training_sets import Source, find_sources
from dlgsanet_arch.errors import UserError


@dataclass(frozen=True)
class Part:
    """The HR images of a set, or the LR images of one scale.

    Args:
        archive: The name of the file that holds them.
        unpacked: The folder that it is unpacked into.
        folders: Where they may lie, below a folder that is searched.
    """

    archive: str
    unpacked: str
    folders: tuple[str, ...]


@dataclass(frozen=True)
class OfficialSet:
    """A published set.

    Args:
        name: Its name, and that of its folder.
        images: How many it holds.
        server: Where its archives are, with a slash at the end.
        hr: Its HR images.
        lr: Its LR images, by scale.
    """

    name: str
    images: int
    server: str
    hr: Part
    lr: Callable[[int], Part]


def _div2k_lr(scale: int) -> Part:
    name = f"DIV2K_train_LR_bicubic_X{scale}"
    together = f"DIV2K_train_LR_bicubic/X{scale}"
    return Part(f"{name}.zip", name, (together, f"{name}/X{scale}", f"{name}/{together}", name))


def _flickr2k(inside: str) -> Part:
    return Part("Flickr2K.tar", "Flickr2K", (inside, f"Flickr2K/{inside}"))


DIV2K = OfficialSet(
    name="DIV2K",
    images=800,
    server="https://data.vision.ee.ethz.ch/cvl/DIV2K/",
    hr=Part("DIV2K_train_HR.zip", "DIV2K_train_HR", ("DIV2K_train_HR",)),
    lr=_div2k_lr,
)
FLICKR2K = OfficialSet(
    name="Flickr2K",
    images=2650,
    server="https://cv.snu.ac.kr/research/EDSR/",
    hr=_flickr2k("Flickr2K_HR"),
    lr=lambda scale: _flickr2k(f"Flickr2K_LR_bicubic/X{scale}"),
)
# SHA-256 of the archives on DIV2K's own server, as TensorFlow Datasets lists them.
PUBLISHED = {
    "DIV2K_train_HR.zip": "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335",
    "DIV2K_train_LR_bicubic_X2.zip": (
        "a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850"
    ),
    "DIV2K_train_LR_bicubic_X3.zip": (
        "ad5c8e5507e2765823d3c2c5bd0934842efcd487c5370604c224090898b3163a"
    ),
    "DIV2K_train_LR_bicubic_X4.zip": (
        "f006b837f4eb52b82909aa01478e6d6d199eefce932179491d0c9dbb706dde3a"
    ),
}


def _find_folder(part: Part, places: Sequence[Path]) -> Path | None:
    for place in places:
        for folder in part.folders:
            if (place / folder).is_dir():
                return place / folder
    return None


def _find_archive(part: Part, places: Sequence[Path]) -> Path | None:
    return next(
        (place / part.archive for place in places if (place / part.archive).is_file()), None
    )


def _download_missing(parts: Sequence[Part], places: Sequence[Path], server: str) -> None:
    missing = [
        part for part in parts if not (_find_folder(part, places) or _find_archive(part, places))
    ]
    names = list(dict.fromkeys(part.archive for part in missing))
    for number, name in enumerate(names):
        try:
            sha256 = PUBLISHED.get(name) if server == DIV2K.server else None
            download(server + name, places[0] / name, sha256)
        except UserError as error:
            more = names[number + 1 :]
            after = f"\nWanted from {server} after that: {', '.join(more)}" if more else ""
            raise UserError(f"{error}{after}") from error


def _located(part: Part, places: Sequence[Path]) -> Path:
    """The folder of a set's images, out of its archive where it is not there yet."""
    folder = _find_folder(part, places)
    if folder is not None:
        return folder
    archive = _find_archive(part, places)
    extract(archive, places[0] / part.unpacked)
    folder = _find_folder(part, places[:1])
    if folder is None:
        raise UserError(
            f"{archive} was unpacked and holds none of the folders {', '.join(part.folders)}: "
            "it is not the official archive; delete it, then run this again"
        )
    return folder


def sources(
    official: OfficialSet, scales: Sequence[int], places: Sequence[Path], mirror: str | None
) -> list[Source]:
    """The images of a published set, HR and their official LR.

    Archives that are not there are downloaded, those that are not unpacked are unpacked.

    Args:
        official: The set.
        scales: HR side over LR side.
        places: Folders to look in, for the images and for their archives. What is downloaded or
            unpacked goes into the first.
        mirror: A server to take instead of the official one.

    Raises:
        UserError: Images cannot be had, or are not as many as were published.
    """
    server = official.server if mirror is None else mirror.rstrip("/") + "/"
    lr = {scale: official.lr(scale) for scale in scales}
    _download_missing([official.hr, *lr.values()], places, server)
    hr = _located(official.hr, places)
    by_scale = [find_sources(hr, _located(part, places), [scale]) for scale, part in lr.items()]
    found = len(by_scale[0])
    if found != official.images:
        raise UserError(
            f"{official.name} has {official.images} training images and {hr} holds {found}: "
            "unpack its archive again, or use `train --hr` for a part of it"
        )
    return [
        replace(same[0], lr={scale: path for each in same for scale, path in each.lr.items()})
        for same in zip(*by_scale, strict=True)
    ]
