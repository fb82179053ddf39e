"""Decoding with whatever cache, padding and handling of it: the same answers as one pass without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tests.strangers.uses import Subject, use

PROMPT, PAD = 6, 3


def padded(ids: Tensor, padding: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Row 0 with padding in front, its BOS moved behind it, and the mask that says so."""
    if padding == "none":
        return ids, {}
    ids = ids.clone()
    ids[0, PAD:] = ids[0, :-PAD].clone()
    ids[0, :PAD] = 0
    mask = torch.ones_like(ids)
    mask[0, :PAD] = 0
    return ids, {"attention_mask": mask}


def new_cache(kind: str, model: PreTrainedModel) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=16)
    return DynamicCache(config=model.config)


def feed(model: PreTrainedModel, ids: Tensor, more: dict[str, Tensor], cache: Any, start: int, stop: int) -> Tensor:
    seen = {name: mask[:, :stop] for name, mask in more.items()}
    return model(ids[:, start:stop], past_key_values=cache, use_cache=True, **seen).logits


def pick(rows: Tensor, ids: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return ids[rows], {name: mask[rows] for name, mask in more.items()}


@use(
    every=False,
    cache=("dynamic", "static"),
    padding=("none", "left"),
    handling=("step", "chunks", "all at once", "reorder", "select", "repeat", "crop", "reset", "copy"),
)
@torch.no_grad()
def test_decoding_in_parts_says_what_one_pass_says(
    subject: Subject, cache: str, padding: str, handling: str
) -> Iterator[Tensor]:
    model = subject.model()
    ids, more = padded(subject.ids(), padding)
    past = new_cache(cache, model)
    start = PROMPT
    if handling == "reset":
        other, mask = padded(subject.ids(seed=5), "left" if padding == "none" else "none")
        feed(model, other, mask, past, 0, PROMPT)
        past.reset()
    if handling == "chunks":
        for at in range(0, 8, 2):
            feed(model, ids, more, past, at, at + 2)
        start = 8
    elif handling == "crop":
        feed(model, ids, more, past, 0, 8)
        past.crop(PROMPT)
    else:
        feed(model, ids, more, past, 0, PROMPT)
    rows = torch.arange(2)
    if handling == "reorder":
        rows = torch.tensor([1, 0])
        past.reorder_cache(rows)
    elif handling == "select":
        rows = torch.tensor([1])
        past.batch_select_indices(rows)
    elif handling == "repeat":
        rows = rows.repeat_interleave(2)
        past.batch_repeat_interleave(2)
    elif handling == "copy":
        past = copy.deepcopy(past)
    ids, more = pick(rows, ids, more)
    size = 4 if handling == "all at once" else 1
    yield torch.cat([feed(model, ids, more, past, at, at + size) for at in range(start, 10, size)], dim=1)
    yield model(ids, use_cache=False, **more).logits[:, start:]


@use(
    every=False,
    padding=("none", "left"),
    way=("greedy", "beams", "lookup", "prefill in chunks", "static", "sampling", "continued"),
)
@torch.no_grad()
def test_generation_with_a_cache_says_what_it_says_without(
    subject: Subject, padding: str, way: str
) -> Iterator[Tensor]:
    model = subject.model()
    ids, more = padded(subject.ids(), padding)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache: dict[str, Any] = {}
    if way == "beams":
        options["num_beams"] = 3
    elif way == "lookup":
        ids, more = ids[:1], {name: mask[:1] for name, mask in more.items()}
        with_cache["prompt_lookup_num_tokens"] = 2
    elif way == "prefill in chunks":
        with_cache["prefill_chunk_size"] = 3
    elif way == "static":
        with_cache["cache_implementation"] = "static"
    elif way == "sampling":
        options |= {"do_sample": True, "top_k": 5}
    elif way == "continued":
        past = new_cache("dynamic", model)
        feed(model, ids, more, past, 0, PROMPT)
        with_cache["past_key_values"] = past
    more = more or {"attention_mask": torch.ones_like(ids)}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    for choice in (with_cache, {"use_cache": False}):
        torch.manual_seed(1)
        yield torch.stack(model.generate(ids, **more, **options, **choice).logits)
