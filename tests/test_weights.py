"""Weights that a run starts from: complete, of the right network, and the ones that are meant."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from basicsr.archs import build_network

from dlgsanet_arch.checkpoint import CheckpointError, find_weights, read_checkpoint
from dlgsanet_arch.options import Context
from dlgsanet_arch.pipeline import weights as module
from dlgsanet_arch.pipeline.checkpoints import Start

EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1}


@pytest.fixture
def save(tmp_path):
    def save(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return name

    return save


def state(network):
    return build_network(network).state_dict()


def options_of(network, train=False, **paths):
    options = helpers.small_train_options(Path("data"), network_g=network)
    options = copy.deepcopy(options)
    options["path"] = {"strict_load_g": True} | paths
    if not train:
        del options["train"]
    return options


@pytest.fixture
def found(tmp_path):
    def found(options, train=False, resumed=None):
        """Read what a run starts from, and load it into new networks."""
        before = copy.deepcopy(options)
        pair = {key: (path, torch.load(path)) for key, path in (resumed or {}).items()}
        start = Start(Path("2.state"), {"iter": 2}, pair) if resumed else Start()
        context = Context(options, train, tmp_path, None)
        sources, problems, notes = module.sources(context, start)
        model = SimpleNamespace()
        for key in sources:
            setattr(model, key.replace("network", "net"), build_network(options[key]))
            if train and key == "network_g":
                model.net_g_ema = build_network(options[key])
        try:
            notes += module.load(model, options, sources)
        except CheckpointError as error:
            problems.append(str(error))
        assert options == before
        keys = {key: source.key for key, source in sources.items()}
        return SimpleNamespace(problems=problems, notes=notes, keys=keys, model=model)

    return found


def first_value(network):
    return next(network.parameters()).flatten()[0].item()


def constant(state_dict, value):
    return {name: torch.full_like(tensor, value) for name, tensor in state_dict.items()}


LAYOUTS = [
    ({"params": 1, "params_ema": 2}, "params_ema", "params"),
    ({"params": 1}, "params", "params"),
    ({"params_ema": 2}, "params_ema", "params_ema"),
    ({"state_dict": 3, "epoch": None}, "state_dict", "state_dict"),
    (4, None, None),
]


@pytest.mark.parametrize(("layout", "tested", "trained"), LAYOUTS, ids=str)
def test_the_weights_that_are_meant_are_found(save, found, tmp_path, layout, tested, trained):
    """The average in a test, as the training validated it; whatever layout the file has."""
    weights, is_dict = state(EDSR), isinstance(layout, dict)
    content = {"": layout} if not is_dict else layout
    content = {key: value and constant(weights, value) for key, value in content.items()}
    save(content if is_dict else content[""])
    for train, used in ((False, tested), (True, trained)):
        options = options_of(EDSR, train=train, pretrain_network_g="weights.pth")
        result = found(options, train)
        assert (result.problems, result.keys) == ([], {"network_g": used})
        does = "network_g starts from" if train else "testing"
        assert result.notes == [f"{does} {used or 'the weights'} of {tmp_path / 'weights.pth'}"]
        assert first_value(result.model.net_g) == (layout[used] if used else layout)
    if tested == "params_ema" and "params" in layout:
        options = options_of(EDSR, pretrain_network_g="weights.pth", param_key_g="params")
        assert found(options).keys == {"network_g": "params"}


FAULTS = [
    (lambda weights: {"params": weights}, {"param_key_g": "params_emma"},
     "has no weights under 'params_emma': it has the keys params"),
    (lambda weights: {"params": weights}, {"param_key_g": None},
     "is not a bare state dict, as path:param_key_g ~ says; write param_key_g: params"),
    (lambda weights: weights, {"param_key_g": "params"}, "it is a bare state dict; write"),
    (lambda weights: [1], {}, "holds a list"),
    (lambda weights: {"iter": 1, "optimizers": []}, {}, "it is a training state"),
    (lambda weights: {"params": {"a": Path()}}, {}, "holds a Python object"),
    (lambda weights: {"params": dict(list(weights.items())[1:])}, {}, "of another network than "
     "this EDSR; absent from the file: "),
    (lambda weights: {"params": weights | {"b": torch.zeros(1)}}, {}, "unknown to the network: b"),
    (lambda weights: {"params": weights | {"conv_first.weight": torch.zeros(1)}}, {},
     "of another size: conv_first.weight"),
    (lambda weights: {"params": {f"x.{name}": weights[name] for name in weights}},
     {"strict_load_g": False},
     "fits this EDSR; with strict_load false BasicSR would continue with random weights"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "paths", "said"), FAULTS)
def test_what_is_wrong_with_weights_is_said(save, found, tmp_path, make, paths, said):
    content = make(state(EDSR))
    result = found(options_of(EDSR, pretrain_network_g=save(content), **paths))
    assert len(result.problems) == 1, result
    assert result.problems[0].startswith(f"path:pretrain_network_g: {tmp_path / 'weights.pth'}")
    assert said in result.problems[0]


def test_bundled_weights_go_by_name_and_safetensors_are_read(found, tmp_path):
    network = {"type": "DLGSANet", **read_checkpoint("tiny_x4").config}
    shutil.copy(find_weights("tiny_x4"), tmp_path / "mine.safetensors")
    for name in ("tiny_x4", "mine.safetensors"):
        for train in (False, True):
            result = found(options_of(network, train, pretrain_network_g=name), train)
            assert result.problems == []
            assert len(result.notes) == 1
    (problem,) = found(options_of(EDSR, pretrain_network_g="tiny_x4")).problems
    assert "of another network than this EDSR" in problem


def test_weights_that_fit_in_part_are_counted(save, found, tmp_path):
    weights = state(EDSR)
    part = {name: weights[name] for name in list(weights)[:3]} | {"other": torch.zeros(1)}
    part[list(weights)[3]] = torch.zeros(1)  # of another size: BasicSR passes it over
    options = options_of(EDSR, pretrain_network_g=save({"params": part}), strict_load_g=False)
    result = found(options)
    assert result.problems == []
    assert result.notes[1] == (
        f"network_g: loads 3 of {len(weights)} tensors of {tmp_path / 'weights.pth'}, as "
        "path:strict_load_g is false"
    )
    loaded = result.model.net_g.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in list(weights)[:3])


def test_every_network_of_a_training_is_checked(save, found):
    g, d = save({"params": state(EDSR)}), save({"params": constant(state(EDSR), 1)}, "d.pth")
    options = options_of(EDSR, train=True, pretrain_network_g=g, pretrain_network_d=d)
    options["network_d"] = {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4}
    (problem,) = found(options, train=True).problems
    assert problem.startswith("path:pretrain_network_d: ")
    assert "than this UNetDiscriminatorSN" in problem
    assert found(options).problems == []  # a test has no use for it


def test_the_average_starts_from_the_averaged_weights_where_there_are_any(save, found):
    options = options_of(EDSR, train=True, pretrain_network_g="weights.pth")
    for content, expected in (({"params": 1, "params_ema": 2}, 2), ({"state_dict": 1}, 1)):
        save({key: constant(state(EDSR), value) for key, value in content.items()})
        model = found(options, train=True).model
        assert (first_value(model.net_g), first_value(model.net_g_ema)) == (1, expected)


def test_weights_of_a_saved_state_replace_those_of_the_options(save, found, tmp_path):
    content = {"params": constant(state(EDSR), 3), "params_ema": constant(state(EDSR), 4)}
    resumed = {"network_g": tmp_path / save(content, "net_g_2.pth")}
    options = options_of(EDSR, train=True, pretrain_network_g=save({"params": {}}))
    result = found(options, train=True, resumed=resumed)
    assert (result.problems, result.notes) == ([], [])
    assert (first_value(result.model.net_g), first_value(result.model.net_g_ema)) == (3, 4)
    options["network_g"] = EDSR | {"num_block": 2}
    (problem,) = found(options, train=True, resumed=resumed).problems
    assert problem.startswith(f"network_g: {resumed['network_g']}: ")
    assert "absent from the file: body.1" in problem


@pytest.mark.parametrize("network", [None, 5, {}])
def test_what_the_check_of_options_reports_is_passed_over(save, found, network):
    result = found(options_of(network, pretrain_network_g=save({"params": state(EDSR)})))
    assert result.problems == []
    assert found(options_of(EDSR, pretrain_network_g="gone.pth")).problems == []
    assert found({"network_g": EDSR, "path": network}).problems == []
