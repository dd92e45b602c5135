"""What README and the documents name: commands with their flags, files, and option files."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from dlgsanet_arch import cli, pipeline
from dlgsanet_arch.options import shipped

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "datasets/README.md", "examples/dlgsanet.ipynb"]
DOCUMENTS += ["docs/recipe.md", "docs/results.md", "docs/training.md", "docs/using.md"]
DOCUMENTS += ["docs/ablations.md", "docs/faults.md"]
DOORS = {"train.py": "train", "test.py": "test", "scripts/train.slurm": "train"}
DOORS |= {"datasets/prepare.py": "data"}


def text_of(path: Path) -> str:
    """A document's text, or that of a notebook's cells."""
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def commands_in(text: str) -> list[list[str]]:
    """The words of what is typed in a shell: in blocks, in code within sentences, after `!`."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall("^!(.*)", text, re.MULTILINE)
    lines += re.findall("`([^`]+)`", re.sub("```.*?```", "", text, flags=re.DOTALL))
    commands = [part for line in lines for part in line.split("&&")]
    return [shlex.split(each, comments=True) for each in commands if each.count('"') % 2 == 0]


def flags_of(repository: Path, program: str, words: list[str]) -> set[str]:
    """The flags that a script, or a verb and its action, takes."""
    if program.endswith(".py"):
        return {*re.findall('"(--?[a-z][a-z-]*)"', (repository / program).read_text())}
    assert program in cli.VERBS
    if program in ("train", "test"):
        return {*pipeline.build_parser(program)._option_string_actions}
    name = f"dlgsanet_arch.cli.cmd_{program.replace('-', '_')}"
    parser = importlib.import_module(name).build_parser()
    found = {*parser._option_string_actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            known = [action.choices[each] for each in words if each in action.choices]
            found |= {flag for each in known for flag in each._option_string_actions}
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist_with_their_flags(repository, name):
    makefile = (repository / "Makefile").read_text()
    for words in commands_in(text_of(repository / name)):
        script = next((each for each in words if each.endswith((".py", ".slurm"))), "")
        if script and words[0] in ("python", "torchrun", "srun", "sbatch"):
            assert (repository / script).is_file(), words
            program, words = DOORS.get(script, script), words[words.index(script) + 1 :]
        elif words[:1] == ["dlgsanet"] and re.fullmatch("[a-z][a-z-]+", "".join(words[1:2])):
            _, program, *words = words
        elif "make" in words[:2]:
            targets = [each for each in words if re.fullmatch("(?!make)[a-z-]+", each)]
            assert all(f"\n{each}:" in makefile for each in targets), words
            continue
        else:
            continue
        flags = {each.partition("=")[0] for each in words if re.match("--?[a-z]", each)}
        assert flags <= flags_of(repository, program, words) | {"--help"}, (program, words)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_are_there(repository, name):
    text, folder = text_of(repository / name), (repository / name).parent
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    places = r"(?<![\w./])(?:options|tests|benchmarks|examples|scripts|dlgsanet_arch)/[\w/]+\.\w+"
    assert [each for each in links if not (folder / each).exists()] == []
    assert [each for each in re.findall(places, text) if not (repository / each).exists()] == []
    pattern = r"dlgsanet (train -opt|test -opt|options) (\w+)"
    for verb, given in re.findall(pattern, text):
        assert shipped.find(Path(given), train=verb != "test -opt").is_file()


def test_the_network_alone_runs_as_printed(repository):
    section = (repository / "README.md").read_text().partition("### The network alone")[2]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    assert names["image"].shape == (1, 3, 192, 192)
