import errno
import hashlib
import io
import os
import random
import shutil
import stat
import struct
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import started

from dlgsanet_arch.data import archives
from dlgsanet_arch.data.archives import extract
from dlgsanet_arch.data.pictures import MAX_BYTES, find_pictures, read_picture
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import lock_file

LONG = random.Random(0).randbytes(300_000)

MEMBERS = {
    "SET/": b"",
    "SET/0001.png": random.Random(2).randbytes(5_000),
    "SET/0002.PNG": random.Random(3).randbytes(70_000),
    "SET/more/0003.jpg": random.Random(4).randbytes(1),
    "SET/more/empty.bmp": b"",
    "SET/readme.txt": b"not a picture",
    "SET/.DS_Store": b"not a picture",
    "SET/.0001.png": b"hidden",
    "__MACOSX/SET/._0001.png": b"what macOS keeps beside a picture",
}
WRITTEN = {
    name.removeprefix("SET/"): MEMBERS[name]
    for name in ("SET/0001.png", "SET/0002.PNG", "SET/more/0003.jpg", "SET/more/empty.bmp")
}
KINDS = ["zip", "stored.zip", "tar", "tar.gz"]


def write_zip(path: Path, members, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, content in members:
            if isinstance(member, zipfile.ZipInfo):
                archive.writestr(member, content)
            elif member.endswith("/"):
                archive.mkdir(member) if hasattr(archive, "mkdir") else archive.writestr(
                    member, b""
                )
            else:
                archive.writestr(member, content)


def write_tar(path: Path, members, mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for member, content in members:
            info = member
            if isinstance(member, str):
                info = tarfile.TarInfo(member.rstrip("/"))
                info.type = tarfile.DIRTYPE if member.endswith("/") else tarfile.REGTYPE
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def made(tmp_path: Path, kind: str, members=None) -> Path:
    path = tmp_path / f"set.{kind}"
    members = MEMBERS if members is None else members
    members = members.items() if isinstance(members, dict) else members
    if kind.endswith("zip"):
        stored = kind.startswith("stored")
        write_zip(path, members, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)
    else:
        write_tar(path, members, "w:gz" if kind.endswith("gz") else "w")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(archive: Path, reason: str) -> str:
    """Nothing of it is written anywhere."""
    before = contents(archive.parent)
    with pytest.raises(UserError, match=reason) as caught:
        extract(archive, archive.parent / "out" / "set")
    assert contents(archive.parent) == before
    assert str(archive) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pictures_of_an_archive_are_written_and_nothing_else(tmp_path, kind):
    folder = tmp_path / "out" / "set"
    extract(made(tmp_path, kind), folder)
    assert contents(folder) == WRITTEN
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_is_told_by_its_content(tmp_path, kind):
    path = made(tmp_path, kind).rename(tmp_path / "set.png")
    extract(path, tmp_path / "set")
    assert contents(tmp_path / "set") == WRITTEN


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (["a.png", "b.png"], ["a.png", "b.png"]),
        (["./a.png", "./b.png"], ["a.png", "b.png"]),
        (["x/X4/1x4.png", "x/X4/2x4.png"], ["1x4.png", "2x4.png"]),
        (["x/HR/1.png", "x/LR/X2/1.png"], ["HR/1.png", "LR/X2/1.png"]),
        (["x/1.png", "2.png"], ["x/1.png", "2.png"]),
        (["x1/1.png", "x2/2.png"], ["x1/1.png", "x2/2.png"]),
        (["x/y/1.png", "x/y.txt", "z/readme.md"], ["1.png"]),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_leading_folders_that_all_pictures_share_are_left_out(tmp_path, kind, names, written):
    extract(made(tmp_path, kind, dict.fromkeys(names, b"x")), tmp_path / "set")
    assert contents(tmp_path / "set") == dict.fromkeys(written, b"x")


def test_photographs_come_out_as_they_went_in(tmp_path, shared_data):
    photographs = sorted((shared_data / "data" / "Set14" / "HR").glob("*.png"))
    if not photographs:
        pytest.skip("Set14 is not in the shared data")
    members = {f"Set14/HR/{path.name}": path.read_bytes() for path in photographs}
    extract(made(tmp_path, "zip", members), tmp_path / "set")
    found = find_pictures(tmp_path / "set")
    digests = {hashlib.sha256(file.path.read_bytes()).hexdigest() for file in found}
    assert digests == {hashlib.sha256(data).hexdigest() for data in members.values()}
    assert len(found) == len(photographs)
    assert read_picture(found[0].path).pixels.size


def test_a_finished_folder_is_left_alone(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("mine")
    extract(tmp_path / "missing.zip", tmp_path / "set")
    extract(made(tmp_path, "zip"), tmp_path / "set")
    assert contents(tmp_path / "set") == {"mine.txt": b"mine"}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    extract(made(tmp_path, "zip"), tmp_path / "set")
    assert contents(tmp_path / "set") == WRITTEN


def linked(kind: str, name: str, to: str, hard: bool = False):
    if kind == "zip":
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        return info, to.encode()
    info = tarfile.TarInfo(name)
    info.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    info.linkname = to
    return info, b""


def special(kind: bytes):
    info = tarfile.TarInfo("x/2.png")
    info.type = kind
    return info, b""


GOOD = ("x/1.png", b"good")
BAD_NAMES = {
    "/etc/2.png": "is an absolute path",
    "//host/2.png": "is an absolute path",
    "../2.png": "leads out of the folder",
    "x/../../2.png": "leads out of the folder",
    "x/..": "leads out of the folder",
    "../readme.txt": "leads out of the folder",
    "C:/2.png": "names a drive",
    "c:2.png": "names a drive",
    "x\\2.png": "has a backslash in its name",
    "..\\2.png": "has a backslash in its name",
}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused(tmp_path, kind, name):
    message = refused(made(tmp_path, kind, [GOOD, (name, b"bad")]), BAD_NAMES[name])
    assert repr(name) in message


def test_a_zero_byte_in_a_name_is_refused(tmp_path):
    path = made(tmp_path, "stored.zip", [GOOD, ("x/2.png_.txt", b"bad")])
    path.write_bytes(path.read_bytes().replace(b"2.png_", b"2.png\0"))
    refused(path, "zero byte")


@pytest.mark.parametrize("name", ["x/2.png", "x/readme.txt", "x"])
@pytest.mark.parametrize("to", ["/etc/passwd", "1.png"])
def test_symbolic_links_are_refused(tmp_path, name, to):
    for kind in ("zip", "tar"):
        refused(made(tmp_path, kind, [GOOD, linked(kind, name, to)]), "is a symbolic link")


def test_hard_links_are_refused(tmp_path):
    refused(made(tmp_path, "tar", [GOOD, linked("tar", "x/2.png", "x/1.png", True)]), "a hard link")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_are_refused(tmp_path, kind):
    refused(made(tmp_path, "tar", [GOOD, special(kind)]), "neither a file nor a folder")
    info = zipfile.ZipInfo("x/2.png")
    info.external_attr = stat.S_IFIFO << 16
    refused(made(tmp_path, "zip", [GOOD, (info, b"")]), "neither a file nor a folder")


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["x/1.png", "x/1.PNG", "X/1.png", "x//1.png", "./x/1.png"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path, kind, name):
    message = refused(made(tmp_path, kind, [GOOD, (name, b"other")]), "have one name")
    assert "'x/1.png'" in message


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_two_spellings_of_one_name_are_refused(tmp_path, kind):
    members = [("caf\u00e9.png", b"1"), ("cafe\u0301.png", b"2")]
    refused(made(tmp_path, kind, members), "have one name")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_of_a_file_and_a_folder_is_refused(tmp_path, kind):
    members = [("x/1.png", b"1"), ("x/1.png/2.png", b"2"), ("3.png", b"3")]
    refused(made(tmp_path, kind, members), r"'x/1\.png' is a file and a folder")


def central_header(path: Path, name: bytes) -> int:
    """Where a zip's directory describes a member."""
    data = path.read_bytes()
    place = data.index(b"PK\x01\x02")
    while data[place + 46 : place + 46 + len(name)] != name:
        place = data.index(b"PK\x01\x02", place + 4)
    return place


def changed(path: Path, place: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    assert data[place : place + len(value)] != value
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


def test_encrypted_members_are_refused(tmp_path):
    path = made(tmp_path, "zip", [GOOD, ("x/2.png", b"secret")])
    refused(changed(path, central_header(path, b"x/2.png") + 8, b"\1"), r"'x/2\.png' is encrypted")


def test_other_compressions_are_refused(tmp_path):
    path = made(tmp_path, "zip", [GOOD, ("x/2.png", b"deflate64")])
    path = changed(path, central_header(path, b"x/2.png") + 10, struct.pack("<H", 9))
    refused(path, r"'x/2\.png' is compressed by method 9")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_what_grows_like_a_bomb_is_refused(tmp_path, kind):
    refused(
        made(tmp_path, kind, [GOOD, ("x/2.bmp", bytes(3_000_000))]), "'x/2.bmp' claims 3,000,000"
    )
    many = [(f"x/{number}.txt", bytes(100_000)) for number in range(50)]
    refused(made(tmp_path, kind, [GOOD, *many]), "too many for this archive")


def test_pictures_of_absurd_sizes_are_refused(tmp_path, monkeypatch):
    path = made(tmp_path, "tar", [GOOD, ("x/2.png", LONG)])
    monkeypatch.setattr(archives, "MAX_BYTES", len(LONG) - 1)
    refused(path, r"'x/2\.png' claims 300,000 bytes; pictures have at most 299,999")
    assert MAX_BYTES > 1e9
    extract(made(tmp_path, "tar", [GOOD, ("x/2.txt", LONG)]), tmp_path / "set")


@pytest.mark.parametrize("size", [2**40, -512])
def test_a_claim_of_a_single_header_is_not_believed(tmp_path, size):
    path = made(tmp_path, "tar", [GOOD])
    info = tarfile.TarInfo("x/2.png")
    info.size = 2**40
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % 2**96).to_bytes(12, "big") if size < 0 else header[124:136]
    if size < 0:
        header[124] = 0xFF
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(path.read_bytes()[:1024] + header + bytes(10_240))
    refused(path, "too many for this archive|damaged")


@pytest.mark.parametrize("kind", KINDS)
def test_too_small_a_disk_is_told_before_a_picture_is_written(tmp_path, monkeypatch, kind):
    total = sum(map(len, WRITTEN.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=total - 1))
    path = made(tmp_path, kind)
    with pytest.raises(UserError, match=f"needs {total:,} bytes .* has {total - 1:,} bytes free"):
        extract(path, tmp_path / "set")
    assert list(contents(tmp_path / "set.unfinished")) == [".archive"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=total))
    extract(path, tmp_path / "set")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_archives_cut_short_are_refused(tmp_path, kind, share):
    path = made(tmp_path, kind)
    size = int(path.stat().st_size * share)
    if kind == "tar":  # padded with zeros to records of 10 KiB: the end is not the end
        size = int(share * (path.read_bytes().rstrip(b"\0").__len__() + 1_000))
    os.truncate(path, size)
    assert "delete it" in refused(path, "damaged or cut short|is not a zip, tar or tar.gz")


def test_a_tar_that_ends_between_two_members_is_refused(tmp_path):
    path = made(tmp_path, "tar", {"a.png": bytes(512), "b.png": bytes(512)})
    data = path.read_bytes()
    for end in (1024, 2048):
        path.write_bytes(data[:end])
        refused(path, "the end is missing")
    path.write_bytes(data[: 2048 + 512])
    extract(path, tmp_path / "set")


def test_a_tar_with_a_header_that_cannot_be_read_is_refused(tmp_path):
    path = made(tmp_path, "tar", {"a.png": bytes(512), "b.png": bytes(512)})
    refused(changed(path, 1024 + 20, b"x"), "the end is missing")


@pytest.mark.parametrize("kind", ["zip", "stored.zip"])
def test_a_damaged_member_is_named_and_the_good_ones_are_kept(tmp_path, kind):
    path = made(tmp_path, kind)
    place = path.read_bytes().index(b"SET/0002.PNG") + 30_000
    changed(path, place, bytes([path.read_bytes()[place] ^ 1]))
    with pytest.raises(UserError, match=r"damaged .* member 'SET/0002\.PNG'.*delete it"):
        extract(path, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    left = contents(tmp_path / "set.unfinished")
    assert left["0001.png"] == WRITTEN["0001.png"]
    assert "0002.PNG" not in left
    path.unlink()  # what the message says
    extract(made(tmp_path, kind), tmp_path / "set")
    assert contents(tmp_path / "set") == WRITTEN


def test_a_damaged_tar_gz_is_refused(tmp_path):
    path = made(tmp_path, "tar.gz")
    place = path.stat().st_size // 2
    refused(changed(path, place, bytes([path.read_bytes()[place] ^ 1])), "damaged or cut short")
    path = made(tmp_path, "tar.gz")
    place = path.stat().st_size - 8  # the checksum
    refused(changed(path, place, bytes([path.read_bytes()[place] ^ 1])), "damaged or cut short")


def test_random_damage_ends_in_an_error_for_the_user_or_in_the_right_files(tmp_path):
    source = random.Random(5)
    for kind in KINDS:
        whole = made(tmp_path, kind, {"a.png": b"a" * 50, "b/c.png": b"c" * 700}).read_bytes()
        for number in range(60):
            data = bytearray(whole)
            for _ in range(source.choice([1, 1, 3])):
                data[source.randrange(len(data))] = source.choice([0, 255, source.randrange(256)])
            path = tmp_path / "damaged"
            path.write_bytes(data)
            folder = tmp_path / f"{kind} {number}"
            try:
                extract(path, folder)
            except UserError:
                assert not folder.exists()
            else:
                assert all(name.endswith("png") for name in contents(folder))
            assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("data", [b"", b"x", b"<html>404</html>" * 100, b"PK\3\4", b"\x1f\x8b"])
def test_what_is_no_archive_is_refused(tmp_path, data):
    path = tmp_path / "set.zip"
    path.write_bytes(data)
    assert "delete it" in refused(path, "is not a zip, tar or tar.gz|damaged or cut short")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_without_pictures_is_refused(tmp_path, kind):
    refused(made(tmp_path, kind, {"a.txt": b"x", ".b.png": b"x"}), "holds no pictures")
    refused(made(tmp_path, kind, {}), "holds no pictures")


def test_an_archive_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"missing\.zip: No such file"):
        extract(tmp_path / "missing.zip", tmp_path / "set")
    with pytest.raises(UserError, match="Is a directory"):
        extract(tmp_path, tmp_path / "set")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", range(5))
def test_an_interrupted_extraction_goes_on_where_it_ended(tmp_path, monkeypatch, kind, after):
    path = made(tmp_path, kind)
    replaced = []
    replace = os.replace

    def killed(source, place):
        if len(replaced) == after:
            raise Killed
        replaced.append(place)
        replace(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(archives.os, "replace", killed)
        with pytest.raises(Killed):
            extract(path, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    times = {place.name: place.stat().st_mtime_ns for place in replaced}
    extract(path, tmp_path / "set")
    assert contents(tmp_path / "set") == WRITTEN
    # What was there was not written again.
    kept = {place.name: place.stat().st_mtime_ns for place in (tmp_path / "set").rglob("*.*")}
    assert len(times) == after
    assert times.items() <= kept.items()
    assert not (tmp_path / "set.unfinished").exists()


def test_a_member_that_was_cut_is_written_again(tmp_path, monkeypatch):
    path = made(tmp_path, "zip")
    with monkeypatch.context() as patch:
        patch.setattr(archives.os, "replace", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            extract(path, tmp_path / "set")
    (tmp_path / "set.unfinished" / "0001.png").write_bytes(b"cut")
    extract(path, tmp_path / "set")
    assert contents(tmp_path / "set") == WRITTEN


def test_what_another_archive_left_is_thrown_away(tmp_path, monkeypatch):
    old = made(tmp_path, "tar", {"a.png": b"old", "gone.png": b"old", "last.png": b"old"})
    replace = os.replace

    def killed(source, place):
        if Path(place).name == "last.png":
            raise Killed
        replace(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(archives.os, "replace", killed)
        with pytest.raises(Killed):
            extract(old, tmp_path / "set")
    new = made(tmp_path, "zip", {"a.png": b"new", "last.png": b"new"})
    extract(new, tmp_path / "set")
    assert contents(tmp_path / "set") == {"a.png": b"new", "last.png": b"new"}


def extract_until(name: str, archive: Path, folder: Path) -> None:
    """Extract, and wait for ever before a member gets its name."""
    replace = os.replace

    def waits(source, place):
        while place.name == name:
            time.sleep(1)
        replace(source, place)

    archives.os.replace = waits
    extract(archive, folder)


def test_kill_9_loses_nothing_that_was_unpacked(tmp_path):
    archive, folder = made(tmp_path, "zip"), tmp_path / "set"
    left = tmp_path / "set.unfinished"
    with started(extract_until, "0002.PNG", archive, folder) as process:
        deadline = time.monotonic() + 60
        part = left / ".part"
        while not (part.exists() and part.stat().st_size == len(WRITTEN["0002.PNG"])):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # While it lives, nobody else writes to the same place.
        with pytest.raises(UserError, match=r"another process is at work on .*set\.zip"):
            extract(archive, folder)
    assert not folder.exists()
    assert sorted(contents(left)) == [".archive", ".part", "0001.png"]
    extract(archive, folder)
    assert contents(folder) == WRITTEN


def test_a_disk_that_fills_up_during_extraction_is_told(tmp_path, monkeypatch):
    path = made(tmp_path, "zip")
    replace = os.replace

    def full(source, place):
        if place.name == "0002.PNG":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(archives.os, "replace", full)
        with pytest.raises(UserError, match=r"the disk is full; .* finished work is kept"):
            extract(path, tmp_path / "set")
    assert contents(tmp_path / "set.unfinished")["0001.png"] == WRITTEN["0001.png"]
    extract(path, tmp_path / "set")
    assert contents(tmp_path / "set") == WRITTEN


def test_two_extractions_of_one_archive_do_not_mix(tmp_path):
    path = made(tmp_path, "zip")
    with path.open("rb") as file:
        lock_file(file, path)
        with pytest.raises(UserError, match=r"another process is at work on .*set\.zip"):
            extract(path, tmp_path / "set")
    extract(path, tmp_path / "set")


def test_the_bar_counts_the_bytes_of_the_pictures(tmp_path, monkeypatch):
    bars = []
    plain = archives.progress_bar

    def spied(*arguments):
        bars.append(plain(*arguments))
        return bars[-1]

    monkeypatch.setattr(archives, "progress_bar", spied)
    extract(made(tmp_path, "tar"), tmp_path / "set")
    (bar,) = bars
    assert bar.n == bar.total == sum(map(len, WRITTEN.values()))
