"""Each repair of BasicSR: its fault shows without it, does not with it, and decides about it."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import run

from dlgsanet_arch import _basicsr
from dlgsanet_arch.errors import ResumeError

# Applies all repairs but those named in the arguments, then says of each fault whether it shows.
SYMPTOMS = """
import json, os, sys, tempfile

from dlgsanet_arch import _basicsr
_basicsr.REPAIRS = tuple(each for each in _basicsr.REPAIRS if each.name not in sys.argv[1:])

def imports():
    import basicsr

def resumes():
    import torch
    from basicsr.train import load_resume_state
    states = os.path.join(os.getcwd(), "root", "training_states")
    os.makedirs(states)
    torch.save({"epoch": 0, "iter": 7}, os.path.join(states, "7.state"))
    opt = {"auto_resume": True, "name": "run", "network_g": {},
           "path": {"training_states": states, "models": "models", "resume_state": None}}
    assert load_resume_state(opt)["iter"] == 7
    opt["auto_resume"] = False
    assert load_resume_state(opt)["iter"] == 7

def shares_lmdb():
    import multiprocessing
    import lmdb
    from basicsr.utils import FileClient
    folder = tempfile.mkdtemp()
    with lmdb.open(folder) as env, env.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    def read(place):
        client = FileClient("lmdb", db_paths=[place, place], client_keys=["gt", "lq"])
        assert client.get("key", "gt") == client.get("key", "lq") == b"value"
        return client
    clients = [read(folder), read(folder + "/../" + os.path.basename(folder))]
    worker = multiprocessing.get_context("fork").Process(target=read, args=(folder,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    clients.clear()
    lmdb.open(folder).close()  # the last reader gone, it can be opened for writing

def pickles_lmdb():
    import pickle
    import lmdb
    from basicsr.utils import FileClient
    folder = tempfile.mkdtemp()
    with lmdb.open(folder) as env, env.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    client = FileClient("lmdb", db_paths=folder, client_keys="gt")
    assert client.get("key", "gt") == b"value"  # as a data set has that was read in this process
    again = pickle.loads(pickle.dumps(client))
    assert again.get("key", "gt") == b"value"

def distributes():
    import torch
    from basicsr.models.base_model import BaseModel
    torch.distributed.init_process_group(
        "gloo", init_method="file://" + os.path.join(tempfile.mkdtemp(), "meeting"),
        rank=0, world_size=1)
    try:
        model = BaseModel({"num_gpu": 0, "is_train": True, "dist": True})
        network = model.model_to_device(torch.nn.Conv2d(3, 3, 1))
        assert type(network) is torch.nn.parallel.DistributedDataParallel
        network(torch.ones(1, 3, 2, 2)).sum().backward()
        assert network.module.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()

def compresses():
    import numpy as np
    from basicsr.data.degradations import random_add_jpg_compression
    random_add_jpg_compression(np.zeros((8, 8, 3), np.float32), (80.5, 90.5))

def degrades():
    from basicsr.models.realesrnet_model import RealESRNetModel
    RealESRNetModel({"num_gpu": 0, "is_train": False, "dist": False, "path": {},
                     "network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3}})

def runs_as_a_script():  # a repaired module's loader still serves `python -m`
    import runpy
    runpy.run_module("basicsr.train", run_name="copy")

found = {}
checks = (
    imports, resumes, shares_lmdb, pickles_lmdb, distributes, compresses, degrades,
    runs_as_a_script)
for check in checks:
    try:
        check()
        found[check.__name__] = None
    except Exception as error:
        found[check.__name__] = f"{type(error).__name__}: {error}"
found["active"] = [repair.name for repair in _basicsr.REPAIRS if repair.is_active]
print(json.dumps(found))
"""

# A torchvision whose C++ half does not load: its import asks for operators that nobody defined.
TORCHVISION = """
import torch
from torchvision import extension
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
"""
EXTENSION = "_has_ops = lambda: False"
# One whose C++ half does: a second definition of the same operator would fail.
LOADED_EXTENSION = """
import torch
schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
for name in ("nms", "qnms"):
    torch.library.define("torchvision::" + name, schema)
_has_ops = lambda: True
"""
IMPORT_TORCHVISION = """
import sys
from dlgsanet_arch import _basicsr
assert "torchvision" not in sys.modules
_basicsr.REPAIRS = tuple(each for each in _basicsr.REPAIRS if each.name not in sys.argv[1:])
_basicsr.install()
try:
    import torchvision
finally:
    print([repair.name for repair in _basicsr.REPAIRS if repair.is_active])
"""


def _run(script: str, *arguments: str, folder: Path, repository: Path):
    return run(["-c", script, *arguments], folder, path=(folder, repository))


@pytest.fixture
def symptoms(tmp_path, repository):
    """Call it with the names of repairs to leave out; it says which faults show."""

    def found(*without: str) -> dict:
        result = _run(SYMPTOMS, *without, folder=tmp_path, repository=repository)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return found


def test_no_fault_shows_once_repaired(symptoms):
    found = symptoms()
    active = found.pop("active")
    assert not any(found.values()), found
    # Whether torchvision's operators need a repair depends on the torch beside it.
    assert set(active) | {"torchvision operators"} == {repair.name for repair in _basicsr.REPAIRS}


def test_faults_in_basicsr_show_without_their_repairs(symptoms):
    found = symptoms(
        "resume", "shared LMDB", "pickled LMDB", "distributed CPU", "JPEG quality",
        "RealESRNet on a CPU", "RealESRGAN on a CPU",
    )  # fmt: skip
    assert found["imports"] is None
    # On a CPU it asks for CUDA; with CUDA it finds nothing, for it looks in the current folder.
    assert "CUDA" in found["resumes"] or "NVIDIA" in found["resumes"] or "None" in found["resumes"]
    assert "already open in this process" in found["shares_lmdb"]
    assert "cannot pickle" in found["pickles_lmdb"]
    # On a CPU it asks for CUDA; with CUDA it gives the network of a CPU a GPU.
    assert re.search("CUDA|NVIDIA|device_ids", found["distributes"])
    assert "imencode" in found["compresses"]
    assert torch.cuda.is_available() or re.search("CUDA|NVIDIA", found["degrades"])
    assert set(found["active"]) <= {"torchvision operators", "functional_tensor"}


def test_basicsr_does_not_import_without_functional_tensor(symptoms):
    assert "torchvision.transforms.functional_tensor" in symptoms("functional_tensor")["imports"]


OPERATORS = "torchvision operators"
MISMATCH = "raise RuntimeError('CUDA 12 and CUDA 13')"


@pytest.mark.parametrize(
    ("init", "extension", "without", "active", "error"),
    [
        (TORCHVISION, EXTENSION, (), [OPERATORS], ""),
        (TORCHVISION, EXTENSION, (OPERATORS,), [], "operator torchvision::nms does not exist"),
        (TORCHVISION, LOADED_EXTENSION, (), [], ""),
        (MISMATCH, EXTENSION, (), [], "RuntimeError: CUDA 12 and CUDA 13"),
    ],
)
def test_torchvision_imports_without_its_operators_once_repaired(
    tmp_path, repository, init, extension, without, active, error
):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    (package / "extension.py").write_text(extension)
    result = _run(IMPORT_TORCHVISION, *without, folder=tmp_path, repository=repository)
    assert result.stdout.split("\n")[0] == str(active)
    assert error in result.stderr
    assert bool(result.returncode) == bool(error)


def _resume_options(folder: Path, **changes) -> dict:
    paths = {"training_states": str(folder), "models": "/models", "resume_state": None}
    return {"auto_resume": True, "name": "run", "network_g": {}, "path": {**paths, **changes}}


def test_resumes_from_the_highest_iteration(tmp_path):
    names = ("9.state", "10.state", "latest.state", "11.state.tmp", "12.pth")
    for name, iteration in zip(names, (9, 10, 11, 11, 12), strict=True):
        state = {"epoch": 0, "iter": iteration, "weight": torch.ones(2)}
        torch.save(state, tmp_path / name)
    opt = _resume_options(tmp_path)
    state = _basicsr._load_resume_state(opt)
    assert state["iter"] == 10
    assert state["weight"].device.type == "cpu"
    assert opt["path"]["resume_state"] == str(tmp_path / "10.state")
    # BasicSR's own part: the networks saved with the state are the ones to load.
    assert opt["path"]["pretrain_network_g"] == "/models/net_g_10.pth"


def test_nothing_to_resume_from_is_a_new_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        opt = _resume_options(folder)
        assert _basicsr._load_resume_state(opt) is None
        assert _basicsr._load_resume_state({**opt, "auto_resume": False}) is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", "other", "absent"])
def test_a_damaged_state_is_named(tmp_path, content):
    torch.save({"epoch": 0, "iter": 1}, tmp_path / "1.state")
    opt, state = _resume_options(tmp_path), tmp_path / "2.state"
    if content == "absent":
        opt = {**_resume_options(tmp_path, resume_state=str(state)), "auto_resume": False}
    elif content == "other":
        torch.save({"params": {}}, state)
    else:
        state.write_bytes(content)
    with pytest.raises(ResumeError, match=r"2\.state"):
        _basicsr._load_resume_state(opt)


def test_a_function_without_the_fault_is_left_alone():
    def load_resume_state(opt):
        return torch.load(opt["path"]["resume_state"], map_location="cpu")

    assert _basicsr._resume_anywhere(load_resume_state) is None
    assert _basicsr._share_environments(load_resume_state) is None
    assert _basicsr._wrap_on_cpu(load_resume_state) is None
