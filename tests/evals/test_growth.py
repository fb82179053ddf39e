"""How cost grows: the fit on a law that is known, the program at toy sizes, and what is computed from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals import at_scale, claim, gpu_steps, growth
from evals.intervals import over_seeds
from ropemods.training.small_models import train_tokenizer


def test_the_exponent_of_a_power_is_that_power() -> None:
    assert growth.slope([256, 512, 1024], [3 * x**1.75 for x in (256, 512, 1024)]) == pytest.approx(1.75)


def test_the_program_at_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer([" ".join(f"w{n} x{n * n}" for n in range(400))], vocab_size=320)
    tokenizer.save_pretrained(tmp_path / "data" / "models" / "prose3M")
    sizes = {"length": [64, 96, 128], "layers": [1, 2, 3], "heads": [2, 4, 8]}
    toy = growth.PROTOCOL["nano"] | {"rounds": 2, "base": {"length": 64, "layers": 1, "heads": 2}, "sizes": sizes}
    toy |= {"fewer": {}, "wider": {}}
    monkeypatch.setattr(growth, "PROTOCOL", {"nano": json.loads(json.dumps(toy))})
    found = growth.run("nano", tmp_path / "data", claim.Cells(tmp_path / "cells", say=str)) | {"protocol": toy}
    assert set(found["grown"]) == {f"{k} · {a}" for k in growth.THEORY for a in sizes} | {"sums"}
    kept = list(found["grown"]["sums"].values())
    assert min(kept) > 4 * 8 * at_scale.GROUPS, "at least the window's eight sums for each group, in four bytes each"
    assert kept[1] == pytest.approx(kept[0], rel=0.25), "what is kept is linear in the length"
    text = growth.section(found)
    assert text.startswith("## How cost grows") and "computed" in text.lower()
    assert len(growth.learned(found)) == 2


def test_faster_than_theory_is_said() -> None:
    def exponent(value: float) -> dict[str, Any]:
        return {"exponent": over_seeds([value - 0.01, value, value + 0.01])}

    found = {"grown": {f"{k} · {a}": exponent(0.9) for k in growth.THEORY for a in growth.THEORY[k]}}
    assert growth.above(found) == []
    found["grown"]["measuring · layers"] = exponent(1.3)
    found["grown"]["decoding, modified · length"] = exponent(1.3)
    assert growth.above(found) == ["decoding, modified by length", "measuring by layers"]
    found["grown"]["decoding, stock · length"] = exponent(1.3)  # so it is the machine, and no fault of ours
    assert growth.above(found) == ["decoding, stock by length", "measuring by layers"]
    found["grown"]["measuring · layers"]["exponent"]["seeds"] = [0.9, 1.3, 1.7]
    assert growth.above(found) == ["decoding, stock by length"]


def test_what_is_computed_follows_from_the_products() -> None:
    """A card on which attention and all else run at 1e12 operations a second."""
    small = gpu_steps.SIZES[0]
    shape = {"length": 1000, "head_dim": 10, "heads": 10}
    step = 6 * gpu_steps.parameters(small) * small.batch * small.length + at_scale.products(small, 7)
    shown = {
        "bench": {"training": [{"kind": "training", "shape": shape, "ratio": {"first_ms": 7 * 1000**2 * 100 / 1e9}}]},
        "steps": {"steps/135M/flash/stock again": {"ratio": {"first_ms": step / 1e9}}},
    }
    assert at_scale.rates(shown) == pytest.approx((1e12, 1e12))
    rest, attention = at_scale.seconds(shown, small)
    assert rest == pytest.approx(8 * gpu_steps.parameters(small) * small.batch * small.length / 1e12)
    assert attention == pytest.approx(9 / 7 * at_scale.products(small, 7) / 1e12)


def test_parameters_are_those_of_the_model() -> None:
    size = gpu_steps.TOY[0]
    real = sum(p.numel() for p in gpu_steps.model_of(size, "cpu").parameters())
    norms = (2 * size.layers + 1) * size.hidden
    assert gpu_steps.parameters(size) == real - norms
