"""`dlgsanet weights`: each action, as it is called."""

import json

import pytest
import torch
import yaml
from helpers import SMALL_ARGUMENTS

from dlgsanet_arch.checkpoint import read_checkpoint, read_weights
from dlgsanet_arch.cli import main
from dlgsanet_arch.network import DLGSANet

# Anchors that hold 9**9 values.
BOMB = ",".join(f"&a{n} [{','.join([f'*a{n - 1}' if n else '1'] * 9)}]" for n in range(9))
BOMB = f"[{BOMB}]"


def call(*arguments):
    """Run `dlgsanet weights` with these arguments."""
    return main(["weights", *map(str, arguments)])


def small():
    return DLGSANet(**SMALL_ARGUMENTS).state_dict()


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "net_g_4000.pth"
    torch.save({"params": small()}, path)
    return path


def test_inspect_says_what_a_file_holds(weights, tmp_path, capsys):
    assert call("inspect", weights) == 0
    as_yaml = yaml.safe_load(capsys.readouterr().out)
    other = tmp_path / "other.safetensors"
    call("convert", weights, "-o", other, "--set", "tlc_flag=false")
    capsys.readouterr()
    assert call("inspect", "--json", weights, other) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == as_yaml
    assert first["parameters"] == sum(tensor.numel() for tensor in small().values())
    assert (first["nearest"], first["dtype"]) == ("DLGSANet Tiny x2", "float32")
    assert first["differences"]["dim"] == {"here": 12, "published": 48}
    assert "idynamic_num_heads" not in first["differences"]
    assert first["iteration"] == second["iteration"] == 4000
    assert (first["config_from"], second["config_from"]) == ("the weights", "the file")
    assert second["config"] == {**first["config"], "tlc_flag": False}
    assert second["differences"]["tlc_flag"] == {"here": False, "published": True}


def test_inspect_finds_weights_that_are_not_finite(tmp_path, capsys):
    weights = small()
    next(iter(weights.values()))[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    torch.save(weights, tmp_path / "net.pth")
    assert call("inspect", tmp_path / "net.pth") == 1
    assert "DAMAGED: 2 weights" in capsys.readouterr().err


def test_files_that_are_no_weights_are_named(tmp_path, capsys):
    path = tmp_path / "x.pth"
    path.write_text("no weights")
    out = ["-o", str(tmp_path / "o.pth")]
    actions = {"inspect": [], "convert": out, "average": out, "transfer": [*out, "--scale", "4"]}
    for action, more in actions.items():
        assert call(action, path, *more) == 1
        assert f"dlgsanet: {path} is not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "o.pth").exists()


def test_convert_there_and_back(weights, tmp_path, capsys):
    middle, back = tmp_path / "net.safetensors", tmp_path / "back.pth"
    assert call("convert", weights, "-o", middle, "--set", "activation=gelu") == 0
    assert call("convert", middle, "-o", back) == 0
    first, last = read_weights(weights), read_weights(back, "params")
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert read_checkpoint(back).config["activation"] == "gelu"
    assert read_checkpoint(back).iteration == 4000
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_notes_are_kept_and_weights_may_be_halved(weights, tmp_path, suffix):
    halved, again = tmp_path / f"halved{suffix}", tmp_path / f"again{suffix}"
    notes = ["--note", "licence=Apache-2.0", "--note", "trained_on=a = b, Straße"]
    assert call("convert", weights, "-o", halved, "--dtype", "fp16", *notes) == 0
    assert call("convert", halved, "-o", again, "--note", "licence=MIT") == 0
    kept = read_checkpoint(again)
    assert kept.notes == {"licence": "MIT", "trained_on": "a = b, Straße"}
    for name, tensor in read_weights(weights).items():
        assert kept.weights[name].dtype == torch.float16
        torch.testing.assert_close(kept.weights[name].float(), tensor, rtol=1e-3, atol=1e-6)


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path, capsys):
    weights = small()
    next(iter(weights.values())).fill_(1e6)
    torch.save(weights, tmp_path / "net.pth")
    out = tmp_path / "out.pth"
    assert call("convert", tmp_path / "net.pth", "-o", out, "--dtype", "fp16") == 1
    assert "fp16 cannot hold" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tlc_flag", "'tlc_flag' is not NAME=VALUE"),
        ("tlc_flag=[", "got '['"),
        ("tlc_flag=" + "[" * 3000, "makes no DLGSANet"),
        ('dim=!!int ""', "makes no DLGSANet"),
        ("input_resolution=!!set {a}", "makes no DLGSANet"),
        (f"activation={BOMB}", "makes no DLGSANet"),
        ("nonsense=1", "no argument 'nonsense'"),
    ],
)
def test_convert_refuses_what_is_no_argument(weights, tmp_path, text, said, capsys):
    try:
        status = call("convert", weights, "-o", tmp_path / "o.pth", "--set", text)
    except SystemExit as error:  # argparse's own refusal
        status = error.code
    assert status in (1, 2)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("note", ["params=1", "config={}", "a=crc32:0", "a=\udcff"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_notes_do_not_replace_what_files_hold(weights, tmp_path, note, suffix, capsys):
    assert call("convert", weights, "-o", tmp_path / f"o{suffix}", "--note", note) == 1
    assert "note" in capsys.readouterr().err
    assert not (tmp_path / f"o{suffix}").exists()


def test_average_and_transfer(weights, tmp_path, capsys):
    other, mean = tmp_path / "other.pth", tmp_path / "a.pth"
    changed = {name: tensor + 2 for name, tensor in small().items()}
    torch.save({"params": changed, "params_ema": small()}, other)
    assert call("average", weights, other, "--param-key", "params", "-o", mean) == 0
    one, two, three = read_weights(weights), changed, read_weights(mean)
    assert all(torch.allclose(three[name], (one[name] + two[name]) / 2) for name in one)
    out = tmp_path / "start.pth"
    assert call("transfer", tmp_path / "a.pth", "--scale", "4", "-o", out) == 0
    assert read_checkpoint(out).scale == 4
    assert "the upsampler is resized" in capsys.readouterr().out


def test_notes_move_no_terminal_and_bundled_weights_go_by_name(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert call("convert", "tiny_x4", "-o", out, "--note", "\x1b[2Jkey=\x1b]0;title\x07") == 0
    assert call("inspect", out, "tiny_x4") == 0
    start, mean = tmp_path / "\x1b[2J.pth", tmp_path / "\x1b[2Jmean.pth"
    assert call("transfer", out, "--scale", "2", "-o", start) == 0
    assert call("average", start, "-o", mean) == 0
    assert call("convert", start, "-o", mean) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "]0;title" in said
