"""Every key of option files of every model with hostile values: accepted, or refused by its name.

The same seed gives the same values: `FUZZ_SEED=3 pytest -m faults tests/test_fuzz_options.py`.
"""

import contextlib
import copy
import datetime
import math
import os
import random
import time
from pathlib import Path

import pytest
import training_runs
from helpers import small_train_options
from option_cases import ESRGAN, REAL, SWINIR, SYNTHETIC, changed, train_options

from dlgsanet_arch import options as option_files
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.options import load, shipped

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


def paths_of(options):
    """The path of every key of options."""
    waiting = [("", options)]
    for at, content in waiting:
        yield from (f"{at}{key}" for key in content)
        waiting += [
            (f"{at}{key}:", each) for key, each in content.items() if isinstance(each, dict)
        ]


def examine(kind, name, root, registered, draw, count):
    """Check options with hostile values for each key; a fault is named by its key, and soon."""
    train = kind != "test"
    base = kind == "base"
    options = train_options(BASES[name]) if base else load(shipped.find(name, train=train))
    for path in paths_of(options):
        for value in draw.sample(HOSTILE, count):
            hostile = changed(copy.deepcopy(options), {path: value})
            start = time.monotonic()
            found = option_files.problems(hostile, train=train, root=root, registered=registered)
            assert time.monotonic() - start < SLOW, (path, type(value))
            # another choice may be good by itself, and make other keys missing or unfit
            key = path.rpartition(":")[2]
            new = [line for line in found if "does not exist" not in line]
            is_choice = isinstance(value, str | dict | bool)
            assert not new or is_choice or any(key in line for line in new), new


@pytest.mark.parametrize(("kind", "name"), CASES[:-1], ids=str)
def test_each_key_with_a_few_hostile_values(option_root, registered, kind, name):
    examine(kind, name, option_root, registered, random.Random(0), 4)


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "name"), [*CASES, *SHIPPED], ids=str)
def test_each_key_with_every_hostile_value(option_root, registered, kind, name):
    seed = int(os.environ.get("FUZZ_SEED", time.time()))
    print(f"FUZZ_SEED={seed}")
    count = len(HOSTILE) if kind == "base" else 8
    examine(kind, name, option_root, registered, random.Random(seed), count)


# Numbers that are wrong in some places and good in others.
NUMBERS = [2, 5, 7, 9, 16, 64, 1000, 0.1, 1e-8, 1e-30, 1e30, -0.5]
LONG = 100  # iterations, workers, patches: more is allowed, but too slow for a test


@pytest.mark.parametrize("runs", [10, pytest.param(60, marks=pytest.mark.faults)])
def test_what_passes_the_check_runs_or_leaves_nothing(tmp_path, registered, runs):
    seed = int(os.environ.get("FUZZ_SEED", time.time() if runs > 10 else 0))
    print(f"FUZZ_SEED={seed}")
    draw, root = random.Random(seed), training_runs.make_root(tmp_path)
    while runs:
        options = small_train_options(Path("data"))
        options["train"]["total_iter"] = 2
        path = draw.choice([each for each in paths_of(options) if not each.endswith("name")])
        value = draw.choice([*HOSTILE, *NUMBERS])
        options = changed(options, {path: value}) | {"name": f"run{runs}"}
        if option_files.problems(
            copy.deepcopy(options), train=True, root=root, registered=registered
        ) or (isinstance(value, int | float) and value > LONG):
            continue
        run = root / "experiments" / options["name"]
        runs -= 1
        with contextlib.suppress(UserError):
            training_runs.train(root, options)
        # What is known before leaves nothing; a learning rate may be found too high afterwards.
        left = {each.name for each in run.rglob("*")}
        assert not left or left & {"net_g_latest.pth", "non_finite_1.json", "non_finite_2.json"}, (
            path,
            value,
        )
