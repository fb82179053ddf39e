from __future__ import annotations

import warnings

import pytest
import torch

import ropemods as rm
from ropemods.mods import ReplacedBos
from tests import zoo
from tests.contract import ModContract, close


class TestContract(ModContract):
    variants = {by: [ReplacedBos(by)] for by in ("zero", "mean", "noise", "random_token")}

    def in_training(self, variant: str) -> bool:
        return variant == "random_token"


def softmax_off_by_one(model, ids: torch.Tensor) -> torch.Tensor:
    """A Llama forward in which position 0 is not there and every softmax is e^s / (1 + Σ e^s), written from scratch."""
    config, core = model.config, model.model
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x, layer):
        return layer.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)

    x = core.embed_tokens(ids[:, 1:])
    batch, length, _ = x.shape
    angle = torch.arange(1, length + 1)[:, None] * core.rotary_emb.inv_freq
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def rotate(t):
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat([-second, first], -1) * sin

    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in core.layers:
        h = norm(x, layer.input_layernorm)
        attention = layer.self_attn
        q = rotate(attention.q_proj(h).view(batch, length, heads, dim).transpose(1, 2))
        k = rotate(attention.k_proj(h).view(batch, length, groups, dim).transpose(1, 2))
        v = attention.v_proj(h).view(batch, length, groups, dim).transpose(1, 2)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        weight = torch.exp((q @ k.transpose(-1, -2) / dim**0.5).masked_fill(hidden, -torch.inf))
        weight = weight / (1 + weight.sum(-1, keepdim=True))
        x = x + attention.o_proj((weight @ v).transpose(1, 2).reshape(batch, length, heads * dim))
        x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
    return model.lm_head(norm(x, core.norm))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_zero_on_llama_is_softmax_off_by_one(backend: str) -> None:
    model, ids = rm.apply(zoo.build("llama", backend), ReplacedBos("zero")), zoo.tokens()
    close(model(ids).logits[:, 1:], softmax_off_by_one(zoo.build("llama", backend), ids), 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradients_of_a_deep_model_are_those_of_softmax_off_by_one(dtype, checkpointing: bool) -> None:
    """In fp32 the normalisations of 28 layers at zero would overflow; transformers has them in fp32 in every dtype."""
    stock, ids = zoo.deep(dtype=torch.float64), zoo.tokens()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 2:].flatten())

    loss(softmax_off_by_one(stock, ids)).backward()
    model = rm.apply(zoo.deep(dtype=dtype), ReplacedBos("zero")).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model(ids, use_cache=False).logits[:, 1:]).backward()
    for (name, wanted), found in zip(stock.named_parameters(), model.parameters(), strict=True):
        assert (found.grad - wanted.grad).norm() <= 1e-4 * wanted.grad.norm(), name


def test_a_position_at_zero_with_biases_keeps_its_gradient() -> None:
    """The trajectory leaves zero in the first layer, and every gradient is what stock has for such an input."""
    ids = zoo.tokens()
    stock = zoo.build("qwen2", dtype=torch.float64)
    embedded = stock.get_input_embeddings()(ids)
    embedded = torch.where((ids == zoo.BOS).unsqueeze(-1), 0.0, embedded)
    stock(inputs_embeds=embedded, labels=ids).loss.backward()
    model = rm.apply(zoo.build("qwen2", dtype=torch.float64), ReplacedBos("zero"))
    model(ids, labels=ids).loss.backward()
    for wanted, found in zip(stock.parameters(), model.parameters(), strict=True):
        close(found.grad, wanted.grad, 1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("by", ["zero", "mean", "noise"])
def test_equals_an_edited_input_embedding(architecture: str, by: str) -> None:
    """Gemma scales its embeddings, so the replacement must be in the module's own scale."""
    ids, stock = zoo.tokens(), zoo.build(architecture, "eager")
    model = rm.apply(zoo.build(architecture, "eager"), ReplacedBos(by), strength=0.6)
    embedded = stock.get_input_embeddings()(ids).detach()
    table = stock.get_input_embeddings()(torch.arange(zoo.VOCAB)).detach()
    new = {"zero": torch.zeros(32), "mean": table.mean(0)}.get(by)
    if by == "noise":
        new = model.get_input_embeddings().ropemods.replaced_bos.vector
        torch.testing.assert_close(new.norm(), table[zoo.BOS].norm())
    embedded[:, 0] = 0.4 * embedded[:, 0] + 0.6 * new
    close(model(ids).logits, stock(inputs_embeds=embedded).logits, 5e-6)


def test_random_token_draws_anew_for_every_sequence_in_training_only() -> None:
    model, ids = rm.apply(zoo.build("llama"), ReplacedBos("random_token")), zoo.tokens(rows=8)
    stock = zoo.build("llama")
    assert torch.equal(model(ids).logits, stock(ids).logits)
    model.train()
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 0].detach()))
    model(ids)
    handle.remove()
    table = stock.get_input_embeddings().weight
    drawn = torch.cdist(seen[0], table).argmin(1)
    assert torch.equal(table[drawn], seen[0])
    assert len(set(drawn.tolist())) > 3


def test_every_token_with_the_bos_id_is_replaced_as_a_folded_row_would() -> None:
    model, ids = rm.apply(zoo.build("llama"), ReplacedBos("mean")), zoo.tokens()
    ids[0, 5] = zoo.BOS
    stock = zoo.build("llama")
    with torch.no_grad():
        stock.model.embed_tokens.weight[zoo.BOS] = stock.model.embed_tokens.weight.mean(0)
    close(model(ids).logits, stock(ids).logits, 1e-6)


@pytest.mark.parametrize("ends", [zoo.BOS, [5, zoo.BOS]])
def test_a_bos_that_also_ends_sequences_is_said_to_be_replaced_there(ends) -> None:
    model = zoo.build("llama")
    model.config.eos_token_id = ends
    with pytest.warns(UserWarning, match=r"token 1 begins sequences and ends them too .* replaced_bos changes"):
        rm.apply(model, ReplacedBos("mean"))


def test_a_bos_that_only_begins_sequences_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rm.apply(zoo.build("llama"), ReplacedBos("mean"))


def test_a_tied_head_keeps_its_row_on_export(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = rm.apply(zoo.build("llama", tie_word_embeddings=True), ReplacedBos("noise")), zoo.tokens()
    rm.export(model, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(stock(ids).logits, model(ids).logits, 1e-6)
    assert stock.config.tie_word_embeddings is False


def test_bad_options_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="'zero', 'mean'"):
        ReplacedBos("ones")
    with pytest.raises(ValueError, match="takes no layers"):
        ReplacedBos("zero", layers=[0])
