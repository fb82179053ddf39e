"""Controls give their known answers, and fail where they should."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ropemods as rm
from ropemods.leakage import known
from ropemods.leakage.controls import coverage, synthetic, within
from ropemods.leakage.known import planted, reindexed, toeplitz
from ropemods.report.records import Control, Estimate
from tests import zoo
from tests.leakage.small import PROTOCOL, documents, tokenizer


def controls(model: torch.nn.Module, protocol: rm.Protocol = PROTOCOL) -> dict[str, Control]:
    report = rm.measure(model, tokenizer(), documents(), protocol, controls=True, progress=False)
    return {each.name: each for each in report.controls}


def test_every_row_of_the_table_gives_its_known_answer() -> None:
    found = controls(zoo.build("llama"), dataclasses.replace(PROTOCOL, sequences=64, batch_size=32))
    expected = (
        "Toeplitz logits: residual",
        "Toeplitz logits: mask − total",
        "planted D, constant window: mask",
        "planted D, constant window: residual",
        "planted D, constant window: total",
        "coverage of the planted value",
        "coverage of a planted 0",
        "layer 0: residual",
        "queries in random order: residual",
        "position_ids + 100: change of logits in float32",
        "position_ids + 100: change of logits in bfloat16",
        "position 0 across prompts: change of logits",
    )
    assert tuple(found) == expected
    assert [name for name, each in found.items() if not each.passed] == []
    exact, rounded = (found[f"position_ids + 100: change of logits in {name}"] for name in ("float32", "bfloat16"))
    assert 0 < exact.value < rounded.value / 100


def test_learned_positions_fail_the_controls_that_they_should() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=zoo.VOCAB, n_positions=256, initializer_range=0.3)
    found = controls(GPT2LMHeadModel(config))
    assert not found["layer 0: residual"].passed
    assert not found["position_ids + 100: change of logits in float32"].passed
    assert found["queries in random order: residual"].passed
    assert found["position 0 across prompts: change of logits"].passed


@pytest.mark.parametrize("mod", [rm.AdaptiveTemperature(), rm.LogTemperature(start="log")], ids=str)
def test_layer_0_is_no_control_where_rows_are_scaled(mod: rm.Mod) -> None:
    assert "layer 0: residual" not in controls(rm.apply(zoo.build("llama"), mod))
    assert "layer 0: residual" in controls(rm.apply(zoo.build("llama"), mod, strength=0.0))


def test_what_is_planted_is_what_is_found() -> None:
    sizes = [planted(size).truth for size in (0.0, 0.5, 1.0, 2.0)]
    assert sizes[0] < 1e-20 and sizes == sorted(sizes)
    term = planted(2.0).measured(4, 3, mask_term=False)["residual"]
    assert term.all.low <= sizes[3] <= term.all.high
    assert term.all.low > sizes[2]  # and it is told from another
    assert toeplitz().measured(2, 0, mask_term=False)["residual"].all.value == pytest.approx(0, abs=1e-10)


def test_coverage_fails_where_intervals_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coverage("", planted(1.0), 60).passed
    wrong = dataclasses.replace(planted(1.0), truth=planted(1.3).truth)
    assert not coverage("", wrong, 60).passed
    monkeypatch.setattr(known, "PROTOCOL", dataclasses.replace(known.PROTOCOL, confidence=0.5))
    assert not coverage("", planted(1.0), 200).passed


def test_an_estimate_passes_when_its_interval_holds_the_answer() -> None:
    assert within("", 0.0, Estimate(0.1, -0.1, 0.3)).passed
    assert not within("", 0.0, Estimate(0.3, 0.1, 0.5)).passed


def test_reindexing_moves_whole_queries_from_w_on_and_differs_by_head_and_call() -> None:
    w, reindex = PROTOCOL.window, reindexed(PROTOCOL, 0)
    band = torch.arange(32.0)[:, None].expand(2, 3, 32, w) + torch.arange(w) / 10
    first, second = reindex(band), reindex(band)
    assert torch.equal(first[:, :, :w], band[:, :, :w])
    assert torch.equal(first[..., 0].sort(-1).values, band[..., 0])
    assert torch.allclose(first - first[..., :1], band - band[..., :1])
    assert not torch.equal(first, second) and not torch.equal(first[:, 0], first[:, 1])


def test_synthetic_controls_are_reproducible() -> None:
    assert synthetic(20) == synthetic(20)
