"""The C library under the address and undefined-behaviour sanitisers; by `make test-faults`."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from dlgsanet_arch.cpu import library

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(library.variant() is None, reason="no C library for this machine"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc's sanitisers are used"),
]

# Of tests/test_ops.py and tests/test_fused.py, those in which C computes: every operator and every
# half of a layer, over sizes, strides, slices and tiles.
COMPUTES = "definition or layout or any_size or odd_channels or one_image or threads or tiles"
SANITISE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def build(repository, build_script, folder, change=str):
    """Compile the sources, changed as asked, and return the library's path."""
    lanes, flags = build_script.variants()[library.variant()]
    sources = []
    for name in build_script.C_FILES:
        source = repository / name
        copy = folder / source.name
        copy.write_text(change(source.read_text()))
        sources.append(str(copy))
    out = folder / "kernels.so"
    macros = [f"-DLANES={lanes}", '-DSOURCE_DIGEST=""']
    flags = [*build_script.FLAGS, *flags, *SANITISE, "-fPIC", "-shared"]
    subprocess.run(["gcc", *macros, *flags, *sources[1:], "-o", str(out)], check=True)
    return out


def run(repository, kernels, which):
    # The sanitiser must be there before Python, and the library that throws C++'s errors with it.
    files = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.check_output(["gcc", each], text=True).strip() for each in files]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "SANITISED_KERNELS": str(kernels),
        "PYTHONPATH": f"{repository}:{repository / 'tests'}",
    }
    files = ["tests/test_ops.py", "tests/test_fused.py"]
    command = [sys.executable, "-m", "pytest", "-qsx", "-p", "sanitised", "-p", "no:xdist"]
    return subprocess.run(
        [*command, *files, "-k", which],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def build_script(repository):
    spec = importlib.util.spec_from_file_location("setup", repository / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_no_kernel_leaves_its_tensors(repository, build_script, tmp_path):
    ran = run(repository, build(repository, build_script, tmp_path), COMPUTES)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[:3000]
    assert " passed" in ran.stdout


def test_a_kernel_that_reads_beyond_a_tensor_is_found(repository, build_script, tmp_path):
    def beyond(text):
        return text.replace("sum += parts[s * count + i];", "sum += parts[s * count + i + 1];")

    kernels = build(repository, build_script, tmp_path, beyond)
    ran = run(repository, kernels, "test_c_equals_the_definition")
    assert ran.returncode != 0
    assert "AddressSanitizer" in ran.stdout + ran.stderr
