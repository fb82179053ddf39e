"""`ropemods export`: a stock checkpoint of the same model, or the reason why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from tests.cli.program import logits, refused, run


def test_export_writes_a_stock_checkpoint_of_the_same_model(here: Path) -> None:
    run("apply model out --mods truncated_rope:keep=0.5 replaced_bos:by=mean")
    run("export out stock")
    assert "ropemods" not in (here / "stock" / "config.json").read_text()
    stock, modified = AutoModelForCausalLM.from_pretrained("stock"), rm.from_pretrained("out")
    assert torch.allclose(logits(stock), logits(modified), atol=1e-6)


def test_export_says_which_modification_stands_in_the_way_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("apply model out --mods truncated_rope:keep=0.5 adaptive_temperature")
    message = refused("export out stock", capsys)
    assert "AdaptiveTemperature() cannot be written into a stock checkpoint: it acts on attention scores" in message
    assert sorted(entry.name for entry in here.iterdir()) == ["model", "out"]


def test_export_merges_an_adapter(here: Path, adapter: torch.Tensor) -> None:
    run("export adapter stock")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("stock")), adapter, atol=1e-5)
    assert (here / "stock" / "tokenizer.json").is_file()


def test_apply_does_not_start_from_an_adapter(
    here: Path, adapter: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "adapter is an adapter; merge it into its base" in refused("apply adapter out --mods learned_sink", capsys)


def test_export_says_where_its_rope_type_is_misread_and_writes_one_that_is_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("apply model out --mods truncated_rope:keep=0.5")
    run("export out stock")
    assert "SGLang" in capsys.readouterr().out
    run("export out factors --rope longrope")
    assert "SGLang" not in capsys.readouterr().out
    stock, factors = AutoModelForCausalLM.from_pretrained("stock"), AutoModelForCausalLM.from_pretrained("factors")
    kinds = [model.config.rope_parameters["rope_type"] for model in (stock, factors)]
    assert kinds == ["proportional", "longrope"]
    assert torch.equal(logits(stock), logits(factors))
