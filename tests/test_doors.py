"""The ways in, briefly: spawned workers, third parties, what is missing; and the faults' table."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from training_runs import assert_equal, events, make_root, small_options, train, weights

from dlgsanet_arch import pipeline
from dlgsanet_arch.pipeline import logs


def test_train_py_reads_by_spawned_workers(tmp_path, repository):
    checkout, elsewhere = make_root(tmp_path / "checkout"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "dlgsanet_arch", checkout / "dlgsanet_arch", ignore=ignored)
    shutil.copy(repository / "train.py", checkout)
    options = small_options("spawned", total=2, validates=False, multiprocessing_context="spawn")
    file = helpers.write_options(elsewhere / "spawned.yml", options)
    # where this environment keeps no bytecode, the worker need not compile all imports again
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    result = helpers.run(
        [checkout / "train.py", "-opt", file],
        cwd=elsewhere,
        env=bytecode if sys.dont_write_bytecode else {},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert [entry["iter"] for entry in events(checkout, "spawned", "train")] == [1, 2]
    options |= {"name": "here"}
    options["datasets"]["train"] |= {"num_worker_per_gpu": 0, "multiprocessing_context": None}
    train(checkout, options)
    assert_equal(weights(checkout, "spawned"), weights(checkout, "here"))


# A network and a model with a step of its own, in a file beside the data.
THIRD_PARTY = """
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class DoorNet(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Dropout(0.2))
        self.up = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        return self.up(self.body(x))


@MODEL_REGISTRY.register()
class DoorModel(SRModel):
    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        self.output = self.net_g(self.lq + 0.01 * torch.randn_like(self.lq))
        loss = self.cri_pix(self.output, self.gt)
        loss.backward()
        self.optimizer_g.step()
        self.log_dict = {"l_own": loss.item()}
        self.model_ema(decay=self.ema_decay)
"""


def test_a_third_party_s_network_and_model_train_resume_and_test(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    root = make_root(tmp_path)
    (root / "third_party_behind_the_doors.py").write_text(THIRD_PARTY)
    flags = ["--import", "third_party_behind_the_doors"]
    options = small_options("third", num_worker_per_gpu=0)
    options |= {"model_type": "DoorModel", "network_g": {"type": "DoorNet"}}
    train(root, options | {"name": "whole"}, *flags)
    for until in (5, 12):
        options["train"]["total_iter"] = until
        train(root, options, *flags, "--auto_resume")
    assert_equal(weights(root, "third"), weights(root, "whole"))
    losses = [entry["losses"] for entry in events(root, "third", "train")]
    assert [list(each) for each in losses] == [["l_own"]] * 12
    trained = Path("experiments/third/models/net_g_latest.pth")
    tested = helpers.small_test_options(Path("data"), trained)
    tested |= {"name": "third", "model_type": "DoorModel", "network_g": {"type": "DoorNet"}}
    file = helpers.write_options(root / "test.yml", tested)
    pipeline.test(root, ["-opt", str(file), *flags])
    last = (root / "results/third/log.jsonl").read_text().splitlines()[-1]
    validated = events(root, "third", "validation")[-1]["metrics"]
    assert f'"psnr": {validated["psnr"]}' in last


def test_a_missing_tensorboard_is_a_warning_and_a_launcher_s_flag_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    root = make_root(tmp_path)
    options = small_options("bare", total=2, validates=False, num_worker_per_gpu=0)
    options["logger"]["use_tb_logger"] = True
    train(root, options, "--local-rank=0")
    (log,) = (root / "experiments/bare").glob("*.log")
    assert log.read_text().count("WARNING: tensorboard asked for in `logger`") == 1
    assert [entry["iter"] for entry in events(root, "bare", "train")] == [1, 2]


def test_wandb_follows_a_run_offline(tmp_path, repository):
    pytest.importorskip("wandb", reason="20 MB for one test: pip install wandb")
    root = make_root(tmp_path)
    options = small_options("tracked", total=2, num_worker_per_gpu=0)
    options["logger"] |= {"use_tb_logger": True, "wandb": {"project": "sr", "resume_id": None}}
    file = helpers.write_options(root / "tracked.yml", options)
    train_py = [repository / "train.py", "-opt", file, "--root", root]
    result = helpers.run(train_py, cwd=root, env={"WANDB_MODE": "offline"})
    assert result.returncode == 0, result.stderr
    (record,) = root.glob("wandb/offline-run-*/*.wandb")
    assert b"losses/l_pix" in record.read_bytes()


@pytest.fixture(scope="module")
def table(repository) -> list[list[str]]:
    """The rows of the table in docs/faults.md, cell by cell."""
    lines = (repository / "docs/faults.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_table_has_every_fault_once(table):
    assert [int(row[0]) for row in table] == list(range(1, 41))
    assert all(row[1] and row[2] and row[3] for row in table)


def test_every_test_that_the_table_names_is_there(table, repository):
    text = (repository / "docs/faults.md").read_text()
    named = re.findall(r"`(tests/)?(test_\w+\.py)::(\w+)`", text)
    assert len(named) >= len(table)
    there = {}
    for _, module, function in named:
        if module not in there:
            tree = ast.parse((repository / "tests" / module).read_text())
            there[module] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in there[module], f"tests/{module}::{function}"
    for row in table:
        assert "::" in row[3] or row[3].startswith("none"), row


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_first_gets_no_traceback(unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dlgsanet_arch", "options", "tiny_x4"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")
