"""BasicSR found, imported and registered in; the only file that touches its registries."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dlgsanet_arch import compat
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet

# Its setup.py looks for Cython; without the two options pip would fetch torch again and tb-nightly.
INSTALL_BASICSR = (
    "pip install cython 'setuptools<81' wheel && "
    "pip install --no-build-isolation --no-deps basicsr==1.4.2"
)


def basicsr_installed() -> bool:
    """Return whether BasicSR can be found; it is not imported, so it may still be broken."""
    return sys.modules.get("basicsr") is not None or (
        importlib.util.find_spec("basicsr") is not None
    )


def import_basicsr(name: str) -> ModuleType:
    """Import a module of BasicSR.

    Raises:
        UserError: BasicSR is absent or broken; the message says what to do.
    """
    if not basicsr_installed():
        raise UserError(
            "training and testing need BasicSR, which is not installed; run: "
            f"{INSTALL_BASICSR} (`dlgsanet doctor` names what else is missing)"
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

    Args:
        opt: The parsed options, of which the model keeps what it is given.

    Raises:
        UserError: An option of the training step has a wrong value, or cannot work here.
    """
    return importlib.import_module("dlgsanet_arch.training").DLGSANetModel(opt)


def _add(registry: Any, ours: Callable[..., Any]) -> None:
    """Register a class or function of ours under its name, unless the name is taken."""
    name = ours.__name__
    if name not in registry:
        registry.register(ours)
        return
    # Compared by name: a class from a reloaded module is another object, and still ours.
    our, their = (f"{each.__module__}.{each.__qualname__}" for each in (ours, registry.get(name)))
    if our != their:
        warnings.warn(
            f"BasicSR's name {name!r} belongs to {their} already, so {our} is not registered",
            RuntimeWarning,
            stacklevel=3,
        )


def register() -> None:
    """Repair BasicSR and register the network and its model in it, where BasicSR is installed.

    A second call, and a name that is ours already, change nothing. A name that something else has
    stays with it, and a BasicSR whose import fails stays unused; each gives a RuntimeWarning with
    the cause.
    """
    if not basicsr_installed():
        return
    compat.repair()
    try:
        registries = importlib.import_module("basicsr.utils.registry")
    except Exception as error:
        warnings.warn(
            "DLGSANet is not registered: BasicSR is installed, but its import fails "
            f"({type(error).__name__}: {error}); `dlgsanet doctor` says what to do",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    _add(registries.ARCH_REGISTRY, DLGSANet)
    _add(registries.MODEL_REGISTRY, DLGSANetModel)
