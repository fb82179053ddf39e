"""A checkpoint's record is validated as it is read, and must agree with what stock transformers makes of the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from tests import zoo


def saved(folder: Path, *mods: rm.Mod, strength: float = 1.0, architecture: str = "llama", **changes) -> torch.Tensor:
    model = rm.apply(zoo.build(architecture, **changes), *mods, strength=strength)
    model.save_pretrained(folder)
    return model(zoo.tokens()).logits


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("strength", [2.0, -1.0, math.nan, math.inf, True, None, "1.0", [1.0]], ids=repr)
def test_a_strength_that_is_none_is_refused(strength: Any, tmp_path: Path) -> None:
    saved(tmp_path, rm.LearnedSink(init=0.3))
    edit(tmp_path, lambda config: config["ropemods"]["strength"].update(learned_sink=strength))
    with pytest.raises(ValueError, match=r"strength of learned_sink must be a number from 0 \(stock\) to 1"):
        rm.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("strength", {}, r"strengths of \[\] and modifications \['learned_sink'\]"),
        ("strength", {"learned_sinc": 1.0}, r"strengths of \['learned_sinc'\]"),
        ("strength", {"learned_sink": 1.0, "unrotated_bos": 1.0}, "one for each"),
        ("strength", None, "strength must be a dict, not None"),
        ("strength", 1.0, "strength must be a dict, not 1.0"),
        ("mods", [], "names no modification"),
        ("mods", None, "mods must be a list"),
        ("mods", [{}], "unknown modification None"),
        ("mods", ["learned_sink"], "recorded as its kind and options"),
        ("mods", [{"kind": "learned_sinc"}], r"unknown modification 'learned_sinc'.*ropemods.register"),
        (
            "mods",
            [{"kind": "learned_sink", "init": math.nan}],
            "init must be a number or 'calibrated' or 'distilled', and finite",
        ),
        ("rope_parameters", None, "rope_parameters must be a dict"),
        ("bos_token_id", -1, "bos_token_id must be the id of a token"),
        ("bos_token_id", "<s>", "bos_token_id must be the id of a token"),
        ("bos_token_id", True, "bos_token_id must be the id of a token"),
        ("bos_token_id", 999, r"bos_token_id in the checkpoint's record is 999, .* none of the model's 61 tokens"),
    ],
)
def test_a_part_that_cannot_be_is_refused(part: str, value: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path, rm.LearnedSink(init=0.3))
    edit(tmp_path, lambda config: config["ropemods"].update({part: value}))
    with pytest.raises(ValueError, match=message):
        rm.from_pretrained(tmp_path)


@pytest.mark.parametrize("record", [{}, [], "learned_sink", None], ids=repr)
def test_what_is_no_record_is_refused(record: Any, tmp_path: Path) -> None:
    saved(tmp_path, rm.LearnedSink(init=0.3))
    edit(tmp_path, lambda config: config.update(ropemods=record))
    with pytest.raises(ValueError, match=f"the ropemods record of {tmp_path} cannot be read"):
        rm.from_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("mod", [rm.LearnedSink(init=0.3), rm.TruncatedRoPE(0.5), rm.ReplacedBos("mean")], ids=str)
def test_a_strength_edited_up_from_zero_contradicts_what_stock_transformers_runs(mod, architecture, tmp_path) -> None:
    """Stock transformers cannot see it: it goes by the rope parameters alone, and they say the stock model."""
    saved(tmp_path, mod, strength=0.0, architecture=architecture)
    edit(tmp_path, lambda config: config["ropemods"]["strength"].update({mod.kind: 1.0}))
    with pytest.raises(ValueError, match=r"contradicts itself.*would run the unmodified model"):
        rm.from_pretrained(tmp_path)
    ids = zoo.tokens()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, zoo.build(architecture)(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize(
    ("mods", "before", "after", "message"),
    [
        ([rm.LearnedSink(init=0.3)], 1.0, 0.0, "every strength is 0, so its rope parameters must be the stock ones"),
        ([rm.TruncatedRoPE(0.5)], 1.0, 0.0, "every strength is 0, so its rope parameters must be the stock ones"),
        ([rm.TruncatedRoPE(0.5)], 1.0, 0.5, "other frequencies"),
        ([rm.TruncatedRoPE(0.5)], 0.5, 1.0, "other frequencies"),
        ([rm.TruncatedRoPE(0.5), rm.LearnedSink(init=0.3)], 1.0, 0.5, "other frequencies"),
    ],
)
def test_a_strength_edited_under_the_rope_parameters_is_noticed(
    mods, before, after, message, architecture, tmp_path
) -> None:
    saved(tmp_path, *mods, strength=before, architecture=architecture)
    edit(tmp_path, lambda config: config["ropemods"]["strength"].update({mods[0].kind: after}))
    with pytest.raises(ValueError, match=f"contradicts itself.*{message}.*ropemods.set_strength"):
        rm.from_pretrained(tmp_path)


def test_a_modification_added_by_hand_to_a_portable_checkpoint_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path, rm.TruncatedRoPE(0.5))

    def add(config: dict) -> None:
        config["ropemods"]["mods"].append(rm.ReplacedBos().to_json())
        config["ropemods"]["strength"]["replaced_bos"] = 1.0

    edit(tmp_path, add)
    with pytest.raises(ValueError, match=r"contradicts itself.*cannot say what truncated_rope, replaced_bos do"):
        rm.from_pretrained(tmp_path)


def test_another_cut_written_into_the_record_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path, rm.TruncatedRoPE(0.5))
    edit(tmp_path, lambda config: config["ropemods"]["mods"][0].update(keep=0.25))
    with pytest.raises(ValueError, match=r"contradicts itself.*other frequencies than TruncatedRoPE\(keep=0.25\)"):
        rm.from_pretrained(tmp_path)


def test_rope_parameters_edited_beside_a_record_are_noticed(tmp_path: Path) -> None:
    """They would be put back from the record without a word."""
    saved(tmp_path, rm.LearnedSink(init=0.3), strength=0.0)
    edit(tmp_path, lambda config: config["rope_parameters"].update(rope_theta=500.0))
    with pytest.raises(ValueError, match="contradicts itself"):
        rm.from_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", sorted(zoo.ARCHITECTURES))
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_what_is_saved_and_left_alone_agrees_with_itself(architecture, strength, tmp_path) -> None:
    backend = "eager" if architecture in zoo.EAGER_ONLY else "sdpa"
    model, ids = zoo.build(architecture, backend), zoo.tokens()
    rm.apply(model, rm.TruncatedRoPE(0.5), rm.ReplacedBos("mean"), strength=strength)
    rm.set_strength(model, 0.0, kind="replaced_bos")
    model.save_pretrained(tmp_path)
    assert torch.equal(rm.from_pretrained(tmp_path, attn_implementation=backend)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scaling", sorted(zoo.ROPE_SCALINGS))
def test_so_do_checkpoints_over_scaled_rope(scaling, tmp_path) -> None:
    model = rm.apply(zoo.build(rope_parameters=zoo.ROPE_SCALINGS[scaling]), rm.TruncatedRoPE(0.5))
    model.save_pretrained(tmp_path)
    ids = zoo.tokens()
    assert torch.equal(rm.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
