"""What a network looks at: filters and similarities are those that its layers work with."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from definition import window_starts
from helpers import SMALL_NETWORK

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.cli import main
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import GlobalLayer, LocalLayer
from dlgsanet_arch.ops.reference import dynamic_dwconv_reference
from dlgsanet_arch.tools import explanation
from dlgsanet_arch.tools.explanation import Place

SMALL = {name: value for name, value in SMALL_NETWORK.items() if name != "type"}
LOCAL = "deep_feature_extraction.0.body.0"
GLOBAL = "deep_feature_extraction.0.body.1"


def network(**changes):
    torch.manual_seed(0)
    return DLGSANet(**{**SMALL, **changes}).eval()


def inputs(net, picture):
    """What enters each layer."""
    taken = {}
    for name, module in net.named_modules():
        if isinstance(module, LocalLayer | GlobalLayer):
            module.register_forward_pre_hook(
                lambda _, given, name=name: taken.update({name: given[0].clone()})
            )
    with torch.no_grad():
        net(picture)
    return taken


def test_filters_are_those_that_make_the_layer_s_output():
    picture = torch.rand(1, 3, 6, 7)
    places = [Place(x, y, "") for y in range(6) for x in range(7)]
    net = network()
    found = explanation.look(net, picture, places).filters[LOCAL]
    filters = found.permute(1, 2, 3, 0).unflatten(3, (6, 7))[None]
    mixer = net.get_submodule(LOCAL).IDynamicDWConv
    x = net.get_submodule(LOCAL).norm1(inputs(net, picture)[LOCAL])
    with torch.no_grad():
        expected = mixer(x)
        made = mixer.conv1(dynamic_dwconv_reference(mixer.conv0(x), filters))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(6, 7), (20, 13)])  # one window of 8x8, and several
def test_what_is_dropped_is_counted(size):
    net = network()
    picture = torch.rand(1, 3, *size)
    found = explanation.look(net, picture, [Place(0, 0, "")]).dropped[GLOBAL]
    layer = net.get_submodule(GLOBAL).double()
    x = inputs(network(), picture)[GLOBAL].double()
    attention = layer.restormer_attn
    with torch.no_grad():
        qkv = attention.qkv_dwconv(attention.qkv(layer.norm3(x)))[0]
    q, k, _ = qkv.unflatten(0, (3, attention.heads, -1))
    cuts = []
    for length in size:
        starts, side = window_starts(length, SMALL["tlc_kernel"])
        cuts.append([slice(start, start + side) for start in starts])
    shares = []
    for rows in cuts[0]:
        for columns in cuts[1]:
            a, b = (F.normalize(each[:, :, rows, columns].flatten(2), dim=2) for each in (q, k))
            similar = a @ b.mT * attention.temperature.double()
            shares.append((similar <= 0).double().mean((1, 2)))
    expected = torch.stack(shares).mean(0).float()
    assert len(shares) == (1 if size == (6, 7) else 6)
    torch.testing.assert_close(found, expected)
    assert 0.2 < found.mean() < 0.8  # neither all nor nothing


def test_looking_changes_nothing():
    net = network()
    picture = torch.rand(1, 3, 12, 9)
    with torch.no_grad():
        before = net(picture)
        explanation.look(net, picture, [Place(3, 4, "a")])
        assert torch.equal(net(picture), before)
    assert all(not module._forward_pre_hooks for module in net.modules())


def test_softmax_drops_what_is_counted_and_says_so():
    net = network(buildblock_type="edge")
    seen = explanation.look(net, torch.rand(1, 3, 6, 7), [Place(0, 0, "")])
    assert list(seen.dropped) == [GLOBAL]


def test_places_are_what_they_are_called():
    picture = np.full((90, 120, 3), 128, np.uint8)
    picture[:, 100:] = 255  # an edge
    random = np.random.default_rng(0)
    picture[10:60, 10:60] = random.integers(0, 256, (50, 50, 3), np.uint8)
    edge, texture, flat = explanation.choose_places(picture)
    assert 92 <= edge.x <= 108
    assert 10 <= texture.x < 60
    assert 10 <= texture.y < 60
    window = picture[flat.y - 7 : flat.y + 8, flat.x - 7 : flat.x + 8]
    assert window.std() == 0
    for tiny in (np.zeros((1, 1, 3), np.uint8), np.zeros((2, 40, 3), np.uint8)):
        for place in explanation.choose_places(tiny):
            assert place.x < tiny.shape[1]
            assert place.y < tiny.shape[0]


@pytest.fixture
def files(tmp_path):
    torch.save({"params": network().state_dict()}, tmp_path / "net.pth")
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "lr.png"), picture)
    return tmp_path


def call(files, *more):
    named = ["-i", str(files / "lr.png"), "-m", str(files / "net.pth")]
    return main(["explain", *named, "-o", str(files / "out.png"), *more])


def test_the_verb_writes_figure_and_numbers(files, capsys):
    numbers = files / "out.json"
    assert call(files, "--at", "29", "19", "--at", "0", "0", "--json", str(numbers)) == 0
    assert (files / "out.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(numbers.read_text())
    assert [(place["x"], place["y"]) for place in record["places"]] == [(29, 19), (0, 0)]
    filters = np.array(record["filters"][LOCAL])
    assert filters.shape == (2, 2, 3, 3)
    shares = np.array(record["dropped"][GLOBAL])
    assert f"{shares.mean():.1%}" in capsys.readouterr().out
    assert call(files) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--at", "30", "0"], "(30, 0) is outside the picture of 30x20"),
        (["--at", "-1", "0"], "outside"),
        (["-o", "a.jpg"], ".png, .pdf, .svg"),
        (["-i", "absent.png"], "absent.png"),
    ],
)
def test_the_verb_says_what_is_wrong(files, capsys, more, message):
    assert call(files, *more) == 1
    assert message in capsys.readouterr().err
    assert not (files / "out.png").exists()


def test_a_network_without_either_layer_is_refused():
    net = network(buildblock_type="idynamic", idynamic=False)
    with pytest.raises(UserError, match="neither"):
        explanation.look(net, torch.rand(1, 3, 6, 7), [Place(0, 0, "")])
