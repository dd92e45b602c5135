"""Test sets by their names, and where HR of one lies in a folder, in the forms that circulate."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from dlgsanet_arch.data import SCALES
from dlgsanet_arch.data.finding import image_key, sharing, walk_images
from dlgsanet_arch.data.making import Source
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import OLD, RECIPE, UNFINISHED

NAMES = ("Set5", "Set14", "B100", "Urban100", "Manga109")
SPELLINGS = {name.casefold(): name for name in NAMES} | {"bsd100": "B100", "bsds100": "B100"}

# How a set's folder may hold HR, the best first: patterns of the paths of HR images from there.
# They may state the folder of HR, and the one scale that images are for.
CROPPED, LOOSE = "cropped", "loose"
LAYOUTS = {
    "uncropped": r"(?P<folder>([^/]*_)?(hr|gt|originals?))/(?P<name>.+)",
    "by scale": r"x(?P<scale>\d)/hr/(?P<name>.+)",
    # SelfExSR's: image_SRF_4/img_001_SRF_4_HR.png
    "SelfExSR": r"(image_srf_\d/)?(?P<name>[^/]+)_srf_(?P<scale>\d)_hr",
    CROPPED: r"(?P<folder>([^/]*_)?gtmod\d+)/(?P<name>.+)",
    LOOSE: r"(?!.+_srf_\d_)(?P<name>[^/]+)",
}
LR = re.compile(r"(.*_)?lr.*|.*x\d", re.IGNORECASE)


def known_name(text: str) -> str | None:
    """The name of a set that papers test on, however it is spelled; None for any other text."""
    return SPELLINGS.get(re.sub(r"[\s_-]", "", text).casefold())


def set_name(text: str) -> str:
    """The name of a test set as the data tree spells it: ``set5`` and ``Set 5`` are Set5.

    UserError if it is neither a known set nor made of letters, digits, - and _.
    """
    known = known_name(text)
    if known is None and not re.fullmatch("[A-Za-z0-9_-]+", text):
        raise UserError(
            f"{text!r} cannot be a test set's name: use letters, digits, - and _, "
            f"or one of {', '.join(NAMES)}"
        )
    return known or text


def _is_called(folder: str, name: str) -> bool:
    return known_name(folder) == name or folder.casefold() == name.casefold()


def find_source(name: str, root: Path) -> Path:
    """Find a test set in datasets/<name> or datasets/benchmark/<name>, in any spelling."""
    name, places = set_name(name), [root / "datasets", root / "datasets" / "benchmark"]
    for place in places:
        entries = sorted(place.glob("*"))
        found = [each for each in entries if each.is_dir() and _is_called(each.name, name)]
        if len(found) > 1:
            raise UserError(
                f"{name} may be any of {', '.join(map(str, found))}: name one with --hr FOLDER"
            )
        if found:
            return found[0]
    raise UserError(
        f"{name} was found neither at {' nor at '.join(str(place / name) for place in places)}: "
        "put its images into one of them, or name their folder with --hr FOLDER"
    )


class Layout(NamedTuple):
    """How a folder holds a test set: the folder of HR, HR by scale, and notices."""

    where: Path
    hr: Mapping[int, Sequence[Source]]
    notices: tuple[str, ...]


def _notices(layout: str, where: Path, paths: Sequence[PurePath]) -> tuple[str, ...]:
    if layout == CROPPED:
        return (
            f"{where} holds images that were cropped before: with the uncropped originals, "
            "figures would be closer to the known ones",
        )
    folders = sorted({path.parts[0] for path in paths if len(path.parts) > 1})
    others = [name for name in folders if not LR.fullmatch(name)]
    if layout == LOOSE and others:
        return (
            f"images in folders of {where} were left out: {', '.join(others)}; to take images of "
            "several folders, put these folders into one that is called HR",
        )
    return ()


def _layouts(folder: Path, paths: Sequence[PurePath]) -> list[Layout]:
    """The test sets among the images below a folder: several if it is not clear which to take."""
    for layout, pattern in LAYOUTS.items():
        found: dict[Path, dict[int, list[Source]]] = defaultdict(lambda: defaultdict(list))
        for path in paths:
            match = re.fullmatch(pattern, path.with_suffix("").as_posix(), re.IGNORECASE)
            if match is None:
                continue
            parts = match.groupdict()
            source = Source(image_key(PurePath(parts["name"] + path.suffix)), folder / path)
            for scale in [int(parts["scale"])] if "scale" in parts else SCALES:
                found[folder / parts.get("folder", "")][scale].append(source)
        for sources in (each for hr in found.values() for each in hr.values()):
            if equal := sharing({source.hr: source.key for source in sources}):
                raise UserError(f"{equal} have one name: remove or rename all but one")
        if found:
            return [
                Layout(where, hr, _notices(layout, where, paths)) for where, hr in found.items()
            ]
    return []


def _choose(name: str, source: Path, paths: Sequence[PurePath]) -> Layout:
    """Find the one test set in a folder, or in one of its folders."""
    layouts = _layouts(source, paths)
    if not layouts:
        folders = defaultdict(list)
        for path in paths:
            if len(path.parts) > 1:
                folders[path.parts[0]].append(PurePath(*path.parts[1:]))
        called = {folder: inner for folder, inner in folders.items() if _is_called(folder, name)}
        for folder, inner in (called or folders).items():
            layouts += _layouts(source / folder, inner)
    if len(layouts) == 1:
        return layouts[0]
    if layouts:
        raise UserError(
            f"{source} holds HR images in more than one place: "
            f"{', '.join(str(layout.where) for layout in layouts)}; name the folder that is {name} "
            "with --hr FOLDER"
        )
    raise UserError(
        f"no HR images of {name} in {source}: looked for a folder HR, GT, original or GTmod12, for "
        "X4/HR, for image_SRF_4/*_SRF_4_HR.png, and for images in the folder itself, there and one "
        "folder further down; name the folder of HR with --hr FOLDER"
    )


def find_layout(name: str, source: Path, target: Path, scales: Sequence[int] | None) -> Layout:
    """Find a test set in a folder, for some scales; None means those that are there.

    Images that were made in `target` are used only if there are no others. UserError if HR images
    are missing or have the same name, or if it is not clear which to take.
    """
    paths = [
        path
        for path in walk_images(source)
        if not any(part.endswith((UNFINISHED, OLD)) for part in path.parts)
    ]
    ours = {target / f"X{scale}" for scale in SCALES if (target / f"X{scale}" / RECIPE).is_file()}
    others = [path for path in paths if not ours.intersection((source / path).parents)]
    where, hr, notices = _choose(name, source, others or paths)
    there = sorted(hr.keys() & set(SCALES))
    missing = [f"x{scale}" for scale in scales or SCALES if scale not in there]
    if missing:
        lacks = f"{source} has no HR images for {', '.join(missing)}"
        if scales:
            raise UserError(
                f"{lacks}: put the uncropped originals into {source / 'HR'}, or build what is "
                f"there with --scale {' '.join(map(str, there))}"
            )
        notices = (*notices, f"{lacks}, which are not made")
    return Layout(where, {scale: hr[scale] for scale in scales or there}, notices)
