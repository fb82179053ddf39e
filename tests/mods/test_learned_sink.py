from __future__ import annotations

import pytest
import torch

import ropemods as rm
from ropemods.hooks import interface
from ropemods.mods import AdaptiveTemperature, LearnedSink, ReplacedBos, TruncatedRoPE, UnrotatedBos
from tests import zoo
from tests.contract import ModContract, close


class TestContract(ModContract):
    variants = {
        "closed": [LearnedSink(init=0.3)],
        "open": [LearnedSink(init=-0.2, read_bos=True)],
        "one-layer": [LearnedSink(init=0.3, layers=[0])],
        "everything": [
            TruncatedRoPE(0.5),
            AdaptiveTemperature(trainable="head", spare_bos=True),
            UnrotatedBos(),
            ReplacedBos("mean"),
            LearnedSink(init=0.1, read_bos=True),
        ],
        "closed-tempered": [LearnedSink(init=0.3), AdaptiveTemperature(), TruncatedRoPE(0.5)],
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_later_tokens_do_not_read_a_closed_bos(backend: str) -> None:
    model = rm.apply(zoo.build("llama", backend), LearnedSink(init=0.3))
    ids = zoo.tokens()
    before = model(ids).logits[:, 1:]
    with torch.no_grad():
        model.model.embed_tokens.weight[zoo.BOS] += 1.0
    assert torch.equal(model(ids).logits[:, 1:], before)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_calibrated_sink_takes_the_mass_that_bos_had(backend: str) -> None:
    ids, stock = zoo.tokens(rows=16), zoo.build("llama", "eager")
    had = stock(ids, output_attentions=True).attentions[0][:, :, 1:, 0].mean((0, 2))
    model = rm.apply(zoo.build("llama", backend), LearnedSink(), calibration=ids)
    taken = []

    def look(site, rows, call, lse):
        if site.layer == 0:
            taken.append(torch.exp(rows.sink_H[:, None] - lse)[:, :, 1:].mean((0, 2)))

    with interface.observed(look, of=model, want_lse=True), torch.no_grad():
        model(ids)
    close(taken[0], had, 1e-5)


def test_a_raised_start_stands_above_the_calibrated_one() -> None:
    ids = zoo.tokens(rows=16)
    logits = [
        torch.stack(
            [p for n, p in rm.apply(zoo.build(), mod, calibration=ids).named_parameters() if n.endswith("logit")]
        )
        for mod in (LearnedSink(), LearnedSink(raised=1.5))
    ]
    close(logits[1], logits[0] + 1.5, 1e-6)
    assert logits[0].std() > 0
    with pytest.raises(ValueError, match="give the sum as init"):
        LearnedSink(init=1.0, raised=1.0)
    with pytest.raises(ValueError, match="raised must be a number"):
        LearnedSink(raised=True)


def test_the_order_of_the_modifications_does_not_matter() -> None:
    mods = [AdaptiveTemperature(), LearnedSink(init=0.3, read_bos=True), UnrotatedBos()]
    ids = zoo.tokens()
    one, other = (rm.apply(zoo.build("llama"), *order)(ids).logits for order in (mods, mods[::-1]))
    close(one, other, 1e-6)


@pytest.mark.parametrize("other", [UnrotatedBos(), ReplacedBos()])
def test_what_a_closed_column_cancels_is_refused(other) -> None:
    with pytest.raises(ValueError, match=r"LearnedSink closes .*read_bos=True"):
        rm.apply(zoo.build("llama"), LearnedSink(), other)
    with pytest.raises(ValueError, match="LearnedSink closes"):
        rm.apply(zoo.build("llama"), other, LearnedSink())


def test_attention_dropout_is_refused_where_the_kernels_cannot_do_it() -> None:
    """At `apply`, not at the first training step; a checkpoint still loads to be read from."""
    with pytest.raises(ValueError, match=r"attention dropout of 0.1.*attention_dropout = 0.*'eager'"):
        rm.apply(zoo.build("llama", "sdpa", attention_dropout=0.1), LearnedSink())
    rm.apply(zoo.build("llama", "sdpa", attention_dropout=0.1), AdaptiveTemperature())
    rm.apply(zoo.build("llama", "eager", attention_dropout=0.1), LearnedSink())


def test_a_model_trained_with_dropout_is_read_on_the_fused_path(tmp_path) -> None:
    model, ids = rm.apply(zoo.build("llama", "eager", attention_dropout=0.1), LearnedSink()), zoo.tokens()
    model.save_pretrained(tmp_path)
    close(rm.from_pretrained(tmp_path, attn_implementation="sdpa")(ids).logits, model(ids).logits, 2e-5)


def test_bad_options_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="a number or 'calibrated'"):
        LearnedSink(init="guess")
    with pytest.raises(ValueError, match="read_bos must be true or false"):
        LearnedSink(read_bos="no")
