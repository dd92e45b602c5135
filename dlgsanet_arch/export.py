"""DLGSANet in files that run without this package: ONNX, and PyTorch's .pt2.

Both hold plain operators only, and are compared with the network before they get their name. The
test-time windows (TLC) depend on the size of the image: they are in files of a fixed size; with
dynamic sizes attention is over the whole image, which is the same up to `tlc_kernel` pixels a side.
"""

import contextlib
import importlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dlgsanet_arch.checkpoint import Checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_target, disk_faults_named, written_atomically
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
_EXAMPLE = (24, 28)  # of a batch of 2: the exporter takes a 1 for a constant
_DOMAIN = "dlgsanet"  # of what is not an operator of ONNX's, while a file is made

Precision = Literal["fp32", "fp16", "bf16"]
Run = Callable[[Tensor], Tensor]


class ExportError(UserError):
    """A network that cannot be exported as asked; the message says what would do."""


class Comparison(NamedTuple):
    """The exported network compared with the network itself, on one image."""

    shape: tuple[int, ...]  # of the input, (B, C, H, W)
    difference: float  # the largest, of the output
    seconds: float  # of the exported network
    seconds_in_pytorch: float


class Exported(NamedTuple):
    """A file that was written, and how that went."""

    path: Path
    seconds: float  # that exporting took
    has_windows: bool  # whether the test-time windows (TLC) are in it
    comparisons: list[Comparison]


class _Function(nn.Module):
    """A function of a map, and maybe of weights, as the module that exporters take."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function  # modules that it calls are no submodules: their weights stay out

    def forward(self, x: Tensor, weights: list[Tensor] | None = None) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return self.function(x) if weights is None else self.function(x, weights)


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
    """Keep what exporters print and log about themselves from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _example(
    channels: int, dtype: torch.dtype, size: tuple[int, int] | None
) -> tuple[Tensor, dict[int, str]]:
    """Return an image or map to export with, and the names of its axes of any length."""
    axes = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    return torch.rand(2, channels, *(size or _EXAMPLE), dtype=dtype), axes


def _pt2_bytes(network: DLGSANet, size: tuple[int, int] | None, facts: dict[str, str]) -> bytes:
    """Make a .pt2 file: the network's graph for any batch, and any size or a given one."""
    image, names = _example(network.in_chans, network.mean.dtype, size)
    axes = {axis: torch.export.Dim(name, min=1) for axis, name in names.items()}
    data = io.BytesIO()
    with _quiet(), torch.no_grad():
        program = torch.export.export(network, (image,), dynamic_shapes={"x": axes})
        torch.export.save(program, data, extra_files={"facts.json": json.dumps(facts)})
    return data.getvalue()


def _to_onnx(
    module: nn.Module,
    example: tuple[Tensor, dict[int, str]],
    weights: tuple[list[Tensor], ...],
    opset: int,
) -> Any:
    """Export a module of an image or map, and maybe of weights, to an ONNX ModelProto."""
    image, axes = example
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
        raise ExportError(f"this network needs another opset than {opset}; use --opset {found}")
    for node in made.graph.node:
        node.ClearField("metadata_props")  # where in PyTorch's sources it comes from
    return made


def _call(name: str, x: Tensor) -> Tensor:
    """Stand where a layer was and say so in the graph, instead of computing."""
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::Layer", [x], {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )


def _layer_function(
    layer: nn.Module, channels: int, size: tuple[int, int] | None, opset: int
) -> tuple[Any, list[Any]]:
    """Export a layer as an ONNX function of a map, its weights in order, and constants.

    Returns the function, for all layers of the kind, and the constants.
    """
    onnx, kind = _require("onnx")[0], type(layer).__name__
    names = [name for name, _ in layer.named_parameters()]
    weights = [weight.detach() for weight in layer.parameters()]

    def run(x: Tensor, given: list[Tensor]) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    example = _example(channels, weights[0].dtype, size)
    graph = _to_onnx(_Function(run), example, (weights,), opset).graph
    constants = list(graph.initializer)
    inputs = [each.name for each in (*graph.input, *constants)]
    outputs, opsets = [graph.output[0].name], [onnx.helper.make_opsetid("", opset)]
    function = onnx.helper.make_function(_DOMAIN, kind, inputs, outputs, graph.node, opsets)
    for each in constants:
        each.name = f"{kind}.{each.name}"
    return function, constants


def _onnx_bytes(
    network: DLGSANet, size: tuple[int, int] | None, facts: dict[str, str], opset: int
) -> bytes:
    """Make an ONNX file: the network with calls in place of its layers, then these filled in.

    An exporter works for seconds on a layer, and a network has up to 48 of two kinds: each kind is
    exported once.
    """
    onnx, inliner = _require("onnx", "onnx.inliner")
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LocalLayer | GlobalLayer)
    }
    for name in layers:
        network.set_submodule(name, _Function(partial(_call, name)))
    example = _example(network.in_chans, network.mean.dtype, size)
    model = _to_onnx(network, example, (), opset)
    channels = network.overlap_embed[0].proj.out_channels
    made: dict[str, tuple[Any, list[Any]]] = {}
    for node in model.graph.node:
        if node.domain != _DOMAIN:
            continue
        name = onnx.helper.get_attribute_value(node.attribute.pop()).decode()
        layer = layers[name]
        node.op_type = type(layer).__name__
        if node.op_type not in made:
            made[node.op_type] = _layer_function(layer, channels, size, opset)
        for key, weight in layer.named_parameters(prefix=name):
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(weight.detach().numpy(), key)
            )
            node.input.append(key)
        node.input.extend(each.name for each in made[node.op_type][1])
    for function, constants in made.values():
        model.functions.append(function)
        model.graph.initializer.extend(constants)
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


def _check_arguments(path: Path, dtype: Precision, size: tuple[int, int] | None) -> None:
    if path.suffix not in FORMATS:
        raise ExportError(f"{path}: the name must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder {path.parent} does not exist; make it first")
    with disk_faults_named(f"{path} cannot be written"):
        check_target(path)
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
        path: Ends in .onnx or .pt2; an older file is kept until the comparison has passed.
        dtype: "fp32", "fp16" or "bf16" (the last for .pt2 alone), of the weights, the input and
            the output. Differences from the network in float32 must be below BOUNDS.
        size: (H, W) of the images; None for any, which leaves the test-time windows out.
        opset: Version of ONNX's operators, 18 or more.
        repeats: Runs of each comparison, the best of which counts.

    Raises:
        ExportError: It cannot be exported so, differs from the network, or a package is missing.
    """
    path = Path(path)
    _check_arguments(path, dtype, size)
    windows = bool(checkpoint.config["tlc_flag"]) and size is not None
    fitting = Checkpoint(checkpoint.weights, {**checkpoint.config, "tlc_flag": windows})
    facts = {
        "architecture": "DLGSANet",
        "name": checkpoint.name,
        "scale": str(checkpoint.scale),
        "config": json.dumps(fitting.config),
        "dtype": dtype,
        "range": "[0, 1] in and out, out not clipped",
    }
    start = time.perf_counter()
    exporting, in_onnx = fitting.network().to(DTYPES[dtype]), path.suffix == ".onnx"
    make = partial(_onnx_bytes, opset=opset) if in_onnx else _pt2_bytes
    data = make(exporting, size, facts)
    seconds = time.perf_counter() - start
    network, comparisons = fitting.network(), []

    def check(written: Path) -> None:
        run = _onnx_runner(written) if in_onnx else _pt2_runner(written)
        shapes = CHECKED_SIZES if size is None else [(batch, *size) for batch in CHECKED_BATCHES]
        random = torch.Generator().manual_seed(0)
        for batch, *sides in shapes:
            image = torch.rand(batch, network.in_chans, *sides, generator=random)
            comparisons.append(_compare(run, network, image, dtype, repeats))

    with disk_faults_named(f"{path} cannot be written"), written_atomically(path, check) as file:
        file.write(data)
    return Exported(path, seconds, windows, comparisons)
