"""Repairs of BasicSR 1.4.2 on current libraries; the only file that works around other packages.

`repair()` applies each repair of `REPAIRS` where its fault is present. What belongs to a module
of BasicSR that is not imported yet is repaired as soon as it is, so the order of imports does not
matter. Two cases stay out of reach. Where `import basicsr` runs before this package, its import of
torchvision has failed or passed already. And `python -m basicsr.train` runs a second copy of that
file as `__main__`, which no import can change: to resume on a CPU, start training another way.

A repair is one function with its line in `REPAIRS`; `tests/test_compat.py` shows that each one is
needed.
"""

import functools
import importlib
import importlib.util
import os
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dlgsanet_arch.errors import UserError


class ResumeError(UserError):
    """A training state that cannot be resumed from; the message names the file."""


@dataclass(frozen=True)
class Repair:
    """One fault of other packages and what is done about it.

    Attributes:
        name: What is repaired, in a word or two.
        reason: What goes wrong without the repair.
        expiry: What has to happen before the repair can be removed.
        apply: Repairs the fault where it is present; else, or a second time, does nothing.
        active: Says whether the repair is in force in this process.
    """

    name: str
    reason: str
    expiry: str
    apply: Callable[[], None]
    active: Callable[[], bool]


class _AfterImport(MetaPathFinder):
    """Runs actions on a module just after it was imported, whoever imports it."""

    def __init__(self):
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        actions = self.actions.get(fullname, ())
        spec = PathFinder.find_spec(fullname, path, target) if actions else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            for action in actions:
                action(module)

        # The loader itself stays: `python -m` asks the loader of an imported module for its code.
        spec.loader.exec_module = execute_and_act
        return spec


_after_import = _AfterImport()


def _when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Run `action` on the module `name`: at once where it is imported, else as soon as it is."""
    if name in sys.modules:
        action(sys.modules[name])
        return
    _after_import.actions.setdefault(name, []).append(action)
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)


def _replacement(
    name: str,
    reason: str,
    expiry: str,
    *,
    target: str,
    of: Callable[[Callable], Callable | None],
) -> Repair:
    """Make the repair that puts a function of this file in place of one of BasicSR's.

    Args:
        name: As in Repair.
        reason: As in Repair.
        expiry: As in Repair.
        target: Where the function is, as "module:attribute" or "module:Class.attribute".
        of: Takes BasicSR's function and returns its replacement, or None where it has no fault.
    """
    module_name, _, path = target.partition(":")
    *classes, attribute = path.split(".")

    def owner_in(module: ModuleType | None) -> Any:
        return functools.reduce(lambda parent, name: getattr(parent, name, None), classes, module)

    def is_ours(owner: Any) -> bool:
        return getattr(getattr(owner, attribute, None), "__module__", None) == __name__

    def replace(module: ModuleType) -> None:
        owner = owner_in(module)
        # A module halfway through its own import, or another BasicSR, may not have the function.
        if is_ours(owner) or not hasattr(owner, attribute):
            return
        replacement = of(getattr(owner, attribute))
        if replacement is not None:
            setattr(owner, attribute, replacement)

    return Repair(
        name,
        reason,
        expiry,
        apply=lambda: _when_imported(module_name, replace),
        active=lambda: is_ours(owner_in(sys.modules.get(module_name))),
    )


def _names_used(function: Callable) -> tuple[str, ...]:
    """Return the globals and attributes that the code of `function` names."""
    return getattr(getattr(function, "__code__", None), "co_names", ())


_OPERATORS = ("nms", "qnms")
_OPERATOR_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _import_torchvision() -> Exception | None:
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return error
    return None


def _define_operators() -> None:
    """Define the operators that torchvision's Python half describes to the compiler at import.

    Its C++ half, which defines them, fails to load in silence. Only the definitions are made up
    for: calling such an operator still fails, with torchvision's own message.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    error = _import_torchvision()
    # Any other error is another fault: whoever needs torchvision meets it, with its cause.
    if not isinstance(error, RuntimeError) or "operator torchvision::" not in str(error):
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _OPERATOR_SCHEMA)


def _operators_defined() -> bool:
    extension = sys.modules.get("torchvision.extension")
    loaded = extension is not None and extension._has_ops()
    return not loaded and hasattr(torch.ops.torchvision, _OPERATORS[0])


_FUNCTIONAL = "torchvision.transforms.functional"
_FUNCTIONAL_TENSOR = "torchvision.transforms.functional_tensor"


def _alias_functional_tensor() -> None:
    """Give torchvision's public functions the name of the private module that is gone, too."""
    try:
        if importlib.util.find_spec(_FUNCTIONAL_TENSOR) is None:
            sys.modules[_FUNCTIONAL_TENSOR] = importlib.import_module(_FUNCTIONAL)
    except Exception:  # torchvision is absent or broken: BasicSR's own import of it says so
        return


def _functional_tensor_aliased() -> bool:
    alias = sys.modules.get(_FUNCTIONAL_TENSOR)
    return alias is not None and alias is sys.modules.get(_FUNCTIONAL)


_STATE_NAME = re.compile(r"\d+\.state")


def newest_state(folder: Path) -> Path | None:
    """Return the `<iteration>.state` of the highest iteration in `folder`; None without one."""
    files = folder.iterdir() if folder.is_dir() else ()
    states = [path for path in files if _STATE_NAME.fullmatch(path.name)]
    return max(states, key=lambda path: int(path.stem), default=None)


def read_state(path: Path) -> dict[str, Any]:
    """Read a training state that BasicSR saved, its tensors on the CPU.

    Returns:
        At least `epoch` and `iter`, whole numbers.

    Raises:
        ResumeError: The file is missing, damaged or no training state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        int(state["epoch"]), int(state["iter"])
    except Exception as error:  # torch.load has half a dozen ways to fail on a damaged file
        raise ResumeError(
            f"{path} is no whole training state ({type(error).__name__}: {error}); delete it to "
            "go on from the state before it"
        ) from error
    return state


def _load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """Stand in for `basicsr.train.load_resume_state`: on any device, from the run's own folder.

    Args:
        opt: The parsed options of a training run. As BasicSR does it, `opt["path"]` is changed so
            that the networks saved with the state are loaded.

    Returns:
        The state with its tensors on the CPU, from where the optimizers move them; None for a
        new run.

    Raises:
        ResumeError: The state cannot be read.
    """
    from basicsr.utils import check_resume

    if opt["auto_resume"]:
        path = newest_state(Path(opt["path"]["training_states"]))
        if path is not None:
            opt["path"]["resume_state"] = str(path)
    else:
        path = opt["path"].get("resume_state")
    if not path:
        return None
    state = read_state(path)
    check_resume(opt, state["iter"])
    return state


def _resume_anywhere(original: Callable) -> Callable | None:
    return _load_resume_state if "current_device" in _names_used(original) else None


# The LMDB environments that BasicSR's data sets hold open in this process, by real path. After a
# fork the child's data sets find the parent's here, as lmdb counts those as open in the child.
_environments: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _share_environments(original: Callable) -> Callable | None:
    """Let data sets that read the same LMDB read it through one environment."""
    if "open" not in _names_used(original):
        return None

    def open_shared(self, db_paths, client_keys="default", **options):
        paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
        keys = [client_keys] if isinstance(client_keys, str) else client_keys
        clients = {}
        for key, path in zip(keys, paths, strict=True):
            place = os.path.realpath(path)
            if place not in _environments:
                original(self, [path], [key], **options)
                _environments[place] = self._client[key]
            clients[key] = _environments[place]
        self.db_paths, self._client = paths, clients

    return open_shared


def _reopened(backend: type, paths: list[str], keys: list[str]) -> Any:
    return backend(paths, keys)


def _pickle_by_path(original: Callable) -> Callable | None:
    """Let a data set that has been read go to a spawned worker, which opens its LMDBs anew."""

    def reduce(self, protocol: int) -> tuple:
        return _reopened, (type(self), list(self.db_paths), list(self._client))

    return reduce


def _wrap_on_cpu(original: Callable) -> Callable | None:
    """Let a network be trained by several processes where there is no GPU, over gloo."""
    if "current_device" not in _names_used(original):
        return None

    def model_to_device(self, net):
        if not self.opt["dist"] or self.device.type != "cpu":
            return original(self, net)
        return torch.nn.parallel.DistributedDataParallel(
            net.to(self.device),
            find_unused_parameters=self.opt.get("find_unused_parameters", False),
        )

    return model_to_device


def _takes_fractional_quality() -> bool:
    import cv2
    import numpy as np

    try:
        cv2.imencode(".jpg", np.zeros((1, 1, 3), np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90.5])
    except cv2.error:
        return False
    return True


def _round_quality(original: Callable) -> Callable | None:
    """Give OpenCV the whole number it asks for as the quality of a JPEG."""
    if _takes_fractional_quality():
        return None

    def add_jpg_compression(img, quality=90):
        return original(img, round(quality))

    return add_jpg_compression


REPAIRS = (
    Repair(
        "torchvision operators",
        "torchvision's C++ operators do not load beside this torch, and its import fails",
        "torchvision can be imported without its operators",
        _define_operators,
        _operators_defined,
    ),
    Repair(
        "functional_tensor",
        "BasicSR imports torchvision.transforms.functional_tensor, which torchvision 0.17 removed",
        "a release of BasicSR imports rgb_to_grayscale from torchvision.transforms.functional",
        _alias_functional_tensor,
        _functional_tensor_aliased,
    ),
    _replacement(
        "resume",
        "BasicSR resumes on CUDA only, and auto_resume looks in the current folder",
        "a release of BasicSR loads states onto the CPU from opt['path']['training_states']",
        target="basicsr.train:load_resume_state",
        of=_resume_anywhere,
    ),
    _replacement(
        "shared LMDB",
        "BasicSR opens an LMDB once for each data set; lmdb 3 allows one opening in a process",
        "a release of BasicSR shares what it opened",
        target="basicsr.utils.file_client:LmdbBackend.__init__",
        of=_share_environments,
    ),
    _replacement(
        "pickled LMDB",
        "BasicSR's data sets cannot be pickled once they have been read from an LMDB",
        "a release of BasicSR drops what it opened when it is pickled",
        target="basicsr.utils.file_client:LmdbBackend.__reduce_ex__",
        of=_pickle_by_path,
    ),
    _replacement(
        "distributed CPU",
        "BasicSR asks for the current CUDA device when it distributes a network on CPUs",
        "a release of BasicSR gives DistributedDataParallel no device on a CPU",
        target="basicsr.models.base_model:BaseModel.model_to_device",
        of=_wrap_on_cpu,
    ),
    _replacement(
        "JPEG quality",
        "BasicSR draws a fractional JPEG quality, and OpenCV accepts whole numbers only",
        "a release of BasicSR rounds it",
        target="basicsr.data.degradations:add_jpg_compression",
        of=_round_quality,
    ),
)


def repair() -> None:
    """Apply every repair whose fault is present.

    Harmless where BasicSR or torchvision are absent, and a second time. It imports torchvision, as
    BasicSR is about to, and nothing of BasicSR.
    """
    for each in REPAIRS:
        each.apply()
