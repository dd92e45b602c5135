"""BasicSR from outside: an import hook that registers DLGSANet there and repairs BasicSR 1.4.2.

`install` puts one finder on `sys.meta_path`. It acts when one of the modules below is imported,
whoever imports it, and at once on those that are there already, so the order of imports does not
matter: registration once BasicSR is imported, and each repair of `REPAIRS` where its fault is
present. Two cases stay out of reach. Where `import basicsr` runs before this package, its import
of torchvision has failed or passed already. And `python -m basicsr.train` runs a second copy of
that file as `__main__`, which no import can change: to resume on a CPU, start training another way.

This file imports the standard library alone; torch comes with what is repaired. A repair is one
decorated function; `tests/test_basicsr.py` shows that each one is needed.
"""

import functools
import importlib
import importlib.util
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from dlgsanet_arch.errors import ResumeError, UserError


def basicsr_installed() -> bool:
    """Return whether BasicSR can be found; it is not imported, so it may still be broken."""
    if "basicsr" in sys.modules:
        return sys.modules["basicsr"] is not None
    return importlib.util.find_spec("basicsr") is not None


def import_basicsr(name: str) -> ModuleType:
    """Import a module of BasicSR.

    Raises:
        UserError: BasicSR is absent or broken; the message says what to do.
    """
    if not basicsr_installed():
        raise UserError(
            "training and testing need BasicSR, which is not installed; run `dlgsanet doctor "
            "--fix`, which shows what it would install, and asks"
        )
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever another package's import may raise
        raise UserError(
            f"BasicSR is installed, but its import fails ({type(error).__name__}: {error}); "
            "`dlgsanet doctor` says what to do"
        ) from error


def DLGSANetModel(opt: dict[str, Any]) -> Any:
    """Build the model of this name in training.py, which is imported here and not before.

    It imports basicsr.models, which is half-initialised while BasicSR itself is being imported.
    """
    return importlib.import_module("dlgsanet_arch.training").DLGSANetModel(opt)


def register() -> None:
    """Register the network and its model in BasicSR, which is imported.

    A second call, and a name that is ours already, change nothing. A name that something else has
    stays with it, which gives a RuntimeWarning.
    """
    registries = importlib.import_module("basicsr.utils.registry")
    network = importlib.import_module("dlgsanet_arch.network").DLGSANet
    for registry, ours in (
        (registries.ARCH_REGISTRY, network),
        (registries.MODEL_REGISTRY, DLGSANetModel),
    ):
        name = ours.__name__
        if name not in registry:
            registry.register(ours)
            continue
        # Compared by name: a class from a reloaded module is another object, and still ours.
        both = (ours, registry.get(name))
        our, their = (f"{each.__module__}.{each.__qualname__}" for each in both)
        if our != their:
            warnings.warn(
                f"BasicSR's name {name!r} belongs to {their} already, so {our} is not registered",
                RuntimeWarning,
                stacklevel=2,
            )


class Repair(NamedTuple):
    """One fault of other packages, and what is done about it."""

    name: str
    target: str  # "module:attribute" or "module:Class.attribute"; for torchvision, the module
    reason: str  # what goes wrong without the repair
    # Takes the target and returns what replaces it, or None where it has no fault.
    replacement: Callable[[Callable], Callable | None] | None = None

    @property
    def is_active(self) -> bool:
        """Whether the repair has been made in this process."""
        return self.name in _made


_made: set[str] = globals().get("_made", set())  # names of repairs
_FUNCTIONAL = "torchvision.transforms.functional"
_FUNCTIONAL_TENSOR = "torchvision.transforms.functional_tensor"
REPAIRS = [
    Repair(
        "torchvision operators",
        "torchvision",
        "torchvision's C++ operators do not load with this torch, and its import fails",
    ),
    Repair(
        "functional_tensor",
        _FUNCTIONAL_TENSOR,
        "BasicSR imports torchvision.transforms.functional_tensor, which torchvision 0.17 removed",
    ),
]


def _repairs(name: str, target: str, reason: str) -> Callable[[Callable], Callable]:
    """Decorate a function of the target that returns what replaces it, None if it has no fault.

    Its docstring ends with what a release of BasicSR does once the repair can go.
    """

    def add(replacement: Callable) -> Callable:
        REPAIRS.append(Repair(name, target, reason, replacement))
        return replacement

    return add


def _replace(repair: Repair, module: ModuleType) -> None:
    *classes, attribute = repair.target.partition(":")[2].split(".")
    owner = functools.reduce(lambda parent, name: getattr(parent, name, None), classes, module)
    current = getattr(owner, attribute, None)
    # A module halfway through its own import, or another BasicSR, may not have the function.
    if current is None or getattr(current, "__module__", None) == __name__:
        return
    replacement = repair.replacement(current)
    if replacement is not None:
        setattr(owner, attribute, replacement)
        _made.add(repair.name)


_OPERATORS = ("nms", "qnms")
_OPERATOR_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _import_torchvision(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Import torchvision, if need be with the operators that its C++ half should have defined.

    Its Python half describes them to the compiler; the C++ half may fail to load in silence.
    Calling such an operator still fails, with torchvision's own message. The repair can go once
    torchvision imports without its operators.
    """
    try:
        execute(module)
        return
    except RuntimeError as error:
        # Any other error is another fault: whoever needs torchvision gets it, with its cause.
        if "operator torchvision::" not in str(error):
            raise
    import torch

    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _OPERATOR_SCHEMA)
    execute(module)
    _made.add("torchvision operators")


class _Alias(Loader):
    """Gives torchvision's public functions the name of the private module that is gone.

    It can go once BasicSR imports rgb_to_grayscale from torchvision.transforms.functional.
    """

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[_FUNCTIONAL_TENSOR] = importlib.import_module(_FUNCTIONAL)
        _made.add("functional_tensor")


def _load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """Replace `basicsr.train.load_resume_state`: on any device, from the run's own folder.

    As BasicSR does it, `opt["path"]` is changed so that the networks saved with the state are
    loaded. The state's tensors stay on the CPU; it is None for a new run.

    Raises:
        ResumeError: The state cannot be read.
    """
    import torch
    from basicsr.utils import check_resume

    path = opt["path"].get("resume_state")
    if opt["auto_resume"]:
        files = Path(opt["path"]["training_states"]).glob("*.state")
        states = [path for path in files if path.stem.isdecimal()]
        path = max(states, key=lambda path: int(path.stem), default=None)
    if not path:
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        int(state["epoch"]), int(state["iter"])
    except Exception as error:  # torch.load has half a dozen ways to fail on a damaged file
        raise ResumeError(
            f"{path} is not a complete training state ({type(error).__name__}: {error}); delete "
            "it to resume from the state before it"
        ) from error
    opt["path"]["resume_state"] = str(path)
    check_resume(opt, state["iter"])
    return state


def _uses(function: Callable, name: str) -> bool:
    """Whether the code of `function` names this global or attribute."""
    return name in getattr(getattr(function, "__code__", None), "co_names", ())


@_repairs(
    "resume",
    "basicsr.train:load_resume_state",
    "BasicSR resumes on CUDA only, and auto_resume looks in the current folder",
)
def _resume_anywhere(original: Callable) -> Callable | None:
    """Until BasicSR loads states onto the CPU from opt['path']['training_states']."""
    return _load_resume_state if _uses(original, "current_device") else None


# The LMDB environments that BasicSR's data sets hold open in this process, by real path. After a
# fork the child's data sets find the parent's here, as lmdb counts those as open in the child. A
# reload of this module keeps them.
shared_environments: weakref.WeakValueDictionary[str, Any] = globals().get(
    "shared_environments", weakref.WeakValueDictionary()
)


@_repairs(
    "shared LMDB",
    "basicsr.utils.file_client:LmdbBackend.__init__",
    "BasicSR opens an LMDB once for each data set; lmdb 3 allows one opening in a process",
)
def _share_environments(original: Callable) -> Callable | None:
    """Let data sets read the same LMDB through one environment, until BasicSR does."""
    if not _uses(original, "open"):
        return None

    def open_shared(self, db_paths, client_keys="default", **options):
        paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
        keys = [client_keys] if isinstance(client_keys, str) else client_keys
        clients = {}
        for key, path in zip(keys, paths, strict=True):
            place = os.path.realpath(path)
            if place not in shared_environments:
                original(self, [path], [key], **options)
                shared_environments[place] = self._client[key]
            clients[key] = shared_environments[place]
        self.db_paths, self._client = paths, clients

    return open_shared


@_repairs(
    "pickled LMDB",
    "basicsr.utils.file_client:LmdbBackend.__reduce_ex__",
    "BasicSR's data sets cannot be pickled once they have been read from an LMDB",
)
def _pickle_by_path(original: Callable) -> Callable | None:
    """Let a spawned worker open the LMDBs again, until BasicSR closes them to be pickled."""

    def reduce(self, protocol: int) -> tuple:
        return type(self), (list(self.db_paths), list(self._client))

    return reduce


@_repairs(
    "distributed CPU",
    "basicsr.models.base_model:BaseModel.model_to_device",
    "BasicSR asks for the current CUDA device when it distributes a network on CPUs",
)
def _wrap_on_cpu(original: Callable) -> Callable | None:
    """Until BasicSR gives DistributedDataParallel no device on a CPU."""
    if not _uses(original, "current_device"):
        return None

    def model_to_device(self, net):
        if not self.opt["dist"] or self.device.type != "cpu":
            return original(self, net)
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(
            net.to(self.device),
            find_unused_parameters=self.opt.get("find_unused_parameters", False),
        )

    return model_to_device


@_repairs(
    "JPEG quality",
    "basicsr.data.degradations:add_jpg_compression",
    "BasicSR draws a fractional JPEG quality, and OpenCV accepts whole numbers only",
)
def _round_quality(original: Callable) -> Callable | None:
    """Until BasicSR rounds it."""
    import cv2
    import numpy as np

    try:
        cv2.imencode(".jpg", np.zeros((1, 1, 3), np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90.5])
        return None  # this OpenCV takes fractions
    except cv2.error:
        return lambda img, quality=90: original(img, round(quality))


_ON_CUDA = "BasicSR makes the LR images of Real-ESRGAN on CUDA only"


@_repairs("RealESRNet on a CPU", "basicsr.models.realesrnet_model:RealESRNetModel", _ON_CUDA)
@_repairs("RealESRGAN on a CPU", "basicsr.models.realesrgan_model:RealESRGANModel", _ON_CUDA)
def _degrade_on_cpu(original: type) -> type | None:
    """Let a Real-ESRGAN model make its LR images on a CPU, until BasicSR uses the model's device.

    Its constructor and its pool ask for CUDA whatever the model's device is, and its filters view
    images whose channels are not side by side.
    """
    if not _uses(original.__init__, "cuda"):
        return None
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is Tensor.cuda:
                return args[0]
            if function is Tensor.view:
                function = Tensor.reshape
            return function(*args, **(kwargs or {}))

    def on_own_device(method: Callable) -> Callable:
        @functools.wraps(method)
        def run(self, given):  # the options of a model that is being made, or its data
            device = getattr(self, "device", None)
            on_cpu = given["num_gpu"] == 0 if device is None else device.type == "cpu"
            with OnCpu() if on_cpu else nullcontext():
                return method(self, given)

        run.__module__ = __name__
        return run

    original.__init__ = on_own_device(original.__init__)
    original.feed_data = on_own_device(original.feed_data)
    return original


def _is_complete(name: str) -> bool:
    """Return whether a module is imported, and its import has ended."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """Acts around the import of what is repaired, and registers DLGSANet after one module's."""

    def __init__(self, register_after: str) -> None:
        self.register_after = register_after

    def act(self, module: ModuleType) -> None:
        """Do what belongs to a module that has just been imported."""
        name = module.__name__
        for repair in REPAIRS:
            if repair.replacement and repair.target.partition(":")[0] == name:
                _replace(repair, module)
        if name == self.register_after:
            register()

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        """Return the spec that the other finders have, with an action around the import."""
        root = fullname.partition(".")[0]
        if root not in ("torchvision", "basicsr"):
            return None
        torchvision = {repair.target for repair in REPAIRS if not repair.replacement}
        if root == "torchvision" and fullname not in torchvision:
            return None
        finders = (each for each in sys.meta_path if each is not self)
        specs = (each.find_spec(fullname, path, target) for each in finders)
        spec = next((each for each in specs if each is not None), None)
        if fullname == _FUNCTIONAL_TENSOR and spec is None:
            return ModuleSpec(fullname, _Alias())
        if spec is None or spec.loader is None or fullname == _FUNCTIONAL_TENSOR:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            if fullname == "torchvision":
                _import_torchvision(execute, module)
            else:
                execute(module)
                self.act(module)

        # The loader itself stays: `python -m` asks the loader of an imported module for its code.
        spec.loader.exec_module = execute_and_act
        return spec


def install() -> None:
    """Install the import hook, in the place of an earlier one, and act on what is imported."""
    sys.meta_path[:] = [
        each
        for each in sys.meta_path
        if (type(each).__module__, type(each).__qualname__) != (__name__, _Finder.__qualname__)
    ]
    # Half-way through the import of BasicSR, what remains of it is its registry; else others that
    # register a DLGSANet of their own come first, and keep the name.
    registry = "basicsr.utils.registry"
    halfway = sys.modules.get("basicsr") is not None and not _is_complete("basicsr")
    finder = _Finder(registry if halfway else "basicsr")
    sys.meta_path.insert(0, finder)
    modules = {repair.target.partition(":")[0] for repair in REPAIRS} | {finder.register_after}
    for name in sorted(modules):
        if _is_complete(name):
            finder.act(sys.modules[name])
