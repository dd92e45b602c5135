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


CASES = [("test", "tiny_x4"), *(("base", name) for name in BASES)]
SHIPPED = [(k, n) for k in ("train", "test") for n in shipped.names(train=k == "train")]
SLOW = 4  # seconds, on a busy machine; alone it takes 0.1


def examine(kind, name, root, registered, draw, count):
    """Check options with hostile values for each key; a fault is named by its key, and soon."""
    train = kind != "test"
    base = kind == "base"
    options = train_options(BASES[name]) if base else load(shipped.path_of(name, train=train))
    for at, content in Context(options, True, None, None).sections():
        for path in (f"{at}:{key}".lstrip(":") for key in content):
            for value in draw.sample(HOSTILE, count):
                hostile = changed(copy.deepcopy(options), {path: value})
                start = time.monotonic()
                found = option_files.problems(
                    hostile, train=train, root=root, registered=registered
                )
                assert time.monotonic() - start < SLOW, (path, type(value))
                # another choice may be good by itself, and make other keys missing or unfit
                key = path.rpartition(":")[2]
                new = [x for x in found if "does not exist" not in x and "no file" not in x]
                is_choice = isinstance(value, str | dict | bool)
                assert not new or is_choice or any(key in line for line in new), new


@pytest.mark.usefixtures("vgg")
@pytest.mark.parametrize(("kind", "name"), CASES[:-1], ids=str)
def test_each_key_with_a_few_hostile_values(option_root, registered, kind, name):
    examine(kind, name, option_root, registered, random.Random(0), 4)


@pytest.mark.faults
@pytest.mark.usefixtures("vgg")
@pytest.mark.parametrize(("kind", "name"), [*CASES, *SHIPPED], ids=str)
def test_each_key_with_every_hostile_value(option_root, registered, kind, name):
    seed = int(os.environ.get("FUZZ_SEED", time.time()))
    print(f"FUZZ_SEED={seed}")
    count = len(HOSTILE) if kind == "base" else 8
    examine(kind, name, option_root, registered, random.Random(seed), count)
