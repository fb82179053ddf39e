"""What is remembered with a cache follows what is done to the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import ropemods as rm
from ropemods.mods import LearnedSink, ReplacedBos, UnrotatedBos
from tests import zoo
from tests.contract import close

MODS = {"sink": LearnedSink(init=0.3), "unrotated": UnrotatedBos()}
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=MODS, ids=list(MODS))
def model(request):
    return rm.apply(zoo.build(), MODS[request.param])


def padded(*pads: int, length: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One row for each count of padding tokens in front, and the mask."""
    ids, mask = zoo.tokens(rows=len(pads), length=length, seed=seed), torch.ones(len(pads), length, dtype=torch.long)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = 0, 0
        ids[row, count] = zoo.BOS
    return ids, mask


REARRANGED = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), lambda x: x[[2, 0, 1]]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), lambda x: x[[2, 0]]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
}


@pytest.mark.parametrize("how", REARRANGED)
@torch.no_grad()
def test_rearranged_rows_of_a_cache_keep_their_bos(model, how: str) -> None:
    change, same = REARRANGED[how]
    ids, mask = padded(4, 0, 2)
    positions = mask.cumsum(1) - 1
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = model(ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8]).past_key_values
    change(cache)
    for t in (8, 9):
        step = model(
            same(ids[:, t : t + 1]),
            attention_mask=same(mask[:, : t + 1]),
            position_ids=same(positions[:, t : t + 1]),
            past_key_values=cache,
        )
        close(step.logits[:, 0], same(whole[:, t]), 2e-5)


@pytest.mark.parametrize("size", [1, 3, 4])
@torch.no_grad()
def test_padding_read_in_chunks_is_not_taken_for_a_bos(model, size: int) -> None:
    ids, mask = padded(6, 0, 2, length=12)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts = DynamicCache(config=model.config), []
    for start in range(0, 12, size):
        end = start + size
        parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    real = mask.bool()
    close(torch.cat(parts, 1)[real], whole[real], 2e-5)


def test_generation_with_its_prompt_in_chunks_equals_that_in_one(model) -> None:
    ids, mask = padded(6, 0)
    wanted = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **OPTIONS), wanted)


@torch.no_grad()
def test_a_chunk_that_begins_a_row_without_bos_is_refused(model) -> None:
    ids, mask = padded(6, length=12)
    ids[0, 6] = 9
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="row 0 begins at column 6 with token 9"):
        model(ids[:, 4:8], attention_mask=mask[:, :8], past_key_values=cache)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("beams", [1, 3])
def test_padded_generation_is_the_same_on_every_cache(architecture: str, beams: int) -> None:
    model = rm.apply(zoo.build(architecture), LearnedSink(init=0.3))
    ids, mask = padded(3, 0)
    wanted = model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], num_beams=beams, **OPTIONS)[:, 7:]
    for kind in ("dynamic", "static"):
        options = OPTIONS | {"cache_implementation": kind, "num_beams": beams, "disable_compile": True}
        found = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(found[:1, 10:], wanted)


@torch.no_grad()
def test_a_static_cache_that_is_reset_forgets(model) -> None:
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids, mask = padded(3, 1)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    other = zoo.tokens(rows=2, length=7, seed=5)
    close(model(other, past_key_values=cache).logits, model(other, use_cache=False).logits, 2e-5)


@torch.no_grad()
def test_a_cache_that_is_reset_takes_other_rows(model) -> None:
    ids, mask = padded(3, 1)
    cache = model(ids, attention_mask=mask).past_key_values
    cache.reset()
    other = zoo.tokens(rows=3, length=7, seed=5)
    close(model(other, past_key_values=cache).logits, model(other, use_cache=False).logits, 2e-5)
    step = torch.full((3, 1), 9)
    whole = model(torch.cat([other, step], 1), use_cache=False).logits[:, -1:]
    close(model(step, past_key_values=cache).logits, whole, 2e-5)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_tokens_that_another_model_put_into_a_cache_are_refused(model, kind) -> None:
    stock, ids = zoo.build(), zoo.tokens()
    options = {"max_cache_len": 16} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    model(ids[:, :4], past_key_values=cache)
    stock(ids[:, 4:8], past_key_values=cache)
    with pytest.raises(ValueError, match="filled without ropemods seeing"):
        model(ids[:, 8:], past_key_values=cache)


@torch.no_grad()
def test_a_copied_cache_remembers_and_goes_its_own_way(model) -> None:
    ids, mask = padded(4, 0)
    whole = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    cache = model(ids[:, :9], attention_mask=mask[:, :9]).past_key_values
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([1, 0]))
    close(model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits[:, 0], whole, 2e-5)
    flipped = model(ids[:, 9:].flip(0), attention_mask=mask.flip(0), past_key_values=copied).logits[:, 0]
    close(flipped.flip(0), whole, 2e-5)


@torch.no_grad()
def test_a_mask_that_contradicts_the_cache_is_refused(model) -> None:
    ids, mask = padded(3, 0)
    cache = model(ids[:, :9], attention_mask=mask[:, :9]).past_key_values
    with pytest.raises(ValueError, match="row 0 sees a sequence that begins at column 0 of the cache"):
        model(ids[:, 9:], attention_mask=mask.flip(0), past_key_values=cache)


@torch.no_grad()
def test_a_cache_with_other_rows_than_the_call_is_refused(model) -> None:
    ids = zoo.tokens()
    cache = model(ids[:, :9]).past_key_values
    with pytest.raises(ValueError, match="1 rows, and the BOS of 2 is remembered"):
        model(ids[:1, 9:], past_key_values=cache)


def test_the_embedding_is_called_by_name_or_place() -> None:
    model, ids = rm.apply(zoo.build(), ReplacedBos("zero")), zoo.tokens()
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(input=ids), embedding(ids))
    assert embedding(input=ids)[:, 0].abs().max() == 0


@pytest.mark.parametrize("token", [-1, zoo.VOCAB, 999])
@pytest.mark.parametrize("mod", [LearnedSink(init=0.3), ReplacedBos("noise")], ids=["sink", "replaced"])
def test_a_bos_that_is_no_token_is_refused(mod, token) -> None:
    model = zoo.build()
    model.config.bos_token_id = token
    with pytest.raises(ValueError, match="none of the model's 61 tokens"):
        rm.apply(model, mod)
    assert not hasattr(model, "ropemods_attached")
