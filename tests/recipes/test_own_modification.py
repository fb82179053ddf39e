"""A modification from a file outside the package: applied, trained, saved, reloaded and measured like ours."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ropemods as rm
from recipes.interpolated_rope import InterpolatedRoPE
from ropemods import mods
from ropemods.cli import main
from ropemods.mods import outside
from ropemods.training.__main__ import main as finetune
from ropemods.training.recipe_file import from_values
from tests import zoo
from tests.cli.program import refused, run, save_tiny
from tests.recipes import tiny

PLACE = "recipes.interpolated_rope:InterpolatedRoPE"
EXAMPLE = Path(__file__).resolve().parents[2] / "recipes" / "interpolated_rope.py"


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which nothing has been registered."""
    monkeypatch.setattr(mods, "_registered", {})


def applied(folder: Path) -> Path:
    save_tiny(folder / "model")
    run(f"apply {folder / 'model'} {folder / 'out'} --mods {PLACE}:factor=4")
    return folder / "out"


def test_the_example_fits_a_screen() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_it_goes_through_a_recipe_and_is_measured(
    model: Path, text: Path, tmp_path: Path, unknown: None, capsys: pytest.CaptureFixture
) -> None:
    protocol = {"sequences": 32, "length": 48, "groups": 8, "early": [8, 16], "grid_rows": 16, "replicates": 100}
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml",
        model,
        text,
        tmp_path / "out",
        arms=["modified"],
        mods=[{"kind": PLACE, "factor": 4}],
        protocol=protocol,
    )
    finetune(["--config", str(recipe)])
    saved = tmp_path / "out" / "modified-0" / "model"
    loaded = rm.from_pretrained(saved)
    assert loaded.ropemods_attached.mods == [InterpolatedRoPE(factor=4)]
    assert loaded.ropemods_attached.strength == {"interpolated_rope": 1.0}
    report = json.loads((tmp_path / "out" / "modified-0" / "report.json").read_text())
    assert report["model"]["mods"] == [{"kind": "interpolated_rope", "class": PLACE, "layers": None, "factor": 4.0}]
    assert report["terms"]["mask"]["all"]["value"] > 0


def test_the_command_line_applies_it_and_reads_it_back(tmp_path: Path, unknown: None, monkeypatch, capsys) -> None:
    out = applied(tmp_path)
    wanted = rm.apply(zoo.build(), InterpolatedRoPE(factor=4))(zoo.tokens()).logits
    monkeypatch.setattr(mods, "_registered", {})
    assert f"It was saved by a program that had it from {PLACE}" in refused(f"show {out}", capsys)
    with pytest.raises(ValueError, match=r"`from recipes.interpolated_rope import InterpolatedRoPE` and ropemods.reg"):
        rm.from_pretrained(out)
    run(f"show {out} --register {PLACE}")
    assert "InterpolatedRoPE(factor=4.0)" in capsys.readouterr().out
    assert torch.equal(rm.from_pretrained(out)(zoo.tokens()).logits, wanted)


def test_a_package_that_offers_it_makes_it_known_by_its_kind(tmp_path: Path, unknown: None, monkeypatch, capsys):
    offered = [importlib.metadata.EntryPoint("interpolated_rope", PLACE, outside.GROUP)]
    monkeypatch.setattr(outside, "entry_points", lambda group: offered if group == outside.GROUP else [])
    save_tiny(tmp_path / "model")
    run(f"apply {tmp_path / 'model'} {tmp_path / 'out'} --mods interpolated_rope:factor=4")
    monkeypatch.setattr(mods, "_registered", {})
    assert rm.from_pretrained(tmp_path / "out").ropemods_attached.mods == [InterpolatedRoPE(factor=4)]
    assert main(["apply", "--help"]) == 0
    assert f"from the installed {PLACE}" in capsys.readouterr().out
    offered[0] = importlib.metadata.EntryPoint("stretched_rope", PLACE, outside.GROUP)
    with pytest.raises(ValueError, match=r"stretched_rope = .* names a modification of the kind 'interpolated_rope'"):
        mods.of_kind("stretched_rope")


def test_a_recipe_that_was_written_out_is_one_again(unknown: None) -> None:
    recipe = tiny.recipe(Path("model"), Path("text"), Path("out"), mods=[f"{PLACE}:factor=3"])
    written = {k: v for k, v in recipe.to_json().items() if v is not None}
    mods._registered.clear()
    assert from_values(written, source="again") == recipe


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "recipes.interpolated:InterpolatedRoPE",
            "no module 'recipes.interpolated', neither installed nor in",
        ),
        ("recipes.interpolated_rope:Interpolated", r"interpolated_rope.py\) has no Interpolated"),
        ("recipes.interpolated_rope:Tensor", "recipes.interpolated_rope:Tensor: register takes a class derived from"),
        (f"{PLACE}:factor=1", "factor must be above 1"),
        (f"{PLACE}:factors=2", r"has no option 'factors' \(did you mean 'factor'"),
        (f"{PLACE}:factor", "'factor' is not option=value"),
        ("recipes.interpolated_rope:interpolatedRoPE", r"is not option=value; write .*my_module:MyMod:option=value"),
    ],
)
def test_a_word_that_names_none_says_what_is_wrong(word: str, said: str) -> None:
    with pytest.raises((ValueError, ImportError), match=said):
        tiny.recipe(Path("model"), Path("text"), Path("out"), mods=[word])


@pytest.mark.slow
def test_a_program_of_its_own_finds_it_in_its_working_folder(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "mine.py").write_text(EXAMPLE.read_text())
    begin = "import sys; sys.path.remove(''); from ropemods.cli import main; sys.exit(main(sys.argv[1:]))"
    words = "apply model out --mods mine:InterpolatedRoPE".split()
    subprocess.run([sys.executable, "-c", begin, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())["ropemods"]["mods"]
    assert [mod["class"] for mod in recorded] == ["mine:InterpolatedRoPE"]
