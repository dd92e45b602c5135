"""The benchmarks: contestants compute the same, every script measures and writes its table."""

import argparse
import json
from pathlib import Path

import contestants
import data
import dynamic_dwconv
import host_cost
import limits
import measuring
import network
import published_kernels
import pytest
import reporting
import torch
import training_loop
import training_step
from dispatch import Operators
from helpers import write_pairs

from dlgsanet_arch import cpu
from dlgsanet_arch import network as our_network
from dlgsanet_arch.cpu import library
from dlgsanet_arch.ops import c_backend
from dlgsanet_arch.ops.reference import dynamic_dwconv_reference

ROOT = Path(__file__).resolve().parent.parent
SCALE = 2


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def written(results, section, label="cpu"):
    return json.loads((results / f"{section}_{label}.json").read_text())


def take_turns(section, results, launch=measuring.in_this_process, device="cpu", repeats=1):
    """Measure a section; returns its report."""
    report = measuring.Report(section, device, results)
    measuring.take_turns(report, measuring.Setting(device, repeats), launch)
    return report


def must_not_run(*_):
    raise AssertionError("a plainer form uses what it is compared with")


def published_by_reference(net):
    return contestants.as_published(net, dynamic_dwconv_reference)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", [contestants.as_definition, published_by_reference])
def test_plainer_forms_compute_the_same(form, training, monkeypatch):
    net, plain = (contestants.build("ours", contestants.QUICK, SCALE).double() for _ in range(2))
    plain.load_state_dict(net.state_dict(), strict=True)
    plain = form(plain)
    x = torch.rand(2, 3, 13, 21, dtype=torch.float64)  # several windows of 8, unevenly apart
    out = net.train(training)(x)
    monkeypatch.setattr(our_network, "projected_dwconv", must_not_run)
    plain.train(training)
    torch.testing.assert_close(plain(x), out)
    with torch.no_grad():  # where ours may work otherwise
        torch.testing.assert_close(plain(x), out)
    plain(x).abs().mean().backward()
    out.abs().mean().backward()
    for ours, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(other.grad, ours.grad)


@pytest.mark.parametrize(
    ("contestant", "names"),
    [
        (contestants.DEFINITION, set()),
        (contestants.PYTORCH, {"projected_dwconv", "projected_dwconv_backward"}),
        (contestants.PYTORCH_MAP, {"dynamic_dwconv", "dynamic_dwconv_backward"}),
    ],
)
def test_plainer_contestants_use_none_of_the_c_library(contestant, names, monkeypatch):
    net = contestants.build(contestant, contestants.QUICK, SCALE)
    x = torch.rand(2, 3, 9, 11)
    expected = contestants.build("ours", contestants.QUICK, SCALE)(x)
    monkeypatch.setattr(c_backend, "run", must_not_run)
    monkeypatch.setattr(cpu, "run", must_not_run)
    with Operators() as seen, contestants.operators(contestant):
        out = net(x)
        out.mean().backward()
        with torch.no_grad():
            net.eval()(x)
    assert seen.ours == {f"dlgsanet::{name}" for name in names}
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_operations_do_not_depend_on_how_they_are_computed():
    size = (1, 180, 320)
    frozen = 69_337_036_800  # of the formula, as the paper's table has it
    assert contestants.operations("ours", "tiny", 4, size) == frozen
    assert contestants.operations("definition", "tiny", 4, size, training=True) == 3 * frozen
    assert contestants.blocks("large", 3) == 24


@pytest.mark.parametrize(
    ("main", "arguments", "section", "rows"),
    [
        (limits.main, [], "limits", 3),
        (dynamic_dwconv.main, [], "dynamic_dwconv", 4),
        (training_step.main, [], "training_step", 6),
        (training_step.main, ["--agreement"], "agreement", 2),
        (network.main, [], "network", 5),
        (network.main, ["--all"], "configurations", 3),
        (network.main, ["--curve"], "curve", 2),
        (network.main, ["--formula"], "formula", 6),
        (network.main, ["--profile"], "profile", network.PROFILED_OPERATORS),
        (network.main, ["--accuracy"], "accuracy", 2),
        (host_cost.main, [], "host_cost", 2),
        (data.main, [], "data", 16),
        (training_loop.main, ["--only", "loop"], "training_loop", 4),
        (training_loop.main, ["--only", "validation"], "training_loop_validation", 4),
        (training_loop.main, ["--only", "checkpoints"], "training_loop_checkpoints", 2),
        (training_loop.main, ["--only", "metrics"], "training_loop_metrics", 6),
    ],
)
def test_scripts_measure_and_write_their_table(main, arguments, section, rows, results):
    assert main(["--quick", "--results", str(results), *arguments]) == 0
    result = written(results, section)
    assert result["complete"]
    assert len(result["rows"]) == rows
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    assert not any("error" in record for record in result["raw"].values())
    assert "nan" not in json.dumps([result["rows"], result["notes"]])
    assert result["environment"]["source"] == reporting.source(section)
    report = (results.parent / "RESULTS.md").read_text()
    assert f"`{reporting.command(section, 'cpu')}`" in report
    unmeasured = report.split("## Not measured yet")[1]
    assert "`python benchmarks/network.py --curve --device cuda`" in unmeasured
    assert reporting.command(section, "cpu") not in unmeasured


def test_unrounded_psnr():
    from basicsr.metrics import calculate_psnr

    a, b = torch.rand(2, 3, 20, 30)
    a, b = ((255 * each).round() / 255 for each in (a, b))
    images = ((255 * each.flip(0)).permute(1, 2, 0).numpy().astype("uint8") for each in (a, b))
    expected = calculate_psnr(*images, crop_border=4, test_y_channel=True)
    assert network.psnr(a, b, 4) == pytest.approx(expected, abs=1e-3)


def test_accuracy_with_weights_and_images(results, tmp_path, monkeypatch):
    weights = tmp_path / "trained.pth"
    net = contestants.build("ours", contestants.QUICK, 4)
    torch.save({"params": net.state_dict()}, weights)
    folder = tmp_path / "shared" / "data" / "Set14" / "HR"
    write_pairs(folder.parent, 2, (102, 118))
    monkeypatch.setenv("DLGSANET_SHARED", str(tmp_path / "shared"))
    monkeypatch.setenv(network.WEIGHTS, "")  # and undone at the end
    section = network.accuracy_section(
        argparse.Namespace(device="cpu", quick=False, weights=weights)
    )
    take_turns(section, results)
    result = written(results, "accuracy")
    full, half = result["rows"]
    assert full[4:6] == ["+0.0000", "+0.0000"]
    assert float(half[1]) > float(full[1])
    assert float(half[6]) > 40
    assert result["command"].endswith("--accuracy --device cpu --weights trained.pth")
    assert str(tmp_path) not in json.dumps(result)


SQUARE = {"measure": "limits:product", "dtype": "fp32", "side": 8}


def section_of(cells, **changes):
    return measuring.Section(
        name="limits",
        title="Made",
        cells=cells,
        columns="what",
        rows=lambda record, _: [[measuring.describe(record["cell"])]],
        notes=lambda records: [],
        **changes,
    )


def test_cells_run_in_processes_and_a_broken_one_is_named(results):
    broken = {**SQUARE, "dtype": "fp1"}
    section = section_of([broken, SQUARE], group=lambda cell: "one", rounds=1)
    report = take_turns(section, results, measuring.in_child, repeats=2)
    first, second = report.ordered()
    assert "KeyError" in first["error"]
    assert measuring.milliseconds(first)[0] == first["error"]
    assert len(second["seconds"]) == 5
    assert second["memory"] < second["total_memory"]
    assert report.complete()


def test_a_run_that_was_cut_off_continues(results):
    cells = [{**SQUARE, "side": side} for side in (1, 2, 3)]
    asked = []

    def launch(cells, setting):
        for cell in cells:
            if len(asked) == 4:
                raise KeyboardInterrupt
            asked.append(cell["side"])
            yield {"seconds": [1.0 * len(asked)], "memory": len(asked)}

    section = section_of(cells)
    with pytest.raises(KeyboardInterrupt):
        take_turns(section, results, launch)
    assert asked == [1, 2, 3, 1]  # all in a round, then all again
    assert "Incomplete" in (results.parent / "RESULTS.md").read_text()

    asked.clear()
    report = take_turns(section, results, launch)
    assert asked == [2, 3]
    assert [len(record["seconds"]) for record in report.ordered()] == [2, 2, 2]
    assert written(results, "limits")["complete"]
    assert measuring.Report(section, "cpu", results).records == {}  # asked anew: all anew


def test_a_process_that_dies_costs_one_cell(results):
    cells = [{**SQUARE, "side": side} for side in (1, 2)]

    def launch(cells, setting):
        if cells[0]["side"] != 1:
            yield {"seconds": [1.0]}

    report = take_turns(section_of(cells, rounds=1), results, launch)
    assert [record.get("error") for record in report.ordered()] == ["its process died", None]


def test_red_tests_stop_a_script(results, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "gate_fault", lambda *_: "test_ops is red")
    assert limits.main(["--results", str(results)]) == 1
    assert "test_ops is red" in capsys.readouterr().err
    assert not results.exists()


@pytest.fixture
def made_gpu(monkeypatch):
    """A GPU as far as names and memory figures go; what is computed is computed here."""
    for name, value in {
        "get_device_name": "NVIDIA H0 80GB",
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 2 * measuring.MIB,
        "max_memory_allocated": 5 * measuring.MIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(published_kernels, "why_not", lambda device: "")


def laps_of(cell):
    """Made laps of what is measured beside BasicSR, ours twice as fast; nothing of other cells."""
    names = {
        "training_loop:loops": cell.get("contestants"),
        "training_loop:validation": ["BasicSR", "ours, 2 workers"],
        "training_loop:checkpoints": ["BasicSR", "ours"],
        "training_loop:metric_times": [
            f"{metric}, {by}" for metric in training_loop.METRICS for by in ("BasicSR", "ours")
        ],
    }.get(cell["measure"])
    if names is None:
        return {}
    laps = {}
    for name in names:
        seconds = 0.02 if "BasicSR" in name else 0.01
        lap = {"seconds": seconds, "cpu": seconds}
        if cell["measure"] == "training_loop:loops":
            lap = {clock: [seconds] for clock in ("steady", "cpu", "own")}
            lap |= {"whole": 3 * seconds, "start": 1.0}
        laps[name] = [lap, lap]
    apart = {"psnr": 1e-9, "ssim": 1e-9}
    return {"laps": laps, "load": 1.0, "apart": apart, "sizes": dict.fromkeys(names, 1e6)}


@pytest.mark.parametrize(
    ("module", "arguments", "names"),
    [
        (network, [], ["network", "configurations"]),
        (network, ["--only-tiny"], ["network"]),
        (network, ["--all"], ["configurations"]),
        (network, ["--curve"], ["curve"]),
        (network, ["--accuracy"], ["accuracy"]),
        (dynamic_dwconv, [], ["dynamic_dwconv"]),
        (training_step, [], ["training_step"]),
        (limits, [], ["limits"]),
        (training_loop, [], list(reporting.BESIDE_BASICSR)),
    ],
)
def test_what_a_gpu_would_measure(module, arguments, names, made_gpu, results, monkeypatch):
    def launch(cells, setting):
        assert len({section.group(cell) for cell in cells}) == 1
        for cell in cells:
            reply = {"seconds": [0.001, 0.003], "memory": measuring.MIB, "work": 1, "bytes": 1}
            if cell["measure"] == "network:accuracy":
                figures = {"fp32": 30.0, "this": 30.1, "between": 60.0}
                reply = {"relative": 1e-7, "worst": 1e-6, "images": [figures]}
            reply |= laps_of(cell)
            yield reply | {"parameters": 1, "operations": 1, "total_memory": 2 * measuring.MIB}

    made = []
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "run", lambda *given: made.extend(given) or 0)
        module.main(arguments)
    sections, parser, _ = made
    measuring.add_arguments(parser)
    asked = parser.parse_args([*arguments, "--device", "cuda"])
    planned = sections(asked)
    assert [section.name for section in planned] == names
    for section in planned:
        keys = [measuring.key(cell) for cell in section.cells]
        assert len(set(keys)) == len(keys)
        json.dumps(section.cells)
        report = measuring.Report(section, "cuda", results)
        section.rounds = 1
        section.draw = None
        report.save = lambda: None
        measuring.take_turns(report, measuring.Setting("cuda", 1), launch)
        del report.save
        report.save()
        result = written(results, section.name, "h0_80gb")
        assert result["complete"]
        assert all(len(row) == len(result["columns"]) for row in result["rows"])
        assert reporting.is_current(result, "cuda")
        if section.name in ("network", "configurations", "training_step", "dynamic_dwconv"):
            text = json.dumps(result["rows"])
            assert all(name in text for name in ("published-style", "bf16", "tf32"))
    report = (results.parent / "RESULTS.md").read_text()
    assert "nan" not in report


def test_training_steps_on_a_cpu(results):
    asked = argparse.Namespace(device="cpu", quick=False)
    section = training_step.step_section(asked)
    frozen = 3 * 69_337_036_800 * 16 * 48**2 // (180 * 320)

    def launch(cells, setting):
        fixed = {"memory": 0, "work": 8e12, "bytes": 1, "operations": frozen}
        for cell in cells:
            yield {"seconds": [4.0 if cell["threads"] == 1 else 2.0], **fixed}

    take_turns(section, results, launch)
    result = written(results, "training_step")
    names = [f"Tiny x4, {name}" for name in ("ours", contestants.PYTORCH, contestants.PYTORCH_MAP)]
    names += ["Tiny x4, definition", "SwinIR-light x4", "EDSR-baseline x4"]
    assert [row[0] for row in result["rows"]] == [name for name in names for _ in range(2)]
    assert [row[3] for row in result["rows"]] == ["2", "1"] * 6
    # Steps and products take twice as long with one thread.
    tiny = [row[8] for row in result["rows"] if row[0].startswith("Tiny")]
    assert set(tiny) == {f"{8e12 / frozen:.2f}"}
    assert f"with 2: {'; '.join(f'{name} 2.00' for name in names)}." in " ".join(result["notes"])


def test_trainings_that_end_apart_are_an_error(monkeypatch, results):
    figures = {"ours": [30.0, 31.0], contestants.PYTORCH: [30.0, 30.9]}
    monkeypatch.setattr(training_step, "TOLERANCE", -1.0)
    assert training_step.main(["--quick", "--results", str(results), "--agreement"]) == 1
    assert "do not agree" in (results.parent / "RESULTS.md").read_text()
    found = {name: {"took": 1.0, "loss": 0.1, "psnr": psnr} for name, psnr in figures.items()}
    rows = training_step._agreement_rows({"found": found}, [])
    assert rows[0] == ["ours", "1", "0.10000", "30.500", "+0.0500", "+0.1000"]


def test_results_depend_on_the_sources_in_c_and_the_fused_layers():
    read = {path for pattern in reporting.SOURCES for path in ROOT.glob(pattern)}
    assert {ROOT / "dlgsanet_arch" / "cpu" / name for name in library.SOURCES} <= read
    assert ROOT / "dlgsanet_arch" / "fused" / "c_layers.py" in read


def test_the_pace_leaves_the_pause_out():
    stamps = [0.0]
    for iteration in range(1, 16):  # five blocks of three; the validation follows the ninth
        stamps.append(stamps[-1] + (7.0 if iteration <= 3 else 21.0 if iteration == 10 else 1.0))
    assert training_loop.pace(stamps, 3) == {
        "steady": [1.0, 1.0, 1.0, 1.0],
        "whole": pytest.approx((11 + 21) / 12),
    }


def test_what_a_loop_spends_itself(monkeypatch):
    from basicsr.models.sr_model import SRModel

    clock = [0.0]

    def work(seconds):
        clock[0] += seconds

    monkeypatch.setattr(training_loop.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(SRModel, "optimize_parameters", lambda self, current_iter: work(8.0))
    work(100.0)
    with training_loop._stamps("SRModel", 1, "cpu") as stamps:
        for iteration in (1, 2, 3):
            SRModel.optimize_parameters(None, iteration)
            work(0.5)
    assert [stamp["cpu"] for stamp in stamps] == [100.0, 108.0, 116.5, 125.0]
    assert [stamp["own"] for stamp in stamps] == [100.0, 100.0, 100.5, 101.0]


def test_contestants_take_turns_and_ratios_are_within_laps():
    order = []
    works = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert training_loop.in_turns(works, 2) == {"a": [1, 6], "b": [2, 4], "c": [3, 5]}
    assert order == ["a", "b", "c", "b", "c", "a"]
    assert training_loop.ratios([2, 8, 3], [1, 2, 3]) == (2, 1, 4)


def test_figures_that_differ_are_no_result():
    theirs = {"psnr": 30.0, "ssim": 0.9}
    apart = training_loop.check_agreement(theirs, {"psnr": 30.00009, "ssim": 0.9})
    assert apart == {"psnr": pytest.approx(9e-5), "ssim": 0.0}
    for ours in ({"psnr": 30.0002, "ssim": 0.9}, {"psnr": 30.0, "ssim": 0.900002}):
        with pytest.raises(ValueError, match="BasicSR's is"):
            training_loop.check_agreement(theirs, ours)
    with pytest.raises(ValueError, match="psnr is nan"):
        training_loop.check_agreement(theirs, {"psnr": float("nan"), "ssim": 0.9})
