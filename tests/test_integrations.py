"""The snippet of docs/using.md for spandrel and the folder for ComfyUI, each in a fresh process."""

import re
from importlib import resources

import pytest
import safetensors.torch
import torch
from helpers import run

# What ComfyUI does with a folder in custom_nodes, and its node "Load Upscale Model" with a file.
COMFYUI = """
import importlib.util, sys
import spandrel

folder, weights = sys.argv[1:]
spec = importlib.util.spec_from_file_location("node", folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["node"] = module
spec.loader.exec_module(module)
assert isinstance(module.NODE_CLASS_MAPPINGS, dict)

import safetensors.torch
model = spandrel.ModelLoader().load_from_state_dict(safetensors.torch.load_file(weights)).eval()
assert isinstance(model, spandrel.ImageModelDescriptor)
"""
# CPU builds of torch have no torchvision of their own, so that spandrel's import needs the repair.
REPAIR = "import dlgsanet_arch\n"
BLOCK_BASICSR = "import sys; sys.modules['basicsr'] = None\n"
USE = """
import torch
with torch.no_grad():
    out = model(torch.rand(1, 3, 9, 8))
print(model.architecture.id, model.scale, tuple(out.shape))
"""
PRINTED = "DLGSANet 4 (1, 3, 36, 32)"


@pytest.fixture
def weights(tmp_path):
    bundled = resources.files("dlgsanet_arch") / "weights" / "tiny_x4.safetensors"
    state = safetensors.torch.load_file(bundled)
    torch.save({"params": {name: each.float() for name, each in state.items()}},
               tmp_path / "net_g_latest.pth")  # fmt: skip
    return bundled


@pytest.mark.parametrize("before", ["", BLOCK_BASICSR])
def test_the_snippet_for_spandrel_works_as_printed(repository, tmp_path, weights, before):
    text = (repository / "docs" / "using.md").read_text()
    snippet = re.search(r"## spandrel.*?```python\n(.*?)```", text, re.DOTALL)[1]
    result = run(["-c", before + snippet + USE], tmp_path, {"PYTHONPATH": str(repository)})
    assert result.returncode == 0, result.stderr
    assert PRINTED in result.stdout


def test_comfyui_loads_weights_with_the_folder_in_custom_nodes(repository, tmp_path, weights):
    folder = repository / "integrations" / "comfyui" / "dlgsanet"
    script = BLOCK_BASICSR + REPAIR + COMFYUI + USE
    arguments = ["-c", script, str(folder), str(weights)]
    result = run(arguments, tmp_path, {"PYTHONPATH": str(repository)})
    assert result.returncode == 0, result.stderr
    assert PRINTED in result.stdout
