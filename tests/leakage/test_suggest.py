"""`suggest`: wavelengths and phases are the model's, cuts keep within both limits, sinks take what BOS had."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ropemods as rm
from ropemods.leakage.suggestion import Band, Ladder, _cut
from tests import zoo
from tests.leakage.small import documents, tokenizer


def suggested(model: torch.nn.Module, length: int = 64, **options: object) -> rm.Suggestion:
    return rm.suggest(model, tokenizer(), documents(), length, sequences=8, crop=64, progress=False, **options)


def bands(phases: list[float], shares: list[float]) -> Ladder:
    rows = zip(range(len(phases)), phases, shares, strict=True)
    return Ladder(
        layers=(0,),
        bands=tuple(
            Band(index=n, wavelength=6.28, cycles=p / 6.28, phase=p, query_share=s, key_share=s) for n, p, s in rows
        ),
    )


def test_bands_are_the_models_own() -> None:
    (ladder,) = suggested(zoo.build("llama"), length=1000).ladders
    assert ladder.layers == (0, 1)
    for n, band in enumerate(ladder.bands):
        frequency = 100.0 ** (-n / 4)
        assert band.wavelength == pytest.approx(2 * math.pi / frequency, rel=1e-5)
        assert band.phase == pytest.approx(1000 * frequency, rel=1e-5)
        assert band.cycles == pytest.approx(band.phase / (2 * math.pi))
    assert sum(band.query_share for band in ladder.bands) == pytest.approx(1)
    assert sum(band.key_share for band in ladder.bands) == pytest.approx(1)


def test_layers_of_several_tables_have_ladders_of_their_own() -> None:
    ladders = suggested(zoo.build("gemma3_text")).ladders
    assert [ladder.layers for ladder in ladders] == [(0,), (1,)]
    assert ladders[0].bands[1].wavelength != ladders[1].bands[1].wavelength


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 1)), min_size=2, max_size=20),
    st.floats(0.1, 10),
    st.floats(0.05, 0.9),
)
def test_a_cut_keeps_within_both_limits_and_one_more_band_would_not(
    rows: list[tuple[float, float]], max_phase: float, max_usage: float
) -> None:
    phases = sorted((phase for phase, _ in rows), reverse=True)
    total = sum(share for _, share in rows)
    shares = [share / total for _, share in rows]
    ladder = bands(phases, shares)
    dropped, reason = _cut(ladder, 64, max_phase, max_usage)
    gone = ladder.bands[len(ladder.bands) - dropped :]
    assert all(band.phase <= max_phase for band in gone)
    assert sum(band.query_share for band in gone) <= max_usage + 1e-9
    assert dropped < len(rows) and reason
    if dropped < len(rows) - 1:
        after = ladder.bands[len(ladder.bands) - dropped - 1]
        assert after.phase > max_phase or sum(b.query_share for b in (after, *gone)) > max_usage - 1e-9


@given(st.integers(2, 128).flatmap(lambda F: st.tuples(st.integers(1, F - 1), st.just(F))))
@example((57, 100))
def test_the_share_is_one_that_TruncatedRoPE_floors_to_the_bands_meant(case: tuple[int, int]) -> None:
    kept, F = case
    frequencies = rm.TruncatedRoPE.keeping(kept, F).frequencies(torch.ones(F), 1.0)
    assert int((frequencies > 0).sum()) == kept


def test_the_proposed_cut_can_be_applied() -> None:
    model = zoo.build("llama")
    suggestion = suggested(model, length=16, max_phase=2.0, max_usage=0.9)
    assert suggestion.keep is not None and "drops" in suggestion.keep_reason
    rm.apply(model, rm.TruncatedRoPE(suggestion.keep))


def test_no_cut_is_proposed_where_the_slowest_band_is_fast() -> None:
    suggestion = suggested(zoo.build("llama"), length=100_000)
    assert suggestion.keep is None and "no band may go" in suggestion.keep_reason
    assert "no cut" in suggestion.to_markdown()


def test_a_sink_at_the_proposed_logit_takes_the_mass_that_bos_had() -> None:
    model = zoo.build("llama")
    suggestion = suggested(model)
    from ropemods.leakage.crops import make_crops
    from ropemods.leakage.documents import read_documents

    protocol = rm.Protocol(sequences=8, length=64, groups=8, early=(8, 32), grid_rows=16, mask_term=False)
    ids = make_crops(read_documents(documents()), tokenizer(), protocol).tokens_NT
    rm.apply(model, rm.LearnedSink(), strength=0.0, calibration=ids)
    for layer, row in zip(model.model.layers, suggestion.sink, strict=True):
        assert row == pytest.approx(layer.self_attn.ropemods.learned_sink.start.tolist(), abs=1e-3)


def test_it_is_written_whole_and_reads_as_a_table(tmp_path: Path) -> None:
    suggestion = suggested(zoo.build("llama"))
    data = json.loads(suggestion.to_json(tmp_path / "s.json").read_text())
    assert data["keep"] == suggestion.keep and data["kind"] == "suggestion"
    assert "wavelength, tokens" in suggestion.to_markdown()


def test_bad_input_is_an_error_that_says_what_to_do() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match="length=1"):
        suggested(zoo.build("llama"), length=1)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=zoo.VOCAB, n_positions=64)
    with pytest.raises(ValueError, match="no rotary bands"):
        suggested(GPT2LMHeadModel(config))


@pytest.mark.parametrize("crop", [16, 17, 20])
def test_short_crops_will_do(crop: int) -> None:
    suggestion = rm.suggest(zoo.build("llama"), tokenizer(), documents(), 64, sequences=9, crop=crop, progress=False)
    assert len(suggestion.sink) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop": 15}, "length=15: at least 16"),
        ({"sequences": 4}, "sequences=4 .* use 8$"),
        ({"max_phase": float("nan")}, "max_phase=nan: at least 0"),
        ({"max_usage": -1.0}, "max_usage=-1.0: at least 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rm.suggest(zoo.build("llama"), tokenizer(), documents(), 64, progress=False, **options)
