"""The shipped option files: what each builds, and that no two drift apart.

Every file is derived by rule from one training and one test file, those of tiny_x4, whose recipe
is written out below; so a change to one file alone is a failure. demo.yml
and tiny_x4_bsds400.yml have rules of their own.
"""

import copy

import pytest
import torch
import yaml

from dlgsanet_arch.options import load, problems

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
REAL = [("train", "tiny_x4_realesrnet"), ("train", "tiny_x4_realesrgan")]
OTHERS = [("train", "demo"), ("test", "demo"), ("train", "tiny_x4_bsds400"), *REAL]
DATA_ROOTS = {"dataroot_gt", "dataroot_lq"}
BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")

# Parameters of Tiny's parts: 48 channels, 7x7 filters in 8 groups from 12 channels, 96 hidden.
GENERATOR = (48 * 12 + 12) + (12 * 49 + 12) + (12 * 8 * 49 + 8 * 49)
STATIC_FILTERS = 48 * 49 + 48
GDFN = 48 * 192 + 192 * 9 + 96 * 48
PLAIN_FFN = (48 * 96 + 96) + (96 * 48 + 48)
LOCAL_LAYER = 4 * 48 + 2 * 48 * 48 + GENERATOR + GDFN
GLOBAL_LAYER = 4 * 48 + 6 + 48 * 144 + 144 * 9 + 48 * 48 + GDFN
PARAMETERS = {
    "tiny_x2": 565_710,
    "tiny_x3": 572_205,
    "tiny_x4": 581_298,
    "light_x2": 745_188,
    "light_x3": 751_683,
    "light_x4": 760_776,
    "large_x2": 4_733_724,
    "large_x3": 4_745_889,
    "large_x4": 4_762_920,
    "tiny_x4_no_mhdlsa": 581_298 - 9 * LOCAL_LAYER,
    "tiny_x4_no_sparsegsa": 581_298 - 9 * GLOBAL_LAYER,
    "tiny_x4_softmax": 581_298,
    "tiny_x4_gelu": 581_298,
    "tiny_x4_sigmoid": 581_298,
    "tiny_x4_no_tlc": 581_298,
    "tiny_x4_static_depthwise": 581_298 - 9 * (GENERATOR - STATIC_FILTERS),
    "tiny_x4_plain_ffn": 581_298 - 18 * (GDFN - PLAIN_FFN),
}


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


# The published recipe, whole.
TINY_X4 = {
    "name": "tiny_x4",
    "model_type": "SRModel",
    "scale": 4,
    "num_gpu": "auto",
    "manual_seed": 0,
    "datasets": {
        "train": {
            "name": "DIV2K",
            "type": "PairedImageDataset",
            "dataroot_gt": "datasets/DIV2K/train_HR_sub.lmdb",
            "dataroot_lq": "datasets/DIV2K/train_LR_bicubic_X4_sub.lmdb",
            "filename_tmpl": "{}",
            "io_backend": {"type": "lmdb"},
            "gt_size": 192,
            "use_hflip": True,
            "use_rot": True,
            "num_worker_per_gpu": 6,
            "batch_size_per_gpu": 16,
            "dataset_enlarge_ratio": 250,
            "prefetch_mode": None,
        },
        "val": images("Set5", 4),
    },
    "network_g": {
        "type": "DLGSANet",
        "dim": 48,
        "groups": 3,
        "blocks": 3,
        "buildblock_type": "sparseedge",
        "window_size": 7,
        "idynamic_num_heads": 6,
        "idynamic_ffn_type": "GDFN",
        "idynamic_ffn_expansion_factor": 2,
        "idynamic": True,
        "restormer_num_heads": 6,
        "restormer_ffn_type": "GDFN",
        "restormer_ffn_expansion_factor": 2,
        "tlc_flag": True,
        "tlc_kernel": 48,
        "activation": "relu",
        "upscale": 4,
        "img_range": 1,
        "upsampler": "pixelshuffledirect",
        "body_norm": False,
    },
    "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
    "train": {
        "ema_decay": 0.999,
        "optim_g": {"type": "Adam", "lr": 0.0005, "weight_decay": 0, "betas": [0.9, 0.99]},
        "scheduler": {
            "type": "MultiStepLR",
            "milestones": [250_000, 400_000, 450_000, 475_000],
            "gamma": 0.5,
        },
        "total_iter": 500_000,
        "warmup_iter": -1,
        "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
    },
    "val": {"val_freq": 5000, "save_img": False, "metrics": metrics(4)},
    "logger": {
        "print_freq": 100,
        "save_checkpoint_freq": 5000,
        "keep_last": None,
        "save_best": "psnr",
        "use_tb_logger": True,
        "wandb": {"project": None, "resume_id": None},
    },
    "dist_params": {"backend": "nccl", "port": 29500},
}


def derived(kind, name):
    """What options/<kind>/<name>.yml must say."""
    variant, scale, changes = NAMES[name]
    expected = copy.deepcopy(TINY_X4)
    expected |= {"name": name, "scale": scale}
    expected["network_g"] |= VARIANTS[variant] | changes
    expected["network_g"] |= {"upscale": scale, "tlc_kernel": TLC_KERNELS[scale]}
    if kind == "train":
        expected["datasets"]["train"]["gt_size"] = 48 * scale
        lr = f"datasets/DIV2K/train_LR_bicubic_X{scale}_sub.lmdb"
        expected["datasets"]["train"]["dataroot_lq"] = lr
        expected["datasets"]["val"] = images("Set5", scale)
        expected["val"]["metrics"] = metrics(scale)
        return expected
    for section in ("train", "logger", "dist_params"):
        del expected[section]
    trained = "tiny_x4" if name == "tiny_x4_no_tlc" else name
    expected["path"] = {
        "pretrain_network_g": f"experiments/{trained}/models/net_g_latest.pth",
        "strict_load_g": True,
        "param_key_g": "params_ema",
    }
    expected["datasets"] = {
        f"test_{number}": images(benchmark, scale) for number, benchmark in enumerate(BENCHMARKS, 1)
    }
    expected["val"] = {"save_img": True, "suffix": None, "metrics": metrics(scale)}
    return expected


def of_shipped_weights():
    """What options/train/tiny_x4_bsds400.yml must say: another recipe for the same network."""
    expected = copy.deepcopy(TINY_X4)
    expected |= {"name": "tiny_x4_bsds400", "model_type": "DLGSANetModel"}
    expected["datasets"]["train"] |= {
        "name": "BSDS400",
        "dataroot_gt": "datasets/BSDS400/train_HR_sub.lmdb",
        "dataroot_lq": "datasets/BSDS400/train_LR_bicubic_X4_sub.lmdb",
        "gt_size": 128,
        "num_worker_per_gpu": 0,
        "batch_size_per_gpu": 4,
        "dataset_enlarge_ratio": 100,
    }
    expected["datasets"]["val"] = images("Set14", 4)
    train = expected["train"]
    train["optim_g"] |= {"fused": True, "lr": 0.001}
    train["scheduler"] = {
        "type": "CosineAnnealingRestartLR",
        "periods": [8000],
        "restart_weights": [1],
        "eta_min": 1e-6,
    }
    train |= {"clip_grad_norm": 0.5, "total_iter": 8000, "warmup_iter": 200}
    expected["val"]["val_freq"] = 1000
    expected["logger"] |= {
        "print_freq": 50,
        "save_checkpoint_freq": 500,
        "keep_last": 2,
        "use_tb_logger": False,
    }
    return expected


def plain(node):
    """BasicSR's ordered sections as dicts: their order is not a part of what they say."""
    return {key: plain(node[key]) for key in node} if isinstance(node, dict) else node


@pytest.fixture(scope="module")
def read(repository):
    """Reads options/<kind>/<name>.yml as BasicSR does."""
    from basicsr.utils.options import ordered_yaml

    def read(kind, name):
        text = (repository / "options" / kind / f"{name}.yml").read_text()
        return plain(yaml.load(text, Loader=ordered_yaml()[0]))

    return read


def report(options, kind, root, registered):
    return problems(options, train=kind == "train", root=root, registered=registered)


def make_tree(root, options):
    """Put something where `options` look for images and weights."""
    for dataset in options["datasets"].values():
        for key in DATA_ROOTS & dataset.keys():
            folder = root / dataset[key]
            folder.mkdir(parents=True, exist_ok=True)
            lmdb = dataset["io_backend"]["type"] == "lmdb"
            for name in ("data.mdb", "meta_info.txt") if lmdb else ("a.png",):
                (folder / name).write_text("a")
    if options["path"]["pretrain_network_g"]:
        weights = root / options["path"]["pretrain_network_g"]
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.touch()


def test_there_is_a_file_for_each_variant_scale_and_ablation(repository):
    shipped = {(file.parent.name, file.stem) for file in (repository / "options").glob("*/*.yml")}
    assert shipped == {*FILES, *OTHERS}


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_the_file_says_what_the_rule_says(read, kind, name):
    assert read(kind, name) == derived(kind, name)


def test_the_file_of_the_shipped_weights_says_what_the_rule_says(read):
    assert read("train", "tiny_x4_bsds400") == of_shipped_weights()


@pytest.mark.parametrize(("kind", "name"), REAL)
def test_real_esrgan_trains_tiny_and_both_files_degrade_alike(read, kind, name):
    options, other = read(kind, name), read(*REAL[0])
    assert options["network_g"] == TINY_X4["network_g"]
    assert options["datasets"] == other["datasets"]
    degradation = [key for key in other if other[key] != options.get(key)]
    assert set(degradation) <= {"name", "model_type", "gt_usm", "path", "train"}


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_the_file_builds_the_published_network(read, kind, name):
    from basicsr.archs import build_network

    with torch.device("meta"):
        network = build_network(read(kind, name)["network_g"])
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.usefixtures("vgg")
@pytest.mark.parametrize(("kind", "name"), [*FILES, *OTHERS])
def test_the_check_misses_nothing_but_data(read, registered, tmp_path, kind, name):
    options = read(kind, name)
    missing = report(options, kind, tmp_path, registered)
    roots = [
        f"datasets:{phase}:{key}"
        for phase, dataset in options["datasets"].items()
        for key in sorted(DATA_ROOTS & dataset.keys())
    ]
    roots += ["path:pretrain_network_g"] if options["path"]["pretrain_network_g"] else []
    assert [line.split(": ")[0].strip() for line in missing] == roots
    make_tree(tmp_path, options)
    assert report(options, kind, tmp_path, registered) == []


@pytest.mark.parametrize(("kind", "name"), [("train", "tiny_x4"), ("test", "light_x2")])
def test_basicsr_and_this_package_read_the_same(repository, read, kind, name):
    """BasicSR takes 5e-4 for text, so the files mark such numbers."""
    assert load(repository / "options" / kind / f"{name}.yml") == read(kind, name)


def test_one_epoch_holds_all_iterations():
    """BasicSR's loop can stop early where there are more epochs than iterations in one."""
    training = TINY_X4["datasets"]["train"]
    div2k_sub_images = 32_592
    patches = div2k_sub_images * training["dataset_enlarge_ratio"]
    assert patches // training["batch_size_per_gpu"] >= TINY_X4["train"]["total_iter"]


def test_a_training_file_and_its_test_file_have_one_network(read):
    for kind, name in FILES:
        if kind == "train":
            assert read("test", name)["network_g"] == read("train", name)["network_g"]


def test_the_command_in_the_heading_is_the_files_own(repository):
    for kind, name in FILES:
        file = f"options/{kind}/{name}.yml"
        assert f"#   python {kind}.py -opt {file}\n" in (repository / file).read_text()
