"""Registration in BasicSR; the only file that touches its registries."""

import importlib
import importlib.util
import sys
import warnings

from dlgsanet_arch import compat
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


def register() -> None:
    """Repair BasicSR and register DLGSANet in it, where BasicSR is installed.

    A second call, and a name that our class has already, change nothing. A name that another class
    has stays with it, and a BasicSR whose import fails stays unused; each gives a RuntimeWarning
    with the cause.
    """
    if not basicsr_installed():
        return
    compat.repair()
    try:
        registry = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY
    except Exception as error:
        warnings.warn(
            "DLGSANet is not registered: BasicSR is installed, but its import fails "
            f"({type(error).__name__}: {error}); `dlgsanet doctor` says what to do",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    name = DLGSANet.__name__
    if name not in registry:
        registry.register(DLGSANet)
        return
    # Compared by name: a class from a reloaded module is another object, and still ours.
    ours, theirs = (f"{c.__module__}.{c.__qualname__}" for c in (DLGSANet, registry.get(name)))
    if ours != theirs:
        warnings.warn(
            f"BasicSR's name {name!r} belongs to {theirs} already, so {ours} is not registered",
            RuntimeWarning,
            stacklevel=2,
        )
