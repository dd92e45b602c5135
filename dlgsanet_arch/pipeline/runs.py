"""A run from its command line to its end: prepared, tried, locked, its folders made."""

import argparse
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_env_info, get_time_str, set_random_seed
from basicsr.utils.options import copy_opt_file, dict2str

from dlgsanet_arch.averaging import bare, networks_of
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import UNFINISHED, disk_faults_named
from dlgsanet_arch.pipeline import adapter, preparation, reports, trial, weights
from dlgsanet_arch.pipeline.checkpoints import numbered
from dlgsanet_arch.pipeline.evaluation import Images
from dlgsanet_arch.pipeline.lock import one_run
from dlgsanet_arch.pipeline.logs import RunLog
from dlgsanet_arch.pipeline.loop import Training
from dlgsanet_arch.pipeline.processes import Processes, started
from dlgsanet_arch.pipeline.samples import system_limit


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
    tensors = [
        tensor
        for network in networks_of(model).values()
        for tensor in bare(network).state_dict().values()
    ]
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


@contextmanager
def _current_folder(root: Path) -> Iterator[None]:
    """Data sets and losses of BasicSR's find relative paths from the current folder."""
    before = Path.cwd()
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)


class _Run:
    """A run: prepared, then set up, tried, locked and begun."""

    def __init__(
        self, arguments: argparse.Namespace, processes: Processes, log: RunLog, prepared: tuple
    ) -> None:
        self.arguments, self.processes, self.log = arguments, processes, log
        self.opt, self.start, self._weights, self._smallest = prepared
        kind = "experiments_root" if self.opt["is_train"] else "results_root"
        self.folder = Path(self.opt["path"][kind])

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

    def try_measurements(self, sets: list[Images]) -> None:
        """Try the metrics on the smallest size of each data set."""
        for images in sets:
            smallest = self._smallest.get(images.dataset.opt["name"])
            trial.measurements(images, smallest, self.opt["as_given"])

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
        with (
            self.processes.agreed(),
            disk_faults_named(f"the run's folder {self.folder} cannot be made"),
        ):
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
    options = preparation.read(root, arguments, train=train)
    with (
        started(arguments.launcher, options) as processes,
        _current_folder(arguments.root),
        RunLog(processes) as log,
    ):
        try:
            prepared = preparation.prepare(arguments, options, processes, log, train=train)
            yield _Run(arguments, processes, log, prepared)
        except (OSError, RuntimeError) as error:
            if limit := system_limit(error):
                raise UserError(limit) from error
            raise


def train(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.train`."""
    with _prepared(root, arguments, train=True) as run:
        opt, processes, log, start = run.opt, run.processes, run.log, run.start
        with run.set_up():
            edits = arguments.apply_edits
            training = Training(opt, processes, log, start, run.model, apply_edits=edits)
            if not arguments.no_trial:
                training.try_step()
                run.try_measurements(training.validations)
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
                run.try_measurements(sets)
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
