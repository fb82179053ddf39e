"""A model that is changed under its modifications: noticed at the next forward pass, compiled or not, or followed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

import ropemods as rm
from ropemods.model import attention_function
from ropemods.model.observation import observing
from tests import zoo
from tests.contract import close


def renamed(model: PreTrainedModel) -> None:
    model.config._attn_implementation = "sdpa"


def set_to(name: str) -> Callable[[PreTrainedModel], None]:
    return lambda model: model.set_attn_implementation(name)


def other_embedding(model: PreTrainedModel) -> None:
    old = model.get_input_embeddings()
    new = nn.Embedding(*old.weight.shape)
    new.weight = old.weight
    model.set_input_embeddings(new)


SINK, ZERO = rm.LearnedSink(init=0.3), rm.ReplacedBos("zero")
CHANGES = {
    "the implementation it had": (SINK, set_to("sdpa"), "set to 'sdpa' after ropemods.apply"),
    "another implementation": (SINK, set_to("eager"), "set to 'eager' after ropemods.apply"),
    "our name for another": (SINK, set_to("ropemods+eager"), "set to 'ropemods\\+eager' after"),
    "the name in the config": (SINK, renamed, "set_attn_implementation\\('ropemods\\+sdpa'\\)"),
    "the embedding": (ZERO, other_embedding, "input embedding of this model was replaced.*replaced_bos"),
}


@pytest.mark.parametrize("called", ["model", "decoder", "summary", "measured", "exported"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_takes_a_modification_off_is_an_error_at_the_next_call(change, called, tmp_path) -> None:
    mod, make, message = CHANGES[change]
    model, ids = rm.apply(zoo.build(), mod), zoo.tokens()
    make(model)
    with pytest.raises(ValueError, match=message):
        if called == "model":
            model(ids)
        elif called == "decoder":
            model.model(ids)
        elif called == "summary":
            rm.summary(model)
        elif called == "measured":
            with observing(model):
                pass
        else:
            rm.export(model, tmp_path)


@pytest.mark.parametrize("change", ["another implementation", "the embedding"])
def test_it_is_an_error_at_the_next_call_of_a_compiled_model_too(change) -> None:
    mod, make, message = CHANGES[change]
    model, ids = rm.apply(zoo.build(), mod), zoo.tokens()
    compiled = torch.compile(model, backend="eager")
    compiled(ids, use_cache=False)
    make(model)
    with pytest.raises(ValueError, match=message):
        compiled(ids, use_cache=False)
    torch._dynamo.reset()


def test_what_was_set_back_runs_as_before() -> None:
    model, ids = rm.apply(zoo.build(), SINK), zoo.tokens()
    before = model(ids).logits
    model.set_attn_implementation("eager")
    model.set_attn_implementation("ropemods+sdpa")
    assert torch.equal(model(ids).logits, before)


def test_a_model_with_another_implementation_is_reloaded_on_it(tmp_path) -> None:
    model, ids = rm.apply(zoo.build(), SINK), zoo.tokens()
    before = model(ids).logits
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    close(rm.from_pretrained(tmp_path, attn_implementation="eager")(ids).logits, before, 1e-5)


def test_tables_and_the_embedding_do_not_mind_another_implementation() -> None:
    model, ids = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5), ZERO), zoo.tokens()
    before = model(ids).logits
    model.set_attn_implementation("eager")
    close(model(ids).logits, before, 1e-5)
    assert "attention: eager ·" in rm.summary(model)


def test_what_was_compiled_before_is_compiled_again() -> None:
    """Also where nothing changes that a graph looks at: a selection of layers is given its tables by a hook."""
    model, ids = zoo.build(), zoo.tokens()
    compiled = torch.compile(model, backend="eager")
    stock = compiled(ids, use_cache=False).logits
    rm.apply(model, rm.TruncatedRoPE(0.5, layers=[0]))
    close(compiled(ids, use_cache=False).logits, model(ids).logits, 1e-6)
    rm.remove(model)
    assert torch.equal(compiled(ids, use_cache=False).logits, stock)
    torch._dynamo.reset()


def test_asking_recompiles_nothing() -> None:
    mods = (rm.LearnedSink(init=0.3, read_bos=True), ZERO, rm.TruncatedRoPE(0.5))
    model, ids = rm.apply(zoo.build(), *mods), zoo.tokens()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(ids, use_cache=False)
    graphs = counter.frame_count
    for _ in range(2):
        compiled(ids, use_cache=False)
    assert counter.frame_count == graphs > 0
    torch._dynamo.reset()


def test_a_resized_embedding_keeps_what_stands_at_bos() -> None:
    model, ids = rm.apply(zoo.build(), ZERO), zoo.tokens()
    before = model(ids).logits
    model.resize_token_embeddings(zoo.VOCAB + 3)
    close(model(ids).logits[..., : zoo.VOCAB], before, 1e-6)
    assert not model.get_input_embeddings()(ids)[:, 0].any()


def test_an_observer_sees_its_own_model_only() -> None:
    """Also a model of the same class with the same modifications, as a teacher beside its student."""
    one, other, ids = rm.apply(zoo.build(), SINK), rm.apply(zoo.build(), SINK), zoo.tokens()
    seen = []
    with attention_function.observed(lambda *call: seen.append(call[0]), of=one, want_lse=False):
        other(ids)
        assert not seen
        one(ids)
    assert [site is layer.self_attn.ropemods_site for site, layer in zip(seen, one.model.layers, strict=True)]


def test_models_are_modified_in_threads_at_the_same_time() -> None:
    ids, wanted = zoo.tokens(), rm.apply(zoo.build(), SINK, rm.TruncatedRoPE(0.5))(zoo.tokens()).logits
    models = [zoo.build() for _ in range(8)]
    failures: list[BaseException] = []

    def work(model: PreTrainedModel) -> None:
        try:
            rm.apply(model, SINK, rm.TruncatedRoPE(0.5))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(torch.equal(model(ids).logits, wanted) for model in models)
