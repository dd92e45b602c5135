import errno
import os
import random
import resource
import shutil
import stat
import struct
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tarred, tree, zipped
from processes import started

from dlgsanet_arch.data.archives import extract
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import lock_file

WRITTEN = {
    "0001.png": random.Random(2).randbytes(5_000),
    "0002.PNG": random.Random(3).randbytes(70_000),
    "more/0003.jpg": random.Random(4).randbytes(1),
    "more/empty.bmp": b"",
}
OTHERS = ("SET/readme.txt", "SET/.DS_Store", "SET/.0001.png", "__MACOSX/SET/0001.png")
MEMBERS = {f"SET/{name}": data for name, data in WRITTEN.items()}
MEMBERS |= {"SET/": b"", **dict.fromkeys(OTHERS, b"not an image of the set")}
KINDS = ["zip", "stored.zip", "tar"]
GOOD = ("x/1.png", b"good")


def made(tmp_path: Path, kind: str, members=MEMBERS) -> Path:
    """Write an archive; members are pairs of a name, or a ZipInfo or TarInfo, and the content."""
    path = tmp_path / f"set.{kind}"
    members = members.items() if isinstance(members, dict) else members
    if kind == "tar":
        path.write_bytes(tarred(members))
    else:
        method = zipfile.ZIP_STORED if kind.startswith("stored") else zipfile.ZIP_DEFLATED
        path.write_bytes(zipped(members, method))
    return path


def refused(archive: Path, reason: str) -> None:
    """Check that an archive is refused in 10 s and 1 GB, and that nothing of it is written."""
    before, start = tree(archive.parent), time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=reason) as caught:
        extract(archive, archive.parent / "out" / "set")
    assert tree(archive.parent) == before
    assert not (archive.parent / "out" / "set.unfinished").exists()
    assert str(archive) in str(caught.value)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # KiB


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_of_an_archive_are_written_and_nothing_else(tmp_path, kind):
    folder = tmp_path / "out" / "set"
    archive = made(tmp_path, kind).rename(tmp_path / "set.png")  # recognised by its content
    extract(archive, folder)
    assert tree(folder) == WRITTEN
    assert [path.name for path in folder.parent.iterdir()] == ["set"]
    (folder / "0001.png").unlink()
    extract(archive, folder)  # a finished folder is left alone
    assert "0001.png" not in tree(folder)


LEADING = [
    (["a.png", "b.png"], ["a.png", "b.png"]),
    (["./a.png", "./b.png"], ["a.png", "b.png"]),
    (["x/X4/1x4.png", "x/X4/2x4.png"], ["1x4.png", "2x4.png"]),
    (["x/HR/1.png", "x/LR/X2/1.png"], ["HR/1.png", "LR/X2/1.png"]),
    (["x/1.png", "2.png"], ["x/1.png", "2.png"]),
    (["x/y/1.png", "x/y.txt", "z/readme.md"], ["1.png"]),
]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_leading_folders_that_all_images_share_are_left_out(tmp_path, kind):
    for number, (names, written) in enumerate(LEADING):
        folder = tmp_path / str(number)
        folder.mkdir()  # an empty folder is filled
        extract(made(tmp_path, kind, dict.fromkeys(names, b"x")), folder)
        assert tree(folder) == dict.fromkeys(written, b"x")


# Attacks of both formats: members beside `GOOD`, and why they are refused.
ATTACKS = {
    "absolute": ([("/etc/2.png", b"bad")], "leads out"),
    "parent": ([("../2.png", b"bad")], "leads out"),
    "parent, not an image": ([("../readme.txt", b"bad")], "leads out"),
    "drive": ([("C:/2.png", b"bad")], "leads out"),
    "backslash": ([("x\\2.png", b"bad")], "leads out"),
    "same name": ([("x/1.png", b"bad")], "File exists"),
    "dot": ([("./x/1.png", b"bad")], "File exists"),
    "file and folder": ([("x/1.png/2.png", b"bad")], "cannot be unpacked"),
    "folder and file": ([("x/2.png/3.png", b"bad"), ("x/2.png", b"bad")], "cannot be unpacked"),
}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_attack_are_refused(tmp_path, kind, attack):
    members, reason = ATTACKS[attack]
    refused(made(tmp_path, kind, [GOOD, *members]), reason)


# Members that are not files: they are skipped, whatever they are called.
SPECIAL = [
    ("zip", "x/2.png", stat.S_IFLNK, "/etc/passwd"),
    ("zip", "x", stat.S_IFLNK, "/tmp"),
    ("zip", "x/2.png", stat.S_IFCHR, ""),
    ("tar", "x/2.png", tarfile.SYMTYPE, "/etc/passwd"),
    ("tar", "x", tarfile.SYMTYPE, "/tmp"),
    ("tar", "x/2.png", tarfile.LNKTYPE, "x/1.png"),
    ("tar", "x/2.png", tarfile.CHRTYPE, ""),
    ("tar", "x/2.png", tarfile.FIFOTYPE, ""),
]


@pytest.mark.parametrize(("kind", "name", "type", "to"), SPECIAL)
def test_links_and_devices_are_never_created(tmp_path, kind, name, type, to):
    if kind == "zip":
        member = zipfile.ZipInfo(name), to.encode()
        member[0].external_attr = (type | 0o777) << 16
    else:
        member = tarfile.TarInfo(name), b""
        member[0].type, member[0].linkname = type, to
    extract(made(tmp_path, kind, [member, GOOD]), tmp_path / "set")
    assert tree(tmp_path / "set") == {"1.png": b"good"}
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["1.png"]
    refused(made(tmp_path, kind, [member]), "holds no images")


# Kind, members beside `GOOD`, a change to the directory of a zip, and why they are refused.
IN_ONE = [("x/2.png", b"2" * 999)]
BOMBS = {
    "zip of zeros": ("zip", [("x/2.bmp", bytes(3_000_000))], None, "expands"),
    "more than claimed": ("zip", IN_ONE, (24, struct.pack("<I", 9)), "cannot be unpacked"),
    "less than claimed": ("stored.zip", IN_ONE, (20, b"\xff\x7f\0\0" * 2), "cannot be unpacked"),
    "encrypted": ("zip", IN_ONE, (8, b"\1"), "is encrypted"),
    "compressed by LZMA": ("zip", IN_ONE, (10, b"\x0e"), "cannot be unpacked"),
    "compressed by Deflate64": ("zip", IN_ONE, (10, b"\t"), "method is not supported"),
}


@pytest.mark.parametrize("attack", BOMBS)
def test_bombs_and_lying_sizes_are_refused(tmp_path, attack):
    kind, members, change, reason = BOMBS[attack]
    path = made(tmp_path, kind, [GOOD, *members])
    if change:
        data = path.read_bytes()
        place = data.rindex(b"PK\x01\x02") + change[0]  # what is said of the last member
        path.write_bytes(data[:place] + change[1] + data[place + len(change[1]) :])
    refused(path, reason)


@pytest.mark.parametrize("size", [2**40, 10**12, -512])
def test_a_claim_of_a_tar_header_is_not_believed(tmp_path, size):
    path = made(tmp_path, "tar", [GOOD])
    info = tarfile.TarInfo("x/2.png")
    info.size = 2**40
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    if size > 0:
        header[124:128] = b"\x80\0\0\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(path.read_bytes()[:1024] + header + bytes(10_240))
    refused(path, "expands|cannot be unpacked")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_archives_cut_short_are_refused(tmp_path, kind, share):
    path = made(tmp_path, kind)
    size = int(path.stat().st_size * share)
    if kind == "tar":  # padded with zeros to records of 10 KiB: the end is not the end
        size = int(share * (len(path.read_bytes().rstrip(b"\0")) + 1_000))
    os.truncate(path, size)
    refused(path, r"cannot be unpacked \(.*\): .* delete it")


def test_a_tar_that_ends_between_two_members_is_refused(tmp_path):
    path = made(tmp_path, "tar", {"a.png": bytes(512), "b.png": bytes(512)})
    data = path.read_bytes()
    for wrong in (data[:1024], data[:2048], data[:1044] + b"x" + data[1045:]):
        path.write_bytes(wrong)
        refused(path, "the end is missing")
    path.write_bytes(data[: 2048 + 512])
    extract(path, tmp_path / "set")


@pytest.mark.parametrize("kind", ["zip", "stored.zip"])
def test_damage_is_found_by_the_checksums(tmp_path, kind):
    path = made(tmp_path, kind)
    data = bytearray(path.read_bytes())
    data[-40_000] ^= 1
    path.write_bytes(data)
    refused(path, "cannot be unpacked")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "set.zip"
    for data in (b"x", b"<html>404</html>" * 100, b"PK\3\4", b"\x1f\x8b"):
        path.write_bytes(data)
        refused(path, "is damaged or not a zip or tar archive; delete it")
    for members in ({}, {"a.txt": b"x", ".b.png": b"x", "c.png/": b""}):
        for kind in ("zip", "tar"):
            refused(made(tmp_path, kind, members), "holds no images")
    with pytest.raises(UserError, match=r"missing\.zip: No such file"):
        extract(tmp_path / "missing.zip", tmp_path / "set")
    with pytest.raises(UserError, match="Is a directory"):
        extract(tmp_path, tmp_path / "set")


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_too_small_or_full_is_named(tmp_path, monkeypatch, kind):
    path, total = made(tmp_path, kind), sum(map(len, WRITTEN.values()))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=total - 1))
        refused(path, f"needs {total:,} bytes .* has {total - 1:,} bytes free")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        refused(path, "the disk is full; free some space")
    extract(path, tmp_path / "set")


def extract_until(name: str, archive: Path, folder: Path) -> None:
    """Extract, and be killed before a member is written."""
    plain = zipfile.ZipFile.open

    def killed(self, info, *arguments):
        if info.filename.endswith(name):
            os._exit(9)
        return plain(self, info, *arguments)

    zipfile.ZipFile.open = killed
    extract(archive, folder)


def test_a_killed_run_leaves_no_finished_folder_and_the_next_one_completes_it(tmp_path):
    archive, folder = made(tmp_path, "zip"), tmp_path / "set"
    with started(extract_until, "0002.PNG", archive, folder) as process:
        process.join(60)
        assert process.exitcode == 9
    assert not folder.exists()
    assert (tmp_path / "set.unfinished" / "SET" / "0001.png").exists()
    (tmp_path / "set.unfinished" / "old.png").write_bytes(b"of another archive")
    extract(archive, folder)
    assert tree(folder) == WRITTEN


def test_two_extractions_of_one_archive_do_not_mix(tmp_path):
    path = made(tmp_path, "zip")
    with path.open("rb") as file:
        lock_file(file, path)
        refused(path, r"another process is at work on .*set\.zip")
    extract(path, tmp_path / "set")
