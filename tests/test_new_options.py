"""`dlgsanet new-options`: option files for one's own pictures, and what they are fitted to."""

import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run
from PIL import Image
from torch import Tensor

from dlgsanet_arch import DLGSANet, cli, cpu
from dlgsanet_arch import options as option_files
from dlgsanet_arch.checkpoint import read_checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.options import load, shipped
from dlgsanet_arch.tools import drafting
from dlgsanet_arch.tools.drafting import Fit, Request, fit, schedule, step_bytes

TINY = {"dim": 48, "groups": 3, "blocks": 3}
GIB = 2**30


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (200, 212)) -> Path:
    """Write noise of this width and height, with a name that a shell takes apart."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize(size).save(folder / f"it's {index}.png")
    return folder


def new_options(*arguments: object) -> int:
    return cli.main(["new-options", *map(str, arguments)])


def next_lines(output: str) -> list[str]:
    return [line.strip() for line in output.partition("next:\n")[2].splitlines()]


def run_lines(lines: list[str]) -> None:
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "dlgsanet"
        assert cli.main(words) == 0, line


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Prints the peak of one training step for each (groups, batch, side), in a process of its own.
MEASURE = """
import os, re, torch
from pathlib import Path
from dlgsanet_arch import DLGSANet

def status(what):
    return int(re.search(rf"{what}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def measure(groups, batch, side):
    network = DLGSANet(
        dim=48, groups=groups, blocks=3, upscale=4, upsampler="pixelshuffledirect",
        buildblock_type="sparseedge", idynamic_num_heads=6, restormer_num_heads=6,
    ).train()
    optimizer = torch.optim.Adam(network.parameters())

    def step(batch, side):
        lr, hr = torch.rand(batch, 3, side, side), torch.rand(batch, 3, 4 * side, 4 * side)
        optimizer.zero_grad()
        torch.nn.functional.l1_loss(network(lr), hr).backward()
        optimizer.step()

    step(1, 8)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(batch, side)
    print(groups, batch, side, status("VmHWM") - before, flush=True)

torch.set_num_threads(1)
for size in ((3, 1, 32), (3, 1, 48), (4, 1, 32), (4, 1, 40)):
    child = os.fork()
    if not child:
        measure(*size)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by Linux's /proc")
def test_a_step_of_tiny_and_light_takes_what_is_said(tmp_path):
    result = run(["-c", MEASURE], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [[int(word) for word in line.split()] for line in result.stdout.splitlines()]
    assert len(lines) == 4, result.stderr
    for groups, batch, side, measured in lines:
        said = step_bytes({**TINY, "groups": groups}, batch * side**2, in_c=not cpu.why_not())
        assert measured <= said <= 1.4 * measured, (groups, batch, side, measured, said)


def test_the_published_step_of_tiny_takes_about_what_the_benchmark_measured():
    # benchmarks/RESULTS.md, "Training steps, CPU", Tiny x4 at 16x48x48, one thread: MiB
    for in_c, measured in ((False, 3135), (True, 2035)):
        assert measured <= step_bytes(TINY, 16 * 48**2, in_c) / 2**20 <= 1.1 * measured


@pytest.mark.parametrize(
    ("free", "patch", "accumulation"),
    [(64, 48, 1), (6.5, 48, 1), (6.4, 48, 2), (3, 48, 4), (0.48, 48, 16), (0.4, 40, 16)],
)
def test_parts_come_before_smaller_patches(free, patch, accumulation):
    found = fit(TINY, int(free * GIB))
    assert (found.patch, found.accumulation) == (patch, accumulation)
    assert found.bytes == step_bytes(TINY, 16 // accumulation * patch**2) <= free * GIB / 2


def test_too_little_memory_is_refused_and_a_given_patch_is_kept():
    with pytest.raises(UserError, match=r"one patch of 24x24 .* --memory"):
        fit(TINY, int(0.1 * GIB))
    assert fit(TINY, 8 * GIB, patch=64) == Fit(64, 2, step_bytes(TINY, 8 * 64**2))
    with pytest.raises(UserError, match="64x64"):
        fit(TINY, int(0.48 * GIB), patch=64)


def test_div2k_gets_the_published_schedule_and_few_pictures_a_shorter_one():
    published = schedule(32592, 32592.0)
    assert published.iterations == 500_000
    assert published.milestones == [250_000, 400_000, 450_000, 475_000]
    assert published.period == 5000
    assert schedule(10**6, 1e6).iterations == 500_000
    half = schedule(16296, 16296.0)
    assert half.iterations == 250_000
    assert schedule(1, 0.1).iterations == 50_000
    assert schedule(1, 0.1, fine_tuning=True).iterations == 10_000
    for plan, count in ((published, 32592), (half, 16296), (schedule(7, 1), 7)):
        # one epoch has all of them
        assert plan.enlarge_ratio * count >= 16 * plan.iterations
        assert (plan.enlarge_ratio - 1) * count < 16 * plan.iterations


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("variant", drafting.VARIANTS)
def test_files_are_the_shipped_ones_but_for_what_is_said(here, variant, scale):
    hr = write_pictures(here / "own", 2)
    made = drafting.draft(Request(hr, scale, variant, free=64 * GIB))
    for train, text in ((True, made.train), (False, made.test)):
        file = shipped.path_of(f"{variant}_x{scale}", train=train)
        ours, theirs = here / "ours.yml", file.read_text()
        ours.write_text(text)
        options, original = load(ours), load(file)
        assert options["network_g"] == original["network_g"]
        assert options["name"] == f"{variant}_x{scale}_own"
        # all that is wrong with it is that the data has not been made yet
        found = option_files.problems(options, train=train, root=here, registered=None)
        assert all("does not exist" in line or "no file" in line for line in found), found
        left_out = theirs[theirs.find("\n  test_2:") : theirs.find("\nnetwork_g:")]
        comments = re.findall("#.*", theirs if train else theirs.replace(left_out, ""))
        lost = [comment for comment in comments if comment not in text]
        assert len(lost) <= 7, lost
        assert "DIV2K" not in text
        assert "Set14" not in text
        assert ":\n# On " not in text
    train = load(shipped.path_of(f"{variant}_x{scale}", train=True))
    for key in ("optim_g", "pixel_opt", "ema_decay"):
        assert train["train"][key] == load_text(made.train, here)["train"][key]
    data = load_text(made.train, here)["datasets"]["train"]
    assert (data["gt_size"], data["batch_size_per_gpu"]) == (48 * scale, 16)


def load_text(text: str, folder: Path) -> dict:
    file = folder / "text.yml"
    file.write_text(text)
    return load(file)


def test_what_is_printed_prepares_trains_and_tests(here, capsys):
    hr = write_pictures(here / "my photos" / "it's & mine", 7)
    few = ("--patch", 8, "--iterations", 2, "--memory", 0.17)
    assert new_options("--hr", hr, "--scale", 4, *few) == 0
    output = capsys.readouterr().out
    assert "1 of 7 pictures are held out" in output
    assert "16 patches of 8x8 in 2 parts" in output
    lines = next_lines(output)
    assert [line.split()[1] for line in lines] == ["data", "data", "train", "test"]
    run_lines(lines[:2])
    options = load(here / "options/train/tiny_x4_it_s_mine.yml")
    assert option_files.problems(options, train=True, root=here, registered=None) == []
    assert options["model_type"] == "DLGSANetModel"
    assert options["train"]["accumulation"] == 2
    listed = (here / options["datasets"]["train"]["dataroot_gt"] / "meta_info.txt").read_text()
    count = len(listed.splitlines())
    assert (
        f"# {count} sub-images of 6 pictures"
        in (here / "options/train/tiny_x4_it_s_mine.yml").read_text()
    )
    run_lines(lines[2:])
    assert (here / "experiments/tiny_x4_it_s_mine/models/net_g_2.pth").is_file()
    assert len(list((here / "results").rglob("*.png"))) == 1
    # the pictures are there as they were, and training and validation have none in common
    assert len(list(hr.iterdir())) == 7
    parts = [
        {
            path.resolve()
            for path in (here / f"datasets/it_s_mine/pictures/{part}").rglob("*")
            if path.is_file()
        }
        for part in ("train", "val")
    ]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {path.resolve() for path in hr.iterdir()}

    # another variant, and fine-tuning, on what is prepared now
    capsys.readouterr()
    weights = here / "experiments/tiny_x4_it_s_mine/models/net_g_latest.pth"
    given = ("--hr", "datasets/it_s_mine", "--scale", 4, "--weights", weights, "--name", "fine")
    assert new_options(*given, *few[:2]) == 0
    lines = next_lines(capsys.readouterr().out)
    assert [line.split()[1] for line in lines] == ["train", "test"]
    fine = load(here / "options/train/fine.yml")
    assert option_files.problems(fine, train=True, root=here, registered=None) == []
    assert fine["datasets"]["val"]["dataroot_gt"] == "datasets/benchmark/it_s_mine_val/X4/HR"
    assert fine["path"]["pretrain_network_g"] == str(weights.relative_to(here))
    assert fine["train"]["total_iter"] == 10_000
    assert fine["train"]["optim_g"]["lr"] == 1e-4
    assert fine["model_type"] == "SRModel"
    assert new_options(*given[:3], 2, *given[4:]) == 1
    assert "there is none of its LR" in capsys.readouterr().err


def test_one_picture_in_ten_is_held_out_evenly_spread(here):
    made = drafting.draft(Request(write_pictures(here / "own", 30, (24, 24)), 2, patch=8))
    held = [target.name for link, target in made.data.links if "val" in link.parts]
    assert held == ["it's 5.png", "it's 15.png", "it's 25.png"]
    assert len(made.data.links) == 30
    assert made.data.pictures == 27


def test_given_lr_is_trained_and_validated_on(here, capsys):
    hr = write_pictures(here / "large", 4)
    lr = here / "small"
    lr.mkdir()
    for path in hr.iterdir():
        with Image.open(path) as image:
            image.reduce(4).save(lr / path.name)
    given = ("--hr", hr, "--lr", lr, "--scale", 4, "--patch", 8, "--iterations", 2)
    assert new_options(*given) == 0
    lines = next_lines(capsys.readouterr().out)
    assert [line.split()[1] for line in lines] == ["data", "train", "test"]
    run_lines(lines[:2])
    options = load(here / "options/train/tiny_x4_large.yml")
    folder = here / options["datasets"]["val"]["dataroot_lq"]
    (picture,) = folder.iterdir()
    assert picture.resolve().parent == lr
    # a partner that is missing is named
    next(lr.iterdir()).unlink()
    assert new_options(*given, "--overwrite") == 1
    assert "do not pair by name" in capsys.readouterr().err


def test_a_folder_or_a_prepared_set_to_validate_on(here, capsys):
    hr, val = write_pictures(here / "own", 3), write_pictures(here / "set 5", 1)
    assert new_options("--hr", hr, "--scale", 2, "--val", val) == 0
    lines = next_lines(capsys.readouterr().out)
    assert lines[0] == "dlgsanet data train --hr own --scale 2 --out datasets/own"
    assert lines[1] == "dlgsanet data benchmark --name Set5 --hr 'set 5' --scale 2"
    run_lines(lines[1:2])
    capsys.readouterr()
    prepared = ("--val", "datasets/benchmark/Set5", "--overwrite", "--variant", "light")
    assert new_options("--hr", hr, "--scale", 2, *prepared) == 0
    lines = next_lines(capsys.readouterr().out)
    assert [line.split()[1] for line in lines] == ["data", "train", "test"]
    options = load(here / "options/test/light_x2_own.yml")
    assert list(options["datasets"]) == ["test_1"]
    assert options["datasets"]["test_1"]["name"] == "Set5"
    assert options["datasets"]["test_1"]["dataroot_lq"] == "datasets/benchmark/Set5/X2/LR"
    assert not (here / "datasets/own").exists()


def test_prepared_data_is_held_against_scale_and_patch(here, capsys):
    hr = write_pictures(here / "own", 3)
    made = ("--scale", 2, "--out", "datasets/own")
    assert cli.main(["data", "train", "--hr", str(hr), *map(str, made)]) == 0
    database = here / "datasets/own/train_HR_sub.lmdb"
    assert new_options("--hr", database, "--scale", 2) == 0
    assert "validation is on Set5" in capsys.readouterr().out
    for words, said in (
        (("--scale", 4), "there is none of its LR"),
        (("--scale", 4, "--lr", database.with_name("train_LR_bicubic_X2_sub.lmdb")), "at scale 4"),
        (("--scale", 2, "--patch", 128), "smaller than one patch of 256x256"),
    ):
        assert new_options("--hr", database, *words, "--overwrite") == 1
        assert said in capsys.readouterr().err
    (database / "meta_info.txt").write_text("nothing\n")
    assert new_options("--hr", database, "--scale", 2, "--overwrite") == 1
    assert "has the line 'nothing'" in capsys.readouterr().err


def test_bad_pictures_are_named_and_nothing_is_written(here, capsys):
    hr = write_pictures(here / "own", 3)
    (hr / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    (hr / "empty.jpg").touch()
    Image.new("RGB", (100, 300)).save(hr / "small.png")
    assert new_options("--hr", hr, "--scale", 4) == 1
    error = capsys.readouterr().err
    assert "3 of 6 pictures cannot be used" in error
    assert "small.png is 100x300, smaller than one patch of 192x192" in error
    assert "broken.png cannot be read" in error
    assert "empty.jpg" in error
    assert [path.name for path in here.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hr", "absent"), "absent does not exist"),
        (("--hr", "own", "--name", "../up"), "cannot be a run's name"),
        (("--hr", "own", "--name", "a\nb: c"), "cannot be written into an option file"),
        (("--hr", "own", "--memory", "nan"), "--memory nan"),
        (("--hr", "own", "--memory", "inf"), "--memory inf"),
        (("--hr", "own", "--memory", "0.01"), "free some memory"),
        (("--hr", "own", "--iterations", "0"), "--iterations 0"),
        (("--hr", "own", "--patch", "-1"), "--patch -1"),
        (("--hr", "own", "--val", "absent"), "absent does not exist"),
        (("--hr", "own", "--root", "absent"), "there is no folder absent"),
        (("--hr", "own", "--weights", "absent.pth"), "there is no file absent.pth"),
        (("--hr", "one"), "too few to hold one out"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(here, capsys, words, said):
    write_pictures(here / "own", 3)
    write_pictures(here / "one", 1)
    assert new_options("--scale", 4, *words) == 1
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["one", "own"]


def test_weights_of_another_network_are_refused(here, capsys):
    hr = write_pictures(here / "own", 3)
    network = DLGSANet(
        dim=12,
        groups=1,
        blocks=1,
        buildblock_type="sparseedge",
        upscale=4,
        upsampler="pixelshuffledirect",
    )
    weights: dict[str, Tensor] = network.state_dict()
    torch.save({"params": weights}, here / "other.pth")
    assert new_options("--hr", hr, "--scale", 4, "--weights", "other.pth") == 1
    assert "--weights: " in capsys.readouterr().err
    (here / "w.safetensors").touch()
    assert new_options("--hr", hr, "--scale", 4, "--weights", "w.safetensors") == 1
    assert "`dlgsanet convert w.safetensors w.pth`" in capsys.readouterr().err
    assert not (here / "options").exists()
    assert read_checkpoint(here / "other.pth").scale == 4


def test_files_of_the_user_s_stay(here, capsys):
    hr = write_pictures(here / "own", 3)
    mine = here / "options/train/tiny_x4_own.yml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert new_options("--hr", hr, "--scale", 4) == 1
    assert f"{mine.relative_to(here)} exist already" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert not (here / "datasets").exists()
    kept = here / "datasets/own/pictures/train/kept.png"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    assert new_options("--hr", hr, "--scale", 4, "--overwrite") == 1
    assert "holds other files" in capsys.readouterr().err
    assert (kept.read_text(), mine.read_text()) == ("kept", "mine")
    shutil.rmtree(kept.parent)
    assert new_options("--hr", hr, "--scale", 4, "--overwrite") == 0
    # links to other pictures are replaced when that is asked for
    write_pictures(here / "else", 1)
    (here / "else/it's 0.png").rename(hr / "more.png")
    again = ("--hr", hr, "--scale", 4, "-o", "other")
    assert new_options(*again) == 1
    assert "holds links to other pictures" in capsys.readouterr().err
    assert new_options(*again, "--overwrite") == 0


def test_odd_paths_come_back_out_of_the_file(here):
    for name in ("a: b #c", "'quoted' \"twice\"", "~x", "-dash", "é 画", "{brace}", "back\\slash"):
        hr = write_pictures(here / name / "set", 2)
        root = here / name
        made = drafting.draft(Request(hr, 4, val=hr, root=here, start=None, name="291"))
        options = load_text(made.train, here)
        assert options["name"] == "291"
        value = drafting._in_file(root / "~weights.pth", here)
        text = drafting._Text(made.train)
        text.set("path:pretrain_network_g", value)
        assert load_text(text.text, here)["path"]["pretrain_network_g"] == value
        assert here / Path(value).expanduser() == root / "~weights.pth"
        (command, *_) = drafting.next_commands(Request(hr, 4), made, here)
        words = shlex.split(command)
        assert Path(words[words.index("--hr") + 1]).absolute() == hr.absolute()


def test_large_pictures_are_validated_in_tiles(here):
    hr = write_pictures(here / "own", 3, (1200, 1200))
    assert "  tile: " not in drafting.draft(Request(hr, 4, free=8 * GIB)).train
    made = drafting.draft(Request(hr, 4, free=int(0.5 * GIB), patch=8))
    for text in (made.train, made.test):
        assert load_text(text, here)["val"]["tile"] == 256


def test_sub_images_are_counted_as_they_are_cut():
    # BasicSR's rule at 480 every 240: 2040x1356 of DIV2K gives 8 x 5
    count, worth = drafting._count([(1356, 2040), (321, 481)])
    assert count == 8 * 5 + 1
    assert math.isclose(worth, 40 + 312 * 480 / 480**2)


def test_the_verb_has_a_dash_and_the_help_its_column(capsys):
    assert "new-options" in cli.verbs()
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if re.match(r"  [a-z]", line)]
    assert len(listed) == len(cli.verbs())
    column = 2 + max(map(len, cli.verbs())) + 1
    assert all(line[column - 1] == " " != line[column] for line in listed)
    assert cli.main(["new_options"]) == 2
    assert "did you mean 'new-options'?" in capsys.readouterr().err
