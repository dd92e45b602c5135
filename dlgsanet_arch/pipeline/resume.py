"""Which saved state a training run goes on from, found and read before BasicSR starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlgsanet_arch.compat import ResumeError, newest_state, read_state


@dataclass(frozen=True)
class Start:
    """Where a run starts: at 0, or where a saved state left off.

    Args:
        epoch: Epoch to go on with.
        iteration: Iterations done.
        weights: The network's weights at that iteration, or None for a new run.
    """

    epoch: int = 0
    iteration: int = 0
    weights: Path | None = None


def _saved_in(run: Path) -> list[Path]:
    return [*run.glob("models/*.pth"), *run.glob("training_states/*.state")]


def find_start(options: Mapping[str, Any], root: Path, *, auto_resume: bool) -> Start:
    """Find where BasicSR will start this run, and see that its files are there and readable.

    Args:
        options: The run's options, `name` as BasicSR will use it.
        root: Folder that holds ``experiments/`` and that relative paths are below.
        auto_resume: Whether to go on from the newest state of the run's own folder; else
            ``path:resume_state`` names the state, if anything does.

    Raises:
        ResumeError: There is something to go on from, but no whole pair of state and weights.
    """
    run = root / "experiments" / options["name"]
    named = options["path"].get("resume_state")
    if auto_resume:
        state_path = newest_state(run / "training_states")
        if state_path is None and _saved_in(run):
            raise ResumeError(
                f"--auto_resume finds no state in {run / 'training_states'}, though {run} holds "
                "saved models; BasicSR would rename that run and start again at 0: drop the flag "
                "if that is wanted, or set path:pretrain_network_g to start from those weights"
            )
        if state_path is None and named:
            raise ResumeError(
                f"--auto_resume finds no run {run} and ignores path:resume_state {named}; drop "
                "the flag to go on from that state"
            )
    else:
        state_path = root / Path(named).expanduser() if named else None
    if state_path is None:
        return Start()
    state = read_state(state_path)
    epoch, iteration = state["epoch"], state["iter"]
    weights = run / "models" / f"net_g_{iteration}.pth"
    if not weights.is_file():
        raise ResumeError(
            f"{state_path} belongs to the weights {weights}, which are not there; put them back, "
            "or delete the state to go on from the one before it"
        )
    return Start(epoch, iteration, weights)
