"""DLGSANet among spandrel's architectures: what is loaded, what is claimed, what is promised."""

import importlib
import sys

import pytest
import safetensors.torch
import spandrel
import torch
from helpers import SMALL_ARGUMENTS

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.checkpoint import published_configs
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.spandrel import DLGSANetArch, install

SMALL = SMALL_ARGUMENTS | {"tlc_kernel": 96}
PUBLISHED = published_configs()
# Networks whose names or sizes of weights differ from those of the paper's.
ABLATIONS = {
    "local": {"buildblock_type": "idynamic"},
    "global": {"buildblock_type": "restormer"},
    "static": {"idynamic": False},
    "feed-forward": {"idynamic_ffn_type": "BaseFFN", "restormer_ffn_type": "BaseFFN"},
    "norms of local": {"body_norm": True, "buildblock_type": "idynamic"},
    "norms of global": {"body_norm": True, "buildblock_type": "restormer"},
    "gray": {"in_chans": 1},
    "pixelshuffle": {"upsampler": "pixelshuffle", "upscale": 4, "tlc_kernel": 48},
    "same size": {"upsampler": "", "upscale": 1, "tlc_kernel": 48},
}

install()


def build(**changes):
    return DLGSANet(**{**SMALL, **changes}).eval()


def enlarge(network, image):
    """What a descriptor promises: the network's output, within its range."""
    with torch.no_grad():
        return network(image).clamp(0, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_load_from_files(name, tmp_path):
    network = DLGSANet(**PUBLISHED[name]).eval()
    path = tmp_path / "net_g_latest.pth"
    torch.save({"params": {}, "params_ema": network.state_dict()}, path)
    model = spandrel.ModelLoader().load_from_file(path)
    assert model.model.config == network.config
    assert not model.model.training
    scale = PUBLISHED[name]["upscale"]
    assert (model.architecture.id, model.purpose, model.scale) == ("DLGSANet", "SR", scale)
    assert name == f"DLGSANet {model.tags[0]} x{scale}"
    assert model.size_requirements.none
    assert model.tiling is spandrel.ModelTiling.SUPPORTED
    for size in ((1, 1), (100, 7)):  # the second is larger than the windows
        image = torch.rand(1, 3, *size)
        assert torch.equal(model(image), enlarge(network, image))


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_load_from_their_weights(name, tmp_path):
    network = build(**ABLATIONS[name])
    path = tmp_path / "weights.safetensors"
    weights = {f"module.{key}": value for key, value in network.state_dict().items()}
    safetensors.torch.save_file(weights, path)
    model = spandrel.ModelLoader().load_from_file(path)
    scale = ABLATIONS[name].get("upscale", 2)
    # Global layers alone do not show the settings of local ones.
    unknown = ("idynamic", "window") if network.config["buildblock_type"] == "restormer" else ()
    shown = {key: value for key, value in network.config.items() if not key.startswith(unknown)}
    assert shown.items() <= model.model.config.items()
    assert model.scale == scale
    assert model.purpose == ("SR" if scale > 1 else "Restoration")
    assert model.input_channels == model.output_channels == network.in_chans
    image = torch.rand(1, network.in_chans, 9, 12)
    assert torch.equal(model(image), enlarge(network, image))


def test_what_weights_do_not_show_is_as_in_the_paper():
    network, paper = build(activation="gelu"), build()
    paper.load_state_dict(network.state_dict())
    model = spandrel.ModelLoader().load_from_state_dict(network.state_dict())
    image = torch.rand(1, 3, 100, 9)
    assert torch.equal(model(image), enlarge(paper, image))
    assert not torch.equal(model(image), enlarge(network, image))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_half_precision_is_supported(dtype, bound):
    network = build(dim=48)
    model = spandrel.ModelLoader().load_from_state_dict(network.state_dict()).to(dtype)
    image = torch.rand(1, 3, 10, 130)  # over a window wide
    enlarged = model(image.to(dtype))
    assert enlarged.dtype == dtype
    difference = (enlarged.double() - enlarge(network.double(), image.double())).abs().max()
    assert difference < bound


def _others():
    """Yield the networks of spandrel's own that build without arguments."""
    for support in spandrel.MAIN_REGISTRY:
        module = sys.modules[type(support.architecture).__module__]
        for name in module.__all__:
            made = getattr(module, name)
            if isinstance(made, type) and issubclass(made, torch.nn.Module):
                try:
                    with torch.device("meta"):
                        yield support.architecture.id, made().state_dict()
                except Exception:  # needs arguments, or values of tensors
                    continue


def test_no_weights_of_others_are_claimed():
    found = {}
    for name, weights in _others():
        found.setdefault(name, []).append(weights)
    found.pop("DLGSANet", None)
    assert len(found) >= 15, sorted(found)
    ours = DLGSANetArch()
    assert not [name for name, each in found.items() if any(map(ours.detect, each))]


@pytest.mark.parametrize("name", ["paper", *ABLATIONS])
def test_no_other_architecture_claims_these_weights(name):
    with torch.device("meta"):
        weights = build(**ABLATIONS.get(name, {})).state_dict()
    claims = [each.architecture.id for each in spandrel.MAIN_REGISTRY if each.detect(weights)]
    assert claims == ["DLGSANet"]


def test_installs_once():
    before = len(spandrel.MAIN_REGISTRY)
    install()
    assert len(spandrel.MAIN_REGISTRY) == before
    registry = spandrel.ArchRegistry()
    install(registry)
    install(registry)
    assert [each.architecture.id for each in registry] == ["DLGSANet"]


def test_without_spandrel_the_install_line_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "dlgsanet_arch.spandrel")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UserError, match=r"spandrel is not installed.*dlgsanet-arch\[export\]"):
        importlib.import_module("dlgsanet_arch.spandrel")
