"""Training and testing by option file, built from BasicSR's parts.

`runs` checks all that a run needs before anything is created; `loop` trains, `evaluation`
validates and tests, `checkpoints` writes, finds and restores them. They run any option file of
BasicSR's for a network of single images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from dlgsanet_arch import _basicsr

__all__ = ["build_parser", "test", "train"]


def build_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of `train`, or of `test`: BasicSR's flags, and a few more."""
    does = {"train": "Train a network", "test": "Test trained weights"}[verb]
    parser = argparse.ArgumentParser(
        prog=f"dlgsanet {verb}",
        description=f"{does} as an option file says, through BasicSR.",
        epilog="Relative paths in the option file, experiments/ and results/ are below --root.",
    )
    add = parser.add_argument
    file = "the option file (YAML), or the name of a shipped one, such as tiny_x4"
    add("-opt", type=Path, required=True, metavar="FILE", help=file)
    root = "default: the folder of train.py and test.py, or the current folder"
    add("--root", type=Path, metavar="FOLDER", help=root)
    launchers = ("none", "pytorch", "slurm")
    started = "what started the processes of a distributed run (default: none)"
    add("--launcher", choices=launchers, default="none", help=started)
    packages = "import packages that register networks, models, data sets, losses or metrics"
    add("--import", dest="packages", nargs="+", metavar="PACKAGE", default=[], help=packages)
    values = "set values of the option file, such as train:total_iter=1000"
    add("--force_yml", nargs="+", metavar="KEY=VALUE", default=[], help=values)
    add("--local_rank", "--local-rank", type=int, default=0, help="given by some launchers")
    if verb == "test":
        names = "test on these sets of the option file alone, by their names"
        add("--sets", nargs="+", metavar="NAME", default=[], help=names)
    for flag, text in (
        ("auto_resume", "resume from the run's newest complete checkpoint, else it is renamed"),
        ("apply_edits", "when resuming, take optimizer, schedule and seed from the option file"),
        ("no_trial", "do not try a sample, a step and the metrics before the run is created"),
        ("debug", "name the run debug_…, and print and save often"),
    ):
        add(f"--{flag}", action="store_true", help=text)
    return parser


def train(root: Path, argv: Sequence[str]) -> None:
    """Train as an option file says: `argv` is the command line without the program's name.

    An earlier run of the same name is renamed, unless ``--auto_resume`` resumes it. Relative paths,
    ``experiments/`` and ``tb_logger/`` are below `root`, unless `argv` has ``--root``.

    Raises:
        UserError: BasicSR is missing, or something that the run needs is wrong: then nothing was
            created or renamed. Or the run met a bad sample, a loss that is not finite, or a
            checkpoint that cannot be written: then the checkpoints before are complete.
        Interrupted: A signal asked for the end; the current iteration is saved.
    """
    _run("train", root, argv)


def test(root: Path, argv: Sequence[str]) -> None:
    """Test weights as an option file says, as `train`; results are written below ``results/``."""
    _run("test", root, argv)


def _run(verb: str, root: Path, argv: Sequence[str]) -> None:
    began = argparse.Namespace(began=monotonic())  # what follows imports for seconds
    arguments = build_parser(verb).parse_args(argv, began)
    _basicsr.import_basicsr("basicsr")  # its absence is reported first
    from dlgsanet_arch.pipeline import runs

    getattr(runs, verb)(root, arguments)
