"""StrengthSchedule: a pure function of the step, exactly 1 at the end, the same after a resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import ropemods as rm
from ropemods.schedule import StrengthSchedule

SHAPES = st.sampled_from(["cosine", "linear", "hard"])


def model(mods: tuple[Any, ...] = (rm.TruncatedRoPE(0.5), rm.LearnedSink())) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, bos_token_id=0
    )
    return rm.apply(LlamaForCausalLM(config), *mods, strength=0.0)


def trainer(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    ids_NT = torch.randint(1, 32, (64, 8), generator=torch.Generator().manual_seed(0))
    ids_NT[:, 0] = 0
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "use_cpu": True, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    args = TrainingArguments(str(folder), **(settings | arguments))
    rows = [{"input_ids": ids, "labels": ids} for ids in ids_NT]
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))


class Seen(TrainerCallback):
    """The strength that each forward pass of training had."""

    def __init__(self, model: nn.Module, kind: str = "truncated_rope") -> None:
        self.strengths: list[float] = []
        attached = model.get_base_model() if hasattr(model, "get_base_model") else model
        model.register_forward_pre_hook(
            lambda *_: self.strengths.append(attached.ropemods_attached.strength[kind]) if model.training else None
        )


@given(SHAPES, st.integers(1, 500), st.integers(0, 50))
def test_strength_rises_from_exactly_0_to_exactly_1_and_never_falls(shape: Any, steps: int, delay: int) -> None:
    schedule = StrengthSchedule(steps=steps, shape=shape, delay=delay)
    path = [schedule.at(step) for step in range(schedule.end + 3)]
    assert all(strength == 0.0 for strength in path[:delay])
    assert path[schedule.end - 1] < 1.0 or schedule.end == 0
    assert all(strength == 1.0 for strength in path[schedule.end :])
    assert all(a <= b for a, b in pairwise(path))
    if shape != "hard":
        assert schedule.at(delay) == 0.0


@given(st.integers(1, 300))
def test_cosine_and_linear_are_symmetric_about_their_middle(half: int) -> None:
    for shape in ("cosine", "linear"):
        schedule = StrengthSchedule(steps=2 * half, shape=shape)  # type: ignore[arg-type]
        assert schedule.at(half) == pytest.approx(0.5, abs=1e-12)
        assert schedule.at(half // 2) + schedule.at(2 * half - half // 2) == pytest.approx(1.0, abs=1e-12)


def test_linear_is_the_fraction_of_steps_and_hard_is_a_step() -> None:
    linear = StrengthSchedule(steps=4, shape="linear", delay=2)
    assert [linear.at(step) for step in range(7)] == [0, 0, 0, 0.25, 0.5, 0.75, 1]
    hard = StrengthSchedule(shape="hard", delay=2)
    assert [hard.at(step) for step in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 2.5}, {"delay": -1}, {"shape": "sigmoid"}, {"steps": True}])
def test_a_schedule_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StrengthSchedule(**wrong)


def test_each_step_trains_at_its_strength_and_logs_say_it(tmp_path: Path) -> None:
    made = model()
    schedule, seen = StrengthSchedule(steps=4, shape="linear"), Seen(made)
    run = trainer(tmp_path, made, schedule, seen)
    run.train()
    assert seen.strengths == [0, 0.25, 0.5, 0.75, 1, 1]
    logged = [entry["strength"] for entry in run.state.log_history if "loss" in entry]
    assert logged == [schedule.at(step) for step in range(1, 7)]
    assert made.config.ropemods["strength"] == {"truncated_rope": 1.0, "learned_sink": 1.0}


def test_one_kind_moves_alone(tmp_path: Path) -> None:
    made = model()
    run = trainer(tmp_path, made, StrengthSchedule(steps=4, kind="learned_sink"))
    run.train()
    assert made.config.ropemods["strength"] == {"truncated_rope": 0.0, "learned_sink": 1.0}
    assert run.state.log_history[-2]["strength_learned_sink"] == 1.0


def test_a_resumed_run_goes_on_where_the_strength_was(tmp_path: Path) -> None:
    first = model()
    run = trainer(tmp_path, first, StrengthSchedule(steps=5), save_strategy="steps", save_steps=3)
    run.train()
    again = model()
    seen = Seen(again)
    resumed = trainer(tmp_path, again, StrengthSchedule(steps=5), seen)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen.strengths == [StrengthSchedule(steps=5).at(step) for step in (3, 4, 5)]
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_holds_the_strength_of_its_step(tmp_path: Path) -> None:
    trainer(tmp_path, model(), StrengthSchedule(steps=5, shape="linear"), save_strategy="steps", save_steps=2).train()
    back = rm.from_pretrained(tmp_path / "checkpoint-2")
    assert back.config.ropemods["strength"] == {"truncated_rope": 0.4, "learned_sink": 0.4}


def test_it_works_inside_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["ropemods"]))
    seen = Seen(made)
    trainer(tmp_path, made, StrengthSchedule(steps=4, shape="linear"), seen).train()
    assert seen.strengths == [0, 0.25, 0.5, 0.75, 1, 1]


def test_a_run_too_short_for_its_schedule_stops_before_the_first_step(tmp_path: Path) -> None:
    made = model()
    seen = Seen(made)
    with pytest.raises(ValueError, match="strength 1 after 7 steps"):
        trainer(tmp_path, made, StrengthSchedule(steps=5, delay=2), seen).train()
    assert seen.strengths == []


def test_a_schedule_for_a_kind_the_model_lacks_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truncated_rope, learned_sink"):
        trainer(tmp_path, model(), StrengthSchedule(steps=4, kind="unrotated_bos")).train()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_model_at_the_end_has_the_strength_it_was_trained_at(tmp_path: Path, adapter: bool) -> None:
    from peft import LoraConfig, get_peft_model

    made: nn.Module = model((rm.TruncatedRoPE(0.5), rm.LearnedSink(init=0.3)))
    made.save_pretrained(tmp_path / "base")
    made.name_or_path = str(tmp_path / "base")
    if adapter:
        made = get_peft_model(made, LoraConfig(target_modules=["q_proj"], modules_to_save=["ropemods"]))
    run = trainer(
        tmp_path, made, StrengthSchedule(steps=4, shape="linear"), save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.1,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")  # so large a learning rate only harms
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    best = rm.from_pretrained(tmp_path / "checkpoint-1").eval()
    torch.testing.assert_close(made.eval()(ids).logits, best(ids).logits, rtol=1e-6, atol=1e-6)
    assert "strength 0.25" in rm.summary(made)
