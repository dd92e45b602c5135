"""The forms in which test sets circulate: where HR of a set lies in a folder."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from dlgsanet_arch.data import SCALES
from dlgsanet_arch.data.benchmarks import known_name, set_name
from dlgsanet_arch.data.finding import image_key, walk_images
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import OLD, RECIPE, UNFINISHED

# A folder of originals, of originals cropped for several scales, and of LR.
WHOLE = re.compile(r"(.*_)?(hr|gt|originals?)", re.IGNORECASE)
CROPPED = re.compile(r"(.*_)?gtmod\d+", re.IGNORECASE)
LR = re.compile(r"(.*_)?lr.*|.*x\d", re.IGNORECASE)
# SelfExSR's: image_SRF_4/img_001_SRF_4_HR.png
SRF_FOLDER = re.compile(r"image_srf_\d", re.IGNORECASE)
SRF_NAME = re.compile(r"(?P<stem>.+)_srf_(?P<scale>\d)_(?P<part>.+)", re.IGNORECASE)

# Kinds of HR images, the ones to prefer first: uncropped originals, one folder a scale,
# originals cropped beforehand, and images that lie in the folder itself.
UNCROPPED, BY_SCALE, CROPPED_BEFORE, LOOSE = range(4)


def _is_called(folder: str, name: str) -> bool:
    return known_name(folder) == name or folder.casefold() == name.casefold()


def find_source(name: str, root: Path) -> Path:
    """Find a test set where users put it: datasets/<name> or datasets/benchmark/<name>.

    Args:
        name: The set's name, in any spelling that `set_name` knows; so may be the folder's.
        root: The folder that holds `datasets`.

    Raises:
        UserError: It is in neither place, or twice in one.
    """
    name = set_name(name)
    places = [root / "datasets", root / "datasets" / "benchmark"]
    for place in places:
        entries = sorted(place.iterdir()) if place.is_dir() else []
        found = [entry for entry in entries if entry.is_dir() and _is_called(entry.name, name)]
        if len(found) > 1:
            raise UserError(
                f"{name} may be any of {', '.join(map(str, found))}: name one with --hr FOLDER"
            )
        if found:
            return found[0]
    looked = " nor ".join(str(place / name) for place in places)
    raise UserError(
        f"{name} was not found: there is neither {looked}; put its images into one of them, "
        "or name their folder with --hr FOLDER"
    )


class Layout(NamedTuple):
    """How a folder holds a test set: the folder of HR, HR by scale and name, what is odd."""

    where: Path
    hr: Mapping[int, Mapping[str, Path]]
    notices: tuple[str, ...] = ()


def _hr_place(path: PurePath) -> tuple[int, str, Sequence[int], PurePath] | None:
    """Tell by an image's way from a set's folder what HR it is.

    Returns:
        Its kind, the folder that holds it, its scales, and its way from there; None for anything
        but HR.
    """
    folders = path.parts[:-1]
    named = SRF_NAME.fullmatch(path.stem)
    if not folders or SRF_FOLDER.fullmatch(folders[0]):
        if named and len(folders) < 2:
            if named["part"].lower() != "hr":
                return None
            inner = PurePath(named["stem"] + path.suffix)
            return BY_SCALE, "image_SRF_*", (int(named["scale"]),), inner
        return None if folders else (LOOSE, "", SCALES, path)
    inner = PurePath(*path.parts[1:])
    if WHOLE.fullmatch(folders[0]):
        return UNCROPPED, folders[0], SCALES, inner
    if CROPPED.fullmatch(folders[0]):
        return CROPPED_BEFORE, folders[0], SCALES, inner
    scale = re.fullmatch(r"x(\d)", folders[0], re.IGNORECASE)
    if scale and len(folders) > 1 and folders[1].lower() == "hr":
        return BY_SCALE, "X*/HR", (int(scale[1]),), PurePath(*path.parts[2:])
    return None


def _oddities(kind: int, where: Path, paths: Sequence[PurePath]) -> tuple[str, ...]:
    if kind == CROPPED_BEFORE:
        return (
            f"{where} holds images that were cropped before: with the uncropped originals, "
            "figures would be closer to the known ones",
        )
    others = {path.parts[0] for path in paths if len(path.parts) > 1}
    others = sorted(name for name in others if not LR.fullmatch(name))
    if kind == LOOSE and others:
        return (
            f"images in folders of {where} were left out: {', '.join(others)}; to take images of "
            "several folders, put these folders into one that is called HR",
        )
    return ()


def _layouts(folder: Path, paths: Sequence[PurePath]) -> list[Layout]:
    """The test sets among the images below a folder: several where it is not clear which to take.

    Raises:
        UserError: HR images of a set have the same name.
    """
    found: dict[int, dict[str, dict[int, dict[str, Path]]]] = {}
    for path in paths:
        place = _hr_place(path)
        if place is None:
            continue
        kind, where, scales, inner = place
        by_scale = found.setdefault(kind, {}).setdefault(where, defaultdict(dict))
        for scale in scales:
            other = by_scale[scale].setdefault(image_key(inner), folder / path)
            if other != folder / path:
                raise UserError(
                    f"{folder / path} and {other} have one name: remove or rename all but one"
                )
    if not found:
        return []
    kind = min(found)
    return [
        Layout(folder / where, by_scale, _oddities(kind, folder / where, paths))
        for where, by_scale in found[kind].items()
    ]


def _choose(name: str, source: Path, paths: Sequence[PurePath]) -> Layout:
    """Find the one test set in a folder, or in one of its folders.

    Raises:
        UserError: There is none, or more than one.
    """
    layouts = _layouts(source, paths)
    if not layouts:
        folders = defaultdict(list)
        for path in paths:
            if len(path.parts) > 1:
                folders[path.parts[0]].append(PurePath(*path.parts[1:]))
        called = {folder: inner for folder, inner in folders.items() if _is_called(folder, name)}
        for folder, inner in (called or folders).items():
            layouts += _layouts(source / folder, inner)
    if not layouts:
        raise UserError(
            f"no HR images of {name} in {source}: looked for a folder HR, GT, original or "
            "GTmod12, for X4/HR, for image_SRF_4/*_SRF_4_HR.png, and for images in the folder "
            "itself, there and one folder further down; name the folder of HR with --hr FOLDER"
        )
    if len(layouts) > 1:
        places = ", ".join(str(layout.where) for layout in layouts)
        raise UserError(
            f"{source} holds HR images in more than one place: {places}; "
            f"name the folder that is {name} with --hr FOLDER"
        )
    return layouts[0]


def find_layout(name: str, source: Path, target: Path, scales: Sequence[int] | None) -> Layout:
    """Find a test set in a folder.

    Args:
        name: The set's name.
        source: Holds the set in any of the forms in which sets circulate, or holds one such folder.
        target: Where the data tree has the set. What was made there is taken for want of others.
        scales: HR side over LR side, those that are needed; None for those that are there.

    Raises:
        UserError: HR images are missing, of one name, or it is not clear which to take.
    """
    paths = [
        path
        for path in walk_images(source)
        if not any(part.endswith((UNFINISHED, OLD)) for part in path.parts)
    ]
    ours = [target / f"X{scale}" for scale in SCALES if (target / f"X{scale}" / RECIPE).is_file()]
    others = [
        path for path in paths if not any(folder in (source / path).parents for folder in ours)
    ]
    layout = _choose(name, source, others or paths)
    there = [scale for scale in SCALES if scale in layout.hr]
    missing = [scale for scale in scales or SCALES if scale not in there]
    notices = layout.notices
    if missing:
        lacks = f"{source} has no HR images for {', '.join(f'x{scale}' for scale in missing)}"
        if scales:
            raise UserError(
                f"{lacks}: put the uncropped originals into {source / 'HR'}, or build what is "
                f"there with --scale {' '.join(map(str, there))}"
            )
        notices = (*notices, f"{lacks}, which are not made")
    return Layout(layout.where, {scale: layout.hr[scale] for scale in scales or there}, notices)
