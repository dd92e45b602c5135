"""Every key of option files of every model with hostile values: accepted, or refused by its name.

The same seed gives the same values: `FUZZ_SEED=3 pytest -m faults tests/test_fuzz_options.py`.
"""

import copy
import datetime
import math
import os
import random
import time

import pytest
from option_cases import ESRGAN, REAL, SWINIR, SYNTHETIC, changed, train_options

from dlgsanet_arch import options as option_files
from dlgsanet_arch.options import Context, load, shipped

HOSTILE = [
    *(None, True, False, 0, 1, -1, 3, 2**32, 10**9, 10**300, -(10**300), 0.5, 1.5, 1e300),
    *(math.nan, math.inf, -math.inf, "", " ", "a", "../..", "/", "~", "~nobody-here/x", "{", "1"),
    *("a\0b", "é" * 5000, "mean", "y", "lmdb", "cuda", "Adam", "L1Loss", "DLGSANet", "EDSR"),
    *("SRModel", "RealESRGANDataset", "CosineAnnealingRestartLR", "calculate_niqe"),
    *("PerceptualLoss", "SRGANModel", "VGGStyleDiscriminator", "sparseedge"),
    *([], [None], [math.nan], [1, 2, 3], [0.5, 0.5], ["a"], [[]], [{}], {}, {"a": 1}, {1: 2}),
    *({"type": "EDSR"}, {"type": {}}, {"a:b": []}, b"a", datetime.date(2024, 1, 1), {1, 2}),
]  # fmt: skip
BASES = {"small": {}, "esrgan": ESRGAN, "swinir": SWINIR, "synthetic": SYNTHETIC, "real": REAL}


def paths_of(options):
    """Every path of an option file, sections too."""
    context = Context(options, True, None, None)
    return [f"{at}:{key}".lstrip(":") for at, content in context.sections() for key in content]


def examine(options, path, value, *, train, root, registered):
    """Check options with one hostile value; a fault is named by its key, and within a second."""
    hostile = changed(copy.deepcopy(options), {path: value})
    start = time.monotonic()
    found = option_files.problems(hostile, train=train, root=root, registered=registered)
    assert time.monotonic() - start < SLOW, (path, type(value))
    # another choice may be good by itself, and make other keys missing, unread or unfit
    key = path.rpartition(":")[2]
    new = [line for line in found if "does not exist" not in line and "no file" not in line]
    assert not new or isinstance(value, str | dict | bool) or any(key in line for line in new), new


SLOW = 4  # seconds, on a busy machine; alone it takes 0.1


def case(kind, name):
    if kind == "base":
        return train_options(BASES[name]), True
    options = load(shipped.path_of(name, train=kind == "train"))
    return options, kind == "train"


CASES = [("test", "tiny_x4"), *(("base", name) for name in BASES)]
SHIPPED = [(k, n) for k in ("train", "test") for n in shipped.names(train=k == "train")]


@pytest.mark.usefixtures("vgg")
@pytest.mark.parametrize(("kind", "name"), CASES[:-1], ids=str)
def test_each_key_with_a_few_hostile_values(option_root, registered, kind, name):
    options, train = case(kind, name)
    draw = random.Random(0)
    for path in paths_of(options):
        for value in draw.sample(HOSTILE, 4):
            examine(options, path, value, train=train, root=option_root, registered=registered)


@pytest.mark.faults
@pytest.mark.usefixtures("vgg")
@pytest.mark.parametrize(("kind", "name"), [*CASES, *SHIPPED], ids=str)
def test_each_key_with_every_hostile_value(option_root, registered, kind, name):
    options, train = case(kind, name)
    seed = int(os.environ.get("FUZZ_SEED", time.time()))
    print(f"FUZZ_SEED={seed}")
    draw = random.Random(seed)
    values = HOSTILE if kind == "base" else draw.sample(HOSTILE, 8)
    for path in paths_of(options):
        for value in values:
            examine(options, path, value, train=train, root=option_root, registered=registered)
