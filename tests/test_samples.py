import random
import re
from pathlib import Path

import cv2
import helpers
import lmdb
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader, StackDataset

from dlgsanet_arch.pipeline.samples import (
    Draw,
    Place,
    Samples,
    Sampling,
    _start_worker,
    collate,
    load,
)


class Dice(torch.utils.data.Dataset):
    """A data set that draws from all three generators."""

    def __init__(self):
        self.opt = {"name": "dice"}

    def __len__(self):
        return 100

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"lq": torch.tensor([index, *drawn], dtype=torch.float64)}


def paired(folder: Path, **changes) -> dict:
    options = helpers.small_train_options(folder)["datasets"]["train"]
    return {**options, "phase": "train", "scale": 2, **changes}


@pytest.fixture
def databases(tmp_path):
    """Options of a training set in LMDBs."""
    helpers.write_pairs(tmp_path / "data", 4)
    options = {"io_backend": {"type": "lmdb"}}
    for key, part in (("dataroot_gt", "HR"), ("dataroot_lq", "LR")):
        out = options[key] = str(tmp_path / f"{part}.lmdb")
        with (
            lmdb.open(out, map_size=1 << 24) as environment,
            environment.begin(write=True) as write,
        ):
            for path in (tmp_path / "data" / part).iterdir():
                write.put(path.stem.encode(), path.read_bytes())
        lines = [f"image{number}.png (48,64,3) 1\n" for number in range(4)]
        Path(out, "meta_info.txt").write_text("".join(lines))
    return options


def test_a_sample_depends_on_seed_epoch_and_position_alone():
    samples = Samples(Dice(), seed=3)

    def drawn(*draw, of=samples):
        return of[Draw(*draw)].content["lq"].tolist()

    once = drawn(1, 20, 7)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert drawn(1, 20, 7) == once
    assert random.getstate() == before[0]  # the process's generators are as they were
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    random.random(), np.random.rand(), torch.rand(3)
    assert drawn(1, 20, 7) == once
    others = [drawn(2, 20, 7), drawn(1, 21, 7), drawn(1, 20, 7, of=Samples(Dice(), seed=4))]
    for other in others:
        assert all(mine != theirs for mine, theirs in zip(once[1:], other[1:], strict=True))


def test_a_worker_starts_where_opencv_has_threads_already():
    cv2.setNumThreads(2)
    large = np.zeros((2000, 2000, 3), np.uint8)
    cv2.resize(cv2.GaussianBlur(large, (9, 9), 2), None, fx=2, fy=2)  # starts its threads
    settings = {"multiprocessing_context": "fork", "timeout": 30}
    loader = load(Samples(Dice()), [[Draw(0, 0, 1)]], 1, pin_memory=False, **settings)
    ((batch, bad),) = loader
    assert batch["lq"][0, 0] == 1
    assert not bad


FAULTS = {
    "missing": (Path.unlink, r"cannot be read \(FileNotFoundError"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("no image"), "cannot be decoded"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be decoded"),
    "too small": (
        lambda path: cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8)),
        r"ValueError: Scale mismatches. GT \(48, 64\) is not 2x  multiplication of LQ \(8, 8\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_with_its_reason(tmp_path, fault):
    helpers.write_pairs(tmp_path, 3)
    samples = Samples(build_dataset(paired(tmp_path)))
    spoil, reason = FAULTS[fault]
    path = tmp_path / "LR/image1.png"
    spoil(path)
    sample = samples[1]
    assert sample.content is None
    (bad,) = sample.bad
    assert bad.dataset == "made"
    assert str(path) in bad.sample
    assert re.search(reason, bad.reason), bad.reason


@pytest.mark.parametrize(
    ("data", "reason"), [(None, "the LMDB has no such key"), (b"", "is empty")]
)
def test_a_bad_entry_of_a_database_is_named_by_database_and_key(databases, data, reason):
    folder = databases["dataroot_lq"]
    with lmdb.open(folder) as environment, environment.begin(write=True) as write:
        write.delete(b"image1")
        if data is not None:
            write.put(b"image1", data)
    (bad,) = Samples(build_dataset(paired(Path("unused"), **databases)))[1].bad
    assert bad.sample == f"{folder}, key 'image1'"
    assert bad.reason == reason


def test_another_sample_takes_the_place_of_a_bad_one(tmp_path):
    helpers.write_pairs(tmp_path, 3)
    samples = Samples(build_dataset(paired(tmp_path)), replace_bad=True)
    images = [tmp_path / f"LR/image{number}.png" for number in range(3)]
    images[2].write_bytes(b"")
    batch, bad = collate([samples[Draw(0, 0, 2)], samples[Draw(0, 0, 1)]])
    assert batch["lq_path"] == [str(images[0]), str(images[1])]
    assert [each.sample for each in bad] == [str(images[2])]
    for image in images:
        image.write_bytes(b"")
    batch, bad = collate([samples[Draw(0, 0, 2)]])
    assert batch is None
    assert {each.sample for each in bad} == set(map(str, images))


def test_samples_are_in_the_order_of_their_paths_whatever_the_disk_s(tmp_path):
    helpers.write_pairs(tmp_path, 3)
    dataset = build_dataset(paired(tmp_path))
    expected = [str(tmp_path / f"LR/image{number}.png") for number in range(3)]
    for order in ([2, 0, 1], [1, 2, 0]):
        by_name = sorted(dataset.paths, key=lambda pair: pair["lq_path"])
        dataset.paths = [by_name[index] for index in order]
        samples = Samples(dataset)
        assert [samples[index].content["lq_path"] for index in range(3)] == expected


@pytest.mark.parametrize(
    "start_method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.faults)]
)
def test_two_data_sets_share_a_database_in_every_kind_of_worker(databases, start_method):
    sets = [Samples(build_dataset(paired(Path("unused"), **databases)), seed=1) for _ in range(2)]
    expected = [each[Draw(0, 0, 1)].content["lq"] for each in sets]  # opened here, too
    loader = DataLoader(
        StackDataset(*sets),
        batch_sampler=[[Draw(0, 0, 1)]],
        num_workers=1,
        collate_fn=list,
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method,
    )
    ((found,),) = loader
    for sample, wanted in zip(found, expected, strict=True):
        assert torch.equal(sample.content["lq"], wanted)


def draws(sampling: Sampling, place: Place, count: int) -> list:
    return [draw for batch in sampling.batches(place, count) for draw in batch]


@pytest.mark.parametrize("ratio", [1, 2.5, 7])
def test_an_epoch_has_every_sample_as_often_as_the_ratio_says(ratio):
    sampling = Sampling(10, ratio, 5)
    first = draws(sampling, Place(), sampling.batches_an_epoch)
    counts = np.bincount([draw.index for draw in first], minlength=10)
    assert sampling.epoch_length == len(first) == int(10 * ratio)
    assert set(counts) <= {int(ratio), int(np.ceil(ratio))}
    assert [draw.position for draw in first] == list(range(len(first)))


def test_epochs_and_seeds_are_shuffled_differently_and_alike_in_every_release():
    one, two = Sampling(50, 1, 5, seed=1), Sampling(50, 1, 5, seed=2)
    orders = [tuple(s.shuffled(epoch)) for s in (one, two) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    # From numpy's legacy generator, whose stream is frozen: a run outlives an upgrade.
    assert orders[1] == tuple(np.random.RandomState([1, 1]).permutation(50))


def test_any_iteration_can_be_gone_on_from():
    sampling = Sampling(11, 1, 2, 2, 1, seed=3)
    whole = list(sampling.batches(Place(), 15))
    place = Place()
    for iteration in range(1, 16):
        place = sampling.after(place)
        assert place == sampling.place_of(iteration)
        rest = list(sampling.batches(place, 15 - iteration))
        assert rest == whole[iteration:]


def test_a_smaller_batch_goes_on_at_the_same_position():
    place = Sampling(20, 1, 8).place_of(1)
    batch = next(Sampling(20, 1, 4).batches(place, 1))
    order = Sampling(20, 1, 4).shuffled(0)
    assert [draw.position for draw in batch] == [8, 9, 10, 11]
    assert [draw.index for draw in batch] == list(order[8:12])
