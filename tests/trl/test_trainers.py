"""Every trainer of TRL that people use × (full, LoRA) × (padded, packed): trains the modified model and saves it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import ropemods as rm
from tests.contract import close

trl = pytest.importorskip("trl", reason="TRL is not installed, so its trainers are not tried")

from tests import zoo  # noqa: E402
from tests.trl.trainers import logits, lora, losses, make, modified, ready, rows, save_base  # noqa: E402

PADDED = ("sft", "reward", "dpo", "kto", "grpo", "rloo")
ROWS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 48},
    "padding_free": {"padding_free": True, "max_length": None},
}
CASES = [(trainer, "padded") for trainer in PADDED] + [("sft", "packed"), ("sft", "padding_free")]
WITH_BOS = (rm.UnrotatedBos(), rm.ReplacedBos("mean"), rm.TruncatedRoPE(0.5))
EACH_TIME = {("sft", "packed", True), ("reward", "padded", True), ("dpo", "padded", False), ("grpo", "padded", True)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def name_of(trainer: str, kind: str, adapter: bool) -> str:
    return f"{trainer}-{'lora' if adapter else 'full'}-{kind}"


WAYS = [(*case, adapter) for case in CASES for adapter in (False, True)]


def test_the_readme_has_every_case_in_its_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert [name_of(*way) for way in WAYS if f"`{name_of(*way)}`" not in readme] == []
    assert f"TRL\n{'.'.join(trl.__version__.split('.')[:2])} and its own defaults" in readme


@pytest.mark.parametrize(
    "trainer, kind, adapter",
    [pytest.param(*way, id=name_of(*way), marks=[] if way in EACH_TIME else pytest.mark.slow) for way in WAYS],
)
def test_a_trainer_trains_the_modifications_and_saves_them(trainer, kind, adapter, base, tmp_path) -> None:
    run = ready(trainer, base, tmp_path, adapter=adapter, **ROWS[kind])
    run.train()
    assert len(losses(run)) == 2
    sinks = [p for name, p in run.model.named_parameters() if "learned_sink" in name and p.requires_grad]
    assert sinks and all(p.ne(0).any() for p in sinks)  # they start at 0
    assert "TruncatedRoPE(keep=0.5) · 2 layers · strength 1" in rm.summary(run.model)
    run.save_model(str(tmp_path / "saved"))
    again = rm.from_pretrained(tmp_path / "saved", **({"num_labels": 1} if trainer == "reward" and adapter else {}))
    close(again.eval()(zoo.tokens()).logits, logits(run, run.model), 1e-6)


def test_packed_and_padded_rows_give_the_same_loss(base, tmp_path) -> None:
    """Eight texts in one packed row, padded to one length, or end to end without padding."""
    found = {}
    for kind, options in ROWS.items():
        more = options | {"per_device_train_batch_size": 1 if kind == "packed" else 8, "max_steps": 1, "bf16": False}
        more |= {"max_length": 128} if kind == "packed" else {}
        run = make("sft", modified(base, "sft", *WITH_BOS), tmp_path, **more)
        run.train()
        found[kind] = losses(run)[0]
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-5)
    assert found["padding_free"] == pytest.approx(found["padded"], rel=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_packing_that_cuts_texts_is_refused_where_a_modification_needs_their_bos(adapter, base, tmp_path) -> None:
    wrapped = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
    wrapped |= {"peft_config": lora()} if adapter else {}
    with pytest.raises(ValueError, match="a sequence that does not begin with the BOS token"):
        make("sft", modified(base), tmp_path, **wrapped).train()
    make("sft", modified(base, "sft", rm.TruncatedRoPE(0.5)), tmp_path, **wrapped).train()


@pytest.mark.parametrize("trainer", [trainer for trainer in PADDED if trainer != "sft"])
def test_only_the_sft_trainer_packs(trainer, base, tmp_path) -> None:
    """When this fails, another one does, and its rows belong into the cases above."""
    name = {"reward": "Reward"}.get(trainer, trainer.upper())
    fields = {field.name for field in dataclasses.fields(getattr(trl, f"{name}Config"))}
    assert "packing" not in fields and ("padding_free" in fields) == (trainer == "dpo")
    if trainer == "dpo":
        assert not ready(trainer, base, tmp_path, adapter=False, padding_free=True).padding_free


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_checkpoint_comes_back_with_its_strength(adapter, base, tmp_path) -> None:
    run = ready(
        "sft", base, tmp_path, adapter=adapter, callbacks=[rm.StrengthSchedule(steps=4, shape="linear")], max_steps=4,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=rows("sft"),
        load_best_model_at_end=True, metric_for_best_model="num_tokens", greater_is_better=False,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")  # the least tokens
    assert "strength 0.25" in rm.summary(run.model)
    best = rm.from_pretrained(run.state.best_model_checkpoint).eval()
    close(logits(run, run.model), best(zoo.tokens()).logits, 1e-6)


def test_a_penalty_that_the_loss_leaves_out_is_an_error_and_added_to_it_trains(base, tmp_path) -> None:
    from datasets import Dataset

    class WithPenalty(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + penalized.penalty() if model.training else loss
            return (loss, outputs) if return_outputs else loss

    long = Dataset.from_list([{"text": " ".join(f"w{3 + (n + k) % 50}" for k in range(40))} for n in range(8)])
    for cls in (trl.SFTTrainer, WithPenalty):
        model = modified(base, "sft", rm.TruncatedRoPE(0.5))
        penalized = rm.penalize(model, weight=1.0, early=(8, 16))
        run = make("sft", model, tmp_path, cls=cls, train_dataset=long)
        if cls is WithPenalty:
            run.train()
            assert torch.isfinite(penalized.last.penalty) and penalized.last.penalty != 0
        else:
            with pytest.raises(RuntimeError, match="is in no loss, so it would not train"):
                run.train()
