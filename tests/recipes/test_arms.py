"""A whole session on one rank: four arms, what they share, what they leave, and how it reloads."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from ropemods.training import measuring, session
from ropemods.training.__main__ import main
from ropemods.training.arms import ArmResult, read_result, run_arm
from ropemods.training.batches import Rows
from ropemods.training.guard import Diverged
from ropemods.training.recipe_file import from_values
from ropemods.training.table import duration, table
from tests.recipes import tiny

PROTOCOL = {"sequences": 32, "length": 48, "groups": 8, "early": [8, 16], "grid_rows": 16, "replicates": 100}


@pytest.fixture(scope="module")
def output(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a session with five arms and two seeds leaves."""
    folder = tmp_path_factory.mktemp("arms")
    recipe = tiny.write_recipe(
        folder / "recipe.yaml",
        model,
        text,
        folder / "out",
        arms=["base", "untrained", "control", "modified", "stationary"],
        seeds=2,
        protocol=PROTOCOL,
        probe={**PROTOCOL, "mask_term": False},
        probe_steps=4,
    )
    main(["--config", str(recipe)])
    return folder / "out"


def results(output: Path) -> dict[str, ArmResult]:
    return {path.parent.name: read_result(path) for path in output.glob("*/result.json")}


def test_every_arm_is_measured_on_the_same_text(output: Path) -> None:
    found = results(output)
    trained = [f"{arm}-{seed}" for arm in ("control", "modified", "stationary") for seed in (0, 1)]
    assert sorted(found) == sorted(["base", "untrained", *trained])
    assert len({result.held_out_tokens for result in found.values()}) == 1
    reports = [result.read_report(output) for result in found.values()]
    assert len({(report.protocol_hash, report.text.digest) for report in reports if report is not None}) == 1


def test_control_and_modified_read_the_same_rows_and_begin_alike(output: Path) -> None:
    found = results(output)
    for seed in (0, 1):
        control, modified = found[f"control-{seed}"], found[f"modified-{seed}"]
        assert control.tokens == modified.tokens
        # Strength is 0 in the first step, so the first loss is that of the stock model on the same batch, bitwise.
        assert control.curve[0] == modified.curve[0] and control.curve[-1] != modified.curve[-1]
    assert found["control-0"].curve != found["control-1"].curve  # another order
    assert found["stationary-0"].curve[0] != found["control-0"].curve[0]  # another text


def test_each_trained_model_is_what_was_in_memory_and_loads_as_its_card_says(output: Path) -> None:
    for name, result in results(output).items():
        if result.seed is None:
            assert result.model is None
            continue
        assert result.reload_difference == 0.0
        folder = output / str(result.model)
        card = (folder / "README.md").read_text()
        lines = card.split("```python\n")[1].split("```")[0]
        made: dict[str, Any] = {}
        exec(lines, made)
        assert AutoTokenizer.from_pretrained(folder).bos_token_id == 0
        modified = getattr(made["model"].config, "ropemods", None)
        if name.startswith("modified"):
            assert modified["strength"] == {"truncated_rope": 1.0, "learned_sink": 1.0}
            with pytest.raises(ValueError, match="ropemods"):
                AutoModelForCausalLM.from_pretrained(folder)
        else:
            assert modified is None
        for words in (
            "Fine-tuned from",
            "natural text" if "stationary" not in name else "stationary text",
            "Versions:",
        ):
            assert words in card
        assert not list(folder.glob("*.bin"))
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data
        assert data.library_name == "transformers" and data.tags == ["ropemods"]
        assert data.pipeline_tag == "text-generation" and data.base_model is None  # a folder has no page to link to
        assert "| modified, mean of 2 seeds |" in card
        shown = re.findall(r"!\[.+\]\((.+)\)", card)
        assert shown == ["leakage.svg"] and ET.parse(folder / shown[0]).getroot().tag.endswith("svg")


def test_the_probe_stands_beside_the_loss(output: Path) -> None:
    result = results(output)["modified-0"]
    assert [point[0] for point in result.probes] == [0, 4, 8]
    assert all(low <= high for _, _, low, high in result.probes)


def test_probing_changes_nothing_of_the_training(output: Path, model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, text, tmp_path / "out", arms=["modified"])
    main(["--config", str(recipe)])
    assert read_result(tmp_path / "out" / "modified-0" / "result.json").curve == results(output)["modified-0"].curve


def test_the_record_says_all_that_it_takes_to_do_it_again(output: Path) -> None:
    record = json.loads((output / "results.json").read_text())
    assert record["seeds"] == [0, 1] and record["steps"] == 8 and record["global_batch_size"] == 8
    assert set(record["versions"]) >= {"ropemods", "torch", "transformers", "peft", "accelerate", "deepspeed"}
    assert record["protocol_hash"] == results(output)["base"].read_report(output).protocol_hash  # type: ignore[union-attr]
    assert record["data"]["natural"]["digest"] != record["data"]["stationary"]["digest"]
    assert record["command"] == " ".join(sys.orig_argv)
    values = {k: v for k, v in record["recipe"].items() if v is not None}
    assert from_values(values, source="record").to_json() == record["recipe"]
    shown = (output / "table.md").read_text()
    for name in results(output):
        assert f"| {name} |" in shown
    assert "| modified, mean of 2 seeds |" in shown
    for seed in (0, 1):
        assert "control to modified" in (output / f"comparison-{seed}.md").read_text()
        assert (output / f"comparison-{seed}.html").read_text().startswith("<!")


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear", "modules_to_save": ["norm"]}])
def test_a_modified_model_reloads_to_the_logits_in_memory(
    model: Path, text: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    mods = ["truncated_rope:keep=0.5", "adaptive_temperature:trainable=layer", "unrotated_bos"]
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml", model, text, tmp_path / "out", arms=["modified"], mods=mods, lora=lora
    )
    main(["--config", str(recipe)])
    result = read_result(tmp_path / "out" / "modified-0" / "result.json")
    assert result.reload_difference == 0.0
    back = rm.from_pretrained(tmp_path / "out" / "modified-0" / "model")
    moved = [p for name, p in back.named_parameters() if "adaptive_temperature" in name and "original" not in name]
    assert moved and all(p.abs().max() > 0 for p in moved)


def test_an_adapter_resumes_to_the_same_weights_bitwise(model: Path, text: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "arms": ["modified"], "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2,
        "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2},
    }  # fmt: skip
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, text, tmp_path / "out", **changes)
    main(["--config", str(recipe)])
    arm = tmp_path / "out" / "modified-0"
    first = load_file(arm / "model" / "adapter_model.safetensors")
    shutil.rmtree(arm / "model")
    shutil.rmtree(arm / "checkpoint-8")
    (arm / "result.json").unlink()
    main(["--config", str(recipe), "--resume_from_checkpoint"])
    again = load_file(arm / "model" / "adapter_model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_that_diverges_stops_with_what_to_try(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        model, text, tmp_path, arms=["control"], learning_rate=30.0, guard_patience=2, max_steps=20, save_steps=1,
        save_strategy="steps", save_total_limit=3,
    )  # fmt: skip
    this = session.begin(recipe, command="test")
    with pytest.raises(Diverged, match=r"control, seed 0: The loss .* is kept\. Try a lower learning_rate"):
        run_arm(this, *next(this.plan()))
    assert not (tmp_path / "control-0" / "model").exists() and not (tmp_path / "control-0" / "result.json").exists()


def test_an_earlier_run_is_not_written_over(output: Path, model: Path, text: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    recipe = tiny.recipe(model, text, output, arms=["control"])
    this = session.begin(recipe, command="test")
    with pytest.raises(ValueError, match="holds an earlier run"):
        run_arm(this, *next(this.plan()))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_text_too_short_for_the_schedule_says_so(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(model, text, tmp_path, max_steps=None, num_train_epochs=1, schedule={"steps": 100_000})
    with pytest.raises(ValueError, match="ends at step 100000, and the text lasts for"):
        session.begin(recipe, command="test")


def test_epochs_read_every_row_that_often(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(model, text, tmp_path, max_steps=None, num_train_epochs=3)
    this = session.begin(recipe, command="test")
    assert this.steps == len(this.data["natural"].rows) * 3 // 8


def test_the_held_out_loss_is_the_mean_over_tokens(model: Path, text: Path, tmp_path: Path) -> None:
    this = session.begin(tiny.recipe(model, text, tmp_path), command="test")
    data, net = this.data["natural"], AutoModelForCausalLM.from_pretrained(model).eval()
    loss, tokens = measuring.held_out_loss(net, data, device=torch.device("cpu"), batch_size=3)
    total, count = 0.0, 0
    for ids, positions in zip(data.held_out_rows.tokens_NT, data.held_out_rows.positions_NT, strict=True):
        for piece in np.split(ids, np.flatnonzero(positions == 0))[1:]:  # each sequence on its own
            if len(piece) > 1:
                piece_T = torch.from_numpy(piece.astype("int64"))
                with torch.no_grad():
                    logits_TV = net(piece_T[None]).logits[0, :-1].double()
                total += float(torch.nn.functional.cross_entropy(logits_TV, piece_T[1:], reduction="sum"))
                count += len(piece) - 1
    assert tokens == count and loss == pytest.approx(total / count, abs=1e-5)


def test_a_unigram_model_knows_frequencies_only() -> None:
    from types import SimpleNamespace

    def rows(tokens: list[int]) -> Rows:
        return Rows(np.array([[0, *tokens]], np.int32), np.arange(len(tokens) + 1, dtype=np.int32)[None])

    data: Any = SimpleNamespace(rows=rows([1, 1, 2]), held_out_rows=rows([1, 3]))
    # Counts with one more each: 0: 1, 1: 3, 2: 2, 3: 1, of 7.
    assert measuring.unigram_loss(data, vocabulary=4) == pytest.approx(-(np.log(3 / 7) + np.log(1 / 7)) / 2)


def test_a_table_without_a_protocol_has_no_leakage() -> None:
    result = ArmResult(
        arm="control", seed=0, identity={}, loss=1.0, perplexity=2.718, held_out_tokens=9, report=None, model="m",
        tokens=2_500_000, seconds=75, peak_bytes=2**30,
    )  # fmt: skip
    shown = table([result], {})
    assert "residual" not in shown and "| control-0 | 1.0000 | 2.72 | 2.5M | 1 min 15 s | 1.00 GiB |" in shown


@pytest.mark.parametrize(("seconds", "said"), [(3.21, "3.2 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")])
def test_durations_are_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said
