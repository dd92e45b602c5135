"""Every data set of an option file checked before a run; no pixel is decoded.

Names and counts are checked in full; sizes and colours by the headers of some images of a set.
BasicSR would fail hours into a run on what is wrong, or read it otherwise without saying so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlgsanet_arch.data.databases import is_database
from dlgsanet_arch.data.headers import check_headers
from dlgsanet_arch.data.listing import PairSet
from dlgsanet_arch.data.workers import ordered
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.options import Context, Registered
from dlgsanet_arch.options.context import is_number, is_whole
from dlgsanet_arch.options.paths import data_faults, owner
from dlgsanet_arch.options.schema import known_dataset

FFHQ_IMAGES = 70_000  # that BasicSR's FFHQDataset has in folders, whatever is there


@dataclass
class Scan:
    """Findings about the data sets of an option file, one a line or by phase."""

    problems: list[str] = field(default_factory=list)  # begin with the option's path
    warnings: list[str] = field(default_factory=list)  # what BasicSR changes silently
    notes: list[str] = field(default_factory=list)  # how much was checked
    samples: dict[str, int] = field(default_factory=dict)  # their number
    smallest: dict[str, tuple[int, int]] = field(default_factory=dict)  # HR's height and width


def sets_of_options(options: Mapping[str, Any], root: Path) -> dict[str, PairSet]:
    """The data sets that an option file names, by phase; relative paths start from `root`.

    UserError if it names none, or one without images.
    """
    context = Context(options, False, root, None)
    sets = {phase: _pair_set(phase, context) for phase, _ in context.datasets()}
    if not sets:
        raise UserError("the option file names no data sets: it has no `datasets`")
    return sets


def _pair_set(phase: str, context: Context) -> PairSet:
    dataset, scale = context.section(f"datasets:{phase}"), context.value("scale")

    def path(key: str) -> Path | None:
        value = dataset.get(key)
        return context.root / Path(value).expanduser() if isinstance(value, str) else None

    hr, lr = path("dataroot_gt"), path("dataroot_lq")
    if hr is None and lr is None:
        raise UserError(f"datasets:{phase} names neither dataroot_gt nor dataroot_lq")
    trains = phase.split("_")[0] == "train"  # as BasicSR reads it
    if trains:
        fills_up = dataset.get("type") == "RealESRGANDataset"
        least, why = None if fills_up else dataset.get("gt_size"), "gt_size"
    else:
        metrics = context.section("val:metrics").values()
        borders = [each.get("crop_border") for each in metrics if isinstance(each, Mapping)]
        border = max((each for each in borders if is_whole(each)), default=0)
        least, why = 2 * border + 1, f"of which crop_border {border} leaves nothing"
    in_lmdb = context.section(f"datasets:{phase}:io_backend").get("type") == "lmdb"
    return PairSet(
        name=f"{phase} ({dataset.get('name', 'unnamed')})",
        hr=hr,
        lr=lr,
        scale=scale if is_whole(scale) and scale >= 1 else None,
        template=str(dataset.get("filename_tmpl", "{}")),
        least=least if is_whole(least) else None,
        why=why,
        role="train" if trains else "test",
        listing=None if in_lmdb else path("meta_info_file") or path("meta_info"),
        lists_pairs="meta_info" in dataset and hr is not None and lr is not None,
    )


def scan(
    options: Mapping[str, Any], root: Path, *, train: bool, registered: Registered | None = None
) -> Scan:
    """Check every data set of BasicSR's types for single images; no pixel is decoded.

    `options` are as `dlgsanet_arch.options.load` returns them; what is wrong with them by
    themselves, paths that do not exist included, is passed over. `root` is the folder of relative
    paths; `registered` is what BasicSR's registries hold: third-party types are left alone.
    """
    context = Context(options, train, root, registered)
    found = Scan()
    phases: dict[str, str] = {}
    for phase, dataset in context.datasets():
        name, kind = str(dataset.get("name")), dataset.get("type")
        if phase.split("_")[0] != "train" and phases.setdefault(name, phase) != phase:
            found.problems.append(
                f"datasets:{phase}:name: {name!r} is the name of datasets:{phases[name]} too, and "
                "the results of one would replace the other's; rename one"
            )
        reads = known_dataset(context, kind)
        backend = context.section(f"datasets:{phase}:io_backend").get("type")
        if (
            reads is None
            or backend not in ("disk", "lmdb")
            or not all(isinstance(dataset.get(key), str) for key in reads.folders)
            or any(data_faults(context, phase, dataset))
        ):
            continue
        if (backend, kind) == ("disk", "FFHQDataset"):
            found.samples[phase] = FFHQ_IMAGES
        elif (backend, kind) != ("disk", "RealESRGANDataset") or dataset.get("meta_info"):
            _scan_set(phase, context, reads.listing, found)
    return found


def _scan_set(phase: str, context: Context, listing: str | None, found: Scan) -> None:
    path, whose = f"datasets:{phase}", owner(phase, context.section(f"datasets:{phase}"))
    keys = {"hr": "dataroot_gt", "lr": "dataroot_lq", "list": listing, "template": "filename_tmpl"}
    places: list[str] = []
    try:
        each = _pair_set(phase, context)
        places = [f"{place}" for place in each.paths.values() if is_database(place)]
        [checked] = ordered(check_headers, [each], 1, isolated=bool(places))
    except (OSError, UserError) as error:
        where = f"{' and '.join(places)}: " if places else ""
        found.problems.append(f"{path}: {where}{error}")
        return
    found.problems += [f"{path}:{keys[part]}: {whose}: {text}" for part, text in checked.faults]
    found.warnings += [f"{path}:{keys[part]}: {text}" for part, text in checked.warnings]
    found.notes += [f"{path}: {note}" for note in checked.notes]
    if checked.pairs:
        found.samples[phase] = len(checked.pairs)
    if checked.smallest:
        found.smallest[phase] = checked.smallest


def batch_problems(
    options: Mapping[str, Any], samples: Mapping[str, int], copies: int
) -> list[str]:
    """Say whether an epoch has no complete batch: then there is nothing to train on.

    `samples` are those of `Scan`; `copies` of processes, or GPUs, take a batch each.
    """
    dataset = Context(options, True, Path(), None).section("datasets:train")
    batch, ratio = dataset.get("batch_size_per_gpu"), dataset.get("dataset_enlarge_ratio", 1)
    count = samples.get("train")
    if not count or not is_whole(batch) or not is_number(ratio):
        return []
    if math.ceil(count * ratio) >= batch * copies:
        return []
    whole = f"{batch} samples" + (f" for each of {copies} processes or GPUs" if copies > 1 else "")
    return [
        f"datasets:train:batch_size_per_gpu: {count} samples times dataset_enlarge_ratio {ratio} "
        f"are less than one batch of {whole}; raise the ratio to "
        f"{math.ceil(batch * copies / count)}, or write a smaller batch"
    ]
