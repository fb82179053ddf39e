"""Calibration: what a batch may be, what is read from it, and that its effect on the loss is told."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import ropemods as rm
from ropemods.model import attention_function, distillation, starting_values
from ropemods.training.batches import Rows, first_sequences
from tests import zoo
from tests.contract import close


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    stages = [module for name, module in model.named_modules() if name.endswith("ropemods.learned_sink")]
    return torch.stack([stage.sink_H(torch.float32).detach() for stage in stages])


def right_padded(token: int) -> torch.Tensor:
    ids = zoo.tokens()
    ids[1, 7:] = token
    return ids


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (zoo.tokens().tolist(), r"not list; torch.tensor\(rows\)"),
        (BatchEncoding({"input_ids": zoo.tokens()}), "not BatchEncoding; pass its input_ids"),
        (zoo.tokens()[0], r"not one of shape \(12,\)"),
        (zoo.tokens().float(), r"dtype torch.float32"),
        (zoo.tokens() > 3, r"dtype torch.bool"),
        (zoo.tokens()[:0], "0 rows of 12 tokens"),
        (zoo.tokens()[:, :0], "2 rows of 0 tokens"),
        (torch.tensor([[zoo.BOS]]), "1 rows of 1 tokens, so no token follows a BOS"),
        (zoo.tokens() + zoo.VOCAB, "ids from 62 to .* and the model 61 tokens"),
        (zoo.tokens() - 5, "ids from -4 to"),
        (zoo.tokens()[:, 1:], r"2 of 2 rows do not begin with the BOS token \(1\), row 0 begins with"),
        (torch.nn.functional.pad(zoo.tokens(), (3, 0)), "row 0 begins with 0. Put BOS in front"),
        (right_padded(0), r"row 1 ends in 5 tokens of padding \(0\), .* Cut the rows to 7 tokens"),
        (right_padded(2), r"row 1 ends in 5 tokens of padding \(2\)"),
        (right_padded(zoo.BOS), r"row 1 ends in 5 tokens of padding \(1\)"),
    ],
    ids=str,
)
def test_a_batch_that_cannot_be_read_is_refused_and_leaves_the_model_as_it_was(batch, message) -> None:
    model, ids = zoo.build(), zoo.tokens()
    before = model(ids).logits
    with pytest.raises((ValueError, TypeError), match=message):
        rm.apply(model, rm.LearnedSink(), calibration=batch)
    assert torch.equal(model(ids).logits, before) and not hasattr(model.config, "ropemods")


def test_one_end_of_text_behind_a_row_is_text() -> None:
    ids = zoo.tokens()
    ids[:, -1] = 2
    assert logits_of(rm.apply(zoo.build(), rm.LearnedSink(), strength=0.0, calibration=ids)).abs().max() < 50


@pytest.mark.parametrize(
    "mods",
    [[rm.TruncatedRoPE(0.5)], [rm.LearnedSink(init=0.3)], [rm.ReplacedBos(), rm.AdaptiveTemperature()]],
    ids=lambda mods: " ".join(mod.kind for mod in mods),
)
def test_a_batch_that_nothing_would_read_is_an_error(mods) -> None:
    with pytest.raises(ValueError, match=r"calibration would be used by none of .* leave it out"):
        rm.apply(zoo.build(), *mods, calibration=zoo.tokens())


@pytest.mark.parametrize("read_bos", [False, True])
@pytest.mark.parametrize(("architecture", "backend"), [("llama", "sdpa"), ("gemma3_text", "eager")])
def test_the_sink_takes_the_mass_that_bos_had_whether_bos_is_still_read_or_not(read_bos, architecture, backend) -> None:
    ids = zoo.tokens(rows=16)
    had = zoo.build(architecture, "eager")(ids, output_attentions=True).attentions[0]
    model = rm.apply(zoo.build(architecture, backend), rm.LearnedSink(read_bos=read_bos), strength=1.0, calibration=ids)
    taken, seen = [], torch.ones(ids.shape[1] - 1, dtype=torch.bool)
    if architecture == "gemma3_text":
        seen = torch.arange(1, ids.shape[1]) < 4  # its first layer has a window, and further on BOS has left it

    def look(site, rows, call, lse):
        if site.layer == 0:
            taken.append(torch.exp(rows.slots[0].logit[:, None] - lse)[:, :, 1:])

    with attention_function.observed(look, of=model, want_lse=True), torch.no_grad():
        model(ids)
    wanted, found = had[:, :, 1:, 0], taken[0]
    assert wanted[:, :, ~seen].sum() == 0
    close(found.mean((0, 2)), wanted.mean((0, 2)), 1e-5)


def test_a_sink_beside_bos_needs_no_bos_but_for_calibration() -> None:
    model, ids = zoo.build(), zoo.tokens()
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match=r"names no BOS token.*or give it a number to start from"):
        rm.apply(model, rm.LearnedSink(read_bos=True), calibration=ids)
    rm.apply(model, rm.LearnedSink(read_bos=True))
    ids[:, 0] = 9
    model(ids)


def test_a_calibrated_sink_beside_bos_goes_on_without_bos() -> None:
    """BOS is looked for to calibrate; afterwards nothing of it is needed."""
    model, ids = rm.apply(zoo.build(), rm.LearnedSink(read_bos=True), calibration=zoo.tokens(rows=8)), zoo.tokens()
    ids[:, 0] = 9
    model(ids)


# What it costs


def told(*mods: rm.Mod, calibration: torch.Tensor | None, strength: float = 0.0, model=None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rm.apply(model or zoo.build(), *mods, strength=strength, calibration=calibration)
    return [str(each.message) for each in caught if "untrained, at strength 1" in str(each.message)]


def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


@pytest.fixture(scope="module")
def fitted() -> tuple[torch.nn.Module, torch.Tensor]:
    """A model that has learned its batch, so that what disturbs it raises the loss."""
    model, ids = zoo.build().train(), zoo.tokens(rows=4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval(), ids


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_rise_of_the_loss_on_the_batch_is_told_with_its_size_and_with_what_costs_less(fitted, strength) -> None:
    model, ids = fitted
    stock = loss(model, ids)
    modified = copy.deepcopy(model)
    (message,) = told(rm.LearnedSink(raised=3.0), calibration=ids, strength=strength, model=modified)
    assert all(torch.equal(modified.get_parameter(name), p) for name, p in model.named_parameters())
    assert modified.ropemods_attached.strength == {"learned_sink": strength}
    rm.set_strength(modified, 1.0)
    whole = loss(modified, ids)
    assert whole > 1.01 * stock
    assert f"from {stock:.3f} to {whole:.3f} ({whole / stock - 1:+.1%})" in message
    for other in (rm.LearnedSink(init=0.0), rm.LearnedSink(init=0.0, read_bos=True)):
        cost = loss(rm.apply(copy.deepcopy(model), other), ids)
        assert (f"{other} ({cost / stock - 1:+.1%})" in message) == (cost < whole)
    assert "strength 0 with a StrengthSchedule" in message
    calibrated = rm.apply(copy.deepcopy(model), rm.LearnedSink(raised=3.0), strength=0.0, calibration=None)
    assert not torch.equal(logits_of(modified), logits_of(calibrated))


def test_what_was_tried_leaves_no_trace(fitted) -> None:
    """The modifications on the model are those that were asked for, calibrated as if nothing else had been tried."""
    model, ids = fitted
    mods = rm.LearnedSink(raised=3.0, layers=[0]), rm.AdaptiveTemperature(trainable="head")
    one = copy.deepcopy(model)
    assert told(*mods, calibration=ids, model=one)
    rows = zoo.tokens(rows=4)
    other = rm.apply(copy.deepcopy(model), *mods, strength=0.0)
    starting_values.calibrate(other, ids)
    assert torch.equal(logits_of(one), logits_of(other))
    for strength in (0.0, 0.7):
        rm.set_strength(one, strength)
        rm.set_strength(other, strength)
        assert torch.equal(one(rows).logits, other(rows).logits)
    assert torch.equal(rm.remove(one)(rows).logits, model(rows).logits)


def test_several_modifications_are_told_apart(fitted) -> None:
    model, ids = fitted
    (message,) = told(rm.LearnedSink(raised=3.0), rm.TruncatedRoPE(0.25), calibration=ids, model=copy.deepcopy(model))
    cost = loss(rm.apply(copy.deepcopy(model), rm.TruncatedRoPE(0.25)), ids) / loss(model, ids) - 1
    assert f"TruncatedRoPE(keep=0.25) alone {cost:+.1%}" in message


def test_what_costs_next_to_nothing_is_not_told(fitted) -> None:
    model, ids = fitted
    assert not told(rm.LearnedSink(raised=-40.0, read_bos=True), calibration=ids, model=model)
    rm.remove(model)


def test_without_a_batch_nothing_is_told() -> None:
    assert not told(rm.LearnedSink(init=9.0), calibration=None, strength=1.0)


# Recipes


def test_a_recipe_calibrates_on_first_sequences_without_padding() -> None:
    tokens = np.arange(5 * 8, dtype=np.int32).reshape(5, 8)
    positions = np.tile(np.arange(8, dtype=np.int32), (5, 1))
    positions[0, 5:] = -1  # padded
    positions[2, 6:] = [0, 1]  # packed
    rows = Rows(tokens, positions)
    assert first_sequences(rows, 3).tolist() == [tokens[i].tolist() for i in (1, 3, 4)]
    assert first_sequences(rows, 4).tolist() == [tokens[i, :6].tolist() for i in (1, 2, 3, 4)]
    assert first_sequences(rows, 9).tolist() == tokens[:, :5].tolist()
    whole = Rows(tokens, np.tile(np.arange(8, dtype=np.int32), (5, 1)))
    assert first_sequences(whole, 2).tolist() == tokens[:2].tolist()


def divergence(model, stock, ids) -> float:
    with torch.no_grad():
        wanted, found = (each.eval()(ids).logits.double().log_softmax(-1) for each in (stock, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("read_bos", [False, True])
def test_a_distilled_sink_says_more_of_what_the_model_said_than_a_calibrated_one(read_bos) -> None:
    """On text that it was not fitted on either; the weights stand still, and training departs from what was found."""
    batch, other, found = zoo.tokens(rows=8), zoo.tokens(rows=8, seed=5), {}
    stock = zoo.build()
    for init in ("calibrated", "distilled"):
        model = zoo.build().train()
        before = {name: p.clone() for name, p in model.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rm.apply(model, rm.LearnedSink(init=init, read_bos=read_bos), calibration=batch)
        found[init] = [divergence(model, stock, ids) for ids in (batch, other)]
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        sinks = [module for module in model.modules() if hasattr(module, "sink_H")]
        assert len(sinks) == 2 and all(sink.logit.eq(0).all() for sink in sinks)
    assert all(fitted < read for fitted, read in zip(found["distilled"], found["calibrated"], strict=True))


def test_a_distilled_sink_is_saved_with_what_was_fitted(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = rm.apply(zoo.build(), rm.LearnedSink(init="distilled"), calibration=zoo.tokens(rows=4))
    model.save_pretrained(tmp_path)
    assert torch.equal(rm.from_pretrained(tmp_path).eval()(zoo.tokens()).logits, model.eval()(zoo.tokens()).logits)


def test_a_distilled_sink_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="fitted to what the model says of a text: give calibration="):
        rm.apply(zoo.build(), rm.LearnedSink(init="distilled"))


def test_a_start_is_found_once_though_other_forms_are_tried(monkeypatch) -> None:
    """Distilling takes minutes on a real model; what it found is kept while gentler forms are put on in its place."""
    runs, distil = [], distillation.distil
    monkeypatch.setattr(distillation, "distil", lambda *given: (runs.append(1), distil(*given)))
    monkeypatch.setattr(starting_values, "NOTICEABLE", -1.0)
    with pytest.warns(UserWarning, match="LearnedSink"):
        model = rm.apply(zoo.build(), rm.LearnedSink(init="distilled"), calibration=zoo.tokens(rows=4))
    assert len(runs) == 1
    monkeypatch.setattr(starting_values, "NOTICEABLE", 1.0)
    alone = rm.apply(zoo.build(), rm.LearnedSink(init="distilled"), calibration=zoo.tokens(rows=4))
    assert len(runs) == 2 and torch.equal(model(zoo.tokens()).logits, alone(zoo.tokens()).logits)
