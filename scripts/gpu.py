"""Run the GPU tests, then every benchmark without a result of this code; called by `make gpu`.

Each piece runs in its own process with a time limit, the most valuable first, and a call ends
within --minutes; the next call continues. No benchmark runs unless the tests of network and
operators passed. Results are saved as they come, to benchmarks/results/ and, if the variable OUT
names a folder, copied there. Neither BasicSR nor lmdb is needed; pieces that measure BasicSR are
left out without it. Golden files are read from the folder of `reporting.shared_folder`.
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
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import reporting  # noqa: E402, since the line above is what finds it
import torch  # noqa: E402

DEVICE = "cuda"
MINUTES = 8.5
# Less is not worth starting a piece for: importing PyTorch and warming up take most of it.
LEAST_SECONDS = 25.0
# What a piece is expected to take, and when it is stopped. Expected, not measured.
SECONDS = {
    reporting.TESTS: (100.0, 140.0),
    "network": (75.0, 120.0),
    "training_step": (75.0, 120.0),
    "training_loop": (120.0, 240.0),
    "configurations": (150.0, 240.0),
}
OTHER_SECONDS = (60.0, 150.0)
TEST_PROCESSES = 10
_STOP_SECONDS = 10.0  # between asking a piece to end and ending it


class Outcome(NamedTuple):
    """How a piece ended: its exit status, None if it was stopped at its limit, and its seconds."""

    status: int | None
    seconds: float


def path_of(section: str, results: Path) -> Path:
    """Return the path of a section's result."""
    return results / f"{section}_{reporting.label(DEVICE)}.json"


def left_out() -> tuple[str, ...]:
    """Return the sections that need BasicSR if it is not installed."""
    return () if find_spec("basicsr") else reporting.BESIDE_BASICSR


def pieces() -> list[str]:
    """Return the sections, the most valuable first."""
    apart = (reporting.LIMITS, *reporting.CPU_ONLY, *left_out())
    return [section for section in reporting.SECTIONS if section not in apart]


def is_done(section: str, results: Path) -> bool:
    """Return whether a section has a complete result of this code on this GPU."""
    return reporting.is_current(reporting.read(path_of(section, results)), DEVICE)


def execute(arguments: Sequence[str], seconds: float) -> Outcome:
    """Run this Python at the repository's root, its children ended with it at the limit."""
    start, status = time.monotonic(), None
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=seconds)
    finally:
        if status is None:
            for how in (signal.SIGTERM, signal.SIGKILL):  # its children, too, where it ended
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, how)
                    process.wait(timeout=_STOP_SECONDS)
            process.wait()
    return Outcome(status, time.monotonic() - start)


def read_tests(report: Path) -> dict[str, list[str]]:
    """Return the names of the tests that passed, failed and were skipped, from JUnit's XML.

    ValueError if a file could not be collected, which pytest-xdist reports like a failed test.
    """
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if any(child.get("message") == "collection failure" for child in case):
            raise ValueError(f"{case.get('name')} could not be collected")
        failed = kinds & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        names[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    return names


def run_tests(seconds: float, results: Path) -> Outcome:
    """Run the GPU tests and save their outcome, unless pytest could not collect or run them all."""
    arguments = [*reporting.arguments(reporting.TESTS, DEVICE), "-q"]
    if find_spec("xdist"):
        arguments += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        outcome = execute([*arguments, f"--junitxml={report}"], seconds)
        # pytest's statuses: 0 passed, 1 failed; others are errors of collection, usage, or no test.
        if outcome.status not in (0, 1) or not report.exists():
            return outcome
        try:
            names = read_tests(report)
        except ValueError as error:
            print(f"   {error}", flush=True)
            return outcome
    counts = {kind: len(each) for kind, each in names.items()}
    failed = ", ".join(f"`{name}`" for name in names["failed"])
    result = {
        **reporting.head(reporting.TESTS, DEVICE, "Tests"),
        "complete": True,
        "notes": [f"Failed: {failed}."] if failed else [],
        "columns": list(counts),
        "rows": [[str(count) for count in counts.values()]],
        "raw": {**names, "seconds": outcome.seconds},
    }
    reporting.save(path_of(reporting.TESTS, results).stem, result, results)
    return outcome


def show_plan(sections: Sequence[str], seconds: float) -> None:
    """Print what a call would run, with the expected and the longest seconds of each piece."""
    for section in sections:
        expected, limit = SECONDS.get(section, OTHER_SECONDS)
        if seconds >= LEAST_SECONDS:
            when = f"at most {min(limit, seconds):4.0f} s"
            seconds -= expected
        else:
            when = "left to the next call"
        print(f"{section:<26} expected {expected:4.0f} s, {when}")
    print("expected times are estimates, not measured")


def run_pieces(sections: Sequence[str], seconds: float, results: Path) -> list[str]:
    """Run pieces as far as time allows, and return those that broke or were refused."""
    deadline = time.monotonic() + seconds
    broken = []
    for section in sections:
        if section != reporting.TESTS and reporting.gate_fault(DEVICE, results):
            print(f"{section} is not measured while tests of network or operators fail")
            broken.append(section)
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            break
        limit = min(left, SECONDS.get(section, OTHER_SECONDS)[1])
        print(f"== {section}, at most {limit:.0f} s", flush=True)
        if section == reporting.TESTS:
            outcome = run_tests(limit, results)
        else:
            command = [*reporting.arguments(section, DEVICE), "--results", str(results)]
            outcome = execute(command, limit)
        if target := os.environ.get("OUT"):
            Path(target).mkdir(parents=True, exist_ok=True)
            for path in results.glob(f"{path_of(section, results).stem}.*"):
                shutil.copy2(path, target)
        ended = f"took {outcome.seconds:.0f} s, exit status {outcome.status}"
        if outcome.status is None:
            ended = f"stopped after {outcome.seconds:.0f} s; the next call continues"
        print(f"   {ended}", flush=True)
        if outcome.status:
            broken.append(section)
        if section == reporting.TESTS and not is_done(section, results):
            print("the tests did not run to their end, so nothing else is started")
            return [section]
    return broken


def main(arguments: list[str] | None = None) -> int:
    """Run what is left to do, as far as time allows; 1 if a test failed or a piece broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for this call")
    parser.add_argument("--results", type=Path, default=reporting.RESULTS, help="folder of results")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="these pieces, in this order")
    parser.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    asked = parser.parse_args(arguments)
    unknown = set(asked.only or ()) - set(pieces())
    if unknown:
        parser.error(f"--only: no piece {', '.join(sorted(unknown))}; got {', '.join(pieces())}")
    wanted = asked.only or pieces()
    unknowable = asked.plan and not torch.cuda.is_available()
    waiting = [each for each in wanted if unknowable or not is_done(each, asked.results)]
    if asked.plan:
        show_plan(waiting, 60 * asked.minutes)
        return 0
    golden = reporting.shared_folder() / "golden"
    if not any(golden.glob("*.npz")):
        print(
            f"no golden files in {golden}: copy them to {reporting.ROOT / 'shared' / 'golden'}, "
            "or set DLGSANET_SHARED to the folder that contains 'golden'",
            file=sys.stderr,
        )
        return 1
    broken = run_pieces(waiting, 60 * asked.minutes, asked.results)

    stored = reporting.read(path_of(reporting.TESTS, asked.results))
    failed = stored["raw"]["failed"] if reporting.is_current(stored, DEVICE) else []
    for name in failed:
        print(f"failed: {name}")
    waiting = [section for section in wanted if not is_done(section, asked.results)]
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
