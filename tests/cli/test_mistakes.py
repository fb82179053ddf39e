"""A mistake is answered in one line that says what to do, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ropemods.cli import main
from tests.cli.program import refused


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no command was given; commands: apply, "),
        ("aply", "there is no command 'aply' (did you mean 'apply'?)"),
        ("apply model", "OUTPUT, --mods are missing"),
        (
            "apply --mods truncated_rope model out",
            "--mods takes every word up to the next flag, so put MODEL before it",
        ),
        ("apply model out --mod learned_sink", "there is no option --mod (did you mean '--mods'?)"),
        ("apply model out --mods truncted_rope", "'truncted_rope' (did you mean 'truncated_rope'?)"),
        ("apply model out --mods TruncatedRoPE", "(did you mean 'truncated_rope'?)"),
        ("apply model out --mods truncated_rope:kep=0.5", "truncated_rope has no option 'kep' (did you mean 'keep'?)"),
        ("apply model out --mods truncated_rope:keep", "'keep' is not option=value; write for example"),
        ("apply model out --mods truncated_rope:keep=1,keep=0", "keep stands there twice"),
        ("apply model out --mods truncated_rope:keep=half", "truncated_rope: keep takes a number, found 'half' (text)"),
        ("apply model out --mods truncated_rope:keep=2", "keep must be at least 0 (NoPE) and below 1"),
        ("apply model out --mods learned_sink:read_bos=no", "read_bos takes true or false, found 'no'"),
        ("apply model out --mods 'truncated_rope:layers=[0,5]'", "layers [5] do not exist; this model has 2"),
        ("apply model out --mods learned_sink unrotated_bos", "LearnedSink closes it"),
        ("apply model out --mods learned_sink --strength 2", "--strength is from 0 (the stock model) to 1"),
        ("apply model out --mods learned_sink --dtype half", "--dtype takes auto, float32, bfloat16 or float16"),
        ("apply model out --mods learned_sink --attn_implementation flex_attention", "run on eager and sdpa"),
        ("apply model out --mods truncated_rope --calibration_text x", "would be used by none of these modifications"),
        ("apply model out --mods learned_sink --calibration_text x", "x: there is no such file"),
        ("apply model out --config run.yaml", "run.yaml: there is no such file"),
        ("apply ./modle out --mods learned_sink", "./modle: there is no such folder"),
        ("apply some/name out --mods learned_sink", "some/name: there is no such folder here, and the hub cannot"),
        ("apply model/config.json out --mods learned_sink", "is a file; give the folder of the checkpoint"),
        ("apply empty out --mods learned_sink", "is not a checkpoint: it holds neither config.json nor"),
        ("apply model model --mods learned_sink", "holds what is read"),
        ("apply model . --mods learned_sink --overwrite", "holds what is read"),
        ("export model out", "model records no modification"),
        ("help mesure", "there is no command 'mesure' (did you mean 'measure'?)"),
        ("--help aply", "there is no command 'aply' (did you mean 'apply'?)"),
        ("apply '' out --mods truncated_rope", "MODEL is empty; give a value"),
        ("bench --lengths ''", "--lengths is empty; give a value"),
        ("apply model out --mods truncated_rope --overwrite=yes", "--overwrite: is on or off and takes no 'yes'"),
        ("show model --jsn", "(did you mean '--json'?)"),
    ],
)
def test_a_mistake_is_answered_in_one_line_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    (here / "empty").mkdir()
    message = refused(line, capsys)
    assert re.match(r"ropemods( apply| show| export| bench)?: error: ", message)
    assert says in message
    assert sorted(entry.name for entry in here.iterdir()) == ["empty", "model"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("strenght: 1\n", "run.yaml: there is no option 'strenght' (did you mean 'strength'?)"),
        ("strength: full\n", "run.yaml: strength takes a number, found 'full' (text)"),
        ("strength: 1\nstrength: 0\n", "run.yaml, line 2: the key 'strength' stands here a second time"),
        ("mods: learned_sink\n", "run.yaml: mods takes a list, found 'learned_sink' (text)"),
        ("mods: [{learned_sink: {init: 1}}]\n", "a mapping with a kind"),
        ("mods: [{kind: learned_sink, int: 1}]\n", "learned_sink has no option 'int' (did you mean 'init'?)"),
        ("mods: [{kind: truncated_rope, keep: x}]\n", "truncated_rope: keep takes a number, found 'x' (text)"),
    ],
)
def test_a_mistake_in_yaml_is_answered_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (here / "run.yaml").write_text(text)
    assert says in refused("apply model out --config run.yaml", capsys)


def test_debug_shows_where_an_error_was_raised(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "model", "out", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("ropemods export: error: ")


def test_a_bug_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr("ropemods.cli.description.describe", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["show", "model"])
