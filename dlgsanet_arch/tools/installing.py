"""How pip installs BasicSR, for `dlgsanet doctor --fix` and scripts/install.py.

The standard library alone: the script runs before anything is installed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BASICSR = "basicsr==1.4.2"
# Isolated, its build would fetch torch again; its own requirements demand tb-nightly.
BUILD_OPTIONS = ("--no-build-isolation", "--no-deps")
INSTALL_BASICSR = (
    ("install", "cython", "setuptools<81", "wheel"),  # what its setup.py needs
    ("install", *BUILD_OPTIONS, BASICSR),
)
TESTED_PYTHON = ((3, 10), (3, 12))
TESTED = "Python 3.10 to 3.12"


def build_paths() -> list[Path]:
    """Return folders that PYTHONPATH needs while BasicSR is built by this version of Python."""
    return [Path(__file__).with_name("build_repair")] if sys.version_info >= (3, 13) else []


def run_pip(python: Path | str, verb: str, *arguments: object, paths: Sequence[Path] = ()) -> bool:
    """Run that Python's pip, `paths` first in PYTHONPATH; return whether it worked.

    Prints the larger downloads.
    """
    others = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *others])}
    command = [python, "-m", "pip", verb, "--disable-pip-version-check", "--no-input"]
    if verb == "install":
        # Python compiles what it imports, a small part of torch; compiling all of it takes longer.
        command += ["--no-compile", "--progress-bar", "off"]
    with subprocess.Popen(
        [str(word) for word in (*command, *arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if re.search(r"Downloading .*\((\d{2,}\.\d MB|[\d.]+ GB)\)", line):
                print(f"  {line.strip()}", flush=True)
    return process.returncode == 0
