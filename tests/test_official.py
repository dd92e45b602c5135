from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import decoded, tarred, zipped
from helpers import decoded_entries as entries
from http_server import Served, proxies, serving

from dlgsanet_arch.cli import cmd_data
from dlgsanet_arch.data import downloads, official
from dlgsanet_arch.errors import UserError

HR, X2 = "train_HR_sub.lmdb", "train_LR_bicubic_X2_sub.lmdb"
NAMES = ("0001", "0002", "0003")


def png(number: int, side: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


# What only the official archive holds: no bicubic of HR, so that LR of our own is told from it.
LR_IMAGES = {name: png(100 + int(name), 48) for name in NAMES}
HR_IMAGES = {name: png(int(name), 96) for name in NAMES}


def archive_of(images: dict[str, bytes], name: str = "DIV2K_train_HR/{}.png") -> bytes:
    return zipped((name.format(key), data) for key, data in images.items())


HR_ZIP = archive_of(HR_IMAGES)
LR_ZIP = archive_of(LR_IMAGES, "DIV2K_train_LR_bicubic/X2/{}x2.png")
FLICKR2K = tarred(
    [
        ("Flickr2K/Flickr2K_HR/000001.png", png(7, 96)),
        ("Flickr2K/Flickr2K_LR_bicubic/X2/000001x2.png", png(107, 48)),
    ]
)


@pytest.fixture
def server(monkeypatch):
    for name in proxies():
        monkeypatch.delenv(name)
    monkeypatch.setattr(downloads, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(official, "DIV2K", official.DIV2K._replace(images=3))
    monkeypatch.setattr(official, "FLICKR2K", official.FLICKR2K._replace(images=1))
    with serving(b"") as served:
        served.others = {
            "/DIV2K_train_HR.zip": HR_ZIP,
            "/DIV2K_train_LR_bicubic_X2.zip": LR_ZIP,
            "/Flickr2K.tar": FLICKR2K,
        }
        yield served


def asked(server: Served) -> list[str]:
    targets = [each["target"] for each in server.requests]
    server.requests.clear()
    return targets


def make(verb: str, root: Path, server: Served, *more: object) -> int:
    mirror = server.url.rpartition("/")[0]
    cutting = ("--scale", 2, "--crop", 96, "--step", 48, "--patch", 24, "--workers", 1)
    arguments = ("--root", root, verb, "--mirror", mirror, *cutting, *more)
    return cmd_data.main([str(argument) for argument in arguments])


def check_div2k(folder: Path, names=NAMES) -> None:
    for database, images in ((HR, HR_IMAGES), (X2, LR_IMAGES)):
        found = entries(folder / database)
        assert found.keys() == {f"{name}_s001" for name in names}
        for name in names:
            assert np.array_equal(found[f"{name}_s001"], decoded(images[name]))


def test_div2k_is_downloaded_over_broken_connections_with_its_own_lr(tmp_path, server, capsys):
    hr, lr = "/DIV2K_train_HR.zip", "/DIV2K_train_LR_bicubic_X2.zip"
    server.cuts = [len(HR_ZIP) // 2, 0, 0, 0]
    assert make("div2k", tmp_path, server) == 1
    said = capsys.readouterr().err
    assert "DIV2K_train_HR.zip cannot be downloaded: " in said
    assert "Run the same command again to resume" in said
    assert "Wanted from" in said
    assert f"after that: {lr[1:]}" in said
    assert not (tmp_path / "datasets" / "DIV2K" / HR).exists()
    server.requests.clear()
    assert make("div2k", tmp_path, server) == 0
    assert server.requests[0]["Range"] == f"bytes={len(HR_ZIP) // 2}-"
    assert asked(server) == [hr, lr]
    check_div2k(tmp_path / "datasets" / "DIV2K")
    assert "3 images" in capsys.readouterr().out
    assert make("div2k", tmp_path, server) == 0
    assert asked(server) == []


@pytest.mark.parametrize("place", ["datasets", "datasets/DIV2K", "elsewhere"])
def test_archives_that_are_there_are_not_downloaded(tmp_path, server, place):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "DIV2K_train_HR.zip").write_bytes(HR_ZIP)
    (folder / "DIV2K_train_LR_bicubic_X2.zip").write_bytes(LR_ZIP)
    more = ("--archives", folder) if place == "elsewhere" else ()
    assert make("div2k", tmp_path, server, *more) == 0
    assert asked(server) == []
    check_div2k(tmp_path / "datasets" / "DIV2K")


@pytest.mark.parametrize(
    "lr", ["DIV2K_train_LR_bicubic/X2", "DIV2K_train_LR_bicubic_X2", "DIV2K_train_LR_bicubic_X2/X2"]
)
def test_folders_that_are_there_are_taken(tmp_path, server, lr):
    folder = tmp_path / "datasets" / "DIV2K"
    for place, images, end in (("DIV2K_train_HR", HR_IMAGES, ""), (lr, LR_IMAGES, "x2")):
        (folder / place).mkdir(parents=True)
        for name, data in images.items():
            (folder / place / f"{name}{end}.png").write_bytes(data)
    assert make("div2k", tmp_path, server) == 0
    assert asked(server) == []
    check_div2k(folder)


def test_df2k_is_both_sets_in_one(tmp_path, server):
    assert make("df2k", tmp_path, server) == 0
    assert sorted(set(asked(server))) == sorted(server.others)
    found = entries(tmp_path / "datasets" / "DF2K" / X2)
    assert found.keys() == {*(f"{name}_s001" for name in NAMES), "000001_s001"}
    assert np.array_equal(found["000001_s001"], decoded(png(107, 48)))
    assert np.array_equal(found["0002_s001"], decoded(LR_IMAGES["0002"]))


def test_archives_that_are_not_the_official_ones_are_refused(tmp_path, server, capsys):
    for path, scale in (("/DIV2K_train_HR.zip", ""), ("/DIV2K_train_LR_bicubic_X2.zip", "x2")):
        server.others[path] = archive_of({f"0001{scale}": png(1, 96)})
    assert make("div2k", tmp_path, server) == 1
    assert "DIV2K has 3 training images and" in capsys.readouterr().err
    assert not (tmp_path / "datasets" / "DIV2K" / HR).exists()
    server.others["/Flickr2K.tar"] = tarred([("a/1.png", b"1"), ("b/2.png", b"2")])
    server.others |= {"/DIV2K_train_HR.zip": HR_ZIP, "/DIV2K_train_LR_bicubic_X2.zip": LR_ZIP}
    assert make("df2k", tmp_path / "other", server) == 1
    assert "it is not the official archive" in capsys.readouterr().err


def test_a_damaged_image_in_an_archive_is_named_before_anything_is_written(
    tmp_path, server, capsys
):
    cut = {"0002": HR_IMAGES["0002"][:-100]}
    server.others["/DIV2K_train_HR.zip"] = archive_of(HR_IMAGES | cut)
    assert make("div2k", tmp_path, server) == 1
    said = capsys.readouterr().err
    assert "0002.png is cut short" in said
    assert not (tmp_path / "datasets" / "DIV2K" / HR).exists()
    assert make("div2k", tmp_path, server, "--skip-bad") == 0
    check_div2k(tmp_path / "datasets" / "DIV2K", ("0001", "0003"))


def test_without_a_network_it_is_said_what_to_put_where(tmp_path, server, capsys):
    arguments = ["--root", str(tmp_path), "div2k", "--mirror", "http://127.0.0.1:1/DIV2K"]
    assert cmd_data.main(arguments) == 1
    said = capsys.readouterr().err
    assert "Connection refused" in said
    assert f"put it at {tmp_path / 'datasets' / 'DIV2K' / 'DIV2K_train_HR.zip'}" in said
    for scale in (2, 3, 4):
        assert f"DIV2K_train_LR_bicubic_X{scale}.zip" in said


@pytest.mark.parametrize("mirror", [None, "http://127.0.0.1:1"])
def test_hashes_are_those_of_the_official_server(tmp_path, monkeypatch, mirror):
    hashes = {}

    def download(url, target, sha256):
        hashes[target.name] = sha256
        target.write_bytes(b"not an archive")

    monkeypatch.setattr(official, "download", download)
    with pytest.raises(UserError, match="not a zip"):
        official.sources(official.DIV2K, [2, 3, 4], [tmp_path], mirror)
    assert hashes == (dict.fromkeys(official.PUBLISHED) if mirror else official.PUBLISHED)
