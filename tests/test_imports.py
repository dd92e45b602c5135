"""What each way in imports, seen in sys.modules of fresh processes; and what may import what."""

import ast
import json
import re
import sys

import cv2
import numpy as np
import pytest
import torch
from helpers import run

from dlgsanet_arch import DLGSANet

HEAVY = ("torch", "torchvision", "basicsr", "numpy", "cv2", "lmdb", "scipy", "PIL", "yaml", "tqdm")
SAY = f"""
import json, sys
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def imported(code: str, folder, *arguments: object) -> set[str]:
    """Run code in a fresh process, and return which of HEAVY it imported."""
    result = run(["-c", f"import sys\n{code}\n{SAY}", *arguments], folder)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def call(*arguments: object) -> str:
    """Return code that runs a verb."""
    words = [str(each) for each in arguments]
    return f"from dlgsanet_arch.cli import main\nassert main({words!r}) == 0"


def test_the_package_imports_the_standard_library_alone(tmp_path):
    assert imported("import dlgsanet_arch", tmp_path) == set()


def test_help_and_version_import_nothing(tmp_path):
    code = """
from dlgsanet_arch import cli
cli.main(["--version"]), cli.main(["--help"])
for verb in cli.VERBS:
    try:
        cli.main([verb, "--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    assert imported(code, tmp_path) == set()


def test_every_verb_has_a_line_and_a_module(repository):
    from dlgsanet_arch.cli import VERBS

    files = (repository / "dlgsanet_arch" / "cli").glob("cmd_*.py")
    assert {path.stem.removeprefix("cmd_").replace("_", "-") for path in files} == {*VERBS}


def imports_of(path):
    """The parts of the package that a file imports, at its top or later, not for types alone."""
    tree = ast.parse(path.read_text())
    tree.body = [each for each in tree.body if not ast.unparse(each).startswith("if TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dlgsanet_arch"):
            _, *inside = node.module.split(".")
            yield from inside[:1] or (each.name for each in node.names)


def test_imports_go_downwards_as_contributing_says(repository):
    text = (repository / "CONTRIBUTING.md").read_text()
    order, lowest = re.search(
        r"Downwards only: (.*?);\s(.*?) are at the bottom", text, re.DOTALL
    ).groups()
    names = [re.findall(r"`(\w+)`", each) for each in (*order.split("→"), lowest)]
    level = {name: number for number, each in enumerate(names) for name in each}
    found, package = set(), repository / "dlgsanet_arch"
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if not part.startswith("__"):
            found |= {(part, each) for each in imports_of(path) if each != part}
    assert {name for pair in found for name in pair} - level.keys() == set()
    bottom = len(names) - 1
    upwards = {(a, b) for a, b in found if level[a] >= level[b] and level[a] != bottom}
    assert upwards == {("hub", "checkpoint")}


def test_the_network_imports_torch_and_neither_basicsr_nor_torchvision(tmp_path):
    code = "from dlgsanet_arch import DLGSANet\nDLGSANet(dim=12, groups=1, blocks=1)"
    assert not imported(code, tmp_path) & {"basicsr", "torchvision", "cv2", "lmdb", "PIL"}


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "in.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    return path


@pytest.mark.parametrize("verb", ["upscale", "inspect", "convert", "export"])
def test_verbs_for_weights_never_import_basicsr(verb, image, tmp_path):
    weights = tmp_path / "small.pth"
    net = DLGSANet(dim=12, groups=1, blocks=1, upsampler="pixelshuffledirect")
    torch.save(net.state_dict(), weights)
    code = {
        "upscale": call("upscale", "-i", image, "-o", tmp_path / "out.png"),
        "inspect": call("weights", "inspect", weights),
        "convert": call("weights", "convert", weights, "-o", tmp_path / "net.pth"),
        "export": call("export", "-m", weights, "-o", tmp_path / "net.pt2"),
    }[verb]
    assert not imported(code, tmp_path) & {"basicsr", "torchvision", "lmdb"}


def test_spandrel_never_imports_basicsr(tmp_path):
    pytest.importorskip("spandrel")
    code = "from dlgsanet_arch.spandrel import install\ninstall()"
    assert "basicsr" not in imported(code, tmp_path)


WORKER = """
import multiprocessing, sys

def look(_):
    from basicsr.utils.registry import ARCH_REGISTRY
    return "DLGSANet" in ARCH_REGISTRY

if __name__ == "__main__":
    import dlgsanet_arch.pipeline.samples
    with multiprocessing.get_context(sys.argv[1]).Pool(1, initializer=__import__,
                                                       initargs=("dlgsanet_arch",)) as pool:
        print(pool.map(look, [0]))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_started_workers_register(method, tmp_path):
    if sys.platform == "win32" and method == "forkserver":
        pytest.skip("Windows has no fork")
    (tmp_path / "script.py").write_text(WORKER)
    result = run([tmp_path / "script.py", method], tmp_path)
    assert result.stdout == "[True]\n", result.stderr


# BasicSR as an editable install has it: found by a finder of its own, and not on sys.path.
EDITABLE = """
import os
from importlib.machinery import PathFinder

original = PathFinder.find_spec
elsewhere = os.path.dirname(original("basicsr").submodule_search_locations[0])

class Editable:
    def find_spec(self, name, path=None, target=None):
        return original(name, [elsewhere]) if name == "basicsr" else None

PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name == "basicsr" and path is None else original(name, path, target))
sys.meta_path.append(Editable())
import dlgsanet_arch
from basicsr.archs import build_network
build_network({"type": "DLGSANet", "dim": 12, "groups": 1, "blocks": 1})
"""


def test_an_editable_basicsr_is_registered_in(tmp_path):
    assert "basicsr" in imported(EDITABLE, tmp_path)


def test_a_reloaded_package_has_one_finder(tmp_path):
    code = """
import importlib, dlgsanet_arch
from dlgsanet_arch import _basicsr
for _ in range(3):
    importlib.reload(_basicsr)
    importlib.reload(dlgsanet_arch)
assert sum(type(each).__name__ == "_Finder" for each in sys.meta_path) == 1
held = _basicsr.shared_environments
importlib.reload(_basicsr)
assert _basicsr.shared_environments is held
"""
    assert imported(code, tmp_path) == set()


def write_images(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        cv2.imwrite(str(folder / f"{index}.png"), rng.integers(0, 256, (96, 96, 3), np.uint8))


@pytest.mark.parametrize("verb", ["train", "benchmark"])
def test_data_verbs_import_neither_torch_nor_basicsr(verb, tmp_path):
    write_images(tmp_path / "hr", 3)
    words = ["data", verb, "--hr", "hr", "--scale", 2, "--workers", 2]
    more = {
        "train": ["--output", "set", "--crop", 48, "--step", 48, "--patch", 12],
        "benchmark": ["--name", "Mine"],
    }[verb]
    assert not imported(call(*words, *more), tmp_path) & {"torch", "torchvision", "basicsr"}


WORKERS = """
from functools import partial
from processes import imported_of
from dlgsanet_arch.data import benchmark, training_sets
from dlgsanet_arch.data.workers import ordered
if __name__ == "__main__":
    print(list(ordered(imported_of, [("torch", "torchvision", "basicsr"), ("cv2",)], 2)))
"""


def test_workers_of_data_verbs_import_neither_torch_nor_basicsr(tmp_path, repository):
    (tmp_path / "script.py").write_text(WORKERS)
    result = run([tmp_path / "script.py"], tmp_path, path=(repository, repository / "tests"))
    assert result.stdout == "[[], ['cv2']]\n", result.stdout + result.stderr
