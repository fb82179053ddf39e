"""Checkpoints that version 0.1.0 wrote are read as it read them.

`tests/fixtures/0.1.0_*` were written by 0.1.0 (transformers 5.23.0), each with token ids and the logits it gave.
Between them: parameters in transformers' own words, a sentinel over dynamic tables with strengths of several kinds, and
layers of two kinds with modifications that `apply` today refuses together.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ropemods as rm

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = sorted(FIXTURES.glob("0.1.0_*"))
MODS = {
    "0.1.0_p_rope": [rm.TruncatedRoPE(0.5)],
    "0.1.0_mixed": [rm.TruncatedRoPE(0.5), rm.AdaptiveTemperature(trainable="head"), rm.LearnedSink()],
    "0.1.0_by_layer": [
        rm.ReplacedBos("mean"),
        rm.UnrotatedBos(layers=[1]),
        rm.LearnedSink(init=0.3, layers=[1]),
    ],
}
STRENGTH = {
    "0.1.0_p_rope": {"truncated_rope": 1.0},
    "0.1.0_mixed": {"truncated_rope": 0.6, "adaptive_temperature": 0.25, "learned_sink": 0.6},
    "0.1.0_by_layer": {"replaced_bos": 1.0, "unrotated_bos": 1.0, "learned_sink": 1.0},
}


def check(loaded: torch.nn.Module, folder: Path) -> None:
    attached = loaded.ropemods_attached
    assert attached.mods == MODS[folder.name] and attached.strength == STRENGTH[folder.name]
    stored, state = load_file(folder / "model.safetensors"), loaded.state_dict()
    assert {name for name in stored if "ropemods" in name} <= set(state)
    # A sink's start and its departure are two numbers since then, and the first is 0 in what was written before.
    later = {name for name in state if "ropemods" in name} - set(stored)
    assert all(name.endswith("learned_sink.start") and not state[name].any() for name in later)
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    expected = load_file(folder / "expected.safetensors")
    # Parameters are equal to the bit. The logits were rounded by the processor that wrote them: fp64 adds no rounding
    # of this one's to theirs.
    with torch.no_grad():
        logits = loaded.double()(expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"].double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_0_1_0_is_the_model_it_was(folder: Path) -> None:
    check(rm.from_pretrained(folder), folder)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_saved_again_it_is_still_that_model_and_names_its_bos(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    rm.from_pretrained(folder).save_pretrained(copy)
    record = json.loads((copy / "config.json").read_text())["ropemods"]
    assert record["bos_token_id"] == (None if folder.name == "0.1.0_p_rope" else 1)
    check(rm.from_pretrained(copy), copy)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_record_without_a_version_is_read_as_the_first(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["ropemods"]["version"]
    (copy / "config.json").write_text(json.dumps(config))
    check(rm.from_pretrained(copy), copy)


def test_every_checkpoint_is_described_here() -> None:
    assert {folder.name for folder in CHECKPOINTS} == set(MODS) == set(STRENGTH)
