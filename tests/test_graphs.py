"""CUDA graphs without a GPU: a CPU passes for one, and its graphs repeat the operators they saw.

This shows what is recorded when, and from which memory it is replayed; nothing of CUDA itself. The
tests that need a GPU are in test_inference.py.
"""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import SMALL_ARGUMENTS, small_checkpoint, small_train_options
from torch.utils._python_dispatch import TorchDispatchMode

from dlgsanet_arch import DLGSANet, graphs
from dlgsanet_arch.graphs import Graphs
from dlgsanet_arch.inference import Upscaler


class FakeGraph:
    """Repeats the operators that ran in a `torch.cuda.graph` block, on the same memory."""

    made: ClassVar = weakref.WeakSet()

    def __init__(self):
        self.calls, self.replays = [], 0
        FakeGraph.made.add(self)

    def replay(self):
        assert self.calls
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            with torch.autocast("cpu", enabled=False):  # what it casts was recorded
                again = function(*args, **kwargs)
            pairs = (
                zip(out, again, strict=True) if isinstance(out, list | tuple) else [(out, again)]
            )
            for old, new in pairs:
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class FakeStream:
    def wait_stream(self, other):
        assert isinstance(other, FakeStream)


@pytest.fixture
def cuda(monkeypatch):
    """Let tensors on the CPU pass for ones on a GPU."""
    default = FakeStream()
    cuda = torch.cuda

    @contextmanager
    def graph(made, stream, capture_error_mode):
        assert isinstance(stream, FakeStream)
        assert capture_error_mode == "thread_local"
        with _Recorder(made.calls):
            yield

    fakes = {
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "Stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": lambda device=None: default,
        "default_stream": lambda device=None: default,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(cuda, name, fake, raising=False)
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    FakeGraph.made.clear()


@pytest.fixture
def network():
    # float64: the C library, whose calls are not PyTorch's operators, takes float32
    return DLGSANet(**SMALL_ARGUMENTS).double().eval()


def image(height=9, width=11, batch=1):
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


def calls_of(network):
    """Count the calls of a network, by a replaced part that counts no replay."""
    counted = []
    forward = type(network.overlap_embed[0]).forward

    def counting(self, x):
        counted.append(tuple(x.shape))
        return forward(self, x)

    return counted, counting


@pytest.mark.usefixtures("cuda")
def test_the_second_call_is_recorded_and_the_next_are_replayed(network, monkeypatch):
    counted, counting = calls_of(network)
    monkeypatch.setattr(type(network.overlap_embed[0]), "forward", counting)
    replayed, images = Graphs(), [image() for _ in range(5)]
    with torch.no_grad():
        expected = [network(each) for each in images]
        counted.clear()
        made = [replayed(network, each) for each in images]
    # Once as it is, once before the recording, once within.
    assert len(counted) == 3
    (graph,) = FakeGraph.made
    assert graph.replays == 4
    assert all(map(torch.equal, made, expected))  # no output is another's memory


def other_settings(network):
    network.deep_feature_extraction[0].body[0].norm1.body.eps = 0.5


def other_weights(network):
    network.upsample[0].weight = torch.nn.Parameter(2 * network.upsample[0].weight.detach())


def other_module(network):
    network.upsample[0] = copy.deepcopy(network.upsample[0])
    with torch.no_grad():
        network.upsample[0].bias.add_(1)


def weights_in_place(network):
    with torch.no_grad():
        network.upsample[0].weight.mul_(3)


def a_hook(network):
    network.upsample[0].register_forward_hook(lambda module, given, out: out + 1)


def another_forward(network):
    network.upsample[0].forward = lambda x: torch.ones(1, 12, 9, 11).double()


CHANGES = {
    other_settings: 1, other_weights: 1, other_module: 1, weights_in_place: 3, a_hook: 1,
    another_forward: 1,
}  # fmt: skip


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_the_network_take_effect(network, change):
    replayed, given = Graphs(), image()
    with torch.no_grad():
        before = [replayed(network, given) for _ in range(2)][1]
        change(network)
        after, expected = replayed(network, given), network(given)
    assert torch.equal(after, expected)
    assert not torch.allclose(after, before)
    replays = [graph.replays for graph in FakeGraph.made]
    assert max(replays) == (2 if change is weights_in_place else 1)


@pytest.mark.usefixtures("cuda")
def test_each_kind_of_call_has_its_recording_and_the_last_ones_are_kept(network):
    kinds = [(9, 11, 1), (11, 9, 1), (9, 11, 2), (8, 8, 1), (7, 8, 1), (6, 8, 1)]
    replayed = Graphs()
    with torch.no_grad():
        for kind in kinds:
            for _ in range(3):
                given = image(*kind)
                assert torch.equal(replayed(network, given), network(given))
        gc.collect()
        assert len(FakeGraph.made) == graphs._MOST_KEPT
        network, given = network.float(), image(6, 8).float()
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert torch.equal(replayed(network, given), network(given))
        assert torch.equal(replayed(network, given), network(given))
        assert replayed.clear()
        assert not replayed.clear(for_good=True)
        for _ in range(3):
            replayed(network, given)
        gc.collect()
        assert not FakeGraph.made


@pytest.mark.usefixtures("cuda")
def test_what_is_not_recorded(network, monkeypatch):
    replayed, given = Graphs(), image()
    for _ in range(3):
        assert replayed(network, given).requires_grad
        with torch.no_grad():
            assert torch.equal(replayed(lambda x: x + 1, given), given + 1)
            replayed(network.train(), given)
            network.eval()
            with monkeypatch.context() as patch:
                patch.setattr(graphs, "_MOST_PIXELS", 98)
                replayed(network, given)
                patch.setattr(graphs, "_DEVICE", "cuda")
                replayed(network, image(3, 3))
            with monkeypatch.context() as patch:  # somebody else's stream
                patch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream())
                replayed(network, given)
    assert not FakeGraph.made


@pytest.mark.usefixtures("cuda")
def test_a_recording_that_fails_is_said_once_and_the_network_is_called(network, monkeypatch):
    said = []
    replayed, given = Graphs(said.append), image()

    class Fails(FakeGraph):
        def __init__(self):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fails)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(replayed(network, given), network(given))
    assert said == ["CUDA graphs are not used: recording fails (operation not permitted)"]


@pytest.mark.usefixtures("cuda")
def test_equal_tiles_and_the_ensemble_are_replayed(monkeypatch):
    plain = Upscaler(small_checkpoint(), device="cpu", tile=16, overlap=4)
    upscaler = Upscaler(plain.checkpoint, device="cpu", tile=16, overlap=4, ensemble=True)
    for each in (plain, upscaler):
        each.network.double()
        # what the network is given is made float32
        each._graphs = (lambda graphs: lambda net, x: graphs(net, x.double()))(each._graphs)
    given = torch.rand(1, 3, 40, 40)
    made = [each(given) for each in (plain, upscaler)]
    assert sorted(graph.replays for graph in FakeGraph.made) == [8, 71]
    monkeypatch.setattr(graphs, "_DEVICE", "cuda")
    assert torch.equal(plain(given), made[0])
    assert torch.equal(upscaler(given), made[1])


def test_out_of_memory_ends_recording_before_tiles_get_smaller():
    upscaler = Upscaler(small_checkpoint(), device="cpu", tile=0, notice=pytest.fail)
    tiles, cleared = [], []
    upscaler._graphs.clear = lambda for_good: not cleared.append(for_good)

    def work(tile):
        tiles.append(tile)
        if len(tiles) == 1:
            raise MemoryError
        return tile

    upscaler._fitted(work, (1, 40, 40))
    assert (tiles, cleared) == ([0, 0], [True])


def test_an_upscaler_with_recordings_is_copied_without_them(tmp_path):
    upscaler = Upscaler(small_checkpoint(), device="cpu")
    given = torch.rand(1, 3, 8, 8)
    for other in (copy.deepcopy(upscaler), pickle.loads(pickle.dumps(upscaler))):
        assert torch.equal(other(given), upscaler(given))


@pytest.mark.usefixtures("cuda")
def test_a_validation_is_replayed_and_its_memory_freed_when_training_goes_on():
    from basicsr.models import build_model

    options = small_train_options(Path("data"), model_type="DLGSANetModel", num_gpu=0)
    options |= {"dist": False, "rank": 0, "world_size": 1, "is_train": True}
    model = build_model(options)
    model.net_g_ema.double()
    for _ in range(3):
        model.lq = image()
        model.test()
        assert torch.equal(model.output, model.net_g_ema(model.lq))
        assert not model.net_g_ema.training
    assert [graph.replays for graph in FakeGraph.made] == [2]
    model.ema_decay = 0  # float64 is not averaged with float32
    model.feed_data({"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 16, 16)})
    model.optimize_parameters(1)
    gc.collect()
    assert not FakeGraph.made
