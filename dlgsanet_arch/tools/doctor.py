"""What is installed, what is repaired, what is wrong and how to fix it."""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dlgsanet_arch import _basicsr
from dlgsanet_arch.cpu import library
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.version import __version__

# What the whole test suite has run with.
TESTED_TORCH = ("2.11", "2.13")
TESTED_BASICSR = "1.4.2"

# What BasicSR imports, and what pip calls it. Its own list names more than it uses.
REQUIREMENTS = {
    "numpy": "numpy",
    "cv2": "opencv-python-headless",
    "lmdb": "lmdb",
    "scipy": "scipy",
    "yaml": "pyyaml",
    "requests": "requests",
    "tqdm": "tqdm",
    "torchvision": "torchvision",
}
# The same for what may turn out to be missing when BasicSR or one of those is imported.
PIP_NAMES = {**REQUIREMENTS, "PIL": "pillow", "distutils": "setuptools"}

REINSTALL_BASICSR = _basicsr.INSTALL_BASICSR.replace("--no-build", "--force-reinstall --no-build")


@dataclass(frozen=True)
class Problem:
    """Something that keeps training from running.

    Attributes:
        cause: What is wrong.
        fix: The one line that fixes it.
    """

    cause: str
    fix: str


@dataclass(frozen=True)
class Package:
    """What was found of a package.

    Attributes:
        name: The name that it is imported by.
        version: Its version; None where it is not installed.
        error: What its import raised; None where it was imported, or is not installed.
    """

    name: str
    version: str | None
    error: Exception | None = None

    def __str__(self) -> str:
        if self.version is None:
            return "not installed"
        return self.version if self.error is None else f"{self.version}, its import fails"


def _describe(error: Exception) -> str:
    """Return the type and the first line of an error."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _installed_version(name: str) -> str:
    """Return the version that pip knows of a module that was found."""
    distributions = importlib.metadata.packages_distributions().get(name)
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"


def look_for(name: str) -> Package:
    """Import a package and say what came of it; whatever the import raises is caught."""
    try:
        if importlib.util.find_spec(name) is None:
            return Package(name, None)
        module = importlib.import_module(name)
    except Exception as error:
        return Package(name, _installed_version(name), error)
    version = getattr(module, "__version__", None)
    return Package(name, str(version) if version else _installed_version(name))


def _matching_torchvision() -> str:
    """Return pip's name of the torchvision release made for this torch: 0.28 for 2.13."""
    major, minor = torch.__version__.split(".")[:2]
    return f"torchvision==0.{int(minor) + 15}.*" if major == "2" else "torchvision"


def _missing_package(package: Package) -> str | None:
    """Return the package that is not installed and that a package's import asked for, if any."""
    if not isinstance(package.error, ModuleNotFoundError) or not package.error.name:
        return None
    needed = package.error.name.partition(".")[0]
    return needed if importlib.util.find_spec(needed) is None else None


def _fix(package: Package) -> str:
    """Return the line that installs or fixes a requirement of BasicSR."""
    missing = _missing_package(package)
    if missing is not None:
        return f"pip install {PIP_NAMES.get(missing, missing)}"
    if package.name == "cv2" and re.search(r"lib\S+\.so", str(package.error)):
        # Its windows need a desktop's libraries; the headless build has no windows.
        return "pip uninstall -y opencv-python && pip install opencv-python-headless"
    reinstall = "" if package.version is None else "--force-reinstall "
    if package.name == "torchvision":
        return f"pip install {reinstall}--no-deps '{_matching_torchvision()}'"
    return f"pip install {reinstall}{PIP_NAMES[package.name]}"


def requirement_problems(packages: Sequence[Package]) -> Iterator[Problem]:
    """Yield a problem for each package that BasicSR imports and that is absent or broken."""
    for package in packages:
        if package.version is None:
            yield Problem(f"{package.name} is not installed; BasicSR needs it", _fix(package))
        elif package.error is not None:
            cause = f"{package.name} is installed, but its import fails: {_describe(package.error)}"
            yield Problem(cause, _fix(package))


def basicsr_problems(basicsr: Package) -> Iterator[Problem]:
    """Yield what is wrong with BasicSR itself, or with the name DLGSANet in its registry."""
    if basicsr.version is None:
        install = _basicsr.INSTALL_BASICSR
        if sys.version_info >= (3, 13):
            install += "  (with Python 3.10 to 3.12: newer ones do not build it)"
        yield Problem("BasicSR is not installed", install)
        return
    if basicsr.error is not None:
        missing = _missing_package(basicsr)
        if missing is not None:
            fix = f"pip install {PIP_NAMES.get(missing, missing)}"
        elif getattr(basicsr.error, "name", None) == "basicsr.version":
            # A checkout has no version.py until its setup.py ran.
            fix = "in the BasicSR checkout: pip install --no-build-isolation --no-deps -e ."
        else:
            fix = REINSTALL_BASICSR
        yield Problem(
            f"BasicSR is installed, but its import fails: {_describe(basicsr.error)}", fix
        )
        return
    try:
        _basicsr.register()
        found = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY.get("DLGSANet")
    except Exception as failure:
        cause = f"DLGSANet cannot be registered in BasicSR: {_describe(failure)}"
        yield Problem(cause, REINSTALL_BASICSR)
        return
    if (found.__module__, found.__qualname__) != (DLGSANet.__module__, DLGSANet.__qualname__):
        place = getattr(sys.modules.get(found.__module__), "__file__", found.__module__)
        yield Problem(
            f"BasicSR's name 'DLGSANet' belongs to {found.__module__}.{found.__qualname__}",
            f"remove or rename that class: {place}",
        )


def devices() -> list[str]:
    """Return the devices that torch can see, the CPU first."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _train_and_evaluate(device: str) -> None:
    """Build a small DLGSANet, train and evaluate it once; raise an error where that fails."""
    network = DLGSANet(
        dim=12,
        groups=1,
        blocks=1,
        buildblock_type="sparseedge",
        window_size=3,
        tlc_kernel=8,
        upscale=2,
        upsampler="pixelshuffledirect",
    ).to(device)
    images = torch.rand(2, 3, 12, 17, device=device)
    network(images).mean().backward()
    results = [parameter.grad for parameter in network.parameters()]
    with torch.no_grad():
        results.append(network.eval()(images))
    if not all(torch.isfinite(result).all() for result in results):
        raise ArithmeticError("an output or a gradient is not finite")


def device_problem(device: str) -> Problem | None:
    """Return what keeps DLGSANet from running on a device; None where it runs."""
    try:
        _train_and_evaluate(device)
    except Exception as error:
        fix = f"pip install --force-reinstall torch=={TESTED_TORCH[-1]}.*"
        if device != "cpu":
            fix += " (a build for this device), or hide the device: CUDA_VISIBLE_DEVICES=''"
        return Problem(f"DLGSANet does not run on {device}: {_describe(error)}", fix)
    return None


def _cuda() -> str:
    if torch.version.cuda is None:
        seen = "; an NVIDIA driver is installed" if shutil.which("nvidia-smi") else ""
        return f"none: this torch is built without it{seen}"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no device is visible"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda} on {', '.join(names)}"


def _cpu_kernels() -> str:
    fault = library.why_not()
    return f"none, inference on a CPU is slower: {fault}" if fault else library.variant()


def _tested_torch() -> str:
    version = ".".join(torch.__version__.split(".")[:2])
    tested = " and ".join(TESTED_TORCH)
    note = "" if version in TESTED_TORCH else "; this one is not"
    return f"{torch.__version__} (tested: {tested}{note})"


def _tensorboard() -> str:
    found = look_for("tensorboard")
    hint = " (needed where use_tb_logger is true: pip install tensorboard)"
    return f"{found}{hint if found.version is None or found.error else ''}"


def _section(title: str, lines: Sequence[str]) -> None:
    print(f"\n{title}")
    for line in lines or ["none"]:
        print(f"  {line}")


def report() -> int:
    """Print versions, repairs, devices and problems.

    Returns:
        0, or 1 where a problem keeps training from running.
    """
    requirements = [look_for(name) for name in REQUIREMENTS]
    problems = list(requirement_problems(requirements))
    basicsr = look_for("basicsr")
    # Where a requirement fails, BasicSR fails for the same cause, which is listed already.
    if not problems or basicsr.version is None:
        problems += basicsr_problems(basicsr)

    versions = {package.name: str(package) for package in requirements}
    rows = {
        "dlgsanet": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": _tested_torch(),
        "CUDA": _cuda(),
        "CPU kernels": _cpu_kernels(),
        "torchvision": versions["torchvision"],
        "basicsr": f"{basicsr} (tested: {TESTED_BASICSR})",
        "Triton": str(look_for("triton")),
        "OpenCV": versions["cv2"],
        "lmdb": versions["lmdb"],
        "numpy": versions["numpy"],
        "tensorboard": _tensorboard(),
    }
    for label, value in rows.items():
        print(f"{label:<12} {value}")
    _section(
        "repairs in force",
        [f"{repair.name}: {repair.reason}" for repair in _basicsr.REPAIRS if repair.is_active],
    )

    reports = []
    for device in devices():
        problem = device_problem(device)
        problems += [problem] if problem else []
        reports.append(f"{device}: {'fails' if problem else 'builds, trains and evaluates'}")
    _section("DLGSANet on each device", reports)
    _section("problems", [f"{problem.cause}\n    fix: {problem.fix}" for problem in problems])
    return 1 if problems else 0
