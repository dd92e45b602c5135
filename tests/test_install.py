"""The wheel, installed and used from elsewhere; and the scripts behind `make`."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import write_options
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dlgsanet_arch import __version__

SHIM = Path("dlgsanet_arch", "tools", "build_repair")


def plain_environment(**changes: str) -> dict[str, str]:
    """This environment without what would reach other packages: PYTHONPATH, pip's settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")
        and not name.startswith("PIP_")
    }
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "OMP_NUM_THREADS": "1", **changes}


def call(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=plain_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(*command: object, cwd: Path, **environment: str) -> str:
    result = call(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def closure(requirements: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """The running environment's distributions that the requirements need, directly or not."""
    pending = [Requirement(text) for text in requirements]
    met, found = set(), {}
    while pending:
        requirement = pending.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in met:
            continue
        met.add(key)
        distribution = importlib.metadata.distribution(requirement.name)
        found[key[0]] = distribution
        for text in distribution.requires or ():
            needed = Requirement(text)
            extras = ("", *requirement.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                pending.append(needed)
    return list(found.values())


def make_environment(
    folder: Path, borrowed: Iterable[importlib.metadata.Distribution]
) -> tuple[Path, Path]:
    """Make a virtual environment that has links to the borrowed distributions and nothing else.

    Returns:
        Its Python and its site-packages.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(
        succeed(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)[:-1]
    )
    for distribution in borrowed:
        assert distribution.files, f"{distribution.name} has no list of its files"
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = site / name
            if not link.is_symlink():
                link.symlink_to(distribution.locate_file(name))
    return python, site


def pip_install(python: Path, *arguments: object, cwd: Path) -> str:
    """Install into another environment with this one's pip and without any index."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    return succeed(*pip, "install", "--no-index", "--quiet", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    """The wheel, built from a copy: a build leaves folders behind, and must not find old ones."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    outputs = ("datasets", "experiments", "results", "tb_logger", "build", "dist", "*.egg-info")
    shutil.copytree(
        repository, source, ignore=shutil.ignore_patterns(".*", "__pycache__", *outputs)
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", built]
    succeed(*pip, "wheel", *options, ".", cwd=source)
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def clean(wheel, metadata, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel and what it declares, nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    hard = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    python, site = make_environment(folder / "venv", closure(hard))
    pip_install(python, wheel, cwd=folder)
    for absent in ("basicsr", "cv2", "lmdb", "torchvision"):
        assert not (site / absent).exists(), "the environment is not clean"
    return python


def test_wheel_holds_the_whole_package_and_nothing_else(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    about = f"dlgsanet_arch-{__version__}.dist-info"
    assert {name.parts[0] for name in names} == {"dlgsanet_arch", about}
    sources = {path.relative_to(repository) for path in repository.glob("dlgsanet_arch/**/*.py")}
    assert sources <= names
    assert Path("dlgsanet_arch/py.typed") in names
    patterns = ("weights/*.safetensors", "tools/*/*.yml", "tools/*/*.py")
    found = {path for each in patterns for path in (repository / "dlgsanet_arch").glob(each)}
    assert {path.name for path in found} >= {"tiny_x4.safetensors", "train.yml", "test.yml"}
    assert {path.relative_to(repository) for path in found} <= names
    # Of the kernels what was compiled, if anything could be: tests/test_build.py.
    kernels = {name.name.partition(".")[0] for name in names if name.suffix in (".so", ".c")}
    assert kernels in ({"_avx2", "_avx512"}, {"_neon"}, set())
    assert any(name.name == "LICENSE" for name in names)


def test_metadata_gives_version_python_and_no_basicsr(metadata):
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    hard = {need.name: str(need.specifier) for need in needed if need.marker is None}
    assert {*hard} == {"torch", "numpy", "pyyaml", "safetensors"}
    assert hard["torch"] == ">=2.5"
    extras = {
        extra: {n.name for n in needed if n.marker and n.marker.evaluate({"extra": extra})}
        for extra in metadata.get_all("Provides-Extra")
    }
    everything = extras.pop("all")
    assert everything == set().union(*extras.values()) > {"matplotlib", "torchvision"}
    assert not [n.name for n in needed if n.name == "basicsr" or n.name.startswith("opencv")]


def test_requirements_pin_what_was_tested_and_cover_setup(repository, metadata):
    def read(name):
        text = (repository / name).read_text()
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        return {need.name: need for need in map(Requirement, filter(None, lines))}

    listed = read("requirements.txt")
    assert str(listed["torch"]) == "torch==2.13.0"
    assert str(listed["torchvision"]) == "torchvision==0.28.0"
    of_tools = listed | read("requirements-test.txt")
    for need in map(Requirement, metadata.get_all("Requires-Dist")):
        is_tool = need.marker is not None and any(
            need.marker.evaluate({"extra": extra}) for extra in ("tools", "export", "hub", "all")
        )
        known = of_tools if is_tool else listed
        assert need.name in known
        pin = re.fullmatch(r"==([\d.]+)", str(known[need.name].specifier))
        assert pin is None or pin[1] in need.specifier


def test_network_runs_from_another_folder(clean, tmp_path):
    program = (
        "import torch, dlgsanet_arch; from dlgsanet_arch import DLGSANet\n"
        "net = DLGSANet(dim=12, groups=1, blocks=1, upscale=2, upsampler='pixelshuffledirect',"
        " buildblock_type='sparseedge').eval()\n"
        "with torch.no_grad(): print(*net(torch.rand(2, 3, 9, 7)).shape, dlgsanet_arch.__file__)"
    )
    *shape, file = succeed(clean, "-c", program, cwd=tmp_path).split()
    assert shape == ["2", "3", "18", "14"]
    assert Path(file).is_relative_to(clean.parent.parent)


@pytest.mark.parametrize(
    ("verb", "said"),
    [("doctor", "basicsr==1.4.2"), ("train -opt x.yml", "dlgsanet doctor --fix")],
)
def test_without_basicsr_verbs_say_what_to_install(clean, tmp_path, verb, said):
    options = write_options(tmp_path / "x.yml", {"name": "x"})
    result = call(clean.parent / "dlgsanet", *verb.split(), cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == [options]


def test_shipped_option_files_are_in_the_wheel_and_found_by_name(clean, repository, tmp_path):
    program = (
        "from dlgsanet_arch.options import shipped\n"
        "for train in (True, False):\n"
        "    for name in shipped.names(train=train): print(shipped.find(name, train=train))"
    )
    found = [Path(line) for line in succeed(clean, "-c", program, cwd=tmp_path).splitlines()]
    kinds = ("train", "test")
    ours = [path for kind in kinds for path in sorted(repository.glob(f"options/{kind}/*.yml"))]
    for installed, path in zip(found, ours, strict=True):
        assert installed.is_relative_to(clean.parent.parent)
        assert installed.read_bytes() == path.read_bytes()


def test_an_environment_with_basicsr_keeps_what_it_has(wheel, tmp_path):
    ours = canonicalize_name("dlgsanet-arch")
    others = [d for d in importlib.metadata.distributions() if canonicalize_name(d.name) != ours]
    python, site = make_environment(tmp_path / "venv", others)
    # A copy that pip could write to; the rest are links.
    found = next(d for d in others if d.name == "basicsr")
    for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
        (site / name).unlink()
        shutil.copytree(found.locate_file(name), site / name, symlinks=True)

    def state() -> dict[str, str]:
        files = [path for path in site.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        links = {path: os.readlink(path) for path in site.iterdir() if path.is_symlink()}
        return {str(path.relative_to(site)): text for path, text in {**digests, **links}.items()}

    before = state()
    pip_install(python, wheel, cwd=tmp_path)
    after = state()
    assert {name: after.get(name) for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {
        "dlgsanet_arch",
        f"dlgsanet_arch-{__version__}.dist-info",
    }
    program = (
        "import dlgsanet_arch; from basicsr.utils.registry import ARCH_REGISTRY;"
        "print(ARCH_REGISTRY.get('DLGSANet').__module__)"
    )
    assert succeed(python, "-c", program, cwd=tmp_path) == "dlgsanet_arch.network\n"


def fake_python(path: Path, version: str | None) -> None:
    """Write a program that answers as a Python of that version (310), or fails like a shim."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = "echo 'command not found' >&2; exit 127" if version is None else f"echo {version}"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"bin/python3": "312", "bin/python3.11": "311"}, "python3"),
        ({"bin/python3": None, "bin/python3.11": None, "bin/python3.10": "310"}, "python3.10"),
        ({"bin/python3": "313", "bin/python3.12": "312"}, "python3.12"),
        ({"bin/python3": "313", "pyenv/versions/3.10.9/bin/python3": "310"}, "3.10.9/bin/python3"),
        ({"bin/python3": "309", "bin/python3.13": "313"}, "python3.13"),
        ({"bin/python3": None, "bin/python": "309"}, None),
    ],
)
def test_make_finds_a_python_that_runs(repository, tmp_path, there, chosen):
    for name, version in there.items():
        fake_python(tmp_path / name, version)
    result = call(
        "/bin/sh",
        repository / "scripts" / "find_python.sh",
        cwd=tmp_path,
        PATH=str(tmp_path / "bin"),
        PYENV_ROOT=str(tmp_path / "pyenv"),
    )
    if chosen is None:
        assert result.returncode == 1
        assert "no Python 3.10 to 3.12" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert result.stdout[:-1].endswith(chosen)


def test_a_failed_install_does_not_count_and_starts_over(repository, tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("scripts", "dlgsanet_arch"):
        shutil.copytree(repository / name, checkout / name)
    for name in ("requirements.txt", "requirements-test.txt", "setup.py", "pyproject.toml"):
        shutil.copy(repository / name, checkout)
    # What an interrupted install leaves: an empty stamp and part of an environment.
    venv.create(checkout / ".venv", symlinks=True)
    stamp, left = checkout / ".venv" / ".dlgsanet-install", checkout / ".venv" / "left"
    stamp.touch()
    left.touch()

    def make():
        command = ["sh", "scripts/environment.sh", ".venv"]
        return call(*command, cwd=checkout, PYTHON=sys.executable, PIP_NO_INDEX="1")

    failed = make()
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "Making .venv" in failed.stdout
    assert "could not install requirements.txt" in failed.stderr
    assert stamp.read_text() == ""
    assert not left.exists()
    # Finished, it is used as it is, until a requirement or the kernels' source changes.
    finish = "import sys; sys.path.insert(0, 'scripts'); import install\n"
    finish += "install.STAMP.write_text(install.fingerprint())"
    changes = {"dlgsanet_arch/cpu/dynamic.c": "/* changed */", "requirements.txt": "new>=1\n"}
    for name, change in changes.items():
        succeed(sys.executable, "-c", finish, cwd=checkout)
        assert make().stdout == ""
        with open(checkout / name, "a") as file:
            file.write(change)
        result = make()
        assert result.returncode == 1
        assert "Installing torch" in result.stdout
        assert "Making .venv" not in result.stdout


@pytest.fixture
def install(repository, monkeypatch):
    """scripts/install.py as a module."""
    monkeypatch.setattr(sys, "path", [str(repository / "scripts"), *sys.path])
    monkeypatch.delitem(sys.modules, "install", raising=False)
    return importlib.import_module("install")


def test_an_active_environment_keeps_its_torch_and_cv2(install, monkeypatch):
    versions = {"torch": "2.11.0+cu130", "setuptools": "84.0", "numpy": "1.26"}
    monkeypatch.setattr(install, "installed_version", versions.get)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: name == "cv2" or None)
    listed = ["torch==2.13.0", "torchvision==0.28.0", "opencv-python-headless>=4.6"]
    listed += ["setuptools>=77.0.3,<81", "numpy>=1.23"]
    assert install.adapt(listed) == ["torch==2.11.0+cu130", "torchvision", "numpy>=1.23"]
    versions["torch"] = "2.3.1"
    with pytest.raises(SystemExit, match=r"torch 2\.3\.1, which is too old"):
        install.adapt(listed)


@pytest.mark.parametrize("fetched", [True, False])
def test_make_fetches_a_compiler_for_the_build_alone(
    install, tmp_path, monkeypatch, capsys, fetched
):
    asked = []
    monkeypatch.setattr(install, "run_pip", lambda *words: asked.append(words) or fetched)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    setup = "ZIG = 'ziglang>=9'\ndef needs_zig(): return {}"
    (tmp_path / "setup.py").write_text(setup.format(True))
    with install.compiler(Path(sys.executable)) as (folder,):
        command = ("install", "--no-deps", "--target", str(folder), "ziglang>=9")
        assert asked == [(Path(sys.executable), *command)]
        assert folder.is_dir()
    assert not folder.exists()
    assert ("could not fetch it" in capsys.readouterr().out) is not fetched
    (tmp_path / "setup.py").write_text(setup.format("  False"))  # of another length: not cached
    with install.compiler(Path(sys.executable)) as folders:
        assert folders == []
    assert len(asked) == 1


def test_build_repair_lets_setup_read_its_version(repository, tmp_path):
    (tmp_path / "setup.py").write_text(
        "def get_version():\n"
        "    exec(compile('__version__ = \"1.4.2\"', 'version.py', 'exec'))\n"
        "    return locals()['__version__']\n"
        "names = {}\n"
        "exec('inner = 1', names)\n"
        "print(get_version(), names['inner'])"
    )
    if sys.version_info >= (3, 13):
        assert call(sys.executable, "setup.py", cwd=tmp_path).returncode == 1
    repaired = succeed(sys.executable, "setup.py", cwd=tmp_path, PYTHONPATH=str(repository / SHIM))
    assert repaired == "1.4.2 1\n"
