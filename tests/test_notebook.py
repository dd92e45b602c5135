"""examples/dlgsanet.ipynb runs from its second cell to its last; its training is shortened."""

import json
import os
import re
import subprocess
import sys

import matplotlib
import pytest
from PIL import Image


@pytest.mark.faults  # it takes a minute
def test_the_notebook_runs(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    matplotlib.use("Agg")
    notebook = json.loads((repository / "examples" / "dlgsanet.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "dlgsanet-arch[all]" in cells[0]
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
