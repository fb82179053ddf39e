"""A folder to work in, with tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from tests.cli.program import logits, save_tiny, save_tokenizer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a tiny model in it named `model` that has a tokenizer."""
    save_tokenizer(save_tiny(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def adapter(here: Path) -> torch.Tensor:
    """A LoRA adapter of the modified model in `adapter`; returns its logits."""
    from peft import LoraConfig, get_peft_model

    model = rm.apply(AutoModelForCausalLM.from_pretrained("model"), rm.TruncatedRoPE(0.5))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained("adapter")
    return logits(wrapped)
