"""What a user could get from less leakage: the same text at other places, and something found in a longer context.

    spread     the last tokens of a passage behind unrelated text of several lengths: how much a token's loss differs
               between them (its standard deviation, a mean over tokens), and the loss itself
    passkey    a few random tokens, told once somewhere in unrelated text, asked for at its end: their loss, and whether
               all of them are the most likely ones; at the tuned length, twice it and four times it

A value a passage or context, so that two models can be compared on the same ones.

Shapes: N passages or contexts, T tokens, P lengths of text before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ropemods.leakage.capture import forward, losses

TAIL, SCORED = 48, 31
"""Tokens of a passage, and those at its end that are scored: they have as much of their own text before them."""
BEFORE = (4, 16, 48, 112, 207)
LENGTHS = (256, 512, 1024)
ANSWER = 4
SAID = "The secret code is:"
PASSAGES, PASSKEYS = "passages", "passkeys"


def prepare(folder: Path, passages: Sequence[str], others: Sequence[str], tokenizer: Any, *, count: int) -> None:
    """Token arrays, `count` passages and contexts of each length; `others` is the unrelated text."""
    draw, bos = np.random.default_rng(35), tokenizer.bos_token_id

    def stretch(texts: Sequence[str], tokens: int) -> np.ndarray:
        while True:
            text = texts[int(draw.integers(len(texts)))]
            start = int(draw.integers(0, max(1, len(text) - 8 * tokens)))
            ids = tokenizer(text[start : start + 8 * tokens], add_special_tokens=False)["input_ids"][1:]
            if len(ids) >= tokens:
                return np.array(ids[:tokens])

    rows = [np.concatenate([[bos], stretch(others, BEFORE[-1]), stretch(passages, TAIL)]) for _ in range(count)]
    np.save(folder / f"{PASSAGES}.npy", np.stack(rows).astype(np.int32))
    said = tokenizer(SAID, add_special_tokens=False)["input_ids"]
    for length in LENGTHS:
        rows = []
        for n in range(count):
            key = draw.choice(stretch(others, 16 * ANSWER), ANSWER, replace=False)
            filler = stretch(others, length - 1 - 2 * (len(said) + ANSWER))
            at = round((n + 0.5) / count * len(filler))
            rows.append(np.concatenate([[bos], filler[:at], said, key, filler[at:], said, key]))
        np.save(folder / f"{PASSKEYS}_{length}.npy", np.stack(rows).astype(np.int32))


@torch.no_grad()
def measure(model: nn.Module, folder: Path, *, batch: int) -> dict[str, list[float]]:
    def read(name: str) -> Tensor:
        return torch.from_numpy(np.load(folder / f"{name}.npy").astype(np.int64))

    def of(rows_NT: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Loss, and whether it is the most likely, of each of the last tokens of rows."""
        nll, right = [], []
        for part in rows_NT.split(max(1, batch * 256 // rows_NT.shape[1])):
            logits_NTV = forward(model, part, logits_to_keep=last + 1)
            nll.append(losses(logits_NTV, part[:, -last - 1 :]).cpu())
            right.append((logits_NTV[:, :-1].argmax(-1).cpu() == part[:, -last:]).float())
        return torch.cat(nll).double(), torch.cat(right)

    rows = read(PASSAGES)
    nll_PNT = torch.stack([of(torch.cat((rows[:, :1], rows[:, -TAIL - p :]), 1), SCORED)[0] for p in BEFORE])
    found = {"spread": nll_PNT.std(0).mean(-1), "passage": nll_PNT.mean((0, 2))}
    for length in LENGTHS:
        nll_NT, right_NT = of(read(f"{PASSKEYS}_{length}"), ANSWER)
        found[f"passkey {length}"] = nll_NT.mean(-1)
        found[f"found {length}"] = right_NT.amin(-1)
    return {name: [round(x, 5) for x in values.tolist()] for name, values in found.items()}
