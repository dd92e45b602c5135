"""From a command line to complete options, and the files that a run starts from, read.

Nothing is created here.
"""

import argparse
import copy
import importlib
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dlgsanet_arch import _basicsr
from dlgsanet_arch import options as option_files
from dlgsanet_arch.data import check
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import suggest_or_list
from dlgsanet_arch.options import Context, shipped
from dlgsanet_arch.options.context import is_whole
from dlgsanet_arch.pipeline import checkpoints, weights
from dlgsanet_arch.pipeline.checkpoints import Start
from dlgsanet_arch.pipeline.logs import RunLog
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.weights import Source


def _import_packages(names: Sequence[str], root: Path) -> None:
    """Import third-party packages, which register their networks and models in BasicSR."""
    if str(root) not in sys.path:
        sys.path.append(str(root))  # a file in the folder of train.py can be named, too
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever another package's import may raise
            raise UserError(
                f"--import {name}: it cannot be imported ({type(error).__name__}: {error}); give "
                "the name of an installed package, or of a module below the root folder"
            ) from error


def registered() -> dict[str, dict[str, Any]]:
    """Return what BasicSR's registries hold, by registry and name."""
    for package in ("archs", "models", "data", "losses", "metrics"):
        _basicsr.import_basicsr(f"basicsr.{package}")
    module = _basicsr.import_basicsr("basicsr.utils.registry")
    kinds = ("arch", "model", "dataset", "metric", "loss")
    return {kind: dict(iter(getattr(module, f"{kind.upper()}_REGISTRY"))) for kind in kinds}


def _for_parts(
    options: Mapping[str, Any], root: Path, processes: Processes, *, train: bool
) -> dict[str, Any]:
    """Complete options as BasicSR's models, data sets and loggers expect them."""
    opt = copy.deepcopy(dict(options))
    opt |= {
        "is_train": train,
        "dist": processes.distributed,
        "rank": processes.rank,
        "world_size": processes.world,
        "root_path": str(root),
        "as_given": copy.deepcopy(dict(options)),
    }
    if opt["num_gpu"] == "auto":
        opt["num_gpu"] = torch.cuda.device_count()
    if opt.get("manual_seed") is None:
        opt["manual_seed"] = processes.share(random.SystemRandom().randint(1, 10000))
    for phase, dataset in opt["datasets"].items():
        dataset |= {"phase": phase.split("_")[0], "scale": opt["scale"]}
        for key in ("dataroot_gt", "dataroot_lq"):
            if dataset.get(key) is not None:
                dataset[key] = str(Path(dataset[key]).expanduser())
    path = opt["path"]
    for key, value in path.items():
        if value is not None and ("resume_state" in key or "pretrain_network" in key):
            path[key] = str(Path(value).expanduser())
    kind = "experiments" if train else "results"
    run = root / kind / opt["name"]
    path |= {f"{kind}_root": str(run), "log": str(run), "visualization": str(run / "visualization")}
    if train:
        path |= {"models": str(run / "models"), "training_states": str(run / "training_states")}
    return opt


def _shorten_for_debugging(options: dict[str, Any]) -> None:
    """Name a run `debug_…`, and let it print and save often: `--debug`, as BasicSR has it."""
    if not options["name"].startswith("debug"):
        options["name"] = f"debug_{options['name']}"
    changes = {"val": {"val_freq": 8}, "logger": {"print_freq": 1, "save_checkpoint_freq": 8}}
    for section, values in changes.items():
        if isinstance(options.get(section), dict):
            options[section] |= values


def _take_sets(options: dict[str, Any], names: Sequence[str]) -> None:
    """Leave only the data sets with these names."""
    datasets = options.get("datasets")
    if not isinstance(datasets, dict):  # the check will say so
        return
    sets = {phase: each for phase, each in datasets.items() if isinstance(each, dict)}
    by_name = {str(each.get("name")): phase for phase, each in sets.items()}
    for name in names:
        if name not in by_name:
            hint = suggest_or_list(name, by_name)
            raise UserError(f"--sets: the option file has no data set {name!r}{hint}")
    options["datasets"] = {by_name[name]: datasets[by_name[name]] for name in names}


def read(root: Path, arguments: argparse.Namespace, *, train: bool) -> dict[str, Any]:
    """Read the option file that a command line names, by its path or by a shipped one's name.

    Returns the options with `--force_yml`; `opt` and `root` of the arguments become absolute.
    """
    arguments.root = (arguments.root or root).expanduser().resolve()
    if not arguments.root.is_dir():
        raise UserError(f"--root: folder {arguments.root} does not exist")
    arguments.opt = shipped.find(arguments.opt.expanduser(), train=train).resolve()
    options = option_files.load(arguments.opt)
    option_files.override(options, arguments.force_yml)
    if not train and arguments.sets:
        _take_sets(options, arguments.sets)
    if arguments.debug and isinstance(options.get("name"), str):
        _shorten_for_debugging(options)
    return options


def prepare(
    arguments: argparse.Namespace,
    options: dict[str, Any],
    processes: Processes,
    log: RunLog,
    *,
    train: bool,
) -> tuple[dict[str, Any], Start, dict[str, Source], dict[str, tuple[int, int]]]:
    """Check options, data and files; one UserError lists every problem.

    Returns the options as BasicSR's parts take them, with `root_path`, `as_given` and paths; what
    the run resumes from; the weights by option key; and height and width of the smallest HR image
    by name of data set.
    """
    _import_packages(arguments.packages, arguments.root)
    context = Context(options, train, arguments.root, registered())
    start = sources = smallest = None
    with processes.agreed():
        if processes.is_main:
            start, sources, smallest = _check(context, arguments, processes, log)
    state, smallest = processes.share((start and start.path, smallest))
    with processes.agreed():
        if not processes.is_main:  # each process reads for itself
            start = checkpoints.read_pair(state, options) if state else Start()
            sources, problems, _ = weights.sources(context, start)
            option_files.refuse(problems)
    opt = _for_parts(options, arguments.root, processes, train=train)
    opt["auto_resume"] = train and arguments.auto_resume
    if start.path is not None:
        opt["path"]["resume_state"] = str(start.path)
    for key, (path, _) in start.networks.items():  # for a class that loads by itself
        label = key.removeprefix("network_")
        opt["path"] |= {f"pretrain_{key}": str(path), f"strict_load_{label}": True}
        opt["path"][f"param_key_{label}"] = "params"
    return opt, start, sources, smallest


def _check(
    context: Context, arguments: argparse.Namespace, processes: Processes, log: RunLog
) -> tuple[Start, dict[str, Source], dict[str, tuple[int, int]]]:
    """Check options, data and files, and read what the run starts from."""
    options, root, train, known = context.options, context.root, context.train, context.registered
    problems = option_files.problems(options, train=train, root=root, registered=known)
    gpus, asked = torch.cuda.device_count(), options.get("num_gpu")
    if is_whole(asked) and asked > gpus:
        problems.append(
            f"num_gpu: is {asked}, but PyTorch sees {gpus} CUDA devices here; write `num_gpu: "
            f"auto`, or add --force_yml num_gpu={gpus}"
        )
    scanned = check.scan(options, root, train=train, registered=known)
    problems += scanned.problems
    start, sources, notes = Start(), {}, []
    if isinstance(options.get("path"), dict) and isinstance(options.get("name"), str):
        try:
            if train:
                start = checkpoints.find_start(options, root, auto_resume=arguments.auto_resume)
        except UserError as error:
            problems.append(str(error))
        sources, wrong, notes = weights.sources(context, start)
        problems += wrong
    if train:
        gpus = min(asked, gpus) if is_whole(asked) else gpus
        copies = processes.world if processes.distributed else max(1, gpus)
        problems += check.batch_problems(options, scanned.samples, copies)
    option_files.refuse(problems)
    for line in scanned.warnings:
        log.warning(line)
    for line in start.passed_over:
        log.warning(f"not complete, and passed over: {line}")
    for line in scanned.notes + notes:
        log.info(line)
    named = options["datasets"]
    return start, sources, {named[phase]["name"]: size for phase, size in scanned.smallest.items()}
