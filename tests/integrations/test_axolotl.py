"""The plugin in axolotl's own hands: its configs, loader, trainers and files. README.md says how to install axolotl."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytest.importorskip("axolotl", reason="axolotl is not installed; README.md, under axolotl, says how these tests run")

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.train import train
from transformers.models.llama.modeling_llama import LlamaAttention

import ropemods as rm
from ropemods.integrations.axolotl import NAME
from tests import zoo
from tests.trl.trainers import save_base, words

pytestmark = [pytest.mark.filterwarnings("ignore")]

MODS = {"mods": [{"kind": "truncated_rope", "keep": 0.5}, {"kind": "learned_sink", "init": 0.3}]}
RISING = {"schedule": {"steps": 4, "shape": "linear"}}
PLAIN = {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj", "k_proj", "v_proj"]} | PLAIN
WAYS = {"full": {}, "lora": LORA}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axolotl")
    save_base(folder / "base")
    texts = {
        "short": [{"text": words(n, 4 + n)} for n in range(8)],
        "long": [{"text": words(n, 60)} for n in range(30)],
        "held": [{"text": words(n, 70)} for n in range(30)],
        "pairs": [{"prompt": words(n, 3), "chosen": words(n + 1, 3), "rejected": words(n + 2, 5)} for n in range(8)],
    }
    for name, rows in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(place: Path, run: Path, **changes: Any) -> Any:
    """Through a YAML file and axolotl's validation."""
    data = changes.pop("data", "short")
    kind: Any = "completion"
    if data == "pairs":
        kind = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
        kind |= {f"{name}_format": f"{{{name}}}" for name in ("prompt", "chosen", "rejected")}
    settings = {
        "base_model": str(place / "base"), "plugins": [NAME], "ropemods": MODS, "output_dir": str(run),
        "datasets": [{"path": str(place / f"{data}.jsonl"), "type": kind, "ds_type": "json", "split": "train"}],
        "dataset_prepared_path": str(place / "prepared"), "dataset_num_proc": 1, "val_set_size": 0, "sequence_len": 64,
        "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "num_epochs": 1, "save_strategy": "no",
        "learning_rate": 1e-2, "optimizer": "adamw_torch", "lr_scheduler": "constant", "attn_implementation": "sdpa",
        "use_cpu": True, "bf16": False, "fp16": False, "logging_steps": 1,
    } | changes  # fmt: skip
    run.parent.mkdir(exist_ok=True, parents=True)
    path = run.parent / "config.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return load_cfg(str(path))


def trained(place: Path, run: Path, **changes: Any) -> tuple[Any, Any]:
    cfg = config(place, run, **changes)
    model, _, trainer = train(cfg, (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg))
    return model, trainer


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(zoo.tokens()).logits


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [{}, {"sample_packing": True, "pad_to_sequence_len": True}], ids=["padded", "packed"])
def test_it_trains_with_the_modifications_and_what_it_saves_reloads(rows, way, place, tmp_path) -> None:
    model, trainer = trained(place, tmp_path / "run", **rows, **WAYS[way])
    assert len(logged(trainer, "loss")) == 2
    assert "LearnedSink(init=0.3) · 2 layers · strength 1" in rm.summary(model)
    sinks = [p for name, p in model.named_parameters() if "learned_sink" in name and p.requires_grad]
    assert sinks and all(p.ne(0.3).any() for p in sinks)
    assert hasattr(model, "peft_config") == (way == "lora")
    assert torch.equal(logits(rm.from_pretrained(tmp_path / "run")), logits(model))


def test_a_packed_row_is_its_sequences_one_by_one(place, tmp_path) -> None:
    rows = {"sample_packing": True, "pad_to_sequence_len": True, "max_steps": 1}
    model, trainer = trained(place, tmp_path / "run", **rows)
    batch, sequences = next(iter(trainer.get_train_dataloader())), 0
    model.eval().requires_grad_(False)
    packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    for ids, positions, found in zip(batch["input_ids"], batch["position_ids"], packed, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in itertools.pairwise([*starts, len(ids)]):
            torch.testing.assert_close(found[start:end], model(ids[None, start:end]).logits[0], atol=1e-5, rtol=1e-4)
            sequences += 1
    assert sequences == 8 and (batch["input_ids"] == 0).any()  # all texts, and padding


@pytest.mark.parametrize("way", WAYS)
def test_the_schedule_walks_and_a_resumed_run_is_the_same_run(way, place, tmp_path) -> None:
    steps = {"ropemods": MODS | RISING, "max_steps": 4, "save_strategy": None, "save_steps": 2} | WAYS[way]
    model, trainer = trained(place, tmp_path / "run", **steps)
    assert logged(trainer, "strength")[:4] == [0.25, 0.5, 0.75, 1.0]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    halfway = rm.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert "strength 0.5" in rm.summary(halfway)
    again, _ = trained(place, tmp_path / "run", auto_resume_from_checkpoints=True, **steps)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("strength", [1, 0])
def test_the_reference_of_dpo_is_the_modified_start(strength, place, tmp_path) -> None:
    asked = {"ropemods": MODS if strength else MODS | RISING, "max_steps": 4}
    _, trainer = trained(place, tmp_path / "run", rl="dpo", data="pairs", **asked)
    assert f"LearnedSink(init=0.3) · 2 layers · strength {strength} ·" in rm.summary(trainer.ref_model)
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-4)  # model and reference begin alike


def test_dpo_puts_its_adapter_on_the_modified_model(place, tmp_path) -> None:
    _, trainer = trained(place, tmp_path / "run", rl="dpo", data="pairs", **LORA)
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-4)
    assert torch.equal(logits(rm.from_pretrained(tmp_path / "run")), logits(trainer.model))


def test_lora_kernels_rewrite_the_attention_layers_and_run_the_modifications(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(LlamaAttention, "forward", LlamaAttention.forward)  # put back at the end
    monkeypatch.setattr(LlamaAttention, "_original_forward", None, raising=False)
    del LlamaAttention._original_forward
    kernels = LORA | {"lora_qkv_kernel": True, "lora_o_kernel": True}
    model, trainer = trained(place, tmp_path / "kernels", **kernels)
    assert "apply_qkv" in LlamaAttention.forward.__code__.co_names
    with_kernels, losses = logits(model), logged(trainer, "loss")
    monkeypatch.undo()
    assert torch.allclose(logits(rm.from_pretrained(tmp_path / "kernels")), with_kernels, atol=1e-5)
    _, trainer = trained(place, tmp_path / "plain", **LORA)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-3)


def test_a_penalty_joins_the_loss_and_is_off_what_is_saved(place, tmp_path) -> None:
    penalty = {"penalty": {"weight": 1.0, "early": [8, 16]}}
    model, trainer = trained(place, tmp_path / "run", data="long", ropemods=penalty)
    assert logged(trainer, "penalty")[1] != 0
    assert not hasattr(model, "penalized")
    from transformers import AutoModelForCausalLM

    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), logits(model))


def test_leakage_is_measured_before_and_after(place, tmp_path) -> None:
    protocol = {"sequences": 16, "length": 32, "groups": 8}
    measure = {"held_out_data": str(place / "held.jsonl"), "protocol": protocol}
    _, measured = trained(place, tmp_path / "run", ropemods=MODS | {"measure": measure})
    reports = [rm.Report.from_json(tmp_path / "run" / f"ropemods-{when}.json") for when in ("before", "after")]
    assert reports[0].terms["residual"].early.value != reports[1].terms["residual"].early.value
    assert "residual" in (tmp_path / "run" / "ropemods-change.md").read_text()
    _, other = trained(place, tmp_path / "other")
    assert logged(measured, "loss") == logged(other, "loss")  # as if nobody had measured


REFUSED = {
    "a mistyped key": ({"ropemods": MODS | {"shedule": {}}}, "ropemods.shedule\n  Extra inputs are not permitted"),
    "a mistyped kind": ({"ropemods": {"mods": ["truncated_rop"]}}, r"did you mean 'truncated_rope'\?"),
    "a mistyped schedule": ({"ropemods": MODS | {"schedule": {"step": 3}}}, r"did you mean 'steps'\?"),
    "a schedule of another": ({"ropemods": MODS | {"schedule": {"kind": "keyed_sink"}}}, "not among the mods"),
    "a wrong penalty": ({"ropemods": {"penalty": {"weight": "much"}}}, "weight takes a number"),
    "a wrong protocol": (
        {"ropemods": MODS | {"measure": {"held_out_data": "x", "protocol": {"len": 1}}}},
        "has no len",
    ),
    "nothing asked": ({"ropemods": None}, "nothing says what it is to do"),
    "nothing changed": ({"ropemods": {"mods": []}}, "neither mods nor penalty"),
    "a calibrated start": ({"ropemods": {"mods": ["learned_sink"]}}, "before its data"),
    "a penalty with rl": ({"ropemods": {"penalty": {"weight": 1.0}}, "rl": "dpo", "data": "pairs"}, "computes its own"),
    "merge-lora": (LORA | {"merge_lora": True}, "merge it with ropemods"),
    "an adapter from before": (LORA | {"lora_model_dir": "run"}, "merge it there"),
    "relora": (LORA | {"relora": True, "jagged_restart_steps": 2}, "merges adapters into the weights"),
    "context parallelism": ({"context_parallel_size": 2}, "a part of every attention call"),
    "vLLM": ({"rl": "grpo", "trl": {"use_vllm": True}}, "samples from a vLLM"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_config_that_cannot_work_is_refused_by_axolotls_validation(what, place, tmp_path) -> None:
    changes, said = REFUSED[what]
    with pytest.raises(ValueError, match=said):
        config(place, tmp_path / "run", **changes)


BEFORE_THE_FIRST_STEP = {
    "frozen": ({"unfrozen_parameters": ["lm_head"]}, r"all are frozen; add '.\+ropemods' to unfrozen_parameters"),
    "too short": ({"ropemods": MODS | RISING}, "reaches strength 1 after 4 steps"),
    "flex": ({"attn_implementation": "flex_attention"}, "run on eager and sdpa"),
    "packed without isolation": ({"attn_implementation": None, "sample_packing": True}, "packs several sequences"),
}


@pytest.mark.parametrize("what", BEFORE_THE_FIRST_STEP)
def test_what_would_lose_them_is_an_error_before_the_first_step(what, place, tmp_path) -> None:
    changes, said = BEFORE_THE_FIRST_STEP[what]
    with pytest.raises(ValueError, match=said):
        trained(place, tmp_path / "run", **changes)


def test_parameters_that_are_named_train(place, tmp_path) -> None:
    model, _ = trained(place, tmp_path / "run", unfrozen_parameters=["lm_head", ".+ropemods"])
    sinks = [p for name, p in model.named_parameters() if "learned_sink" in name]
    assert sinks and all(p.ne(0.3).any() for p in sinks)


def test_a_modified_base_is_refused(place, tmp_path) -> None:
    rm.apply(zoo.build(), rm.LearnedSink(init=0.3)).save_pretrained(tmp_path / "modified")
    shutil.copytree(place / "base", tmp_path / "both")
    shutil.copytree(tmp_path / "modified", tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"load it with ropemods\.from_pretrained"):
        trained(place, tmp_path / "run", base_model=str(tmp_path / "both"))


def test_importing_the_plugin_imports_nothing_that_could_fail() -> None:
    """axolotl goes on without a plugin that it could not import."""
    import subprocess
    import sys

    program = "import sys, ropemods.integrations.axolotl; print(*sorted(m for m in sys.modules if 'ropemods' in m))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    imported = out.splitlines()[-1].split()
    assert "ropemods.integrations.axolotl" in imported
    assert not {"ropemods.attach", "ropemods.model", "ropemods.mods", "ropemods.training"} & set(imported)


def test_a_transformers_that_is_too_old_is_an_error(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.16.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or later, and 5\.16\.1 is installed"):
        config(place, tmp_path / "run")
