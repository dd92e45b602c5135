"""Every data set is checked before a run: what BasicSR would fail on, or read otherwise."""

import copy
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

from dlgsanet_arch.data import headers
from dlgsanet_arch.data.check import batch_problems, scan
from dlgsanet_arch.data.images import read_header
from dlgsanet_arch.data.making import encode_png

SAMPLES = 3


@pytest.fixture
def root(tmp_path):
    helpers.write_pairs(tmp_path / "data", SAMPLES)
    return tmp_path


@pytest.fixture
def options():
    return copy.deepcopy(helpers.small_train_options(Path("data")))


def image(height=48, width=64):
    return np.full((height, width, 3), 127, np.uint8)


def use_databases(options, root, hr, lr, phase="train", lines=None):
    """Make a set of LMDBs of some keys, as BasicSR's tools do, or with other lines for HR."""
    for name, keys, scale in (("hr", hr, 1), ("lr", lr, 2)):
        path, written = root / f"{name}.lmdb", [f"{key}.png (48,64,3) 1" for key in keys]
        for key in keys:
            put(path, key.encode(), encode_png(image()[::scale, ::scale]))
        written = lines if name == "hr" and lines is not None else written
        (path / "meta_info.txt").write_text("".join(f"{line}\n" for line in written))
    roots = {"dataroot_gt": "hr.lmdb", "dataroot_lq": "lr.lmdb"}
    options["datasets"][phase] |= {**roots, "io_backend": {"type": "lmdb"}}


def put(database, key, value):
    with (
        lmdb.open(str(database), map_size=2**26) as environment,
        environment.begin(write=True) as write,
    ):
        write.put(key, value)


def basicsr_reads(options, phase, root):
    """Read every sample of a set as BasicSR does."""
    from basicsr.data import build_dataset

    dataset = options["datasets"][phase] | {"phase": phase, "scale": options["scale"]}
    roots = {key: str(root / dataset[key]) for key in ("dataroot_gt", "dataroot_lq")}
    built = build_dataset(dataset | roots)
    return [built[index] for index in range(len(built))]


@pytest.fixture
def scanned(options, root):
    """Scan, compare each problem with the start and the parts that are expected of it."""

    def run(*expected):
        found = scan(options, root, train=True)
        assert len(found.problems) == len(expected), found.problems
        for problem, (start, *parts) in zip(found.problems, expected, strict=True):
            assert problem.startswith(f"datasets:{start}: ")
            assert all(part in problem for part in parts), problem
        return found

    return run


GT, LQ = "train:dataroot_gt", "train:dataroot_lq"
VAL_GT, VAL_LQ = "val:dataroot_gt", "val:dataroot_lq"


def test_good_folders_pass(root, options, scanned):
    (root / "data/LR/.hidden").touch()
    (root / "data/HR/folder").mkdir()
    found = scanned()
    assert found.warnings == []
    assert found.samples == {"train": SAMPLES, "val": SAMPLES}
    assert found.smallest == {"train": (48, 64), "val": (48, 64)}
    assert "datasets:val: 3 pairs; checked the headers of all" in found.notes
    assert len(basicsr_reads(options, "train", root)) == SAMPLES


def test_good_databases_pass_also_where_an_earlier_run_holds_them_open(root, options, scanned):
    from basicsr.utils import FileClient

    use_databases(options, root, "abcd", "abcd")
    options["datasets"]["val"] = options["datasets"]["train"] | {"name": "other"}
    assert scanned().samples == {"train": 4, "val": 4}
    # nothing stays open: BasicSR may open them
    assert len(basicsr_reads(options, "val", root)) == 4
    held = FileClient("lmdb", db_paths=[str(root / "hr.lmdb")], client_keys=["gt"])
    scanned()
    assert held.get("a", "gt")  # and is not closed


@pytest.mark.parametrize(
    ("lines", "entries", "expected"),
    [
        (["a.png (48,64,3) 1"], "ab", ["holds 1 images that meta_info.txt does not list"]),
        (["a.png", "b.png", "c.png"], "ab", ["lists keys that it does not hold: 'c'"]),
        (["a.png", "", "b.png"], "ab", ["has 1 blank lines"]),
        (["a.png", "a.png", "b.png"], "ab", ["lists keys more than once", "'a'"]),
        (["a.x4.png", "b.png"], ["a.x4", "b"], ["end at their first dot: name them without): 'a'"]),
    ],
)
def test_faults_of_a_database_s_list(root, options, scanned, lines, entries, expected):
    use_databases(options, root, entries, "ab", lines=lines)
    scanned((GT, "the training set made: ", "dlgsanet data verify --fix", *expected))


def test_unequal_keys_are_named(root, options, scanned):
    use_databases(options, root, "ab", "ac")
    hr, lr = root / "hr.lmdb", root / "lr.lmdb"
    scanned(
        (LQ, f"1 of 2 images in {hr} have no partner in {lr}: 'b'"),
        (LQ, f"1 of 2 images in {lr} have no partner in {hr}: 'c'"),
    )


def test_a_database_that_crashes_its_reader_is_named(root, options, scanned):
    """LMDB does not check sizes of values: what reads so many bytes gets a signal."""
    use_databases(options, root, "a", "a")
    path = root / "hr.lmdb/data.mdb"
    put(path.parent, b"a", bytes(9000))  # in pages of its own, as says the 1 after the size
    nodes = [struct.pack("<IHH", size, 1, 1) + b"a" for size in (9000, 2**32 - 9999)]
    assert path.read_bytes().count(nodes[0]) == 1
    path.write_bytes(path.read_bytes().replace(*nodes))
    scanned(("train", f"{root / 'hr.lmdb'} and {root / 'lr.lmdb'}: a worker process died, SIG"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:10], "cut short"),
        (lambda data: data[:5000], "cut short"),
        (lambda data: data[:-1], "cut short"),
        # Pages 0 and 1 describe the database; any other may be its root.
        (lambda data: data[:8192] + b"\xff" * (len(data) - 8192), "MDB_CORRUPTED"),
    ],
)
def test_a_damaged_database_is_named(root, options, scanned, damage, said):
    use_databases(options, root, "a", [*map(str, range(200))])
    data = root / "lr.lmdb" / "data.mdb"
    data.write_bytes(damage(data.read_bytes()))
    scanned((LQ, "lr.lmdb", said))


def test_headers_of_entries_are_read(root, options, scanned):
    use_databases(options, root, "a", "a")
    for entry in (b"no image", b""):
        put(root / "lr.lmdb", b"a", entry)
        scanned((LQ, "1 of 1 checked cannot be used: 'a'; the first: LR is not an image"))
    put(root / "lr.lmdb", b"a", encode_png(image()[::2, ::2]))
    profile = np.random.default_rng(0).bytes(100_000)  # a long preamble
    Image.new("RGB", (64, 48)).save(root / "a.png", icc_profile=profile, compress_level=0)
    put(root / "hr.lmdb", b"a", (root / "a.png").read_bytes())
    scanned()


def test_images_without_a_partner_are_named(root, options, scanned):
    (root / "data/LR/image1.png").rename(root / "data/LR/other.png")
    without = f"no partner in {root / 'data/LR'}, with filename_tmpl '{{}}': 'image1.png'"
    spare = f"no partner in {root / 'data/HR'}, with filename_tmpl '{{}}': 'other.png'"
    scanned((LQ, without), (LQ, spare), (VAL_LQ, "the validation set made_val"), (VAL_LQ, spare))
    with pytest.raises(AssertionError):
        basicsr_reads(options, "val", root)


def test_names_follow_the_template(root, options, scanned):
    for file in (root / "data/LR").iterdir():
        file.rename(file.with_name(f"{file.stem}x2.png"))
    for phase in ("train", "val"):
        options["datasets"][phase]["filename_tmpl"] = "{}x2"
    scanned()
    assert len(basicsr_reads(options, "val", root)) == SAMPLES
    for template in ("{x}", "{1}", "{"):
        options["datasets"]["val"]["filename_tmpl"] = template
        scanned(("val:filename_tmpl", f"filename_tmpl {template!r} is not a template"))


def test_files_that_are_not_images_are_named(root, scanned):
    for side in ("HR", "LR"):
        (root / "data" / side / "Thumbs.db").write_bytes(b"x")
    said = ("holds files that are not images", "'Thumbs.db'")
    scanned(*((start, *said) for start in (GT, LQ, VAL_GT, VAL_LQ)))


LISTED = "image0.png (48,64,3)\nimage2.png (48,64,3)\n"


def test_a_list_says_which_images_there_are(root, options, scanned):
    (root / "list.txt").write_text(LISTED)
    options["datasets"]["val"]["meta_info_file"] = str(root / "list.txt")
    assert scanned().samples == {"train": SAMPLES, "val": 2}
    assert len(basicsr_reads(options, "val", root)) == 2
    (root / "list.txt").write_text(LISTED + "\nimage9.png\n")
    options["datasets"]["val"]["meta_info_file"] = "list.txt"
    gone = ("1 of 3 listed images are not in", "'image9.png'")
    scanned(("val:meta_info_file", "has 1 blank lines"), (VAL_GT, *gone), (VAL_LQ, *gone))


def test_sets_of_other_types_are_read_as_they_list_them(root, options, scanned):
    (root / "pairs.txt").write_text("HR/image0.png, LR/image0.png\n")
    dataset = options["datasets"]["train"]
    dataset |= {"type": "RealESRGANPairedDataset", "meta_info": str(root / "pairs.txt")}
    dataset |= {"dataroot_gt": "data", "dataroot_lq": "data"}
    single = {"name": "a", "type": "SingleImageDataset", "dataroot_lq": "data/LR"}
    options["datasets"]["val"] = single | {"io_backend": {"type": "disk"}}
    assert scanned().samples == {"train": 1, "val": SAMPLES}
    assert len(basicsr_reads(options, "train", root)) == 1
    (root / "pairs.txt").write_text("HR/image0.png LR/image0.png\n")
    scanned(("train:meta_info", "write `HR, LR` in each line"))


def test_patches_must_fit_into_hr(root, options, scanned):
    options["datasets"]["train"]["gt_size"] = 50
    first = "the first: HR has 48 x 64 pixels, smaller than 50 x 50 pixels, gt_size; "
    scanned((GT, "the training set made: 3 of 3 checked", first))
    with pytest.raises(ValueError, match="is smaller than patch size"):
        basicsr_reads(options, "train", root)


def test_a_border_must_leave_something_to_measure(options, scanned):
    options["val"]["metrics"]["psnr"]["crop_border"] = 24
    scanned((VAL_GT, "smaller than 49 x 49 pixels, of which crop_border 24 leaves nothing"))
    options["val"]["metrics"]["psnr"]["crop_border"] = 23
    scanned()


def test_an_image_larger_than_pillow_opens_is_checked(root, scanned):
    """OpenCV, which trains, reads up to 2**30 pixels."""
    data = bytearray(encode_png(image()))
    data[16:24] = struct.pack(">II", 20_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    for part in ("HR", "LR"):
        (root / "data" / part / "image9.png").write_bytes(data)
    said = "1 of 4 checked cannot be used: 'image9.png'; the first: HR has 10000 x 20000"
    scanned((LQ, said), (VAL_LQ, said))


def test_sets_to_test_on_need_names_of_their_own(options, scanned):
    options["datasets"]["val_2"] = dict(options["datasets"]["val"])
    scanned(("val_2:name", "'made_val' is the name of datasets:val too"))
    options["datasets"]["val_2"]["name"] = options["datasets"]["train"]["name"]
    scanned()


def test_results_need_names_of_their_own(root, scanned):
    for part in ("HR", "LR"):
        path = root / "data" / part / "image1.png"
        assert cv2.imwrite(str(path.with_suffix(".bmp")), cv2.imread(str(path)))
    scanned((VAL_GT, "differ in their suffixes only: image1.bmp and image1.png"))


@pytest.mark.parametrize(
    ("size", "tested"),
    [((48, 65), False), ((49, 65), False), ((48, 66), True), ((47, 64), True), ((64, 48), True)],
)
def test_hr_is_lr_times_the_scale(root, options, scanned, size, tested):
    """For a benchmark, HR may be larger by less than one LR pixel; BasicSR crops any rest."""
    cv2.imwrite(str(root / "data/HR/image1.png"), image(*size))
    text = f"HR has {size[0]} x {size[1]} pixels, and LR's 24 x 32 times 2"
    expected = ("1 of 3 checked cannot be used: 'image1.png'", text)
    scanned((LQ, *expected), *([(VAL_LQ, *expected)] if tested else []))
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
def test_what_basicsr_changes_in_images_is_a_warning(root, options, scanned, channels, type, said):
    content = np.full((48, 64, channels), np.iinfo(type).max // 2, type)
    assert cv2.imwrite(str(root / "data/HR/image1.png"), content)
    found = scanned()
    starts = [f"datasets:{start}" for start in (GT, VAL_GT)]
    assert [line.split(": ")[0] for line in found.warnings] == starts
    assert f"1 of 3 images checked in {root / 'data/HR'} {said}" in found.warnings[0]
    assert basicsr_reads(options, "val", root)[0]["gt"].shape == (3, 48, 64)


def test_of_many_images_headers_of_some_are_read(root, scanned, monkeypatch):
    monkeypatch.setattr(headers, "MOST_HEADERS", 2)
    read = []
    monkeypatch.setattr(headers, "read_header", lambda file: read.append(file) or read_header(file))
    assert "datasets:val: 3 pairs; checked the headers of 2" in scanned().notes
    names = [name for name in ("image0.png", "image2.png") for _ in ("HR", "LR")]
    assert [Path(file.name).name for file in read] == names * 2
    (root / "data/LR/image1.png").unlink()
    scanned((LQ, "'image1.png'"), (VAL_LQ, "'image1.png'"))  # names are checked in full


@pytest.mark.parametrize("value", [None, 5, "text", [], {}, {1: {}}, {"type": "lmdb"}])
def test_faulty_options_are_passed_over(root, options, value):
    assert scan({"datasets": value}, root, train=True).problems == []
    paths = [("datasets", "train"), ("scale",), ("val",), ("name",)]
    keys = ("type", "io_backend", "dataroot_gt", "gt_size", "filename_tmpl", "name")
    paths += [("datasets", "train", key) for key in keys]
    for *sections, key in paths:
        changed = node = copy.deepcopy(options)
        for section in sections:
            node = node[section]
        node[key] = value
        scan(changed, root, train=True)


def test_sets_of_somebody_elses_type_are_left_alone(root, options):
    shutil.rmtree(root / "data/LR")
    registered = {"dataset": {"PairedImageDataset": type("PairedImageDataset", (), {})}}
    assert scan(options, root, train=True, registered=registered).samples == {}


def test_an_epoch_must_have_a_whole_batch(options):
    options["datasets"]["train"] |= {"batch_size_per_gpu": 4, "dataset_enlarge_ratio": 2}
    assert batch_problems(options, {"train": 4}, 2) == []
    assert batch_problems(options, {"train": 4}, 3) == [
        "datasets:train:batch_size_per_gpu: 4 samples times dataset_enlarge_ratio 2 are less than "
        "one batch of 4 samples for each of 3 processes or GPUs; raise the ratio to 3, or write a "
        "smaller batch"
    ]
    options["datasets"]["train"]["dataset_enlarge_ratio"] = 3
    assert batch_problems(options, {"train": 4}, 3) == batch_problems(options, {}, 3) == []
