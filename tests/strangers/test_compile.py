"""Compiled: the answers and the refusals of the model as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from tests.strangers.test_caches import feed, new_cache, padded
from tests.strangers.uses import Subject, use


@use(
    every=False,
    given=(
        "plain",
        "padded",
        "packed",
        "packed and masked",
        "no BOS",
        "static",
        "filled uncompiled",
        "cache used again",
    ),
    when=("after", "before"),
)
@torch.no_grad()
def test_a_compiled_model_says_what_it_says_uncompiled(subject: Subject, given: str, when: str) -> Iterator[Tensor]:
    """`when`: compiled after modifications were put on, or before."""
    torch._dynamo.reset()
    model = subject.stock()
    compiled = torch.compile(model, backend="eager") if when == "before" else None
    model = subject.modified(model)
    compiled = torch.compile(model, backend="eager") if compiled is None else compiled
    ids = subject.ids()
    more: dict[str, Any] = {}
    if given == "padded":
        ids, more = padded(ids, "left")
    elif given.startswith("packed"):
        ids, more = ids.reshape(1, -1), {"position_ids": torch.arange(10).repeat(2)[None]}
        if "masked" in given:
            more["attention_mask"] = torch.ones_like(ids)
    elif given == "no BOS":
        ids[:, 0] = 9
    if given in ("static", "filled uncompiled", "cache used again"):
        cache = new_cache("dynamic", model)
        if given != "filled uncompiled":
            cache = StaticCache(config=model.config, max_cache_len=16)
        if given == "cache used again":
            other, mask = padded(subject.ids(seed=4), "left")
            feed(compiled, other, mask, cache, 0, 6)
            cache.reset()
        feed(model if given == "filled uncompiled" else compiled, ids, more, cache, 0, 6)
        yield feed(compiled, ids, more, cache, 6, 10)
        yield model(ids, use_cache=False).logits[:, 6:]
        return
    yield compiled(ids, use_cache=False, **more).logits
    yield model(ids, use_cache=False, **more).logits
