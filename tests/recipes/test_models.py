"""Every shipped recipe, on a tiny model of the architecture it names: it is read, applies, and trains three steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from ropemods.mods import MODS
from ropemods.settings.strict_yaml import read
from ropemods.training.__main__ import main
from ropemods.training.arms import read_result
from ropemods.training.recipe_file import from_values
from tests import forked
from tests.recipes import tiny
from tests.recipes.launched import FINETUNE, ROOT

RECIPES = ROOT / "recipes"
TUNING = sorted(path.relative_to(RECIPES) for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate")
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": tiny.VOCABULARY,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 131_072,
}  # fmt: skip
FOUR_DEEP = SMALL | {"num_hidden_layers": 4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def default(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def heads(query: int, key: int, dim: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": key, "head_dim": dim}


# What of each model the modifications meet is real: head size, grouping, rotary parameters, windows, tying.
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama-3.2-1b": LlamaConfig(**SMALL, **heads(4, 1, 64), rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-3.2-3b": LlamaConfig(**SMALL, **heads(3, 1, 128), rope_parameters=LLAMA3, tie_word_embeddings=True),
    "qwen3-0.6b": Qwen3Config(**SMALL, **heads(2, 1, 128), rope_parameters=default(1e6), tie_word_embeddings=True),
    "qwen3-4b": Qwen3Config(**SMALL, **heads(4, 1, 128), rope_parameters=default(1e6), tie_word_embeddings=True),
    "smollm2-135m": LlamaConfig(**FOUR_DEEP, **heads(3, 1, 64), rope_parameters=default(1e5), tie_word_embeddings=True),
    "mistral-7b": MistralConfig(
        **SMALL, **heads(4, 1, 128), rope_parameters=default(1e6), sliding_window=None, tie_word_embeddings=False
    ),
    "gemma-3-1b": Gemma3TextConfig(
        **SMALL,
        **heads(4, 1, 256),
        query_pre_attn_scalar=256,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": default(1e4), "full_attention": default(1e6)},
    ),
}


def test_there_is_a_recipe_for_each_modification_and_two_for_each_model_with_a_page() -> None:
    assert {path.parent.name for path in TUNING} == set(ARCHITECTURES)
    for name in set(ARCHITECTURES) - {"smollm2-135m"}:
        assert {path.name for path in TUNING if path.parent.name == name} == {"full.yaml", "lora.yaml"}
        page = (RECIPES / name / "README.md").read_text()
        assert "full.yaml" in page and "lora.yaml" in page and "GB" in page and "tokens" in page
    kinds = {mod["kind"] for path in TUNING for mod in read(RECIPES / path)["mods"]}
    assert kinds == {mod.kind for mod in MODS}
    page = (RECIPES / "smollm2-135m" / "README.md").read_text()
    assert all(path.name in page for path in TUNING if path.parent.name == "smollm2-135m")


def launched(path: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if read(RECIPES / path).get("distributed") else []


@pytest.mark.parametrize("path", [pytest.param(path, marks=launched(path), id=str(path)) for path in TUNING])
def test_a_recipe_trains_three_steps(path: Path, text: Path, tmp_path: Path) -> None:
    as_shipped = read(RECIPES / path)
    recipe = from_values(as_shipped, source=str(path))
    assert recipe.options.arms == ("base", "untrained", "control", "modified")
    assert recipe.protocol is not None and recipe.probe is not None
    assert (recipe.lora is not None) == (path.stem == "lora")
    assert max(each.end for each in recipe.schedules()) < (recipe.options.max_steps or 0)

    model = tiny.write_model(tmp_path / "model", ARCHITECTURES[path.parent.name])
    small = {
        "model_name_or_path": str(model), "data": str(text), "output_dir": str(tmp_path / "out"), "length": 64,
        "held_out": 0.2, "held_out_rows": 4, "max_steps": 3, "schedule": as_shipped["schedule"] | {"steps": 2},
        "global_batch_size": 4, "per_device_train_batch_size": 2, "warmup_steps": 1, "use_cpu": True,
        "save_strategy": "no", "protocol": None, "probe": None, "probe_steps": 0, "arms": ["modified"],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(as_shipped | small))
    words = ["--config", str(tmp_path / "recipe.yaml")]
    if recipe.options.distributed is None:
        main(words)
    else:  # on two ranks, with the config that the recipe's first lines name
        words += ["--deepspeed", f"recipes/deepspeed/{recipe.options.distributed}.json"]
        forked.script([FINETUNE[1], *words], ranks=2)
    result = read_result(tmp_path / "out" / "modified-0" / "result.json")
    assert result.steps == 3 and result.reload_difference is not None
    ran = json.loads((tmp_path / "out" / "results.json").read_text())["recipe"]
    shrunk = {*small, "mods"}
    assert {k: v for k, v in ran.items() if k in as_shipped and k not in shrunk} == {
        k: v for k, v in as_shipped.items() if k not in shrunk
    }
    assert ran["bf16"] is True and ran["activation_checkpointing"] is True
    described = tmp_path / "out" / "modified-0" / "model" / ("ropemods.json" if recipe.lora else "config.json")
    record = json.loads(described.read_text())
    assert set((record if recipe.lora else record["ropemods"])["strength"].values()) == {1.0}


def test_the_smoke_recipes_are_read() -> None:
    recipe = from_values(read(RECIPES / "smoke.yaml"), source="smoke.yaml")
    assert recipe.protocol is not None and recipe.training["use_cpu"] is True


@pytest.mark.parametrize("path", sorted((RECIPES / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_configs_leave_to_the_recipe_what_it_says(path: Path) -> None:
    config = json.loads(path.read_text())
    stage = config["zero_optimization"]["stage"]
    assert path.stem.startswith(f"zero{stage}")
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    # Without this a ZeRO-3 run would save no model that loads.
    assert stage < 3 or config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert ("offload_optimizer" in config["zero_optimization"]) == path.stem.endswith("offload")


def test_accelerate_reads_its_configs() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (RECIPES / "accelerate").glob("*.yaml"):
        config = load_config_from_file(str(path))
        assert config.num_processes == (16 if path.stem == "two_nodes" else 8)
        file = (config.deepspeed_config or {}).get("deepspeed_config_file")
        assert file is None or (ROOT / file).is_file()
        assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
