"""The scripts in examples/: each is run as its docstring says, and refuses bad input."""

import itertools
import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from definition import window_starts
from helpers import SMALL_NETWORK
from PIL import Image

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.checkpoint import Checkpoint, save_checkpoint

PNG = b"\x89PNG"
SCORES = {"Set5": ((200, 30.5), (300, 30.25)), "Set14": ((200, 27.0),)}


@pytest.fixture
def example(repository, tmp_path, monkeypatch):
    """A function that runs an example in `tmp_path`, and returns its error message or None."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(repository / "examples" / name), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    return call


@pytest.fixture
def training(tmp_path):
    """The log of a run that was killed while it wrote a line, then resumed from iteration 300."""
    lines = [{"event": "start", "iter": 0}]
    for step in (100, 200, 300, 400):
        values = {"time": 36.0, "lr": [5e-4], "losses": {"l_pix": 1 / step}}
        lines.append({"event": "train", "iter": step, **values})
    for dataset, scores in SCORES.items():
        for step, psnr in (*scores, (400, 99.0)):
            entry = {"event": "validation", "iter": step, "dataset": dataset}
            lines.append({**entry, "metrics": {"psnr": psnr, "lpips": psnr / 100}})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "tiny").mkdir()
    log = tmp_path / "tiny" / "log.jsonl"
    log.write_text(f'{text}{{"event": "tr\n{{"event": "start", "iter": 300}}\n')
    return log


def test_curves_are_drawn_up_to_the_iteration_resumed_from(example, training, tmp_path, capsys):
    assert example("curves.py", "tiny", training, "-o", "out.png", "--smooth", 2) is None
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)
    assert example("curves.py", "tiny", "--metric", "lpips") is None
    printed = capsys.readouterr().out.splitlines()
    assert "tiny: 300 iterations in 3.00 hours" in printed
    assert "tiny, Set5 psnr: best 30.5 at 200" in printed
    assert "tiny, Set14 psnr: best 27 at 200" in printed
    assert "tiny, Set5 lpips: best 0.3025 at 300" in printed


def test_explain_draws_the_image_and_counts_similarities(example, tmp_path, capsys):
    torch.manual_seed(0)
    arguments = {name: value for name, value in SMALL_NETWORK.items() if name != "type"}
    network = DLGSANet(**arguments).eval()
    save_checkpoint(Checkpoint(network.state_dict(), arguments), tmp_path / "net.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 17, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "lr.png")
    assert example("explain.py", "-i", "lr.png", "-m", "net.pth", "-o", "out.png") is None
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)

    attention = network.get_submodule("deep_feature_extraction.0.body.1.restormer_attn")
    maps = []
    attention.qkv_dwconv.register_forward_hook(lambda *given: maps.append(given[2]))
    with torch.no_grad():
        network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    shares = []
    axes = [window_starts(length, SMALL_NETWORK["tlc_kernel"]) for length in (20, 17)]
    for top, left in itertools.product(axes[0][0], axes[1][0]):
        window = maps[0][0, :, top : top + axes[0][1], left : left + axes[1][1]]
        q, k, _ = window.flatten(1).unflatten(0, (3, attention.heads, -1))
        shares.append((torch.einsum("hcn,hdn->hcd", q, k) <= 0).double().mean().item())
    assert len(shares) == 9
    assert f"similarities that are not positive: {np.mean(shares):.1%}" in capsys.readouterr().out


def test_explain_finds_edge_texture_and_flat_area(repository):
    image = torch.full((1, 3, 90, 120), 0.5)
    image[..., 100:] = 1
    image[..., 10:60, 10:60] = torch.rand(50, 50, generator=torch.manual_seed(0))
    found = runpy.run_path(str(repository / "examples" / "explain.py"))["choose_pixels"](image)
    assert 92 <= found["edge"][0] <= 108
    assert all(10 <= value < 60 for value in found["texture"])
    x, y = found["flat"]
    assert image[..., y - 7 : y + 8, x - 7 : x + 8].std() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("curves.py absent", "absent cannot be read"),
        (
            "curves.py tiny --loss l_pixel",
            "no l_pixel in its log, which has lr, seconds, l_pix, Set5 psnr",
        ),
        ("curves.py tiny -o out.txt", "out.txt cannot be written"),
        ("curves.py tiny -o absent/out.png", "absent/out.png cannot be written"),
        ("curves.py wrong.jsonl", "wrong.jsonl:2 is not a line of a training log"),
        ("explain.py -i absent.png", "absent.png"),
        ("explain.py -i tiny/log.jsonl", "cannot identify image file"),
        ("explain.py -i lr.png", "an image of 15x15 or more"),
        ("explain.py -i large.png --at 20 0", r"\(20, 0\) is outside the image of 20x20"),
        ("explain.py -i large.png -m lr.png", "lr.png"),
    ],
)
def test_bad_input_is_refused(example, training, tmp_path, words, message):
    (tmp_path / "wrong.jsonl").write_text('{"event": "end"}\n{"event": "train", "iter": "x"}\n')
    for name, side in (("lr.png", 14), ("large.png", 20)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    error = example(*words.split())
    assert re.match(rf"{words.split()[0]}: .*{message}", error), error
    assert not list(tmp_path.glob("out*"))
