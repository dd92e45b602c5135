"""The training loop, validation, checkpoints and metrics, beside those of BasicSR.

Contestants take turns within one process, lap after lap, so that a change in the machine's load
meets all of them; a ratio is taken within a lap. Beside the clock stands the CPU time that was
taken, which a loaded machine stretches little. BasicSR's own code runs with this package's repairs,
without which it does not import.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import contestants
import data
import measuring
import reporting
import torch
import yaml
from measuring import Cell, Record, Section, Setting
from torch import Tensor

from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.finding import find_images
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.data.making import crop_to_multiple, encode_png
from dlgsanet_arch.data.training_sets import Cutting, build, database_name, find_sources

T = TypeVar("T")
Lap = dict[str, float]  # what one call took: `seconds` by the clock, `cpu` of all cores

SCALE = 4
DATA = "DLGSANET_BENCHMARK_DATA"  # the variable that names the folder of what is trained on
BLOCKS = 5  # of iterations in a run; the first is not timed, validation and save end the third
SAVE_EVERY = 5000  # iterations, in the option files
MADE_SIZE = (480, 480)
METRIC_SIZE = (720, 1280)
QUICK_SIZE = (64, 72)
TOLERANCES = {"psnr": 1e-4, "ssim": 1e-6}
COMPARED = "x BasicSR | in the laps | CPU ms | x BasicSR, CPU | in the laps, CPU"
METRICS = {"PSNR": ["psnr"], "SSIM": ["ssim"], "PSNR and SSIM": ["psnr", "ssim"]}
NOTICED = 0.98  # of BasicSR's speed: what is slower is named
SAVED = (".pth", ".state")

EDSR = "EDSR, 16 channels"
TINY = "DLGSANet Tiny"
QUICK = "DLGSANet, quick"
RRDB = "RRDBNet"

BASICSR = "BasicSR"
OURS = "ours"
OWN_MODEL = "ours, DLGSANetModel"
# What takes part in training: model_type, changes of `train`, and of its `optim_g`.
_FUSED, _LAYOUT, _HALF = {"fused": True}, {"channels_last": True}, {"amp": "bf16"}
LOOPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"{BASICSR}, SRModel": ("SRModel", {}, {}),
    f"{OURS}, SRModel": ("SRModel", {}, {}),
    OWN_MODEL: ("DLGSANetModel", {}, {}),
    f"{OWN_MODEL}, fused Adam": ("DLGSANetModel", {}, _FUSED),
    f"{OWN_MODEL}, channels_last": ("DLGSANetModel", _LAYOUT, {}),
    f"{OWN_MODEL}, bf16": ("DLGSANetModel", _HALF, {}),
    f"{OWN_MODEL}, all three": ("DLGSANetModel", {**_LAYOUT, **_HALF}, _FUSED),
}
_SECTION = functools.partial(Section, group=measuring.key, rounds=1)
_SAME_NUMBERS = list(LOOPS)[:4]  # where the network's arithmetic is the same


def in_turns(works: Mapping[str, Callable[[], T]], laps: int) -> dict[str, list[T]]:
    """Call each work once a lap, each lap beginning with another one, and print the times."""
    found: dict[str, list[T]] = {name: [] for name in works}
    names = list(works)
    for lap in range(laps):
        first = lap % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            found[name].append(works[name]())
            took = time.perf_counter() - start
            print(f"lap {lap + 1} of {laps}: {name}: {took:.3g} s", file=sys.__stderr__, flush=True)
    return found


def _cpu_seconds() -> float:
    """Return the CPU time of this process, and of the workers that it waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def check_agreement(theirs: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    """Return how far figures are apart; ValueError where that is too far for a comparison."""
    apart = {name: abs(ours[name] - theirs[name]) for name in theirs}
    for name, difference in apart.items():
        if not difference <= TOLERANCES[name]:
            raise ValueError(f"{name} is {ours[name]!r} and BasicSR's is {theirs[name]!r}")
    return apart


def _compared(
    works: Mapping[str, Callable[[], Any]],
    setting: Setting,
    expected: Mapping[str, Mapping[str, float]] | None = None,
    after: Callable[[str], None] = lambda name: None,
) -> Record:
    """Time works in turns, after a warm-up of all.

    Args:
        works: By name.
        setting: As of all measurements.
        expected: By the same names, the figures that a work must return.
        after: Called with the name after each call, untimed.
    """
    load, apart = os.getloadavg()[0], dict.fromkeys(TOLERANCES, 0.0)

    def timed(name: str) -> Lap:
        measuring.synchronize(setting.device)
        start, cpu = time.perf_counter(), _cpu_seconds()
        figures = works[name]()
        measuring.synchronize(setting.device)
        lap = {"seconds": time.perf_counter() - start, "cpu": _cpu_seconds() - cpu}
        after(name)
        if expected:
            for figure, difference in check_agreement(expected[name], figures).items():
                apart[figure] = max(apart[figure], difference)
        return lap

    calls = {name: functools.partial(timed, name) for name in works}
    in_turns(calls, 1)
    laps = in_turns(calls, setting.runs)
    return {"load": load, "laps": laps, **({"apart": apart} if expected else {})}


def _of(laps: Sequence[Record], clock: str) -> list[float]:
    """Return each lap's time by a clock, the median where it has several."""
    times = [lap[clock] for lap in laps]
    return [statistics.median(each) if isinstance(each, list) else each for each in times]


def ratios(base: Sequence[float], laps: Sequence[float]) -> tuple[float, float, float]:
    """Return how many times faster than `base` the laps are: median, least and most of them."""
    each = sorted(theirs / ours for theirs, ours in zip(base, laps, strict=True))
    return statistics.median(each), each[0], each[-1]


def _ratio_cells(base: Sequence[Record], laps: Sequence[Record], clock: str) -> list[str]:
    middle, least, most = ratios(_of(base, clock), _of(laps, clock))
    return [f"{middle:.2f}", f"{least:.2f} to {most:.2f}"]


def _lap_cells(base: Sequence[Lap], laps: Sequence[Lap], count: int = 1) -> list[str]:
    """Return the time of one of `count` by both clocks, each with the ratio to BasicSR's."""
    cpu = statistics.median(_of(laps, "cpu")) / count
    return [
        *measuring.milliseconds({"seconds": [each / count for each in _of(laps, "seconds")]}),
        *_ratio_cells(base, laps, "seconds"),
        f"{1e3 * cpu:.4g}",
        *_ratio_cells(base, laps, "cpu"),
    ]


def _compared_laps(record: Record) -> Iterator[tuple[str, list[Record], list[Record]]]:
    """Yield each name, BasicSR's laps (the first, or those of the same metric), and its own."""
    laps = record.get("laps", {})
    for name in laps:
        base = laps.get(f"{name.split(', ')[0]}, {BASICSR}", next(iter(laps.values())))
        yield name, base, laps[name]


def _rows(
    cells: Callable[[Record, str, list[Record], list[Record]], list[str]],
    record: Record,
    _: list[Record],
) -> list[list[str]]:
    """Return a row for each contestant: the network, and `cells` of BasicSR's laps and its own."""
    first = [record["cell"]["network"]] if "network" in record["cell"] else []
    if "error" in record:
        return [[*first, "–", record["error"]]]
    return [[*first, *cells(record, *each)] for each in _compared_laps(record)]


CLOCKS = {
    "seconds": "the clock",
    "steady": "the clock",
    "cpu": "CPU time",
    "own": "the CPU time outside the model's step",
}


def _notes(records: Sequence[Record]) -> list[str]:
    """Say who is slower than BasicSR by which clock, and what the machine's load was."""
    slower: dict[str, list[str]] = {}
    for record in records:
        for name, base, laps in _compared_laps(record):
            for clock in CLOCKS.keys() & laps[0].keys() if BASICSR not in name else ():
                ratio = ratios(_of(base, clock), _of(laps, clock))[0]
                network = record["cell"].get("network")
                title = f"{network}, {name}" if network else name.removesuffix(f", {OURS}")
                found = slower.setdefault(CLOCKS[clock], [])
                found += [f"{title} ({ratio:.2f})"] if ratio < NOTICED else []
    loads = [record["load"] for record in records if "load" in record]
    if not slower:
        return ["Nothing is compared yet."]
    told = [
        f"by {clock}, {'; '.join(slower[clock]) or 'nothing'}"
        for clock in dict.fromkeys(CLOCKS.values())
        if clock in slower
    ]
    return [
        f"**Slower than BasicSR's by more than 2 %:** {'. And '.join(told)}.",
        f"The machine has {os.cpu_count()} cores, and its load average when a measurement began "
        f"was {min(loads):.1f} to {max(loads):.1f}. Above the number of cores others work on it, "
        "and times by the clock stretch: the ranges over the laps tell how far a ratio can be "
        f"trusted, and CPU time is the better measure. PyTorch had {torch.get_num_threads()} "
        "threads.",
    ]


def _apart_note(records: Sequence[Record]) -> str:
    found = [record["apart"] for record in records if "apart" in record]
    if not found:
        return "No figures are compared yet."
    psnr, ssim = (max(each[name] for each in found) for name in TOLERANCES)
    return (
        f"The figures are at most {psnr:.0e} dB and {ssim:.0e} of SSIM apart; "
        f"more than {TOLERANCES['psnr']:.0e} dB or {TOLERANCES['ssim']:.0e} would be an error."
    )


@contextlib.contextmanager
def _apart(folder: Path) -> Iterator[None]:
    """Keep what a run prints in a file of `folder`, and the process as it was before."""
    from basicsr.utils.logger import initialized_logger

    logger, cudnn, said = logging.getLogger("basicsr"), torch.backends.cudnn, folder / "said.txt"
    handlers, trying = logger.handlers[:], cudnn.benchmark
    kept = {"handlers": handlers[:], "level": logger.level, "propagate": logger.propagate}
    try:
        with (
            said.open("w") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            mock.patch.dict(initialized_logger),
            mock.patch.multiple(logger, **kept),
        ):
            try:
                yield
            finally:
                for handler in set(logger.handlers) - set(handlers):
                    handler.close()
    except Exception:
        print(said.read_text()[-2000:], file=sys.__stderr__)
        raise
    finally:
        cudnn.benchmark = trying


def network_options(name: str) -> dict[str, Any]:
    """Return `network_g` of an option file."""
    if name == EDSR:
        return {
            "type": "EDSR",
            "num_in_ch": 3,
            "num_out_ch": 3,
            "num_feat": 16,
            "num_block": 4,
            "upscale": SCALE,
            "img_range": 255.0,
            "rgb_mean": [0.4488, 0.4371, 0.4040],
        }
    if name == RRDB:
        return {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "scale": SCALE}
    variant = contestants.QUICK if name == QUICK else "tiny"
    return {"type": "DLGSANet", **contestants.configuration(variant, SCALE)}


def _shared_pictures(*names: str) -> Path | None:
    """Return a folder of the shared data, where it is at hand."""
    folder = reporting.shared_folder().joinpath("data", *names)
    return folder if folder.is_dir() else None


def _made(index: int, size: Sequence[int]) -> Any:
    photographs = _shared_pictures("BSDS400")
    made = {"size": tuple(size), "photographs": photographs and str(photographs)}
    return data.picture(made, index)


def _write(path: Path, picture: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(picture))


def _paired(hr: Path, lr: Path, backend: str) -> dict[str, Any]:
    return {
        "type": "PairedImageDataset",
        "dataroot_gt": str(hr),
        "dataroot_lq": str(lr),
        "filename_tmpl": "{}",
        "io_backend": {"type": backend},
    }


def training_set(patch: int, size: Sequence[int]) -> dict[str, Any]:
    """Make LMDBs of sub-images where they are missing; return BasicSR's options for them.

    Args:
        patch: Side of the patches in LR pixels; a sub-image has 1.25 times that.
        size: Height and width of the pictures that are cut.
    """
    folder = Path(os.environ[DATA]) / f"train_{patch}"
    if not folder.exists():
        for index in range(data.PICTURES):
            _write(folder / "HR" / f"{index}.png", _made(index, size))
        side = SCALE * patch * 5 // 4
        cutting = Cutting(side, side // 2 // SCALE * SCALE, patch)
        build(find_sources(folder / "HR", None, [SCALE]), [SCALE], folder, cutting=cutting)
    return _paired(folder / database_name(1), folder / database_name(SCALE), "lmdb")


def validation_set(count: int, size: Sequence[int]) -> dict[str, Any]:
    """Write pairs where they are missing, Set14's first or made ones; return BasicSR's options."""
    folder = Path(os.environ[DATA]) / f"val_{count}"
    if not folder.exists():
        given = _shared_pictures("Set14", "HR") if tuple(size) == MADE_SIZE else None
        paths = list(find_images(given).values()) if given else []
        for index in range(count):
            picture = read_8_bits(paths[index]).pixels if paths else _made(index, size)
            hr = crop_to_multiple(picture, SCALE)
            _write(folder / "HR" / f"{index:02d}.png", hr)
            _write(folder / "LR" / f"{index:02d}.png", bicubic(hr, 1 / SCALE))
    return _paired(folder / "HR", folder / "LR", "disk")


def loop_options(cell: Cell, loop: str, device: str) -> dict[str, Any]:
    """Return a complete option file: Tiny's recipe with the cell's network, data and length."""
    recipe = reporting.ROOT / "options" / "train" / f"tiny_x{SCALE}.yml"
    options = yaml.safe_load(recipe.read_text())
    model, train, optimizer = LOOPS[loop]
    block = cell["block"]
    options |= {
        "name": "measured",
        "model_type": model,
        "num_gpu": int(device == "cuda"),
        "network_g": network_options(cell["network"]),
    }
    options["datasets"]["train"] |= {
        **training_set(cell["patch"], cell["size"]),
        "gt_size": SCALE * cell["patch"],
        "num_worker_per_gpu": cell["workers"],
        "batch_size_per_gpu": cell["batch"],
        "dataset_enlarge_ratio": 1000,  # a single epoch, as in the recipe
        "pin_memory": device == "cuda",
    }
    options["datasets"]["val"] |= validation_set(cell["pictures"], cell["size"])
    options["train"] |= {"total_iter": BLOCKS * block, **train}
    options["train"]["optim_g"] |= optimizer
    options["val"]["val_freq"] = 3 * block
    options["logger"] |= {
        "print_freq": block,
        "save_checkpoint_freq": 3 * block,
        "use_tb_logger": False,
    }
    return options


@contextlib.contextmanager
def _stamps(model_type: str, block: int, device: str) -> Iterator[list[Lap]]:
    """Note the times when the first iteration begins, and then when each step of the model ends.

    CPU time is this process's alone, as its workers run ahead; `own` is what of it is spent
    outside the model's steps.
    """
    from basicsr.models.sr_model import SRModel

    from dlgsanet_arch.training import DLGSANetModel

    kind = {"SRModel": SRModel, "DLGSANetModel": DLGSANetModel}[model_type]
    step, stamps, inside = kind.optimize_parameters, [], 0.0

    def note() -> None:
        cpu = time.process_time()
        stamps.append({"seconds": time.perf_counter(), "cpu": cpu, "own": cpu - inside})

    def timed(self: Any, current_iter: int) -> None:
        nonlocal inside
        if not stamps:
            note()
        began = time.process_time()
        step(self, current_iter)
        if current_iter % block == 0:
            measuring.synchronize(device)
        inside += time.process_time() - began
        note()

    with mock.patch.object(kind, "optimize_parameters", timed):
        yield stamps


def pace(stamps: Sequence[float], block: int) -> dict[str, Any]:
    """Return seconds an iteration, from times of one clock that `_stamps` notes.

    Returns:
        `steady`, the mean of each block after the first, without the iteration that a validation
        and a save came before; and `whole`, the mean of all of them with both.
    """
    seconds = [after - before for before, after in itertools.pairwise(stamps[block:])]
    paused = 2 * block  # the one after the third block
    steady = []
    for start in range(0, len(seconds), block):
        kept = [seconds[i] for i in range(start, start + block) if i != paused]
        if kept:
            steady.append(statistics.mean(kept))
    return {"steady": steady, "whole": statistics.mean(seconds)}


def _train(cell: Cell, loop: str, device: str) -> Record:
    """Train once; return the pace, and the seconds from the call to the first iteration."""
    from basicsr.train import train_pipeline

    from dlgsanet_arch import pipeline

    importlib.import_module("dlgsanet_arch.pipeline.loop")  # else its import would be timed
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        file = root / "measured.yml"
        file.write_text(yaml.safe_dump(loop_options(cell, loop, device)))
        arguments = ["-opt", str(file)]
        with _apart(root), _stamps(LOOPS[loop][0], cell["block"], device) as stamps:
            begin = time.perf_counter()
            if loop.startswith(BASICSR):
                with mock.patch.object(sys, "argv", ["train.py", *arguments]):
                    train_pipeline(name)
            else:
                pipeline.train(root, [*arguments, "--no_trial"])
    if len(stamps) != BLOCKS * cell["block"] + 1:
        raise RuntimeError(f"{loop} made {len(stamps) - 1} iterations of {BLOCKS * cell['block']}")
    paces = {clock: pace(_of(stamps, clock), cell["block"]) for clock in stamps[0]}
    return {
        **paces["seconds"],
        **{clock: paces[clock]["steady"] for clock in ("cpu", "own")},
        "start": stamps[0]["seconds"] - begin,
    }


def loops(cell: Cell, setting: Setting) -> Record:
    """Measure all loops with a network."""
    load = os.getloadavg()[0]
    works = {
        loop: functools.partial(_train, cell, loop, setting.device) for loop in cell["contestants"]
    }
    return {"load": load, "laps": in_turns(works, setting.runs)}


def _loop_cells(
    record: Record, name: str, base: Sequence[Record], laps: Sequence[Record]
) -> list[str]:
    cell = record["cell"]
    blocks, cpu, own = (
        [seconds for lap in laps for seconds in lap[clock]] for clock in ("steady", "cpu", "own")
    )
    return [
        f"{cell['batch']}x{cell['patch']}x{cell['patch']}",
        name,
        f"{1 / statistics.median(blocks):.3g}",
        *measuring.milliseconds({"seconds": blocks}),
        *_ratio_cells(base, laps, "steady"),
        f"{1e3 * statistics.median(cpu):.4g}",
        *_ratio_cells(base, laps, "cpu"),
        f"{1e3 * statistics.median(own):.4g}",
        _ratio_cells(base, laps, "own")[0],
        f"{1 / statistics.median(_of(laps, 'whole')):.3g}",
        f"{statistics.median(_of(laps, 'start')):.2f}",
    ]


def _loop_notes(records: list[Record]) -> list[str]:
    sizes = "; ".join(
        f"{cell['network']}: {4 * cell['block']} timed iterations, "
        f"{cell['workers']} workers, {cell['pictures']} pictures to validate on"
        for cell in (record["cell"] for record in records if "laps" in record)
    )
    return [
        "`basicsr.train.train_pipeline` with `SRModel` against `dlgsanet_arch.pipeline.train`, by",
        "option files that differ in what the table names: Tiny's recipe with its optimizer,",
        "average of weights and augmentation, on LMDBs of sub-images. Rates and ms are of",
        "iterations alone, by the clock at the end of the model's steps, in blocks. 'x BasicSR' is",
        "the median over laps of the ratio within a lap, its range beside it. 'with pauses' has a",
        f"validation and a checkpoint in the timed iterations, where the recipe has {SAVE_EVERY}",
        "between two. CPU ms are the main process's, without its workers; 'own' is what is spent",
        "outside the model's step, so what the loop itself costs. 'start, s' is from the call to",
        "the first iteration: ours looks at options, data, weights and disk before.",
        f"bf16 and channels_last compute otherwise. {sizes}.",
        *_notes(records),
    ]


def loop_section(asked: argparse.Namespace) -> Section:
    """Iterations a second."""
    on_gpu = asked.device == "cuda"
    light = {"batch": 16 if on_gpu else 4, "patch": 24, "block": 100 if on_gpu else 20}
    tiny = {"batch": 16 if on_gpu else 1, "patch": 48, "block": 20 if on_gpu else 1}
    works = [(EDSR, light, _SAME_NUMBERS), (TINY, tiny, list(LOOPS))]
    if asked.quick:
        works = [
            (QUICK, {"batch": 2, "patch": 8, "block": 1}, [*_SAME_NUMBERS[:3], list(LOOPS)[-1]])
        ]
    cells = [
        {
            "measure": "training_loop:loops",
            "network": network,
            **sizes,
            "workers": 6 if on_gpu else int(not asked.quick) * 2,
            "pictures": 1 if asked.quick else 2,
            "size": QUICK_SIZE if asked.quick else MADE_SIZE,
            "contestants": names,
        }
        for network, sizes, names in works
    ]
    return _SECTION(
        name="training_loop",
        title="Training loop beside BasicSR's",
        cells=cells,
        columns=f"network | batch | loop | iterations a second | ms | range | {COMPARED} "
        "| own CPU ms | x BasicSR, own | a second with pauses | start, s",
        rows=functools.partial(_rows, _loop_cells),
        notes=_loop_notes,
        runs=3,
    )


def _model(network: str, folder: Path, device: str, *, train: bool) -> Any:
    """Build BasicSR's SRModel with a network of random weights."""
    from basicsr.models import build_model

    recipe = reporting.ROOT / "options" / "train" / f"tiny_x{SCALE}.yml"
    options = yaml.safe_load(recipe.read_text())
    parts = ("models", "training_states", "visualization")
    paths = {"experiments_root": folder, **{part: folder / part for part in parts}}
    for path in paths.values():
        path.mkdir(exist_ok=True)
    options["path"] |= {name: str(path) for name, path in paths.items()}
    options |= {
        "name": "measured",
        "network_g": network_options(network),
        "is_train": train,
        "num_gpu": int(device == "cuda"),
        "dist": False,
        "rank": 0,
        "world_size": 1,
    }
    torch.manual_seed(0)
    return build_model(options)


def _validations(cell: Cell, model: Any, device: str) -> dict[str, Callable[[], Any]]:
    """Return what validates, each with its loader; all return the figures."""
    from basicsr.data import build_dataloader, build_dataset

    from dlgsanet_arch.pipeline.adapter import adapt
    from dlgsanet_arch.pipeline.evaluation import Images
    from dlgsanet_arch.pipeline.processes import Processes

    options = {"name": "pictures", "phase": "val", "scale": SCALE}
    options |= validation_set(cell["pictures"], cell["size"])
    num_gpu = int(device == "cuda")

    def theirs(workers: int) -> Callable[[], dict[str, float]]:
        dataset = build_dataset(options)
        loader = build_dataloader(dataset, options, num_gpu=num_gpu, dist=False, seed=0)
        if workers:
            loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=workers)

        def run() -> dict[str, float]:
            model.nondist_validation(loader, 0, None, False)
            return dict(model.metric_results)

        return run

    def ours(workers: int) -> Callable[[], dict[str, float]]:
        pictures = Images({**options, "num_worker_per_gpu": workers}, Processes())
        return lambda: model.validation(pictures, 0, None, False).means

    adapt(model, Processes())
    return {
        BASICSR: theirs(0),
        f"{BASICSR}, loaded by 2 workers": theirs(2),
        f"{OURS}, 0 workers": ours(0),
        f"{OURS}, 2 workers": ours(2),
    }


def validation(cell: Cell, setting: Setting) -> Record:
    """Measure validations with a network; figures that differ are an error."""
    with tempfile.TemporaryDirectory() as name, _apart(Path(name)):
        model = _model(cell["network"], Path(name), setting.device, train=False)
        works = _validations(cell, model, setting.device)
        figures = works[BASICSR]()
        return {**_compared(works, setting, dict.fromkeys(works, figures)), "figures": figures}


def _validation_cells(
    record: Record, name: str, base: Sequence[Lap], laps: Sequence[Lap]
) -> list[str]:
    count = record["cell"]["pictures"]
    rate = count / statistics.median(_of(laps, "seconds"))
    return [name, f"{rate:.3g}", *_lap_cells(base, laps, count)]


def validation_section(asked: argparse.Namespace) -> Section:
    """Pictures a second in a validation."""
    set14 = _shared_pictures("Set14", "HR") is not None and not asked.quick
    cells = [
        {
            "measure": "training_loop:validation",
            "network": network,
            "pictures": 2 if asked.quick else 6,
            "size": QUICK_SIZE if asked.quick else MADE_SIZE,
        }
        for network in ([QUICK] if asked.quick else [EDSR, TINY])
    ]
    what = "Set14's first 6" if set14 else f"{cells[0]['pictures']} made"
    return _SECTION(
        name="training_loop_validation",
        title="Validation beside BasicSR's",
        cells=cells,
        columns=f"network | validation | pictures a second | ms a picture | range | {COMPARED}",
        rows=functools.partial(_rows, _validation_cells),
        notes=lambda records: [
            "`SRModel.nondist_validation` against what `adapter.adapt` gives the same",
            f"model: {what} pictures, x{SCALE}, PSNR and SSIM of Y, workers' start included.",
            "BasicSR has no option for workers in a validation; the row that has them tells how",
            "much of the difference is loading.",
            _apart_note(records),
            *_notes(records),
        ],
        runs=3,
    )


def checkpoints(cell: Cell, setting: Setting) -> Record:
    """Measure a checkpoint of a network: weights, their average, and the state."""
    from dlgsanet_arch.pipeline.adapter import adapt
    from dlgsanet_arch.pipeline.checkpoints import Checkpoints, Progress
    from dlgsanet_arch.pipeline.processes import Processes
    from dlgsanet_arch.pipeline.samples import Place

    sizes = {}
    with tempfile.TemporaryDirectory() as name, _apart(Path(name)):
        folders = {by: Path(name) / by for by in (BASICSR, OURS)}
        models = {}
        for by, folder in folders.items():
            folder.mkdir()
            models[by] = _model(cell["network"], folder, setting.device, train=True)
            # Once, so that the optimizer has its state, which a checkpoint holds.
            given = {"lq": torch.rand(1, 3, 16, 16)}
            models[by].feed_data({**given, "gt": torch.rand(1, 3, 16 * SCALE, 16 * SCALE)})
            models[by].optimize_parameters(1)
        adapt(models[OURS], Processes())
        progress = Progress(iteration=SAVE_EVERY, place=Place(), epoch_length=1, seed=0)
        saves = {
            BASICSR: lambda: models[BASICSR].save(0, SAVE_EVERY),
            OURS: lambda: Checkpoints(models[OURS], Processes()).save(progress),
        }

        def count_and_remove(by: str) -> None:  # the next has to make the files, as in a run
            files = [path for path in folders[by].rglob("*.*") if path.suffix in SAVED]
            sizes[by] = sum(path.stat().st_size for path in files)
            for path in files:
                path.unlink()

        found = _compared(saves, setting, after=count_and_remove)
        count = sum(each.numel() for each in models[OURS].net_g.parameters())
    return {**found, "sizes": sizes, "parameters": count}


def _checkpoint_cells(
    record: Record, name: str, base: Sequence[Lap], laps: Sequence[Lap]
) -> list[str]:
    return [
        f"{record['parameters'] / 1e6:.3g} M",
        name,
        f"{record['sizes'][name] / 1e6:.1f}",
        f"{1e3 * statistics.median(_of(laps, 'seconds')) / SAVE_EVERY:.3g}",
        *_lap_cells(base, laps),
    ]


def checkpoint_section(asked: argparse.Namespace) -> Section:
    """The cost of a checkpoint."""
    cells = [
        {"measure": "training_loop:checkpoints", "network": network}
        for network in ([QUICK] if asked.quick else [TINY, RRDB])
    ]
    return _SECTION(
        name="training_loop_checkpoints",
        title="Checkpoints beside BasicSR's",
        cells=cells,
        columns="network | parameters | checkpoint | MB | ms an iteration | ms | range | "
        + COMPARED,
        rows=functools.partial(_rows, _checkpoint_cells),
        notes=lambda records: [
            "A checkpoint is the weights, their average and Adam's state, in two new files in the",
            "temporary folder. BasicSR's is handed to the system's cache and not looked at again;",
            "ours is flushed to the disk, read again, checked by its sums and renamed. 'ms an",
            f"iteration' is the cost spread over the recipe's {SAVE_EVERY} iterations between two.",
            *_notes(records),
        ],
        runs=9,
    )


def _outputs(size: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Return a network's made output and the ground truth, (1, 3, H, W) in [0, 1]."""
    target = torch.from_numpy(_made(0, size).copy()).permute(2, 0, 1)[None].float() / 255
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    return (target + noise / 25).to(device), target.to(device)


def _metric_works(
    names: Sequence[str], output: Tensor, target: Tensor
) -> dict[str, Callable[[], dict[str, float]]]:
    """Return what computes figures, from the network's output to numbers."""
    from basicsr.metrics import calculate_psnr, calculate_ssim
    from basicsr.utils import tensor2img

    from dlgsanet_arch import metrics

    functions = {"psnr": calculate_psnr, "ssim": calculate_ssim}

    def theirs() -> dict[str, float]:
        pictures = [tensor2img([each.detach().cpu()]) for each in (output, target)]
        return {
            name: float(functions[name](*pictures, crop_border=SCALE, test_y_channel=True))
            for name in names
        }

    def ours() -> dict[str, float]:
        compared = metrics.compare(output, target, crop_border=SCALE, y_channel=True)
        return {name: getattr(compared, name)().item() for name in names}

    return {BASICSR: theirs, OURS: ours}


def metric_times(cell: Cell, setting: Setting) -> Record:
    """Measure each metric, and both together; figures that differ are an error."""
    output, target = _outputs(cell["size"], setting.device)
    figures = _metric_works(list(TOLERANCES), output, target)[BASICSR]()
    works, expected = {}, {}
    for metric, names in METRICS.items():
        for by, work in _metric_works(names, output, target).items():
            works[f"{metric}, {by}"] = work
            expected[f"{metric}, {by}"] = {name: figures[name] for name in names}
    return _compared(works, setting, expected)


def _metric_cells(_: Record, name: str, base: Sequence[Lap], laps: Sequence[Lap]) -> list[str]:
    return [*name.split(", "), *_lap_cells(base, laps)]


def metric_section(asked: argparse.Namespace) -> Section:
    """The cost of PSNR and SSIM."""
    size = QUICK_SIZE if asked.quick else METRIC_SIZE
    return _SECTION(
        name="training_loop_metrics",
        title="Metrics beside BasicSR's",
        cells=[{"measure": "training_loop:metric_times", "size": size}],
        columns=f"metric | by | ms | range | {COMPARED}",
        rows=functools.partial(_rows, _metric_cells),
        notes=lambda records: [
            f"Y of a picture of {size[1]}x{size[0]}, from the network's output to the figure:",
            "BasicSR's by `tensor2img` and NumPy, as its validation does it, ours from the tensor",
            "on its device. Together, ours makes Y once.",
            _apart_note(records),
            *_notes(records),
        ],
        runs=9,
    )


SECTIONS = {
    "loop": loop_section,
    "validation": validation_section,
    "checkpoints": checkpoint_section,
    "metrics": metric_section,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(SECTIONS), help="one of the four")

    def sections(asked: argparse.Namespace) -> list[Section]:
        return [SECTIONS[name](asked) for name in ([asked.only] if asked.only else SECTIONS)]

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {DATA: folder}):
        return measuring.run(sections, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
