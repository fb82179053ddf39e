from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from evals import tiny_models
from ropemods.mods import DroppedRoPE
from tests import zoo
from tests.contract import ModContract, close


class TestContract(ModContract):
    everywhere = False
    variants = {
        "all": [DroppedRoPE()],
        "every second": [DroppedRoPE(every=2)],
        "layers": [DroppedRoPE(layers=[0]), rm.LearnedSink(init=0.3)],
    }


def test_the_chosen_layers_do_not_see_positions() -> None:
    """With no rotation anywhere, the last token reads the earlier ones as a bag of keys in the first layer."""
    ids = zoo.tokens(rows=1, length=9)
    shuffled = ids.clone()
    shuffled[0, 1:8] = ids[0, 1:8].flip(0)
    stock = zoo.build(num_hidden_layers=1)
    model = rm.apply(zoo.build(num_hidden_layers=1), DroppedRoPE())
    assert (stock(ids).logits - stock(shuffled).logits)[0, -1].abs().max() > 1e-4
    close(model(ids).logits[0, -1], model(shuffled).logits[0, -1], 1e-5)


def test_every_counts_layers_from_one() -> None:
    assert DroppedRoPE(every=4).acts_on(12) == {3, 7, 11} and DroppedRoPE(every=1).acts_on(3) == {0, 1, 2}
    model = rm.apply(zoo.build(), DroppedRoPE(every=2))
    assert "layers 1 of 2" in rm.summary(model)
    assert torch.equal(model(zoo.tokens()).logits, rm.apply(zoo.build(), DroppedRoPE(layers=[1]))(zoo.tokens()).logits)
    with pytest.raises(ValueError, match="chooses none of this model's 2"):
        rm.apply(zoo.build(), DroppedRoPE(every=3))


def test_all_layers_are_p_rope_that_keeps_nothing(tmp_path) -> None:
    ids, model = zoo.tokens(), rm.apply(zoo.build(), DroppedRoPE())
    assert torch.equal(model(ids).logits, rm.apply(zoo.build(), rm.TruncatedRoPE(0.0))(ids).logits)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 2, "layers": [0]}])
def test_what_makes_no_sense_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="every"):
        DroppedRoPE(**options)


def test_some_layers_are_exported_where_the_config_has_a_word_for_them(tmp_path) -> None:
    config = tiny_models.config_of("smollm3")
    config.no_rope_layers = [1] * config.num_hidden_layers
    stock, ids = tiny_models.from_config(config), zoo.tokens()
    model = rm.apply(stock, DroppedRoPE(every=2))
    rm.export(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.no_rope_layers[:2] == [1, 0]
    close(loaded(ids).logits, model(ids).logits, 1e-6)


def test_some_layers_are_refused_where_it_has_none_or_means_more_by_it(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"DroppedRoPE.*acts on some layers only"):
        rm.export(rm.apply(zoo.build(), DroppedRoPE(layers=[0])), tmp_path)
    config = tiny_models.config_of("smollm3")
    config.no_rope_layers = [1] * config.num_hidden_layers
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 8.0,
    }  # its tables are scaled, dropped too
    model = rm.apply(tiny_models.from_config(config), DroppedRoPE(layers=[0]))
    with pytest.raises(ValueError, match="does more than this model at positions"):
        rm.export(model, tmp_path)
    assert not list(tmp_path.iterdir())
