"""`dlgsanet doctor` on healthy and broken installations, and how `dlgsanet` finds its verbs."""

import importlib
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import run

from dlgsanet_arch import cli
from dlgsanet_arch.cpu import library
from dlgsanet_arch.tools import doctor
from dlgsanet_arch.tools.doctor import Package
from dlgsanet_arch.version import __version__


@pytest.fixture
def dlgsanet(tmp_path, repository):
    """Call it to run `python -m dlgsanet_arch`; modules in `tmp_path` stand before installed ones.

    The packages named in `absent` are as if they were not installed.
    """

    def run_dlgsanet(*arguments: str, absent: tuple[str, ...] = ()):
        hide = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))"
        (tmp_path / "sitecustomize.py").write_text(hide)
        path = [str(tmp_path), str(repository), os.environ.get("PYTHONPATH", "")]
        env = {"PYTHONPATH": os.pathsep.join(path)}
        return run(["-m", "dlgsanet_arch", *arguments], tmp_path, env)

    return run_dlgsanet


def test_a_healthy_installation(dlgsanet):
    result = dlgsanet("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for label in (
        *("dlgsanet", "Python", "torch", "CUDA", "torchvision", "basicsr", "Triton", "OpenCV"),
        *("lmdb", "numpy", "CPU kernels"),
    ):
        assert f"\n{label} " in f"\n{result.stdout}"
    assert "(tested: 2.11 and 2.13" in result.stdout
    assert "cpu: builds, trains and evaluates" in result.stdout
    assert "functional_tensor: BasicSR imports" in result.stdout
    assert result.stdout.endswith("problems\n  none\n")


def test_each_broken_package_is_named_with_its_fix(dlgsanet, tmp_path):
    missing_library = "ImportError('libGL.so.1: cannot open shared object file')"
    (tmp_path / "cv2.py").write_text(f"raise {missing_library}")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('CUDA 12 and CUDA 13')")
    (tmp_path / "requests.py").write_text("import urllib3_that_is_not_there")
    (tmp_path / "scipy.py").write_text("raise ValueError('made for another numpy')")
    result = dlgsanet("doctor", absent=("lmdb", "yaml"))
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    for line in (
        "cv2 is installed, but its import fails: ImportError: libGL.so.1",
        "fix: pip uninstall -y opencv-python && pip install opencv-python-headless",
        "torchvision is installed, but its import fails: RuntimeError: CUDA 12 and CUDA 13",
        "fix: pip install --force-reinstall --no-deps 'torchvision==0.",
        "fix: pip install urllib3_that_is_not_there",
        "scipy is installed, but its import fails: ValueError: made for another numpy",
        "fix: pip install --force-reinstall scipy",
        "lmdb is not installed; BasicSR needs it\n    fix: pip install lmdb",
        "yaml is not installed; BasicSR needs it\n    fix: pip install pyyaml",
        "cpu: builds, trains and evaluates",
    ):
        assert line in result.stdout
    # BasicSR fails for these causes, which are not repeated in its name.
    assert "BasicSR is installed, but" not in result.stdout


def test_without_basicsr_doctor_says_how_to_install_it(dlgsanet):
    result = dlgsanet("doctor", absent=("basicsr",))
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert "pip install --no-build-isolation --no-deps basicsr==1.4.2\n" in result.stdout


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ModuleNotFoundError("it", name="not_there.part"), "pip install not_there"),
        (ModuleNotFoundError("it", name="torch.gone"), "pip install --force-reinstall"),
        (ModuleNotFoundError("it", name="basicsr.version"), "in the BasicSR checkout: pip install"),
        (ModuleNotFoundError("it"), "pip install --force-reinstall"),
        (SyntaxError("it"), "pip install --force-reinstall"),
    ],
)
def test_a_broken_basicsr(error, fix):
    (problem,) = doctor.basicsr_problems(Package("basicsr", "1.4.2", error))
    assert type(error).__name__ in problem.cause
    assert fix in problem.fix


@pytest.mark.filterwarnings("ignore:BasicSR's name")
def test_a_taken_name_is_a_problem(monkeypatch):
    module = importlib.import_module("basicsr.utils.registry")
    installed = Package("basicsr", "1.4.2")
    assert list(doctor.basicsr_problems(installed)) == []
    monkeypatch.setattr(module, "ARCH_REGISTRY", module.Registry("arch"))
    module.ARCH_REGISTRY.register(type("DLGSANet", (), {"__module__": "their_plugin"}))
    (problem,) = doctor.basicsr_problems(installed)
    assert "their_plugin.DLGSANet" in problem.cause


def test_the_kernels_in_use_are_named_or_what_to_do(monkeypatch):
    monkeypatch.setattr(library, "variant", lambda: "avx2")
    monkeypatch.setattr(library, "why_not", lambda: "")
    assert doctor._cpu_kernels() == "avx2"
    monkeypatch.setattr(library, "why_not", lambda: "they are old; 'pip install' builds them")
    told = "none, inference on a CPU is slower: they are old; 'pip install' builds them"
    assert doctor._cpu_kernels() == told


def test_a_device_that_fails_is_a_problem():
    assert doctor.device_problem("cpu") is None
    problem = doctor.device_problem("cuda:99")
    assert "DLGSANet does not run on cuda:99" in problem.cause


def test_a_network_that_is_not_finite_is_a_problem(monkeypatch):
    class NotFinite(torch.nn.Module):
        def __init__(self, **config):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            return images * self.weight / 0

    monkeypatch.setattr(doctor, "DLGSANet", NotFinite)
    assert "not finite" in doctor.device_problem("cpu").cause


VERB = """
import argparse
from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError

def build_parser():
    return argparse.ArgumentParser(description="Greet.\\nAt length.")

@exit_status
def main(argv=None):
    if argv == ["nobody"]:
        raise UserError("nobody is not there; name somebody")
    if argv == ["interrupt"]:
        raise KeyboardInterrupt
    if argv == ["fault"]:
        raise ZeroDivisionError
    print("hello", *argv)
    return 7
"""


@pytest.fixture
def greet(tmp_path, monkeypatch):
    """A verb more."""
    (tmp_path / "cmd_greet.py").write_text(VERB)
    monkeypatch.setitem(cli.VERBS, "greet", "Greet.")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    return Path(tmp_path)


def test_a_verb_is_a_line_and_a_module(greet, capsys):
    assert cli.main(["greet", "-opt", "--help", "me"]) == 7
    assert capsys.readouterr().out == "hello -opt --help me\n"
    assert cli.main(["--help"]) == 0
    helped = capsys.readouterr().out
    assert re.search(r"^  greet +Greet\.$", helped, re.MULTILINE)
    assert re.search(r"^  doctor +Say what is installed, ", helped, re.MULTILINE)


def test_what_a_user_can_fix_is_a_message(greet, capsys):
    assert cli.main(["greet", "nobody"]) == 1
    assert capsys.readouterr().err == "dlgsanet: nobody is not there; name somebody\n"
    assert cli.main(["greet", "interrupt"]) == 130
    with pytest.raises(ZeroDivisionError):
        cli.main(["greet", "fault"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["docter"], "did you mean 'doctor'?"), (["x"], "there are: "), ([], "usage: dlgsanet ")],
)
def test_a_verb_that_is_not_there(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dlgsanet {__version__}\n"


def test_help_needs_neither_basicsr_nor_what_it_needs(dlgsanet):
    result = dlgsanet("--help", absent=("basicsr", "torchvision", "cv2", "lmdb", "scipy"))
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {verb} " in result.stdout for verb in cli.VERBS)
