"""Weights are read from whatever holds them, recognised, and refused in plain words."""

import argparse
import json
import pickle

import numpy as np
import pytest
import torch

from dlgsanet_arch.checkpoint import CheckpointError, check_compatible, infer_config, read_weights
from dlgsanet_arch.network import DLGSANet

# Every argument that the weights tell, with values that are not the defaults.
SMALL = {
    "in_chans": 3,
    "dim": 24,
    "groups": 2,
    "blocks": 3,
    "buildblock_type": "sparseedge",
    "window_size": 5,
    "idynamic_num_heads": 4,
    "idynamic_ffn_type": "GDFN",
    "idynamic_ffn_expansion_factor": 3.0,
    "idynamic": True,
    "restormer_num_heads": 3,
    "restormer_ffn_type": "GDFN",
    "restormer_ffn_expansion_factor": 1.5,
    "upscale": 2,
    "upsampler": "pixelshuffledirect",
    "body_norm": False,
}
LOCAL = [name for name in SMALL if name.startswith("idynamic")] + ["window_size"]
GLOBAL = [name for name in SMALL if name.startswith("restormer")]
TINY_X4 = {
    "dim": 48,
    "groups": 3,
    "blocks": 3,
    "buildblock_type": "sparseedge",
    "upscale": 4,
    "upsampler": "pixelshuffledirect",
}


def weights_of(**arguments):
    """A state dict's names and sizes, without memory."""
    with torch.device("meta"):
        return DLGSANet(**arguments).state_dict()


@pytest.fixture(scope="module")
def weights():
    """A small network's real weights."""
    return DLGSANet(dim=12, groups=1, blocks=1, window_size=3).state_dict()


def refusal(function, *arguments):
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "not_told"),
    [
        ({}, []),
        ({"in_chans": 1, "groups": 1, "blocks": 1}, []),
        ({"in_chans": 4, "upscale": 3}, []),
        ({"idynamic_ffn_type": "BaseFFN", "window_size": 9, "idynamic_num_heads": 24}, []),
        ({"restormer_ffn_type": "BaseFFN", "restormer_num_heads": 8}, []),
        ({"body_norm": True}, []),
        ({"body_norm": True, "groups": 1, "buildblock_type": "restormer"}, LOCAL),
        ({"buildblock_type": "idynamic"}, GLOBAL),
        ({"idynamic": False, "window_size": 3}, ["idynamic_num_heads"]),
        ({"upsampler": "pixelshuffle", "upscale": 8}, []),
        ({"upsampler": "pixelshuffle", "upscale": 3}, []),
        ({"upscale": 1}, []),
        ({"upsampler": "", "upscale": 1}, []),
    ],
    ids=str,
)
def test_the_configuration_is_told_from_the_weights(changes, not_told):
    config = {**SMALL, **changes}
    weights = weights_of(**config)
    inferred = infer_config(weights)
    told = [name for name in config if name not in not_told]
    assert {name: inferred[name] for name in told} == {name: config[name] for name in told}
    assert infer_config(weights_of(**inferred)) == inferred
    check_compatible(weights, inferred)
    check_compatible(weights, {"type": "DLGSANet", **config})


# 7 · (61 / 7) is less than 61 in floating point.
@pytest.mark.parametrize(("dim", "factor"), [(24, 2.66), (7, 61.5 / 7), (60, 2.999)])
def test_an_inferred_expansion_gives_the_same_hidden_channels(dim, factor):
    config = {**TINY_X4, "dim": dim, "idynamic_num_heads": 1, "restormer_num_heads": 1}
    weights = weights_of(**config, idynamic_ffn_expansion_factor=factor)
    inferred = infer_config(weights)
    assert int(dim * inferred["idynamic_ffn_expansion_factor"]) == int(dim * factor)
    check_compatible(weights, inferred)


@pytest.mark.parametrize(("dim", "groups", "blocks"), [(48, 3, 3), (48, 4, 3), (90, 6, 4)])
def test_published_networks_are_told_whole(dim, groups, blocks):
    for scale, tlc_kernel in ((2, 96), (3, 72), (4, 48)):
        config = {**TINY_X4, "dim": dim, "groups": groups, "blocks": blocks, "upscale": scale}
        inferred = infer_config(weights_of(**config))
        published = {
            "tlc_kernel": tlc_kernel,
            "tlc_flag": True,
            "activation": "relu",
            "img_range": 1,
            "window_size": 7,
        }
        expected = {**config, **published}
        assert {name: inferred[name] for name in expected} == expected


def test_golden_weights_are_recognised(shared_data):
    files = sorted((shared_data / "golden").glob("*.npz"))
    if not files:
        pytest.skip(f"no golden files in {shared_data / 'golden'}")
    for file in files:
        golden = np.load(file)
        weights = {
            name.removeprefix("param/"): torch.from_numpy(golden[name])
            for name in golden.files
            if name.startswith("param/")
        }
        DLGSANet(**infer_config(weights)).load_state_dict(weights, strict=True)
        check_compatible(weights, json.loads(str(golden["config"])))


def test_the_averaged_weights_come_first(tmp_path, weights):
    averaged = {name: tensor + 1 for name, tensor in weights.items()}
    layouts = [
        ({"params": weights, "params_ema": averaged}, None, averaged),
        ({"params": weights, "params_ema": averaged}, "params", weights),
        ({"params": weights}, None, weights),
        ({"mine": averaged, "params": weights}, "mine", averaged),
        (weights, None, weights),
        ({f"module.{name}": tensor for name, tensor in weights.items()}, None, weights),
        ({"params": {f"module.{name}": t for name, t in weights.items()}}, None, weights),
    ]
    for content, key, expected in layouts:
        torch.save(content, tmp_path / "weights.pth")
        read = read_weights(tmp_path / "weights.pth", key)
        assert list(read) == list(expected)
        assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_key_that_is_absent_is_an_error(tmp_path, weights):
    torch.save({"params": weights, "params_ema": weights}, tmp_path / "both.pth")
    message = refusal(read_weights, tmp_path / "both.pth", "params_emma")
    assert "no 'params_emma': it has the keys params, params_ema" in message
    torch.save(weights, tmp_path / "bare.pth")
    assert "bare state dict" in refusal(read_weights, tmp_path / "bare.pth", "params")


def _cut(path, content, part, **how):
    torch.save(content, path, **how)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])


OLD_FORMAT = {"_use_new_zipfile_serialization": False}
BAD_FILES = {
    "half": (lambda path, params: _cut(path, params, 0.5), "truncated"),
    "nearly whole": (lambda path, params: _cut(path, params, 0.99), "truncated"),
    "half, old format": (lambda path, params: _cut(path, params, 0.5, **OLD_FORMAT), "truncated"),
    "empty": (lambda path, _: path.touch(), "is empty"),
    "picture": (lambda path, _: path.write_bytes(b"\x89PNG\r\n\x1a\n" * 99), "no checkpoint"),
    "text": (lambda path, _: path.write_text("version https://git-lfs\n"), "no checkpoint"),
    "plain pickle": (lambda path, _: path.write_bytes(pickle.dumps([1, 2], 2)), "no checkpoint"),
    "list": (lambda path, params: torch.save([params], path), "holds a list"),
    "tensor": (lambda path, _: torch.save(torch.ones(3), path), "holds a Tensor"),
    "no keys": (lambda path, _: torch.save({}, path), "no keys"),
    "other keys": (lambda path, params: torch.save({"net": params}, path), "the keys net"),
    "other values": (lambda path, _: torch.save({"params": {"a": 1}}, path), "under 'params'"),
    "Python object": (
        lambda path, params: torch.save({**params, "args": argparse.Namespace(a=1)}, path),
        "argparse.Namespace",
    ),
    "training state": (
        lambda path, _: torch.save({"iter": 1, "optimizers": [], "schedulers": []}, path),
        "training state",
    ),
    "folder": (lambda path, _: path.mkdir(), "Is a directory"),
    "absent": (lambda path, _: None, "No such file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path, weights, kind):
    make, said = BAD_FILES[kind]
    path = tmp_path / "weights.pth"
    make(path, {"params": weights})
    message = refusal(read_weights, path)
    assert said in message
    assert str(path) in message


def test_weights_of_another_configuration_are_named():
    tiny = weights_of(**TINY_X4)
    message = refusal(check_compatible, tiny, {**TINY_X4, "groups": 4, "upscale": 2})
    assert message == (
        "the weights are of another configuration: they are DLGSANet Tiny x4 (groups: 3, "
        "upscale: 4); asked for is DLGSANet Light x2 (groups: 4, upscale: 2)"
    )
    message = refusal(check_compatible, tiny, {**TINY_X4, "idynamic": False, "upscale": 3})
    assert "asked for is DLGSANet (idynamic: false, upscale: 3)" in message


@pytest.mark.parametrize(
    ("weights", "asked", "said"),
    [
        # One-layer types have no argument of the other layers.
        (
            {"buildblock_type": "restormer"},
            {"window_size": 9, "idynamic_ffn_type": "BaseFFN"},
            'they are DLGSANet (buildblock_type: "restormer"); '
            'asked for is DLGSANet (buildblock_type: "sparseedge")',
        ),
        # There is nothing to share where filters are not predicted.
        (
            {"idynamic": False},
            {"idynamic": False, "idynamic_num_heads": 4, "blocks": 2},
            "they are DLGSANet (blocks: 3); asked for is DLGSANet (blocks: 2)",
        ),
        # Without an upsampler the network keeps the size, whatever `upscale` says.
        (
            {"upsampler": "", "upscale": 2},
            {"upsampler": "", "upscale": 4, "in_chans": 1},
            "they are DLGSANet (in_chans: 3); asked for is DLGSANet (in_chans: 1)",
        ),
    ],
)
def test_only_arguments_that_make_a_difference_are_named(weights, asked, said):
    message = refusal(check_compatible, weights_of(**TINY_X4 | weights), TINY_X4 | asked)
    assert message.endswith(said)


def test_arguments_that_the_weights_do_not_tell_do_not_matter():
    other = {"buildblock_type": "edge", "tlc_flag": False, "img_range": 255.0}
    check_compatible(weights_of(**TINY_X4), {**TINY_X4, **other})
    message = refusal(check_compatible, weights_of(**TINY_X4), {**TINY_X4, **other, "dim": 60})
    assert "buildblock_type" not in message
    assert "img_range" not in message


def test_what_is_no_dlgsanet_is_refused():
    message = refusal(check_compatible, {"conv_first.weight": torch.ones(8, 3, 3, 3)}, TINY_X4)
    assert "no weights of a DLGSANet: overlap_embed.0.proj.weight is absent" in message
    damaged = weights_of(**TINY_X4)
    del damaged["deep_feature_extraction.1.body.3.norm3.body.weight"]
    assert "deep_feature_extraction.1.body.3.norm3.body.weight" in refusal(
        check_compatible, damaged, TINY_X4
    )
