"""Recipes: every key is checked, a flag wins, and what cannot work is an error before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from ropemods.settings.options import fields
from ropemods.training import models
from ropemods.training.recipe import Options
from ropemods.training.recipe_file import flags, from_command_line, from_values, help_text
from tests.recipes import tiny

M, T, OUT = Path("model"), Path("text.jsonl"), Path("out")


def read(tmp_path: Path, words: list[str], **changes: Any):
    path = tiny.write_recipe(tmp_path / "recipe.yaml", M, T, OUT, **changes)
    return from_command_line(["--config", str(path), *words])


def test_yaml_and_flags_give_one_recipe_and_the_flag_wins(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "--learning_rate 1e-4 --schedule.steps 2 --arms control modified --seeds=3 --warmup-steps 5 "
        "--resume_from_checkpoint --mods unrotated_bos --protocol.sequences 64".split(),
    )
    assert recipe.training["learning_rate"] == 1e-4 and recipe.training["warmup_steps"] == 5
    assert recipe.schedule == ({"steps": 2},) and recipe.options.arms == ("control", "modified")
    assert recipe.options.seeds == 3 and recipe.options.resume_from_checkpoint
    assert [mod.kind for mod in recipe.mods] == ["unrotated_bos"]
    assert recipe.protocol is not None and recipe.protocol.sequences == 64
    assert recipe.options.max_steps == 8  # as the file says


def test_a_recipe_survives_its_own_json(tmp_path: Path) -> None:
    recipe = read(tmp_path, ["--lora", "{r: 4}"], protocol={"sequences": 64, "early": [8, 32]}, save_total_limit=2)
    assert from_values({k: v for k, v in recipe.to_json().items() if v is not None}, source="again") == recipe


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lerning_rate", "1"], "did you mean learning_rate"),
        (["--learning_rate", "fast"], "takes a number"),
        (["--max_steps", "1.5"], "whole number"),
        (["--seed", "1"], "seeds says how many"),
        (["--group_by_length", "true"], "there is no key"),
        (["--schedule.shap", "linear"], "did you mean 'shape'"),
        (["--schedule.steps", "9"], "after the last of max_steps=8"),
        (["--schedule.kind", "replaced_bos"], "not among the mods"),
        (["--schedule.kind", "learned_sink"], "truncated_rope is moved by 0"),
        (["--schedule", "[{steps: 2}, {steps: 3, kind: learned_sink}]"], "learned_sink is moved by 2"),
        (["--penalty", "{wieght: 3.0}"], "did you mean 'weight'"),
        (["--penalty", "{warmup_steps: 3}"], "weight is needed"),
        (["--penalty.weight", "3.0"], "needs sequences of 128 tokens, and length is 64"),
        (["--penalty", "{weight: 3.0, early: [8, 16]}", "--mods", "[]"], "arms untrained need modifications"),
        (["--lora.rank", "4"], "LoraConfig has no rank"),
        (["--protocol.sequence", "64"], "a protocol has no sequence"),
        (["--protocol.sequences", "37"], "dealt evenly"),
        (["--protocol.early", "8"], "early takes a list of 2 whole numbers, found 8"),
        (["--mods", "rotated_bos"], "did you mean 'unrotated_bos'"),
        (["--mods", "truncated_rope:keep=1"], "below 1"),
        (["--mods", "[]"], "need modifications"),
        (["--arms", "modifed"], "some of base, untrained"),
        (["--text", "stationary", "--arms", "control", "stationary"], "the control itself"),
        (["--text", "normal"], "natural or stationary"),
        (["--probe_steps", "2"], "needs a probe"),
        (["--seeds", "0"], "at least 1"),
        (["--max_steps=8", "recipe.yaml"], "expected a flag"),
        (["--config", "a.yaml", "b.yaml"], "--config takes one file"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path, words)


def test_how_long_to_train_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps, or num_train_epochs"):
        read(tmp_path, [], max_steps=None)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("output_dir: a\noutput_dir: b\n")
    with pytest.raises(ValueError, match="second time"):
        from_command_line(["--config", str(path)])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_the_global_batch_decides_the_accumulation(each: int, accumulate: int, ranks: int) -> None:
    wanted = each * accumulate * ranks
    recipe = tiny.recipe(M, T, OUT, per_device_train_batch_size=each, global_batch_size=wanted)
    assert recipe.batch(ranks) == (each, accumulate)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 200))
def test_a_batch_that_ranks_do_not_divide_is_an_error(each: int, ranks: int, wanted: int) -> None:
    recipe = tiny.recipe(M, T, OUT, per_device_train_batch_size=each, global_batch_size=wanted)
    if wanted % (each * ranks):
        with pytest.raises(ValueError, match=f"{each} × {ranks} does not divide it"):
            recipe.batch(ranks)
    else:
        assert each * ranks * recipe.batch(ranks)[1] == wanted


def test_an_accumulation_that_contradicts_the_global_batch_is_an_error() -> None:
    recipe = tiny.recipe(M, T, OUT, global_batch_size=32, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="takes gradient_accumulation_steps=2"):
        recipe.batch(2)


def test_flags_of_launchers_are_left_alone() -> None:
    assert flags(["--local_rank=3", "--length", "64"]) == {"length": 64}


def test_mods_that_cannot_stand_on_the_model_fail_on_its_config_alone(tmp_path: Path) -> None:
    config = tiny.llama()
    for mods, said in (
        ([{"kind": "learned_sink", "layers": [7]}], "layers .7. do not exist"),
        ([{"kind": "unrotated_bos"}, {"kind": "learned_sink"}], "would do nothing"),
    ):
        with pytest.raises(ValueError, match=said):
            models.check_mods(tiny.recipe(M, T, OUT, mods=mods), config)
    models.check_mods(tiny.recipe(M, T, OUT), config)
    # Nothing was asked of the folder of weights, which does not exist.
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers .7. do not exist"):
        models.find(tiny.recipe(tmp_path, T, OUT, mods=[{"kind": "learned_sink", "layers": [7]}]))


def test_a_model_already_modified_is_no_base(tmp_path: Path, model: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    config.ropemods = {"version": 1, "mods": [], "strength": {}, "rope_parameters": {}}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already modified"):
        models.find(tiny.recipe(tmp_path, T, OUT))


def test_the_help_names_every_key_with_its_default() -> None:
    said = help_text()
    assert "held_out: the share of the documents that never trains, chosen by a hash of their text (0.05)" in said
    assert "model_name_or_path: the base model: a folder, or a name on the hub (needed)" in said
    assert all(f"  {name}: " in said for name in fields(Options))


def test_recipes_are_plain_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError):
        from_command_line(["--config", str(path)])
    assert yaml.safe_load(tiny.write_recipe(path, M, T, OUT).read_text())["mods"][0]["kind"] == "truncated_rope"


def test_lists_of_a_recipe_stand_apart_or_with_commas(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, text, tmp_path / "out")
    for arms in (["base", "control"], ["base,control"]):
        assert from_command_line(["--config", str(recipe), "--arms", *arms]).options.arms == ("base", "control")

    for key, wanted in (
        ("protocol.early", [8, 16]),
        ("lora.target_modules", ["q_proj", "v_proj"]),
    ):
        words = [str(each) for each in wanted]
        assert flags([f"--{key}", *words]) == flags([f"--{key}", ",".join(words)]) == {key: wanted}
    assert flags(["--mods", "truncated_rope:keep=0.5,which=lowest"])["mods"] == "truncated_rope:keep=0.5,which=lowest"
