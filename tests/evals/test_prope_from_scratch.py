"""The from-scratch variants differ in their rotary frequencies and in nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evals import prope_from_scratch as program
from ropemods.attention.reference import truncated_frequencies

PROTOCOL = program.PROTOCOL["nano"] | {"hidden_size": 48, "num_hidden_layers": 1, "vocab_size": 300}


def frequencies(variant: str):
    model = program.build(variant, 3, 0, PROTOCOL)
    return model, model.model.rotary_emb.inv_freq


def test_each_variant_has_the_frequencies_of_its_name() -> None:
    half = PROTOCOL["hidden_size"] // PROTOCOL["num_attention_heads"] // 2
    ladder = {theta: theta ** (-torch.arange(half) / half) for theta in (1e4, 5e5)}
    wanted = {
        "RoPE, θ 10k": ladder[1e4],
        "RoPE, θ 500k": ladder[5e5],
        "NoPE": torch.zeros(half),
        "0.75-RoPE": truncated_frequencies(ladder[1e4], keep=0.75),
        "0.25-RoPE": truncated_frequencies(ladder[1e4], keep=0.25),
        "0.75, reversed": truncated_frequencies(ladder[1e4], keep=0.75, which="highest"),
        # Three quarters of the channels as a model of that head dimension would have them.
        "0.75, partial": torch.cat([1e4 ** (-torch.arange(6) / 6), torch.zeros(2)]),
    }
    assert half == 8 and set(wanted) == set(program.VARIANTS) == set(program.PAPER)
    for variant, table in wanted.items():
        assert torch.allclose(frequencies(variant)[1], table.float(), rtol=1e-5), variant


@pytest.mark.parametrize("variant", [v for v in program.VARIANTS if v != program.STOCK])
def test_the_starting_weights_are_the_same_and_the_outputs_are_not(variant: str) -> None:
    (stock, _), (other, _) = frequencies(program.STOCK), frequencies(variant)
    for (name, one), (_, two) in zip(stock.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    for model in (stock, other):
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.data.mul_(20)  # untrained rows are all but uniform, whatever turns
    ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (stock(ids).logits - other(ids).logits).abs().max() > 1e-4


def test_losses_are_those_of_the_next_token() -> None:
    model, _ = frequencies(program.STOCK)
    rows = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    found = program.losses_NT(model, rows)
    with torch.no_grad():
        log_p = model(rows).logits.log_softmax(-1)
    assert found.shape == (3, 19)
    assert float(found[1, 4]) == pytest.approx(-float(log_p[1, 4, rows[1, 5]]), abs=1e-5)


def test_the_bootstrap_s_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = program.bootstrapped(values)
    half = 1.96 * values.std() / 20
    assert found["value"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)
