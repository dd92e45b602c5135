"""Checkpoints of a run: gathered, written complete, found again, read once, restored.

A pair is the state `<iteration>.state` and the networks `net_*_<iteration>.pth` that it names with
their checksums; the state is written last. What BasicSR's state lacks for an exact resume is added
to it, in types that `torch.load(weights_only=True)` takes.
"""

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dlgsanet_arch.averaging import replay
from dlgsanet_arch.errors import ResumeError, UserError
from dlgsanet_arch.pipeline.logs import LOG
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import BadSample, Place, generators, restore_generators
from dlgsanet_arch.storage import read_complete, save_complete

# RealESRNetModel and RealESRGANModel draw their batches from a pool that they fill themselves.
_POOL = ("queue_lr", "queue_gt", "queue_ptr")
_NUMBERED = re.compile(r"(?:net_.+_)?(\d+)\.(?:pth|state)")


@dataclass
class Progress:
    """How far a run has come; what a state says of it beyond networks and optimizers."""

    iteration: int  # iterations done
    place: Place
    epoch_length: int  # positions of an epoch
    seed: int  # `manual_seed`
    validate: bool = False  # whether this iteration's validation is still to come
    bad_samples: Sequence[BadSample] = ()  # that were replaced, of all processes
    seconds: float = 0.0  # used of `train:max_minutes`; 0 without it
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_state(self) -> dict[str, Any]:
        """Return it in types that any reader of states takes."""
        state = {name: value for name, value in vars(self).items() if name != "iteration"}
        if not self.seconds:  # what earlier versions do not know
            del state["seconds"]
        state["place"], state["bad_samples"] = list(self.place), list(map(list, self.bad_samples))
        return state | {"options": json.dumps(self.options, default=str)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Progress | None":
        """Return what a state says; None for one of BasicSR's own."""
        if "progress" not in state:
            return None
        said = dict(state["progress"])
        said["place"] = Place(*map(int, said["place"]))
        if min(said["place"]) < 0:
            raise ValueError(f"place is {said['place']}")
        said |= {name: int(said[name]) for name in ("epoch_length", "seed")}
        said["seconds"] = float(said.get("seconds", 0))
        if not 0 <= said["seconds"] < math.inf:
            raise ValueError(f"seconds is {said['seconds']}")
        said["bad_samples"] = [BadSample(*each) for each in said["bad_samples"]]
        said["options"] = dict(json.loads(said["options"]))
        return cls(iteration=state["iter"], **said)


def numbered(run: Path) -> dict[int, list[Path]]:
    """Return the files of each saved iteration of a run's folder."""
    found: dict[int, list[Path]] = {}
    for path in [*run.glob("models/*.pth"), *run.glob("training_states/*.state")]:
        if match := _NUMBERED.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return found


class Start(NamedTuple):
    """Where a run starts: a state, its networks, and newer pairs that are not complete."""

    path: Path | None = None  # the state's file, None for a new run
    state: Mapping[str, Any] = {}
    networks: Mapping[str, tuple[Path, Any]] = {}  # file and content by option key ("network_g")
    passed_over: tuple[str, ...] = ()  # one line a pair, with the reason

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.state["iter"] if self.path else 0


def _read_state(path: Path) -> dict[str, Any]:
    """Read a state, and check that what a run takes from it is of the right types."""
    state, _ = read_complete(path)
    try:
        for name in ("epoch", "iter"):
            if type(state[name]) is not int:
                raise TypeError(f"{name} is {state[name]!r}")
        [each["param_groups"] for each in state["optimizers"]]
        [operator.index(each["last_epoch"]) for each in state["schedulers"]]
        best = dict(state.get("best_metric_results", {})).values()
        [float(each["val"]) for metrics in best for each in metrics.values()]
        dict(state.get("networks", {})), dict(state.get("best", {}))
        Progress.from_state(state)
    except Exception as error:  # a file that somebody edited may hold anything
        raise ResumeError(
            f"{path} is not a training state ({type(error).__name__}: {error}); delete it to "
            "resume from the state before it"
        ) from error
    return state


def read_pair(path: Path, options: Mapping[str, Any]) -> Start:
    """Read a state and its networks, each file once; a UserError names an incomplete file."""
    state = _read_state(path)
    folder, iteration = path.parent.parent / "models", state["iter"]
    ignored = options["path"].get("ignore_resume_networks") or ()
    keys = {
        f"net_{key.removeprefix('network_')}_{iteration}.pth": key
        for key in options
        if "network_" in key and key not in ignored
    }
    checksums, networks = state.get("networks", {}), {}
    # Our states name the networks that were saved: a fixed teacher, for example, was not.
    for name in checksums or keys:
        content, found = read_complete(folder / name)
        if checksums and found != checksums[name]:
            raise ResumeError(f"{folder / name} is not the file that was saved with {path.name}")
        if name in keys:
            networks[keys[name]] = folder / name, content
    return Start(path, state, networks)


def find_start(options: Mapping[str, Any], root: Path, *, auto_resume: bool) -> Start:
    """Find where a run starts, and read it.

    With `auto_resume` that is the newest complete pair of the run's own folder below `root`; a run
    that ended within its first save starts over. Else ``path:resume_state`` may name a state, whose
    networks are in the same run's folder. If there is something to resume from, but no complete
    pair, that is a UserError.
    """
    run = root / "experiments" / options["name"]
    named = options["path"].get("resume_state")
    if not auto_resume:
        return read_pair(root / Path(named).expanduser(), options) if named else Start()
    passed_over = ()
    for iteration in sorted(numbered(run), reverse=True):
        try:
            start = read_pair(run / "training_states" / f"{iteration}.state", options)
            return start._replace(passed_over=passed_over)
        except UserError as error:
            passed_over += (f"{iteration}: {error}",)
    log = run / LOG
    if log.is_file() and '"event": "save"' not in log.read_text(errors="replace"):
        return Start(passed_over=passed_over)
    if passed_over or any(run.glob("models/*.pth")):
        lines = "".join(f"\n  {line}" for line in passed_over)
        raise ResumeError(
            f"--auto_resume finds no complete pair of state and weights in {run}, which holds "
            "saved models; drop the flag to start over (that run is renamed), or set "
            f"path:pretrain_network_g to start from its weights{lines}"
        )
    if named:
        raise ResumeError(
            f"--auto_resume finds no run {run} and ignores path:resume_state {named}; drop the "
            "flag to resume from that state"
        )
    return Start()


def _plain(value: Any) -> Any:
    """Return numbers of NumPy's, which third parties' metrics give, as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _scalers(model: Any) -> dict[str, torch.amp.GradScaler]:
    found = {k: v for k, v in vars(model).items() if isinstance(v, torch.amp.GradScaler)}
    return {name: scaler for name, scaler in found.items() if scaler.is_enabled()}


class Checkpoints:
    """Writes the checkpoints of a run, and restores them; every process calls each method.

    `model` was adapted, see `adapter`. `keep_last` pairs are kept, all with None. `best` has figure
    and iteration of the best weights, and is empty before there are any.
    """

    def __init__(self, model: Any, processes: Processes, keep_last: int | None = None) -> None:
        self.best: dict[str, Any] = {}
        self._model = model
        self._processes = processes
        self._keep_last = keep_last
        self._run = Path(model.opt["path"]["experiments_root"])
        self._written: tuple[int, dict[str, int]] = -1, {}  # iteration, networks' checksums

    def save(self, progress: Progress, *, alone: bool = False) -> None:
        """Write a pair; a second call for an iteration writes the state alone.

        With `alone`, the main process writes it when the others no longer answer.
        """
        own = generators()
        of_all = [own] if alone else self._processes.gather(own)
        with nullcontext() if alone else self._processes.agreed():
            self._write(progress, of_all)

    def save_latest(self) -> None:
        """Write `net_*_latest.pth`."""
        with self._processes.agreed():
            self._write_networks("latest")

    def save_best(self, value: float, iteration: int) -> None:
        """Write `net_g_best.pth`."""
        with self._processes.agreed():
            self._write_networks("best", only="net_g")
        self.best = {"value": value, "iter": iteration}

    def _write_networks(self, label: object, only: str | None = None) -> dict[str, int]:
        """Write the networks on the main process; return checksums by file name."""
        networks = self._model.gathered_networks()
        files = {f"{net}_{label}.pth": networks[net] for net in networks if only in (None, net)}
        folder = self._run / "models"
        return {name: save_complete(content, folder / name) for name, content in files.items()}

    def _write(self, progress: Progress, random_states: list[Any]) -> None:
        iteration = progress.iteration
        if self._written[0] != iteration:
            self._written = iteration, self._write_networks(iteration)
        if not self._processes.is_main:
            return
        model = self._model
        state = {
            "epoch": progress.place.epoch,
            "iter": iteration,
            "networks": self._written[1],
            "optimizers": [optimizer.state_dict() for optimizer in model.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in model.schedulers],
            "scalers": {name: scaler.state_dict() for name, scaler in _scalers(model).items()},
            "pool": {name: getattr(model, name) for name in _POOL if hasattr(model, name)},
            "best_metric_results": _plain(getattr(model, "best_metric_results", {})),
            "best": self.best,
            "progress": progress.as_state(),
            "randomness": random_states,
        }
        save_complete(state, self._run / "training_states" / f"{iteration}.state")
        if self._keep_last is not None:
            self._remove_old(iteration)

    def _remove_old(self, iteration: int) -> None:
        """Remove what is older than the pairs to keep; later files, which a kill left, stay."""
        files = numbered(self._run)
        states = [n for n in files if any(path.suffix == ".state" for path in files[n])]
        oldest = sorted(number for number in states if number <= iteration)[-self._keep_last :][0]
        for number in sorted(number for number in files if number < oldest):
            # the state first: a pair without one is never resumed from
            for path in sorted(files[number], key=lambda path: path.suffix != ".state"):
                path.unlink(missing_ok=True)

    def restore(self, start: Start, *, apply_edits: bool) -> str:
        """Give the model, and this process's generators, what a state holds except networks.

        The state may be BasicSR's own; that of another kind of model is a ResumeError. With
        `apply_edits`, settings of optimizers and schedules stay as the model was built with them.
        Returns a warning, or "".
        """
        model, state, kind = self._model, start.state, type(self._model).__name__
        for part in ("optimizers", "schedulers"):
            here, there = len(getattr(model, part)), len(state[part])
            if here != there:
                raise ResumeError(
                    f"{start.path} has {there} {part} and this {kind} has {here}: resume with the "
                    "model_type of that run, or start a new run from its weights by "
                    "path:pretrain_network_g"
                )
        random_states, world = state.get("randomness", ()), self._processes.world
        try:
            model.resume_training(_with_edits(model, state) if apply_edits else state)
            for name, scaler in _scalers(model).items():
                if name in state.get("scalers", {}):
                    scaler.load_state_dict(state["scalers"][name])
            for name, value in state.get("pool", {}).items():
                setattr(model, name, value.to(model.device) if torch.is_tensor(value) else value)
            if len(random_states) == world:
                restore_generators(random_states[self._processes.rank])
        except Exception as error:  # whatever a state of other types makes of it
            raise ResumeError(
                f"{start.path} does not fit this {kind} ({type(error).__name__}: {error}); resume "
                "with the options of that run"
            ) from error
        if state.get("best_metric_results"):
            model.best_metric_results = state["best_metric_results"]
        self.best = dict(state.get("best", {}))
        if random_states and len(random_states) != world:
            return (
                f"the run continues with {world} processes and had {len(random_states)}: random "
                "numbers of the network itself differ from here"
            )
        return ""


def _with_edits(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as if a new model's settings and schedules had been so from the start.

    What the optimizers have learned stays.
    """
    for scheduler in model.schedulers:
        replay(scheduler, state["iter"] - 1)  # BasicSR steps before every iteration but the first
    optimizers = [
        {**saved, "param_groups": optimizer.state_dict()["param_groups"]}
        for saved, optimizer in zip(state["optimizers"], model.optimizers, strict=True)
    ]
    schedulers = [scheduler.state_dict() for scheduler in model.schedulers]
    return {**state, "optimizers": optimizers, "schedulers": schedulers}
