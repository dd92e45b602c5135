"""Registration in BasicSR, and the ways to drop the package in that need no door of ours."""

import importlib
import importlib.util
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import MODEL_REGISTRY
from helpers import (
    SMALL_ARGUMENTS,
    SMALL_NETWORK,
    run,
    small_train_options,
    write_options,
    write_pairs,
)

import dlgsanet_arch
from dlgsanet_arch import DLGSANet, _basicsr

# As sitecustomize it stands for a torchvision that matches torch, on a machine whose does not.
MATCHING_TORCHVISION = """
import sys
import torch
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::" + name, schema)
    import torchvision
import torchvision.transforms.functional as functional
sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
"""


@pytest.fixture(scope="module")
def python(repository):
    """Call it to run Python in a folder, with the package and what that folder holds on its path.

    With `matching`, torchvision matches torch, so that BasicSR imports without our repairs.
    """

    def run_python(folder: Path, *arguments: object, matching: bool = False):
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(MATCHING_TORCHVISION if matching else "")
        return run(arguments, folder, path=(folder, site, repository))

    return run_python


@pytest.fixture
def registries(monkeypatch):
    """BasicSR's registries of networks and models, empty."""
    module = importlib.import_module("basicsr.utils.registry")
    for kind in ("ARCH", "MODEL"):
        monkeypatch.setattr(module, f"{kind}_REGISTRY", module.Registry(kind.lower()))
    return module


def test_importing_registers_in_basicsr():
    assert type(build_network(SMALL_NETWORK)) is DLGSANet
    assert MODEL_REGISTRY.get("DLGSANetModel") is _basicsr.DLGSANetModel


def test_a_second_registration_a_reload_and_other_plugins_change_nothing(registries):
    other = type("OtherNet", (torch.nn.Module,), {})
    ours = type("DLGSANet", (), {"__module__": DLGSANet.__module__})  # of a reloaded module
    registries.ARCH_REGISTRY.register(other)
    registries.ARCH_REGISTRY.register(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _basicsr.register()
        _basicsr.register()
        importlib.reload(_basicsr)
        importlib.reload(dlgsanet_arch)
    assert list(registries.ARCH_REGISTRY) == [("OtherNet", other), ("DLGSANet", ours)]


@pytest.mark.parametrize(("kind", "name"), [("ARCH", "DLGSANet"), ("MODEL", "DLGSANetModel")])
def test_a_name_that_is_taken_stays_with_its_owner(registries, kind, name):
    theirs = type(name, (), {"__module__": "their_plugin"})
    registry = getattr(registries, f"{kind}_REGISTRY")
    registry.register(theirs)
    with pytest.warns(RuntimeWarning, match=rf"their_plugin\.{name}.*dlgsanet_arch\.") as caught:
        _basicsr.register()
    assert len(caught) == 1
    assert registry.get(name) is theirs


USE_NETWORK = """
import torch
network = dlgsanet_arch.DLGSANet(dim=12, groups=1, blocks=1).eval()
assert network(torch.rand(1, 3, 5, 7)).shape == (1, 3, 5, 7)
"""
WITHOUT_BASICSR = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["basicsr"] = None  # as if it were not installed
import dlgsanet_arch
assert not dlgsanet_arch._basicsr.basicsr_installed()
assert "torchvision" not in sys.modules
"""


def test_without_basicsr_the_network_imports(tmp_path, python):
    result = python(tmp_path, "-c", WITHOUT_BASICSR + USE_NETWORK)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_broken_basicsr_raises_its_own_error_where_it_is_imported(tmp_path, python):
    (tmp_path / "basicsr").mkdir()
    (tmp_path / "basicsr" / "__init__.py").write_text("import a_module_that_is_not_there")
    result = python(tmp_path, "-c", "import dlgsanet_arch" + USE_NETWORK + "import basicsr")
    assert result.stderr.endswith("No module named 'a_module_that_is_not_there'\n")


OWN_SCRIPT = """
import {}
import {}
from basicsr.train import train_pipeline

train_pipeline({!r})
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, python):
    """The root of a finished run of 4 iterations, trained by a script of the user's own."""
    root = tmp_path_factory.mktemp("root")
    write_pairs(root / "data", 4)
    write_options(root / "small.yml", small_train_options(root / "data"))
    script = OWN_SCRIPT.format("dlgsanet_arch", "basicsr", str(root))
    result = python(root, "-c", script, "-opt", "small.yml")
    assert result.returncode == 0, result.stderr
    return root


def test_a_script_of_the_users_own_trains(trained):
    models = trained / "experiments" / "small" / "models"
    saved = {path.name for path in models.iterdir()}
    assert saved == {"net_g_2.pth", "net_g_4.pth", "net_g_latest.pth"}
    network = DLGSANet(**SMALL_ARGUMENTS)
    network.load_state_dict(torch.load(models / "net_g_4.pth")["params_ema"], strict=True)


@pytest.mark.parametrize(
    ("first", "second"), [("dlgsanet_arch", "basicsr"), ("basicsr", "dlgsanet_arch")]
)
def test_a_script_of_the_users_own_resumes(trained, tmp_path, python, first, second):
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = python(
        elsewhere,
        *("-c", OWN_SCRIPT.format(first, second, str(root)), "-opt", root / "small.yml"),
        *("--auto_resume", "--force_yml", "train:total_iter=6"),
        matching=first == "basicsr",
    )
    assert result.returncode == 0, result.stderr
    assert "Resuming training from epoch: 1, iter: 4" in result.stderr + result.stdout
    assert (root / "experiments" / "small" / "training_states" / "6.state").exists()
    # BasicSR renames the folder of a run that it begins anew.
    assert [path.name for path in (root / "experiments").iterdir()] == ["small"]


@pytest.fixture
def checkout(tmp_path):
    """A folder that stands for a BasicSR checkout, with the plugin's one line in archs/."""
    root = tmp_path / "checkout"
    installed = Path(importlib.util.find_spec("basicsr").origin).parent
    without_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(installed, root / "basicsr", ignore=without_cache)
    (root / "basicsr" / "archs" / "dlgsanet_arch.py").write_text("import dlgsanet_arch\n")
    return root


def _import_first(checkout: Path) -> None:
    init = checkout / "basicsr" / "__init__.py"
    init.write_text(f"import dlgsanet_arch\n{init.read_text()}")


@pytest.mark.parametrize("first_line", [True, False])
def test_a_file_in_archs_trains(checkout, python, first_line):
    if first_line:
        _import_first(checkout)
    write_pairs(checkout / "data", 4)
    write_options(checkout / "small.yml", small_train_options(checkout / "data"))
    arguments = ("-m", "basicsr.train", "-opt", "small.yml")
    result = python(checkout, *arguments, matching=not first_line)
    assert result.returncode == 0, result.stderr
    assert "Network [DLGSANet] is created" in result.stderr + result.stdout
    assert (checkout / "experiments" / "small" / "models" / "net_g_4.pth").exists()


IMPORT_IN_CHECKOUT = """
import {}
import basicsr, dlgsanet_arch, os
from basicsr.archs import build_network
from basicsr.train import load_resume_state
assert os.path.dirname(basicsr.__path__[0]) == os.getcwd()
assert type(build_network({{"type": "DLGSANet"}})) is dlgsanet_arch.DLGSANet
assert load_resume_state.__module__ == "dlgsanet_arch._basicsr"
from basicsr.utils.registry import MODEL_REGISTRY
import sys
assert MODEL_REGISTRY.get("DLGSANetModel") is dlgsanet_arch._basicsr.DLGSANetModel
assert "dlgsanet_arch.training" not in sys.modules
"""


@pytest.mark.parametrize(("imported", "first_line"), [("basicsr", True), ("dlgsanet_arch", False)])
def test_each_package_can_import_the_other(checkout, python, imported, first_line):
    if first_line:
        _import_first(checkout)
    script = IMPORT_IN_CHECKOUT.format(imported)
    result = python(checkout, "-W", "error::RuntimeWarning", "-c", script)
    assert result.returncode == 0, result.stderr
