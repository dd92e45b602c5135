"""examples/dlgsanet.ipynb finds what to install, and then runs; its training is shortened."""

import json
import os
import re
import subprocess
import sys

import matplotlib
import pytest
from PIL import Image


@pytest.fixture
def cells(repository):
    """The notebook's cells of code."""
    notebook = json.loads((repository / "examples" / "dlgsanet.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("is_checkout", [True, False])
def test_the_first_cell_installs_a_checkout_or_an_archive(
    repository, tmp_path, monkeypatch, cells, is_checkout
):
    monkeypatch.chdir(repository / "examples" if is_checkout else tmp_path)
    python, _, commands = cells[0].partition("\n%pip install ")
    names = {}
    exec(python, names)
    source = repository if is_checkout else tmp_path / "dlgsanet.zip"
    assert names["SOURCE"] == source.resolve().as_uri()
    assert '"dlgsanet-arch[all] @ {SOURCE}"' in commands
    assert commands.endswith("!dlgsanet doctor --fix --yes")


@pytest.mark.faults  # it takes a minute
def test_the_notebook_runs(repository, tmp_path, monkeypatch, cells):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    matplotlib.use("Agg")
    names = {}

    def shell(command):
        filled = re.sub(r"{(\w+)}", lambda name: str(names[name[1]]), command)
        program = filled.replace("dlgsanet", f'"{sys.executable}" -m dlgsanet_arch', 1)
        result = subprocess.run(program, shell=True, capture_output=True, text=True)
        assert result.returncode == 0, (filled, result.stdout[-3000:], result.stderr[-3000:])

    names["shell"] = shell
    for cell in cells[1:]:
        short = cell.replace("ITERATIONS = 1000", "ITERATIONS = 8")
        python = re.sub(r"^!(.*)$", lambda line: f"shell({line[1]!r})", short, flags=re.MULTILINE)
        exec(compile(python, "cell", "exec"), names)
    assert names["large"].shape == (256, 256, 3)
    assert os.path.exists("experiments/demo/models/net_g_latest.pth")
    with Image.open("compare.png") as figure:
        assert figure.width > 600
