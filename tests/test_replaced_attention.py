"""Frameworks that put their own attention in the place of a model's: `apply` and what follows it refuse there.

What is put there is written after what unsloth 2026.10 does (models/llama.py, `LlamaAttention_fast_forward` and
`FastLlamaModel.pre_patch`): a function that rotates and attends by itself, assigned to the class's `forward`.
"""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

import ropemods as rm
from tests import zoo

MODS = {
    "tables": rm.TruncatedRoPE(0.5),
    "scores": rm.LearnedSink(init=0.3),
    "embedding": rm.ReplacedBos(by="mean"),
    "output": rm.OutputGate(),
}


def fast_forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
    """Attention that asks transformers for nothing."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.fixture
def replaced(monkeypatch):
    def replace() -> None:
        monkeypatch.setattr(LlamaAttention, "forward", fast_forward)

    return replace


def test_it_computes_what_the_model_did(replaced) -> None:
    """Else the refusals below would be of something that no framework does."""
    model = zoo.build("llama")
    before = model(zoo.tokens()).logits
    replaced()
    torch.testing.assert_close(model(zoo.tokens()).logits, before)


@pytest.mark.parametrize("mod", MODS.values(), ids=MODS)
def test_a_class_whose_forward_is_another_is_refused(mod, replaced) -> None:
    model = zoo.build("llama")
    replaced()
    with pytest.raises(ValueError, match="nor frameworks that put theirs in its place, as unsloth does"):
        rm.apply(model, mod)
    with pytest.raises(ValueError, match="attention"):
        rm.penalize(model, weight=1.0)
    assert not hasattr(model, "ropemods_attached") and not hasattr(model.config, "ropemods")


@pytest.mark.parametrize("mod", MODS.values(), ids=MODS)
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)], ids=str)
def test_the_dry_run_finds_the_forward_of_single_layers_replaced(layers, mod) -> None:
    model = zoo.build("llama")
    for n in layers:
        attention = model.model.layers[n].self_attn
        attention.forward = types.MethodType(fast_forward, attention)
    with pytest.raises(ValueError, match="reached"):
        rm.apply(model, mod)
    assert not hasattr(model, "ropemods_attached")


@pytest.mark.parametrize("mod", MODS.values(), ids=MODS)
def test_a_forward_replaced_after_apply_is_an_error_at_the_next_pass(mod, replaced) -> None:
    model = rm.apply(zoo.build("llama"), mod)
    ids = zoo.tokens()
    model(ids)
    replaced()
    with pytest.raises(ValueError, match=r"LlamaAttention was replaced after ropemods\.apply"):
        model(ids)
    with pytest.raises(ValueError, match="was replaced after"):
        rm.summary(model)


def test_a_rotary_module_of_their_own_is_refused_where_it_has_no_table(monkeypatch) -> None:
    """unsloth's rotary classes keep cosines of their own: frequencies that are edited would turn nothing."""
    model = zoo.build("llama")
    cached = model.model.rotary_emb(torch.zeros(1), torch.arange(zoo.LENGTH)[None])
    monkeypatch.setattr(
        LlamaRotaryEmbedding,
        "forward",
        lambda self, x, position_ids: tuple(part[:, : position_ids.shape[1]] for part in cached),
    )
    with pytest.raises(ValueError, match="no attention layer of LlamaForCausalLM changes when the frequencies"):
        rm.apply(model, rm.TruncatedRoPE(0.5))
