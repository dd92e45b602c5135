import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import yaml
from helpers import decoded, entries, save_image

from dlgsanet_arch.cli import cmd_data
from dlgsanet_arch.data import demo, verify
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.images import read_8_bits
from dlgsanet_arch.data.making import encode_png

HR, X2, X3 = "train_HR_sub.lmdb", "train_LR_bicubic_X2_sub.lmdb", "train_LR_bicubic_X3_sub.lmdb"
PHOTOGRAPHS = ("chelsea.png", "coffee.png", "motorcycle_left.png")


def photograph(name: str) -> np.ndarray:
    return read_8_bits(demo.images_folder() / name).pixels


def save(folder: Path, *names: str, reduce=lambda image: image) -> None:
    for name in names:
        save_image(folder / name, reduce(photograph(name)[:288, :360]))


def halved(hr: np.ndarray) -> np.ndarray:
    return bicubic(hr, 1 / 2)


def by_area(hr: np.ndarray) -> np.ndarray:
    return cv2.resize(hr, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def save_pairs(folder: Path, reduce=halved, names=PHOTOGRAPHS) -> None:
    """Write HR and LR folders, LR made by `reduce`."""
    save(folder / "HR", *names)
    save(folder / "LR", *names, reduce=reduce)


def prepare(*arguments: object) -> int:
    return cmd_data.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A training set of three photographs in 4 sub-images each, at x2 and x3."""
    folder = tmp_path_factory.mktemp("made")
    save(folder / "in", *PHOTOGRAPHS)
    cutting = ("--crop", 240, "--step", 240, "--scale", 2, 3, "--workers", 1)
    assert prepare("train", "--hr", folder / "in", "--out", folder / "out", *cutting) == 0
    return folder / "out"


@pytest.fixture
def training(made, tmp_path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(made, tmp_path / "data"))


@pytest.fixture
def verified(capsys) -> Callable[..., str]:
    """Verify, compare the exit status, and return what is printed."""

    def run(status: int, *arguments: object) -> str:
        capsys.readouterr()
        assert prepare("verify", *arguments) == status
        printed = capsys.readouterr()
        return printed.out or printed.err

    return run


def change(database: Path, make: Callable[[bytes], bytes | None], key: bytes = b"coffee_s003"):
    """Change an entry; None deletes it."""
    with lmdb.open(str(database), map_size=2**26) as file, file.begin(write=True) as write:
        data = make(write.get(key))
        write.delete(key) if data is None else write.put(key, data)


def test_worker_processes_find_the_same(training, verified):
    change(training / X2, lambda _: b"no image", b"coffee_s002")
    one, two = (verified(1, training / HR, training / X2, "--workers", n) for n in (1, 2))
    assert one == two
    assert "coffee_s002: LR is not an image" in one


def without_line(database: Path) -> None:
    meta = database / "meta_info.txt"
    meta.write_text(re.sub("coffee_s003.*\n", "", meta.read_text()))


def without_partner(training: Path) -> None:
    change(training / X3, lambda _: None)
    without_line(training / X3)


def twice(training: Path) -> None:
    for name in (HR, X2, X3):
        data = entries(training / name)["chelsea_s001"]
        change(training / name, lambda _, data=data: data)


def as_bmp(training: Path) -> None:
    for name in (HR, X2, X3):
        change(training / name, lambda data: cv2.imencode(".bmp", decoded(data))[1].tobytes())
    os.remove(training / X2 / "meta_info.txt")


# What breaks a set, what is said of it, and how many of the 12 pairs stay after --fix.
FAULTS = [
    (lambda training: change(training / X3, lambda data: data[:5000]), "LR is cut short", 11),
    (
        lambda training: change(training / X2, lambda data: encode_png(decoded(data)[:-1])),
        "HR has 240 x 240 pixels, and LR's 119 x 120 times 2",
        11,
    ),
    (
        lambda training: change(
            training / X2, lambda data: encode_png(np.roll(decoded(data), (1, 2), (0, 1)))
        ),
        "LR is not the bicubic of its HR image: PSNR ",
        11,
    ),
    (twice, "has the same pixels as chelsea_s001", 11),
    (without_partner, "1 of 12 images in {hr} have no partner in {lr}: 'coffee_s003'", 11),
    (lambda training: change(training / X2, lambda _: None), "that it does not hold: 'coff", 11),
    (lambda training: without_line(training / X2), "and that are never read: 'coffee_s003'", 11),
    (as_bmp, "has no meta_info.txt", 12),
]


@pytest.mark.parametrize(("break_it", "said", "left"), FAULTS)
def test_what_is_wrong_is_said_and_left_out_by_fix(training, break_it, said, left, verified):
    break_it(training)
    before = {path: path.read_bytes() for path in training.rglob("data.mdb")}
    written = verified(1, training, "--fix")
    assert said.format(hr=training / HR, lr=training / X3) in written
    new = [training / f"{name.removesuffix('.lmdb')}_fixed.lmdb" for name in (HR, X2, X3)]
    for name, fixed in zip((HR, X2, X3), new, strict=True):
        assert f"written without what was bad: {fixed}" in written
        kept, whole = entries(fixed), entries(training / name)
        assert len(kept) == left
        assert all(data.startswith(b"\x89PNG") for data in kept.values())
        assert all(np.array_equal(decoded(whole[key]), decoded(kept[key])) for key in kept)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert f"{left} pairs at scale 2: good" in verified(0, *new)


@pytest.mark.parametrize("reduce", [lambda hr: halved(np.roll(hr, 1, 0)), by_area])
def test_lr_that_is_not_bicubic_is_wrong_as_a_set(tmp_path, reduce, verified):
    save_pairs(tmp_path / "X2", reduce)
    said = verified(1, tmp_path)
    assert "wrong: LR is not the bicubic of HR: PSNR " in said
    assert said.count("wrong") == 1
    # LR of another image is named beside that
    shutil.copy(tmp_path / "X2" / "LR" / "chelsea.png", tmp_path / "X2" / "LR" / "coffee.png")
    said = verified(1, tmp_path)
    assert "coffee.png: LR is not the bicubic of its HR image: PSNR " in said


@pytest.fixture
def of_options(training) -> Callable[..., tuple[object, ...]]:
    """The arguments that name an option file of the training set, changed, and of pairs in val."""

    def write(*more: object, **changes: object) -> tuple[object, ...]:
        train = {"name": "mine", "dataroot_gt": HR, "dataroot_lq": X2, "gt_size": 192}
        val = {"name": "held out", "dataroot_gt": "val/HR", "dataroot_lq": "val/LR"}
        sets = {"train": {**train, "io_backend": {"type": "lmdb"}, **changes}}
        sets["val"] = {**val, "io_backend": {"type": "disk"}, "filename_tmpl": "{}"}
        for each in sets.values():
            each["type"] = "PairedImageDataset"
        path = training / "options.yml"
        path.write_text(yaml.safe_dump({"scale": 2, "datasets": sets}))
        return "-opt", path, "--root", training, *more

    return write


def test_the_sets_of_an_option_file_are_opened_and_can_be_chosen(training, of_options, verified):
    said = verified(1, *of_options())
    for part in ("HR", "LR"):
        assert f"wrong: {training / 'val' / part} does not exist" in said
    save_pairs(training / "val", names=("astronaut.png",))
    # a template does not concern databases
    said = verified(0, *of_options(filename_tmpl="{}x2"))
    assert "train (mine): 12 pairs at scale 2: good" in said
    assert "val (held out): 1 pairs at scale 2: good" in said
    for name in ("held out", "val"):
        assert "1 of 1 data sets are good" in verified(0, *of_options("--sets", name))
    said = verified(1, *of_options("--sets", "held_out"))
    assert "has no set held_out; did you mean 'held out'?" in said


def test_images_below_gt_size_are_named_and_do_not_flood(
    training, of_options, monkeypatch, verified
):
    monkeypatch.setattr(verify, "MOST_LISTED", 5)
    save_pairs(training / "val", names=("astronaut.png",))
    said = verified(1, *of_options(gt_size=256))
    assert said.count("HR has 240 x 240 pixels, smaller than 256 x 256 pixels, gt_size") == 5
    assert "and 7 lines more of this kind" in said
    assert "12 of 12 pairs are bad" in said


def test_test_images_inside_the_training_set_are_named(training, of_options, verified):
    save_pairs(training / "val", names=("coffee.png",))
    said = verified(1, *of_options())
    for number in range(1, 5):
        name = training / HR / f"coffee_s00{number}"
        assert f"{name}: shows the same as the test image" in said
    assert str(training / "val" / "HR" / "coffee.png") in said
    assert "chelsea_s001: shows" not in said


def test_folders_are_checked_with_and_without_partners(tmp_path, verified):
    save_pairs(tmp_path / "X2")
    (tmp_path / "X2" / "LR" / "coffee.png").write_bytes(b"")
    (tmp_path / "X2" / "HR" / "more").mkdir()
    said = verified(1, tmp_path / "X2")
    assert "coffee.png: LR is empty" in said
    assert f"BasicSR passes over folders in {tmp_path / 'X2' / 'HR'}: 'more'" in said
    images = (tmp_path / "X2" / "HR").rename(tmp_path / "images")
    assert "3 images: good" in verified(0, images)
    (images / "coffee.png").write_bytes((images / "coffee.png").read_bytes()[:5000])
    assert f"{images / 'coffee.png'}: HR is cut short" in verified(1, images)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone"], "gone does not exist"),
        (["empty"], "no LMDBs or images below"),
        (["-opt", "gone.yml"], "option file gone.yml does not exist"),
        (["-opt", "tiny_x4"], "train_HR_sub.lmdb does not exist"),  # a shipped one, by its name
    ],
)
def test_what_cannot_be_verified_is_named(tmp_path, monkeypatch, arguments, said, verified):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert said in verified(1, *arguments)


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda _: b"not an lmdb" * 1000, lambda data: data[: len(data) // 2]]
)
def test_a_damaged_database_is_named_and_the_others_are_verified(training, damage, verified):
    file = training / X2 / "data.mdb"
    file.write_bytes(damage(file.read_bytes()))
    said = verified(1, training, "--fix")
    assert f"wrong: {training / X2} " in said
    assert f"{training / X3}: 12 pairs at scale 3: good" in said
    assert "1 of 2 data sets are good" in said


def test_the_whole_tree_is_good_as_it_was_made(made, tmp_path, verified):
    root = tmp_path / "datasets"
    save(tmp_path / "HR", "astronaut.png")
    made_sets = ("benchmark", "--name", "Set5", "--hr", tmp_path / "HR", "--scale", 2, 4)
    assert prepare("--root", tmp_path, *made_sets) == 0
    (root / "MINE").symlink_to(made)
    (root / "README.md").write_text("notes")
    (root / "MINE.unfinished").mkdir()
    (root / "again").symlink_to(root)
    said = verified(0, root)
    assert "4 of 4 data sets are good" in said
    for name, scale in ((X2, 2), (X3, 3)):
        assert f"{root / 'MINE' / name}: 12 pairs at scale {scale}: good" in said
    assert said.count("LR is MATLAB's bicubic of HR") == 4
    assert "wrong" not in said
    assert "benchmark/Set5/X4/LR: 1 pairs at scale 4: good" in said


def test_folders_to_train_and_to_test_on_are_detected_by_their_names(tmp_path, verified):
    save(tmp_path / "mine", *PHOTOGRAPHS)
    for name in ("set 14/HR", "val/X2/HR"):  # an image is named once for all
        save(tmp_path / name, "coffee.png")
    said = verified(1, tmp_path)
    assert f"{tmp_path / 'mine' / 'coffee.png'}: shows the same as the test image" in said
    assert said.count("wrong:") == 1


def test_lr_whose_hr_is_gone_is_not_taken_for_images(training, verified):
    assert "12 pairs at scale 2: good" in verified(0, training / X2)
    (training / HR).rename(training / "elsewhere.lmdb")
    said = verified(1, training)
    assert said.count(f"wrong: {training / HR} does not exist") == 2
    assert "1 of 3 data sets are good" in said


def test_lr_may_have_the_scale_in_its_names(tmp_path, verified):
    save_pairs(tmp_path)
    (tmp_path / "HR").rename(tmp_path / "DIV2K_train_HR")
    lr = (tmp_path / "LR").rename(tmp_path / "DIV2K_train_LR_bicubic_X2")
    for path in lr.iterdir():
        path.rename(path.with_name(f"{path.stem}x2.png"))
    assert "3 pairs at scale 2: good" in verified(0, tmp_path)


def test_hr_and_lr_that_were_exchanged_are_detected_by_their_sizes(tmp_path, verified):
    save(tmp_path / "LR", *PHOTOGRAPHS)
    save(tmp_path / "HR", *PHOTOGRAPHS, reduce=halved)
    assert "HR has 144 x 180 pixels, and LR's 288 x 360 times 1" in verified(1, tmp_path)


def database(path: Path, made: dict[bytes, bytes]) -> np.ndarray:
    """Write an LMDB, and return its root page, to be changed in place."""
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as put:
        for key, value in made.items():
            put.put(key, value)
    path.joinpath("meta_info.txt").write_text("".join(f"{key.decode()}.png\n" for key in made))
    pages = np.memmap(path / "data.mdb", np.uint8, "r+").reshape(-1, 4096)
    # MDB_meta has the root behind two headers of 16 and 24 bytes, then the transaction
    newest = max(pages[:2], key=lambda meta: int(meta[144:152].view("<u8")[0]))
    return pages[int(newest[128:136].view("<u8")[0])]


def test_pages_that_lead_around_in_circles_end_in_a_message(tmp_path, verified):
    """Branch pages whose entries all lead to one page: reading all keys would take for ever."""
    path = tmp_path / "train_HR_sub.lmdb"
    root = database(path, {b"%0100d" % number: b"x" for number in range(4000)})
    assert root[10] & 1  # a branch page
    for at in root[16 : int(root[12:14].view("<u2")[0])].view("<u2"):
        root[at : at + 4] = root[int(root[16:18].view("<u2")[0]) :][:4]
    root.base.flush()
    start = time.monotonic()
    said = verified(1, path)
    assert f"wrong: {path} " in said
    assert "is damaged: it does not hold the 4,000 entries" in said
    assert time.monotonic() - start < 10


def test_a_value_beyond_the_file_s_pages_ends_in_a_message(tmp_path, verified):
    """LMDB does not check it and crashes, in a process of its own."""
    path = tmp_path / "train_HR_sub.lmdb"
    root = database(path, {b"a": encode_png(photograph("chelsea.png"))})
    node = int(root[16:18].view("<u2")[0])
    root[node : node + 4].view("<u4")[0] = 2**32 - 4096  # the size of the value
    root.base.flush()
    os.truncate(path / "data.mdb", 2**33)  # a hole: nothing is written
    said = verified(1, path)
    assert f"wrong: {path} cannot be read: a worker process died, SIG" in said


def test_values_in_one_place_end_in_a_message(tmp_path, verified):
    """A file of 0.4 MB whose 100 values are one and the same: more than it has."""
    path, image = tmp_path / "train_HR_sub.lmdb", encode_png(photograph("chelsea.png")[:90, :99])
    assert len(image) > 8192
    root = database(path, {b"00": image, **{b"%02d" % n: b"x" * 2100 for n in range(1, 100)}})
    first, *others = map(int, root[16:216].view("<u2"))
    for node in others:
        root[node : node + 4] = root[first : first + 4]  # the size
        root[node + 10 : node + 18] = root[first + 10 : first + 18]  # the page
    root.base.flush()
    said = verified(1, path)
    assert f"{path} cannot be read: its entries claim more bytes than it has" in said


def test_a_database_of_holes_ends_in_a_message(tmp_path, verified):
    path = tmp_path / "train_HR_sub.lmdb"
    database(path, {b"a": encode_png(photograph("chelsea.png"))})
    pages = np.memmap(path / "data.mdb", np.uint8, "r+").reshape(-1, 4096)
    for meta in pages[:2]:
        meta[32:40].view("<u8")[0] = 2**34  # the size of the map
        meta[136:144].view("<u8")[0] = 2**18  # the last page
    pages.base.flush()
    os.truncate(path / "data.mdb", 2**31)
    assert f"{path} is damaged: most of its bytes are not there" in verified(1, path)


def test_links_in_circles_are_named_and_the_rest_is_read(tmp_path, verified):
    save(tmp_path, *PHOTOGRAPHS)
    for name in ("loop", "loop.png"):
        (tmp_path / name).symlink_to(tmp_path / name)
    said = verified(1, tmp_path)
    assert f"{tmp_path}: 4 images" in said
    assert "BasicSR fails when it reads them: 'loop'; move" in said
    assert "loop.png: HR cannot be opened: Too many levels of symbolic links" in said
    assert "1 of 4 images are bad" in said


def test_too_little_memory_is_said(tmp_path, monkeypatch, verified):
    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(verify, "decode_8_bits", no_memory)
    save_pairs(tmp_path / "X2")
    assert "chelsea.png: HR takes more memory than there is" in verified(1, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "n" * 300], "File name too long"),
        (["train", "--hr", "n" * 300, "-o", "out"], "File name too long"),
        (["train", "--hr", ".", "-o", "chelsea.png"], "chelsea.png cannot be written"),
        (["train", "--hr", ".", "-o", "/proc/x"], "/proc/x cannot be written"),
    ],
)
def test_faults_of_names_and_places_are_named(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "chelsea.png")
    assert prepare(*arguments) == 1
    assert said in capsys.readouterr().err


def test_terminals_see_no_escapes(tmp_path, capsys):
    folder = tmp_path / "\x1b[31m"
    folder.mkdir()
    (folder / "\x1b[2J.png").touch()
    assert prepare("verify", folder) == 1
    said = capsys.readouterr()
    assert "\\x1b[2J.png: HR is empty" in said.out
    assert "\x1b[31m" not in said.out + said.err
