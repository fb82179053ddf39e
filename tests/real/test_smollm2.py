"""What toys do not show: a trained model of thirty layers whose heads park on position 0."""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import ropemods as rm
from ropemods.leakage.documents import read_documents
from ropemods.model import unchanged
from ropemods.model.attention_layers import entrances
from ropemods.settings.strict_yaml import read
from ropemods.training import smollm2
from ropemods.training.__main__ import main
from ropemods.training.arms import ArmResult, read_result
from tests.real.conftest import CACHE
from tests.recipes import launched
from tests.recipes.test_pretrain import script
from tests.recipes.test_resume import kill_at

pytestmark = pytest.mark.slow

RECIPES = launched.ROOT / "recipes"
SHORT = rm.Protocol(sequences=64, length=192, groups=8, mask_term=False)


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rows(folder: Path, text: Path, count: int, length: int) -> Tensor:
    """Token ids (B, T) of the text, BOS first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n".join(read_documents(str(text)).texts[:3]))["input_ids"][: count * (length - 1)]
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), torch.tensor(ids).view(count, -1)], 1)


def small(model: Path, text: Path, output: Path, path: str, **changes: Any) -> Path:
    """A shipped recipe as it is written, but for sizes, steps and where things are."""
    sizes = {
        "model_name_or_path": str(model), "data": str(text), "output_dir": str(output), "arms": ["modified"],
        "length": 16, "held_out": 0.2, "held_out_rows": 8, "global_batch_size": 2, "per_device_train_batch_size": 1,
        "calibration_rows": 2, "warmup_steps": 2, "protocol": None, "probe": None, "probe_steps": 0,
        "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    output.mkdir(parents=True)
    recipe = output.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(read(RECIPES / path) | sizes | changes))
    return recipe


def result(output: Path) -> ArmResult:
    return read_result(output / "modified-0" / "result.json")


def test_a_real_sink_and_real_leakage_are_measured(smollm: Path, prose: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    report = rm.measure(loaded(smollm), tokenizer, read_documents(str(prose)).texts, SHORT)
    assert report.sink is not None and report.held_out_loss is not None
    mass = [fmean(heads) for heads in report.sink.heads_bos_mass]
    assert fmean(mass) > 0.15 and max(mass) > 0.4
    residual = report.terms["residual"]
    assert residual.early.low > 0
    assert residual.layers[0].early.low < 1e-3 < max(layer.early.value for layer in residual.layers)
    assert 0.5 < report.held_out_loss.value < 5


def test_a_mod_is_saved_and_reloaded_to_the_same_logits(smollm: Path, prose: Path, tmp_path: Path) -> None:
    ids = rows(smollm, prose, 2, 48)
    model = rm.apply(loaded(smollm), rm.TruncatedRoPE(0.5), rm.LearnedSink(layers=range(10)), calibration=ids)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(rm.from_pretrained(tmp_path / "model").eval()(ids).logits, model.eval()(ids).logits)


def test_the_gguf_and_what_was_made_of_it_are_one_model(smollm: Path, prose: Path) -> None:
    if not (smollm2.installed() or (CACHE / smollm2.FILE).is_file()):
        pytest.skip("the GGUF file of SmolLM2-135M is not here: python -m ropemods.training.smollm2 fetches it")
    file = smollm2.gguf_file(CACHE)
    ids = rows(smollm, prose, 1, 32)
    with torch.no_grad():
        logits = rm.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)(ids).logits
        assert torch.equal(logits, loaded(smollm)(ids).logits)


def test_a_bos_of_zero_trains(smollm: Path, prose: Path) -> None:
    model = rm.apply(loaded(smollm), rm.ReplacedBos(by="zero")).train()
    ids = rows(smollm, prose, 1, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        lost = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not lost
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1


def test_a_shipped_recipe_trains_as_it_is_written(smollm: Path, prose: Path, tmp_path: Path) -> None:
    steps = 2  # of which one at full strength; a processor that has to imitate bfloat16 takes many seconds for each
    changes = {"max_steps": steps, "schedule": {"steps": 1}, "warmup_steps": 1, "logging_steps": 1}
    recipe = small(smollm, prose, tmp_path / "out", "llama-3.2-1b/full.yaml", **changes)
    assert read(recipe)["bf16"] is True and read(recipe)["activation_checkpointing"] is True
    main(["--config", str(recipe)])
    found = result(tmp_path / "out")
    assert found.steps == steps and found.reload_difference is not None
    losses = [loss for _, loss in found.curve]
    assert all(map(torch.isfinite, torch.tensor(losses))) and max(losses) < 8
    record = json.loads((tmp_path / "out" / "modified-0" / "model" / "config.json").read_text())["ropemods"]
    assert set(record["strength"].values()) == {1.0}


def test_asking_whether_the_model_was_changed_costs_next_to_nothing(smollm: Path, prose: Path) -> None:
    ids = rows(smollm, prose, 1, 256)
    model = rm.apply(loaded(smollm), rm.TruncatedRoPE(0.75), rm.ReplacedBos(), rm.UnrotatedBos()).eval()

    def quickest(call: Callable[[], object], times: int) -> float:
        return min(timeit.repeat(call, number=1, repeat=times))

    with torch.no_grad():
        forward = quickest(lambda: model(ids), 4)
    asked = quickest(lambda: unchanged.check(model), 200) * len(list(entrances(model)))
    print(f"{1e6 * asked:.0f} µs of a forward pass of {1e3 * forward:.0f} ms: {asked / forward:.4%}")
    assert asked < 0.01 * forward


def test_three_modifications_in_half_precision_go_on_after_a_kill(smollm: Path, prose: Path, tmp_path: Path) -> None:
    steps, saved, killed = (20, 5, 8) if script("demo").half_is_quicker() else (4, 2, 3)
    mods = [*read(RECIPES / "llama-3.2-1b/full.yaml")["mods"], {"kind": "adaptive_temperature"}]
    changes = {
        "mods": mods, "max_steps": steps, "schedule": {"steps": saved}, "save_strategy": "steps", "save_steps": saved,
        "save_total_limit": 1, "logging_steps": 1,
    }  # fmt: skip
    recipe = small(smollm, prose, tmp_path / "out", "llama-3.2-1b/full.yaml", **changes)
    words = [launched.sys.executable, launched.FINETUNE[1], "--config", str(recipe)]
    assert f"  step {killed}/{steps}" in kill_at(words, killed)
    said = launched.run([*words, "--resume_from_checkpoint"])
    assert f"  step {saved + 1}/{steps}" in said and f"  step {saved}/{steps}" not in said
    found = result(tmp_path / "out")
    assert found.steps == steps and found.reload_difference == 0
    record = json.loads((tmp_path / "out" / "modified-0" / "model" / "config.json").read_text())["ropemods"]
    assert record["strength"] == {"truncated_rope": 1.0, "learned_sink": 1.0, "adaptive_temperature": 1.0}


def test_two_ranks_train_a_shipped_recipe_as_one_does(smollm: Path, prose: Path, tmp_path: Path) -> None:
    short = {"max_steps": 2, "schedule": {"steps": 1}, "logging_steps": 1, "warmup_steps": 1}
    found = {}
    for ranks, start in ((1, [launched.sys.executable]), (2, launched.torchrun(2))):
        recipe = small(smollm, prose, tmp_path / str(ranks), "llama-3.2-1b/lora.yaml", world_size=ranks, **short)
        launched.run([*start, launched.FINETUNE[1], "--config", str(recipe)])
        found[ranks] = result(tmp_path / str(ranks))
    assert found[2].loss == pytest.approx(found[1].loss, rel=2e-3)
    assert [loss for _, loss in found[2].curve] == pytest.approx([loss for _, loss in found[1].curve], rel=1e-2)
