"""What carries the residual leakage of two small models: every intervention, with its reference distribution.

    python evals/interventions.py --data ../shared/data

stories260K was trained on packed windows, so its position 0 was usually mid-story; prose3M always with BOS, and only
BOS, at position 0. Writes results/interventions_<model>.json. What it shows, and what it does not, is in README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from ropemods.atomic import write_text
from ropemods.leakage.documents import Documents, joined, read_documents
from ropemods.leakage.interventions import NAMES
from ropemods.leakage.record import dumps, encode

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = {
    # Layer 1 of stories260K is small: it takes this many crops to tell it from 0.
    "stories260K": rm.Protocol(sequences=1536, length=256, batch_size=32),
    "prose3M": rm.Protocol(sequences=768, length=256, batch_size=32),
}
REFERENCE = 32


def text(name: str, data: Path) -> Documents:
    if name == "stories260K":
        # A story is about as long as a crop, so stories are joined; the model was trained on packed ones.
        stories = read_documents(data / "text" / "tinystories.txt")
        return joined(stories, characters=16 * PROTOCOLS[name].length)
    parts = [read_documents(data / "text" / f"{each}.valid.jsonl.xz") for each in ("books", "prose")]
    texts = [each for part in parts for each in part.texts]
    return Documents(texts, "books.valid and prose.valid")


def without_replicates(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_replicates(v) for k, v in value.items() if k != "replicates"}
    return [without_replicates(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    options = parser.parse_args()
    for name in options.models:
        folder = options.data / "models" / name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        report = rm.measure(
            model,
            tokenizer,
            text(name, options.data),
            PROTOCOLS[name],
            interventions=NAMES,
            reference=REFERENCE,
            controls=True,
            command=f"python evals/interventions.py --data DATA --models {name}",
        )
        print(report.to_markdown())
        found = without_replicates(encode(report)) | {"machine": f"CPU, {torch.get_num_threads()} threads"}
        print(f"wrote {write_text(RESULTS / f'interventions_{name}.json', dumps(found))}")


if __name__ == "__main__":
    main()
