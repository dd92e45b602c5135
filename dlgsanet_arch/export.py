"""DLGSANet in files that run without this package: ONNX, and PyTorch's .pt2.

Both hold plain operators only, and both are compared with the network before they get their name.
The test-time windows (TLC) depend on the size of the image: with a fixed size they are in the
file, with dynamic sizes they are left out, and attention looks at the whole image. Up to
`tlc_kernel` pixels on a side that is the same.
"""

import contextlib
import importlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlgsanet_arch.checkpoint import Checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, written_atomically
from dlgsanet_arch.network import DLGSANet, GlobalLayer, LocalLayer

FORMATS = (".onnx", ".pt2")
OPSET = 18  # the exporter's own: later ones bring nothing that is used here, and fewer runtimes
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest difference from the network in float32 that is taken for rounding. Outputs are about 1,
# and half precision has 11 and 8 bits.
BOUNDS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
# (B, H, W) that dynamic files are compared at: odd, of one pixel, larger than the example.
CHECKED_SIZES = ((1, 31, 45), (3, 1, 16), (2, 40, 64))
CHECKED_BATCHES = (1, 2, 3)  # of files with a fixed size
_EXAMPLE = (2, 24, 28)  # all 2 or more, or the exporter takes them for constants
_LARGEST_FILE = 1 << 31  # of protobuf
_DOMAIN = "dlgsanet"  # of what is not an operator of ONNX's, while a file is made


class ExportError(UserError):
    """A network that cannot be exported as asked; the message says what would do."""


@dataclass(frozen=True)
class Comparison:
    """The exported network beside the network itself, on one image.

    Args:
        shape: Of the input, (B, C, H, W).
        difference: The largest, of the output.
        seconds: The exported network took, the best of some runs.
        seconds_in_pytorch: The network itself took.
    """

    shape: tuple[int, ...]
    difference: float
    seconds: float
    seconds_in_pytorch: float


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how that went.

    Args:
        path: The file.
        seconds: What exporting took.
        size: Bytes of the file.
        has_windows: Whether the test-time windows (TLC) are in it.
        comparisons: With the network, in the order that they were made.
    """

    path: Path
    seconds: float
    size: int
    has_windows: bool
    comparisons: tuple[Comparison, ...]

    @property
    def difference(self) -> float:
        """The largest difference from the network that was found."""
        return max(each.difference for each in self.comparisons)


Precision = Literal["fp32", "fp16", "bf16"]
Run = Callable[[Tensor], Tensor]


def _require(*packages: str) -> list[Any]:
    """Import packages that may be absent."""
    try:
        return [importlib.import_module(package) for package in packages]
    except ModuleNotFoundError as error:
        missing = (error.name or packages[0]).partition(".")[0]
        raise ExportError(
            f"ONNX files need {missing}, which is not installed; run: pip install "
            "'dlgsanet-arch[export]' (or pip install onnx onnxscript onnxruntime)"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters tell about themselves from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _example(channels: int, dtype: torch.dtype, size: tuple[int, int] | None) -> Tensor:
    batch, *example = _EXAMPLE
    return torch.rand(batch, channels, *(size or example), dtype=dtype)


def _dynamic_axes(size: tuple[int, int] | None) -> dict[int, str]:
    """Name the axes of an image or a map that may have any length."""
    return {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}


def _capture(
    network: nn.Module, channels: int, dtype: torch.dtype, size: tuple[int, int] | None
) -> torch.export.ExportedProgram:
    """Capture the network's graph for any batch, and any size of image or a given one."""
    image = _example(channels, dtype, size)
    axes = {axis: torch.export.Dim(name, min=1) for axis, name in _dynamic_axes(size).items()}
    with _quiet(), torch.no_grad():
        return torch.export.export(network, (image,), dynamic_shapes={"x": axes})


def _facts(checkpoint: Checkpoint, config: dict[str, Any], dtype: Precision) -> dict[str, str]:
    """Say what the file holds, for whoever finds it."""
    return {
        "architecture": "DLGSANet",
        "name": checkpoint.name,
        "scale": str(checkpoint.scale),
        "config": json.dumps(config),
        "dtype": dtype,
        "range": "[0, 1] in and out, out not clipped",
    }


class _Call(nn.Module):
    """Stands where a layer was and says so in the graph, instead of computing.

    Args:
        name: Of the layer.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        attributes = {"name": self.name}
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::Layer", [x], attributes, dtype=x.dtype, shape=x.shape, version=1
        )


class _WithWeights(nn.Module):
    """A layer whose weights are arguments, so that its graph serves all layers of its kind."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = (layer,)  # no submodule: its own weights stay out of the graph
        self.names = [name for name, _ in layer.named_parameters()]

    def forward(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """Map (B, C, H, W) to the same shape, by weights in the order of `names`."""
        named = dict(zip(self.names, weights, strict=True))
        return torch.func.functional_call(self.layer[0], named, (x,))


def _to_onnx(
    module: nn.Module,
    image: Tensor,
    weights: tuple[list[Tensor], ...],
    axes: dict[int, str],
    opset: int,
) -> Any:
    """Export a module of an image or map, and maybe of weights, to an ONNX ModelProto."""
    with _quiet(), torch.no_grad():
        made = torch.onnx.export(
            module,
            (image, *weights),
            dynamo=True,
            dynamic_shapes=(axes, *([None] * len(each) for each in weights)),
            input_names=["image"],
            output_names=["enlarged"],
            opset_version=opset,
            verbose=False,
        ).model_proto
    found = next(each.version for each in made.opset_import if each.domain == "")
    if found != opset:
        raise ExportError(f"there is no opset {opset} for this network; use --opset {found}")
    for node in made.graph.node:
        node.ClearField("metadata_props")  # where in PyTorch's sources it comes from
    return made


class _Layers:
    """The graph of each kind of layer as an ONNX function, made when the kind is first met.

    An exporter works for seconds on a layer, and a network has up to 48 of two kinds.

    Args:
        dim: Channels of the maps.
        size: (H, W) where they are fixed.
        opset: Version of ONNX's operators.

    Attributes:
        functions: By kind; their inputs are a map, the weights in order, and constants.
        constants: By kind, for the last inputs.
    """

    def __init__(self, dim: int, size: tuple[int, int] | None, opset: int) -> None:
        self.dim = dim
        self.size = size
        self.opset = opset
        self.functions: dict[str, Any] = {}
        self.constants: dict[str, list[Any]] = {}

    def kind(self, layer: nn.Module) -> str:
        """Return the kind of a layer; there is a function for it then."""
        kind = type(layer).__name__
        if kind not in self.functions:
            self._make(kind, layer)
        return kind

    def _make(self, kind: str, layer: nn.Module) -> None:
        (onnx,) = _require("onnx")
        weights = [weight.detach() for weight in layer.parameters()]
        example = _example(self.dim, weights[0].dtype, self.size)
        axes = _dynamic_axes(self.size)
        graph = _to_onnx(_WithWeights(layer), example, (weights,), axes, self.opset).graph
        constants = list(graph.initializer)
        self.functions[kind] = onnx.helper.make_function(
            _DOMAIN,
            kind,
            [each.name for each in (*graph.input, *constants)],
            [each.name for each in graph.output],
            graph.node,
            [onnx.helper.make_opsetid("", self.opset)],
        )
        for each in constants:
            each.name = f"{kind}.{each.name}"
        self.constants[kind] = constants


def _onnx_bytes(
    network: DLGSANet, size: tuple[int, int] | None, opset: int, facts: dict[str, str]
) -> bytes:
    """Make an ONNX file: the network with calls in place of its layers, then these filled in."""
    onnx, inliner = _require("onnx", "onnx.inliner")
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LocalLayer | GlobalLayer)
    }
    for name in layers:
        network.set_submodule(name, _Call(name))
    image = _example(network.in_chans, network.mean.dtype, size)
    model = _to_onnx(network, image, (), _dynamic_axes(size), opset)
    graph = model.graph
    made = _Layers(network.overlap_embed[0].proj.out_channels, size, opset)
    for node in graph.node:
        if node.domain != _DOMAIN:
            continue
        name = onnx.helper.get_attribute_value(node.attribute.pop()).decode()
        node.op_type = made.kind(layers[name])
        for key, weight in layers[name].named_parameters(prefix=name):
            graph.initializer.append(onnx.numpy_helper.from_array(weight.detach().numpy(), key))
            node.input.append(key)
        node.input.extend(each.name for each in made.constants[node.op_type])
    for kind, function in made.functions.items():
        model.functions.append(function)
        graph.initializer.extend(made.constants[kind])
    model = inliner.inline_local_functions(model)
    for each in list(model.opset_import):
        if each.domain == _DOMAIN:
            model.opset_import.remove(each)
    onnx.helper.set_model_props(model, facts)
    return model.SerializeToString()


def _onnx_runner(path: Path) -> Run:
    (runtime,) = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        (enlarged,) = session.run(None, {"image": image.numpy()})
        return torch.from_numpy(enlarged)

    return run


def _pt2_runner(path: Path) -> Run:
    with _quiet(), path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(image: Tensor) -> Tensor:
        with torch.no_grad():
            return module(image)

    return run


def _timed(run: Run, image: Tensor, repeats: int) -> tuple[Tensor, float]:
    """Return what `run` gives, and the seconds of its best run."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        enlarged = run(image)
        best = min(best, time.perf_counter() - start)
    return enlarged, best


def _compare(
    run: Run, network: nn.Module, image: Tensor, dtype: Precision, repeats: int
) -> Comparison:
    with torch.no_grad():
        expected, in_pytorch = _timed(network, image, repeats)
    enlarged, seconds = _timed(run, image.to(DTYPES[dtype]), repeats)
    if enlarged.shape != expected.shape or enlarged.dtype != DTYPES[dtype]:
        raise ExportError(
            f"the exported network makes {enlarged.dtype} {tuple(enlarged.shape)} of an image "
            f"{tuple(image.shape)}; the network makes {dtype} {tuple(expected.shape)}"
        )
    difference = (enlarged.double() - expected.double()).abs().max().item()
    if not difference <= BOUNDS[dtype] * max(1.0, expected.abs().max().item()):
        raise ExportError(
            f"on an image {tuple(image.shape)} the exported network differs from the network "
            f"by {difference:.3g}, more than rounding explains ({BOUNDS[dtype]:.0e}); nothing was "
            "written" + ("" if dtype == "fp32" else "; try --dtype fp32")
        )
    return Comparison(tuple(image.shape), difference, seconds, in_pytorch)


def _check_arguments(
    path: Path, dtype: Precision, size: tuple[int, int] | None, checkpoint: Checkpoint
) -> None:
    if path.suffix not in FORMATS:
        raise ExportError(f"{path}: the name must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it first")
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be {', '.join(DTYPES)}; got {dtype!r}")
    if size is not None and min(size) < 1:
        raise ExportError(f"size must be 1x1 or more; got {size[0]}x{size[1]}")
    if path.suffix != ".onnx":
        return
    if dtype == "bf16":
        raise ExportError(
            "bf16 in ONNX cannot be checked, as ONNX Runtime has no bf16 convolutions on a CPU; "
            "take fp16 or fp32, or a .pt2 file"
        )
    if 4 * checkpoint.parameters >= _LARGEST_FILE:
        raise ExportError(f"{checkpoint.parameters:,} parameters do not fit into one ONNX file")
    _require("onnx", "onnxscript", "onnxruntime")
    if not hasattr(torch.onnx, "ops"):
        raise ExportError(f"ONNX files need PyTorch 2.8 or later; this is {torch.__version__}")


def export(
    checkpoint: Checkpoint,
    path: Path | str,
    *,
    dtype: Precision = "fp32",
    size: tuple[int, int] | None = None,
    opset: int = OPSET,
    repeats: int = 1,
) -> Exported:
    """Write a network as ONNX or .pt2, and compare the file with the network first.

    The file maps images (B, C, H, W) in [0, 1] to (B, C, H·s, W·s), not clipped, any batch. In
    ONNX they are named `image` and `enlarged`, and the configuration is in the metadata; in a
    .pt2 it is in the extra file `facts.json`.

    Args:
        checkpoint: As `read_checkpoint` returns it.
        path: Ends in .onnx or .pt2. After a crash or a failed comparison what had this name
            before is still there.
        dtype: "fp32", "fp16" or "bf16" (the last for .pt2 alone), of the weights, the input and
            the output. Differences from the network in float32 must be below BOUNDS.
        size: (H, W) of the images; None for any, which leaves the test-time windows out.
        opset: Version of ONNX's operators, 18 or more.
        repeats: Runs of each comparison, the best of which counts.

    Raises:
        ExportError: It cannot be exported so, differs from the network, or a package is missing.
    """
    path = Path(path)
    _check_arguments(path, dtype, size, checkpoint)
    config = {**checkpoint.config, "tlc_flag": checkpoint.config["tlc_flag"] and size is not None}
    channels = config["in_chans"]
    network = Checkpoint(checkpoint.weights, config).network()
    facts = _facts(checkpoint, config, dtype)

    start = time.perf_counter()
    exporting = Checkpoint(checkpoint.weights, config).network().to(DTYPES[dtype])
    data = io.BytesIO()
    if path.suffix == ".onnx":
        data.write(_onnx_bytes(exporting, size, opset, facts))
    else:
        program = _capture(exporting, channels, DTYPES[dtype], size)
        with _quiet():
            torch.export.save(program, data, extra_files={"facts.json": json.dumps(facts)})
    seconds = time.perf_counter() - start

    comparisons: list[Comparison] = []

    def check(beside: Path) -> None:
        run = _onnx_runner(beside) if path.suffix == ".onnx" else _pt2_runner(beside)
        shapes = CHECKED_SIZES if size is None else [(batch, *size) for batch in CHECKED_BATCHES]
        random = torch.Generator().manual_seed(0)
        for batch, height, width in shapes:
            image = torch.rand(batch, channels, height, width, generator=random)
            comparisons.append(_compare(run, network, image, dtype, repeats))

    with disk_faults_named(f"{path} cannot be written"), written_atomically(path, check) as file:
        file.write(data.getbuffer())
    return Exported(
        path, seconds, path.stat().st_size, bool(config["tlc_flag"]), tuple(comparisons)
    )
