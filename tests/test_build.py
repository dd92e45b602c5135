"""How the CPU kernels are built by setup.py, and what is said and done where there are none."""

import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers import SMALL_ARGUMENTS, run

from dlgsanet_arch import DLGSANet, cpu
from dlgsanet_arch.cpu import library


@pytest.fixture
def build(repository, monkeypatch):
    """setup.py as the build backend that pyproject.toml names, without this shell's settings."""
    for name in ("CC", "DLGSANET_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup", repository / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(repository, tmp_path) -> Path:
    """All that a build reads, where it may write."""
    folder = tmp_path / "a checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("dlgsanet_arch", "options"):
        shutil.copytree(repository / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(repository / name, folder)
    return folder


@pytest.mark.parametrize(
    ("machine", "lanes"),
    [
        ("x86_64", {"avx2": 8, "avx512": 16}),
        ("aarch64", {"neon": 4}),
        ("arm64", {"neon": 4}),
        ("riscv64", {}),
    ],
)
def test_each_machine_gets_its_variants(build, monkeypatch, machine, lanes):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    extensions = {each.name: each for each in build._extensions()}
    assert set(extensions) == {f"dlgsanet_arch.cpu._{name}" for name in lanes}
    for name, count in lanes.items():
        extension = extensions[f"dlgsanet_arch.cpu._{name}"]
        assert ("LANES", str(count)) in extension.define_macros
        assert extension.optional
        # A wheel may be built on another machine than it is used on.
        assert not [flag for flag in extension.extra_compile_args if "native" in flag]
        vectors = {"avx2": "-mavx2", "avx512": "-mavx512f"}.get(name, "-O3")
        assert vectors in extension.extra_compile_args
    # These are the names that the library asks for.
    for capability in ("AVX2", "AVX512") if machine == "x86_64" else ("DEFAULT",):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert library.variant() in (lanes or {None: 0})


def test_kernels_can_be_left_out(build, monkeypatch):
    monkeypatch.setenv("DLGSANET_KERNELS", "0")
    monkeypatch.setenv("PATH", "")
    assert build._extensions() == []
    assert not build.needs_zig()


def write_program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no kernels here")
def test_a_compiler_is_one_that_compiles(build, monkeypatch, tmp_path):
    if build.find_compiler() is None:
        pytest.skip("no C compiler works here")
    works = shutil.which(build.find_compiler()[0])
    build.find_compiler.cache_clear()
    for name in ("cc", "gcc"):
        write_program(tmp_path / name, "echo 'fatal error: string.h: No such file' >&2; exit 1")
    write_program(tmp_path / "clang", f'exec "{works}" "$@"')
    monkeypatch.setattr(build.sysconfig, "get_config_var", lambda name: "their-cc -pthread")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CC", "false")
    assert build.find_compiler() == ("clang",)
    build.find_compiler.cache_clear()
    monkeypatch.setenv("CC", f"{works} -pthread")
    assert build.find_compiler() == (works, "-pthread")
    # One that cannot build all variants is not a compiler: Zig can.
    build.find_compiler.cache_clear()
    lanes = [count for count, _ in build.variants().values()][-1]
    for name in ("cc", "gcc", "clang"):
        refuse = f'case "$*" in *LANES={lanes}*) exit 1;; esac'
        write_program(tmp_path / name, f'{refuse}\nexec "{works}" "$@"')
    monkeypatch.delenv("CC")
    assert build.find_compiler() is None


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_zig_is_asked_for_where_it_is_needed_and_offered(build, monkeypatch, kind):
    ask = getattr(build, f"get_requires_for_build_{kind}")
    monkeypatch.setattr(build.build_meta, ask.__name__, lambda settings: ["wheel"])
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    offered = []
    monkeypatch.setattr(build, "_is_offered", lambda name: name in offered)
    monkeypatch.setattr(build, "find_compiler", lambda: ("cc",))
    assert ask() == ["wheel"]
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert ask() == ["wheel"]
    offered.append("ziglang")
    assert ask() == ["wheel", build.ZIG]
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert ask() == ["wheel"]


def test_an_offer_is_refused_by_pip_alone(build, monkeypatch, tmp_path):
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert not build._is_offered("ziglang")
    # Under uv there is no pip that could be asked.
    without = write_program(tmp_path / "python", "echo 'No module named pip' >&2; exit 1")
    monkeypatch.setattr(sys, "executable", without)
    assert build._is_offered("ziglang")


def test_without_a_compiler_the_build_goes_on_and_says_so(checkout):
    program = (
        "import runpy, sys; sys.modules['ziglang'] = None\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    env = {"PATH": "", "CC": "false", "DLGSANET_KERNELS": "1"}
    result = run(["-c", program], checkout, env)
    assert result.returncode == 0, result.stdout + result.stderr
    if platform.machine() in ("x86_64", "aarch64", "arm64"):
        assert "no C compiler works here" in result.stdout + result.stderr
    assert list(checkout.glob("dlgsanet_arch/cpu/*.so")) == []


def test_an_sdist_holds_all_that_a_build_needs(checkout):
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_it.py").touch()
    # Made where no kernel is compiled, as on Windows.
    result = run(["setup.py", "-q", "sdist"], checkout, {"DLGSANET_KERNELS": "0"})
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = checkout.glob("dist/*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    parts = ("dlgsanet_arch/**/*.py", "dlgsanet_arch/*/*.safetensors", "dlgsanet_arch/*/*/*.yml")
    found = (path for each in (*parts, "options/*/*.yml") for path in checkout.glob(each))
    sources = {str(path.relative_to(checkout)) for path in found}
    assert {Path(name).suffix for name in sources} == {".py", ".safetensors", ".yml"}
    needed = {"dlgsanet_arch/py.typed", "MANIFEST.in", "LICENSE"}
    needed |= {f"dlgsanet_arch/cpu/{name}" for name in library.SOURCES}
    assert sources | needed | {"setup.py", "pyproject.toml", "README.md"} <= names
    assert not [name for name in names if name.startswith("tests")]


@pytest.fixture
def installed(build, tmp_path, monkeypatch):
    """A folder that the library is looked for in; call it to put one built from `source` there."""
    if library.variant() is None:
        pytest.skip("no kernels for this processor")
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library._library.cache_clear()

    def install(digest: str) -> Path:
        if build.find_compiler() is None:
            pytest.skip("no C compiler works here")
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        path = tmp_path / f"_{library.variant()}{suffix}"
        command = [*build.find_compiler(), "-shared", "-fPIC", "-xc", "-", "-o", str(path)]
        text = f'const char source_digest[] = "{digest}";' if digest else "int nothing;"
        subprocess.run(command, input=text, text=True, check=True)
        return path

    yield install
    library._library.cache_clear()


def test_a_library_is_taken_for_the_source_it_was_built_from(installed, tmp_path):
    sources = [tmp_path / name for name in library.SOURCES]
    for source in sources:
        source.write_text(f"int {source.stem};")
    path = installed(sha256(b"".join(map(Path.read_bytes, sources))).hexdigest())
    assert library._library.__wrapped__().fault == ""
    for source in sources:
        before = source.read_text()
        source.write_text("int changed;")
        kernels, fault = library._library.__wrapped__()
        assert kernels is None
        assert fault.startswith(f"{path} is older than its source; 'pip install")
        source.write_text(before)
    # An installed package has no source beside it.
    for source in sources:
        source.unlink()
    assert library._library.__wrapped__().kernels is not None


@pytest.mark.parametrize("content", [b"", b"no library", None])
def test_a_library_that_does_not_load_is_named(installed, content):
    path = installed("")
    if content is not None:
        path.write_bytes(content)
    fault = library._library.__wrapped__().fault
    assert fault.startswith(f"{path} does not load (")
    assert "pip install --no-deps ." in fault


def test_without_a_library_pytorch_computes_and_the_reason_is_told(installed, monkeypatch):
    net, image = DLGSANet(**SMALL_ARGUMENTS).eval(), torch.rand(1, 3, 13, 9)
    assert library.load() is None
    assert "were not built; 'pip install --no-deps .'" in cpu.why_not()
    with torch.no_grad():
        torch.testing.assert_close(net(image), net.double()(image.double()).float())
    monkeypatch.setattr(os, "name", "nt")
    assert "not built on" in library._library.__wrapped__().fault


def test_a_processor_without_kernels_is_told(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    for name in ("ATEN_CPU_CAPABILITY", "DLGSANET_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    assert library._library.__wrapped__().fault == "none is for what PyTorch uses here"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert "as ATEN_CPU_CAPABILITY is 'default'" in library._library.__wrapped__().fault
