"""Figures without a display: matplotlib where it is installed, and files of a known format."""

from pathlib import Path
from typing import Any

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, written_atomically

FORMATS = ("png", "pdf", "svg")
# Told apart by people who do not see all colours, and in print: Okabe and Ito's, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches; no window is opened.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "figures need matplotlib, which is not installed; run: pip install "
            "'dlgsanet-arch[tools]' (or pip install matplotlib)"
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def check_figure_path(path: Path) -> None:
    """Raise a UserError where a figure cannot have this name."""
    if path.suffix[1:].lower() not in FORMATS:
        raise UserError(f"{path}: the name of a figure ends in .{', .'.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that its name ends in, whole or not at all.

    Raises:
        UserError: The name ends in no known format, or the file cannot be written.
    """
    check_figure_path(path)
    with disk_faults_named(f"{path} cannot be written"), written_atomically(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
