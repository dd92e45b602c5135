"""Option files read: numbers, bounds of YAML, errors by file and line, keys set beside the file."""

import pytest
from option_cases import train_options

from dlgsanet_arch.options import OptionsError, load, override, parse_value

NUMBERS = ["5e-4", "1E-4", "1.e-4", "+1e3", "-2.5e+3", ".5e2", "1e5", "0.5", "-1", "7", "-.5", "3."]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_numbers_wherever_they_stand(tmp_path, text):
    file = tmp_path / "a.yml"
    file.write_text(f"lr: {text}\nlist: [{text}, a{text}, {text}x, '{text}', !!float {text}]\n")
    number = float(text)
    assert load(file) == {"lr": number, "list": [number, f"a{text}", f"{text}x", text, number]}
    assert parse_value(text) == number
    assert isinstance(load(file)["lr"], int) == (text in ("-1", "7"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2e-3, a]", [1, 2e-3, "a"]), ("~", None), ("None", None), ("true", True),
        ("'1'", "1"), ("{}x4", "{}x4"), ("a=b", "a=b"), ("", None), ("[1, 2", "[1, 2"),
        ("!!float 5e-4", 5e-4), ("datasets/a b", "datasets/a b"), ("!!float a", "!!float a"),
    ],
)  # fmt: skip
def test_values_given_beside_the_file_are_read_like_the_files(text, value):
    assert parse_value(text) == value


# Ten lists of ten, each of the one before: ten thousand million values in 400 bytes.
ANCHORS = "x0: &x0 [1]\n" + "".join(
    f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 11)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: a\ntrain:\n  lr: [1, 2\nval: 3\n", "bad.yml:4:4: this is not YAML"),
        (b"name: \x01\n", "bad.yml: this is not YAML"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"", "bad.yml holds nothing"),
        (b"- a\n- b\n", "bad.yml holds a list"),
        (b"a: !!python/object:os.system x\n", "bad.yml:1:4: this is not YAML"),
        (b"a: 1\nb: {c: 1,\n c: 2}\n", "bad.yml:3:2: this is not YAML: the key 'c' is written twi"),
        (b"&z {a: *z}", "bad.yml has more than 100,000 values"),
        (ANCHORS.encode(), "bad.yml has more than 100,000 values"),
        (b"a: " + b"1" * 200_000, "bad.yml has more than 131,072 characters"),
        (b"a: " + b"[" * 9000, "recursion"),
        (b'a: !!int ""', "bad.yml: this is not YAML"),
        (b"a: 2001-13-45", "month must be in 1..12"),
        (b"a: *b", "bad.yml:1:4"),
        (b"a: 1\n---\nb: 1", "bad.yml:2:1:"),
    ],
)
def test_what_is_no_option_file_is_refused_with_its_place(tmp_path, content, said):
    file = tmp_path / "bad.yml"
    file.write_bytes(content)
    with pytest.raises(OptionsError) as caught:
        load(file)
    assert said in str(caught.value)


def test_a_missing_option_file_is_named_with_a_near_one(tmp_path):
    (tmp_path / "tiny_x4.yml").touch()
    with pytest.raises(
        OptionsError, match=r"tiny_4x\.yml does not exist; did you mean 'tiny_x4\.yml'"
    ):
        load(tmp_path / "tiny_4x.yml")
    with pytest.raises(OptionsError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_override_sets_keys_and_makes_sections():
    options = train_options({"logger:wandb": None})
    entries = ["train:total_iter=8", "name = b=c", "path:resume_state=~", "train:amp=bf16"]
    override(options, [*entries, "dist_params:timeout=5", "logger:wandb:project=x"])
    expected = train_options() | {"name": "b=c", "dist_params": {"timeout": 5}}
    expected["train"] |= {"total_iter": 8, "amp": "bf16"}
    expected["logger"]["wandb"] = {"project": "x"}
    assert options == expected


@pytest.mark.parametrize(
    ("entry", "said"),
    [("name:a=1", "name is not a section of keys; it is 'small'")]
    + [(entry, "write KEY=VALUE") for entry in ("=3", "name")],
)
def test_override_refuses_what_is_no_assignment_and_changes_nothing(entry, said):
    options = train_options()
    with pytest.raises(OptionsError, match=said):
        override(options, ["train:total_iter=8", entry])
    assert options == train_options()
