"""Training and testing by option file: everything is checked, then BasicSR's own loops run.

What BasicSR meets too late, after it renamed the old run or hours into the training, is met here
before anything is created: options, data, weights, the saved state to go on from, and whether
BasicSR's loop will reach the last iteration at all.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dlgsanet_arch import options as option_files
from dlgsanet_arch import plugin
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import flags
from dlgsanet_arch.pipeline.plan import Plan, check_length, count_samples
from dlgsanet_arch.pipeline.resume import Start, find_start
from dlgsanet_arch.pipeline.weights import check_resumed_weights, check_start_weights

__all__ = ["test", "train"]


def _import_basicsr(name: str) -> ModuleType:
    if not plugin.basicsr_installed():
        raise UserError(
            "training and testing need BasicSR, which is not installed; run: "
            f"{plugin.INSTALL_BASICSR} (`dlgsanet doctor` names what else is missing)"
        )
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever another package's import may raise
        raise UserError(
            f"BasicSR is installed, but its import fails ({type(error).__name__}: {error}); "
            "`dlgsanet doctor` says what to do"
        ) from error


def _registered() -> Mapping[str, Collection[str]]:
    registries = _import_basicsr("basicsr.utils.registry")
    return {
        kind: list(getattr(registries, f"{kind.upper()}_REGISTRY").keys())
        for kind in ("arch", "model", "dataset", "metric", "loss")
    }


def _processes(launcher: str) -> int:
    variable = {"pytorch": "WORLD_SIZE", "slurm": "SLURM_NTASKS"}.get(launcher)
    if variable is None:
        return 1
    if variable not in os.environ:
        starter = "torchrun" if launcher == "pytorch" else "srun"
        raise UserError(
            f"--launcher {launcher} needs to be started by {starter}, which sets {variable}; it is "
            "not set; for a single process leave the flag out"
        )
    return int(os.environ[variable])


def _gpus(options: Mapping[str, Any]) -> int:
    asked, there = options["num_gpu"], torch.cuda.device_count()
    if asked == "auto":
        return there
    if asked > there:
        raise UserError(
            f"num_gpu is {asked}, but PyTorch sees {there} CUDA devices here; write `num_gpu: "
            f"auto`, or add --force_yml num_gpu={there}"
        )
    return asked


def _check_loop(
    options: Mapping[str, Any], arguments: argparse.Namespace, root: Path, start: Start
) -> None:
    dataset = options["datasets"]["train"]
    samples = count_samples(dataset, root)
    if samples is None:
        return
    gpus, world = _gpus(options), _processes(arguments.launcher)
    plan = Plan(
        samples=samples,
        batch=dataset["batch_size_per_gpu"],
        gpus=max(1, gpus) if arguments.launcher == "none" else 1,
        world=world,
        total_iter=int(options["train"]["total_iter"]),
    )
    check_length(plan, dataset.get("dataset_enlarge_ratio", 1), start.epoch, start.iteration)


def _prepared(root: Path, argv: Sequence[str], *, train: bool) -> tuple[Path, list[str], int]:
    """Check all that a run needs.

    Returns:
        The root folder, the command line for BasicSR, and the iteration to reach (0 in a test).
    """
    arguments = flags.build_parser(train=train).parse_args(argv)
    root = (arguments.root or root).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"--root: there is no folder {root}")
    arguments.opt = arguments.opt.expanduser().resolve()
    parse = _import_basicsr("basicsr.utils.options")._postprocess_yml_value
    entries = [flags.with_readable_numbers(entry, parse) for entry in arguments.force_yml]
    options = option_files.load(arguments.opt)
    option_files.override(options, entries, parse)
    option_files.check(options, train=train, root=root, registered=_registered())
    if arguments.debug and not options["name"].startswith("debug"):
        options["name"] = f"debug_{options['name']}"
    _gpus(options)
    start = find_start(options, root, auto_resume=arguments.auto_resume) if train else Start()
    if start.weights is not None:
        check_resumed_weights(start.weights, options)
    else:
        entries += check_start_weights(options, root, train=train)
    if train:
        _check_loop(options, arguments, root, start)
    arguments.force_yml = entries
    return root, flags.for_basicsr(arguments), int(options["train"]["total_iter"]) if train else 0


@contextmanager
def _started_in(root: Path, argv: Sequence[str]) -> Iterator[None]:
    """BasicSR reads sys.argv, and finds relative paths from the current folder."""
    folder, arguments = Path.cwd(), sys.argv
    os.chdir(root)
    sys.argv = [arguments[0], *argv]
    try:
        yield
    finally:
        os.chdir(folder)
        sys.argv = arguments


class _Progress:
    """The last iteration that a model was trained for."""

    def __init__(self) -> None:
        self.iteration = 0

    def watch(self, model: Any) -> Any:
        """Note the iterations of one of BasicSR's models; returns the model."""
        optimize, resume = model.optimize_parameters, model.resume_training

        def optimize_parameters(current_iter: int) -> None:
            optimize(current_iter)
            self.iteration = current_iter

        def resume_training(resume_state: Mapping[str, Any]) -> None:
            resume(resume_state)
            self.iteration = resume_state["iter"]

        model.optimize_parameters, model.resume_training = optimize_parameters, resume_training
        return model


@contextmanager
def _watched(basicsr_train: ModuleType) -> Iterator[_Progress]:
    progress = _Progress()
    build: Callable[[Mapping[str, Any]], Any] = basicsr_train.build_model
    basicsr_train.build_model = lambda options: progress.watch(build(options))
    try:
        yield progress
    finally:
        basicsr_train.build_model = build


def train(root: Path, argv: Sequence[str]) -> None:
    """Train as an option file says, in BasicSR's training loop.

    An earlier run of the same name is renamed by BasicSR, unless ``--auto_resume`` goes on with
    it.

    Args:
        root: Folder that relative paths, ``experiments/`` and ``tb_logger/`` are below, unless
            `argv` has ``--root``.
        argv: The command line without the program's name: ``-opt FILE`` and BasicSR's flags.

    Raises:
        UserError: BasicSR is missing, or something that the run needs is wrong: then nothing was
            created or renamed. Or training ended before ``train:total_iter``.
        SystemExit: The command line cannot be understood, or asks for help.
    """
    root, basicsr_argv, total = _prepared(root, argv, train=True)
    basicsr_train = _import_basicsr("basicsr.train")
    with _started_in(root, basicsr_argv), _watched(basicsr_train) as progress:
        basicsr_train.train_pipeline(str(root))
    if progress.iteration < total:
        raise UserError(
            f"training ended at iteration {progress.iteration} of train:total_iter {total}: "
            "BasicSR's loop ran out of epochs; raise datasets:train:dataset_enlarge_ratio and go "
            "on with --auto_resume"
        )


def test(root: Path, argv: Sequence[str]) -> None:
    """Test weights as an option file says: measure, and save the pictures it asks for.

    Args:
        root: Folder that relative paths and ``results/`` are below, unless `argv` has
            ``--root``.
        argv: The command line without the program's name: ``-opt FILE`` and BasicSR's flags.

    Raises:
        UserError: BasicSR is missing, or something that the test needs is wrong: then nothing was
            created or renamed.
        SystemExit: The command line cannot be understood, or asks for help.
    """
    root, basicsr_argv, _ = _prepared(root, argv, train=False)
    basicsr_test = _import_basicsr("basicsr.test")
    with _started_in(root, basicsr_argv):
        basicsr_test.test_pipeline(str(root))
