"""What networks cost: counts against hand-made and published ones, the table and the plot."""

import csv
import io
import json
import math

import pytest
import torch
from torch import nn

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.cli import main
from dlgsanet_arch.tools import complexity
from dlgsanet_arch.tools.published import PUBLISHED

TINY, LARGE = ("DLGSANet Tiny", 4), ("DLGSANet Large", 4)


def test_layers_whose_counts_are_known():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
        nn.GELU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Linear(12, 7),
    )
    found = complexity.count(net, 5, 6)
    pixels = 5 * 6
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.activations == pixels * (8 + 8 + 4 * 4) + 4 * 10 * 7
    linear = 4 * 10 * 12 * 7
    assert found.macs == pixels * (3 * 8 * 9 + 8 * 25 + 8 * 4 * 4) + linear


def test_activations_of_dlgsanet_are_those_of_its_layers():
    config = {"dim": 12, "groups": 1, "blocks": 1, "buildblock_type": "sparseedge"}
    net = DLGSANet(**config, window_size=3, upscale=2, upsampler="pixelshuffledirect")
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    channels = sum(layer.out_channels for layer in layers)
    channels += 12  # the convolution with the predicted filters, which has no weights
    assert complexity.count(net, 9, 10).activations == 9 * 10 * channels


@pytest.fixture
def counted(monkeypatch):
    """The sizes whose forwards are counted or measured."""
    sizes = []
    forward = DLGSANet.forward
    monkeypatch.setattr(
        DLGSANet, "forward", lambda self, x: sizes.append(tuple(x.shape[2:])) or forward(self, x)
    )
    return sizes


def test_counts_of_tiny_x4_are_those_of_the_formulas_in_one_forward(counted):
    record = complexity.evaluate(TINY)
    assert counted == [(180, 320)]
    assert (record["input_height"], record["input_width"]) == (180, 320)
    assert record["macs"] / 1e9 == pytest.approx(34.67, abs=0.005)
    assert record["published_gmacs"] == 32.0


@pytest.mark.parametrize("network", [each for each in PUBLISHED if "DLGSANet" in each[0]])
def test_the_networks_are_the_published_ones(network):
    record = complexity.evaluate(network, (48, 48))
    assert record["parameters"] == record["published_parameters"]


def test_other_networks_have_their_published_figures_alone(counted):
    record = complexity.evaluate(("EDSR-baseline", 4), device="cpu")
    published = (record["published_parameters"], record["published_gmacs"])
    assert (*published, record["published_psnr_Set5"]) == (1_518_000, 114.0, 32.09)
    assert {record[name] for name in ("parameters", "macs", "seconds")} == {None}
    assert not counted


def test_time_is_of_one_forward_after_a_small_one(counted):
    assert complexity.evaluate(TINY, (256, 320), device="cpu")["seconds"] > 0
    assert counted == [(64, 80), (48, 48), (64, 80)]  # counted, warmed up, measured


def test_time_and_memory_of_a_forward():
    net = nn.Conv2d(3, 64, 3, padding=1)
    seconds, memory = complexity.measure(net, 512, 512)
    assert 0 < seconds < 60
    output = 64 * 512 * 512 * 4
    assert memory is None or 0.9 * output < memory < 20 * output


def test_a_network_that_runs_out_of_memory_is_said(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(complexity, "measure", fail)
    record = complexity.evaluate(TINY, (64, 64), device="cpu")
    assert record["seconds"] is None
    assert "out of memory" in complexity.table([record], "Set5")


def test_the_table(capsys):
    assert main(["complexity", "--no-time", "--network", "tiny", "baseline", "--scale", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "DLGSANet Tiny x4\nEDSR-baseline x4\n"
    lines = captured.out.splitlines()
    assert len(lines) == 3
    tiny = lines[1].split("  ")
    for cell in ("DLGSANet Tiny x4", "581,298", "34.67", "32.0", "26.55"):
        assert any(cell == each.strip() for each in tiny), cell
    assert "EDSR-baseline x4" in lines[2]
    assert "114.0" in lines[2]


def test_json_and_csv_say_the_same(capsys):
    asked = ["complexity", "--network", "tiny", "--size", "64x96", "--runs", "1"]
    assert main([*asked, "--scale", "2", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["input_height"], record["input_width"]) == (32, 48)
    assert record["parameters"] == 565_710
    assert math.isfinite(record["seconds"])
    assert record["published_gmacs"] is None  # it is for another size
    assert record["published_psnr_Set5"] == 38.16
    assert main([*asked, "--scale", "2", "--csv", "--no-time"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["macs"] == str(record["macs"])
    assert row["seconds"] == ""


def test_the_plot(tmp_path, capsys):
    path = tmp_path / "plot.png"
    asked = ["--no-time", "--network", "tiny", "light", "--scale", "4", "--size", "128x128"]
    assert main(["complexity", *asked, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    records = [complexity.evaluate(("DLGSANet Tiny", scale), (48, 48)) for scale in (2, 4)]
    first, second = complexity.draw(records, "Set5").axes
    point = first.collections[0]
    assert point.get_offsets().tolist() == [[records[0]["macs"] / 1e9, 38.16]]
    assert second.collections[0].get_sizes() / point.get_sizes() == pytest.approx(581298 / 565710)


def test_the_plot_takes_a_table_of_reproduce(tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.json"
    cell = {"network": "DLGSANet Tiny", "scale": 4, "dataset": "Set14", "is_published": True}
    others = [{**cell, "dataset": "Set5"}, {**cell, "is_published": False, "psnr": 1.0}]
    cells = [{**cell, "psnr": 27.8}, {**cell, "scale": 2, "psnr": None}, *others]
    table.write_text(json.dumps({"cells": [{"psnr": 2.0, **each} for each in cells]}))
    drawn = []
    draw = complexity.draw
    monkeypatch.setattr(complexity, "draw", lambda *each: drawn.append(each) or draw(*each))
    asked = ["complexity", "--no-time", "--network", "tiny", "--scale", "4", "--size", "64x64"]
    asked += ["--dataset", "Set14", "--plot", str(tmp_path / "plot.png"), "--measured", str(table)]
    assert main(asked) == 0
    assert drawn[0][2] == {("DLGSANet Tiny", 4): 27.8}
    table.write_text("[]")
    assert main(asked) == 1
    assert "not a table.json" in capsys.readouterr().err


def test_the_plot_with_what_was_measured_and_other_networks():
    record, other = complexity.evaluate(TINY, (48, 48)), complexity.evaluate(("SwinIR-light", 4))
    (axes,) = complexity.draw([record, other], "Set5", {TINY: 31.5}).axes
    points = [each.get_offsets().tolist() for each in axes.collections]
    gmacs = record["macs"] / 1e9
    assert [each for each in points if each] == [[[gmacs, 32.46]], [[gmacs, 31.5]], [[49.6, 32.44]]]
    assert "rings: measured" in axes.get_ylabel()
    large = complexity.evaluate(LARGE, (48, 48))  # nothing is published
    (axes,) = complexity.draw([large], "Set5", {LARGE: 32.7}).axes
    assert axes.collections[0].get_offsets()[0, 1] == 32.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "tinny"], "no network's name contains this"),
        (["--plot", "a.jpg"], ".png, .pdf, .svg"),
        (["--network", "large", "--size", "64x64", "--plot", "a.png"], "nothing to draw"),
    ],
)
def test_the_verb_says_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["complexity", "--no-time", "--scale", "4", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
