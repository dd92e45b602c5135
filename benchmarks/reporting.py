"""Where measurements go: one JSON a section and device, and RESULTS.md written from them all.

Run as a script, it writes RESULTS.md anew: after JSON came from another machine.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dlgsanet_arch.cpu import library

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"

# All files with tests that need a GPU. They import neither BasicSR nor lmdb.
GPU_TESTS = (
    *("tests/test_triton_backend.py", "tests/test_golden.py", "tests/test_ops.py"),
    *("tests/test_network.py", "tests/test_published_kernels.py", "tests/test_inference.py"),
    *("tests/test_metrics.py", "tests/test_fused_triton.py"),
)
# What there is to measure, and with which arguments of which Python: the most valuable first.
# A section's results are results/<section>_<device>.json.
SECTIONS = {
    "tests": ("-m", "pytest", "-m", "gpu", *GPU_TESTS),
    "network": ("benchmarks/network.py", "--only-tiny"),
    "training_step": ("benchmarks/training_step.py",),
    "agreement": ("benchmarks/training_step.py", "--agreement"),
    "training_loop": ("benchmarks/training_loop.py", "--only", "loop"),
    "training_loop_validation": ("benchmarks/training_loop.py", "--only", "validation"),
    "training_loop_checkpoints": ("benchmarks/training_loop.py", "--only", "checkpoints"),
    "training_loop_metrics": ("benchmarks/training_loop.py", "--only", "metrics"),
    "accuracy": ("benchmarks/network.py", "--accuracy"),
    "profile": ("benchmarks/network.py", "--profile"),
    "formula": ("benchmarks/network.py", "--formula"),
    "curve": ("benchmarks/network.py", "--curve"),
    "configurations": ("benchmarks/network.py", "--all"),
    "dynamic_dwconv": ("benchmarks/dynamic_dwconv.py",),
    "host_cost": ("benchmarks/host_cost.py",),
    "data": ("benchmarks/data.py",),
    "limits": ("benchmarks/limits.py",),
}
TESTS = "tests"  # of `make gpu`; those of the CPU are `make test`
GATE = ("test_golden", "test_ops")  # the tests without which no figure means anything
LIMITS = "limits"  # measured within each of the others, too
DATA = "data"
CPU_ONLY = (DATA, "agreement", "formula", "host_cost")  # these have nothing to do on a GPU
# Measured beside BasicSR, and only where that is installed.
BESIDE_BASICSR = tuple(name for name in SECTIONS if name.startswith("training_loop"))
# Pipeline, data and command line take no part in a forward or a backward.
SOURCES = (
    *("dlgsanet_arch/*.py", "dlgsanet_arch/ops/*.py", "dlgsanet_arch/fused/*.py"),
    *("dlgsanet_arch/cpu/*.py", "dlgsanet_arch/cpu/*.[ch]", "benchmarks/*.py"),
)
SOURCES_OF = {
    **dict.fromkeys(
        BESIDE_BASICSR,
        (*SOURCES, *(f"dlgsanet_arch/{folder}/*.py" for folder in ("pipeline", "data", "options"))),
    ),
    TESTS: (*SOURCES, "tests/*.py"),
    DATA: ("dlgsanet_arch/data/*.py", "benchmarks/data.py", "benchmarks/measuring.py"),
}


def shared_folder() -> Path:
    """Return the folder of golden files and images, whether it exists or not.

    It is named by DLGSANET_SHARED, or `shared` in the checkout (git-ignored, to be carried to a
    machine with a GPU), or `shared` beside the checkout.
    """
    own = ROOT / "shared"
    return Path(os.environ.get("DLGSANET_SHARED", own if own.is_dir() else ROOT.parent / "shared"))


def gate_fault(device: str, results: Path) -> str | None:
    """Return what is wrong with the stored outcome of the GPU tests of `GATE`.

    Empty if they passed; None if this code has no outcome on this GPU yet.
    """
    stored = read(results / f"{TESTS}_{label(device)}.json")
    if not is_current(stored, device):
        return None
    passed, failed = stored["raw"]["passed"], stored["raw"]["failed"]
    faults = [f"{name} failed" for name in failed if any(gate in name for gate in GATE)]
    missing = [gate for gate in GATE if not any(gate in name for name in passed)]
    return "\n".join(faults + [f"no test of {gate} passed" for gate in missing])


def source(section: str) -> str:
    """Return a hash of the code that a section's results depend on.

    A commit of results, of documentation or of tests leaves it as it is.
    """
    digest = hashlib.sha256()
    patterns = SOURCES_OF.get(section, SOURCES)
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        finished = subprocess.run(
            ["git", *arguments], cwd=BENCHMARKS, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return finished.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    own = ("benchmarks/results/", "benchmarks/RESULTS.md")
    changes = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    changed = any(not line.split()[-1].startswith(own) for line in changes)
    return f"{commit} and uncommitted changes" if changed else commit


def _versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed, by the name they start with."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        for package in packages:
            if re.fullmatch(rf"{package}(-cuda\d+x)?", name):
                found[package] = distribution.version
    return found


def device_name(device: str) -> str:
    """Return what `device` is, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def label(device: str) -> str:
    """Return the short name of `device` that results are filed under: cpu, h200, ..."""
    if device == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
    return "_".join(word for word in words if word not in ("nvidia", "geforce"))


def environment(device: str, section: str) -> dict[str, Any]:
    """Describe what a section is measured on: device, libraries, and the code."""
    described = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        described |= {"CUDA": torch.version.cuda, **_versions("triton", "cupy")}
    else:
        described["CPU kernels"] = library.variant() if library.load() else "none"
        described["PyTorch's CPU capability"] = torch.backends.cpu.get_cpu_capability()
    return {**described, "commit": _commit(), "source": source(section)}


def write_text(path: Path, text: str) -> None:
    """Write a file at once: a reader or an interruption never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read one result; one that is absent is empty."""
    return json.loads(path.read_text()) if path.exists() else {}


def is_current(result: dict[str, Any], device: str) -> bool:
    """Return whether a result is complete, and of this code on this device."""
    if not result.get("complete"):
        return False
    known = result["environment"]
    same = known["source"] == source(result["section"])
    return same and known["device"] == device_name(device)


def save(name: str, result: dict[str, Any], results: Path = RESULTS) -> Path:
    """Write results/<name>.json and rewrite RESULTS.md beside the folder.

    `result` has `section` (a key of SECTIONS), `kind` (cpu or cuda), `title`, `command`,
    `environment`, `complete`, `notes` (sentences), `columns` (names), `rows` (lists of values,
    shown as they are) and maybe `picture` (a plot beside the JSON).
    """
    path = results / f"{name}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    rewrite(results)
    return path


def rewrite(results: Path = RESULTS) -> None:
    """Write RESULTS.md from all JSON in `results`."""
    found = [read(path) for path in sorted(results.glob("*.json"))]
    order = list(SECTIONS)
    shown = [result for result in found if result.get("section") in order]
    shown.sort(key=lambda result: (order.index(result["section"]), result["kind"] != "cpu"))
    head = "# Measurements\n\nWritten by the commands named below from `results/*.json`.\n"
    text = "\n".join([head, *map(_shown, shown), *_unmeasured(shown)])
    write_text(results.parent / "RESULTS.md", text)


def arguments(section: str, device: str) -> list[str]:
    """Return the arguments of Python, at the repository's root, that measure a section."""
    return [*SECTIONS[section], *([] if section == TESTS else ["--device", device])]


def command(section: str, device: str, options: Iterable[str] = ()) -> str:
    """Return the command, as typed at the repository's root, that measures a section."""
    return " ".join(["python", *arguments(section, device), *options])


def head(section: str, device: str, title: str, options: Iterable[str] = ()) -> dict[str, Any]:
    """Return how a result of `save` begins."""
    return {
        "section": section,
        "kind": device,
        "title": f"{title}, {'GPU' if device == 'cuda' else 'CPU'}",
        "command": command(section, device, options),
        "environment": environment(device, section),
    }


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    columns = list(columns)
    return [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def _shown(result: dict[str, Any]) -> str:
    described = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    notes = list(result["notes"])
    if not result["complete"]:
        notes.append("**Incomplete: the run was cut off; the same command continues it.**")
    picture = result.get("picture")
    return "\n".join(
        [
            f"## {result['title']}",
            "",
            f"`{result['command']}` on {described}.",
            *notes,
            "",
            *table(result["columns"], result["rows"]),
            *(["", f"![{result['title']}](results/{picture})"] if picture else []),
            "",
        ]
    )


def _unmeasured(shown: list[dict[str, Any]]) -> list[str]:
    """List the sections that have no result on a CPU, and on any GPU."""
    measured = {(result["section"], result["kind"]) for result in shown if result["complete"]}
    missing = [
        (section, kind)
        for kind in ("cpu", "cuda")
        for section in SECTIONS
        if section != LIMITS
        and section not in ((TESTS,) if kind == "cpu" else CPU_ONLY)
        and (section, kind) not in measured
    ]
    if not missing:
        return []
    return [
        "## Not measured yet\n\n"
        "No figure for these is known or estimated. `make gpu` measures all that needs a GPU.\n",
        *table(
            ("section", "device", "command"),
            (
                (section, "GPU" if kind == "cuda" else "CPU", f"`{command(section, kind)}`")
                for section, kind in missing
            ),
        ),
        "",
    ]


if __name__ == "__main__":
    rewrite()
