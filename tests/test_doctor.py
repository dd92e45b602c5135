"""`dlgsanet doctor` on healthy and broken installations, and how `dlgsanet` finds its verbs."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run

from dlgsanet_arch import DLGSANet, cli
from dlgsanet_arch.cpu import library
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.tools import doctor, installing
from dlgsanet_arch.tools.doctor import Package, Problem
from dlgsanet_arch.version import __version__


@pytest.fixture
def dlgsanet(tmp_path, repository):
    """Call it to run `python -m dlgsanet_arch`; modules in `tmp_path` stand before installed ones.

    The packages named in `absent` are as if they were not installed.
    """

    def run_dlgsanet(*arguments: str, absent: tuple[str, ...] = ()):
        hide = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))"
        (tmp_path / "sitecustomize.py").write_text(hide)
        return run(["-m", "dlgsanet_arch", *arguments], tmp_path, path=(tmp_path, repository))

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
    assert "\nwarnings\n" in result.stdout
    assert result.stdout.endswith("problems\n  none\n")


def test_each_broken_package_is_named_with_its_fix(dlgsanet, tmp_path):
    missing_library = "ImportError('libGL.so.1: cannot open shared object file')"
    (tmp_path / "cv2.py").write_text(f"raise {missing_library}")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('CUDA 12 and CUDA 13')")
    (tmp_path / "requests.py").write_text("import urllib3_that_is_not_there")
    (tmp_path / "scipy.py").write_text("raise ValueError('made for another numpy')")
    result = dlgsanet("doctor", absent=("lmdb", "PIL"))
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
        "lmdb is not installed; training needs it\n    fix: pip install lmdb",
        "PIL is not installed; training needs it\n    fix: pip install pillow",
        "cpu: builds, trains and evaluates",
    ):
        assert line in result.stdout
    # BasicSR fails for these causes, which are not repeated in its name.
    assert "BasicSR is installed, but" not in result.stdout


def test_without_torch_doctor_says_how_to_install_it(dlgsanet):
    result = dlgsanet("doctor", absent=("torch",))
    assert result.returncode == 1
    assert re.match("dlgsanet: an import of what all verbs need fails .*torch", result.stderr)
    assert "Traceback" not in result.stderr


def missing(name):
    return ModuleNotFoundError("it", name=name)


@pytest.mark.parametrize(
    ("python", "version", "error", "fix"),
    [
        ((3, 12), None, None, "pip install --no-build-isolation --no-deps basicsr==1.4.2"),
        ((3, 13), None, None, "dlgsanet doctor --fix"),
        ((3, 12), "1.4.2", missing("not_there.part"), "pip install not_there"),
        ((3, 12), "1.4.2", missing("torch.gone"), "pip install --force-reinstall"),
        ((3, 12), "1.4.2", missing("basicsr.version"), "in the BasicSR checkout: pip install"),
        ((3, 12), "1.4.2", SyntaxError("it"), "pip install --force-reinstall"),
    ],
)
def test_a_missing_or_broken_basicsr(monkeypatch, python, version, error, fix):
    monkeypatch.setattr(sys, "version_info", (*python, 0))
    problem = doctor.package_problem(Package("basicsr", version, error))
    assert fix in problem.fix
    if error is None:
        assert problem.commands == [*installing.INSTALL_BASICSR]
    else:
        assert type(error).__name__ in problem.cause
    assert [path.name for path in installing.build_paths()] == ["build_repair"] * (python[1] > 12)


@pytest.mark.filterwarnings("ignore:BasicSR's name")
def test_a_taken_name_is_a_problem(monkeypatch):
    module = importlib.import_module("basicsr.utils.registry")
    assert doctor.package_problem(Package("basicsr", "1.4.2")) is None
    assert doctor.name_problem() is None
    monkeypatch.setattr(module, "ARCH_REGISTRY", module.Registry("arch"))
    module.ARCH_REGISTRY.register(type("DLGSANet", (), {"__module__": "their_plugin"}))
    assert "their_plugin.DLGSANet" in doctor.name_problem().cause


# Says yes to every command, and notes it with what Python would import first.
FAKE_PIP = """
import json, os, sys
with open("pip.jsonl", "a") as file:
    print(json.dumps([sys.argv[1:], os.environ["PYTHONPATH"]]), file=file)
print("Downloading x.whl (12.3 MB)")
sys.exit("broken" in sys.argv)
"""


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """The commands given to a pip that installs nothing."""
    (tmp_path / "pip.py").write_text(FAKE_PIP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Path("pip.jsonl").touch()
    return lambda: [json.loads(line) for line in Path("pip.jsonl").read_text().splitlines()]


def test_doctor_fixes_what_pip_can_fix(dlgsanet, pip):
    result = dlgsanet("doctor", "--fix", "--yes", absent=("basicsr", "lmdb"))
    assert result.returncode == 1  # the pip is not real: checked again, nothing has changed
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stdout.count("BasicSR is not installed") == 2
    options = ["--disable-pip-version-check", "--no-input", "--no-compile", "--progress-bar", "off"]
    commands = [("lmdb",), *(each[1:] for each in installing.INSTALL_BASICSR)]
    assert [command for command, _ in pip()] == [["install", *options, *each] for each in commands]
    for command in commands:
        assert f"-m pip install {shlex.join(command)}\n" in result.stdout
    assert all(("build_repair" in path) == (sys.version_info >= (3, 13)) for _, path in pip())


@pytest.mark.parametrize(("answer", "ran"), [("y", 1), ("n", 0), ("", 0), (None, 0)])
def test_doctor_asks_before_it_installs(pip, monkeypatch, capsys, answer, ran):
    def reply(question):
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    again = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(doctor.subprocess, "run", lambda command: again)
    problems = [Problem("x is absent", [("install", "x")]), Problem("y", advice="buy it")]
    assert doctor.fix(problems, yes=False) == 1 - ran
    assert len(pip()) == ran
    printed = capsys.readouterr().out
    assert "-m pip install x\n" in printed
    assert ("nothing was changed" in printed) == (not ran)


def test_what_pip_cannot_fix_is_said(pip, monkeypatch, capsys):
    assert doctor.fix([], yes=True) == 0
    assert doctor.fix([Problem("y", advice="buy it")], yes=True) == 1
    assert "pip cannot fix" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"pip failed.*: pip install broken"):
        doctor.fix([Problem("x", [("install", "broken")])], yes=True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no pip: run .* -m ensurepip"):
        doctor.fix([Problem("x", [("install", "x")])], yes=True)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"torch": "2.13.1+cpu", "torchvision": "0.28.0", "basicsr": "1.4.2"}, ""),
        ({"torch": "2.14.0+cpu"}, r"torch 2.14.0\+cpu is untested .*torch==2.13"),
        ({"torchvision": "0.27.0"}, "torchvision 0.27.0 was made for another torch"),
        ({"basicsr": "1.3.0"}, "BasicSR 1.3.0 is untested"),
        ({"python": (3, 14)}, "Python .* is untested .*3.10 to 3.12"),
        ({"cuda": "13.0"}, "torch has .* CUDA .*https://download.pytorch.org/whl/cpu"),
    ],
)
def test_untested_and_unsuitable_versions_are_a_warning(monkeypatch, changes, warned):
    monkeypatch.setattr(torch, "__version__", changes.get("torch", "2.13.0+cpu"))
    monkeypatch.setattr(torch.version, "cuda", changes.get("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "version_info", (*changes.get("python", (3, 11)), 0))
    packages = [Package(name, changes.get(name)) for name in ("torchvision", "basicsr")]
    found = doctor.warnings(*packages)
    assert len(found) == bool(warned)
    assert re.match(warned, "".join(found))


def test_kernels_that_are_missing_are_shown_with_their_reason(monkeypatch, capsys):
    monkeypatch.setattr(library, "why_not", lambda: "they are old; 'pip install' builds them")
    doctor.report()
    said = "CPU kernels  none, inference on a CPU is slower: they are old; 'pip install' builds"
    assert said in capsys.readouterr().out


def test_a_device_that_fails_or_computes_nan_is_a_problem(monkeypatch):
    assert doctor.device_problem("cpu") is None
    assert "DLGSANet does not run on cuda:99" in doctor.device_problem("cuda:99").cause
    broken = {"forward": lambda self, x: next(self.parameters()).sum() * x / 0}
    monkeypatch.setattr(doctor, "DLGSANet", type("Broken", (DLGSANet,), broken))
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
    if argv == ["much"]:
        import torch
        torch.empty(10**13)
    if argv == ["fault"]:
        raise ZeroDivisionError
    if argv == ["other fault"]:
        raise RuntimeError("not of memory")
    print("hello", *argv)
    return 7
"""


@pytest.fixture
def _greet(tmp_path, monkeypatch):
    """A verb more."""
    (tmp_path / "cmd_greet.py").write_text(VERB)
    monkeypatch.setitem(cli.VERBS, "greet", "Greet.")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])


@pytest.mark.usefixtures("_greet")
def test_a_verb_is_a_line_and_a_module_and_its_user_errors_are_messages(capsys):
    assert cli.main(["greet", "-opt", "--help", "me"]) == 7
    assert capsys.readouterr().out == "hello -opt --help me\n"
    assert cli.main(["--help"]) == 0
    assert re.search(r"^  greet +Greet\.$", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["greet", "nobody"]) == 1
    assert capsys.readouterr().err == "dlgsanet: nobody is not there; name somebody\n"
    assert cli.main(["greet", "interrupt"]) == 130
    assert cli.main(["greet", "much"]) == 1
    assert re.search(
        "dlgsanet: memory does not suffice .*; ask for smaller", capsys.readouterr().err
    )
    for fault, error in (("fault", ZeroDivisionError), ("other fault", RuntimeError)):
        with pytest.raises(error):
            cli.main(["greet", fault])
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dlgsanet {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["docter"], "did you mean 'doctor'?"), (["x"], "there are: "), ([], "usage: dlgsanet ")],
)
def test_a_verb_that_is_not_there(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


# One thing has one spelling in all verbs.
FLAGS = {"--input": "-i", "--output": "-o", "--weights": "-m"}


def actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions(each)
        elif action.option_strings:
            yield action


@pytest.mark.parametrize("verb", cli.VERBS)
def test_one_thing_has_one_spelling(verb):
    module = importlib.import_module(f"dlgsanet_arch.cli.cmd_{verb.replace('-', '_')}")
    for action in actions(module.build_parser()):
        spellings = set(action.option_strings)
        shorts = {FLAGS[each] for each in spellings & FLAGS.keys()}
        assert {each for each in spellings if len(each) == 2} - {"-h"} == shorts
        assert (action.metavar == "HxW") == ("--size" in spellings) == (action.type is cli.size)


@pytest.mark.parametrize("text", ["720", "720x", "0x5", "axb", "1x2x3", "720X1280"])
def test_a_size_is_height_and_width(text):
    assert cli.size("720x1280") == (720, 1280)
    with pytest.raises(argparse.ArgumentTypeError, match="a size is HEIGHTxWIDTH"):
        cli.size(text)
