"""What sees later tokens is no causal model: it is refused, whatever the modification, with the reason."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

import ropemods as rm


@pytest.mark.parametrize(
    "mod",
    [rm.TruncatedRoPE(0.5), rm.AdaptiveTemperature(), rm.ReplacedBos(), rm.UnrotatedBos(), rm.LearnedSink()],
    ids=lambda mod: mod.kind,
)
def test_an_encoder_is_refused_and_left_as_it_was(mod) -> None:
    config = AutoConfig.for_model(
        "modernbert",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=61,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        pad_token_id=0,
    )
    model, ids = AutoModelForMaskedLM.from_config(config).eval(), torch.arange(1, 9)[None]
    before = model(ids).logits
    with pytest.raises(ValueError, match=r"ModernBertForMaskedLM is no causal model.*see later ones"):
        rm.apply(model, mod)
    assert torch.equal(model(ids).logits, before)
