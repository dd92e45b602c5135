"""The shipped option files: what each builds, and that no two drift apart.

Every file of the published recipe is derived by rule from options/train/tiny_x4.yml, so a change to
one file alone is a failure.
"""

import copy
import json

import pytest
import torch
import yaml

from dlgsanet_arch.options import load, problems
from dlgsanet_arch.tools.published import PUBLISHED

VARIANTS = {
    "tiny": {"dim": 48, "groups": 3, "blocks": 3},
    "light": {"dim": 48, "groups": 4, "blocks": 3},
    "large": {"dim": 90, "groups": 6, "blocks": 4},
}
TLC_KERNELS = {2: 96, 3: 72, 4: 48}
ABLATIONS = {
    "no_mhdlsa": {"buildblock_type": "restormer"},
    "no_sparsegsa": {"buildblock_type": "idynamic"},
    "softmax": {"buildblock_type": "edge"},
    "gelu": {"activation": "gelu"},
    "sigmoid": {"activation": "sigmoid"},
    "static_depthwise": {"idynamic": False},
    "plain_ffn": {"idynamic_ffn_type": "BaseFFN", "restormer_ffn_type": "BaseFFN"},
    "no_tlc": {"tlc_flag": False},  # at test time alone: no training file
}
NAMES = {f"{variant}_x{scale}": (variant, scale, {}) for variant in VARIANTS for scale in (2, 3, 4)}
NAMES |= {f"tiny_x4_{name}": ("tiny", 4, changes) for name, changes in ABLATIONS.items()}
FILES = [("train", name) for name in NAMES if name != "tiny_x4_no_tlc"]
FILES += [("test", name) for name in NAMES]
# Beside the published recipe.
RECIPES = ("x4_bsds400", "x4_mix", "x3_mix", "x2_mix", "x4_gpu")
LOCAL = [("train", f"tiny_{name}") for name in RECIPES]
REAL = [("train", "tiny_x4_realesrnet"), ("train", "tiny_x4_realesrgan")]
OTHERS = [("train", "demo"), ("test", "demo"), *LOCAL, *REAL]
DATA_ROOTS = {"dataroot_gt", "dataroot_lq"}
BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")


def images(name, scale):
    """A benchmark's entry, by the rule of the data tree."""
    folder = f"datasets/benchmark/{name}/X{scale}"
    return {
        "name": name,
        "type": "PairedImageDataset",
        "dataroot_gt": f"{folder}/HR",
        "dataroot_lq": f"{folder}/LR",
        "filename_tmpl": "{}",
        "io_backend": {"type": "disk"},
    }


def metrics(scale):
    """PSNR and SSIM of the Y channel without a border of `scale` pixels."""
    common = {"crop_border": scale, "test_y_channel": True, "better": "higher"}
    return {name: {"type": f"calculate_{name}", **common} for name in ("psnr", "ssim")}


@pytest.fixture(scope="module")
def read(repository):
    """Reads options/<kind>/<name>.yml as BasicSR does, as plain dicts."""
    from basicsr.utils.options import ordered_yaml

    def read(kind, name):
        text = (repository / "options" / kind / f"{name}.yml").read_text()
        return json.loads(json.dumps(yaml.load(text, Loader=ordered_yaml()[0])))

    return read


def derived(tiny, kind, name):
    """What options/<kind>/<name>.yml must say."""
    variant, scale, changes = NAMES[name]
    expected = copy.deepcopy(tiny) | {"name": name, "scale": scale}
    expected["network_g"] |= VARIANTS[variant] | changes
    expected["network_g"] |= {"upscale": scale, "tlc_kernel": TLC_KERNELS[scale]}
    if kind == "train":
        lr = f"datasets/DIV2K/train_LR_bicubic_X{scale}_sub.lmdb"
        expected["datasets"]["train"] |= {"gt_size": 48 * scale, "dataroot_lq": lr}
        expected["datasets"]["val"] = images("Set5", scale)
        expected["val"]["metrics"] = metrics(scale)
        return expected
    for section in ("train", "logger", "dist_params"):
        del expected[section]
    trained = "tiny_x4" if name == "tiny_x4_no_tlc" else name
    weights = f"experiments/{trained}/models/net_g_latest.pth"
    path = {"pretrain_network_g": weights, "strict_load_g": True, "param_key_g": "params_ema"}
    sets = {f"test_{number}": images(name, scale) for number, name in enumerate(BENCHMARKS, 1)}
    val = {"save_img": True, "suffix": None, "metrics": metrics(scale)}
    return expected | {"path": path, "datasets": sets, "val": val}


def test_there_is_a_file_for_each_variant_scale_and_ablation(repository):
    shipped = {(file.parent.name, file.stem) for file in (repository / "options").glob("*/*.yml")}
    assert shipped == {*FILES, *OTHERS}


def test_the_recipe_is_the_published_one(read):
    tiny = read("train", "tiny_x4")
    data, train = tiny["datasets"]["train"], tiny["train"]
    assert (data["gt_size"], data["batch_size_per_gpu"]) == (192, 16)
    assert data["use_hflip"] is data["use_rot"] is True
    adam = {"type": "Adam", "lr": 5e-4, "weight_decay": 0, "betas": [0.9, 0.99]}
    steps = [250_000, 400_000, 450_000, 475_000]
    assert train == {
        "ema_decay": 0.999,
        "optim_g": adam,
        "scheduler": {"type": "MultiStepLR", "milestones": steps, "gamma": 0.5},
        "total_iter": 500_000,
        "warmup_iter": -1,
        "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
    }
    # BasicSR's loop can stop early where there are more epochs than iterations in one.
    sub_images_of_div2k = 32_592
    assert sub_images_of_div2k * data["dataset_enlarge_ratio"] // 16 >= 500_000


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_the_file_says_what_the_rule_says_and_builds_the_published_network(
    repository, read, kind, name
):
    from basicsr.archs import build_network

    options = read(kind, name)
    assert options == derived(read("train", "tiny_x4"), kind, name)
    with torch.device("meta"):
        network = build_network(options["network_g"])
    variant, scale, changes = NAMES[name]
    if not changes:
        published = PUBLISHED[f"DLGSANet {variant.capitalize()}", scale]
        assert sum(each.numel() for each in network.parameters()) == published.parameters
    file = f"options/{kind}/{name}.yml"
    assert f"#   python {kind}.py -opt {file}\n" in (repository / file).read_text()
    # BasicSR takes 5e-4 for text, so the files mark such numbers
    assert load(repository / file) == read(kind, name)


def test_others_train_tiny_and_real_esrgan_s_files_degrade_alike(read):
    one, other = (read(*each) for each in REAL)
    for kind, name in (*REAL, *LOCAL):
        published = name[: len("tiny_x4")]
        assert read(kind, name)["network_g"] == read("train", published)["network_g"]
    differing = {key for key in one if one[key] != other.get(key)}
    assert differing <= {"name", "model_type", "gt_usm", "path", "train"}


@pytest.mark.parametrize(("kind", "name"), [*FILES, *OTHERS])
def test_the_check_misses_nothing_but_data(read, registered, tmp_path, kind, name):
    def report():
        return problems(options, train=kind == "train", root=tmp_path, registered=registered)

    options, lmdb = read(kind, name), ("data.mdb", "meta_info.txt")
    roots = []
    for phase, dataset in options["datasets"].items():
        for key in sorted(DATA_ROOTS & dataset.keys()):
            names = lmdb if dataset["io_backend"]["type"] == "lmdb" else ("a.png",)
            roots.append((f"datasets:{phase}:{key}", [f"{dataset[key]}/{each}" for each in names]))
    weights = options["path"]["pretrain_network_g"]
    roots += [("path:pretrain_network_g", [weights])] if weights else []
    assert [line.split(": ")[0].strip() for line in report()] == [path for path, _ in roots]
    for file in (tmp_path / each for _, files in roots for each in files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a")
    assert report() == []
