"""Where the BOS stands: found by its token, never assumed to be column 0.

A sequence begins at the first token of a row, after padding, or where position ids restart (packed rows). The BOS of
a query is the token its sequence begins with, and it must be the BOS token. A BOS token elsewhere (end-of-text used as
a separator, say) is an ordinary token.

Shapes: B batch, T tokens; N is 1 when every row is one sequence, else T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bos(NamedTuple):
    """The BOS of every query of one forward pass. Columns count from the first token the cache has seen."""

    column_BN: Tensor
    distance_BT: Tensor
    """Position of the query minus the position of its BOS."""
    position_B1: Tensor
    """Position of the BOS of each row's last sequence: with its column, what a cache must remember of the prompt."""
    seen: int | Tensor
    """Tokens seen so far, this pass included."""


def begins(ids_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None) -> Tensor:
    """True where a sequence begins."""
    first = torch.zeros_like(ids_BT, dtype=torch.bool)
    first[:, 0] = True
    if positions_BT is not None:
        restarts = positions_BT[:, 1:] <= positions_BT[:, :-1]
        first[:, 1:] |= restarts
    if mask_BT is not None:
        seen = mask_BT.bool()
        first[:, 1:] |= ~seen[:, :-1]
        first &= seen
    return first


def find(ids_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None) -> tuple[Bos, Tensor]:
    """The BOS of each query, and where sequences begin."""
    batch, tokens = ids_BT.shape
    index = torch.arange(tokens, device=ids_BT.device)
    first_BT = begins(ids_BT, mask_BT, positions_BT)
    # The latest beginning at or before each token; padding in front of a row takes the row's first.
    column_BT = torch.where(first_BT, index, -1).cummax(1).values
    column_BT = torch.where(column_BT < 0, first_BT.int().argmax(1, keepdim=True), column_BT)
    positions = (index.unsqueeze(0) if positions_BT is None else positions_BT).expand(batch, -1)
    at_bos = positions.gather(1, column_BT)
    return Bos(column_BT, positions - at_bos, at_bos[:, -1:], tokens), first_BT


def recall(before: Bos, tokens: int, past: int | Tensor, positions_BT: Tensor | None) -> Bos:
    """The BOS of tokens that continue the sequences of `before`."""
    column_B1 = before.column_BN[:, -1:]
    if positions_BT is None:
        positions_BT = torch.arange(tokens, device=column_B1.device).unsqueeze(0) + past
    return Bos(column_B1, positions_BT - before.position_B1, before.position_B1, past + tokens)


def runs_together(first_BT: Tensor, *, kept_apart: bool) -> str | None:
    """What is wrong with rows of several sequences that read each other; None where no row holds several."""
    if kept_apart or not (first_BT.sum(1) > 1).any():
        return None
    return (
        "this batch packs several sequences into a row, and transformers keeps them apart only when it gets "
        "position_ids that restart, no attention_mask and no cache; call the model with attention_mask=None and "
        "use_cache=False (as a padding-free collator does), or one sequence a row"
    )


def complaint(
    ids_BT: Tensor,
    first_BT: Tensor,
    bos_token_id: int,
    *,
    kept_apart: bool,
) -> str | None:
    """What is wrong with a batch, in a sentence that says what to do; None when every sequence begins with BOS."""
    together = runs_together(first_BT, kept_apart=kept_apart)
    if together is not None:
        return together
    lacking = first_BT & (ids_BT != bos_token_id)
    if not lacking.any():
        return None
    rows = lacking.any(1)
    row = int(rows.int().argmax())
    column = int(lacking[row].int().argmax())
    return (
        f"{int(rows.sum())} of {len(rows)} rows hold a sequence that does not begin with the BOS token "
        f"({bos_token_id}): row {row} begins at column {column} with token {int(ids_BT[row, column])}. Put BOS in "
        "front of every sequence (tokenizer.bos_token_id, add_special_tokens=True), pass the attention_mask if the "
        "rows are padded, or set model.config.bos_token_id to the token your sequences begin with before apply"
    )
