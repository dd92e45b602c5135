"""A run from its command line to its end: prepared, tried, locked, its folders made."""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_env_info, get_time_str, set_random_seed
from basicsr.utils.options import copy_opt_file, dict2str

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import UNFINISHED, disk_faults_named
from dlgsanet_arch.pipeline import adapter, disk, preparation, reports, trial, weights
from dlgsanet_arch.pipeline.checkpoints import numbered
from dlgsanet_arch.pipeline.images import Images, build_loader
from dlgsanet_arch.pipeline.lock import one_run
from dlgsanet_arch.pipeline.logs import RunLog, run_log, start_trackers
from dlgsanet_arch.pipeline.loop import Training
from dlgsanet_arch.pipeline.preparation import Prepared
from dlgsanet_arch.pipeline.processes import Processes, started
from dlgsanet_arch.pipeline.samples import system_limit


@contextmanager
def _current_folder(root: Path) -> Iterator[None]:
    """Data sets and losses of BasicSR's find relative paths from the current folder."""
    before = Path.cwd()
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _alone(name: str, processes: Processes, folder: Path) -> Iterator[str]:
    """Hold the run's lock in the main process, for all of them; yield its warning, or ""."""
    warning, error = "", None
    with ExitStack() as stack:
        if processes.is_main:
            lock = one_run(folder.with_name(f".{folder.name}.lock"), f"the run {name}")
            try:
                warning = stack.enter_context(lock)
            except Exception as caught:
                error = caught
        processes.agree(error)
        yield warning


def _archive(folder: Path) -> Path:
    """Rename a folder as BasicSR does, and number what two runs within one second leave."""
    name = f"{folder.name}_archived_{time.strftime('%Y%m%d_%H%M%S')}"
    free = (folder.with_name(f"{name}_{n}" if n > 1 else name) for n in itertools.count(1))
    target = next(path for path in free if not path.exists())
    return folder.rename(target)


def _make_folders(prepared: Prepared, folder: Path) -> list[str]:
    """Rename what an earlier run left, where this one is new, and make the run's folders.

    Returns:
        Lines for the log.
    """
    opt, path, lines = prepared.opt, prepared.opt["path"], []
    is_new = prepared.start.path is None
    with disk_faults_named(f"the run's folder {folder} cannot be made"):
        if is_new and folder.exists():
            lines.append(f"the earlier run of this name is now {_archive(folder)}")
        folder.mkdir(parents=True, exist_ok=True)
        for key in ("models", "training_states", "visualization"):
            if key in path:
                Path(path[key]).mkdir(exist_ok=True)
        for left in folder.glob(f"*/*{UNFINISHED}"):  # by a run that was killed while it wrote
            left.unlink()
        tensorboard = Path(opt["root_path"]) / "tb_logger" / opt["name"]
        if opt["is_train"] and is_new and tensorboard.exists():
            _archive(tensorboard)
        copy_opt_file(str(prepared.arguments.opt), str(folder))
    return lines


class _Run:
    """A run that was prepared: what it does is set up, tried, and then begun.

    Args:
        prepared: Its options and files.
        processes: The processes of the run.
        log: Its logs, not open yet.
    """

    def __init__(self, prepared: Prepared, processes: Processes, log: RunLog) -> None:
        self.prepared, self.processes, self.log = prepared, processes, log
        self.opt = prepared.opt
        kind = "experiments_root" if self.opt["is_train"] else "results_root"
        self.folder = Path(self.opt["path"][kind])
        self._warning = ""
        for is_warning, line in prepared.notes:
            (log.warning if is_warning else log.info)(line)

    def set_up(self, make: Callable[["_Run"], Any]) -> Any:
        """Call `make` on every process; an error on one is one on all."""
        work, error = None, None
        try:
            disk.check_folder(self.folder)
            torch.backends.cudnn.benchmark = True
            set_random_seed(self.opt["manual_seed"] + self.processes.rank)
            work = make(self)
        except Exception as caught:  # the others wait for this process, and are to learn of it
            error = caught
        self.processes.agree(error)
        return work

    def model(self) -> Any:
        """Build the model, its networks with the weights that the run starts from."""
        with trial.explained("building the model", self.opt["as_given"]):
            model = adapter.build(self.opt, self.processes)
        for line in weights.load(model, self.opt["as_given"], self.prepared.weights):
            self.log.info(line)
        return model

    def try_measurements(self, images: Images) -> None:
        """Try the metrics on a set, unless the command line leaves trials out."""
        if not self.prepared.arguments.no_trial:
            smallest = self.prepared.smallest.get(images.dataset.opt["name"])
            trial.measurements(images, smallest, self.opt["as_given"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock."""
        seen = numbered(self.folder)
        with _alone(self.opt["name"], self.processes, self.folder) as self._warning:
            changed = self.prepared.start.path and numbered(self.folder).keys() - seen.keys()
            if self.processes.share(bool(changed)):
                raise UserError(f"another process continued {self.folder}; run this again")
            yield

    def begin(self) -> None:
        """Make the folders and open the logs; every process calls."""
        lines, error = [], None
        opt, processes = self.opt, self.processes
        try:
            if processes.is_main:
                lines = _make_folders(self.prepared, self.folder)
        except Exception as caught:
            error = caught
        processes.agree(error)
        text_log = f"{'train' if opt['is_train'] else 'test'}_{opt['name']}_{get_time_str()}.log"
        shown = {key: value for key, value in opt.items() if key != "as_given"}
        self.log.open(self.folder, text_log, [get_env_info(), dict2str(shown), *lines])
        if self._warning:
            self.log.warning(self._warning)


@contextmanager
def _prepared(root: Path, arguments: argparse.Namespace, *, train: bool) -> Iterator[_Run]:
    arguments, options = preparation.read(root, arguments, train=train)
    with (
        started(arguments.launcher, options) as processes,
        _current_folder(arguments.root),
        run_log(processes) as log,
    ):
        try:
            prepared = preparation.prepare(arguments, options, processes, train=train)
            yield _Run(prepared, processes, log)
        except (OSError, RuntimeError) as error:
            if limit := system_limit(error):
                raise UserError(limit) from error
            raise


def _training(run: _Run) -> Training:
    """Set a training up and try it."""
    start = run.prepared.start
    arguments = run.prepared.arguments
    training = Training(
        run.opt, run.processes, run.log, start, run.model, apply_edits=arguments.apply_edits
    )
    if not arguments.no_trial:
        training.try_step()
    for images in training.validations:
        run.try_measurements(images)
    if run.processes.is_main and (warning := disk.room_warning(training.model, run.opt)):
        run.log.warning(warning)
    return training


def train(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.train`."""
    with _prepared(root, arguments, train=True) as run:
        training = run.set_up(_training)

        def begin() -> None:
            run.begin()
            first = run.prepared.start.iteration + 1
            start_trackers(run.log, run.opt, run.processes, first)

        with run.locked():
            run.log.record("start", iter=run.prepared.start.iteration, options=run.opt["as_given"])
            training.run(begin)


def _testing(run: _Run) -> tuple[Any, list[Images]]:
    """Set a test up and try it."""
    sets = [
        build_loader(dataset_opt, run.processes)
        for _, dataset_opt in sorted(run.opt["datasets"].items())
    ]
    model = run.model()
    for images in sets:
        run.try_measurements(images)
    return model, sets


def test(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.test`."""
    with _prepared(root, arguments, train=False) as run:
        model, sets = run.set_up(_testing)
        with run.locked():
            run.begin()
            results = []
            for images in sets:
                run.log.info(f"Testing {images.dataset.opt['name']}...")
                save_img = run.opt["val"]["save_img"]
                result = model.validation(images, run.opt["name"], None, save_img)
                results.append(result)
                run.log.record("test", dataset=result.dataset, metrics=result.means)
            if run.processes.is_main and results:
                reports.write(results, run.folder)
