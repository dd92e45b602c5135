"""A run from its command line to its end: read, checked, tried, locked, its folders made.

Nothing is created before all of the run is known to work.
"""

import argparse
import copy
import importlib
import itertools
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_env_info, get_time_str, set_random_seed
from basicsr.utils.options import copy_opt_file, dict2str

from dlgsanet_arch import _basicsr
from dlgsanet_arch import options as option_files
from dlgsanet_arch.averaging import bare, networks_of
from dlgsanet_arch.data import check
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import UNFINISHED, disk_faults_named
from dlgsanet_arch.hints import suggest_or_list
from dlgsanet_arch.options import Context, shipped
from dlgsanet_arch.options.context import is_whole
from dlgsanet_arch.options.walk import compare
from dlgsanet_arch.pipeline import adapter, checkpoints, reports, trial, weights
from dlgsanet_arch.pipeline.checkpoints import Start, numbered
from dlgsanet_arch.pipeline.evaluation import Images
from dlgsanet_arch.pipeline.logs import RunLog
from dlgsanet_arch.pipeline.loop import Training
from dlgsanet_arch.pipeline.processes import Processes, one_run, started
from dlgsanet_arch.pipeline.samples import system_limit


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


def _shorten_for_debugging(options: dict[str, Any]) -> None:
    """Name a run `debug_…`, and let it print and save often: `--debug`, as BasicSR has it."""
    if not options["name"].startswith("debug"):
        options["name"] = f"debug_{options['name']}"
    changes = {"val": {"val_freq": 8}, "logger": {"print_freq": 1, "save_checkpoint_freq": 8}}
    for section, values in changes.items():
        if isinstance(options.get(section), dict):
            options[section] |= values


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


def _for_parts(context: Context, processes: Processes) -> dict[str, Any]:
    """Complete options as BasicSR's models, data sets and loggers expect them."""
    root, opt = context.root, copy.deepcopy(dict(context.options))
    opt |= {
        "is_train": context.train,
        "dist": processes.distributed,
        "rank": processes.rank,
        "world_size": processes.world,
        "root_path": str(root),
        "as_given": copy.deepcopy(opt),
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
    kind = "experiments" if context.train else "results"
    run = root / kind / opt["name"]
    path |= {f"{kind}_root": str(run), "log": str(run), "visualization": str(run / "visualization")}
    if context.train:
        path |= {"models": str(run / "models"), "training_states": str(run / "training_states")}
    return opt


def check_folder(folder: Path) -> None:
    """Raise a UserError if a folder, which may not exist yet, cannot be written to."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder} cannot be made: {there} is not a folder, or cannot be written to; rename "
            "it, or choose another --root"
        )


def room_warning(model: Any, opt: Mapping[str, Any]) -> str:
    """Return a warning if the checkpoints will not all fit on the disk; two must fit."""
    networks = networks_of(model).values()
    tensors = [each for network in networks for each in bare(network).state_dict().values()]
    for optimizer in model.optimizers:  # Adam's two moments
        tensors += 2 * [each for group in optimizer.param_groups for each in group["params"]]
    # float32, and a record of the file
    pair = sum(4 * tensor.numel() + 400 for tensor in tensors) / 1e9
    run, logger = Path(opt["path"]["experiments_root"]), opt["logger"]
    saved = max(1, int(opt["train"]["total_iter"] // logger["save_checkpoint_freq"]))
    count = min(saved, logger.get("keep_last") or saved) + 1  # and what the end or the best leaves
    there = next(path for path in (run, *run.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    text = f"{run} has {free:.3g} GB free; a checkpoint of weights and state takes {pair:.3g} GB"
    if free < 2 * pair:
        raise UserError(f"logger: {text}: make room for at least two")
    if free < count * pair:
        return (
            f"logger:keep_last: {text}, and {count} take {count * pair:.3g} GB: they will not all "
            "fit; write a number to keep, or save less often"
        )
    return ""


def _archive(folder: Path) -> Path:
    """Rename a folder as BasicSR does, and number what two runs within one second leave."""
    name = f"{folder.name}_archived_{time.strftime('%Y%m%d_%H%M%S')}"
    free = (folder.with_name(f"{name}_{n}" if n > 1 else name) for n in itertools.count(1))
    return folder.rename(next(path for path in free if not path.exists()))


class _Run:
    """A run: checked by its constructor, then set up, tried, locked and begun.

    One UserError lists every problem of options, data and files. `opt` has the options as BasicSR's
    parts take them, `start` what the run resumes from.
    """

    def __init__(
        self, arguments: argparse.Namespace, context: Context, processes: Processes, log: RunLog
    ) -> None:
        self.arguments, self.processes, self.log = arguments, processes, log
        self.start, options = Start(), context.options
        self._smallest: dict[str, tuple[int, int]] = {}  # HR image, by name of data set
        with processes.agreed():
            if processes.is_main:
                self._check(context)
        state, self._smallest = processes.share((self.start.path, self._smallest))
        with processes.agreed():
            if not processes.is_main:  # each process reads for itself
                if state:
                    self.start = checkpoints.read_pair(state, options)
                self._weights, problems, _ = weights.sources(context, self.start)
                option_files.refuse(problems)
        self.opt = opt = _for_parts(context, processes)
        opt["auto_resume"] = context.train and arguments.auto_resume
        if state is not None:
            opt["path"]["resume_state"] = str(state)
        for key, (path, _) in self.start.networks.items():  # for a class that loads by itself
            label = key.removeprefix("network_")
            opt["path"] |= {f"pretrain_{key}": str(path), f"strict_load_{label}": True}
            opt["path"][f"param_key_{label}"] = "params"
        self.folder = Path(opt["path"]["experiments_root" if context.train else "results_root"])

    def _check(self, context: Context) -> None:
        """Check options, data and files, and read what the run starts from."""
        train = context.train
        known = {"train": train, "root": context.root, "registered": context.registered}
        problems = option_files.problems(context.options, **known)
        # Values that are wrong by themselves are left out of the following checks.
        options = compare(context, [])
        context = replace(context, options=options)
        gpus, asked = torch.cuda.device_count(), options.get("num_gpu")
        if is_whole(asked) and asked > gpus:
            problems.append(
                f"num_gpu: is {asked}, but PyTorch sees {gpus} CUDA devices here; write `num_gpu: "
                f"auto`, or add --force_yml num_gpu={gpus}"
            )
        scanned, notes = check.scan(options, **known), []
        problems += scanned.problems
        if isinstance(options.get("path"), dict) and isinstance(options.get("name"), str):
            resume = self.arguments.auto_resume
            try:
                if train:
                    self.start = checkpoints.find_start(options, context.root, auto_resume=resume)
            except UserError as error:
                problems.append(str(error))
            self._weights, wrong, notes = weights.sources(context, self.start)
            problems += wrong
        if train:
            gpus = min(asked, gpus) if is_whole(asked) else gpus
            copies = self.processes.world if self.processes.distributed else max(1, gpus)
            problems += check.batch_problems(options, scanned.samples, copies)
        option_files.refuse(problems)
        for line in scanned.warnings:
            self.log.warning(line)
        for line in self.start.passed_over:
            self.log.warning(f"not complete, and passed over: {line}")
        for line in scanned.notes + notes:
            self.log.info(line)
        sets = options["datasets"]
        self._smallest = {sets[phase]["name"]: size for phase, size in scanned.smallest.items()}

    @contextmanager
    def set_up(self) -> Iterator[None]:
        """Set up and try what is to be done; an error on one process is one on all."""
        with self.processes.agreed():
            check_folder(self.folder)
            torch.backends.cudnn.benchmark = True
            set_random_seed(self.opt["manual_seed"] + self.processes.rank)
            yield

    def model(self) -> Any:
        """Build the model, its networks with the weights that the run starts from."""
        with trial.explained("building the model", self.opt["as_given"]):
            model = adapter.build(self.opt, self.processes)
        for line in weights.load(model, self.opt["as_given"], self._weights):
            self.log.info(line)
        return model

    def try_measurements(self, model: Any, sets: list[Images]) -> None:
        """Try the model on an image of each data set, and the metrics on its smallest size."""
        for images in sets:
            smallest = self._smallest.get(images.dataset.opt["name"])
            trial.measurements(model, images, smallest, self.opt["as_given"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock in the main process, for all of them."""
        seen = numbered(self.folder)
        with ExitStack() as stack:
            with self.processes.agreed():
                if self.processes.is_main:
                    path = self.folder.with_name(f".{self.folder.name}.lock")
                    lock = one_run(path, f"the run {self.opt['name']}")
                    if warning := stack.enter_context(lock):
                        self.log.warning(warning)
            changed = self.start.path and numbered(self.folder).keys() - seen.keys()
            if self.processes.share(bool(changed)):
                raise UserError(f"another process continued {self.folder}; run this again")
            yield

    def begin(self) -> None:
        """Make the folders and open the logs; every process calls."""
        opt = self.opt
        fault = f"the run's folder {self.folder} cannot be made"
        with self.processes.agreed(), disk_faults_named(fault):
            if self.processes.is_main:
                self._make_folders()
        text_log = f"{'train' if opt['is_train'] else 'test'}_{opt['name']}_{get_time_str()}.log"
        shown = {key: value for key, value in opt.items() if key != "as_given"}
        self.log.open(self.folder, text_log, [get_env_info(), dict2str(shown)])

    def _make_folders(self) -> None:
        """Make the run's folders, a new run's in place of an earlier one's."""
        opt, folder = self.opt, self.folder
        if self.start.path is None:
            if folder.exists():
                self.log.info(f"the earlier run of this name is now {_archive(folder)}")
            tensorboard = Path(opt["root_path"]) / "tb_logger" / opt["name"]
            if opt["is_train"] and tensorboard.exists():
                _archive(tensorboard)
        folder.mkdir(parents=True, exist_ok=True)
        for key in {"models", "training_states", "visualization"} & opt["path"].keys():
            Path(opt["path"][key]).mkdir(exist_ok=True)
        for left in folder.glob(f"*/*{UNFINISHED}"):  # by a run that was killed while it wrote
            left.unlink()
        copy_opt_file(str(self.arguments.opt), str(folder))


@contextmanager
def _prepared(root: Path, arguments: argparse.Namespace, *, train: bool) -> Iterator[_Run]:
    options, before = read(root, arguments, train=train), Path.cwd()
    early: list[str] = []  # what is needed to join the other processes
    compare(Context(options, train, arguments.root, None), early)
    option_files.refuse([line for line in early if line.startswith("dist_params")])
    with started(arguments.launcher, options) as processes, RunLog(processes) as log:
        # data sets and losses of BasicSR's find relative paths from the current folder
        os.chdir(arguments.root)
        try:
            _import_packages(arguments.packages, arguments.root)
            context = Context(options, train, arguments.root, registered())
            yield _Run(arguments, context, processes, log)
        except (OSError, RuntimeError) as error:
            if limit := system_limit(error):
                raise UserError(limit) from error
            raise
        finally:
            os.chdir(before)


def train(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.train`."""
    with _prepared(root, arguments, train=True) as run:
        opt, processes, log, start = run.opt, run.processes, run.log, run.start
        with run.set_up():
            edits = arguments.apply_edits
            training = Training(
                opt, processes, log, start, run.model, began=arguments.began, apply_edits=edits
            )
            if not arguments.no_trial:
                training.try_step()
                run.try_measurements(training.model, training.validations)
            if processes.is_main and (warning := room_warning(training.model, opt)):
                log.warning(warning)

        def begin() -> None:
            run.begin()
            log.start_trackers(opt, start.iteration + 1)

        with run.locked():
            log.record("start", iter=start.iteration, options=opt["as_given"])
            training.run(begin)


def test(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.test`."""
    with _prepared(root, arguments, train=False) as run:
        with run.set_up():
            datasets = sorted(run.opt["datasets"].items())
            sets = [Images(dataset_opt, run.processes) for _, dataset_opt in datasets]
            model = run.model()
            if not arguments.no_trial:
                run.try_measurements(model, sets)
        with run.locked():
            run.begin()
            results = []
            for images in sets:
                run.log.info(f"Testing {images.dataset.opt['name']}...")
                save_img = run.opt["val"]["save_img"]
                found = model.validation(images, run.opt["name"], None, save_img)
                results.append(found)
                run.log.record("test", dataset=found.dataset, metrics=found.means)
            if run.processes.is_main and results:
                reports.write(results, run.folder)
