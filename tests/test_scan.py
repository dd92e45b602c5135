"""Every data set is checked before a run: what BasicSR would fail on, or read otherwise."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import helpers
import lmdb
import numpy as np
import pytest
from PIL import Image

from dlgsanet_arch.data import check
from dlgsanet_arch.data.check import batch_problems, scan
from dlgsanet_arch.data.images import read_header
from dlgsanet_arch.data.sub_images import encode_png

SAMPLES = 3
DATABASE = {"type": "lmdb"}


@pytest.fixture
def root(tmp_path):
    helpers.write_pairs(tmp_path / "data", SAMPLES)
    return tmp_path


@pytest.fixture
def options():
    return json.loads(json.dumps(helpers.small_train_options(Path("data"))))


def write_database(path, images, lines=None, scale=1):
    """Write an LMDB of images by key, as BasicSR's tools do, or with other lines."""
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as put:
        for key, image in images.items():
            put.put(key.encode(), encode_png(image[::scale, ::scale]))
    lines = [f"{key}.png (48,64,3) 1" for key in images] if lines is None else lines
    (path / "meta_info.txt").write_text("".join(f"{line}\n" for line in lines))


def image(height=48, width=64):
    return np.full((height, width, 3), 127, np.uint8)


def use_databases(options, root, hr, lr, phase="train", lines=None):
    """Make a set of LMDBs of some keys."""
    write_database(root / "hr.lmdb", {key: image() for key in hr}, lines)
    write_database(root / "lr.lmdb", {key: image() for key in lr}, scale=2)
    roots = {"dataroot_gt": "hr.lmdb", "dataroot_lq": "lr.lmdb"}
    options["datasets"][phase] |= {**roots, "io_backend": DATABASE}


def basicsr_reads(options, phase, root):
    """Read every sample of a set as BasicSR does."""
    from basicsr.data import build_dataset

    dataset = options["datasets"][phase] | {"phase": phase, "scale": options["scale"]}
    roots = {key: str(root / dataset[key]) for key in ("dataroot_gt", "dataroot_lq")}
    built = build_dataset(dataset | roots)
    return [built[index] for index in range(len(built))]


def only(lines):
    assert len(lines) == 1, lines
    return lines[0]


def test_good_folders_pass(root, options):
    found = scan(options, root, train=True)
    assert (found.problems, found.warnings) == ([], [])
    assert found.samples == {"train": SAMPLES, "val": SAMPLES}
    assert "datasets:val: 3 pairs; checked the headers of all" in found.notes
    assert len(basicsr_reads(options, "train", root)) == SAMPLES


def test_good_databases_pass(root, options):
    use_databases(options, root, "abcd", "abcd")
    options["datasets"]["val"] = options["datasets"]["train"] | {"name": "other"}
    found = scan(options, root, train=True)
    assert (found.problems, found.warnings) == ([], [])
    assert found.samples == {"train": 4, "val": 4}
    # nothing stays open: BasicSR may open them
    assert len(basicsr_reads(options, "val", root)) == 4


def test_a_database_that_an_earlier_run_holds_open_is_read(root, options):
    from basicsr.utils import FileClient

    use_databases(options, root, "a", "a", "val")
    held = FileClient("lmdb", db_paths=[str(root / "hr.lmdb")], client_keys=["gt"])
    assert scan(options, root, train=True).problems == []
    assert held.get("a", "gt")  # and is not closed


DATABASE_FAULTS = [
    (["a.png (48,64,3) 1"], "ab", "holds 1 images that meta_info.txt does not list"),
    (["a.png", "b.png", "c.png"], "ab", "lists keys that it does not hold: 'c'"),
    (["a.png", "", "b.png"], "ab", "has 1 blank lines"),
    (["a.png", "a.png", "b.png"], "ab", "lists keys more than once", "'a'"),
    (["a.x4.png", "b.png"], ["a.x4", "b"], "that it does not hold (keys end at their first "
     "dot: name them without): 'a'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "entries", "expected"), [(a, b, c) for a, b, *c in DATABASE_FAULTS]
)
def test_what_is_wrong_with_a_database_is_said(root, options, lines, entries, expected):
    use_databases(options, root, entries, "ab", lines=lines)
    problem = only(scan(options, root, train=True).problems)
    assert problem.startswith("datasets:train:dataroot_gt: the training set made: ")
    assert all(part in problem for part in expected)
    assert "dlgsanet data verify --fix" in problem


def test_unequal_keys_are_named(root, options):
    use_databases(options, root, "ab", "ac")
    without, spare = scan(options, root, train=True).problems
    assert f"1 of 2 images in {root / 'hr.lmdb'} have no partner in" in without
    assert f"in {root / 'lr.lmdb'}: 'b'" in without
    assert f"in {root / 'hr.lmdb'}: 'c'" in spare
    with pytest.raises(ValueError, match="are different"):
        basicsr_reads(options, "train", root)


@pytest.mark.parametrize("length", [10, 5000, -1])
def test_a_cut_database_is_named(root, options, length):
    use_databases(options, root, "a", "abcdefghijklmnopqrstuvwxyz")
    data = root / "lr.lmdb" / "data.mdb"
    data.write_bytes(data.read_bytes()[:length])
    assert "cut short" in only(scan(options, root, train=True).problems)


def test_a_damaged_database_is_named(root, options):
    use_databases(options, root, "a", map(str, range(200)))
    data = root / "lr.lmdb" / "data.mdb"
    content = data.read_bytes()
    # Page 0 and 1 describe the database; any other may be its root.
    data.write_bytes(content[:8192] + bytes([255]) * (len(content) - 8192))
    problem = only(scan(options, root, train=True).problems)
    assert "lr.lmdb cannot be read" in problem
    assert "MDB_CORRUPTED" in problem


@pytest.mark.parametrize("entry", [b"no image", b""])
def test_an_entry_that_is_no_image_is_named(root, options, entry):
    use_databases(options, root, "a", "a")
    environment = lmdb.open(str(root / "lr.lmdb"))
    with environment, environment.begin(write=True) as put:
        put.put(b"a", entry)
    problem = only(scan(options, root, train=True).problems)
    assert "1 of 1 files checked" in problem
    assert "are not images that can be read: 'a'" in problem


def test_images_without_a_partner_are_named(root, options):
    (root / "data/LR/image1.png").rename(root / "data/LR/other.png")
    problems = scan(options, root, train=True).problems
    assert [problem.split(": ")[0] for problem in problems] == [
        *["datasets:train:dataroot_lq"] * 2,
        *["datasets:val:dataroot_lq"] * 2,
    ]
    assert (
        f"no partner in {root / 'data/LR'}, with filename_tmpl '{{}}': 'image1.png'" in problems[0]
    )
    assert (
        f"no partner in {root / 'data/HR'}, with filename_tmpl '{{}}': 'other.png'" in problems[1]
    )
    assert "the validation set made_val" in problems[2]
    with pytest.raises(AssertionError):
        basicsr_reads(options, "val", root)


def test_names_follow_the_template(root, options):
    for file in (root / "data/LR").iterdir():
        file.rename(file.with_name(f"{file.stem}x2.png"))
    for phase in ("train", "val"):
        options["datasets"][phase]["filename_tmpl"] = "{}x2"
    assert scan(options, root, train=True).problems == []
    assert len(basicsr_reads(options, "val", root)) == SAMPLES
    for template in ("{x}", "{1}", "{"):
        options["datasets"]["val"]["filename_tmpl"] = template
        problem = only(scan(options, root, train=True).problems)
        assert problem.startswith("datasets:val:filename_tmpl: ")
        assert f"filename_tmpl {template!r} is not a template" in problem


def test_what_basicsr_passes_over_or_fails_on_in_folders(root, options):
    (root / "data/LR/.hidden").touch()
    (root / "data/HR/folder").mkdir()
    assert scan(options, root, train=True).problems == []
    assert len(basicsr_reads(options, "val", root)) == SAMPLES
    for side in ("HR", "LR"):
        (root / "data" / side / "Thumbs.db").write_bytes(b"x")
    problems = scan(options, root, train=True).problems
    assert len(problems) == 4
    assert "holds files that are not images" in problems[0]
    assert "'Thumbs.db'" in problems[0]


LISTED = "image0.png (48,64,3)\nimage2.png (48,64,3)\n"


def test_a_list_says_which_images_there_are(root, options):
    (root / "list.txt").write_text(LISTED)
    options["datasets"]["val"]["meta_info_file"] = "list.txt"
    found = scan(options, root, train=True)
    assert found.problems == []
    assert found.samples == {"train": SAMPLES, "val": 2}
    options["datasets"]["val"]["meta_info_file"] = str(root / "list.txt")
    assert len(basicsr_reads(options, "val", root)) == 2


def test_what_is_wrong_with_a_list_is_said(root, options):
    (root / "list.txt").write_text(LISTED + "\nimage9.png\n")
    options["datasets"]["val"]["meta_info_file"] = "list.txt"
    listed, hr, lr = scan(options, root, train=True).problems
    assert listed.startswith("datasets:val:meta_info_file: ")
    assert "has 1 blank lines" in listed
    assert hr.startswith("datasets:val:dataroot_gt: ")
    assert "1 of 3 listed images are not in" in hr
    assert "'image9.png'" in lr


def test_sets_of_real_esrgan_are_read_as_it_lists_them(root, options):
    (root / "pairs.txt").write_text("HR/image0.png, LR/image0.png\n")
    dataset = options["datasets"]["train"]
    dataset |= {"type": "RealESRGANPairedDataset", "meta_info": "pairs.txt"}
    dataset |= {"dataroot_gt": "data", "dataroot_lq": "data"}
    assert scan(options, root, train=True).samples["train"] == 1
    dataset["meta_info"] = str(root / "pairs.txt")
    assert len(basicsr_reads(options, "train", root)) == 1
    (root / "pairs.txt").write_text("HR/image0.png LR/image0.png\n")
    assert "write `HR, LR` in each line" in only(scan(options, root, train=True).problems)


def test_single_images_need_no_hr(root, options):
    options["datasets"]["val"] = {
        "name": "a", "type": "SingleImageDataset", "dataroot_lq": "data/LR",
        "io_backend": {"type": "disk"},
    }  # fmt: skip
    found = scan(options, root, train=True)
    assert found.problems == []
    assert found.samples["val"] == SAMPLES


def test_patches_must_fit_into_hr(root, options):
    options["datasets"]["train"]["gt_size"] = 50
    problem = only(scan(options, root, train=True).problems)
    assert problem.startswith("datasets:train:dataroot_gt: the training set made: 3 of 3 checked")
    assert "the first: HR has 48 x 64 pixels, smaller than 50 x 50 pixels, gt_size; " in problem
    with pytest.raises(ValueError, match="is smaller than patch size"):
        basicsr_reads(options, "train", root)


def test_a_border_must_leave_something_to_measure(root, options):
    options["val"]["metrics"]["psnr"]["crop_border"] = 24
    problem = only(scan(options, root, train=True).problems)
    assert problem.startswith("datasets:val:dataroot_gt: ")
    assert "smaller than 49 x 49 pixels, of which crop_border 24 leaves nothing" in problem
    options["val"]["metrics"]["psnr"]["crop_border"] = 23
    assert scan(options, root, train=True).problems == []


def test_an_image_larger_than_pillow_opens_is_checked(root, options, tmp_path):
    """OpenCV, which trains, reads up to 2**30 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    for part in ("HR", "LR"):
        (root / "data" / part / "image9.png").write_bytes(data)
    problems = scan(options, root, train=True).problems
    assert len(problems) == 2
    assert "1 of 4 checked have wrong sizes: 'image9.png'" in problems[0]


def test_sets_to_test_on_need_names_of_their_own(root, options):
    options["datasets"]["val_2"] = dict(options["datasets"]["val"])
    problem = only(scan(options, root, train=True).problems)
    assert problem.startswith("datasets:val_2:name: 'made_val' is the name of datasets:val too")
    options["datasets"]["val_2"]["name"] = options["datasets"]["train"]["name"]
    assert scan(options, root, train=True).problems == []


def test_results_need_names_of_their_own(root, options):
    for part in ("HR", "LR"):
        path = root / "data" / part / "image1.png"
        assert cv2.imwrite(str(path.with_suffix(".bmp")), cv2.imread(str(path)))
    problem = only(scan(options, root, train=True).problems)
    assert problem.startswith("datasets:val:dataroot_gt: ")
    assert "'image1.bmp' and 'image1.png'" in problem


def test_hr_is_lr_times_the_scale(root, options):
    """For a benchmark, HR may be larger by less than one LR pixel; BasicSR crops any rest."""
    hr = root / "data/HR/image1.png"
    for size, wrong in (
        ((48, 65), ["train"]), ((49, 65), ["train"]), ((48, 66), ["train", "val"]),
        ((47, 64), ["train", "val"]), ((64, 48), ["train", "val"]),
    ):  # fmt: skip
        cv2.imwrite(str(hr), image(*size))
        problems = scan(options, root, train=True).problems
        assert [problem.split(":")[1] for problem in problems] == wrong, size
        assert f"HR has {size[0]} x {size[1]} pixels, and LR's 24 x 32 times 2" in problems[0]
        assert "1 of 3 checked have wrong sizes: 'image1.png'" in problems[0]
        with pytest.raises(ValueError, match="Scale mismatches"):
            basicsr_reads(options, "train", root)


@pytest.mark.parametrize(
    ("channels", "type", "said"),
    [
        (1, np.uint8, "are gray: 'image1.png'; BasicSR makes three equal channels of them"),
        (4, np.uint8, "have transparency: 'image1.png'; BasicSR drops it"),
        (3, np.uint16, "have more than 8 bits: 'image1.png'; BasicSR reads 8 of them"),
    ],
)
def test_what_basicsr_changes_in_images_is_a_warning(root, options, channels, type, said):
    content = np.full((48, 64, channels), np.iinfo(type).max // 2, type)
    assert cv2.imwrite(str(root / "data/HR/image1.png"), content)
    found = scan(options, root, train=True)
    assert found.problems == []
    assert [line.split(": ")[0] for line in found.warnings] == [
        "datasets:train:dataroot_gt",
        "datasets:val:dataroot_gt",
    ]
    assert "1 of 3 images checked" in found.warnings[0]
    assert said in found.warnings[0]
    assert basicsr_reads(options, "val", root)[0]["gt"].shape == (3, 48, 64)


def test_of_many_images_headers_of_some_are_read(root, options, monkeypatch):
    monkeypatch.setattr(check, "MOST_HEADERS", 2)
    read = []
    monkeypatch.setattr(check, "read_header", lambda file: read.append(file) or read_header(file))
    found = scan(options, root, train=True)
    assert "datasets:val: 3 pairs; checked the headers of 2" in found.notes
    assert [Path(file.name).name for file in read] == ["image0.png", "image2.png"] * 4
    (root / "data/LR/image1.png").unlink()
    assert len(scan(options, root, train=True).problems) == 2  # names are checked in full


def test_a_long_preamble_hides_no_header(root, options):
    profile = np.random.default_rng(0).bytes(100_000)
    Image.new("RGB", (64, 48)).save(root / "a.png", icc_profile=profile, compress_level=0)
    use_databases(options, root, "a", "a")
    environment = lmdb.open(str(root / "hr.lmdb"))
    with environment, environment.begin(write=True) as put:
        put.put(b"a", (root / "a.png").read_bytes())
    assert scan(options, root, train=True).problems == []


@pytest.mark.parametrize("value", [None, 5, "text", [], {}, {1: {}}, {"type": "lmdb"}])
def test_faulty_options_are_passed_over(root, options, value):
    assert scan({"datasets": value}, root, train=True).problems == []
    paths = [("datasets", "train"), ("scale",), ("val",), ("name",)]
    keys = ("type", "io_backend", "dataroot_gt", "gt_size", "filename_tmpl", "name")
    paths += [("datasets", "train", key) for key in keys]
    for *sections, key in paths:
        changed = json.loads(json.dumps(options))
        node = changed
        for section in sections:
            node = node[section]
        node[key] = value
        scan(changed, root, train=True)


def test_sets_of_somebody_elses_type_are_left_alone(root, options):
    shutil.rmtree(root / "data/LR")

    class PairedImageDataset:
        pass

    registered = {"dataset": {"PairedImageDataset": PairedImageDataset}}
    assert scan(options, root, train=True, registered=registered).samples == {}


def test_an_epoch_must_have_a_whole_batch(options):
    options["datasets"]["train"] |= {"batch_size_per_gpu": 4, "dataset_enlarge_ratio": 2}
    for copies, enough in ((1, True), (2, True), (3, False)):
        problems = batch_problems(options, {"train": 4}, copies)
        assert (problems == []) == enough
    assert only(problems) == (
        "datasets:train:batch_size_per_gpu: 4 samples times dataset_enlarge_ratio 2 are less than "
        "one batch of 4 samples for each of 3 processes or GPUs; raise the ratio to 3, or write a "
        "smaller batch"
    )
    options["datasets"]["train"]["dataset_enlarge_ratio"] = 3
    assert batch_problems(options, {"train": 4}, 3) == []
    assert batch_problems(options, {}, 3) == []
