"""Checkpoints of a run, put on a model of any class: complete or absent, and complete.

A pair is the state `<iteration>.state` and the networks `net_*_<iteration>.pth` that it names with
their checksums; the state is written last. What BasicSR's state lacks for an exact resume is added
to it, in types that `torch.load(weights_only=True)` takes.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dlgsanet_arch.checkpoint import save_whole
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import BadSample
from dlgsanet_arch.pipeline.sampling import Place

# RealESRNetModel and RealESRGANModel draw their batches from a pool that they fill themselves.
_POOL = ("queue_lr", "queue_gt", "queue_ptr")
_NUMBERED = re.compile(r"(?:net_.+_)?(\d+)\.(?:pth|state)")


def randomness() -> dict[str, Any]:
    """Return the state of this process's generators, as tensors and numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_randomness(state: Mapping[str, Any]) -> None:
    """Put this process's generators into a state that `randomness` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass(frozen=True)
class Progress:
    """What a state says beyond the networks, optimizers and schedulers.

    Args:
        iteration: Iterations done.
        place: How far the run has come in its samples.
        epoch_length: Positions of an epoch.
        seed: `manual_seed` of the run.
        validate: Whether this iteration's validation is still to come.
        bad_samples: Bad samples that were replaced, of all processes.
        options: The options of the run.
    """

    iteration: int
    place: Place
    epoch_length: int
    seed: int
    validate: bool = False
    bad_samples: Sequence[BadSample] = ()
    options: Mapping[str, Any] | None = None

    def as_state(self) -> dict[str, Any]:
        """Return it in types that any reader of states takes."""
        return {
            "place": list(self.place),
            "epoch_length": self.epoch_length,
            "seed": self.seed,
            "validate": self.validate,
            "bad_samples": [list(each) for each in self.bad_samples],
            "options": json.dumps(self.options, default=str),
        }


def _plain(value: Any) -> Any:
    """Return numbers of NumPy's, which third parties' metrics give, as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def bare(network: nn.Module) -> nn.Module:
    """Return a network without what wraps it for several devices."""
    wrapped = isinstance(network, DataParallel | DistributedDataParallel)
    return network.module if wrapped else network


def numbered(run: Path) -> dict[int, list[Path]]:
    """Return the files of each saved iteration of a run's folder."""
    found: dict[int, list[Path]] = {}
    for path in [*run.glob("models/*.pth"), *run.glob("training_states/*.state")]:
        if match := _NUMBERED.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return found


class Saver:
    """Writes the checkpoints of a run; put on the model, it also serves what calls `model.save`.

    Args:
        model: A model of BasicSR's or a third party's, as `build_model` returned it.
        processes: The processes of the run.
        keep_last: Number of pairs to keep, None for all.
    """

    def __init__(self, model: Any, processes: Processes, keep_last: int | None = None) -> None:
        self.best: dict[str, Any] = {}
        self._model = model
        self._processes = processes
        self._keep_last = keep_last
        self._folders = {key: Path(model.opt["path"][key]) for key in ("models", "training_states")}
        self._run = Path(model.opt["path"]["experiments_root"])
        self._written: dict[str, int] = {}
        self._label: str | None = None  # in place of the iteration, in a file's name
        self._extra: dict[str, Any] = {}
        model.save_network = self._save_network
        model.save_training_state = self._save_training_state

    def _save_network(
        self,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int,
        param_key: str | list[str] = "params",
    ) -> None:
        """Stand in for BasicSR's BaseModel.save_network."""
        if not self._processes.is_main or (self._label == "best" and net_label != "net_g"):
            return
        networks = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        content = {}
        for network, key in zip(networks, keys, strict=True):
            weights = bare(network).state_dict()
            content[key] = {
                name.removeprefix("module."): tensor.detach().cpu()
                for name, tensor in weights.items()
            }
        label = self._label or ("latest" if current_iter == -1 else current_iter)
        name = f"{net_label}_{label}.pth"
        self._written[name] = save_whole(content, self._folders["models"] / name)

    def _save_training_state(self, epoch: int, current_iter: int) -> None:
        """Stand in for BasicSR's BaseModel.save_training_state."""
        if current_iter == -1 or self._label or not self._processes.is_main:
            return
        model = self._model
        state = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [optimizer.state_dict() for optimizer in model.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in model.schedulers],
            "networks": dict(self._written),
            "scalers": {
                name: value.state_dict()
                for name, value in vars(model).items()
                if isinstance(value, torch.amp.GradScaler)
            },
            "pool": {name: getattr(model, name) for name in _POOL if hasattr(model, name)},
            "best_metric_results": _plain(getattr(model, "best_metric_results", {})),
            "best": self.best,
            **self._extra,
        }
        save_whole(state, self._folders["training_states"] / f"{current_iter}.state")

    def _write(self, label: str | None, epoch: int, iteration: int) -> None:
        """Let the model save itself; an error on the main process is one on all."""
        error: Exception | None = None
        self._label, self._written = label, {}
        try:
            self._model.save(epoch, iteration)
        except Exception as caught:  # a third party's save may raise anything
            error = caught
        finally:
            self._label = None
        self._processes.agree(error)

    def save(self, progress: Progress) -> None:
        """Write a pair; every process calls.

        Raises:
            CheckpointError: A file cannot be written; what was there before is untouched.
        """
        self._extra = {
            "progress": progress.as_state(),
            "randomness": self._processes.gather(randomness()),
        }
        self._write(None, progress.place.epoch, progress.iteration)
        if self._processes.is_main:
            self._remove_old(progress.iteration)

    def save_latest(self) -> None:
        """Write `net_*_latest.pth`; every process calls."""
        self._write("latest", -1, -1)

    def save_best(self, value: float, iteration: int) -> None:
        """Write `net_g_best.pth`; every process calls."""
        self._write("best", -1, -1)
        self.best = {"value": value, "iter": iteration}

    def _remove_old(self, iteration: int) -> None:
        """Remove what is older than the pairs to keep, of which the one of `iteration` is the last.

        What a kill or a fault left of later iterations is not a pair to resume from, and does not
        count; the run writes it anew when it comes there.
        """
        if self._keep_last is None:
            return
        files = numbered(self._run)
        pairs = [
            number
            for number, paths in files.items()
            if number <= iteration and any(path.suffix == ".state" for path in paths)
        ]
        oldest = sorted(pairs)[-self._keep_last :][0]
        for number in sorted(files):
            if number >= oldest:
                break
            # the state first: a pair without one is never resumed from
            for path in sorted(files[number], key=lambda path: path.suffix != ".state"):
                path.unlink(missing_ok=True)


def restore(model: Any, saver: Saver, state: Mapping[str, Any]) -> None:
    """Give a model what a state holds beside networks, optimizers and schedulers.

    Args:
        model: As built from the networks that belong to the state, `resume_training` done.
        saver: The model's.
        state: As `read_state` returns it; one of BasicSR's own has nothing to give.
    """
    for name, content in state.get("scalers", {}).items():
        if isinstance(getattr(model, name, None), torch.amp.GradScaler):
            getattr(model, name).load_state_dict(content)
    for name, value in state.get("pool", {}).items():
        setattr(model, name, value.to(model.device) if torch.is_tensor(value) else value)
    if state.get("best_metric_results"):
        model.best_metric_results = state["best_metric_results"]
    saver.best = dict(state.get("best", {}))


def progress_of(state: Mapping[str, Any]) -> Progress | None:
    """Return what a state says of the run's progress; None for one of BasicSR's own."""
    if "progress" not in state:
        return None
    said = dict(state["progress"])
    said["place"] = Place(*said["place"])
    said["bad_samples"] = [BadSample(*each) for each in said["bad_samples"]]
    said["options"] = json.loads(said["options"])
    return Progress(iteration=state["iter"], **said)
