"""The command line of training and testing: BasicSR's flags, and a few more."""

import argparse
from pathlib import Path


def build_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of `train`, or of `test`: both take every flag of BasicSR."""
    does = {"train": "Train a network", "test": "Test trained weights"}[verb]
    parser = argparse.ArgumentParser(
        prog=f"dlgsanet {verb}",
        description=f"{does} as an option file says, through BasicSR.",
        epilog="Relative paths in the option file, experiments/ and results/ are below --root.",
    )
    parser.add_argument(
        "-opt",
        type=Path,
        required=True,
        metavar="FILE",
        help="the option file, a YAML file, or the name of a shipped one, such as tiny_x4",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="default: the folder of train.py and test.py, or the current folder",
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm"),
        default="none",
        help="what started the processes of a distributed run (default: none)",
    )
    parser.add_argument(
        "--auto_resume",
        action="store_true",
        help="resume from the run's newest complete checkpoint; without it an old run is renamed",
    )
    parser.add_argument(
        "--apply_edits",
        action="store_true",
        help="when resuming, take optimizer, schedule and seed from the option file as it is now",
    )
    parser.add_argument(
        "--no_trial",
        action="store_true",
        help="do not try a sample, a step and the metrics before the run is created",
    )
    parser.add_argument(
        "--import",
        dest="packages",
        nargs="+",
        metavar="PACKAGE",
        default=[],
        help="import packages that register networks, models, data sets, losses or metrics",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="name the run debug_…, and print and save often",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="given by some launchers"
    )
    parser.add_argument(
        "--force_yml",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="set values of the option file, such as train:total_iter=1000",
    )
    return parser
