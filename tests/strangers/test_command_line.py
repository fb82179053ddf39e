"""Every option of every command with every kind of value: done, or one line that says what to do.

Commands and their options are read off the command line itself, so that a new one is tried without a line here. What is
refused leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import AutoModelForCausalLM

import ropemods as rm
from ropemods.cli import COMMANDS, load, main
from ropemods.mods import MODS
from ropemods.settings.options import declared, fields, spelt
from tests import zoo
from tests.cli.program import save_tiny, save_tokenizer
from tests.strangers.uses import ARCHITECTURES, REMEDY

SMALLEST = "--sequences 8 --length 16 --window 4 --replicates 100 --skip_mask"
LINES = {
    "apply": "apply {model} {out} --mods {mod}",
    "show": "show {modified}",
    "measure": f"measure {{model}} --text {{text}} {SMALLEST}",
    "compare": "compare {report} {report}",
    "suggest": "suggest {model} --text {text} --length 64 --sequences 8 --crop 16",
    "train": "train {recipe} --print_only",
    "export": "export {exportable} {out}",
}
"""A plain use of each command; `bench` times for long and has none."""

SLOW = {"interventions", "controls", "reference"}


def values(field: dataclasses.Field, hint: Any) -> list[str]:
    """What a stranger may write behind a flag, right and wrong, from its type."""
    parts = {hint, *typing.get_args(hint)}
    found = [""]
    if int in parts:
        found += ["0", "1", "-1", "8", "1000000000000", "1.5", "x", "null"]
    if float in parts:
        found += ["0", "0.5", "1", "-1", "nan", "inf", "x"]
    if str in parts:
        found += ["none", "{folder}", "no/such", "{model}/config.json", "a b"]
    for part in parts:
        if typing.get_origin(part) is Literal:
            found += [*map(str, typing.get_args(part)), "x"]
        if typing.get_origin(part) is tuple:
            found += ["8 64", "8,64", "[8, 64]", "8", "x", "zero"]
    return list(dict.fromkeys(found))


def cases() -> list[tuple[str, str, str]]:
    found = []
    for name in COMMANDS:
        if name not in LINES:
            continue
        options, hints = load(name).options, typing.get_type_hints(load(name).options)
        for option, field in fields(options).items():
            if declared(field).positional or option in SLOW:
                continue
            if hints[option] is bool:
                option = spelt(option)
                found += [(name, option, None), (name, f"no_{option}", None), (name, option, "x")]
            else:
                found += [(name, option, value) for value in values(field, hints[option])]
        found += [
            (name, "config", value) for value in ("no.yaml", "{folder}", "{model}/config.json", "{latin}", "{deep}")
        ]
        found += [(name, "no_such_option", "1"), (name, "help", None), (name, "debug", None)]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, modified ones, a text, a report and files that are none of it."""
    folder = tmp_path_factory.mktemp("stranger")
    save_tokenizer(save_tiny(folder / "model"))
    draw = random.Random(0)
    words = (" ".join(f"w{draw.randrange(4, zoo.VOCAB)}" for _ in range(80)) for _ in range(10))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    for name, mod in (("modified", rm.LearnedSink(init=0.0)), ("exportable", rm.TruncatedRoPE(0.5))):
        rm.apply(AutoModelForCausalLM.from_pretrained(folder / "model"), mod).save_pretrained(folder / name)
    (folder / "recipe.yaml").write_text("model_name_or_path: model\n")
    (folder / "latin.yaml").write_bytes(b"seed: \xe9\n")
    (folder / "deep.yaml").write_text(f"seed: {'[' * 3000}\n")
    (folder / "folder").mkdir()
    assert main(filled(f"measure {{model}} --text {{text}} {SMALLEST} --output {{report}}", folder)) == 0
    return folder


PLACES = {
    "model": "model",
    "modified": "modified",
    "exportable": "exportable",
    "folder": "folder",
    "out": "out",
    "text": "text.jsonl",
    "report": "report.json",
    "recipe": "recipe.yaml",
    "latin": "latin.yaml",
    "deep": "deep.yaml",
}


def filled(line: str, folder: Path, *, mod: str = "truncated_rope") -> list[str]:
    """The words of a line, with the places in it."""
    known = {name: str(folder / where) for name, where in PLACES.items()}
    return [word.format_map(known | {"mod": mod}) for word in line.split()]


@pytest.mark.parametrize(("name", "option", "value"), cases())
def test_every_option_with_every_kind_of_value(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
    name: str,
    option: str,
    value: str | None,
) -> None:
    monkeypatch.chdir(place)
    before = set(place.rglob("*"))
    words = [*filled(LINES[name], place), f"--{option}"]
    if value is not None:
        words += filled(value, place) or [""]
    try:
        code = main(words)
    except Exception as error:  # what is no mistake of the user's is a crash
        pytest.fail(f"crash: {type(error).__name__}: {error!s:.200}", pytrace=False)
    finally:
        new = set(place.rglob("*")) - before
        for path in sorted(new):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    said = capsys.readouterr()
    if code == 0:
        record_property("stranger", "held")
        return
    assert code == 2, f"exit code {code}"
    lines = [line for line in said.err.splitlines() if line.startswith("ropemods")]
    assert len(lines) == 1 and re.match(rf"ropemods {name}: error: .{{12}}", lines[0]), said.err[-300:]
    if not REMEDY.search(lines[0]):
        pytest.fail(f"no remedy: {lines[0]:.300}", pytrace=False)
    assert not new, f"refused, and left {new}"
    record_property("stranger", "refused")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mod", [kind.kind for kind in MODS])
@pytest.mark.parametrize("then", ["show", "measure", "suggest", "export", "apply"])
def test_what_apply_writes_goes_through_every_other_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
    architecture: str,
    mod: str,
    then: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(save_tiny(tmp_path / "model", architecture))
    draw = random.Random(0)
    words = (" ".join(f"w{draw.randrange(4, zoo.VOCAB)}" for _ in range(80)) for _ in range(10))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    if main(["apply", "model", "modified", "--mods", mod]) != 0:  # no fused kernel trains it
        assert "attn_implementation='eager'" in capsys.readouterr().err
        assert main(["apply", "model", "modified", "--mods", mod, "--attn_implementation", "eager"]) == 0
    line = LINES[then].replace("{model}", "{modified}").replace("{exportable}", "{modified}")
    code = main(filled(line, tmp_path, mod=mod))
    said = capsys.readouterr().err
    assert code == 0 or (code == 2 and REMEDY.search(said)), said[-300:]
    record_property("stranger", "held" if code == 0 else "refused")
