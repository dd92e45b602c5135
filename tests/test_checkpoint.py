"""Weights are read from whatever holds them, recognised, and refused in plain words."""

import argparse
import json
import os
import pickle
import resource
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import small_checkpoint
from safetensors.torch import save_file

from dlgsanet_arch.checkpoint import (
    TLC_KERNELS,
    CheckpointError,
    average,
    check_compatible,
    infer_config,
    nearest_published,
    published_configs,
    read_checkpoint,
    read_weights,
    save_checkpoint,
    transfer,
)
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet

# Every argument that the weights show, with values that are not the defaults.
SMALL = {
    **{"in_chans": 3, "dim": 24, "groups": 2, "blocks": 3, "buildblock_type": "sparseedge"},
    **{"window_size": 5, "idynamic": True, "idynamic_num_heads": 4},
    **{"idynamic_ffn_type": "GDFN", "idynamic_ffn_expansion_factor": 3.0},
    **{"restormer_num_heads": 3, "restormer_ffn_type": "GDFN"},
    **{"restormer_ffn_expansion_factor": 1.5, "body_norm": False},
    **{"upscale": 2, "upsampler": "pixelshuffledirect"},
}
LOCAL = [name for name in SMALL if name.startswith("idynamic")] + ["window_size"]
GLOBAL = [name for name in SMALL if name.startswith("restormer")]
TINY_X4 = {
    **{"dim": 48, "groups": 3, "blocks": 3, "buildblock_type": "sparseedge"},
    **{"upscale": 4, "upsampler": "pixelshuffledirect"},
}


def weights_of(**arguments):
    """A state dict's names and sizes, without memory."""
    with torch.device("meta"):
        return DLGSANet(**arguments).state_dict()


@pytest.fixture(scope="module")
def saved():
    """A small network's checkpoint."""
    return small_checkpoint()


@pytest.fixture(scope="module")
def weights(saved):
    return saved.weights


def refusal(function, *arguments):
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    return str(caught.value)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "not_shown"),
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
def test_the_configuration_is_detected_from_the_weights(changes, not_shown):
    config = {**SMALL, **changes}
    weights = weights_of(**config)
    inferred = infer_config(weights)
    shown = {name: value for name, value in config.items() if name not in not_shown}
    assert inferred.items() >= shown.items()
    assert infer_config(weights_of(**inferred)) == inferred
    check_compatible(weights, inferred)
    check_compatible(weights, {"type": "DLGSANet", **config})


def test_golden_weights_are_recognised(shared_data):
    files = sorted((shared_data / "golden").glob("*.npz"))
    if not files:
        pytest.skip(f"no golden files in {shared_data / 'golden'}")
    for file in files:
        golden = np.load(file)
        names = [name for name in golden.files if name.startswith("param/")]
        weights = {name[6:]: torch.from_numpy(golden[name]) for name in names}
        DLGSANet(**infer_config(weights)).load_state_dict(weights, strict=True)
        check_compatible(weights, json.loads(str(golden["config"])))


# 7 · (61 / 7) is less than 61 in floating point.
@pytest.mark.parametrize(("dim", "factor"), [(24, 2.66), (7, 61.5 / 7), (60, 2.999)])
def test_an_inferred_expansion_gives_the_same_hidden_channels(dim, factor):
    config = {**TINY_X4, "dim": dim, "idynamic_num_heads": 1, "restormer_num_heads": 1}
    weights = weights_of(**config, idynamic_ffn_expansion_factor=factor)
    inferred = infer_config(weights)
    assert int(dim * inferred["idynamic_ffn_expansion_factor"]) == int(dim * factor)
    check_compatible(weights, inferred)


def test_published_networks_are_detected():
    for config in published_configs().values():
        assert infer_config(weights_of(**config)) == config


def test_weights_are_found_under_every_key_and_prefix(tmp_path, weights):
    def prefixed(prefix):
        return {prefix + name: tensor for name, tensor in weights.items()}

    averaged = {name: tensor + 1 for name, tensor in weights.items()}
    layouts = [
        ({"params": weights, "params_ema": averaged}, None, averaged),
        ({"params": weights, "params_ema": averaged}, "params", weights),
        ({"params": weights}, None, weights),
        ({"mine": averaged, "params": weights}, "mine", averaged),
        (weights, None, weights),
        ({"state_dict": weights, "epoch": 3}, None, weights),
        ({"model_state_dict": weights, "optimizer_state_dict": {}}, None, weights),
        ({"model": weights, "step": 3}, None, weights),
        ({"net_g": weights, "net_d": averaged}, None, weights),
        (prefixed("module."), None, weights),
        ({"params": prefixed("module.")}, None, weights),
        (prefixed("module.module."), None, weights),
        ({"n_averaged": torch.tensor(7), **prefixed("module.")}, None, weights),
        (prefixed("_orig_mod."), None, weights),
        ({"state_dict": prefixed("model._orig_mod.")}, None, weights),
        # A trainer's module, which has other networks beside this one.
        ({"state_dict": {**prefixed("net_g."), "loss.vgg.0.weight": torch.ones(3)}}, None, weights),
    ]
    for content, key, expected in layouts:
        torch.save(content, tmp_path / "weights.pth")
        assert equal(read_weights(tmp_path / "weights.pth", key), expected)


def test_a_key_that_is_absent_is_an_error(tmp_path, weights):
    for content, said in (
        ({"params": weights, "params_ema": weights}, "it has the keys params, params_ema"),
        (weights, "it is a bare state dict"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        message = refusal(read_weights, tmp_path / "weights.pth", "params_emma")
        assert f"no weights under 'params_emma': {said}" in message


def test_weights_of_another_configuration_are_named():
    tiny = weights_of(**TINY_X4)
    message = refusal(check_compatible, tiny, {**TINY_X4, "groups": 4, "upscale": 2})
    assert message == (
        "the weights are of another configuration: they are DLGSANet Tiny x4 (groups: 3, "
        "upscale: 4); asked for is DLGSANet Light x2 (groups: 4, upscale: 2)"
    )
    message = refusal(check_compatible, tiny, {**TINY_X4, "idynamic": False, "upscale": 3})
    assert "asked for is DLGSANet (idynamic: false, upscale: 3)" in message


STATIC = {"idynamic": False}


@pytest.mark.parametrize(
    ("weights", "asked", "named"),
    [
        # One-layer types have no argument of the other layers.
        ({"buildblock_type": "restormer"}, {"window_size": 9}, 'buildblock_type: "sparseedge"'),
        # There is nothing to share where filters are not predicted.
        (
            {"idynamic": False},
            {"idynamic": False, "idynamic_num_heads": 4, "blocks": 2},
            "blocks: 2",
        ),
        # Without an upsampler the network keeps the size, whatever `upscale` says.
        ({"upsampler": ""}, {"upsampler": "", "upscale": 2, "in_chans": 1}, "in_chans: 1"),
    ],
)
def test_only_arguments_that_make_a_difference_are_named(weights, asked, named):
    message = refusal(check_compatible, weights_of(**TINY_X4 | weights), TINY_X4 | asked)
    assert message.endswith(f"asked for is DLGSANet ({named})")


def test_arguments_that_the_weights_do_not_show_do_not_matter():
    other = {"buildblock_type": "edge", "tlc_flag": False, "img_range": 255.0}
    check_compatible(weights_of(**TINY_X4), {**TINY_X4, **other})
    message = refusal(check_compatible, weights_of(**TINY_X4), {**TINY_X4, **other, "dim": 60})
    assert "buildblock_type" not in message
    assert "img_range" not in message


def test_what_is_not_a_dlgsanet_is_refused():
    message = refusal(check_compatible, {"conv_first.weight": torch.ones(8, 3, 3, 3)}, TINY_X4)
    assert "not weights of a DLGSANet: overlap_embed.0.proj.weight is absent" in message
    damaged, name = weights_of(**TINY_X4), "deep_feature_extraction.1.body.3.norm3.body.weight"
    del damaged[name]
    assert name in refusal(check_compatible, damaged, TINY_X4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_keeps_all_that_is_known_of_it(tmp_path, suffix):
    # None of these is in the weights.
    told = {"tlc_flag": False, "activation": "gelu", "img_range": 255.0, "buildblock_type": "edge"}
    saved = small_checkpoint(iteration=5000, **told)
    save_checkpoint(saved, tmp_path / f"weights{suffix}")
    read = read_checkpoint(tmp_path / f"weights{suffix}")
    assert read.config == saved.config
    assert (read.iteration, read.is_stated, read.scale) == (5000, True, 2)
    assert equal(read.weights, saved.weights)
    network = read.network()
    assert not network.training
    assert equal(network.state_dict(), saved.weights)
    assert list(tmp_path.iterdir()) == [tmp_path / f"weights{suffix}"]


def test_basicsr_loads_what_is_saved_once(tmp_path):
    from basicsr.models.base_model import BaseModel

    saved = small_checkpoint(dim=48)
    save_checkpoint(saved, tmp_path / "net.pth")
    model = BaseModel({"num_gpu": 0, "is_train": False})
    for key in ("params", "params_ema"):
        network = DLGSANet(**saved.config)
        model.load_network(network, str(tmp_path / "net.pth"), True, key)
        assert equal(network.state_dict(), saved.weights)
    assert (tmp_path / "net.pth").stat().st_size < 1.7 * 4 * saved.parameters


def test_files_of_other_programs_are_read_by_their_weights(tmp_path, weights):
    for metadata in (None, {"format": "pt"}, {"architecture": "ESRGAN", "config": "{}"}):
        prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
        save_file(prefixed, tmp_path / "net.bin", metadata)
        read = read_checkpoint(tmp_path / "net.bin")
        assert not read.is_stated
        assert read.config == infer_config(weights)
        assert equal(read.weights, weights)


def test_the_iteration_is_stated_by_basicsrs_names(tmp_path, weights):
    for name, expected in (("net_g_5000", 5000), ("net_g_latest", None), ("tiny_x4", None)):
        torch.save({"params": weights}, tmp_path / f"{name}.pth")
        assert read_checkpoint(tmp_path / f"{name}.pth").iteration == expected


def test_what_cannot_be_written_is_named(tmp_path, saved):
    said = refusal(save_checkpoint, saved, tmp_path / "net.onnx")
    assert "must be .pth or .safetensors" in said
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(saved, tmp_path / "none" / "net.safetensors")


PARAMS = {"params": small_checkpoint().weights}
OLD_FORMAT = {"_use_new_zipfile_serialization": False}


def _cut(path, content, part, **how):
    torch.save(content, path, **how)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])


def _stating(path, config):
    """Write weights with a configuration beside them that is not theirs."""
    stated = {"architecture": "DLGSANet", "config": config}
    save_file(dict(small_checkpoint().weights), path, stated)


def _with(path, change):
    """Save small weights as torch.save does, one of them changed."""
    weights = dict(small_checkpoint().weights)
    weights["upsample.0.bias"] = change(weights["upsample.0.bias"])
    torch.save({"params": weights}, path)


def _records(path, change, compression=zipfile.ZIP_STORED):
    """Write a file of torch.save's again, its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in records.items():
            archive.writestr(name, change(name, record))


def _bytearray(path):
    """A file whose pickle asks for a bytearray of 100 GB."""
    torch.save({"a": torch.ones(1)}, path)
    size = b"\x8a\x06" + (10**11).to_bytes(6, "little")
    bomb = b"\x80\x02cbuiltins\nbytearray\n" + size + b"\x85R."
    _records(path, lambda name, record: bomb if name.endswith("data.pkl") else record)


def _pickled(path, content):
    """A file of torch.save's with another pickle."""
    torch.save({"a": torch.ones(1)}, path)
    _records(path, lambda name, record: content if name.endswith("data.pkl") else record)


def _tuples(levels):
    """A pickle whose key is a tuple of two equal tuples, and so on."""
    doubled = (b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(levels))
    return b"\x80\x02})q\0" + b"".join(doubled) + b"K\x01s."


def _integers(count):
    """A pickle of keys that all have one hash."""
    keys = (((2**61 - 1) * i << 61).to_bytes(20, "little") for i in range(1, count))
    return b"\x80\x02}(" + b"".join(b"\x8a\x14" + key + b"K\0" for key in keys) + b"u."


def _encoded():
    """A pickle of text in an encoding that takes quadratic time."""
    text = "".join(map(chr, range(0x4E00, 0x9000))).encode() * 10
    text = b"X" + len(text).to_bytes(4, "little") + text
    return b"\x80\x02c_codecs\nencode\n" + text + b"X\x08\0\0\0punycode\x86R."


def _two_networks(path):
    weights = small_checkpoint().weights.items()
    torch.save({f"{side}.{name}": each for side in "ab" for name, each in weights}, path)


def _compressed(path):
    torch.save({"params": {"a": torch.zeros(1 << 20)}}, path)
    _records(path, lambda name, record: record, zipfile.ZIP_DEFLATED)


def _many_groups(path):
    names = [f"deep_feature_extraction.{n}.body.{m}.x" for n in range(90) for m in range(90)]
    torch.save({**small_checkpoint().weights, **dict.fromkeys(names, torch.ones(1))}, path)


BAD_FILES = {
    "cut": (lambda path: _cut(path, PARAMS, 0.99), "truncated"),
    "half, old format": (lambda path: _cut(path, PARAMS, 0.5, **OLD_FORMAT), "truncated"),
    "empty": (lambda path: path.touch(), "is empty"),
    "image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" * 99), "not a checkpoint"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2], 2)), "not a checkpoint"),
    "list": (lambda path: torch.save([PARAMS], path), "holds a list"),
    "no keys": (lambda path: torch.save({}, path), "no keys"),
    "other keys": (lambda path: torch.save({"net": PARAMS}, path), "the keys net"),
    "other values": (lambda path: torch.save({"params": {"a": 1}}, path), "under 'params'"),
    "Python object": (
        lambda path: torch.save({**PARAMS, "args": argparse.Namespace(a=1)}, path),
        "argparse.Namespace",
    ),
    "training state": (
        lambda path: torch.save({"iter": 1, "optimizers": [], "schedulers": []}, path),
        "training state",
    ),
    "folder": (lambda path: path.mkdir(), "is not a file"),
    "named pipe": (lambda path: os.mkfifo(path), "is not a file"),
    "absent": (lambda path: None, "No such file"),
    "other": (lambda path: _stating(path, '{"dim": 24}'), "asked for is DLGSANet (dim: 24"),
    "unknown": (lambda path: _stating(path, '{"dims": 24}'), "no argument 'dims'"),
    "array": (lambda path: _stating(path, "[1]"), "not a JSON object"),
    "groups": (lambda path: _stating(path, '{"groups": 10000}'), "groups: 10000"),
    "in_chans": (lambda path: _stating(path, '{"in_chans": 1000000000}'), "in_chans: 1000000000"),
    "infinite": (
        lambda path: _stating(path, '{"idynamic_ffn_expansion_factor": Infinity}'),
        "makes no DLGSANet",
    ),
    "text": (lambda path: _stating(path, '{"dim": "12"}'), "dim must be a whole number"),
    "too large": (
        lambda path: _stating(path, f'{{"upscale": {10**18}}}'),
        "as large as {'in_chans",
    ),
    "long": (lambda path: _stating(path, f'{{"{"k" * 900_000}": 1}}'), "no argument 'kkk"),
    "long keys": (lambda path: torch.save({"k" * 900_000: 1}, path), "the keys kkk"),
    "list for type": (lambda path: _stating(path, '{"buildblock_type": [1]}'), "makes no DLGSANet"),
    "many groups": (_many_groups, "groups: 89, blocks: "),
    "expanded": (lambda path: _with(path, lambda t: t[:1].expand(1 << 40)), "claims 4,398,"),
    "bytearray": (_bytearray, "holds a bytearray"),
    "compressed": (_compressed, "is compressed"),
    "tuples": (lambda path: _pickled(path, _tuples(60)), "more than 1,000,000 values in"),
    "tuples, old format": (lambda path: path.write_bytes(_tuples(60)), "values in a tuple"),
    "integers": (lambda path: _pickled(path, _integers(5000)), "integers of over 64 bits"),
    "encoded": (lambda path: _pickled(path, _encoded()), "holds encoded text"),
    "two networks": (_two_networks, "holds several networks (a., b.)"),
    "int8": (lambda path: _with(path, lambda t: t.to(torch.int8)), "upsample.0.bias is of int8"),
    "bool": (lambda path: _with(path, lambda t: t > 0), "upsample.0.bias is of bool"),
    "complex": (lambda path: _with(path, lambda t: t + 0j), "bias is of complex64"),
    "float8": (lambda path: _with(path, lambda t: t.to(torch.float8_e4m3fn)), "is of float8_e4m3"),
    "sparse": (lambda path: _with(path, lambda t: t.to_sparse()), "bias is a sparse_coo tensor"),
    "nested": (lambda path: _with(path, lambda t: torch.nested.nested_tensor([t])), "is a nested"),
    "negated": (lambda path: _with(path, torch._neg_view), "bias is a negated tensor"),
    "meta": (lambda path: _with(path, lambda t: t.to("meta")), "bias is a meta tensor"),
    "quantised": (
        lambda path: _with(path, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        "bias is a quantised tensor",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of kinds of tensors that PyTorch calls beta
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named_before_anything_is_built(tmp_path, kind):
    make, said = BAD_FILES[kind]
    path = tmp_path / "net.bin"
    make(path)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(read_checkpoint, path)
    assert said in message
    assert str(path) in message
    assert len(message) < 2000 + 2 * len(str(path))
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_bundled_weights_are_found_by_name(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint("tiny_x4").name == "DLGSANet Tiny x4"
    assert len(read_weights("tiny_x4")) == len(read_checkpoint("tiny_x4").weights)
    assert "did you mean 'tiny_x4'" in refusal(read_checkpoint, "tiny_x5")
    torch.save(weights, "tiny_x4")  # a file comes first
    assert read_checkpoint("tiny_x4").config["dim"] == 12


def test_the_mean_of_checkpoints():
    several = [small_checkpoint(iteration) for iteration in (None, 10, 5)]
    mean = average(several)
    for name, tensor in mean.weights.items():
        stacked = np.stack([each.weights[name].double().numpy() for each in several])
        np.testing.assert_allclose(tensor.numpy(), stacked.mean(0), rtol=1e-6, atol=1e-8)
        assert tensor.dtype == several[0].weights[name].dtype
    assert (mean.iteration, mean.config) == (10, several[0].config)
    message = refusal(average, [several[0], small_checkpoint(blocks=2, tlc_flag=False)])
    assert "blocks: 1" in message
    assert "tlc_flag: false" in message


@pytest.mark.parametrize("upsampler", ["pixelshuffledirect", "pixelshuffle"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_transfer_resizes_the_upsampler_alone(upsampler, scale):
    x2 = small_checkpoint(iteration=9, upsampler=upsampler, tlc_kernel=96)
    before = torch.get_rng_state()
    start = transfer(x2, scale)
    assert torch.equal(torch.get_rng_state(), before)
    assert (start.scale, start.iteration) == (scale, None)
    assert start.config == {**x2.config, "upscale": scale, "tlc_kernel": TLC_KERNELS[scale]}
    assert start.network()(torch.rand(1, 3, 5, 6)).shape == (1, 3, 5 * scale, 6 * scale)
    for name, tensor in start.weights.items():
        if scale == 2 or not name.startswith("upsample."):
            assert torch.equal(tensor, x2.weights[name])


def upsampled(checkpoint, features):
    return checkpoint.network().eval().double().upsample(features.double()).detach()


@pytest.mark.parametrize(
    ("source", "scale", "shares"),
    [
        (4, 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (2, 4, [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
        (2, 3, [[1, 0], [0.5, 0.5], [0, 1]]),
    ],
)
def test_a_transfer_interpolates_between_the_sub_pixels_of_a_pixel(source, scale, shares):
    known = small_checkpoint(upscale=source)
    features = torch.rand(1, known.config["dim"], 5, 6)
    shares = torch.tensor(shares, dtype=torch.float64)
    sub_pixels = upsampled(known, features).reshape(1, 3, 5, source, 6, source)
    expected = torch.einsum("bchiwj,xi,yj->bchxwy", sub_pixels, shares, shares)
    made = upsampled(transfer(known, scale), features)
    torch.testing.assert_close(made, expected.reshape(made.shape), rtol=0, atol=1e-6)


def test_a_second_shuffle_that_weights_lack_repeats_pixels():
    x2 = small_checkpoint(upscale=2, upsampler="pixelshuffle")
    features = torch.rand(1, 64, 5, 6)
    repeated = upsampled(x2, features).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(upsampled(transfer(x2, 4), features), repeated)


def test_transfers_that_make_no_sense_are_refused():
    assert "no upsampler" in refusal(transfer, small_checkpoint(upsampler=""), 4)
    message = refusal(transfer, small_checkpoint(upsampler="pixelshuffle"), 5)
    assert "cannot make x5" in message
    assert "scale must be 1 to 64" in refusal(transfer, small_checkpoint(), 65)


def test_the_nearest_published_network_and_the_differences():
    for name, config in (("Tiny", {"dim": 48, "groups": 3}), ("Light", {"dim": 48, "groups": 4})):
        published = infer_config(weights_of(**{**TINY_X4, **config}))
        assert nearest_published(published) == (f"DLGSANet {name} x4", {})
    changed = {**TINY_X4, "groups": 5, "upscale": 2, "idynamic_ffn_type": "BaseFFN"}
    nearest, differing = nearest_published(infer_config(weights_of(**changed)))
    assert nearest == "DLGSANet Light x2"
    assert differing == {"groups": (5, 4), "idynamic_ffn_type": ("BaseFFN", "GDFN")}
