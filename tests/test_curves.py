"""Curves of runs: what is read from each kind of log, and the figure of them."""

import json
import logging
import math
import sys

import numpy as np
import pytest
from basicsr.utils.logger import MessageLogger

from dlgsanet_arch.cli import main
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline.logs import training_line
from dlgsanet_arch.tools import curves

PNG = b"\x89PNG"


def train(iteration, loss, rate=5e-4):
    return {"event": "train", "iter": iteration, "lr": [rate], "losses": {"l_pix": loss}}


def validation(iteration, psnr, dataset="Set5"):
    metrics = {"psnr": psnr, "ssim": psnr / 40}
    return {"event": "validation", "iter": iteration, "dataset": dataset, "metrics": metrics}


def write_json_lines(folder, entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture
def run(tmp_path):
    entries = [{"event": "start", "iter": 0, "options": {}}]
    entries += [train(step, 1 / step) for step in (100, 200, 300)]
    entries += [validation(200, 30.5), validation(200, 27.0, "Set14"), validation(300, 30.25)]
    return write_json_lines(tmp_path / "experiments" / "tiny", entries)


def test_json_lines(run):
    read = curves.read_run(run)
    assert read.name == "tiny"
    assert read.losses == {"l_pix": {100: 1 / 100, 200: 1 / 200, 300: 1 / 300}}
    assert read.rates == dict.fromkeys((100, 200, 300), 5e-4)
    assert read.validations["Set5", "psnr"] == {200: 30.5, 300: 30.25}
    assert read.validations["Set14", "ssim"] == {200: 27 / 40}


def test_after_a_resume_later_lines_win(tmp_path):
    first = [train(100, 1.0), train(200, 2.0), validation(200, 20), train(300, 3.0)]
    first += [validation(250, 21), validation(300, 22)]
    resumed = [{"event": "start", "iter": 200}, train(300, 4.0), validation(250, 23)]
    read = curves.read_run(write_json_lines(tmp_path / "a", [*first, *resumed]))
    assert read.losses["l_pix"] == {100: 1.0, 200: 2.0, 300: 4.0}
    assert read.validations["Set5", "psnr"] == {200: 20.0, 250: 23.0}  # 300 is to come again


def test_losses_that_are_no_numbers_and_half_a_line(tmp_path):
    folder = write_json_lines(tmp_path / "a", [train(1, "nan"), train(2, "inf")])
    with (folder / "log.jsonl").open("a") as file:
        file.write(f'{{"event": "tra\n{json.dumps(train(3, 0.5))}\n{{"event": "tra')
    losses = curves.read_run(folder).losses["l_pix"]
    assert math.isnan(losses[1])
    assert losses[2] == math.inf
    assert losses[3] == 0.5


def test_a_damaged_line_is_named(tmp_path):
    folder = write_json_lines(tmp_path / "a", [train(1, 1.0)])
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"event": "train", "iter": "oops"}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:2"):
        curves.read_run(folder)


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))

    def emit(self, record):
        self.lines.append(self.format(record))


def basicsr_lines(steps, validated=None):
    """Lines as BasicSR's own MessageLogger and its validation write them."""
    opt = {
        "name": "tiny_x4",
        "logger": {"print_freq": 1, "use_tb_logger": False},
        "train": {"total_iter": 5000},
    }
    written = _Lines()
    logger = logging.getLogger("basicsr")
    logger.addHandler(written)
    logger.setLevel(logging.INFO)
    try:
        message = MessageLogger(opt, start_iter=1)
        message.logger = logger
        for step, loss in steps.items():
            values = {"epoch": 0, "iter": step, "lrs": [5e-4], "time": 0.5, "data_time": 0.1}
            message({**values, "l_pix": loss, "l_percep": 2 * loss})
            if validated and step in validated:
                logger.info(validated[step])
    finally:
        logger.removeHandler(written)
    return "\n".join(written.lines) + "\n"


def test_text_logs_of_basicsr(tmp_path):
    best = "Validation Set5\n\t # psnr: 31.5000\tBest: 31.5000 @ 1200 iter\n"
    worse = "Validation Set5\n\t # psnr: 30.0000\tBest: 31.5000 @ 1200 iter\n"
    steps = {1100: 0.04, 1200: 0.03, 1300: 0.5}
    (tmp_path / "train_tiny_x4_20260101_000000.log").write_text(
        "banner\n" + basicsr_lines(steps, {1200: best})
    )
    (tmp_path / "train_tiny_x4_20260102_000000.log").write_text(
        basicsr_lines({1300: 0.02, 1400: math.nan}, {1300: worse})
    )
    read = curves.read_run(tmp_path)
    pixel = read.losses["l_pix"]
    assert list(pixel) == [1100, 1200, 1300, 1400]
    assert (pixel[1100], pixel[1300]) == (0.04, 0.02)
    assert math.isnan(pixel[1400])
    assert read.losses["l_percep"][1200] == 0.06
    assert read.rates[1400] == 5e-4
    assert read.validations == {("Set5", "psnr"): {1200: 31.5, 1300: 30.0}}


def test_text_lines_of_this_package(tmp_path):
    pace = {"eta": 100.0, "time": 0.5, "data_time": 0.1, "samples_per_second": 32.0}
    line = training_line("tiny", 3, 12345, [2.5e-4], pace, {"l_pix": 0.025})
    path = tmp_path / "train_tiny.log"
    path.write_text(f"2026-01-01 00:00:00,000 INFO: {line}\n")
    read = curves.read_run(path)
    assert read.losses == {"l_pix": {12345: 0.025}}
    assert read.rates == {12345: 2.5e-4}


def test_events_of_tensorboard(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "experiments" / "tiny").mkdir(parents=True)
    folder = tmp_path / "tb_logger" / "tiny"
    for suffix, steps in (("a", (100, 200, 300)), ("b", (200,))):
        writer = SummaryWriter(str(folder), filename_suffix=suffix)
        for step in steps:
            writer.add_scalar("losses/l_pix", step / 1000 if suffix == "a" else 0.5, step)
            writer.add_scalar("lr", 1e-3, step)
            writer.add_scalar("metrics/Set5/psnr", 30 + step / 1000, step)
        writer.close()
    for place in (folder, tmp_path / "experiments" / "tiny"):
        read = curves.read_run(place)
        assert read.losses["l_pix"] == pytest.approx({100: 0.1, 200: 0.5})
        assert list(read.rates) == [100, 200]
        assert read.validations["Set5", "psnr"] == pytest.approx({100: 30.1, 200: 30.2})


def test_places_without_a_run_say_so(tmp_path, run):
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        curves.read_run(run.with_name("tinny"))
    with pytest.raises(UserError, match="holds no log of a training"):
        curves.read_run(tmp_path)
    empty = write_json_lines(tmp_path / "empty", [{"event": "start", "iter": 0}])
    with pytest.raises(UserError, match="no iteration yet"):
        curves.read_run(empty)


def test_smoothing_is_a_mean_of_what_is_finite():
    values = [1.0, 2.0, 6.0, math.nan, 4.0, 10.0]
    expected = [1.5, 3.0, 4.0, math.nan, 7.0, 7.0]
    np.testing.assert_allclose(curves.smoothed(values, 3), expected)
    np.testing.assert_array_equal(curves.smoothed(values, 1), values)


def test_the_best_value():
    assert curves.best({1: 30.0, 2: math.inf, 3: 31.0, 4: 31.0}, "psnr") == (3, 31.0)
    assert curves.best({1: 0.2, 2: 0.1, 3: math.nan}, "lpips") == (2, 0.1)
    assert curves.best({1: math.nan}, "psnr") is None


def test_the_figure_shows_raw_and_smoothed_losses_rates_and_validations(run):
    read = curves.read_run(run)
    loss, rate, psnr = curves.draw([read, read], window=3).axes
    assert len(loss.lines) == 4
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), list(read.losses["l_pix"].values()))
    np.testing.assert_allclose(loss.lines[1].get_ydata()[1], np.mean([1 / 100, 1 / 200, 1 / 300]))
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["tiny (1)", "tiny (2)"]
    assert len(rate.lines) == 2
    labels = [text.get_text() for text in psnr.get_legend().get_texts()]
    assert labels[:2] == ["tiny (1), Set5: best 30.5 at 200", "tiny (1), Set14: best 27 at 200"]
    assert curves.draw([read], dataset="Set14").axes[2].get_legend().get_texts()[0].get_text() == (
        "tiny, Set14: best 27 at 200"
    )


@pytest.mark.parametrize(("suffix", "start"), [("png", PNG), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_verb_writes_a_figure(run, tmp_path, capsys, suffix, start):
    out = tmp_path / f"figure.{suffix}"
    assert main(["curves", str(run), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(start)
    printed = capsys.readouterr().out
    assert "tiny: up to iteration 300" in printed
    assert "best psnr on Set5: 30.5000 at 200" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.gif"], ".png, .pdf, .svg"),
        (["-o", "nowhere/a.png"], "no folder nowhere"),
        (["--metric", "pnsr"], "did you mean 'psnr'"),
        (["--loss", "l_pixel"], "did you mean 'l_pix'"),
        (["--dataset", "Set"], "did you mean"),
    ],
)
def test_the_verb_says_what_is_wrong(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["curves", str(run), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_the_install_line_is_said(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["curves", str(run), "-o", str(tmp_path / "a.png")]) == 1
    assert "pip install 'dlgsanet-arch[tools]'" in capsys.readouterr().err
