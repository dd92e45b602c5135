"""Training and testing by option file, built from BasicSR's parts.

`preparation` checks all that a run needs before anything is created; `loop` trains, `evaluation`
validates and tests, `checkpoints` writes, finds and restores them. They run any option file of
BasicSR's for a network of single images.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from dlgsanet_arch import _basicsr
from dlgsanet_arch.pipeline import flags

__all__ = ["test", "train"]


def _runs() -> ModuleType:
    """Import the runs, which need all of BasicSR; its absence is reported first."""
    _basicsr.import_basicsr("basicsr")
    from dlgsanet_arch.pipeline import runs

    return runs


def train(root: Path, argv: Sequence[str]) -> None:
    """Train as an option file says.

    An earlier run of the same name is renamed, unless ``--auto_resume`` resumes it.

    Args:
        root: Folder that relative paths, ``experiments/`` and ``tb_logger/`` are below, unless
            `argv` has ``--root``.
        argv: The command line without the program's name: ``-opt FILE`` and more flags.

    Raises:
        UserError: BasicSR is missing, or something that the run needs is wrong: then nothing was
            created or renamed. Or the run met a bad sample, a loss that is not finite, or a
            checkpoint that cannot be written: then the checkpoints before are complete.
        Interrupted: A signal asked for the end; the iteration at hand is saved.
        SystemExit: The command line cannot be understood, or asks for help.
    """
    arguments = flags.build_parser("train").parse_args(argv)
    _runs().train(root, arguments)


def test(root: Path, argv: Sequence[str]) -> None:
    """Test weights as an option file says: measure, and save the images it asks for.

    Args:
        root: Folder that relative paths and ``results/`` are below, unless `argv` has
            ``--root``.
        argv: The command line without the program's name: ``-opt FILE`` and more flags.

    Raises:
        UserError: BasicSR is missing, or something that the test needs is wrong: then nothing was
            created or renamed.
        SystemExit: The command line cannot be understood, or asks for help.
    """
    arguments = flags.build_parser("test").parse_args(argv)
    _runs().test(root, arguments)
