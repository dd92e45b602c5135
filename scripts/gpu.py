"""What `make gpu` does: the GPU's tests, then every benchmark without a result for this very code.

Pieces run in order of their worth, each in a process of its own with a time limit, and a call ends
within --minutes; called again, it continues where it was. Results are written as they come, to
benchmarks/results/ and, where the variable OUT names a folder, as copies to that.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reporting  # noqa: E402, since the line above is what finds it

DEVICE = "cuda"
MINUTES = 8.5
# Less is not worth starting a piece for: importing PyTorch and warming up take most of it.
LEAST_SECONDS = 25.0
LIMITS_SECONDS = {reporting.TESTS: 300.0}
LIMIT_SECONDS = 240.0  # of every other piece
_STOP_SECONDS = 10.0  # between asking a piece to end and ending it


@dataclass
class Outcome:
    """How a piece ended.

    Attributes:
        status: Its exit status; None where it was stopped at its limit.
        seconds: How long it took.
    """

    status: int | None
    seconds: float


def path_of(section: str, results: Path) -> Path:
    """Return where a section's result lies."""
    return results / f"{section}_{reporting.label(DEVICE)}.json"


def left_out() -> tuple[str, ...]:
    """Return the sections that need BasicSR where it is not installed."""
    return () if find_spec("basicsr") else reporting.BESIDE_BASICSR


def pieces() -> list[str]:
    """Return the sections, the most valuable first."""
    apart = (reporting.LIMITS, *reporting.CPU_ONLY, *left_out())
    return [section for section in reporting.SECTIONS if section not in apart]


def is_done(section: str, results: Path) -> bool:
    """Return whether a section has a whole result of this code on this GPU."""
    return reporting.is_current(reporting.read(path_of(section, results)), DEVICE)


def execute(arguments: Sequence[str], seconds: float) -> Outcome:
    """Run this Python at the repository's root, its children ended with it at the limit."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    status = None
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if status is None:
            _end_group(process)
    return Outcome(status, time.monotonic() - start)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session of its own, and all that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def read_tests(report: Path) -> tuple[dict[str, int], list[str]]:
    """Return how many tests passed, failed and were skipped, and which failed, from JUnit's XML."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts, failed


def run_tests(arguments: Sequence[str], seconds: float, results: Path) -> Outcome:
    """Run the GPU's tests and save their outcome, where they came to an end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        outcome = execute([*arguments, "-q", f"--junitxml={report}"], seconds)
        if not report.exists() or outcome.status is None:
            return outcome
        counts, failed = read_tests(report)
    if not sum(counts.values()):
        return Outcome(outcome.status or 1, outcome.seconds)
    result = {
        "section": reporting.TESTS,
        "kind": DEVICE,
        "title": "Tests, GPU",
        "command": reporting.command(reporting.TESTS, DEVICE),
        "environment": reporting.environment(DEVICE, reporting.TESTS),
        "complete": True,
        "notes": [f"Failed: {', '.join(f'`{name}`' for name in failed)}."] if failed else [],
        "columns": list(counts),
        "rows": [[str(count) for count in counts.values()]],
        "raw": {**counts, "failed": failed, "seconds": outcome.seconds},
    }
    reporting.save(path_of(reporting.TESTS, results).stem, result, results)
    return outcome


def run_piece(section: str, seconds: float, results: Path) -> Outcome:
    """Run one piece for at most `seconds`."""
    arguments = reporting.arguments(section, DEVICE)
    if section == reporting.TESTS:
        return run_tests(arguments, seconds, results)
    return execute([*arguments, "--results", str(results)], seconds)


def copy_results(section: str, results: Path) -> None:
    """Copy a piece's files to the folder that OUT names."""
    target = os.environ.get("OUT")
    if not target:
        return
    Path(target).mkdir(parents=True, exist_ok=True)
    for path in results.glob(f"{path_of(section, results).stem}.*"):
        shutil.copy2(path, target)


def failed_tests(results: Path) -> list[str]:
    """Return the tests that failed on this code."""
    stored = reporting.read(path_of(reporting.TESTS, results))
    return stored["raw"]["failed"] if reporting.is_current(stored, DEVICE) else []


def main(arguments: list[str] | None = None) -> int:
    """Run what is left to do, as far as time allows.

    Returns:
        1 where a test failed or a piece broke, else 0, though something may be left to do.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for this call")
    parser.add_argument("--results", type=Path, default=reporting.RESULTS, help="folder of results")
    parser.add_argument("--list", action="store_true", help="say what is left, and run nothing")
    asked = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * asked.minutes
    broken = []
    for section in pieces():
        if asked.list or is_done(section, asked.results):
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            break
        seconds = min(left, LIMITS_SECONDS.get(section, LIMIT_SECONDS))
        print(f"== {section}, at most {seconds:.0f} s", flush=True)
        outcome = run_piece(section, seconds, asked.results)
        copy_results(section, asked.results)
        if outcome.status is None:
            print(f"   stopped after {outcome.seconds:.0f} s; the next call continues", flush=True)
        else:
            print(f"   took {outcome.seconds:.0f} s, exit status {outcome.status}", flush=True)
            if outcome.status:
                broken.append(section)

    failed = failed_tests(asked.results)
    for name in failed:
        print(f"failed: {name}")
    waiting = [section for section in pieces() if not is_done(section, asked.results)]
    if left_out():
        print(f"left out, since BasicSR is not installed: {', '.join(left_out())}")
    if broken:
        print(f"broken: {', '.join(broken)}")
    if waiting:
        print(f"left to do, by `make gpu` again: {', '.join(waiting)}")
    else:
        print("nothing is left to do: commit benchmarks/")
    return int(bool(failed or broken))


if __name__ == "__main__":
    sys.exit(main())
