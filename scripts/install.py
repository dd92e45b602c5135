"""Make an environment ready for `make demo` and `make test`.

    python scripts/install.py ENVIRONMENT

The checkout's own .venv is made here, follows requirements.txt to the letter and is made anew
after an install that did not finish. Any other environment is the user's and must be the one that
runs this file: its torch, torchvision, OpenCV, setuptools and BasicSR stay as they are, and only
what is missing is added.

This runs before anything is installed, so it imports the standard library and a module of the
package that does the same.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dlgsanet_arch.tools.installing import (  # noqa: E402 - only now on the path
    BASICSR,
    BUILD_OPTIONS,
    TESTED,
    build_paths,
    run_pip,
)

OWN = ROOT / ".venv"
# In the .venv that was made here; empty until an install has finished, then what it was made from.
STAMP = OWN / ".dlgsanet-install"
REQUIREMENTS = [ROOT / "requirements.txt", ROOT / "requirements-test.txt"]
OLDEST_TORCH = (2, 5)


def say(message: str) -> None:
    """Print a line at once, in order with what pip prints."""
    print(message, flush=True)


def fingerprint() -> str:
    """Return a digest of all files that determine the content of the .venv."""
    package = ROOT / "dlgsanet_arch"
    files = [*REQUIREMENTS, ROOT / "setup.py", ROOT / "pyproject.toml", __file__]
    files += [package / "version.py", package / "tools" / "installing.py"]
    files += sorted((package / "cpu").glob("*.[ch]"))
    digest = hashlib.sha256(str(ROOT).encode())  # the checkout itself is installed, by its path
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def read_requirements() -> list[str]:
    """Return the lines of all requirements files without comments."""
    lines = (line for file in REQUIREMENTS for line in file.read_text().splitlines())
    return [text for line in lines if (text := line.partition("#")[0].strip())]


def installed_version(name: str) -> str | None:
    """Return the version of a distribution in the Python that runs this, None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def at_least(version: str, floor: tuple[int, ...]) -> bool:
    """Return whether a version's leading numbers reach `floor`."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[: len(floor)]) >= floor


def adapt(requirements: list[str]) -> list[str]:
    """Adapt requirements to a user's environment, so that packages which must stay do stay."""
    torch = installed_version("torch")
    if torch is not None and not at_least(torch, OLDEST_TORCH):
        sys.exit(
            f"make: the active environment has torch {torch}, which is too old (2.5 is the oldest "
            "that works); activate another one, or deactivate it and make uses a .venv of its own"
        )
    wanted = []
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)[0]
        version = installed_version(name)
        if name == "opencv-python-headless" and importlib.util.find_spec("cv2") is not None:
            continue
        if name == "setuptools" and version is not None and at_least(version, (64,)):
            continue
        if name in ("torch", "torchvision") and version is not None:
            requirement = f"{name}=={version}"
        elif name == "torchvision" and torch is not None:
            requirement = name  # pip finds the one that was made for this torch
        wanted.append(requirement)
    return wanted


def bootstrap_pip(base: str, python: Path) -> bool:
    """Put pip into an environment with a pip from outside it; return whether it worked.

    Debian's Python has no ensurepip of its own. A pip before 22.3 has no `--python`, but any pip
    can unpack another into a folder.
    """
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.check_output([python, "-c", query], text=True).strip()
    for outer in ([base, "-m", "pip"], ["pip"], ["pip3"]):
        if shutil.which(outer[0]) is None:
            continue
        for arguments in (["--python", python, "install"], ["install", "--target", folder]):
            command = [*outer, *arguments, "--quiet", "--disable-pip-version-check", "pip"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return True
    return False


def make_own() -> None:
    """Make the .venv from nothing, with pip in it and an empty stamp."""
    # This Python may be the one in the .venv that goes: a link to the Python that outlives it.
    base = os.path.realpath(sys.executable)
    say(f"Making .venv with Python {sys.version.split()[0]} ({base})")
    shutil.rmtree(OWN, ignore_errors=True)
    OWN.mkdir()
    STAMP.touch()
    venv = [base, "-m", "venv", OWN]
    if subprocess.run(venv, capture_output=True).returncode == 0:
        return
    bare = subprocess.run([*venv, "--without-pip"], capture_output=True, text=True)
    if bare.returncode != 0 or not bootstrap_pip(base, OWN / "bin" / "python"):
        print(bare.stdout, bare.stderr, file=sys.stderr)
        sys.exit(
            f"make: no virtual environment with pip could be made with {base}; install your "
            "system's packages for both (on Debian: apt install python3-venv), or name another "
            "Python: make PYTHON=/path/to/python3.11 ..."
        )


@contextmanager
def compiler(python: Path) -> Iterator[list[Path]]:
    """Fetch Zig's C compiler for the build of the CPU kernels if no other compiler works.

    pip does not fetch it, because it skips build requirements without build isolation.

    Yields:
        Folders for the PYTHONPATH of the build.
    """
    query = "import setup; print(setup.ZIG if setup.needs_zig() else '')"
    asked = subprocess.run([python, "-c", query], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    zig = asked.stdout.split()
    with tempfile.TemporaryDirectory() as folder:
        if zig:
            say("No C compiler works here: fetching Zig's for this install")
            if not run_pip(python, "install", "--no-deps", "--target", folder, *zig):
                say("pip could not fetch it; inference on a CPU is slower without compiled kernels")
        yield [Path(folder)] if zig else []


def install(python: Path, requirements: list[str], basicsr: bool) -> None:
    """Install the requirements, then BasicSR if asked for, and this checkout in place."""
    started = time.monotonic()
    if sys.version_info >= (3, 13):
        say(f"This is Python {sys.version_info[0]}.{sys.version_info[1]}; tested are {TESTED}")
    say("Installing torch, BasicSR's requirements and the test tools")
    if not run_pip(python, "install", *requirements):
        sys.exit(
            "make: pip could not install requirements.txt and requirements-test.txt; its message "
            "is above. Check the network and pip's index; where it found no wheel for this "
            f"Python, name one of {TESTED}: make clean, then make PYTHON=/path/to/python3.11 ..."
        )
    say(f"Installing {BASICSR + ' and ' if basicsr else ''}this checkout")
    last = [*([BASICSR] if basicsr else []), "--editable", ROOT]
    with compiler(python) as folders:
        paths = [*build_paths(), *folders]
        done = run_pip(python, "install", *BUILD_OPTIONS, *last, paths=paths)
    if not done:
        sys.exit(
            f"make: pip could not build or install {' '.join(map(str, last))}; its message is "
            "above. BasicSR's source comes from pip's index: check the network."
        )
    say(f"Installed in {time.monotonic() - started:.0f} s")


def prepare(environment: Path) -> None:
    """Make `environment` ready; nothing is done to an own .venv that is."""
    if environment != OWN or (OWN.exists() and not STAMP.exists()):
        if Path(sys.prefix).resolve() != environment:
            sys.exit(
                f"make: {environment} was not made by make and has no working Python 3.10 or "
                "newer; remove or rename it, and make makes its own"
            )
        if importlib.util.find_spec("pip") is None:
            sys.exit(
                f"make: {environment} has no pip; add it ({sys.executable} -m ensurepip, or uv pip "
                "install pip), or deactivate it or move it away, and make makes its own"
            )
        missing = importlib.util.find_spec("basicsr") is None
        install(Path(sys.executable), adapt(read_requirements()), basicsr=missing)
        return
    python = OWN / "bin" / "python"
    wanted = fingerprint()
    found = STAMP.read_text() if STAMP.exists() else ""
    works = python.exists() and subprocess.run([python, "-c", ""]).returncode == 0
    if works and found == wanted:
        return
    if not works or not found:
        make_own()
    STAMP.write_text("")
    install(python, read_requirements(), basicsr=True)
    STAMP.write_text(wanted)


if __name__ == "__main__":
    os.environ |= {"PIP_USER": "0", "PIP_ROOT_USER_ACTION": "ignore"}
    # A second `make` in the same checkout waits until this one has installed.
    with open(ROOT / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(Path(sys.argv[1]).resolve())
