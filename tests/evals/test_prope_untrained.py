"""What stopping frequencies costs: the differences' intervals, and that what is stopped is what was named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ropemods as rm
from evals.prope_untrained import StoppedBand, crop_losses, paired
from tests import zoo


@pytest.mark.parametrize("true", [0.0, 0.3])
def test_the_interval_covers_the_true_difference(true: float) -> None:
    """Three crops, as few as a program reads; what the documents do to both drops out."""
    draw, covered, values = np.random.default_rng(0), 0, []
    for _ in range(400):
        stock_N = draw.normal(4, 1, 3)
        found = paired((stock_N + draw.normal(true, 0.1, 3)).tolist(), stock_N.tolist())
        covered += found["low"] <= true <= found["high"]
        values.append(found["value"])
    assert 0.92 <= covered / 400 <= 0.98
    assert np.mean(values) == pytest.approx(true, abs=0.012)


def test_one_band_stops_and_the_others_turn() -> None:
    before_F = torch.tensor([1.0, 0.1, 0.01])
    assert StoppedBand(band=1).frequencies(before_F, 1.0).tolist() == pytest.approx([1.0, 0.0, 0.01])


def test_the_model_is_itself_again_after_each_cut() -> None:
    model = zoo.build("llama").eval()
    rows_NT = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    rows_NT[:, 0] = model.config.bos_token_id
    stock = crop_losses(model, None, rows_NT)
    cuts = [crop_losses(model, mod, rows_NT) for mod in (rm.TruncatedRoPE(keep=0.0), StoppedBand(band=0))]
    assert crop_losses(model, None, rows_NT) == stock
    assert all(cut != stock for cut in cuts) and cuts[0] != cuts[1]
