"""Training rows and a training loop for small runs on one core: the library's modifications, and nothing else around.

A row is BOS and 255 (say) tokens of one document. Natural rows begin where documents or paragraphs begin, stationary
rows anywhere (`ropemods.training.token_rows`). Arms that are compared read the same rows in the same order.

Shapes: N rows, B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ropemods.leakage.documents import Documents, read_documents
from ropemods.training.text import is_held_out
from ropemods.training.token_rows import Text, natural, stationary, tokenizer_for

EXCERPT = 60_000
"""Characters that are taken of a training document at most, so that a few long ones are not all there is."""


@functools.cache
def training_texts(data: Path, documents: int, seed: int) -> list[str]:
    """Excerpts of `documents` training documents, half of them books."""
    draw, texts = np.random.default_rng((seed, 21)), []
    for name in ("books", "prose"):
        pool = read_documents(data / "text" / f"{name}.train.jsonl.xz").texts
        for n in draw.permutation(len(pool))[: documents // 2]:
            first = int(draw.integers(0, max(1, len(pool[n]) - EXCERPT)))
            # An excerpt begins at a paragraph's start, as the document would.
            start = pool[n].find("\n", first) + 1 if first else 0
            texts.append(pool[n][start : start + EXCERPT])
    return texts


def held_out_texts(data: Path, part: str) -> Documents:
    """Documents that never trained: all, or the half on which something is searched, or the half that is reported."""
    texts = [t for name in ("books", "prose") for t in read_documents(data / "text" / f"{name}.valid.jsonl.xz").texts]
    if part != "all":
        # By a hash of the text, so that a document's half depends on nothing else.
        texts = [text for text in texts if is_held_out(text, 0.5) == (part == "search")]
    return Documents(texts, f"books.valid and prose.valid, {part}")


def rows_of(texts: Iterable[str], tokenizer: Any, *, bos: int, length: int, rows: int, text: Text, seed: int) -> Tensor:
    """`rows` full rows [N, T] out of the texts, in an order that follows from the seed."""
    documents = map(tokenizer_for(tokenizer), texts)
    if text == "natural":
        made = natural(documents, bos=bos, length=length, packing="none")
    else:
        made = stationary(documents, bos=bos, length=length, seed=seed)
    whole = [row.tokens for row in made if row.positions[-1] >= 0]  # a document's last row may be short
    if len(whole) < rows:
        raise ValueError(f"the texts give {len(whole)} full rows of {length} tokens and {rows} are wanted: add texts")
    order = np.random.default_rng((seed, 22)).permutation(len(whole))
    return torch.from_numpy(np.stack([whole[n] for n in islice(order, rows)])).long()


def train(
    model: nn.Module,
    rows_NT: Tensor,
    *,
    batch: int,
    learning_rate: float,
    warmup: int,
    weight_decay: float = 0.1,
    strength_at: Callable[[int], None] | None = None,
) -> list[float]:
    """Read the rows once, AdamW with a cosine to 0; returns the loss of every step.

    `strength_at(step)` is called before each step, and once after the last.
    """
    model.train()
    steps = len(rows_NT) // batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Norms, biases and sinks are not pulled towards 0.
    wide, narrow = ([p for p in parameters if (p.ndim > 1) == w] for w in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": wide, "weight_decay": weight_decay}, {"params": narrow, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    seen = []
    for step, tokens_BT in enumerate(rows_NT[: steps * batch].split(batch)):
        if strength_at is not None:
            strength_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
        if not math.isfinite(seen[-1]):
            raise RuntimeError(f"the loss of step {step} is {seen[-1]}: lower the learning rate")
    if strength_at is not None:
        strength_at(steps)
    model.eval()
    return seen
