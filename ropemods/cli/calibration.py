"""A calibration batch from a text file: rows of equal length, each BOS and then a crop of the text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ropemods.settings.files import read_text

ROWS = 8
CHARACTERS_A_TOKEN = 32
"""More than any tokenizer's tokens have on average, so that long files need not be tokenised whole."""


def rows_from_file(path: str, tokenizer: PreTrainedTokenizerBase, bos_token_id: int | None, length: int) -> Tensor:
    """Token ids (B, T), B = ROWS and T = `length`, the crops spread evenly over the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if bos_token_id is None:
        raise ValueError("calibration rows begin with BOS, and this model's config has none (bos_token_id is None)")
    text = read_text(path)
    rows = []
    for row in range(ROWS):
        start, end = (len(text) * edge // ROWS for edge in (row, row + 1))
        piece = text[start : min(end, start + CHARACTERS_A_TOKEN * length)]
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"][: length - 1]
        if len(ids) < length - 1:
            raise ValueError(
                f"{path} is too short: each of {ROWS} calibration rows takes {length - 1} tokens, and an eighth of it "
                f"has {len(ids)}; give more text, or --calibration_length {len(ids) + 1} or less"
            )
        rows.append([bos_token_id, *ids])
    return torch.tensor(rows)
