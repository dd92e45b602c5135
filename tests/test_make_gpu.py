"""What `make gpu` runs, in which order, and what it takes as a result: without a GPU."""

import importlib.util
from pathlib import Path

import measuring
import pytest
import reporting
import torch
from helpers import run

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts" / "gpu.py")
gpu_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_script)

GOLDEN, OPERATORS = "tests.test_golden::test_a", "tests.test_ops::test_b"


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A GPU by its name, and golden files."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H0 80GB")
    (tmp_path / "shared" / "golden").mkdir(parents=True)
    (tmp_path / "shared" / "golden" / "tiny.npz").touch()
    monkeypatch.setenv("DLGSANET_SHARED", str(tmp_path / "shared"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def store(section, results, complete=True, raw=None):
    result = {**reporting.head(section, "cuda", "Made"), "complete": complete, "raw": raw or {}}
    result |= {"notes": [], "columns": ["what"], "rows": [["1"]]}
    reporting.save(f"{section}_h0_80gb", result, results)


def store_tests(results, failed=(), passed=(GOLDEN, OPERATORS)):
    store("tests", results, raw={"passed": list(passed), "failed": list(failed), "skipped": []})


def test_all_files_with_gpu_tests_are_named():
    marked = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if any(line.startswith("@pytest.mark.gpu") for line in path.read_text().splitlines())
    }
    assert set(reporting.GPU_TESTS) == marked


def test_gpu_tests_and_benchmarks_import_neither_basicsr_nor_lmdb(tmp_path):
    script = tmp_path / "collect.py"
    script.write_text(
        "import sys\n"
        "sys.modules.update(basicsr=None, lmdb=None)\n"  # importing them fails
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]\n"
        "import network, training_step, dynamic_dwconv\n"
        "import pytest\n"
        "arguments = ['--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider']\n"
        f"sys.exit(pytest.main([*arguments, *{reporting.GPU_TESTS!r}]))\n"
    )
    finished = run([script], ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_order_of_pieces_and_their_time(monkeypatch):
    pieces = gpu_script.pieces()
    assert pieces[:4] == ["tests", "network", "training_step", "training_loop"]
    assert pieces[-1] == "dynamic_dwconv"
    assert gpu_script.SECONDS["tests"][1] <= 140
    assert sum(gpu_script.SECONDS[name][0] for name in pieces[:3]) <= 330
    monkeypatch.setattr(gpu_script, "find_spec", lambda name: None)
    assert gpu_script.pieces() == [p for p in pieces if p not in reporting.BESIDE_BASICSR]


def test_outcomes_of_tests_are_read(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_ops" name="test_a[1]"/>'
        '<testcase classname="tests.test_ops" name="test_b"><failure/></testcase>'
        '<testcase classname="tests.test_tlc" name="test_c"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert gpu_script.read_tests(report) == {
        "passed": ["tests.test_ops::test_a[1]"],
        "failed": ["tests.test_ops::test_b"],
        "skipped": ["tests.test_tlc::test_c"],
    }


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("import no_such_module\ndef test_a(): pass", None),
        ("", None),
        ("def test_a(): pass", {"passed": 1, "failed": 0}),
        ("def test_a(): pass\ndef test_b(): assert 0", {"passed": 1, "failed": 1}),
    ],
    ids=["not collected", "no test", "passed", "failed"],
)
def test_what_counts_as_an_outcome_of_the_tests(text, raw, results, tmp_path, monkeypatch):
    file = tmp_path / "test_made.py"
    file.write_text(text)
    arguments = ("-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file))
    monkeypatch.setitem(reporting.SECTIONS, "tests", arguments)
    if "no_such_module" in text:
        monkeypatch.setattr(gpu_script, "TEST_PROCESSES", 1)
    else:
        monkeypatch.setattr(gpu_script, "find_spec", lambda name: None)  # a faster start
    status = gpu_script.main(["--only", "tests", "--results", str(results)])
    assert status == (0 if raw and not raw["failed"] else 1)
    assert gpu_script.is_done("tests", results) == bool(raw)
    if raw:
        stored = reporting.read(gpu_script.path_of("tests", results))["raw"]
        assert {kind: len(stored[kind]) for kind in raw} == raw


@pytest.mark.parametrize(
    ("failed", "passed", "fault"),
    [
        ([], [GOLDEN, OPERATORS], ""),
        (["tests.test_network::test_x"], [GOLDEN, OPERATORS], ""),
        ([OPERATORS], [GOLDEN, OPERATORS], f"{OPERATORS} failed"),
        ([], [OPERATORS], "no test of test_golden passed"),
    ],
)
def test_the_gate_needs_tests_that_passed(failed, passed, fault, results):
    store_tests(results, failed, passed)
    assert measuring.gate_fault("cuda", results) == fault


@pytest.fixture
def executed(results, monkeypatch):
    """Arguments of what was executed; training steps are stopped at their limit."""
    calls = []

    def execute(arguments, seconds):
        calls.append(" ".join(arguments))
        for section, known in reporting.SECTIONS.items():
            if list(known) == list(arguments[: len(known)]) and section != "tests":
                store(section, results, complete=section != "training_step")
                return gpu_script.Outcome(None if section == "training_step" else 0, 1.0)
        return gpu_script.Outcome(2, 1.0)  # pytest could not collect the tests

    monkeypatch.setattr(gpu_script, "execute", execute)
    return calls


def test_pieces_are_continued(executed, results, capsys, tmp_path):
    store_tests(results)
    assert gpu_script.main(["--results", str(results)]) == 0
    pieces = gpu_script.pieces()[1:]
    assert len(executed) == len(pieces)
    assert executed[0] == f"benchmarks/network.py --only-tiny --device cuda --results {results}"
    assert "left to do, by `make gpu` again: training_step" in capsys.readouterr().out
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {f"{name}_h0_80gb.json" for name in pieces}

    executed.clear()
    assert gpu_script.main(["--results", str(results)]) == 0
    assert ["training_step" in each for each in executed] == [True]
    executed.clear()
    assert gpu_script.main(["--results", str(results), "--minutes", "0"]) == 0
    assert executed == []


def test_pieces_by_name(executed, results, capsys):
    store_tests(results)
    names = ["dynamic_dwconv", "network"]
    assert gpu_script.main(["--results", str(results), "--only", *names]) == 0
    assert [name in each for name, each in zip(names, executed, strict=True)] == [True, True]
    with pytest.raises(SystemExit):
        gpu_script.main(["--only", "formula"])
    assert "no piece formula" in capsys.readouterr().err


def test_nothing_is_measured_without_tests_that_passed(executed, results, capsys, monkeypatch):
    call = ["--results", str(results)]
    for _ in range(2):  # they could not be collected, and the next call tries again
        assert gpu_script.main(call) == 1
        assert "nothing else is started" in capsys.readouterr().out
    assert len(executed) == 2
    executed.clear()
    store_tests(results, failed=[OPERATORS])
    assert gpu_script.main(call) == 1
    out = capsys.readouterr().out
    assert f"failed: {OPERATORS}" in out
    assert "network is not measured" in out
    monkeypatch.setenv("DLGSANET_SHARED", str(results / "elsewhere"))
    assert gpu_script.main(call) == 1
    assert "no golden files in" in capsys.readouterr().err
    assert executed == []


def test_the_plan_runs_nothing(executed, results, capsys, monkeypatch):
    assert gpu_script.main(["--plan"]) == 0  # also without a GPU
    assert capsys.readouterr().out.startswith("tests                      expected  100 s, at most")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    store_tests(results)
    assert gpu_script.main(["--results", str(results), "--plan", "--minutes", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "network                    expected   75 s, at most  120 s"
    assert lines[1] == "training_step              expected   75 s, at most  105 s"
    assert lines[3].endswith("left to the next call")
    assert executed == []


def test_golden_files_may_lie_in_the_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv("DLGSANET_SHARED")
    monkeypatch.setattr(reporting, "ROOT", tmp_path / "checkout")
    assert reporting.shared_folder() == tmp_path / "shared"
    (tmp_path / "checkout" / "shared").mkdir(parents=True)
    assert reporting.shared_folder() == tmp_path / "checkout" / "shared"


def test_a_piece_is_ended_at_its_limit_with_its_children():
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', '{}'])"
    outcome = gpu_script.execute(["-c", sleeper.format("import time; time.sleep(60)")], 0.5)
    assert outcome.status is None
    assert outcome.seconds < 10
    assert gpu_script.execute(["-c", "raise SystemExit(3)"], 30).status == 3
