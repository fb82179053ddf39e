"""Reference models: small ones from scratch, alike in everything but their positions.

A claim about sliding windows or scaled RoPE needs a twin: a model trained in the same way on the same rows without
it. `rope` chooses among

    standard   RoPE
    ntk        RoPE whose base θ is stretched by the NTK-aware rule, θ · factor^(d / (d − 2))
    llama3     Llama 3's scaling of the low frequencies by `rope_factor`
    window     RoPE, and attention that sees the last `window` tokens only
    p-rope     RoPE of the highest `keep` of the frequencies; the others do not turn
    nope       no rotation

All are stock transformers models. BOS stands at position 0 of every sequence and nowhere else.

The tokenizer is a byte-level BPE trained on the same text, on the spot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

Rope = Literal["standard", "ntk", "llama3", "window", "p-rope", "nope"]
BOS = "<s>"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a reference model."""

    rope: Rope = "standard"
    rope_theta: float = 10_000.0
    rope_factor: float = 4.0
    """How far ntk and llama3 stretch."""
    keep: float = 0.75
    """Of p-rope."""
    window: int = 128
    """Of window, in tokens."""
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 344
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value heads evenly"
            )
        if self.vocab_size < 300:
            raise ValueError(f"vocab_size={self.vocab_size}: at least 300, of which 256 are bytes")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep}: above 0 (nope) and below 1 (standard)")

    def config(self, *, length: int, bos: int) -> PreTrainedConfig:
        """For sequences of `length` tokens."""
        shape = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": length,
            "tie_word_embeddings": True,
            "bos_token_id": bos,
            "eos_token_id": None,
            "rope_parameters": self.rope_parameters(length),
        }
        if self.rope == "window":
            return MistralConfig(**shape, sliding_window=self.window)
        return LlamaConfig(**shape)

    def rope_parameters(self, length: int) -> dict[str, Any]:
        """In transformers' words."""
        if self.rope == "ntk":
            dim = self.hidden_size // self.num_attention_heads
            return {"rope_type": "default", "rope_theta": self.rope_theta * self.rope_factor ** (dim / (dim - 2))}
        if self.rope == "llama3":
            return {
                "rope_type": "llama3",
                "rope_theta": self.rope_theta,
                "factor": self.rope_factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": max(1, round(length / self.rope_factor)),
            }
        if self.rope in ("p-rope", "nope"):
            keep = self.keep if self.rope == "p-rope" else 0.0
            return {"rope_type": "proportional", "rope_theta": self.rope_theta, "partial_rotary_factor": keep}
        return {"rope_type": "default", "rope_theta": self.rope_theta}


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, documents: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the first `documents` texts; BOS is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(texts, documents), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()} and not of {vocab_size}; lower vocab_size or "
            "give more text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS)


def write_untrained(
    architecture: Architecture, tokenizer: PreTrainedTokenizerFast, folder: Path, *, length: int, seed: int
) -> int:
    """A model as it is drawn, with its tokenizer; returns its number of parameters."""
    config = architecture.config(length=length, bos=int(tokenizer.bos_token_id))
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())
