"""Which images a data set has, and what is wrong with the headers of some; no pixel is decoded.

Imports neither torch nor options: it runs in a process of its own for LMDBs, as a damaged one may
crash its reader.
"""

import math
from collections import defaultdict
from pathlib import Path

from dlgsanet_arch.data.images import Header, read_header
from dlgsanet_arch.data.listing import (
    Checked,
    PairSet,
    list_images,
    open_image,
    read_sample,
    size_faults,
)
from dlgsanet_arch.hints import quoted

MOST_HEADERS = 2000
# What BasicSR changes silently in images: the field of `Header`, what they have, what is done.
CHANGED = {
    "gray": ("are gray", "BasicSR makes three equal channels of them"),
    "alpha": ("have transparency", "BasicSR drops it"),
    "deep": ("have more than 8 bits", "BasicSR reads 8 of them"),
}


def _header(path: Path, name: str) -> Header:
    with open_image(path, name) as file:
        return read_header(file)


def _check_headers(checked: Checked) -> None:
    """Check evenly spread samples of a set by the headers of their images."""
    each, pairs = checked.set, checked.pairs
    pairs = pairs[:: math.ceil(len(pairs) / MOST_HEADERS) or 1]
    count = "all" if len(pairs) == len(checked.pairs) else f"{len(pairs):,}"
    checked.notes.append(f"{len(checked.pairs):,} {checked.what}; checked the headers of {count}")
    wrong: dict[str, dict[str, str]] = {"hr": {}, "lr": {}}
    changed: dict[tuple[str, str], list[str]] = defaultdict(list)
    sizes = []
    for names in pairs:
        headers, faults = read_sample(each, names, _header)
        for part, name in zip(each.paths, names, strict=True):
            for kind in (kind for kind in CHANGED if getattr(headers.get(part), kind, False)):
                changed[part, kind].append(name)
        if not faults and each.hr:
            sizes.append(headers["hr"][:2])
            faults = size_faults(each, each.scale, headers["hr"], headers.get("lr"))
        for part, text in faults.items():
            wrong[part][names[0]] = text
    checked.smallest = min(sizes, key=sorted, default=None)
    for part, texts in wrong.items():
        if texts:
            what = f"{len(texts)} of {len(pairs)} checked cannot be used: {quoted(texts, 3)}"
            fix = "make them again or leave them out, or correct the path or the scale"
            checked.add(part, f"{what}; the first: {next(iter(texts.values()))}; {fix}")
    for (part, kind), names in changed.items():
        text = f"{len(names)} of {len(pairs)} images checked in {each.paths[part]} "
        text += f"{CHANGED[kind][0]}: {quoted(names, 3)}; {CHANGED[kind][1]}"
        checked.warnings.append((part, text))


def check_headers(each: PairSet) -> Checked:
    """List the images of a set, and check evenly spread samples by their headers."""
    checked = list_images(each)
    if not checked.faults:
        _check_headers(checked)
    return checked
