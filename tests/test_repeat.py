"""The three ways to compute sizes that come again."""

import functools

import pytest
import torch
from test_network import build, pictures

from dlgsanet_arch.repeat import MOST_GRAPHS, for_repeated_sizes


@pytest.mark.parametrize("how", ["eager", "compile"])
def test_results_are_those_of_the_network(how, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    net = build({}).eval()
    run = for_repeated_sizes(net, how)
    x = pictures(net, 2, (9, 7))
    with torch.no_grad():
        for picture in (x, x.flip(3), x.mT):
            torch.testing.assert_close(run(picture), net(picture))


def test_a_compiled_network_is_one_of_fixed_sizes(monkeypatch):
    asked = {}

    def note(net, **options):
        asked.update(options)
        return net

    monkeypatch.setattr(torch, "compile", note)
    for_repeated_sizes(torch.nn.Identity(), "compile")
    assert asked == {"fullgraph": True, "dynamic": False}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"'eager', 'compile', 'graph'; got 'graphs'"):
        for_repeated_sizes(torch.nn.Identity(), "graphs")
    with pytest.raises(ValueError, match="got x on cpu"):
        for_repeated_sizes(torch.nn.Identity(), "graph")(torch.rand(1, 3, 4, 4))


@pytest.mark.gpu
def test_graphs_give_the_results_of_the_network():
    net = build({}, torch.float32).cuda().eval()
    run = for_repeated_sizes(net, "graph")
    sizes = [(9, 7), (12, 20), (9, 7), *((8, width) for width in range(6, 7 + MOST_GRAPHS)), (9, 7)]
    kept = []
    for size in sizes:
        x = torch.rand(2, 3, *size, device="cuda")
        with torch.no_grad():
            kept.append((run(x), net(x)))
    for ours, expected in kept:  # a replay must not overwrite what was returned before
        torch.testing.assert_close(ours, expected)


@pytest.mark.gpu
def test_graphs_follow_the_weights():
    net = build({}, torch.float32).cuda().eval()
    run = for_repeated_sizes(net, "graph")
    x = torch.rand(1, 3, 9, 7, device="cuda")
    run(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(run(x), net(x))
