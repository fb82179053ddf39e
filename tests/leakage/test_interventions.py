"""Interventions: each changes what it says and nothing else, and the known answers hold."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import ropemods as rm
from ropemods.attention import eager
from ropemods.leakage.capture import capture
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import read_documents
from ropemods.leakage.interventions import NAMES, clamp, mean, random_tokens
from ropemods.model import variants
from ropemods.model.attention_function import observed
from ropemods.model.observation import observing
from ropemods.report.records import Estimate, Intervention
from tests import zoo
from tests.leakage.small import PROTOCOL, documents, real, text, tokenizer


def logits(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(zoo.tokens() if ids is None else ids, use_cache=False).logits


def measured(model: torch.nn.Module, *names: str, **options: object) -> rm.Report:
    return rm.measure(model, tokenizer(), documents(), PROTOCOL, interventions=names, progress=False, **options)


def by_name(report: rm.Report) -> dict[str, Intervention]:
    return {each.name: each for each in report.interventions}


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_a_token_put_at_the_input_is_that_token(architecture: str) -> None:
    model, ids = zoo.build(architecture), zoo.tokens()
    swapped = ids.clone()
    swapped[:, 0] = 17
    with variants.at_input(model, variants.embedded(model, [17])[0]):
        assert torch.equal(logits(model, ids), logits(model, swapped))
    assert not torch.equal(logits(model, ids), logits(model, swapped))


@pytest.mark.parametrize("by", ["zero", "mean"])
def test_swaps_agree_with_the_modification_of_the_same_name(by: str) -> None:
    """ReplacedBos(by) at full strength is what the swap measures."""
    early = by_name(measured(zoo.build("llama"), by))[by].early_residual
    modified = measured(rm.apply(zoo.build("llama"), rm.ReplacedBos(by)))
    assert early.value == pytest.approx(modified.terms["residual"].early.value, rel=1e-5)


def test_noise_has_the_norm_of_the_bos_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    put = []
    at_input = variants.at_input
    monkeypatch.setattr(variants, "at_input", lambda model, v: put.append(v) or at_input(model, v))
    model = zoo.build("llama")
    measured(model, "noise")
    bos = variants.embedded(model, [zoo.BOS])[0]
    assert put[0].norm() == pytest.approx(float(bos.norm()), rel=1e-5)
    assert not torch.allclose(put[0], bos)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_another_trajectory_from_block_0_is_the_swap_and_from_the_last_changes_one_block(architecture: str) -> None:
    model, ids = zoo.build(architecture), zoo.tokens()
    swapped = ids.clone()
    swapped[:, 0] = 17
    with observing(model) as observation:
        states = variants.first_states(observation, lambda: logits(model, swapped))
        with variants.at_block(observation, 0, states[0]):
            torch.testing.assert_close(logits(model, ids), logits(model, swapped), rtol=1e-5, atol=1e-5)
        queries: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        with observed(lambda s, r, c, lse: queries[s.layer].append(r.k_BGSD), of=model, want_lse=True):
            logits(model, ids)
            with variants.at_block(observation, 1, states[1]):
                logits(model, ids)
        stock, patched = queries[1]
        assert torch.equal(*queries[0])
        assert torch.equal(stock[:, :, 1:], patched[:, :, 1:]) and not torch.equal(stock[:, :, 0], patched[:, :, 0])


def test_clamped_heads_read_bos_with_their_mean_weight_from_everywhere() -> None:
    model = zoo.build("llama")
    crops = make_crops(read_documents(documents()), tokenizer(), PROTOCOL)
    with observing(model) as observation:
        sums, _ = capture(observation, crops, PROTOCOL)
        change, w = clamp(sums, observation), PROTOCOL.window
        checked = []

        def check(site, rows, call, lse) -> None:
            added = change(site.layer, rows, lse)
            out, p_BHTS, _ = eager.attend(rows)
            wanted = p_BHTS.clone()
            average = sums.layers[site.layer]["bos_mass"][:, w:].mean(1) / PROTOCOL.sequences
            wanted[:, :, 1:, 0] = average[:, None]
            v = rows.v_BGSD.repeat_interleave(2, dim=1)
            torch.testing.assert_close(out + added, wanted @ v, rtol=1e-4, atol=1e-5)
            checked.append(site.layer)

        with torch.no_grad(), observed(check, of=model, want_lse=True):
            logits(model, crops.tokens_NT[:3])
    assert checked == [0, 1]


def test_a_window_switched_off_is_the_model_without_one() -> None:
    model, wide = zoo.build("mistral"), zoo.build("mistral", sliding_window=None)
    ids = zoo.tokens(length=20)
    narrow = logits(model, ids)
    with variants.without_window(model, 20):
        torch.testing.assert_close(logits(model, ids), logits(wide, ids))
    assert torch.equal(logits(model, ids), narrow) and not torch.allclose(narrow, logits(wide, ids))


@pytest.mark.parametrize("kind", zoo.ROPE_SCALINGS)
def test_rope_scaling_switched_off_is_the_plain_ladder(kind: str) -> None:
    model, plain = zoo.build("llama", rope_parameters=zoo.ROPE_SCALINGS[kind]), zoo.build("llama")
    ids = zoo.tokens(length=20)
    scaled = logits(model, ids)
    with variants.without_rope_scaling(model):
        torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids), scaled)


def test_every_intervention_is_reported_with_an_interval_and_its_place() -> None:
    protocol = dataclasses.replace(PROTOCOL, early=(8, 15))  # without BOS there is one query less
    report = rm.measure(
        zoo.build("mistral"), tokenizer(), documents(), protocol, interventions=NAMES, reference=4, progress=False
    )
    found = by_name(report)
    assert {"zero", "mean", "noise", "none", "clamp", "sliding window of 4 off"} < set(found)
    assert {"carrier from block 0", "carrier from block 1", "random token, mean of 4"} < set(found)
    assert any(note.startswith("rope_scaling: nothing to switch off") for note in report.notes)
    for each in found.values():
        assert each.early_residual.low <= each.early_residual.value <= each.early_residual.high


def test_intervals_of_all_interventions_have_the_protocols_confidence() -> None:
    narrow, wide = (
        rm.measure(
            zoo.build("llama"),
            tokenizer(),
            documents(),
            dataclasses.replace(PROTOCOL, confidence=confidence),
            interventions=("zero", "reference", "clamp", "carrier"),
            reference=3,
            progress=False,
        )
        for confidence in (0.5, 0.99)
    )
    for one, other in zip(narrow.interventions, wide.interventions, strict=True):
        inner, outer = (each.early_residual.high - each.early_residual.low for each in (one, other))
        assert outer > 2 * inner, one.name


def test_changes_are_paired_and_ranked_in_the_reference_distribution() -> None:
    model = zoo.build("gpt_neox")
    with torch.no_grad():  # learnt positions make a residual that is far above 0 even in a few crops
        for layer in model.gpt_neox.layers:
            layer.attention.query_key_value.weight.mul_(2)
    report = measured(model, "zero", "reference", "clamp", reference=5)
    before = report.terms["residual"].early
    if not before.low > 0:
        assert any("cannot be told from 0" in note for note in report.notes)
        assert all(math.isnan(each.change.value) and each.rank is None for each in report.interventions)
        return
    for each in report.interventions:
        assert each.change.value == pytest.approx(each.early_residual.value / before.value - 1)


def test_without_a_clear_residual_there_is_no_relative_change() -> None:
    protocol = PROTOCOL
    model = zoo.build("llama")
    with torch.no_grad():  # layers that write nothing leave queries and keys that know no position
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    report = rm.measure(model, tokenizer(), documents(), protocol, interventions=("zero",), progress=False)
    assert math.isnan(report.interventions[0].change.value) and report.interventions[0].rank is None
    assert any("cannot be told from 0" in note for note in report.notes)


def test_reference_tokens_are_ordinary_and_different() -> None:
    crops = make_crops(read_documents(documents()), tokenizer(), PROTOCOL)
    with observing(zoo.build("llama")) as observation:
        tokens = random_tokens(observation, tokenizer(), crops, 40)
        with pytest.raises(ValueError, match="ordinary tokens"):
            random_tokens(observation, tokenizer(), crops, 80)
    assert len(set(tokens)) == 40 and not {0, 1, 2} & set(tokens)


def test_no_bos_is_refused_by_a_model_that_needs_it_and_said_so() -> None:
    model = rm.apply(zoo.build("llama"), rm.UnrotatedBos())
    report = measured(model, "none", "zero")
    assert "none" not in by_name(report) and any(note.startswith("none:") for note in report.notes)


def test_a_mean_of_estimates_is_formed_replicate_by_replicate() -> None:
    draws = np.random.default_rng(0).standard_normal(100)
    both = mean([Estimate(1.0, 0, 2, tuple(1 + draws)), Estimate(3.0, 2, 4, tuple(3 - draws))], 0.95)
    assert both.value == 2 and both.low == pytest.approx(2) and both.high == pytest.approx(2)


def test_bos_carries_the_residual_of_prose3M() -> None:
    """BOS was only ever seen at position 0, and taking it away takes most of the residual away."""
    model, own_tokenizer = real("prose3M")
    protocol = rm.Protocol(sequences=128, length=128, batch_size=32, mask_term=False)
    report = rm.measure(
        model,
        own_tokenizer,
        text("books.valid.jsonl.xz"),
        protocol,
        interventions=("zero", "clamp"),
        progress=False,
    )
    found = by_name(report)
    assert found["zero"].change.high < -0.3 and found["clamp"].change.high < 0
