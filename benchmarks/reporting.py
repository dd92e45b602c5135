"""Where measurements go: one JSON a benchmark and device, and RESULTS.md written from them all."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).resolve().parent


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    ).stdout.strip()


def environment(device: str) -> dict[str, Any]:
    """Describe what was measured on: device, libraries, and the code's commit."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--untracked-files=no"):
        commit += " and uncommitted changes"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write results/<name>.json and rewrite RESULTS.md.

    `result` has `title`, `command`, `environment`, `notes` (sentences), `columns` (names) and
    `rows` (lists of values, shown as they are).
    """
    path = BENCHMARKS / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    sections = [
        _section(json.loads(file.read_text())) for file in sorted(path.parent.glob("*.json"))
    ]
    head = "# Measurements\n\nWritten by the commands named below from `results/*.json`.\n"
    (BENCHMARKS / "RESULTS.md").write_text("\n".join([head, *sections]))
    return path


def _section(result: dict[str, Any]) -> str:
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    lines = [
        f"## {result['title']}",
        "",
        f"`{result['command']}` on {environment}.",
        *result["notes"],
        "",
        f"| {' | '.join(result['columns'])} |",
        f"| {' | '.join('---' for _ in result['columns'])} |",
        *(f"| {' | '.join(map(str, row))} |" for row in result["rows"]),
        "",
    ]
    return "\n".join(lines)
