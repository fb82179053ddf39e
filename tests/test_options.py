"""Options: what YAML and flags may say, and that they mean the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropemods.cli.command import Command, parse
from ropemods.settings.options import REQUIRED, MissingOption, build, checked, converted, from_yaml, in_words, option
from ropemods.settings.strict_yaml import read, scalar


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A command for these tests. It does nothing."""

    model: str = option(REQUIRED, "a model", positional=True)
    rate: float = option(0.5, "a rate")
    steps: int = option(10, "how many")
    shape: Literal["cosine", "linear"] = option("cosine", "which")
    early: tuple[int, int] = option((8, 64), "two queries")
    tags: tuple[str, ...] = option((), "any number of words")
    note: str | None = option(None, "a remark", unset="none")
    fast: bool = option(False, "hurry")


COMMAND = Command(options=Sample, run=lambda options: None, example="ropemods sample ./model")


def from_flags(*words: str) -> Sample:
    return parse(COMMAND, "sample", list(words))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "words",
    [["--early", "4,8"], ["--early", "4,", "8"], ["--early", "4", ",8"], ["--early=4,8"], ["--early", "[4, 8]"]],
)
def test_a_list_of_numbers_may_have_commas(words: list[str]) -> None:
    assert from_flags("m", *words) == Sample(model="m", early=(4, 8))


# What a YAML file may say


def test_yaml_that_is_nested_too_deeply_is_an_error_with_its_file(tmp_path: Path) -> None:
    for text in ("[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000):
        with pytest.raises(ValueError, match=r"deep.yaml, line 1: lists or mappings are nested too deeply"):
            read(written(tmp_path / "deep.yaml", f"rate: {text}\n"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("-.inf", -math.inf),
        ("[0, -1]", [0, -1]),
        # What YAML 1.1 makes false, eight, ninety and a date
        ("no", "no"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("truncated_rope:keep=0.75,which=lowest", "truncated_rope:keep=0.75,which=lowest"),
    ],
)
def test_words_mean_what_they_look_like(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_as_itself(number: float) -> None:
    assert scalar(repr(number)) == number
    assert type(scalar(repr(number))) is float


@given(st.integers())
def test_every_integer_is_read_as_itself(number: int) -> None:
    assert scalar(str(number)) == number
    assert type(scalar(str(number))) is int


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rate: 1\nsteps: 2\nrate: 3\n", ["line 3", "'rate'", "second time"]),
        ("mods:\n- {keep: 1, keep: 2}\n", ["line 2", "'keep'", "second time"]),
        ("a: [1\n", ["line 2"]),
        ("a: !!python/object/apply:os.getcwd []\n", ["line 1", "python/object"]),
        ("- a\n- b\n", ["key: value"]),
    ],
)
def test_what_is_not_plain_flat_yaml_is_an_error_that_says_where(tmp_path: Path, text: str, says: list[str]) -> None:
    path = written(tmp_path / "run.yaml", text)
    with pytest.raises(ValueError) as error:
        read(path)
    for part in [str(path), *says]:
        assert part in str(error.value)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert from_yaml(Sample, written(tmp_path / "run.yaml", "# nothing yet\n")) == {}


def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path / "run.yaml", "model: m\nstesp: 3\n")
    with pytest.raises(ValueError, match=r"run\.yaml: there is no option 'stesp' \(did you mean 'steps'\?\); known: "):
        from_yaml(Sample, path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rate", "fast", "a number"),
        ("rate", True, "a number"),
        ("rate", {"a": 1}, "a number"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", None, "a whole number"),
        ("model", 3, "text"),
        ("shape", "hard", "cosine or linear"),
        ("early", [8], "a list of 2 whole numbers"),
        ("early", [8, "b"], "a list of 2 whole numbers"),
        ("tags", "one", "a list of texts"),
        ("note", 3, "text or null"),
        ("fast", "yes", "true or false"),
        ("fast", 1, "true or false"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_key_value_and_type(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        checked(Sample, {key: value}, source="run.yaml")
    assert str(error.value).startswith(f"run.yaml: {key} takes {expected}, found {value!r}")


def test_numbers_and_lists_come_in_their_final_form() -> None:
    assert checked(Sample, {"rate": 1, "early": [4, 8]}, source="run.yaml") == {"rate": 1.0, "early": (4, 8)}
    assert type(checked(Sample, {"rate": 1}, source="run.yaml")["rate"]) is float


def test_choices_are_told_apart_by_type() -> None:
    hint = Literal[False, "shared"]
    assert converted(False, hint, "x") is False
    with pytest.raises(ValueError, match=f"x takes {in_words(hint)}, found 0 "):
        converted(0, hint, "x")


# Flags and YAML


def test_later_layers_win_and_defaults_fill_the_rest() -> None:
    assert build(Sample, {"model": "a", "rate": 1.0}, {"rate": 2.0}) == Sample(model="a", rate=2.0)


def test_what_is_required_is_missed_by_name() -> None:
    with pytest.raises(MissingOption, match="missing: model"):
        build(Sample, {"rate": 1.0})


def test_flags_may_stand_anywhere_and_be_spelt_with_hyphens() -> None:
    assert from_flags("--rate", "2", "m", "--fast") == Sample(model="m", rate=2.0, fast=True)
    assert from_flags("m", "--no-fast", "--rate=-2e-3") == Sample(model="m", rate=-2e-3)
    assert from_flags("m", "--early", "4", "8", "--tags", "1", "b") == Sample(model="m", early=(4, 8), tags=("1", "b"))
    assert from_flags("m", "--tags", "1,b", "a text") == Sample(model="m", tags=("1,b", "a text"))


def test_the_flag_wins_over_yaml_in_both_directions(tmp_path: Path) -> None:
    path = str(written(tmp_path / "run.yaml", "model: a\nrate: 1\nfast: true\n"))
    assert from_flags("--config", path) == Sample(model="a", rate=1.0, fast=True)
    assert from_flags("--config", path, "b", "--rate", "2", "--no_fast") == Sample(model="b", rate=2.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["m", "--stesp", "3"], "there is no option --stesp (did you mean '--steps'?)"),
        (["m", "--step", "3"], "there is no option --step (did you mean '--steps'?)"),
        (["m", "--steps", "many"], "--steps takes a whole number, found 'many' (text)"),
        (["m", "--steps"], "--steps: expected one argument"),
        (["m", "n"], "'n' is one argument too many"),
        ([], "MODEL is missing; `ropemods sample --help` shows an example"),
        (["--tags", "a", "m"], "(--tags takes every word up to the next flag, so put MODEL before it)"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(words: list[str], says: str) -> None:
    with pytest.raises(ValueError) as error:
        from_flags(*words)
    assert says in str(error.value)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1).filter(
    lambda text: not text.startswith("-")
)
samples = st.fixed_dictionaries(
    {"model": texts},
    optional={
        "rate": st.floats(allow_nan=False, allow_infinity=False),
        "steps": st.integers(-(10**6), 10**6),
        "shape": st.sampled_from(["cosine", "linear"]),
        "early": st.tuples(st.integers(0, 99), st.integers(0, 99)),
        "tags": st.lists(texts, min_size=1, max_size=3).map(tuple),
        "note": texts,
        "fast": st.booleans(),
    },
)


@given(samples)
def test_the_same_values_as_flags_and_as_yaml_give_the_same_options(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    # As JSON, which is YAML: PyYAML's own dump leaves texts such as 0e0 bare, which YAML 1.2 reads as numbers.
    path = written(tmp_path_factory.mktemp("options") / "run.yaml", json.dumps(plain, ensure_ascii=False))
    words = [values["model"]]
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif name != "model":
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    assert from_flags(*words) == from_flags("--config", str(path)) == Sample(**values)


def test_yaml_takes_a_list_of_numbers_as_a_flag_does(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for written in ("8,64", "8 64", "[8, 64]"):
        file.write_text(f"early: {written}\n")
        assert from_yaml(Sample, file) == {"early": (8, 64)}
    file.write_text("tags: a,b\n")  # a text may hold a comma
    with pytest.raises(ValueError, match="tags takes a list of texts, found 'a,b'"):
        from_yaml(Sample, file)
