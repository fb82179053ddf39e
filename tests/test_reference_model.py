"""A reference model that a third party loads from where a modified model came from: the same model, or an error."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import ropemods as rm
from tests import zoo


@pytest.fixture
def base(tmp_path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, zoo.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "base")
    zoo.build().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_name_of_a_modified_model_does_not_load_the_unmodified_one(base) -> None:
    model = rm.apply(AutoModelForCausalLM.from_pretrained(base), rm.TruncatedRoPE(0.5))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"gives the unmodified model.*ref_model=copy.deepcopy\(model\)"):
            AutoModelForCausalLM.from_pretrained(each.config._name_or_path)
    AutoModelForCausalLM.from_pretrained(str(model.config._name_or_path))
    AutoModelForCausalLM.from_pretrained(base)
    rm.set_strength(model, 0.0)
    AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    rm.set_strength(model, 0.5)
    AutoModelForCausalLM.from_pretrained(rm.remove(model).config._name_or_path)


def test_the_name_reads_prints_and_saves_as_before(base) -> None:
    name = rm.apply(AutoModelForCausalLM.from_pretrained(base), rm.TruncatedRoPE(0.5)).config._name_or_path
    assert name == base and f"{name}" == base
    assert AutoTokenizer.from_pretrained(name).bos_token_id == zoo.BOS
    assert yaml.dump({"base_model": name}) == yaml.dump({"base_model": base})
    assert yaml.safe_dump({"base_model": name}) == yaml.safe_dump({"base_model": base})


def test_a_modified_checkpoint_that_stock_runs_exactly_may_be_loaded_by_its_name(base, tmp_path) -> None:
    rm.apply(AutoModelForCausalLM.from_pretrained(base), rm.TruncatedRoPE(0.5)).save_pretrained(tmp_path / "modified")
    model, ids = rm.from_pretrained(tmp_path / "modified"), zoo.tokens()
    again = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    rm.set_strength(model, 0.5)
    with pytest.raises(ValueError, match="unmodified"):
        AutoModelForCausalLM.from_pretrained(model.config._name_or_path)


def test_a_modified_checkpoint_that_stock_cannot_run_is_loaded_modified_by_its_name(base, tmp_path) -> None:
    rm.apply(AutoModelForCausalLM.from_pretrained(base), rm.LearnedSink(init=0.3)).save_pretrained(
        tmp_path / "modified"
    )
    model, ids = rm.from_pretrained(tmp_path / "modified"), zoo.tokens()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = AutoModelForCausalLM.from_pretrained(
            each.config._name_or_path, attn_implementation=each.config._attn_implementation
        )
        assert torch.equal(again(ids).logits, model(ids).logits)
    for name, cls in (
        (str(model.config._name_or_path), AutoModelForCausalLM),
        (model.config._name_or_path, AutoModelForSequenceClassification),  # which is not what is there
    ):
        with pytest.raises(ValueError, match="modifications that stock transformers cannot run"):
            cls.from_pretrained(name)
    rm.set_strength(model, 0.5)
    with pytest.raises(ValueError, match="unmodified"):
        AutoModelForCausalLM.from_pretrained(model.config._name_or_path)


def preference_trainer(base, tmp_path, model, **options):
    trl = pytest.importorskip("trl", reason="TRL is not installed, so its reference model is not tried")
    from datasets import Dataset

    rows = [{"prompt": "<s> w5 w6", "chosen": " w7 w8", "rejected": " w9 w10"}] * 4
    args = trl.DPOConfig(
        str(tmp_path / "dpo"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=2, bf16=False, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    return trl.DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options
    )


def test_preference_training_starts_from_the_modified_model_or_says_what_to_pass(base, tmp_path) -> None:
    model = rm.apply(AutoModelForCausalLM.from_pretrained(base), rm.LearnedSink(init=0.3, read_bos=True))
    with pytest.raises(ValueError, match="pass ref_model="):
        preference_trainer(base, tmp_path, model)
    trainer = preference_trainer(base, tmp_path, model, ref_model=copy.deepcopy(model))
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference are one model


def test_preference_training_from_strength_0_needs_no_reference_of_its_own(base, tmp_path) -> None:
    model = rm.apply(AutoModelForCausalLM.from_pretrained(base), rm.LearnedSink(init=0.3, read_bos=True), strength=0.0)
    trainer = preference_trainer(base, tmp_path, model)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(0.6931, abs=1e-3)
