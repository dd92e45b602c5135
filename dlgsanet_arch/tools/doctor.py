"""The report of `dlgsanet doctor`: versions, repairs, devices, problems and their fixes."""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dlgsanet_arch import _basicsr
from dlgsanet_arch.cpu import library
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.tools import installing
from dlgsanet_arch.version import __version__

# Versions that the complete test suite has run with.
TESTED_TORCH = ("2.11", "2.13")
_TESTED = " and ".join(TESTED_TORCH)
TESTED_BASICSR = installing.BASICSR.partition("==")[2]

# What training and the data verbs import, and what pip calls it.
REQUIREMENTS = {
    **{name: name for name in ("numpy", "lmdb", "scipy", "requests", "safetensors", "tqdm")},
    **{"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"},
    "torchvision": "torchvision",
}
FORCE = "--force-reinstall"

Command = tuple[str, ...]  # arguments of pip


class Problem(NamedTuple):
    """Something that keeps training from running."""

    cause: str
    commands: Sequence[Command] = ()  # what `--fix` gives to pip
    advice: str = ""  # shown in place of them

    @property
    def fix(self) -> str:
        """The one line that fixes it."""
        return self.advice or " && ".join(f"pip {shlex.join(each)}" for each in self.commands)


class Package(NamedTuple):
    """What was found of a package."""

    name: str  # that it is imported by
    version: str | None  # None where it is not installed
    error: Exception | None = None  # what its import raised

    def __str__(self) -> str:
        if self.version is None:
            return "not installed"
        return self.version if self.error is None else f"{self.version}, its import fails"


def _describe(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def look_for(name: str) -> Package:
    """Import a package and return what was found; whatever the import raises is caught."""
    module, error = None, None
    try:
        if importlib.util.find_spec(name) is None:
            return Package(name, None)
        module = importlib.import_module(name)
    except Exception as raised:
        error = raised
    version = getattr(module, "__version__", None)
    if not version:
        distributions = importlib.metadata.packages_distributions().get(name)
        version = importlib.metadata.version(distributions[0]) if distributions else None
    return Package(name, str(version or "of unknown version"), error)


def _short(version: str) -> str:
    """Return major and minor version: 2.13 of 2.13.0+cpu."""
    return ".".join(version.split(".")[:2])


def _matching_torchvision() -> str:
    """Return pip's name of the torchvision release made for this torch: 0.28 for 2.13."""
    major, minor = _short(torch.__version__).split(".")
    return f"torchvision==0.{int(minor) + 15}.*" if major == "2" else "torchvision"


def package_problem(package: Package) -> Problem | None:
    """Return a problem where BasicSR, or what training imports, is absent or broken."""
    name, error = {"basicsr": "BasicSR"}.get(package.name, package.name), package.error
    if package.version is None:
        cause = f"{name} is not installed; training needs it"
    elif error is not None:
        cause = f"{name} is installed, but its import fails: {_describe(error)}"
    else:
        return None
    # What an import asked for and is not installed.
    module = error.name if isinstance(error, ModuleNotFoundError) else None
    module = (module or "").partition(".")[0]
    if module and importlib.util.find_spec(module) is None:
        pip_names = {"distutils": "setuptools", **REQUIREMENTS}
        return Problem(cause, [("install", pip_names.get(module, module))])
    again = (FORCE,) if error else ()
    if name == "cv2" and re.search(r"lib\S+\.so", str(error)):
        # Its windows need a desktop's libraries; the headless build has no windows.
        headless = ("install", "opencv-python-headless")
        return Problem(cause, [("uninstall", "-y", "opencv-python"), headless])
    if name == "torchvision":
        return Problem(cause, [("install", *again, "--no-deps", _matching_torchvision())])
    if name != "BasicSR":
        return Problem(cause, [("install", *again, REQUIREMENTS[name])])
    if getattr(error, "name", None) == "basicsr.version":
        # A checkout has no version.py until its setup.py ran.
        checkout = shlex.join(["pip", "install", *installing.BUILD_OPTIONS, "-e", "."])
        return Problem(cause, advice=f"in the BasicSR checkout: {checkout}")
    python = f"on Python {platform.python_version()} BasicSR builds only with a repair"
    advice = f"dlgsanet doctor --fix  ({python})" if installing.build_paths() else ""
    return Problem(cause, _basicsr_commands(*again), advice)


def _basicsr_commands(*options: str) -> list[Command]:
    *first, (verb, *rest) = installing.INSTALL_BASICSR
    return [*first, (verb, *options, *rest)]


def name_problem() -> Problem | None:
    """Return a problem where the name DLGSANet in BasicSR's registry is not this package's."""
    try:
        _basicsr.register()
        found = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY.get("DLGSANet")
    except Exception as failure:
        cause = f"DLGSANet cannot be registered in BasicSR: {_describe(failure)}"
        return Problem(cause, _basicsr_commands(FORCE))
    if (found.__module__, found.__qualname__) == (DLGSANet.__module__, DLGSANet.__qualname__):
        return None
    place = getattr(sys.modules.get(found.__module__), "__file__", found.__module__)
    return Problem(
        f"BasicSR's name 'DLGSANet' belongs to {found.__module__}.{found.__qualname__}",
        advice=f"remove or rename that class: {place}",
    )


def device_problem(device: str) -> Problem | None:
    """Train and evaluate a small DLGSANet on a device; return the problem, or None if it runs."""
    small = {"dim": 12, "groups": 1, "blocks": 1, "window_size": 3, "tlc_kernel": 8, "upscale": 2}
    try:
        network = DLGSANet(
            **small, buildblock_type="sparseedge", upsampler="pixelshuffledirect"
        ).to(device)
        images = torch.rand(2, 3, 12, 17, device=device)
        network(images).mean().backward()
        results = [parameter.grad for parameter in network.parameters()]
        with torch.no_grad():
            results.append(network.eval()(images))
        if not all(torch.isfinite(result).all() for result in results):
            raise ArithmeticError("an output or a gradient is not finite")
    except Exception as error:
        fix = f"pip install --force-reinstall torch=={TESTED_TORCH[-1]}.*"
        if device != "cpu":
            fix += " (a build for this device), or hide the device: CUDA_VISIBLE_DEVICES=''"
        return Problem(f"DLGSANet does not run on {device}: {_describe(error)}", advice=fix)
    return None


def warnings(torchvision: Package, basicsr: Package) -> list[str]:
    """Return untested or unsuitable versions, which may work all the same."""
    found, (low, high), matching = [], installing.TESTED_PYTHON, _matching_torchvision()
    if not low <= sys.version_info[:2] <= high:
        found.append(
            f"Python {platform.python_version()} is untested (tested: {installing.TESTED})"
        )
    if _short(torch.__version__) not in TESTED_TORCH:
        fix = f"pip install 'torch=={TESTED_TORCH[-1]}.*' torchvision"
        found.append(f"torch {torch.__version__} is untested (tested: {_TESTED}): {fix}")
    if torchvision.version and _short(torchvision.version) not in matching:
        made = f"torchvision {torchvision.version} was made for another torch"
        found.append(f"{made} than {torch.__version__}: pip install --no-deps '{matching}'")
    if basicsr.version not in (None, TESTED_BASICSR):
        found.append(f"BasicSR {basicsr.version} is untested (tested: {TESTED_BASICSR})")
    if torch.version.cuda and not (torch.cuda.is_available() or shutil.which("nvidia-smi")):
        found.append(
            "torch has gigabytes of CUDA libraries and no GPU here: pip install --force-reinstall "
            "torch torchvision --index-url https://download.pytorch.org/whl/cpu"
        )
    return found


def _cuda() -> str:
    if torch.version.cuda is None:
        seen = "; an NVIDIA driver is installed" if shutil.which("nvidia-smi") else ""
        return f"none: this torch is built without it{seen}"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no device is visible"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda} on {', '.join(names)}"


def _print_section(title: str, lines: Sequence[str]) -> None:
    print(f"\n{title}")
    for line in lines or ["none"]:
        print(f"  {line}")


def report() -> list[Problem]:
    """Print versions, repairs, devices, warnings and problems; return the problems."""
    packages = {name: look_for(name) for name in REQUIREMENTS}
    basicsr, tensorboard = look_for("basicsr"), look_for("tensorboard")
    problems = list(filter(None, map(package_problem, packages.values())))
    # Where a requirement fails, BasicSR fails for the same cause, which is listed already.
    if not problems or basicsr.version is None:
        problems += filter(None, [package_problem(basicsr) or name_problem()])
    fault = library.why_not()
    kernels = f"none, inference on a CPU is slower: {fault}" if fault else library.variant()
    hint = " (needed where use_tb_logger is true: pip install tensorboard)"
    rows = {
        "dlgsanet": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (tested: {_TESTED})",
        "CUDA": _cuda(),
        "CPU kernels": kernels,
        "basicsr": f"{basicsr} (tested: {TESTED_BASICSR})",
        "Triton": look_for("triton"),
        **{{"cv2": "OpenCV"}.get(name, name): found for name, found in packages.items()},
        "tensorboard": f"{tensorboard}{hint if tensorboard.version is None else ''}",
    }
    for label, value in rows.items():
        print(f"{label:<12} {value}")
    repairs = [f"{each.name}: {each.reason}" for each in _basicsr.REPAIRS if each.is_active]
    _print_section("active repairs", repairs)
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    failed = {device: device_problem(device) for device in devices}
    problems += filter(None, failed.values())
    states = {
        device: "fails" if p else "builds, trains and evaluates" for device, p in failed.items()
    }
    _print_section("DLGSANet on each device", [": ".join(each) for each in states.items()])
    _print_section("warnings", warnings(packages["torchvision"], basicsr))
    _print_section("problems", [f"{each.cause}\n    fix: {each.fix}" for each in problems])
    return problems


def fix(problems: Sequence[Problem], *, yes: bool) -> int:
    """Show the pip commands that fix problems, ask unless `yes`, run them, and report again.

    Returns 0 where no problem is left, else 1; UserError where pip is absent, or fails.
    """
    commands = list(dict.fromkeys(each for problem in problems for each in problem.commands))
    if not commands:
        print(f"\n{'pip cannot fix these problems' if problems else 'nothing to fix'}")
        return int(bool(problems))
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"this Python has no pip: run {sys.executable} -m ensurepip")
    lines = [f"-m pip {shlex.join(each)}" for each in commands]
    _print_section(f"to run with {sys.executable}", lines)
    if not yes:
        try:
            answer = input("run this? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was changed")
            return 1
    for each in commands:
        if not installing.run_pip(sys.executable, *each, paths=installing.build_paths()):
            raise UserError(f"pip failed, its message is above: pip {shlex.join(each)}")
    print("\ninstalled; once more:", flush=True)
    return subprocess.run([sys.executable, "-m", "dlgsanet_arch", "doctor"]).returncode
