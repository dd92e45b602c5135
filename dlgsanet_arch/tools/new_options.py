"""Option files for a user's own images: data sets are made, and templates are filled to fit them.

The published recipe is kept; `parts_of_batch` and `schedule` say what changes.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml

from dlgsanet_arch import memory, options
from dlgsanet_arch.checkpoint import bundled_weights, read_checkpoint
from dlgsanet_arch.data import benchmark, training_sets
from dlgsanet_arch.data.databases import META_INFO
from dlgsanet_arch.data.discovery import set_name
from dlgsanet_arch.data.finding import left_out_of
from dlgsanet_arch.data.training_sets import Source, database_name
from dlgsanet_arch.data.workers import usable_cores
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_target, disk_faults_named, write_atomically
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.options import shipped
from dlgsanet_arch.tools import complexity

# The published recipe: patches an iteration, their side in LR pixels, and iterations; number and
# side of DIV2K's sub-images.
BATCH, PATCH, ITERATIONS = 16, 48, 500_000
SUB_IMAGES, SUB_IMAGE_SIDE = 32_592, 480

_SHARE = 0.5  # of the free memory is used
_GIB = 2**30
_DAY = 86_400  # seconds: no training is longer by itself
_TEMPLATES = Path(__file__).with_name("templates")
HELD_OUT = "held_out"  # folder of images that a test set is made from


def measure_patch(
    network: Mapping[str, Any], patch: int, device: torch.device
) -> tuple[float, int]:
    """Train on one patch four times; return the seconds of the fastest, and the most bytes.

    0 bytes stand for what is not known.
    """
    model = DLGSANet(**{key: value for key, value in network.items() if key != "type"}).to(device)
    image = torch.rand(1, 3, patch, patch, device=device)
    before, seconds = complexity.start_peak(device.type), []
    for _ in range(4):
        start = time.perf_counter()
        model(image).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds), complexity.end_peak(device.type, before) or 0


def parts_of_batch(needed: int, free: int) -> int:
    """Return into how many parts a batch is divided so that one takes half of the free memory.

    That changes results by rounding alone. `needed` is in bytes for one patch; UserError where
    one does not fit.
    """
    for parts in (1, 2, 4, 8, BATCH):
        if BATCH // parts * needed <= _SHARE * free:
            return parts
    raise UserError(
        f"a training step on one patch takes {needed / _GIB:.2f} GiB, more than half of "
        f"{free / _GIB:.2f} GiB: free some memory, give a smaller --variant or --patch, or the "
        "memory of another machine as --memory"
    )


def schedule(
    sizes: Sequence[tuple[int, int]],
    fine_tuning: bool,
    iterations: int | None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Return the values of the template that depend on the length of the training.

    Unless `iterations` are given, a pixel is seen as often as one of DIV2K in the published 500,000
    iterations, in 50,000 to 500,000 iterations; starting from trained weights, in a fifth of that;
    and in as many as take a day, 1,000 at least. `sizes` are those of the HR sub-images; `seconds`
    is how long an iteration takes, None where that is not known.
    """
    if iterations is None:
        div2k_sets = sum(map(math.prod, sizes)) / SUB_IMAGE_SIDE**2 / SUB_IMAGES
        iterations = min(ITERATIONS, max(50_000, int(round(ITERATIONS * div2k_sets, -3))))
        iterations //= 5 if fine_tuning else 1
        if seconds is not None:
            iterations = min(iterations, max(1000, int(_DAY / seconds) // 1000 * 1000))
    period = max(1, iterations // 100)
    return {
        "iterations": iterations,
        "milestones": [max(1, round(part * iterations)) for part in (0.5, 0.8, 0.9, 0.95)],
        "enlarge_ratio": math.ceil(iterations * BATCH / len(sizes)),
        "period": period,
        "print_freq": min(100, period),
        "rate": "1e-4" if fine_tuning else "5e-4",
    }


def _sub_image_sizes(database: Path) -> list[tuple[int, int]]:
    """Return the heights and widths that the list of an LMDB gives."""
    text = (database / META_INFO).read_text(encoding="utf-8", errors="replace")
    sizes = re.findall(r"^\S+ \((\d+), ?(\d+),", text, re.MULTILINE)
    if not sizes:
        raise UserError(f"{database} lists no images: make it again with `dlgsanet data train`")
    return [(int(height), int(width)) for height, width in sizes]


def _hold_out(sources: Sequence[Source], folder: Path) -> list[Source]:
    """Link one in 10 images, 20 at most, into folder/HR and folder/LR; return the others."""
    if len(sources) < 2:
        raise UserError("one image is too few to hold one out: give a folder as --val")
    count = min(20, max(1, len(sources) // 10))
    held_out = sources[len(sources) // (2 * count) :: len(sources) // count][:count]
    with disk_faults_named(f"{folder} cannot be written"):
        for path in folder.glob("?R/*"):
            if path.is_symlink():  # made before
                path.unlink()
        for source in held_out:
            for side, path in zip(("HR", "LR"), (source.hr, *source.lr.values()), strict=False):
                link = folder / side / f"{source.key}{source.hr.suffix.lower()}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
    return [source for source in sources if source not in held_out]


def _make_sets(
    asked: argparse.Namespace, hr: Path | None, name: str, patch: int
) -> tuple[dict[str, Path], str, list[str]]:
    """Make the data sets that are not prepared yet; `hr` is an LMDB of HR sub-images, if given.

    Returns the paths `hr`, `lr`, `val_hr` and `val_lr`; the validation set's name; and reports.
    """
    settings = {"workers": usable_cores(), "skip_bad": asked.skip_bad, "overwrite": asked.overwrite}
    scales, reports = [asked.scale], []
    own_val = asked.root / "datasets" / "benchmark" / f"{name}_val"
    if hr is None:
        folder, images = asked.root / "datasets" / name, asked.hr.absolute()
        if folder.absolute() != images and folder.absolute().is_relative_to(images):
            raise UserError(f"{folder} would be within {images}: give a folder of images alone")
        sources = training_sets.find_sources(asked.hr, asked.lr, scales)
        if asked.val is None:  # with LR they are a complete test set
            held_out = own_val / (f"X{asked.scale}" if asked.lr else HELD_OUT)
            sources = _hold_out(sources, held_out)
        cutting = training_sets.Cutting(patch=patch)
        made = training_sets.build(sources, scales, folder, cutting=cutting, **settings)
        reports.append(training_sets.report(made))
        hr, lr = (folder / database_name(scale) for scale in (1, asked.scale))
    else:
        lr = asked.lr or hr.with_name(database_name(asked.scale))
    val = asked.val or (own_val if own_val.is_dir() else own_val.with_name("Set5"))
    val_name = set_name(_slug(val.absolute().name))
    if (val / HELD_OUT).is_dir():
        val = val / HELD_OUT
    prepared = [part for part in (val / f"X{asked.scale}", val) if (part / "LR").is_dir()]
    if not prepared:
        target = own_val.with_name(val_name)
        reports.append(benchmark.report(benchmark.build(val_name, val, target, scales, **settings)))
        prepared = [target / f"X{asked.scale}"]
    paths = {"hr": hr, "lr": lr, "val_hr": prepared[0] / "HR", "val_lr": prepared[0] / "LR"}
    return paths, val_name, reports


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-") or "own"


def _quoted(path: Path, root: Path) -> str:
    """Return a path as an option file has it: from the root where it is below, in quotes."""
    path, root = path.absolute(), root.absolute()
    text = str(path.relative_to(root) if path.is_relative_to(root) else path)
    return json.dumps(str(path) if text.startswith("~") else text, ensure_ascii=False)


def _write(files: Sequence[Path], values: Mapping[str, Any], root: Path) -> None:
    """Fill the templates train.yml and test.yml, check the result and write it."""
    templates = [Template((_TEMPLATES / f"{file.parent.name}.yml").read_text()) for file in files]
    texts = [template.substitute(values) for template in templates]
    train = yaml.safe_load(texts[0])
    options.refuse(options.problems(train, train=True, root=root, registered=None))
    for file, text in zip(files, texts, strict=True):
        with disk_faults_named(f"{file} cannot be written"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text.encode())


def write_option_files(asked: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """Find or make the data sets, and write an option file to train and one to test.

    Takes the arguments of `dlgsanet new-options`, and returns the files and notes for the user.
    """
    root, weights = asked.root, asked.weights
    if not root.is_dir():
        raise UserError(f"--root: folder {root} does not exist")
    databases = (asked.hr, asked.hr / database_name(1))
    hr = next((path for path in databases if (path / META_INFO).is_file()), None)
    data_name = _slug((hr.parent if hr else asked.hr).absolute().name)
    name = asked.name or f"{asked.variant}_x{asked.scale}_{data_name}"
    files = [asked.output / verb / f"{name}.yml" for verb in ("train", "test")]
    there = [str(file) for file in files if file.exists()]
    if there and not asked.overwrite:
        raise UserError(f"{' and '.join(there)} exist: give another --name, or --overwrite")
    for file in files:
        with disk_faults_named(f"{file} cannot be written"):
            check_target(file)

    published = shipped.find(f"{asked.variant}_x{asked.scale}", train=True)
    network = options.load(published)["network_g"]
    start = "~"
    if weights is not None:
        config = {key: value for key, value in network.items() if key != "type"}
        read_checkpoint(weights, asked.param_key, config)
        start = str(weights) if str(weights) in bundled_weights() else _quoted(weights, root)
        if asked.param_key is not None:
            start += f"\n  param_key_g: {json.dumps(asked.param_key)}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = int(asked.memory * _GIB) if asked.memory else memory.free_memory(device)
    patch = asked.patch or PATCH
    seconds, needed = measure_patch(network, patch, device)
    parts = parts_of_batch(needed, free)
    seconds = None if asked.memory else BATCH * seconds

    paths, val_name, notes = _make_sets(asked, hr, data_name, patch)
    sizes = _sub_image_sizes(paths["hr"])
    plan = schedule(sizes, weights is not None, asked.iterations, seconds)
    given = {"name": name, "variant": asked.variant, "scale": asked.scale, "data_name": data_name}
    fitted = {"patch": patch, "gt_size": patch * asked.scale, "accumulation": parts}
    quoted = {key: _quoted(path, root) for key, path in paths.items()}
    rest = {"val_name": val_name, "workers": min(6, usable_cores() // 2), "weights": start}
    _write(files, network | plan | given | fitted | quoted | rest, root)
    step = BATCH // parts * needed / _GIB
    val = paths["val_hr"].parent
    notes += [
        f"{len(sizes):,} sub-images, {plan['iterations']:,} iterations; validation: {val}",
        f"{BATCH // parts} of {BATCH} patches of {patch}x{patch} at once take about {step:.1f} GiB "
        f"of {free / _GIB:.1f} GiB",
    ]
    if seconds is not None:
        notes.append(
            f"an iteration takes about {seconds:.2g} s on this {device.type}, all of them "
            f"{plan['iterations'] * seconds / 3600:,.1f} hours; --iterations changes that"
        )
    return files, [*notes, *left_out_of(asked.hr, asked.lr, asked.val)]
