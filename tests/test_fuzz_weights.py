"""Damaged and forged files of weights: they are read with the right values, or refused by name.

`make test` draws the same examples each time; `make test-faults` draws more, by a printed seed.
"""

import io
import json
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import small_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_data import attempted, damaged, examples, searched

from dlgsanet_arch.checkpoint import read_checkpoint, save_checkpoint

torch.manual_seed(0)
WHOLE = replace(small_checkpoint(iteration=5), notes={"licence": "MIT"})
WEIGHTS, CONFIG = WHOLE.weights, WHOLE.config
STATED = {"architecture": "DLGSANet", "config": json.dumps(CONFIG)}


def pickled(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def saved(folder: Path, suffix: str) -> bytes:
    path = folder / f"whole{suffix}"
    save_checkpoint(WHOLE, path)
    return path.read_bytes()


FOREIGN = safetensors.torch.save(dict(WEIGHTS), STATED)
# Files without checksums: a changed byte of a weight cannot be noticed, all else can.
UNCHECKED = {
    ".safetensors": FOREIGN,
    ".pth": pickled({"params": WEIGHTS}, _use_new_zipfile_serialization=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def check(data: bytes, suffix: str, folder: Path, *, exact: bool = False) -> None:
    """Read a file: what is read makes a network, and if `exact` it is the one that was saved."""
    path = folder / f"damaged{suffix}"
    path.write_bytes(data)
    found, _ = attempted(partial(read_checkpoint, path), str(path))
    if found is None:
        return
    if exact:
        assert found.config == CONFIG
        assert (found.iteration, found.notes) == (WHOLE.iteration, WHOLE.notes)
        assert found.weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(found.weights[name], each) for name, each in WEIGHTS.items())
    else:
        attempted(found.network, str(path))


@st.composite
def edited_header(draw) -> bytes:
    """A .safetensors file whose header says something else."""
    length = int.from_bytes(FOREIGN[:8], "little")
    header = json.loads(FOREIGN[8 : 8 + length])
    number = st.sampled_from([-1, 0, 1, 3, 12, 2**31, 2**63, 2**64, 1e300])
    value = st.one_of(number, st.lists(number, max_size=5), st.none(), st.text(max_size=3))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*header, "deep_feature_extraction.9.body.0.x"]))
        if name == "__metadata__":
            argument = draw(st.sampled_from([*CONFIG, "dims"]))
            config = json.dumps({**CONFIG, argument: draw(value)})
            depth = draw(st.sampled_from([0, 0, 0, 100_000]))
            header[name] = {**STATED, "config": "[" * depth + config}
        else:
            entry = header.setdefault(name, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
            dtypes = ["F64", "F16", "I8", "BOOL", "F8_E4M3", "C64", "F4", "U64", ""]
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            entry[key] = draw(st.sampled_from(dtypes) if key == "dtype" else value)
    text = json.dumps(header).encode()
    stated = draw(st.sampled_from([len(text), len(text), len(text), 0, 2**40, 2**63]))
    return stated.to_bytes(8, "little") + text + FOREIGN[8 + length :]


@st.composite
def edited_pickle(draw) -> bytes:
    """A .pth file whose pickle is damaged, with a checksum that is right."""
    whole, file = pickled({"params": WEIGHTS, **STATED}), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(file, "w") as changed:
        for name in archive.namelist():
            record = archive.read(name)
            changed.writestr(name, draw(damaged(record)) if name.endswith(".pkl") else record)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_with_checksums_are_read_exactly_or_refused(folder, suffix):
    anything = damaged(saved(folder, suffix))
    examples(150)(given(data=anything)(lambda data: check(data, suffix, folder, exact=True)))()


FORGED = {
    "unchecked.pth": (damaged(UNCHECKED[".pth"]), ".pth"),
    "unchecked.safetensors": (damaged(FOREIGN), ".safetensors"),
    "header": (edited_header(), ".safetensors"),
    "pickle": (edited_pickle(), ".pth"),
}


@pytest.mark.filterwarnings("ignore")  # of PyTorch's, about kinds of tensors
@pytest.mark.parametrize("kind", FORGED)
def test_forged_files_make_a_network_or_are_refused(folder, kind):
    files, suffix = FORGED[kind]
    examples(60)(given(data=files)(lambda data: check(data, suffix, folder)))()


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*FORGED, ".pth", ".safetensors"])
def test_more_files_are_read_or_refused(folder, kind):
    files, suffix = FORGED.get(kind) or (damaged(saved(folder, kind)), kind)
    exact = kind not in FORGED
    searched(1500)(given(data=files)(lambda data: check(data, suffix, folder, exact=exact)))()


def test_an_attribute_that_hides_a_record_is_refused(folder):
    """PyTorch reads a record that is marked as a folder as empty, and its tensor is anything."""
    whole = saved(folder, ".pth")
    at = whole.rindex(b"PK\1\2", 0, whole.rindex(b"data/3")) + 38  # external attributes
    path = folder / "hidden.pth"
    path.write_bytes(whole[:at] + b"\x10" + whole[at + 1 :])
    _, refusal = attempted(partial(read_checkpoint, path), str(path))
    assert "damaged" in refusal
