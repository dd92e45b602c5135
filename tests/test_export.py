"""Exported files: what is in them, what they compute, what is refused."""

import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from helpers import small_checkpoint

from dlgsanet_arch import export as exporting
from dlgsanet_arch.checkpoint import Checkpoint, save_checkpoint
from dlgsanet_arch.cli import cmd_export
from dlgsanet_arch.export import BOUNDS, CHECKED_SIZES, DTYPES, ExportError, export

# Every layer of the network that the paper's lacks.
OTHER = {
    "buildblock_type": "edge",
    "idynamic": False,
    "idynamic_ffn_type": "BaseFFN",
    "restormer_ffn_type": "BaseFFN",
    "body_norm": True,
    "upsampler": "pixelshuffle",
    "in_chans": 1,
    "img_range": 255.0,
}


def expected_of(checkpoint, image, **changes):
    """The network in float64, which judges every file."""
    network = Checkpoint(checkpoint.weights, {**checkpoint.config, **changes}).network().double()
    with torch.no_grad():
        return network(image.double())


def output(path, image):
    """What the file itself makes of an image."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["enlarged"], {"image": image.numpy()})[0])
    with torch.no_grad():
        return torch.export.load(path).module()(image)


def assert_close(path, image, expected, atol=1e-5):
    torch.testing.assert_close(output(path, image).double(), expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return small_checkpoint()


@pytest.fixture(scope="module")
def deep() -> Checkpoint:
    return small_checkpoint(groups=2, blocks=2)


@pytest.fixture(scope="module")
def dynamic(folder, deep):
    return export(deep, folder / "dynamic.onnx")


@pytest.fixture(scope="module")
def fixed(folder, deep):
    return export(deep, folder / "fixed.onnx", size=(19, 13))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (4, 3, 17, 30), (1, 3, 5, 41)])
def test_onnx_takes_any_size_and_batch(dynamic, deep, shape):
    image = torch.rand(shape)
    assert not dynamic.has_windows
    assert [each.shape for each in dynamic.comparisons] == [(n, 3, *s) for n, *s in CHECKED_SIZES]
    assert_close(dynamic.path, image, expected_of(deep, image, tlc_flag=False))


def test_onnx_of_a_fixed_size_has_the_windows(fixed, deep):
    image = torch.rand(5, 3, 19, 13)
    expected = expected_of(deep, image)
    assert_close(fixed.path, image, expected)
    assert (expected - expected_of(deep, image, tlc_flag=False)).abs().max() > 1e-4
    assert fixed.has_windows


def test_onnx_has_plain_operators_and_says_what_it_is(dynamic, fixed, deep):
    for exported in (dynamic, fixed):
        model = onnx.load(exported.path)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
        assert [each.name for each in model.graph.input] == ["image"]
        assert [each.name for each in model.graph.output] == ["enlarged"]
        facts = {each.key: each.value for each in model.metadata_props}
        assert facts["scale"] == "2"
        assert json.loads(facts["config"]) == {**deep.config, "tlc_flag": exported.has_windows}
    axes = onnx.load(dynamic.path).graph.input[0].type.tensor_type.shape.dim
    assert [each.dim_param or each.dim_value for each in axes] == ["batch", 3, "height", "width"]
    assert not list(dynamic.path.parent.glob("*.data"))
    names = {each.name for each in onnx.load(dynamic.path).graph.initializer}
    assert set(deep.weights) <= names


def test_onnx_of_the_other_layers_in_another_opset(folder):
    checkpoint = small_checkpoint(**OTHER)
    exported = export(checkpoint, folder / "other.onnx", opset=20)
    assert onnx.load(exported.path).opset_import[0].version == 20
    image = torch.rand(1, 1, 11, 12)
    assert_close(exported.path, image, expected_of(checkpoint, image, tlc_flag=False))


@pytest.mark.parametrize(
    ("dtype", "suffix"), [*((each, "pt2") for each in DTYPES), ("fp16", "onnx")]
)
def test_any_size_and_batch_in_each_precision(folder, checkpoint, dtype, suffix):
    exported = export(checkpoint, folder / f"{dtype}.{suffix}", dtype=dtype)
    for shape in ((1, 3, 1, 1), (4, 3, 17, 30)):
        image = torch.rand(shape)
        enlarged = output(exported.path, image.to(DTYPES[dtype]))
        assert enlarged.dtype == DTYPES[dtype]
        expected = expected_of(checkpoint, image, tlc_flag=False)
        assert (enlarged.double() - expected).abs().max() < BOUNDS[dtype]


def test_pt2_of_a_fixed_size_has_the_windows_and_the_facts(folder, checkpoint):
    exported = export(checkpoint, folder / "fixed.pt2", size=(19, 13))
    image = torch.rand(1, 3, 19, 13)
    assert_close(exported.path, image, expected_of(checkpoint, image))
    extra = {"facts.json": ""}
    program = torch.export.load(exported.path, extra_files=extra)
    assert json.loads(json.loads(extra["facts.json"])["config"]) == checkpoint.config
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "dlgsanet" in name]


@pytest.mark.parametrize(("change", "said"), [(1e-3, r"0\.001"), (float("nan"), "nan")])
def test_a_file_that_differs_is_refused_and_the_old_one_kept(
    folder, checkpoint, monkeypatch, change, said
):
    make = exporting._pt2_bytes

    def make_another(network, *rest):
        with torch.no_grad():
            network.upsample[0].bias += change
        return make(network, *rest)

    monkeypatch.setattr(exporting, "_pt2_bytes", make_another)
    path = folder / "kept.pt2"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match=f"differs from the network by {said}.*nothing was"):
        export(checkpoint, path)
    assert path.read_bytes() == b"before"
    assert not list(folder.glob("kept*unfinished*"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.pb", {}, r"must end in \.onnx or \.pt2"),
        ("none/x.onnx", {}, "none does not exist"),
        ("x.onnx", {"dtype": "bf16"}, r"bf16 in ONNX cannot be checked.*a \.pt2 file"),
        ("x.onnx", {"dtype": "int8"}, "dtype must be fp32, fp16, bf16; got 'int8'"),
        ("x.onnx", {"size": (0, 4)}, "size must be 1x1 or more; got 0x4"),
    ],
)
def test_what_cannot_be_exported_is_said_at_once(folder, checkpoint, name, options, message):
    with pytest.raises(ExportError, match=message):
        export(checkpoint, folder / name, **options)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_install_line(folder, checkpoint, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"need {package}, which.*dlgsanet-arch\[export\]"):
        export(checkpoint, folder / "x.onnx")


def test_the_verb_says_what_it_did(folder, checkpoint, capsys):
    save_checkpoint(checkpoint, folder / "weights.safetensors")
    path = folder / "said.pt2"
    arguments = ["-m", str(folder / "weights.safetensors"), "-o", str(path), "--time"]
    assert cmd_export.main(arguments) == 0
    said = capsys.readouterr().out
    assert path.exists()
    assert "1x3x31x45" in said
    assert "differs from PyTorch by" in said
    assert "without TLC: on images over 8 pixels" in said
    assert cmd_export.main(["-m", str(path), "-o", str(path)]) == 1
    with pytest.raises(SystemExit):
        cmd_export.main([*arguments, "--size", "12"])
