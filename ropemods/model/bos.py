"""Where the BOS stands: found by its token, never assumed to be column 0.

The BOS of a query is the first token of its sequence, and it must be the BOS token. What a sequence is, is not said by
the tokens but by what transformers lets them see:

- a padded batch: a row is one sequence, from the first token that its mask shows (`by_padding`),
- packed rows without mask and cache: a sequence begins wherever positions do not go up by one (`by_positions`),
- a 4-D mask: a sequence is what its queries can reach through the keys they see (`by_visibility`).

A BOS token elsewhere (end-of-text used as a separator, say) is an ordinary token.

Nothing here branches on the value of a tensor, so that all of it can be traced into a graph. What is wrong with a
batch is a number a row, and `complaint` makes a sentence of it: at once, or when the graph runs.

Shapes: B batch, T tokens of this call, S tokens that a mask speaks of, those in a cache first; N is 1 where every row
is one sequence, else T. Columns count from the first token that the cache has seen; -1 where no sequence has begun.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bos(NamedTuple):
    """The BOS of every query of one forward pass."""

    column_BN: Tensor
    distance_BT: Tensor
    """Position of the query minus the position of its BOS, as the rotary tables count positions."""
    is_self_BT: Tensor
    """True where a query is itself the BOS."""
    position_BN: Tensor
    """Of each BOS."""
    seen: int | Tensor
    """Tokens seen so far, this pass included."""


class Memory(NamedTuple):
    """What has to be known of the tokens in a cache when others follow them."""

    column_B1: Tensor
    """The BOS of each row's last sequence."""
    position_B1: Tensor
    several_B1: Tensor
    """True for a row that holds several sequences."""
    seen: Tensor
    """How many tokens (a scalar)."""

    def rows(self, change) -> Memory:
        """With `change` done to the rows, as a cache does it to its keys."""
        return self._replace(**{name: change(getattr(self, name)) for name in self._fields if name != "seen"})


# What a sequence is. Each gives the column of the first token of a query's sequence.

JUMPS = 24
"""Enough to follow a chain of 2^24 windows."""


def by_padding(mask_BS: Tensor, end: int | Tensor) -> Tensor:
    """(B, 1): the first token before `end` that a mask shows; a hole further on is a hole in one sequence."""
    shown = mask_BS.bool()
    first = torch.where(shown.any(1, keepdim=True), shown.int().argmax(1, keepdim=True), -1)
    return torch.where(first < end, first, -1)


def by_positions(positions_BT: Tensor) -> Tensor:
    """(B, T): as transformers tells packed sequences apart, where it does."""
    starts = torch.ones_like(positions_BT, dtype=torch.bool)
    starts[:, 1:] = positions_BT[:, 1:] != positions_BT[:, :-1] + 1
    index = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    return torch.where(starts, index, 0).cummax(1).values


def by_visibility(shown_BTS: Tensor, past: int | Tensor) -> Tensor:
    """(B, T): the first key that a query sees, or that is seen from there, and so on; -1 for a query that sees none."""
    tokens, keys = shown_BTS.shape[1:]
    # The mask of a windowed cache speaks of its last tokens only.
    forgotten = past + tokens - keys
    forgotten = forgotten.clamp(min=0) if isinstance(forgotten, Tensor) else max(forgotten, 0)
    first = torch.where(shown_BTS.any(2), shown_BTS.to(torch.uint8).argmax(2) + forgotten, -1)
    for _ in range(JUMPS if tokens > 1 else 0):
        further = first.gather(1, (first - past).clamp(0, tokens - 1))
        first = torch.where((first >= past) & (further >= 0), further, first)
    return first


# Finding, measuring, remembering.

FINE, PACKED, UNSEEN, OTHER, WITHOUT, LACKING, AXES = range(7)
"""What may be wrong with a row; `complaint` has the sentences."""


class Found(NamedTuple):
    """Where the BOS are, and what is wrong."""

    bos: Bos
    problem_BN: Tensor
    token_BN: Tensor
    """What stands there; -1 for a token that is not of this call."""


def find(
    column_BN: Tensor,
    ids_BT: Tensor | None,
    positions_BT: Tensor,
    *,
    bos_token_id: int,
    past: int | Tensor,
    before: Memory | None,
    recall: bool,
    packed_B1: Tensor | None = None,
) -> Found:
    """The BOS of each query, from the column its sequence begins at.

    For a sequence that began in the cache that column is compared with what is remembered; with `recall`, where the
    call does not say at which column (without a mask, or with one that shows a window), the remembered one is taken.
    """
    tokens = positions_BT.shape[1]
    cached = (column_BN >= 0) & (column_BN < past)
    problem = torch.zeros_like(column_BN) if packed_B1 is None else (packed_B1 * PACKED).expand_as(column_BN)
    position = torch.zeros_like(column_BN)
    if before is None:
        problem = torch.where(cached, UNSEEN, problem)
    else:
        other = before.column_B1 != column_BN
        begun = (before.column_B1 >= 0) & (before.column_B1 < past)
        wrong = torch.where(before.several_B1, PACKED, torch.where(begun & recall, FINE, OTHER))
        problem = torch.where(cached & (other | ~begun), wrong, problem)
        problem = torch.where(cached & (before.seen < past), UNSEEN, problem)
        column_BN = torch.where(cached & begun & (problem == FINE), before.column_B1, column_BN)
        position = before.position_B1.expand_as(column_BN)
    here = (column_BN >= 0) & ~cached
    local = (column_BN - past).clamp(0, tokens - 1)
    if ids_BT is None:
        token = torch.full_like(column_BN, -1)
        problem = torch.where(here & (problem == FINE), WITHOUT, problem)
    else:
        token = torch.where(here, ids_BT.gather(1, local), -1)
        problem = torch.where(here & (token != bos_token_id) & (problem == FINE), LACKING, problem)
    index = torch.arange(tokens, device=column_BN.device) + past
    is_self = (index == column_BN).expand(-1, tokens)
    bos = Bos(column_BN, torch.zeros_like(positions_BT), is_self, position, past + tokens)
    return Found(measured(bos, positions_BT), problem, token)


def measured(bos: Bos, positions_BT: Tensor) -> Bos:
    """`bos` with the distances that these positions make."""
    tokens = positions_BT.shape[1]
    local = bos.column_BN - (bos.seen - tokens)
    position = torch.where(local < 0, bos.position_BN, positions_BT.gather(1, local.clamp(0, tokens - 1)))
    return bos._replace(distance_BT=positions_BT - position, position_BN=position)


def memory(bos: Bos, before: Memory | None) -> Memory:
    """What to remember of a pass that follows `before`."""
    last = bos.column_BN.max(1, keepdim=True)
    several = ((bos.column_BN >= 0) & (bos.column_BN != last.values)).any(1, keepdim=True)
    if before is not None:
        begun = (before.column_B1 >= 0) & (before.column_B1 < bos.seen - bos.distance_BT.shape[1])
        several = several | (begun & (before.several_B1 | (before.column_B1 != last.values)))
    seen = bos.seen if isinstance(bos.seen, Tensor) else last.values.new_full((), bos.seen)
    return Memory(last.values, bos.position_BN.gather(1, last.indices), several, seen)


def narrowed(bos: Bos) -> Bos:
    """`bos` with one column a row, for rows that are one sequence; what precedes it there is padding."""
    column = bos.column_BN.max(1, keepdim=True)
    position = bos.position_BN.gather(1, column.indices)
    return bos._replace(column_BN=column.values, position_BN=position)


# What may be wrong.


def restarts(positions_BT: Tensor, shown_BT: Tensor | None) -> Tensor:
    """True where a token that is shown has a position that does not lie behind that of the one shown before it."""
    if shown_BT is None:
        shown_BT = torch.ones_like(positions_BT, dtype=torch.bool)
    index = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    latest = torch.where(shown_BT, index, -1).cummax(1).values
    before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    return shown_BT & (before >= 0) & (positions_BT <= positions_BT.gather(1, before.clamp(min=0)))


def behind_holes(ids_BT: Tensor, shown_BT: Tensor, bos_token_id: int) -> Tensor:
    """True for a BOS token right behind a hidden one, in front of which another token is shown."""
    again = torch.zeros_like(shown_BT)
    again[:, 1:] = shown_BT[:, 1:] & ~shown_BT[:, :-1] & (shown_BT.cumsum(1)[:, :-1] > 0)
    return again & (ids_BT == bos_token_id)


APART = (
    "this batch packs several sequences into a row, and transformers keeps them apart only when it gets "
    "position_ids that restart, no attention_mask and no cache; call the model with attention_mask=None and "
    "use_cache=False (as a padding-free collator does), with a 4-D attention_mask that shows each token its own "
    "sequence, or with one sequence a row"
)


def complaint(problem_BN: Tensor, column_BN: Tensor, token_BN: Tensor, bos_token_id: int) -> str | None:
    """What is wrong with a batch, in a sentence that says what to do; None when nothing is. Waits for the device."""
    wrong = problem_BN != FINE
    if not wrong.any():
        return None
    rows = wrong.any(1)
    row = int(rows.int().argmax())
    at = int(wrong[row].int().argmax())
    problem, column, token = (int(x[row, at]) for x in (problem_BN, column_BN, token_BN))
    if problem == PACKED:
        return APART
    if problem == UNSEEN:
        return (
            "this cache was filled without ropemods seeing the prompt, or all of it, so where its BOS stands is "
            "unknown; run the prompt through the modified model with this cache"
        )
    if problem == OTHER:
        return (
            f"row {row} sees a sequence that begins at column {column} of the cache, and when the cache was filled its "
            "sequence did not begin there; pass the attention_mask (padding included) of every token in the cache "
            "with each call, in the order of the cache's rows"
        )
    if problem == WITHOUT:
        return (
            "the model was called with inputs_embeds and no input_ids, so BOS cannot be found by its token; "
            "pass input_ids, or set the strength of the BOS modifications to 0"
        )
    if problem == AXES:
        return (
            f"row {row} holds tokens whose rotary position is not one number (an image: time, height and width), and "
            "a modification here turns queries back by how far along they stand, which has to be one; call the model "
            "with text, or set the strength of that modification to 0 (ropemods.summary names them)"
        )
    return (
        f"{int(rows.sum())} of {len(rows)} rows hold a sequence that does not begin with the BOS token "
        f"({bos_token_id}): row {row} begins at column {column} with token {token}. Put BOS in "
        "front of every sequence (tokenizer.bos_token_id, add_special_tokens=True), pass the "
        "attention_mask that hides padding, or set model.config.bos_token_id to the token your sequences begin with "
        "before apply"
    )
