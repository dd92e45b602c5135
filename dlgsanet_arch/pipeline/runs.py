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
from dlgsanet_arch.pipeline.logs import RunLog, run_log, start_trackers
from dlgsanet_arch.pipeline.loop import Training
from dlgsanet_arch.pipeline.preparation import Prepared
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
    """Return a warning where a run's checkpoints will not all fit on the disk, or "".

    Raises:
        UserError: The disk cannot hold two: the old one stays until the new one is complete.
    """
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


def _make_folders(prepared: Prepared, folder: Path) -> list[str]:
    """Make the run's folders, a new one in place of an earlier run's; return lines for the log."""
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


# ---- a run


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
    """A run that was prepared: what it does is set up, tried, locked and then begun."""

    def __init__(self, prepared: Prepared, processes: Processes, log: RunLog) -> None:
        self.prepared, self.processes, self.log = prepared, processes, log
        self.opt, self.start = prepared.opt, prepared.start
        kind = "experiments_root" if self.opt["is_train"] else "results_root"
        self.folder = Path(self.opt["path"][kind])
        self._warning = ""
        for is_warning, line in prepared.notes:
            (log.warning if is_warning else log.info)(line)

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
        for line in weights.load(model, self.opt["as_given"], self.prepared.weights):
            self.log.info(line)
        return model

    def try_measurements(self, sets: list[Images]) -> None:
        """Try the metrics on the smallest size of each data set."""
        for images in sets:
            smallest = self.prepared.smallest.get(images.dataset.opt["name"])
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
                    self._warning = stack.enter_context(lock)
            changed = self.start.path and numbered(self.folder).keys() - seen.keys()
            if self.processes.share(bool(changed)):
                raise UserError(f"another process continued {self.folder}; run this again")
            yield

    def begin(self) -> None:
        """Make the folders and open the logs; every process calls."""
        lines, opt = [], self.opt
        with self.processes.agreed():
            if self.processes.is_main:
                lines = _make_folders(self.prepared, self.folder)
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


def train(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.train`."""
    with _prepared(root, arguments, train=True) as run:
        with run.set_up():
            training = Training(
                run.opt,
                run.processes,
                run.log,
                run.start,
                run.model,
                apply_edits=arguments.apply_edits,
            )
            if not arguments.no_trial:
                training.try_step()
                run.try_measurements(training.validations)
            if run.processes.is_main and (warning := room_warning(training.model, run.opt)):
                run.log.warning(warning)

        def begin() -> None:
            run.begin()
            start_trackers(run.log, run.opt, run.processes, run.start.iteration + 1)

        with run.locked():
            run.log.record("start", iter=run.start.iteration, options=run.opt["as_given"])
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
                results.append(model.validation(images, run.opt["name"], None, save_img))
                means = results[-1].means
                run.log.record("test", dataset=results[-1].dataset, metrics=means)
            if run.processes.is_main and results:
                reports.write(results, run.folder)
