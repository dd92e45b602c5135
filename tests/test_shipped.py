"""Shipped option files, found by name."""

from pathlib import Path

import pytest

from dlgsanet_arch import cli, pipeline
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.options import OptionsError, load, shipped
from dlgsanet_arch.pipeline import runs


def test_names_are_those_of_the_verb_s_folder(repository):
    for train, folder in ((True, "train"), (False, "test")):
        there = sorted(path.stem for path in (repository / "options" / folder).glob("*.yml"))
        assert shipped.names(train=train) == there
        for name in there:
            file = shipped.find(Path(name), train=train)
            assert file == repository / "options" / folder / f"{name}.yml"
            assert load(file)["name"]


def test_a_file_of_that_name_goes_first_and_paths_are_left_alone(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("tiny_x4.yml", "./options/tiny_x4", "options/train/tiny_x4.yml", "/tiny_x4"):
        assert shipped.find(Path(given), train=True) == Path(given)
    Path("tiny_x4").mkdir()  # a folder is not an option file
    assert shipped.find(Path("tiny_x4"), train=True) == repository / "options/train/tiny_x4.yml"
    Path("light_x4").write_text("name: mine")
    assert shipped.find(Path("light_x4"), train=True) == Path("light_x4")


@pytest.mark.parametrize(
    ("run", "given", "meant", "other"),
    [
        (pipeline.train, "tinyx4", "tiny_x4", "tiny_x4_bsds400"),
        (pipeline.test, "tiny-x4", "tiny_x4", "tiny_x4_no_tlc"),
    ],
)
def test_unknown_names_get_the_nearest_and_the_list(tmp_path, run, given, meant, other):
    with pytest.raises(OptionsError) as caught:
        run(tmp_path, ["-opt", given])
    assert f"did you mean '{meant}'?" in str(caught.value)
    assert other in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_wheel_s_files_go_before_a_folder_beside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "dlgsanet_arch"
    inside, beside = package / "option_files", tmp_path / "options"
    for top, name in ((inside, "right"), (beside, "wrong")):
        (top / "train").mkdir(parents=True)
        (top / "train" / f"{name}.yml").write_text("name: x")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert shipped.names(train=True) == ["right"]


def test_a_shipped_file_is_printed_as_it_is(repository, capsys):
    assert cli.main(["options", "tiny_x4"]) == 0
    text = (repository / "options/train/tiny_x4.yml").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert cli.main(["options", "--test"]) == 0
    assert capsys.readouterr().out.split() == shipped.names(train=False)
    assert cli.main(["options", "tinyx4"]) == 1
    assert "did you mean 'tiny_x4'" in capsys.readouterr().err


def test_a_test_takes_some_of_a_file_s_sets(tmp_path):
    parse = pipeline.build_parser("test").parse_args
    asked = parse(["-opt", "tiny_x4", "--sets", "Set14", "Set5"])
    options = runs.read(tmp_path, asked, train=False)
    assert sorted(each["name"] for each in options["datasets"].values()) == ["Set14", "Set5"]
    asked = parse(["-opt", "tiny_x4", "--sets", "Set4"])
    with pytest.raises(UserError, match="no data set 'Set4'; did you mean 'Set14'"):
        runs.read(tmp_path, asked, train=False)
