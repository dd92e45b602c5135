"""Every mistake in an option file is reported at once, by its path, before anything is created."""

import copy
import json

import lmdb
import pytest
import torch
import yaml
from helpers import small_test_options, small_train_options, write_pairs

from dlgsanet_arch.options import OptionsError, check, load, override

REGISTERED = {
    "arch": ["DLGSANet", "EDSR"],
    "model": ["SRModel", "ESRGANModel_basicsr"],
    "dataset": ["PairedImageDataset", "SingleImageDataset"],
    "metric": ["calculate_psnr", "calculate_ssim"],
    "loss": ["L1Loss", "MSELoss"],
}
ABSENT = "<absent>"  # a key to delete


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with pictures in data/, an LMDB in pairs.lmdb/ and a file weights.pth."""
    folder = tmp_path_factory.mktemp("root")
    write_pairs(folder / "data", 2)
    lmdb.open(str(folder / "pairs.lmdb")).close()
    (folder / "pairs.lmdb" / "meta_info.txt").write_text("picture0.png (48,64,3) 1\n")
    (folder / "empty.lmdb").mkdir()
    (folder / "empty").mkdir()
    (folder / "empty" / "Thumbs.db").touch()
    (folder / "names.txt").write_text("picture0.png (48,64,3)\n")
    torch.save({}, folder / "weights.pth")
    return folder


def train_options(root):
    options = small_train_options(root / "data")
    for name in ("train", "val"):
        options["datasets"][name] |= {"dataroot_gt": "data/HR", "dataroot_lq": "data/LR"}
    return json.loads(json.dumps(options))  # no section is shared


def changed(options, changes):
    for path, value in changes.items():
        *sections, key = path.split(":")
        node = options
        for section in sections:
            node = node[section]
        if value == ABSENT:
            del node[key]
        else:
            node[key] = value
    return options


def problems(options, root, train=True, registered=REGISTERED):
    """Return the lines of the report, without its heading."""
    before = copy.deepcopy(options)
    try:
        check(options, train=train, root=root, registered=registered)
    except OptionsError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    finally:
        assert options == before
    return []


def test_good_options_pass(root):
    assert problems(train_options(root), root) == []
    testing = small_test_options(root / "data", root / "weights.pth")
    assert problems(testing, root, train=False) == []
    assert problems(changed(testing, {"path:pretrain_network_g": "weights.pth"}), root, False) == []


GOOD_CHANGES = [
    {"val": ABSENT, "datasets:val": ABSENT},
    {"model_type": "ESRGANModel"},
    {"network_g": {"type": "EDSR", "anything": 1}},
    {"datasets:train:dataroot_gt": "pairs.lmdb", "datasets:train:dataroot_lq": "pairs.lmdb"}
    | {"datasets:train:io_backend": {"type": "lmdb"}},
    {"datasets:val:meta_info_file": "names.txt"},
    {"datasets:val": {"name": "a", "type": "SingleImageDataset", "dataroot_lq": "data/LR"}
     | {"io_backend": {"type": "disk"}}},
    {"path:resume_state": "weights.pth", "path:pretrain_network_g": "gone.pth"},
    {"network_g:upsampler": "", "scale": 1},
]  # fmt: skip


@pytest.mark.parametrize("changes", GOOD_CHANGES, ids=str)
def test_other_good_options_pass(root, changes):
    assert problems(changed(train_options(root), changes), root) == []


# What is changed, and the one line that must then be reported: its path, and a part of the rest.
TRAIN_FAULTS = [
    # required keys
    ({"name": ABSENT}, "name: missing; write `name: tiny_x4`"),
    ({"scale": None}, "scale: empty; write `scale: 4`"),
    ({"num_gpu": ABSENT}, "num_gpu: missing"),
    ({"path": None}, "path: empty; write `path: {}`"),
    ({"path": ["a"]}, "path: must be a section of keys; got ['a']"),
    ({"logger": ABSENT, "loger": {}}, "logger: missing", "print_freq", "did you mean 'loger'?"),
    ({"logger:use_tb_logger": ABSENT}, "logger:use_tb_logger: missing"),
    ({"train:total_iter": ABSENT, "train:total_iters": 9}, "train:total_iter: missing",
     "did you mean 'total_iters'?"),
    ({"train:pixel_opt": ABSENT}, "train:pixel_opt: missing; write `pixel_opt: {type: L1Loss"),
    ({"val:save_img": ABSENT}, "val:save_img: missing; write `save_img: false`"),
    ({"val:val_freq": ABSENT}, "val:val_freq: missing"),
    ({"val:metrics:psnr:crop_border": ABSENT, "val:metrics:psnr:crop_bordr": 2},
     "val:metrics:psnr:crop_border: missing; write `crop_border: 2`; did you mean 'crop_bordr'?"),
    ({"datasets:train": ABSENT}, "datasets:train: missing; write a section with batch_size_per"),
    ({"datasets:train:use_hflip": ABSENT}, "datasets:train:use_hflip: missing"),
    ({"datasets:train:gt_size": ABSENT}, "datasets:train:gt_size: missing; write `gt_size: 192`"),
    ({"datasets:val:io_backend": ABSENT}, "datasets:val:io_backend: missing", "type"),
    ({"datasets:test_1": {"name": "a", "type": "Other"}}, "datasets:test_1: no name for a data"),
    # values
    ({"train:optim_g:lr": "5e-4"},
     "train:optim_g:lr: is the text '5e-4', not a number; write !!float 5e-4"),
    ({"train:optim_g:betas": [0.9, "0.99"]}, "train:optim_g:betas: is the text '0.99'"),
    ({"train:warmup_iter": "-1"}, "train:warmup_iter: is the text '-1'", "write -1 without quo"),
    ({"datasets:train:gt_size": 32.0}, "datasets:train:gt_size: must be a whole number; got 32.0"),
    ({"name": 4}, "name: must be text; got 4; write it in quotes: '4'"),
    ({"datasets:val:name": 291}, "datasets:val:name: must be text; got 291"),
    ({"val:val_freq": 0}, "val:val_freq: must be above 0; got 0"),
    ({"val:metrics:psnr:better": "Higher"}, "val:metrics:psnr:better: 'Higher' is not known; did "
     "you mean 'higher'?"),
    ({"datasets:val:io_backend:type": "file"}, "datasets:val:io_backend:type: 'file' is not known",
     "'disk', 'lmdb', 'memcached'"),
    ({"train:optim_g:type": "AdamW"}, "train:optim_g:type: 'AdamW' is not known; did you mean"),
    ({"datasets:train:gt_size": 33}, "datasets:train:gt_size: 33 is not a multiple of scale 2; "
     "write 32"),
    ({"scale": 4, "datasets:train:gt_size": 32}, "scale: is 4, but network_g enlarges by 2"),
    ({"network_g:upsampler": ""}, "scale: is 2, but network_g enlarges by 1, as without an"),
    # the network
    ({"network_g:windowsize": 7}, "network_g:windowsize: DLGSANet has no such argument; did you "
     "mean 'window_size'?"),
    ({"network_g:buildblock_type": "sparsedge"}, "network_g:buildblock_type: 'sparsedge' is not "
     "known; did you mean 'sparseedge'?"),
    ({"network_g:activation": 1}, "network_g:activation: 1 is not known; there are: 'relu'"),
    ({"network_g:dim": 50}, "network_g: ", "dim", "50"),
    ({"network_g:dim": "12"}, "network_g:dim: is the text '12', not a number; write 12 without"),
    # names that BasicSR looks up
    ({"model_type": "SrModel"}, "model_type: no model is registered as 'SrModel'; did you mean "
     "'SRModel'?"),
    ({"network_g:type": "DLGSAnet"}, "network_g:type: no arch is registered as 'DLGSAnet'; did "
     "you mean 'DLGSANet'?"),
    ({"datasets:train:type": "PairedDataset"}, "datasets:train:type: no dataset is registered"),
    ({"val:metrics:psnr:type": "calculate_psrn"}, "val:metrics:psnr:type: no metric is registered "
     "as 'calculate_psrn'; did you mean 'calculate_psnr'?"),
    ({"train:pixel_opt:type": "L1loss"}, "train:pixel_opt:type: no loss is", "'L1Loss'?"),
    # pictures
    ({"datasets:train:dataroot_gt": "gone"}, "datasets:train:dataroot_gt: the HR pictures of the "
     "training set made: ", "gone does not exist; ", "datasets/README.md"),
    ({"datasets:val:dataroot_lq": "empty"}, "datasets:val:dataroot_lq: the LR pictures of the "
     "validation set made_val: ", "empty holds no pictures"),
    ({"datasets:val:dataroot_lq": "weights.pth"}, "datasets:val:dataroot_lq: ", "is no folder"),
    ({"datasets:val:dataroot_lq": "pairs.lmdb"}, "datasets:val:dataroot_lq: ", "is an LMDB"),
    ({"datasets:val:io_backend": {"type": "lmdb"}, "datasets:val:dataroot_gt": "pairs.lmdb",
      "datasets:val:dataroot_lq": "empty.lmdb"}, "datasets:val:dataroot_lq: ", "no data.mdb"),
    ({"datasets:val:io_backend": {"type": "lmdb"}, "datasets:val:dataroot_gt": "pairs.lmdb"},
     "datasets:val:dataroot_lq: ", "LR is no LMDB by its name", "`type: disk`"),
    ({"datasets:val:meta_info_file": "gone.txt"}, "datasets:val:meta_info_file: the list of the "
     "validation set made_val: ", "gone.txt does not exist"),
    # paths
    ({"path:pretrain_network_g": "gone.pth"}, "path:pretrain_network_g: there is no file ",
     "gone.pth; correct the path"),
    ({"path:resume_state": "gone.state"}, "path:resume_state: there is no file "),
    ({"path:pretrained_network_g": "weights.pth"}, "path:pretrained_network_g: not known", "make a "
     "folder 'weights.pth'; did you mean 'pretrain_network_g'?"),
    ({"logger:use_tb_logger": False, "logger:wandb": {"project": "a"}},
     "logger:use_tb_logger: must be true for wandb"),
]  # fmt: skip
TEST_FAULTS = [
    ({"datasets": ABSENT}, "datasets: missing; write `datasets: {test_1: …}`"),
    ({"datasets": {}}, "datasets: there is nothing to test on"),
    ({"datasets:train": {"name": "a", "type": "Other"}}, "datasets:train: no name for a data set"),
    ({"path:pretrain_network_g": None}, "path:pretrain_network_g: empty; write `pretrain_"),
    ({"path:pretrain_network_g": ABSENT, "path:pretrained_network_g": None},
     "path:pretrain_network_g: missing", "did you mean 'pretrained_network_g'?"),
    ({"path:pretrain_network_g": "gone.pth"}, "path:pretrain_network_g: there is no file ",
     "experiments/<name>/models"),
    ({"val:suffix": ABSENT}, "val:suffix: missing; write `suffix: ~`"),
    ({"val": ABSENT}, "val: missing; write a section with save_img"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), [(c, e) for c, *e in TRAIN_FAULTS], ids=str)
def test_each_fault_in_training_options_is_reported_once(root, changes, expected, monkeypatch):
    monkeypatch.setattr("dlgsanet_arch.options.find_spec", lambda name: name)
    reported = problems(
        changed(train_options(root), changes),
        root,
        registered={**REGISTERED, "dataset": [*REGISTERED["dataset"], "Other"]},
    )
    assert len(reported) == 1, reported
    assert reported[0].startswith(expected[0])
    assert all(part in reported[0] for part in expected), reported


@pytest.mark.parametrize(("changes", "expected"), [(c, e) for c, *e in TEST_FAULTS], ids=str)
def test_each_fault_in_test_options_is_reported_once(root, changes, expected):
    options = changed(small_test_options(root / "data", root / "weights.pth"), changes)
    reported = problems(options, root, train=False, registered=None)
    assert len(reported) == 1, reported
    assert reported[0].startswith(expected[0])
    assert all(part in reported[0] for part in expected), reported


def test_a_key_that_is_needed_itself_is_no_misspelling_of_another(root):
    options = changed(train_options(root), {"datasets:val:dataroot_lq": ABSENT})
    (reported,) = problems(options, root)
    assert reported == (
        "datasets:val:dataroot_lq: missing; write `dataroot_lq: datasets/benchmark/Set5/X4/LR`"
    )


def test_paths_may_start_from_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    changes = {"path:pretrain_network_g": "~/weights.pth", "datasets:val:dataroot_gt": "~/data/HR"}
    assert problems(changed(train_options(root), changes), root) == []


@pytest.mark.parametrize(("package", "key"), [("tensorboard", "use_tb_logger"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_reported(root, monkeypatch, package, key):
    changes = {"logger:use_tb_logger": True, "logger:wandb": {"project": "a"}}
    monkeypatch.setattr("dlgsanet_arch.options.find_spec", lambda name: name != package or None)
    (reported,) = problems(changed(train_options(root), changes), root)
    assert reported.startswith(f"logger:{key}")
    assert f"pip install {package}" in reported


def test_all_faults_come_in_one_report(root):
    changes = {
        "name": ABSENT,
        "network_g:dmi": 48,
        "network_g:activation": "rellu",
        "network_g:window_size": 4,
        "train:optim_g:lr": "1e-4",
        "model_type": "SRModle",
        "datasets:val:dataroot_gt": "gone",
    }
    reported = problems(changed(train_options(root), changes), root)
    paths = {line.split(": ")[0] for line in reported}
    assert paths == {
        *(
            "name",
            "network_g:dmi",
            "network_g:activation",
            "network_g",
            "train:optim_g:lr",
            "model_type",
        ),
        "datasets:val:dataroot_gt",
    }


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("value", [None, 5, "text", [], [{"type": 1}], {}, {1: {}}, {"a": None}])
def test_any_yaml_ends_in_a_report(root, train, value):
    sections = ("datasets", "network_g", "path", "train", "val", "logger", "network_d", "name")
    for changes in ({}, *({section: value} for section in sections)):
        if changes:
            reported = problems(changed(train_options(root), changes), root, train)
        else:
            reported = problems(dict.fromkeys(sections, value), root, train)
            assert reported
    for section in ("train", "val"):
        for key in ("type", "io_backend", "name", "dataroot_gt"):
            problems(changed(train_options(root), {f"datasets:{section}:{key}": value}), root)


def test_load_returns_what_the_file_says(tmp_path):
    file = tmp_path / "a.yml"
    file.write_text("name: a\ntrain: {lr: !!float 5e-4, text: 5e-4}\nlist: [1, ~]\n")
    expected = {"name": "a", "train": {"lr": 5e-4, "text": "5e-4"}, "list": [1, None]}
    assert load(file) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: a\ntrain:\n  lr: [1, 2\nval: 3\n", "bad.yml:4:4: this is no YAML"),
        (b"name: a\n\tscale: 4\n", "bad.yml:2:1: this is no YAML"),
        (b"name: a: b\n", "bad.yml:1:8: this is no YAML"),
        (b"lr: !!float five\n", "bad.yml: this is no YAML"),
        (b"name: \x01\n", "bad.yml: this is no YAML"),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b"", "bad.yml holds nothing"),
        (b"- a\n- b\n", "bad.yml holds a list"),
        (b"just text\n", "bad.yml holds a str"),
        (b"a: !!python/object:os.system x\n", "bad.yml:1:4: this is no YAML"),
    ],
)
def test_what_is_no_option_file_is_refused_with_its_place(tmp_path, content, said):
    file = tmp_path / "bad.yml"
    file.write_bytes(content)
    with pytest.raises(OptionsError) as caught:
        load(file)
    assert said in str(caught.value)


def test_a_missing_option_file_is_named_with_a_near_one(tmp_path):
    (tmp_path / "tiny_x4.yml").touch()
    with pytest.raises(OptionsError, match=r"tiny_4x\.yml; did you mean 'tiny_x4\.yml'"):
        load(tmp_path / "tiny_4x.yml")
    with pytest.raises(OptionsError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_override_sets_existing_keys(root):
    options = train_options(root)
    override(options, ["train:total_iter=8", "name = b=c", "path:resume_state=~"], yaml.safe_load)
    assert options["train"]["total_iter"] == 8
    assert options["name"] == "b=c"
    assert options["path"]["resume_state"] is None


def test_override_refuses_all_unknown_keys_and_changes_nothing(root):
    options = train_options(root)
    entries = ["train:total_iters=8", "trian:total_iter=8", "name:a=1", "=3", "name", "name=b"]
    with pytest.raises(OptionsError) as caught:
        override(options, entries, yaml.safe_load)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 5
    assert "train has no key 'total_iters'; did you mean 'total_iter'?" in lines[0]
    assert "the option file has no key 'trian'; did you mean 'train'?" in lines[1]
    assert "name has no key 'a'; add the key to the option file first" in lines[2]
    assert "write KEY=VALUE" in lines[3]
    assert "write KEY=VALUE" in lines[4]
    assert options == train_options(root)
