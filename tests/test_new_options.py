"""`dlgsanet new-options`: option files for a user's own images, and what they are fitted to."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dlgsanet_arch import DLGSANet, cli
from dlgsanet_arch import options as option_files
from dlgsanet_arch.checkpoint import read_checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.options import load, shipped
from dlgsanet_arch.tools import new_options as new_options_tool
from dlgsanet_arch.tools.new_options import parts_of_batch, schedule

GIB = 2**30


def write_images(folder: Path, count: int, size: tuple[int, int] = (200, 212)) -> Path:
    """Write noise of this width and height, with names that a shell splits."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize(size).save(folder / f"it's {index}.png")
    return folder


def new_options(*arguments: object) -> int:
    return cli.main(["new-options", *map(str, arguments)])


def entries(options: dict, path: str = "") -> set[tuple[str, str]]:
    """Path and value of everything in nested options."""
    found = set()
    for key, value in options.items():
        is_section = isinstance(value, dict)
        found |= entries(value, f"{path}{key}:") if is_section else {(path + key, repr(value))}
    return found


def checked(file: Path, root: Path) -> dict:
    """The options of a file to train that has no problems."""
    options = load(file)
    assert option_files.problems(options, train=True, root=root, registered=None) == []
    return options


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_options_tool, "measure_patch", lambda *_: (1 / 16, GIB // 100))
    return tmp_path


@pytest.mark.parametrize(
    ("free", "parts"), [(6.5, 1), (6.4, 1), (6.39, 2), (0.4, 16), (0.39, None)]
)
def test_a_batch_is_divided_to_take_half_of_the_memory(free, parts):
    if parts is None:
        with pytest.raises(UserError, match="more than half of 0"):
            parts_of_batch(GIB // 5, int(free * GIB))
    else:
        assert parts_of_batch(GIB // 5, int(free * GIB + 1)) == parts


@pytest.mark.parametrize(
    ("count", "fine_tuning", "given", "iterations"),
    [
        *[(32_592, False, None, 500_000), (10**6, False, None, 500_000)],
        *[(16_296, False, None, 250_000), (7, False, None, 50_000)],
        *[(7, True, None, 10_000), (7, True, 30, 30)],
    ],
)
def test_the_schedule_follows_the_number_of_pixels(count, fine_tuning, given, iterations):
    values = schedule([(480, 480)] * count, fine_tuning, given)
    assert values["iterations"] == iterations
    assert values["milestones"] == [iterations * part // 100 for part in (50, 80, 90, 95)]
    assert values["period"] == max(1, iterations // 100)
    # one epoch has all iterations, and not much more
    assert 0 <= values["enlarge_ratio"] * count - 16 * iterations < count


def test_a_training_takes_a_day_at_most_and_says_how_long(here, monkeypatch, capsys):
    monkeypatch.setattr(new_options_tool, "measure_patch", lambda *_: (10 / 16, 1))
    write_images(here / "own", 2)
    assert new_options("--hr", "own", "--scale", 2) == 0
    assert load(here / "options/train/tiny_x2_own.yml")["train"]["total_iter"] == 8000
    assert "all of them 22.2 hours" in capsys.readouterr().out
    assert new_options("--hr", "own", "--scale", 2, "--iterations", 9000, "--overwrite") == 0
    assert "all of them 25.0 hours" in capsys.readouterr().out


def test_a_patch_is_measured():
    network = load(shipped.find("tiny_x4", train=True))["network_g"]
    seconds, needed = new_options_tool.measure_patch(network, 8, torch.device("cpu"))
    assert 0 < seconds < 600
    assert 0 <= needed < GIB


@pytest.mark.parametrize(("variant", "scale"), [("tiny", 2), ("light", 3), ("large", 4)])
def test_the_recipe_is_that_of_the_shipped_files(here, variant, scale):
    write_images(here / "own", 2)
    assert new_options("--hr", "own", "--scale", scale, "--variant", variant, "--memory", 64) == 0
    changed = {
        "train": "name|model_type|datasets:.*(name|root_.*|ratio|num_worker_per_gpu)|.*(freq|tile)"
        "|train:(accumulation|total_iter|scheduler:milestones)",
        "test": r"name|datasets:.*(name|root_.*)|datasets:test_[2-5]:.*|path:pretrain.*|val:tile",
    }
    for verb, pattern in changed.items():
        made = load(here / "options" / verb / f"{variant}_x{scale}_own.yml")
        original = load(shipped.find(f"{variant}_x{scale}", train=verb == "train"))
        differing = {path for path, _ in entries(made) ^ entries(original)}
        assert [path for path in differing if not re.fullmatch(pattern, path)] == []


def test_what_is_printed_trains_and_tests(here, capsys):
    hr = write_images(here / "my photos" / "it's & mine", 7)
    few = ("--patch", 8, "--iterations", 2, "--memory", 0.17)
    assert new_options("--hr", hr, "--scale", 4, *few) == 0
    output = capsys.readouterr().out
    assert "8 of 16 patches of 8x8 at once" in output
    options = checked(here / "options/train/tiny_x4_it_s_mine.yml", here)
    assert options["train"]["accumulation"] == 2
    for line in output.partition("next:\n")[2].splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0, line
    weights = "experiments/tiny_x4_it_s_mine/models/net_g_latest.pth"
    assert (here / weights).is_file()
    assert len(list((here / "results").rglob("*.png"))) == 1
    # images are as they were; training and validation have none in common
    listed = (here / options["datasets"]["train"]["dataroot_gt"] / "meta_info.txt").read_text()
    (held_out,) = (here / "datasets/benchmark/it_s_mine_val/held_out/HR").iterdir()
    assert held_out.resolve() == hr / "it's 3.png"
    keys = {line.rpartition("_s")[0] for line in listed.splitlines()}
    assert len(keys) == 6
    assert held_out.stem not in keys
    assert len(list(hr.iterdir())) == 7

    # fine-tuning, on what is prepared now
    prepared = ("--hr", "datasets/it_s_mine", "--weights", weights, "--name", "fine", *few[:2])
    assert new_options(*prepared, "--scale", 4) == 0
    fine = checked(here / "options/train/fine.yml", here)
    assert fine["datasets"] | {"train": 0} == options["datasets"] | {"train": 0}
    assert fine["path"]["pretrain_network_g"] == weights
    assert (fine["train"]["total_iter"], fine["train"]["optim_g"]["lr"]) == (10_000, 1e-4)
    bundled = (*prepared[:2], "--weights", "tiny_x4", "--name", "bundled", *few[:2])
    assert new_options(*bundled, "--scale", 4) == 0
    named = checked(here / "options/train/bundled.yml", here)
    assert named["path"]["pretrain_network_g"] == "tiny_x4"
    capsys.readouterr()
    assert new_options(*prepared[:2], "--val", hr, "--scale", 2) == 1
    assert "train_LR_bicubic_X2_sub.lmdb does not exist" in capsys.readouterr().err
    assert not list((here / "options").rglob("tiny_x2*"))
    weights = DLGSANet(**read_checkpoint("tiny_x4").config).state_dict()
    torch.save({"mine": weights, "params": {"other": torch.zeros(1)}}, here / "mine.pth")
    keyed = (*prepared[:2], "-m", "mine.pth", "--param-key", "mine", "--name", "keyed", *few[:2])
    assert new_options(*keyed, "--scale", 4) == 0
    path = checked(here / "options/train/keyed.yml", here)["path"]
    assert (path["pretrain_network_g"], path["param_key_g"]) == ("mine.pth", "mine")


def test_one_image_in_ten_is_held_out_evenly_spread(here):
    write_images(here / "own", 30, (24, 24))
    assert new_options("--hr", "own", "--scale", 2, "--patch", 8) == 0
    links = (here / "datasets/benchmark/own_val/held_out/HR").iterdir()
    assert {link.resolve().name for link in links} == {f"it's {n}.png" for n in (5, 15, 25)}
    assert len(list((here / "datasets/benchmark/own_val/X2/LR").iterdir())) == 3


def test_given_lr_is_trained_and_validated_on_below_a_root(here, capsys):
    hr, lr, root = write_images(here / "large", 4), here / "small", here / "root"
    lr.mkdir()
    root.mkdir()
    for path in hr.iterdir():
        with Image.open(path) as image:
            image.reduce(4).save(lr / path.name)
    given = ("--hr", hr, "--lr", lr, "--scale", 4, "--root", "root", "--patch", 8)
    assert new_options(*given, "--iterations", 2) == 0
    options = checked(root / "options/train/tiny_x4_large.yml", root)
    assert options["datasets"]["val"]["dataroot_lq"] == "datasets/benchmark/large_val/X4/LR"
    (image,) = (root / "datasets/benchmark/large_val/X4/LR").iterdir()
    assert image.resolve().parent == lr
    train, _ = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    assert cli.main(shlex.split(train)[1:]) == 0
    assert (root / "experiments/tiny_x4_large/models/net_g_2.pth").is_file()
    next(lr.iterdir()).unlink()
    assert new_options(*given, "--overwrite") == 1
    assert "do not pair by name" in capsys.readouterr().err


def test_a_folder_or_a_prepared_set_to_validate_on(here):
    hr, val = write_images(here / "own", 1), write_images(here / "set 5", 1)
    for given in (val, "datasets/benchmark/Set5"):
        assert new_options("--hr", hr, "--scale", 2, "--val", given, "--overwrite") == 0
        options = load(here / "options/test/tiny_x2_own.yml")["datasets"]
        assert list(options) == ["test_1"]
        assert options["test_1"]["name"] == "Set5"
        assert options["test_1"]["dataroot_lq"] == "datasets/benchmark/Set5/X2/LR"
    assert not (here / "datasets/benchmark/own_val").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hr absent", "absent does not exist"),
        ("--hr one", "too few to hold one out"),
        ("--hr bad", "small.png"),
        ("--hr bad", "broken.png"),
        ("--hr .", "folder of images alone"),
        ("--hr own --name ../up", "use letters, digits"),
        ("--hr own --memory nan", "--memory nan: give a number above 0"),
        ("--hr own --iterations 0", "--iterations 0: give"),
        ("--hr own --patch -1", "--patch -1: give"),
        ("--hr own --memory 0.01", "free some memory"),
        ("--hr own --val absent", "absent does not exist"),
        ("--hr own --root absent", "folder absent does not exist"),
        ("--hr own --weights absent.pth", "absent.pth cannot be read"),
        ("--hr own --weights other.pth", "another configuration"),
        ("--hr own --weights other.pth --param-key mine", "no weights under 'mine'"),
        ("--hr own -o /proc/absent", "x4_own.yml cannot be written: /proc: "),
        ("--hr own -o other.pth", "x4_own.yml cannot be written: other.pth"),
    ],
)
def test_bad_input_is_refused_and_no_option_file_written(here, capsys, words, message):
    for name, count in (("own", 2), ("one", 1), ("bad", 2)):
        write_images(here / name, count)
    (here / "bad/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    Image.new("RGB", (100, 300)).save(here / "bad/small.png")
    network = DLGSANet(dim=12, groups=1, blocks=1, upsampler="pixelshuffledirect")
    torch.save({"params": network.state_dict()}, here / "other.pth")
    assert new_options("--scale", 4, *words.split()) == 1
    assert message in capsys.readouterr().err
    assert not (here / "options").exists()
    if "-o" in words:  # found before the work
        assert not (here / "datasets").exists()


def test_files_of_the_user_stay(here, capsys):
    hr = write_images(here / "own", 3)
    mine = here / "options/train/tiny_x4_own.yml"
    link = here / "datasets/benchmark/own_val/held_out/HR/it%27s%201.png"
    for file in (mine, link):
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    assert new_options("--hr", hr, "--scale", 4) == 1
    assert "options/train/tiny_x4_own.yml exist" in capsys.readouterr().err
    assert not (here / "datasets/own").exists()
    assert new_options("--hr", hr, "--scale", 4, "--overwrite") == 1
    assert "exists" in capsys.readouterr().err
    assert (mine.read_text(), link.read_text()) == ("mine", "mine")
    link.unlink()
    for _ in range(2):  # the second time links and data are there
        assert new_options("--hr", hr, "--scale", 4, "--overwrite") == 0
    assert link.resolve() == hr / "it's 1.png"
    assert mine.read_text() != "mine"


def test_odd_paths_are_found_again(here):
    name = "a: b #c 'it' \"twice\" ~x é 画 {b} $c back\\slash"
    write_images(here / name / "set", 2)
    val = here / name / "val" / "X4"
    for side, size in (("HR", (192, 192)), ("LR", (48, 48))):
        (val / side).mkdir(parents=True)
        Image.new("RGB", size).save(val / side / "a.png")
    words = ("--hr", here / name / "set", "--val", val.parent, "--scale", 4, "--name", "291")
    assert new_options(*words) == 0
    options = checked(here / "options/train/291.yml", here)
    assert options["name"] == "291"
    assert here / Path(options["datasets"]["val"]["dataroot_gt"]).expanduser() == val / "HR"
