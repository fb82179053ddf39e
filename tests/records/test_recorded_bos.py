"""The record holds the token that the modifications look for, so that nothing done to the config later moves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import ropemods as rm
from tests import zoo

OTHER = 7


@pytest.mark.parametrize("mod", [rm.LearnedSink(init=0.3), rm.UnrotatedBos(), rm.ReplacedBos("mean")], ids=str)
@pytest.mark.parametrize("later", [OTHER, None])
def test_a_config_whose_bos_a_trainer_overwrote_is_read_with_the_one_it_was_trained_with(mod, later, tmp_path) -> None:
    model, ids = rm.apply(zoo.build(), mod), zoo.tokens()
    logits = model(ids).logits
    model.config.bos_token_id = later  # the Trainer writes its tokenizer's here
    assert torch.equal(model(ids).logits, logits)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["ropemods"]["bos_token_id"] == zoo.BOS and saved.get("bos_token_id") == later
    loaded = rm.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, logits)
    ids[:, 0] = OTHER
    with pytest.raises(ValueError, match=r"BOS token\s+\(1\)"):
        loaded(ids)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["ropemods"]["bos_token_id"] == zoo.BOS


def test_an_adapter_is_put_on_its_base_with_the_bos_it_was_trained_with(tmp_path: Path) -> None:
    zoo.build().save_pretrained(tmp_path / "base")
    base, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), zoo.tokens()
    ids[:, 0] = OTHER
    base.config.bos_token_id = OTHER
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["ropemods"], init_lora_weights=False)
    wrapped = get_peft_model(rm.apply(base, rm.LearnedSink(init=0.3)), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = rm.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, wrapped(ids).logits, rtol=0, atol=1e-6)


def test_modifications_that_look_for_no_bos_record_none(tmp_path: Path) -> None:
    model = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5), rm.AdaptiveTemperature())
    assert model.config.ropemods["bos_token_id"] is None


@pytest.mark.parametrize("token", [-1, 999, zoo.VOCAB])
@pytest.mark.parametrize("mod", [rm.LearnedSink(init=0.3), rm.ReplacedBos()], ids=str)
def test_a_bos_that_is_no_token_of_the_model_is_refused_when_it_is_written(mod, token) -> None:
    model = zoo.build()
    model.config.bos_token_id = token
    with pytest.raises(ValueError, match=rf"bos_token_id in the config is {token}, .* none of the model's 61 tokens"):
        rm.apply(model, mod)
    rm.apply(model, rm.TruncatedRoPE(0.5))
