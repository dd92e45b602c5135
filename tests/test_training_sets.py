import resource
import signal
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import lmdb
import numpy as np
import pytest
import yaml
from basicsr.utils.lmdb_util import LmdbMaker
from basicsr.utils.matlab_functions import imresize
from helpers import decoded_entries as entries
from helpers import entries as raw_entries
from helpers import noisy_image
from helpers import save_image as save
from PIL import Image
from processes import started

from dlgsanet_arch import files
from dlgsanet_arch.cli import cmd_data
from dlgsanet_arch.data import databases
from dlgsanet_arch.data import workers as workers_module

HR, X2, X3, X4 = (
    f"train_{part}_sub.lmdb" for part in ("HR", *(f"LR_bicubic_X{s}" for s in (2, 3, 4)))
)
# The smallest images that scale 4 takes are 192 x 192.
CROP, STEP = 96, 60


def image(name: str, height: int = 205, width: int = 250) -> np.ndarray:
    return noisy_image([*name.encode()], (height, width))


@pytest.fixture
def hr(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("b", "a", "night 1"):
        save(folder / f"{name}.png", image(name))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "datasets" / "mine"


def train(hr: Path, out: Path, *more: object) -> int:
    cutting = ("--crop", CROP, "--step", STEP, "--workers", 1)
    arguments = ("train", "--hr", hr, "--out", out, *cutting, *more)
    return cmd_data.main([str(argument) for argument in arguments])


def lr_by_basicsr(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Return BasicSR's LR in levels before they are rounded."""
    return (imresize(pixels.astype(np.float32) / 255, 1 / scale) * 255).clip(0, 255)


def assert_equal_but_for_ties(ours: np.ndarray, exact: np.ndarray) -> None:
    """Compare with values before rounding: only half-way between two levels either may be taken."""
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() < 0.5 + 1e-4


def corners_by_basicsrs_rule(length: int) -> list[int]:
    regular = list(np.arange(0, length - CROP + 1, STEP))
    return regular + ([length - CROP] if length - (regular[-1] + CROP) > 0 else [])


def expected_entries(name: str, key: str, scale: int) -> dict[str, np.ndarray]:
    whole = image(name)[:204, :240]
    part = whole if scale == 1 else lr_by_basicsr(whole, scale)
    places = [
        (top // scale, left // scale)
        for top in corners_by_basicsrs_rule(204)
        for left in corners_by_basicsrs_rule(240)
    ]
    side = CROP // scale
    return {
        f"{key}_s{number:03d}": part[top : top + side, left : left + side]
        for number, (top, left) in enumerate(places, 1)
    }


def test_every_sub_image_is_the_one_that_basicsr_would_make(hr, out, capsys):
    assert train(hr, out) == 0
    assert sorted(path.name for path in out.iterdir()) == [HR, X2, X3, X4]
    for scale, name in ((1, HR), (2, X2), (3, X3), (4, X4)):
        expected = {}
        for stem, key in (("a", "a"), ("b", "b"), ("night 1", "night%201")):
            expected |= expected_entries(stem, key, scale)
        found = entries(out / name)
        assert found.keys() == expected.keys()
        assert len(found) == 3 * 3 * 4
        for key, part in found.items():
            assert_equal_but_for_ties(part, expected[key])
    said = capsys.readouterr().out
    size = (out / HR / "data.mdb").stat().st_size / 2**20
    assert f"36 sub-images {size:>8.1f} MiB  {out / HR}" in said
    assert "3 images" in said


def test_meta_info_is_what_basicsrs_writer_writes(hr, out, tmp_path):
    assert train(hr, out, "--scale", 3) == 0
    for name in (HR, X3):
        maker = LmdbMaker(str(tmp_path / name), map_size=2**24, compress_level=1)
        for key, part in sorted(entries(out / name).items()):
            maker.put(b"", key, part.shape)
        maker.close()
        theirs = (tmp_path / name / "meta_info.txt").read_bytes()
        assert (out / name / "meta_info.txt").read_bytes() == theirs


def test_shipped_option_files_name_the_tree(repository):
    for path in sorted((repository / "options" / "train").glob("tiny_x?.yml")):
        options = yaml.safe_load(path.read_text())["datasets"]["train"]
        for root in (options["dataroot_gt"], options["dataroot_lq"]):
            assert root in [f"datasets/DIV2K/{name}" for name in (HR, X2, X3, X4)]


def test_what_is_finished_is_not_made_again(hr, out, capsys):
    assert train(hr, out, "--scale", 2) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train(hr, out, "--scale", 2) == 0
    assert "3 of them cut already" in capsys.readouterr().out
    assert train(hr, out, "--scale", 4) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert entries(out / HR).keys() == entries(out / X4).keys()


# Parts that overlap by much make many entries of few images.
MANY = ("--scale", 2, "--step", 12)


def test_after_kill_9_the_next_run_continues(hr, out, capsys):
    for number in range(16):
        save(hr / f"more{number:02d}.png", image(f"more{number}"))
    growing = out / f"{HR}.unfinished" / "data.mdb"
    with started(train, hr, out, *MANY) as process:
        deadline = time.monotonic() + 60
        while not (growing.is_file() and growing.stat().st_size > 5_000_000):
            assert process.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert not (out / HR).exists()
    assert not (out / X2).exists()
    assert train(hr, out, *MANY) == 0
    assert "of them cut already by an earlier run" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [HR, X2]
    assert train(hr, out.with_name("whole"), *MANY) == 0
    for name in (HR, X2):
        ours, whole = raw_entries(out / name), raw_entries(out.with_name("whole") / name)
        assert len(ours) == 19 * 10 * 13
        assert ours == whole
        lists = [
            (each / name / "meta_info.txt").read_bytes() for each in (out, out.with_name("whole"))
        ]
        assert lists[0] == lists[1]


def train_with_little_room(said: Path, hr: Path, out: Path) -> None:
    """Train where no file can grow beyond 2 MB; what is said goes into a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    with said.open("w") as file, redirect_stderr(file):
        status = train(hr, out, *MANY)
    sys.exit(status)


def test_a_full_disk_is_named_and_loses_nothing(hr, out, tmp_path, monkeypatch):
    said = tmp_path / "said.txt"
    with started(train_with_little_room, said, hr, out) as process:
        process.join(60)
        assert process.exitcode == 1
    assert f"{out} cannot be written: mdb_" in said.read_text()
    assert not (out / HR).exists()
    monkeypatch.setattr(databases, "FIRST_MAP_SIZE", 2**16)  # it grows as needed
    assert train(hr, out, *MANY) == 0
    assert len(entries(out / HR)) == 3 * 10 * 13


def test_worker_processes_make_the_same(hr, out, tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "ITEMS_A_WORKER", 4)
    for number in range(5):
        save(hr / f"more{number}.png", image(f"more{number}"))
    for workers in (1, 2):
        assert train(hr, tmp_path / str(workers), "--workers", workers) == 0
    for name in (HR, X2, X3, X4):
        one, two = (tmp_path / workers / name / "data.mdb" for workers in ("1", "2"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("size", "kept", "reason"),
    [
        ((205, 250), 5000, "cut short"),
        ((205, 250), 0, "zero bytes"),
        ((250, 95), None, "95 x 250 pixels, both sides must be 96"),
    ],
)
def test_a_bad_image_is_named_before_anything_is_written(hr, out, capsys, size, kept, reason):
    bad = hr / "bad.png"
    save(bad, image("bad", *size))
    bad.write_bytes(bad.read_bytes()[:kept])
    assert train(hr, out, "--scale", 2) == 1
    said = capsys.readouterr().err
    assert f"{bad} " in said
    for part in (reason, "1 of 4 images", "--skip-bad"):
        assert part in said
    assert not out.exists()
    assert train(hr, out, "--scale", 2, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "3 images" in said
    assert str(bad) in said
    assert {key.split("_s")[0] for key in entries(out / HR)} == {"a", "b", "night%201"}


def test_scales_share_hr_only_if_they_leave_out_the_same(hr, out, capsys):
    save(hr / "small.png", image("small", 120, 130))
    assert train(hr, out, "--scale", 4, "--skip-bad") == 0
    assert train(hr, out, "--scale", 2) == 1
    assert f"{out / HR} is another data set: of other images" in capsys.readouterr().err
    assert train(hr, out, "--scale", 3, 4, "--skip-bad") == 0
    assert entries(out / HR).keys() == entries(out / X3).keys()
    assert len(entries(out / HR)) == 36


def test_what_is_changed_on_reading_is_said(hr, out, capsys):
    save(hr / "deep.png", image("deep").astype(np.uint16) * 257)
    save(hr / "clear.png", np.dstack([image("clear"), np.full((205, 250), 100, np.uint8)]))
    assert train(hr, out, "--scale", 2) == 0
    said = capsys.readouterr().out
    assert "1 x holds 16 bits a sample; they were rounded to 8" in said
    assert "1 x has transparent parts; it was composited on white" in said
    assert np.array_equal(entries(out / HR)["deep_s001"], image("deep")[:CROP, :CROP])


def test_images_are_read_by_every_name_of_their_format_or_counted(hr, out, capsys):
    for number, name in enumerate(("c.jfif", "d.JPE")):
        Image.fromarray(noisy_image(number, (200, 200))).save(hr / name, "JPEG")
    for name in ("e.heic", "sub/f.gif", "notes.txt"):
        (hr / name).parent.mkdir(exist_ok=True)
        (hr / name).touch()
    assert train(hr, out, "--scale", 2) == 0
    said = capsys.readouterr().out
    assert "\n5 images\n" in said
    assert said.endswith("not read: 1 .gif, 1 .heic; convert them to PNG first\n")
    assert {"c_s001", "d_s001"} <= raw_entries(out / "train_HR_sub.lmdb").keys()
    assert train(hr / "sub", out) == 1
    assert "there are files that are not read: 1 .gif" in capsys.readouterr().err


def given_lr(hr: Path, folder: Path, scale: int, template: str) -> dict[str, np.ndarray]:
    made = {}
    for path in hr.glob("*.png"):
        pixels = image(path.stem)[: 205 // scale * scale, : 250 // scale * scale]
        made[path.stem] = 255 - pixels[::scale, ::scale]  # nothing that bicubic would make
        save(folder / template.format(path.stem), made[path.stem])
    return made


@pytest.mark.parametrize("template", ["{}x2.png", "{}.png"])
def test_given_lr_is_taken(hr, out, tmp_path, template):
    made = given_lr(hr, tmp_path / "lr", 2, template)
    assert train(hr, out, "--scale", 2, "--lr", tmp_path / "lr") == 0
    found = entries(out / X2)
    assert np.array_equal(found["a_s001"], made["a"][: CROP // 2, : CROP // 2])
    last = made["night 1"][:102, :120][-CROP // 2 :, -CROP // 2 :]
    assert np.array_equal(found["night%201_s012"], last)


def test_given_lr_of_several_scales_lies_in_folders(hr, out, tmp_path, capsys):
    for scale in (2, 3, 4):
        given_lr(hr, tmp_path / "LR" / f"X{scale}", scale, f"{{}}x{scale}.png")
    assert train(hr, out, "--lr", tmp_path / "LR") == 0
    assert {part.shape for part in entries(out / X4).values()} == {(24, 24, 3)}
    assert train(hr, out.with_name("flat"), "--lr", tmp_path / "LR" / "X2", "--scale", 2, 3) == 1
    assert "holds no folder X2, or more than one" in capsys.readouterr().err


def test_lr_that_does_not_belong_is_named(hr, out, tmp_path, capsys):
    lr = tmp_path / "lr"
    given_lr(hr, lr, 2, "{}x2.png")
    (lr / "ax2.png").rename(lr / "cx2.png")
    assert train(hr, out, "--scale", 2, "--lr", lr) == 1
    said = capsys.readouterr().err
    assert f"2 have no partner: {hr / 'a.png'}, {lr / 'cx2.png'}" in said
    (lr / "cx2.png").unlink()
    save(lr / "ax2.png", image("a", 101, 125))
    assert train(hr, out, "--scale", 2, "--lr", lr) == 1
    said = capsys.readouterr().err
    assert "ax2.png has 101 x 125 pixels" in said
    assert "LR must have 102 x 125" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "scales", "use"), [("--crop 100", [3], 99), ("--step 1", [3, 2], 6)]
)
def test_settings_that_do_not_fit_are_refused(hr, out, setting, scales, use, capsys):
    assert train(hr, out, "--scale", *scales, *setting.split()) == 1
    said = f"{setting} is not a multiple of scale {min(scales)}: LR could not be cut to match"
    assert f"{said}; use {use}" in capsys.readouterr().err
    assert not out.exists()


def test_a_set_of_other_images_or_settings_is_not_replaced_unasked(hr, out, capsys):
    assert train(hr, out, "--scale", 2) == 0
    before = entries(out / HR)
    assert train(hr, out, "--scale", 2, "--step", 48) == 1
    assert "step 60, not 48" in capsys.readouterr().err
    save(hr / "c.png", image("c"))
    assert train(hr, out, "--scale", 2) == 1
    said = capsys.readouterr().err
    assert "of other images" in said
    assert "--overwrite" in said
    assert entries(out / HR).keys() == before.keys()
    assert train(hr, out, "--scale", 2, "--overwrite") == 0
    assert len(entries(out / HR)) == 48
    assert sorted(path.name for path in out.iterdir()) == [HR, X2]


def test_what_was_not_made_here_or_was_changed_is_not_touched(hr, out, capsys):
    (out / HR).mkdir(parents=True)
    (out / HR / "precious.txt").write_text("mine")
    assert train(hr, out, "--scale", 2) == 1
    assert "was not made by this command" in capsys.readouterr().err
    assert [path.name for path in out.rglob("*")] == [HR, "precious.txt"]
    (out / HR / "precious.txt").unlink()
    assert train(hr, out, "--scale", 2) == 0
    with (
        lmdb.open(str(out / HR), map_size=2**26) as environment,
        environment.begin(write=True) as w,
    ):
        w.delete(b"a_s001")
    assert train(hr, out, "--scale", 2) == 1
    assert "was changed after it was made: 35 entries" in capsys.readouterr().err
    assert train(hr, out, "--scale", 2, "--overwrite") == 0
    assert len(entries(out / HR)) == 36


def test_two_runs_on_one_folder_do_not_mix(hr, out, capsys):
    with files.one_writer(out):
        assert train(hr, out) == 1
    assert "another process is at work" in capsys.readouterr().err
