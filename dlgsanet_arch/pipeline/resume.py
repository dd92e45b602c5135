"""What a training run resumes from: the newest complete pair of state and networks.

A pair is complete when every file of it can be read to the end and is the one that was saved with
the state. What is not is left out with a line that says so, and the pair before it is taken.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlgsanet_arch._basicsr import read_state
from dlgsanet_arch.checkpoint import CheckpointError, check_complete
from dlgsanet_arch.errors import ResumeError
from dlgsanet_arch.pipeline.logs import LOG
from dlgsanet_arch.pipeline.saving import numbered

# What a state holds and the option file says too; the state's is what a resumed run uses.
_KEPT_BY_STATE = ("train:optim_", "train:scheduler", "manual_seed")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Args:
        state: The state's file, None for a new run.
        iteration: Iterations done.
        networks: Weights to load by option key ("network_g").
        passed_over: Pairs that are newer and not whole, with the reason, one a line.
    """

    state: Path | None = None
    iteration: int = 0
    networks: Mapping[str, Path] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


def _ignored(options: Mapping[str, Any]) -> list[str]:
    return list(options["path"].get("ignore_resume_networks") or ())


def _checked(state_path: Path, options: Mapping[str, Any]) -> Start:
    """Read a pair to the end.

    Raises:
        ResumeError: It is not complete; the message names the file.
    """
    try:
        check_complete(state_path)
    except CheckpointError as error:
        raise ResumeError(str(error)) from error
    state = read_state(state_path)
    iteration = state["iter"]
    folder = state_path.parent.parent / "models"
    labels = {key: f"net_{key.removeprefix('network_')}" for key in options if "network_" in key}
    ignored = _ignored(options)
    networks = {
        key: folder / f"{label}_{iteration}.pth"
        for key, label in labels.items()
        if key not in ignored
    }
    checksums = state.get("networks", {})
    for path in dict.fromkeys([*networks.values(), *(folder / name for name in checksums)]):
        if path.name not in checksums and checksums:
            continue  # a network that this model does not save, such as a fixed teacher
        if not path.is_file():
            raise ResumeError(f"{state_path} belongs to the weights {path}, which are not there")
        try:
            found = check_complete(path)
        except CheckpointError as error:
            raise ResumeError(str(error)) from error
        if checksums and found != checksums[path.name]:
            raise ResumeError(f"{path} is not the file that was saved with {state_path.name}")
    saved = {key: path for key, path in networks.items() if path.is_file()}
    return Start(state_path, iteration, saved)


def _never_saved(run: Path) -> bool:
    """Whether a run of ours ended before its first pair was complete: nothing of it is lost."""
    try:
        log = (run / LOG).read_text(encoding="utf-8")
    except OSError:
        return False
    return '"event": "save"' not in log


def find_start(options: Mapping[str, Any], root: Path, *, auto_resume: bool) -> Start:
    """Find where a run starts.

    Args:
        options: The run's options, `name` as the run will use it.
        root: Folder that holds ``experiments/`` and that relative paths are below.
        auto_resume: Whether to resume from the newest complete pair of the run's own folder; a run
            that ended within its first save starts anew. Else ``path:resume_state`` names a
            state, if anything does. Its networks are beside it.

    Raises:
        ResumeError: There is something to resume from, but no complete pair.
    """
    run = root / "experiments" / options["name"]
    named = options["path"].get("resume_state")
    if not auto_resume:
        return _checked(root / Path(named).expanduser(), options) if named else Start()
    pairs = numbered(run)
    passed_over = []
    for iteration in sorted(pairs, reverse=True):
        state_path = run / "training_states" / f"{iteration}.state"
        if state_path not in pairs[iteration]:
            passed_over.append(f"{iteration}: its state {state_path} is not there")
            continue
        try:
            start = _checked(state_path, options)
        except ResumeError as error:
            passed_over.append(f"{iteration}: {error}")
            continue
        return Start(start.state, start.iteration, start.networks, tuple(passed_over))
    if _never_saved(run):
        return Start(passed_over=tuple(passed_over))
    saved = [*run.glob("models/*.pth"), *run.glob("training_states/*.state")]
    if passed_over or saved:
        raise ResumeError(
            "\n  ".join(
                [
                    f"--auto_resume finds no complete pair of state and weights in {run}, which "
                    "holds saved models; drop the flag to start anew (that run is renamed), or set "
                    "path:pretrain_network_g to start from its weights",
                    *passed_over,
                ]
            )
        )
    if named:
        raise ResumeError(
            f"--auto_resume finds no run {run} and ignores path:resume_state {named}; drop the "
            "flag to resume from that state"
        )
    return Start()


def use(start: Start, opt: dict[str, Any]) -> None:
    """Let a model of BasicSR's load the networks of a start instead of those of the options."""
    opt["path"]["resume_state"] = str(start.state)
    for key, path in start.networks.items():
        label = key.removeprefix("network_")
        opt["path"] |= {
            f"pretrain_{key}": str(path),
            f"param_key_{label}": "params",
            f"strict_load_{label}": True,
        }


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}:{key}" if prefix else str(key))
    else:
        yield prefix, node


def edits(options: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return path, value of the run so far and value now of each option that was edited."""
    now = dict(_flat(json.loads(json.dumps(options, default=str))))
    before = dict(_flat(saved))
    return {
        path: (before.get(path), now.get(path))
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    }


def is_kept_by_state(path: str) -> bool:
    """Whether a resumed run takes this option from its state."""
    return path.startswith(_KEPT_BY_STATE)


class AsEdited:
    """Optimizer and schedule as the option file has them now, for a run that continues.

    Made before the model's states are restored, put in force after: what the optimizers have
    learned stays, their settings and the schedule are those of the options, as if they had been so
    from the start.

    Args:
        model: A model of BasicSR's, just built.
    """

    def __init__(self, model: Any) -> None:
        self._groups = [
            [{key: value for key, value in group.items() if key != "params"} for group in groups]
            for groups in (optimizer.param_groups for optimizer in model.optimizers)
        ]
        self._schedulers = [scheduler.state_dict() for scheduler in model.schedulers]

    def apply(self, model: Any, iteration: int) -> None:
        """Set them on `model`, which has `iteration` iterations behind it."""
        for optimizer, groups in zip(model.optimizers, self._groups, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        for scheduler, fresh in zip(model.schedulers, self._schedulers, strict=True):
            scheduler.load_state_dict(fresh)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimizer did not step in between
                for _ in range(iteration - 1):  # BasicSR steps before every iteration but the first
                    scheduler.step()
