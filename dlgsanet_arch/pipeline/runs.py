"""A run from its command line to its end: prepared, locked, its folders made, its logs opened."""

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from dlgsanet_arch.files import UNFINISHED, disk_faults_named
from dlgsanet_arch.pipeline import preparation
from dlgsanet_arch.pipeline.lock import one_run
from dlgsanet_arch.pipeline.logs import RunLog, run_log, start_trackers
from dlgsanet_arch.pipeline.preparation import Prepared
from dlgsanet_arch.pipeline.processes import Processes, started


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
def _alone(prepared: Prepared, processes: Processes, folder: Path) -> Iterator[str]:
    """Hold the run's lock in the main process, for all of them; yield its warning, or ""."""
    warning, error = "", None
    with ExitStack() as stack:
        if processes.is_main:
            lock = one_run(
                folder.with_name(f".{folder.name}.lock"), f"the run {prepared.opt['name']}"
            )
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


def _make_folders(prepared: Prepared, processes: Processes) -> list[str]:
    """Rename what an earlier run left, where this one is new, and make the run's folders.

    Returns:
        Lines for the log.
    """
    from basicsr.utils.options import copy_opt_file

    opt, lines = prepared.opt, []
    path = opt["path"]
    kind = "experiments_root" if opt["is_train"] else "results_root"
    folder = Path(path[kind])
    with disk_faults_named(f"the run's folder {folder} cannot be made"):
        if prepared.start.state is None and folder.exists():
            lines.append(f"the earlier run of this name is now {_archive(folder)}")
        for key in (kind, "models", "training_states", "visualization"):
            if key in path:
                Path(path[key]).mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*/*{UNFINISHED}"):  # by a run that was killed while it wrote
            left.unlink()
        if opt["is_train"]:
            tensorboard = Path(opt["root_path"]) / "tb_logger" / opt["name"]
            if prepared.start.state is None and tensorboard.exists():
                _archive(tensorboard)
        copy_opt_file(str(prepared.option_file), str(folder))
    return lines


@contextmanager
def _opened(
    root: Path, arguments: argparse.Namespace, *, train: bool
) -> Iterator[tuple[Prepared, Processes, RunLog]]:
    """Prepare a run and open it; everything is closed again at the end."""
    arguments, options = preparation.read(root, arguments, train=train)
    with started(arguments.launcher, options) as processes, _current_folder(arguments.root):
        prepared = preparation.prepare(arguments, options, processes, train=train)
        opt = prepared.opt
        folder = Path(opt["path"]["experiments_root" if train else "results_root"])
        with _alone(prepared, processes, folder) as lock_warning:
            from basicsr.utils import get_env_info, get_time_str, set_random_seed
            from basicsr.utils.options import dict2str

            lines = _make_folders(prepared, processes) if processes.is_main else []
            processes.barrier()
            text_log = f"{'train' if train else 'test'}_{opt['name']}_{get_time_str()}.log"
            with run_log(processes, folder, text_log) as log:
                log.info(get_env_info())
                log.info(dict2str({key: value for key, value in opt.items() if key != "as_given"}))
                for line in lines:
                    log.info(line)
                if lock_warning:
                    log.warning(lock_warning)
                for is_warning, line in prepared.notes:
                    (log.warning if is_warning else log.info)(line)
                torch.backends.cudnn.benchmark = True
                set_random_seed(opt["manual_seed"] + processes.rank)
                yield prepared, processes, log


def train(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.train`."""
    with _opened(root, arguments, train=True) as (prepared, processes, log):
        from dlgsanet_arch.pipeline.loop import Training

        opt, start = prepared.opt, prepared.start
        log.record("start", iter=start.iteration, options=opt["as_given"])
        start_trackers(log, opt, processes, start.iteration + 1)
        Training(opt, processes, log, start, apply_edits=prepared.arguments.apply_edits).run()


def test(root: Path, arguments: argparse.Namespace) -> None:
    """See `dlgsanet_arch.pipeline.test`."""
    with _opened(root, arguments, train=False) as (prepared, processes, log):
        from dlgsanet_arch.pipeline import evaluation, models

        opt = prepared.opt
        loaders = [
            evaluation.build_loader(dataset_opt, processes)
            for _, dataset_opt in sorted(opt["datasets"].items())
        ]
        model = models.build(opt, log)
        evaluation.install(model, processes)
        results = []
        for loader in loaders:
            log.info(f"Testing {loader.dataset.opt['name']}...")
            result = model.validation(loader, opt["name"], None, opt["val"]["save_img"])
            if isinstance(result, evaluation.Evaluation):
                results.append(result)
                log.record("test", dataset=result.dataset, metrics=result.means)
        if processes.is_main and results:
            evaluation.write_reports(results, Path(opt["path"]["results_root"]))
