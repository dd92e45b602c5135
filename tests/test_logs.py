import fcntl
import json
import logging
import os
import pty
import re
import select
import struct
import sys
import termios
import types

import pytest
from basicsr.utils import get_root_logger
from basicsr.utils.logger import initialized_logger

from dlgsanet_arch.pipeline import logs
from dlgsanet_arch.pipeline.logs import Pace, RunLog, training_line
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.progress import progress_bar


@pytest.fixture
def log(tmp_path):
    with RunLog(Processes()) as log:
        log.open(tmp_path, "train.log")
        yield log


def test_basicsr_s_logger_writes_to_the_run_s_log_and_is_left_as_it_was(tmp_path, capsys):
    before = logging.getLogger("basicsr").handlers[:], dict(initialized_logger)
    with RunLog(Processes()) as log:
        get_root_logger().info("from a model")
        get_root_logger().info("long\n" * 20)
        log.record("early")
        assert capsys.readouterr().err == ""
        log.open(tmp_path, "train.log", ["first of all"])
        log.warning("from the loop")
    lines = (tmp_path / "train.log").read_text().splitlines()
    shown = [line for line in lines if " " in line]
    assert [line.split(" ", 2)[2] for line in shown if "long" not in line] == [
        "INFO: first of all",
        "INFO: from a model",
        "WARNING: from the loop",
    ]
    assert lines.count("long") == 19
    assert capsys.readouterr().err.splitlines() == [line for line in shown if "long" not in line]
    assert '"event": "early"' in (tmp_path / "log.jsonl").read_text()
    assert (logging.getLogger("basicsr").handlers, initialized_logger) == before


def test_another_process_writes_no_file_and_only_errors(tmp_path, capsys):
    with RunLog(Processes(rank=1, world=2)) as log:
        log.open(tmp_path, "train.log")
        log.info("hidden")
        log.record("train", iter=1)
        logging.getLogger("basicsr").error("shown")
    assert list(tmp_path.iterdir()) == []
    assert "shown" in (said := capsys.readouterr().err)
    assert "hidden" not in said


def test_json_lines_hold_what_json_cannot_and_are_appended(tmp_path):
    for value in (float("inf"), 1.5):
        with RunLog(Processes()) as log:
            log.open(tmp_path, "train.log")
            log.record("validation", metrics={"psnr": value}, name="späti")
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["metrics"]["psnr"] for entry in entries] == ["inf", 1.5]
    assert all(entry["event"] == "validation" for entry in entries)


def test_a_log_that_cannot_be_written_does_not_end_the_run(log, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "start"}\n{"event": "tr')  # cut short
    log.record("end", iter=7)
    assert json.loads(path.read_text().splitlines()[-1])["iter"] == 7
    path.unlink()
    path.mkdir()
    log.record("end", iter=7)
    assert "log.jsonl cannot be written" in capsys.readouterr().err


@pytest.fixture
def opt(tmp_path):
    logger = {"use_tb_logger": True, "wandb": {"project": "sr"}}
    return {"name": "small", "root_path": str(tmp_path), "logger": logger, "as_given": {}}


def test_what_is_not_installed_is_one_warning(log, opt, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    log.start_trackers(opt, 1)
    assert log.tensorboard is None
    (warning,) = re.findall("WARNING: .*", (tmp_path / "train.log").read_text())
    assert "pip install tensorboard wandb" in warning


def test_trackers_start_below_the_root_and_a_wandb_that_does_not_is_a_warning(
    log, opt, tmp_path, monkeypatch
):
    def init(**values):  # before TensorBoard, which it follows
        raise RuntimeError(f"{values['project']} and {log.tensorboard}")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=object()))
    log.start_trackers(opt, 6)
    assert "wandb does not start (sr and None)" in (tmp_path / "train.log").read_text()
    log.scalars({"losses/l_pix": 0.5}, 6)
    assert list((tmp_path / "tb_logger/small").glob("events.*"))


def test_the_time_left_counts_from_the_resume(monkeypatch):
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(clock))
    pace = Pace(start=1000, total=1100, samples=16)
    pace.waited = 2.5
    taken = pace.take(1010)  # 10 iterations in 10 s, 90 left
    assert taken == {"time": 1.0, "data_time": 0.25, "samples_per_second": 16.0, "eta": 90.0}
    pace.paused = 10.0  # a validation
    taken = pace.take(1015)
    assert taken["time"] == 2.0
    assert taken["eta"] == pytest.approx(30.0 / 15 * 85)


def test_the_line_is_basicsr_s_with_the_pace_added():
    found = {"time": 0.5, "data_time": 0.125, "samples_per_second": 32.0, "eta": 3723.0}
    found |= {"epoch": 3, "iter": 12345, "lr": [5e-4], "losses": {"l_pix": 0.0123}}
    line = training_line("tiny_x4", found)
    assert line.startswith(
        "[tiny_..][epoch:  3, iter:  12,345, lr:(5.000e-04,)] "
        "[eta: 1:02:03, time (data): 0.500 (0.125), 32.0 samples/s"
    )
    assert line.endswith("] l_pix: 1.2300e-02 ")


@pytest.mark.parametrize("columns", [0, 100])
def test_a_bar_is_on_a_terminal_alone_whatever_its_width(monkeypatch, tmp_path, columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    with os.fdopen(theirs, "w") as terminal, (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar("", 10, "iter", done=4, transient=True) as bar:
            bar.update()
            bar.refresh()
        shown = b""  # a terminal may hand on what was written to it in pieces
        while b"5/10" not in shown and select.select([ours], [], [], 10)[0]:
            shown += os.read(ours, 10_000)
        assert b"5/10" in shown
        assert progress_bar("", 10, "iter", hidden=True).disable
        monkeypatch.setattr(sys, "stderr", file)
        assert progress_bar("", 10, "iter", transient=True).disable
    os.close(ours)
