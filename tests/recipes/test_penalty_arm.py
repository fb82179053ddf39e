"""A recipe with a penalty and nothing else: the arm `modified` trains with it and leaves a stock checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ropemods.training.__main__ import main
from ropemods.training.arms import read_result
from tests.recipes import tiny


def test_modified_is_the_control_with_the_penalty_in_its_loss(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml", model, text, tmp_path / "out",
        arms=["control", "modified"], mods=[], schedule=None, max_steps=4,
        penalty={"weight": 3.0, "early": [8, 16], "warmup_steps": 2},
    )  # fmt: skip
    main(["--config", str(recipe)])
    said = capsys.readouterr().out
    assert "of which penalty" in said
    folders = [tmp_path / "out" / f"{arm}-0" for arm in ("control", "modified")]
    control, modified = (read_result(folder / "result.json") for folder in folders)
    assert control.curve[:1] == modified.curve[:1], "there is nothing to penalise with in the first step"
    assert control.curve[1:] != modified.curve[1:]
    one, other = (sorted(path.name for path in (folder / "model").iterdir()) for folder in folders)
    assert one == other
    stock = AutoModelForCausalLM.from_pretrained(folders[1] / "model")
    assert not hasattr(stock.config, "ropemods") and torch.isfinite(stock(torch.tensor([[0, 5, 6]])).logits).all()
    assert "nothing of it is in the model" in (folders[1] / "model" / "README.md").read_text()
