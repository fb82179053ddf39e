"""How the programs about leakage read their numbers: intervals, verdicts, what counts as recovered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ropemods as rm
from evals import before_after_arms, before_after_page, designs_page, dose, usage
from evals.measured import mean, ratio
from evals.tight_loop import rows_of, train
from ropemods.mods.base import Layout
from ropemods.training.small_models import train_tokenizer
from tests import zoo


def quantity(value: float, seed: int, *, spread: float = 0.1) -> dict[str, Any]:
    draws = value * (1 + spread * np.random.default_rng(seed).standard_normal(400))
    return {"x": {"value": value, "replicates": draws.tolist()}}


def test_an_arm_against_itself_has_no_change_and_no_interval() -> None:
    arm = [quantity(2.0, seed) for seed in range(3)]
    change = ratio(arm, arm, "x")
    assert (change.value, change.low, change.high) == pytest.approx((0, 0, 0))


def test_what_documents_do_to_both_arms_drops_out() -> None:
    arm = [quantity(1.0, 0)]
    scaled = [{"x": {"value": 0.5, "replicates": (0.5 * np.array(arm[0]["x"]["replicates"])).tolist()}}]
    paired, apart = ratio(scaled, arm, "x"), ratio([quantity(0.5, 1)], arm, "x")
    assert paired.value == apart.value == pytest.approx(-0.5)
    assert paired.high - paired.low < 1e-9 < 0.1 < apart.high - apart.low


def test_seeds_that_differ_widen_the_interval() -> None:
    alike = mean([quantity(2.0, seed, spread=0.01) for seed in range(3)], "x")
    unlike = mean([quantity(value, n, spread=0.01) for n, value in enumerate((1.0, 2.0, 3.0))], "x")
    assert unlike.value == pytest.approx(alike.value) and unlike.low < 1.5 < alike.low


def test_arms_of_different_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="paired seed by seed"):
        ratio([quantity(1.0, 0)], [quantity(1.0, n) for n in range(3)], "x")


def test_recovered_is_after_the_last_time_above() -> None:
    control = np.full(40, 4.0)
    late = control.copy()
    late[:16] *= 1.05
    assert before_after_page._recovered(control.tolist(), control.tolist(), 10) == 0
    found = before_after_page._recovered(late.tolist(), control.tolist(), 10)
    assert found is not None and 160 <= found <= 10 * (16 + before_after_page.OVER)
    assert before_after_page._recovered((1.05 * control).tolist(), control.tolist(), 10) is None


@pytest.mark.parametrize(
    ("residual", "loss", "total", "milestone", "goal"),
    [
        ((-0.95, -0.97, -0.92), (0.001, 0.0, 0.0015), (-0.1, -0.2, -0.05), "yes", "yes"),
        ((-0.95, -1.10, -0.80), (0.001, 0.0, 0.0015), (-0.1, -0.2, -0.05), "yes", "by its value"),
        ((-0.95, -0.97, -0.92), (0.001, 0.0, 0.0015), (0.3, 0.2, 0.4), "yes", "no"),
        ((-0.50, -0.70, -0.30), (0.001, 0.0, 0.0015), (-0.1, -0.2, -0.05), "by its value", "no"),
        ((-0.50, -0.70, -0.45), (0.008, 0.007, 0.009), (-0.1, -0.2, -0.05), "no", "no"),
    ],
)
def test_what_reaches_the_milestone_and_the_goal(
    residual: Any, loss: Any, total: Any, milestone: str, goal: str
) -> None:
    row = {"residual_change": residual, "loss_change": loss, "total_change": total}
    assert before_after_page.reached(row) == {"milestone": milestone, "goal": goal}


def test_the_search_chooses_within_its_bounds() -> None:
    def numbers(residual: float, total: float, loss: float) -> dict[str, Any]:
        named = {"residual": residual, "total": total, "loss": loss}
        return {name: {"value": value} for name, value in named.items()}

    found = {
        "nothing": numbers(1.0, 1.0, 4.0),
        "too dear": numbers(0.0, 0.1, 4.1),
        "low, higher total": numbers(0.1, 1.5, 4.0),
        "lower total": numbers(0.3, 0.9, 4.0),
        "worse in both": numbers(0.9, 0.95, 4.0),
    }
    p = {"tune": [1, 2], "untrained_loss": 0.005, "loss": 0.005, "goal_loss": 0.002}
    assert before_after_arms.to_tune(found, p)[:3] == ["low, higher total", "lower total", "worse in both"]
    assert "too dear" not in before_after_arms.to_tune(found, p)
    assert before_after_arms.choose(found, p) == {"chosen": "low, higher total", "goal": "lower total"}
    dearer = found | {"lower total": numbers(0.3, 0.9, 4.012), "worse in both": numbers(0.9, 1.1, 4.0)}
    assert before_after_arms.choose(dearer, p) == {"chosen": "low, higher total", "goal": None}


def test_an_arm_that_would_be_there_twice_is_left_out() -> None:
    plans = before_after_arms.planned({"chosen": "LearnedSink", "goal": None})
    assert "LearnedSink" not in plans and "goal" not in plans and "goal, hard" not in plans
    assert plans["chosen"].mods == before_after_arms.CANDIDATES["LearnedSink"]
    other = before_after_arms.planned({"chosen": "zero", "goal": "LearnedSink init 4"})
    assert "LearnedSink" in other and other["goal, hard"].mods == before_after_arms.CANDIDATES["LearnedSink init 4"]


def test_every_pair_can_be_put_on() -> None:
    assert len(before_after_arms.PAIRS) == 10
    for mods in before_after_arms.PAIRS.values():
        assert rm.summary(rm.apply(zoo.build("llama"), *mods)).count("·") >= 6


def test_a_verdict_needs_the_whole_interval() -> None:
    assert designs_page.verdict((-0.3, -0.4, -0.2), below=0.0) == "agrees"
    assert designs_page.verdict((-0.3, -0.8, 0.2), below=0.0) == "cannot say"
    assert designs_page.verdict((0.3, 0.2, 0.4), below=0.0) == "disagrees"
    assert designs_page.verdict((0.3, 0.2, 0.4), above=0.0) == "agrees"


def test_growth_is_of_the_last_layers_over_the_first_that_see_context() -> None:
    leak = {"residual_by_layer": [{"value": v, "replicates": [v] * 100} for v in (9.0, 1.0, 1.0, 2.0, 4.0, 6.0)]}
    assert designs_page.growth(leak).value == pytest.approx(4.0)
    assert designs_page.growth(leak, leak).value == 0


def test_a_bump_is_what_rises_above_both_ends() -> None:
    def curve(*values: float) -> list[tuple[float, float, float]]:
        return [(v, v, v) for v in values]

    assert dose.bump(curve(0.0, 0.1, 0.2)) == 0
    assert dose.bump(curve(0.0, 0.5, 0.2)) == pytest.approx(0.3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_usage_does_not_see_rotation(interleaved: bool) -> None:
    layout = Layout(interleaved=interleaved, start=2)
    x_BHTD = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    angle_F = torch.randn(4, dtype=torch.float64)
    pairs = x_BHTD[..., 2:10].unflatten(-1, (4, 2) if interleaved else (2, 4))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = (first * angle_F.cos() - second * angle_F.sin(), second * angle_F.cos() + first * angle_F.sin())
    rotated = x_BHTD.clone()
    rotated[..., 2:10] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    assert not torch.allclose(rotated, x_BHTD)
    torch.testing.assert_close(usage.paired(rotated, layout, 8), usage.paired(x_BHTD, layout, 8))
    torch.testing.assert_close(usage.paired(x_BHTD, layout, 8), (first**2 + second**2).sqrt())


def test_usage_finds_a_planted_pattern_and_its_absence() -> None:
    flat = np.ones((4, 2, 8))
    planted = flat.copy()
    planted[..., -2:] = 9.0  # slow bands, everywhere
    planted[0, :, :2] = planted[-1, :, :2] = 5.0  # fast bands, in the end layers
    model = usage.readings({"query": planted, "key": planted, "value": flat})
    assert model["value"]["low"][0] == pytest.approx(0.25) and model["value"]["ends"][0] == pytest.approx(0)
    assert model["query"]["low"][1] > 0.25 and model["query"]["ends"][1] > 0
    assert usage.verdict(model, "low", 0.25) == usage.verdict(model, "ends", 0.0) == "agrees"
    same = usage.readings({"query": planted, "key": planted, "value": planted})
    assert usage.verdict(same, "low", 0.25) == "values show it too"


def test_rows_begin_where_they_should_and_training_reads_them_once() -> None:
    paragraph = "kamo telu sira no ven dor " * 12
    texts = [f"Start{n}. " + "\n\n".join([paragraph] * 8) for n in range(6)]
    more = " ".join(a + b for a in "plo quin vush wex zort".split() for b in "arn elm oth ugh ind".split())
    tokenizer = train_tokenizer([*texts, more], vocab_size=300)
    options = {"bos": tokenizer.bos_token_id, "length": 32, "rows": 24, "seed": 0}
    natural = rows_of(texts, tokenizer, text="natural", **options)
    assert natural.shape == (24, 32) and (natural[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(natural, rows_of(texts, tokenizer, text="natural", **options))
    openings = {tokenizer.decode(row[1:8]).lstrip()[:4] for row in natural}
    assert openings <= {"kamo", "Star"}
    with pytest.raises(ValueError, match="add texts"):
        rows_of(texts, tokenizer, text="natural", **(options | {"rows": 10_000}))

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.vocab_size = 300
    model, steps = LlamaForCausalLM(config), []
    seen = train(model, natural, batch=2, learning_rate=1e-2, warmup=2, strength_at=steps.append)
    assert len(seen) == 12 and steps == list(range(13)) and seen[-1] < seen[0] - 0.5
    assert not model.training
