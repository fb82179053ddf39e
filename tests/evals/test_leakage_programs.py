"""The programs about leakage, from end to end on a tiny model and made-up text."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evals import before_after, before_after_arms, claim, design_models, designs, dose, page, prope_untrained, usage
from ropemods.training.small_models import train_tokenizer

WORDS = [a + b for a in "kamo telu sira no ven dor".split() for b in ("", "ta", "rin", "os", "el", "um", "i", "ash")]


def sentences(seed: int, count: int) -> str:
    draw = np.random.default_rng(seed)
    return "\n\n".join(" ".join(draw.choice(WORDS, 12)) + "." for _ in range(count))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the usual layout: four text files and two models of six layers."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for n, name in enumerate(("books.train", "prose.train", "books.valid", "prose.valid")):
        with lzma.open(folder / "text" / f"{name}.jsonl.xz", "wt") as file:
            for document in range(24):
                file.write(json.dumps({"text": sentences(100 * n + document, 60)}) + "\n")
    stories = "<|endoftext|>".join(sentences(1000 + n, 40) for n in range(40))
    (folder / "text" / "tinystories.txt").write_text(stories)
    tokenizer = train_tokenizer([sentences(7, 400)], vocab_size=320)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    for name in ("prose3M", "stories260K"):
        LlamaForCausalLM(config).save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A scale at which everything takes seconds."""
    monkeypatch.setattr(design_models, "KEPT", tmp_path / "kept")
    training = design_models.TRAINING["nano"] | {
        "shape": design_models.TRAINING["nano"]["shape"]
        | {"hidden_size": 32, "intermediate_size": 48}
        | {"vocab_size": 320},
        "designs": {name: design_models.DESIGNS[name] for name in ("standard", "NTK", "window")},
        "steps": 2,
        "batch": 4,
        "documents": 24,
    }
    monkeypatch.setitem(design_models.TRAINING, "tiny", training)
    swaps = {"training": training, "crops": 64, "swap_crops": 32, "reference": 2, "anchor_crops": 32}
    monkeypatch.setitem(designs.PROTOCOL, "tiny", designs.PROTOCOL["nano"] | swaps)
    monkeypatch.setitem(usage.PROTOCOL, "tiny", usage.PROTOCOL["nano"] | {"designs": training, "crops": 32})
    stopped = prope_untrained.PROTOCOL["nano"] | {"crops": {"32": 8, "64": 3}}
    monkeypatch.setitem(prope_untrained.PROTOCOL, "tiny", stopped)
    curve = {"strengths": [0.0, 0.5, 1.0], "length": 128, "crops": 32, "calibration_crops": 8}
    monkeypatch.setitem(dose.PROTOCOL, "tiny", dose.PROTOCOL["nano"] | curve)
    search = before_after.PROTOCOL["nano"]["search"] | {
        "crops": 32,
        "steps": 1,
        "schedule_steps": 1,
        "loss": 0.5,
        "goal_loss": 0.5,
    }
    arms = {"length": 128, "batch": 2, "steps": 2, "schedule_steps": 1, "documents": 24, "crops": 32, "search": search}
    arms |= {"seeds": [0, 1], "long": {"length": 256, "crops": 32}}
    monkeypatch.setitem(before_after.PROTOCOL, "tiny", before_after.PROTOCOL["nano"] | arms)
    few = ("LearnedSink", "LearnedSink init 4", "zero", "random token")
    candidates = {name: before_after_arms.CANDIDATES[name] for name in few}
    some = ("control", "chosen", "stationary", "goal", "all five", "goal, hard", "control, LoRA", "goal, LoRA")
    some += ("UnrotatedBos + LearnedSink",)
    plans = {name: before_after_arms.PLANS[name] for name in some}
    for module in (before_after, before_after_arms):
        monkeypatch.setattr(module, "CANDIDATES", candidates)
        monkeypatch.setattr(module, "PLANS", plans)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["before_after", "designs", "usage", "dose", "prope_untrained"])
def test_a_program_runs_from_text_to_page(name: str, data: Path, tmp_path: Path) -> None:
    path = claim.run(name, "tiny", data, results=tmp_path / "results", kept=tmp_path / "cells", say=lambda _: None)
    found = json.loads(path.read_text())
    assert "replicates" not in path.read_text(), "a result file holds intervals, not draws"
    module = claim.program(name)
    section, rows = module.section(found), module.learned(found)
    assert section.startswith("## ") and "nan" not in section
    assert rows and all(isinstance(cell, str) and cell for row in rows for cell in row)
    assert section in page.text(tmp_path / "results")
    widths = [line.count("|") for line in section.splitlines() if line.startswith("|---")]
    assert widths, "a section has a table"
    if hasattr(module, "figure"):
        ElementTree.fromstring(module.figure(found))
    # Done again, nothing is measured again.
    done: list[str] = []
    claim.run(name, "tiny", data, results=tmp_path / "results", kept=tmp_path / "cells", say=done.append)
    assert done and all(line.endswith("kept") for line in done)
