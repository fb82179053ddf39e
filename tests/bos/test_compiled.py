"""A compiled or exported model refuses what an uncompiled one refuses, when its graph runs, and with the same words."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

import ropemods as rm
from ropemods.mods import AdaptiveTemperature, LearnedSink, ReplacedBos, UnrotatedBos
from tests import zoo
from tests.bos.test_caches import padded
from tests.contract import close

MODS = {"sink": LearnedSink(init=0.3), "unrotated": UnrotatedBos(), "replaced": ReplacedBos("noise")}


def build():
    return zoo.build(num_hidden_layers=1)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def restarting() -> dict[str, torch.Tensor]:
    return {"input_ids": zoo.tokens(rows=2, length=6).reshape(1, 12), "position_ids": torch.arange(6).repeat(2)[None]}


@pytest.mark.parametrize(
    ("name", "training"),
    [("sink", True), ("replaced", False)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("replaced", True), ("unrotated", False))],
)
def test_a_sequence_without_bos_is_refused(name: str, training: bool) -> None:
    model, ids = rm.apply(build(), MODS[name]), zoo.tokens()
    run = compiled(model, "aot_eager")
    labels = {"labels": ids} if training else {}
    with torch.set_grad_enabled(training):
        close(run(ids, use_cache=False, **labels).logits, model(ids, use_cache=False).logits, 1e-5)
        ids[1, 0] = 9
        with pytest.raises(ValueError, match=r"1 of 2 rows.*row 1 begins at column 0 with token 9"):
            run(ids, use_cache=False, **labels)


@pytest.mark.slow
def test_inductor_keeps_the_question() -> None:
    model, ids = rm.apply(build(), ReplacedBos("zero")), zoo.tokens()
    run = compiled(model, "inductor")
    with torch.no_grad():
        run(ids, use_cache=False)
        ids[:, 0] = 9
        with pytest.raises(ValueError, match="does not begin with the BOS token"):
            run(ids, use_cache=False)


@pytest.mark.parametrize("mod", [LearnedSink(init=0.3), AdaptiveTemperature()], ids=["sink", "temperature"])
@torch.no_grad()
def test_packed_sequences_are_kept_apart_or_refused(mod) -> None:
    model, inputs = rm.apply(build(), mod), restarting()
    run = compiled(model)
    wanted = model(inputs["input_ids"][:, 6:], use_cache=False).logits
    close(run(**inputs, use_cache=False).logits[:, 6:], wanted, 2e-5)
    with pytest.raises(ValueError, match="packs several sequences"):
        run(**inputs, attention_mask=torch.ones(1, 12, dtype=torch.long), use_cache=False)


@pytest.mark.slow
@torch.no_grad()
def test_a_block_mask_gives_each_query_its_bos() -> None:
    model, inputs = rm.apply(build(), LearnedSink(init=0.3)), restarting()
    mask = torch.block_diag(*[torch.ones(6, 6).tril()] * 2).bool()[None, None]
    logits = compiled(model)(inputs["input_ids"], attention_mask=mask, use_cache=False).logits
    close(logits[:, 6:], model(inputs["input_ids"][:, 6:], use_cache=False).logits, 5e-5)


@torch.no_grad()
def test_a_static_cache_that_is_used_again_forgets() -> None:
    model = rm.apply(build(), LearnedSink(init=0.3))
    run, cache = compiled(model), StaticCache(config=model.config, max_cache_len=16)
    ids, mask = padded(3, 1)
    run(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    other = zoo.tokens(rows=2, length=10, seed=5)
    logits = run(other, attention_mask=torch.ones_like(other), past_key_values=cache).logits
    close(logits, model(other, use_cache=False).logits, 2e-5)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_that_another_model_filled_is_refused(kind) -> None:
    model, ids = rm.apply(build(), LearnedSink(init=0.3)), zoo.tokens()
    cache = kind(config=model.config, **({"max_cache_len": 16} if kind is StaticCache else {}))
    build()(ids[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match="filled without ropemods seeing"):
        compiled(model)(ids[:, 6:], past_key_values=cache)


@torch.no_grad()
def test_decoding_padded_rows_compiles_once() -> None:
    model = rm.apply(build(), LearnedSink(init=0.3))
    counter = CompileCounterWithBackend("eager")
    run, graphs = compiled(model, counter), []
    for seed in (0, 1):
        ids, mask = padded(3, 0, length=12, seed=seed)
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        for t in range(6, 12):
            seen = torch.nn.functional.pad(mask[:, : t + 1], (0, 15 - t))
            step = run(ids[:, t : t + 1], attention_mask=seen, past_key_values=cache)
            close(step.logits[:, 0], whole[:, t], 2e-5)
            graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@torch.no_grad()
def test_an_exported_model_refuses_what_the_model_refuses() -> None:
    model, ids = rm.apply(build(), LearnedSink(init=0.3)), zoo.tokens()
    exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
    close(exported(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 1e-5)
    ids[0, 0] = 9
    with pytest.raises(ValueError, match="row 0 begins at column 0 with token 9"):
        exported(ids, use_cache=False)
