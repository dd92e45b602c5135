"""What networks cost: counts against hand-made and published ones, and the table."""

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

TINY = ("DLGSANet Tiny", 4)


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
    assert counted == [(record["input_height"], record["input_width"])] == [(180, 320)]
    assert record["parameters"] == record["published_parameters"]
    assert record["macs"] / 1e9 == pytest.approx(34.67, abs=0.005)
    assert record["published_gmacs"] == 32.0


def test_time_is_of_one_forward_after_a_small_one(counted):
    record = complexity.evaluate(TINY, (256, 320), device="cpu")
    assert 0 < record["seconds"] < 60
    assert record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 0
    assert counted == [(64, 80), (48, 48), (64, 80)]  # counted, warmed up, measured


def test_a_network_that_runs_out_of_memory_is_said(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(complexity, "measure", fail)
    record = complexity.evaluate(TINY, (64, 64), device="cpu")
    assert record["seconds"] is None
    assert "out of memory" in complexity.table([record])


def test_the_table(capsys):
    assert main(["complexity", "--no-time", "--network", "tiny", "--scale", "4", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "DLGSANet Tiny x3\nDLGSANet Tiny x4\n"
    cells = [each.strip() for each in captured.out.splitlines()[2].split("  ")]
    assert {"DLGSANet Tiny x4", "581,298", "34.67", "32.0"} <= {*cells}
    assert main(["complexity", "--no-time", "--network", "tinny"]) == 1
    assert "no network's name contains this" in capsys.readouterr().err


def test_json_and_csv_say_the_same(capsys):
    asked = ["complexity", "--network", "tiny", "--size", "64x96", "--runs", "1", "--scale", "2"]
    assert main([*asked, "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["input_height"], record["input_width"]) == (32, 48)
    assert record["parameters"] == 565_710
    assert math.isfinite(record["seconds"])
    assert record["published_gmacs"] is None  # it is for another size
    assert main([*asked, "--csv", "--no-time"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["macs"] == str(record["macs"])
    assert row["seconds"] == ""
