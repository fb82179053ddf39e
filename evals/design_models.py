"""Small reference models that differ in their rope or window alone: same shape, start, rows, order and tokenizer.

BOS stands at position 0 of every row and nowhere else, and rows begin anywhere in a document: text at the start then
differs in nothing from text further on, as in prose3M, whose residual leakage is large. A model that was trained is
kept under runs/evals/, and found there by the hash of everything that it follows from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from evals.claim import KEPT, hash_of
from evals.locks import held
from evals.tight_loop import rows_of, train, training_texts
from ropemods.settings.files import write_text
from ropemods.training.small_models import Architecture, train_tokenizer

DESIGNS: dict[str, dict[str, Any]] = {
    "standard": {},
    "NTK": {"rope": "ntk"},
    "llama3": {"rope": "llama3"},
    "window": {"rope": "window", "window": 32},
}
TRAINING: dict[str, dict[str, Any]] = {
    "nano": {
        "shape": {
            "hidden_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 172,
            "vocab_size": 1024,
        },
        "designs": DESIGNS,
        "length": 128,
        "batch": 16,
        "steps": 2000,
        "learning_rate": 3e-3,
        "warmup": 100,
        "documents": 1500,
        "seed": 0,
        "text": "stationary",
    }
}


class Models:
    """The models of a scale, trained when they are first asked for."""

    def __init__(self, scale: str, data: Path, *, say: Callable[[str], None] = print) -> None:
        self.p, self.data, self.say = TRAINING[scale], data, say
        self.folder = KEPT / "design_models" / f"{scale}-{hash_of(self.p)}"
        self.names = tuple(self.p["designs"])

    def tokenizer(self) -> Any:
        folder = self.folder / "tokenizer"
        with held(self.folder / "tokenizer.lock", wait=True):
            if not folder.is_dir():
                texts = training_texts(self.data, self.p["documents"], self.p["seed"])
                train_tokenizer(texts, vocab_size=self.p["shape"]["vocab_size"]).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)

    def architecture(self, name: str) -> Architecture:
        return Architecture(**self.p["shape"], **self.p["designs"][name])

    def trained(self, name: str, **options: Any) -> PreTrainedModel:
        """One model, read from its folder."""
        with held(self.folder / f"{name}.lock", wait=True):
            if not (self.folder / name / "training.json").is_file():
                self._train(name)
        return AutoModelForCausalLM.from_pretrained(self.folder / name, **options).eval()

    def training(self, name: str) -> dict[str, Any]:
        """Loss over the last tenth of the steps, tokens and parameters."""
        return dict(json.loads((self.folder / name / "training.json").read_text()))

    def _train(self, name: str) -> None:
        p, tokenizer = self.p, self.tokenizer()
        rows_NT = rows_of(
            training_texts(self.data, p["documents"], p["seed"]),
            tokenizer,
            bos=tokenizer.bos_token_id,
            length=p["length"],
            rows=p["steps"] * p["batch"],
            text=p["text"],
            seed=p["seed"],
        )
        config = self.architecture(name).config(length=p["length"], bos=tokenizer.bos_token_id)
        set_seed(p["seed"])  # all designs begin with the same weights
        model = AutoModelForCausalLM.from_config(config)
        seen = train(model, rows_NT, batch=p["batch"], learning_rate=p["learning_rate"], warmup=p["warmup"])
        model.save_pretrained(self.folder / name)
        last = seen[-max(1, len(seen) // 10) :]
        facts = {
            "loss": round(sum(last) / len(last), 4),
            "tokens": rows_NT.numel(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        write_text(self.folder / name / "training.json", json.dumps(facts))  # last: it says that all is there
        self.say(f"trained {name}: loss {facts['loss']}")
