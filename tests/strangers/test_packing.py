"""Several sequences in one row: each as it is alone, or an error."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests import zoo
from tests.strangers.uses import Subject, use


def mask_of(kind: str, lengths: tuple[int, ...]) -> Tensor | None:
    """None, all ones, one number a sequence, or blocks: boolean, additive."""
    total = sum(lengths)
    if kind == "none":
        return None
    if kind == "ones":
        return torch.ones(1, total, dtype=torch.long)
    if kind == "numbered":
        return torch.cat([torch.full((n,), k + 1) for k, n in enumerate(lengths)])[None]
    blocks = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None, None]
    return blocks if kind == "blocks" else torch.zeros(blocks.shape).masked_fill(~blocks, torch.finfo().min)


def positions_of(kind: str, lengths: tuple[int, ...]) -> Tensor | None:
    """None, restarting for each sequence, running on, or jumping ahead between sequences."""
    if kind == "none":
        return None
    starts = {"restart": [0] * len(lengths), "jump": [20 * k for k in range(len(lengths))]}
    if kind == "run":
        return torch.arange(sum(lengths))[None]
    return torch.cat([torch.arange(s, s + n) for s, n in zip(starts[kind], lengths, strict=True)])[None]


@use(
    every=False,
    mask=("none", "ones", "numbered", "blocks", "additive"),
    positions=("none", "restart", "run", "jump"),
    bos=("each", "first"),
    training=(False, True),
)
def test_packed_sequences_are_as_they_are_alone(
    subject: Subject, mask: str, positions: str, bos: str, training: bool
) -> Iterator[Tensor]:
    model = subject.model().train(training and not draws(subject))
    parts = [subject.ids(1, n, seed=n) for n in (5, 6)]
    if bos == "first":
        parts[1][:, 0] = 9
    lengths = tuple(part.shape[1] for part in parts)
    more = {"attention_mask": mask_of(mask, lengths), "position_ids": positions_of(positions, lengths)}
    given = {name: value for name, value in more.items() if value is not None}
    yield model(torch.cat(parts, dim=1), use_cache=False, **given).logits
    # Without a mask of its own, positions may be all that keeps the parts apart; alone, each is at the same ones.
    at = positions_of("run" if positions == "none" else positions, lengths)
    assert at is not None
    alone = [
        model(part, position_ids=where, use_cache=False).logits
        for part, where in zip(parts, at.split(list(lengths), dim=1), strict=True)
    ]
    yield torch.cat(alone, dim=1)


def draws(subject: Subject) -> bool:
    """Whether training draws random numbers, which two passes would not have in common."""
    return getattr(subject.mod, "by", None) == "random_token"


@use(
    every=False,
    side=("left", "right", "both"),
    mask=("given", "left out"),
    bos=("one", "two", "is padding", "late", "missing"),
)
def test_padded_rows_are_as_they_are_alone(subject: Subject, side: str, mask: str, bos: str) -> Iterator[Tensor]:
    """`late` is a BOS behind other tokens, `two` what a template and a tokenizer make together."""
    model = subject.model()
    ids = subject.ids(1, 7)
    pad = 0
    if bos == "two":
        ids[0, 1] = zoo.BOS
    elif bos == "is padding":
        pad = zoo.BOS
    elif bos == "late":
        ids[0, 0], ids[0, 2] = 9, zoo.BOS
    elif bos == "missing":
        ids[0, 0] = 9
    before, after = {"left": (3, 0), "right": (0, 3), "both": (2, 2)}[side]
    longer = torch.nn.functional.pad(ids, (before, after), value=pad)
    seen = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
    batch = torch.cat([longer, subject.ids(1, longer.shape[1], seed=3)])
    more = {"attention_mask": torch.cat([seen, torch.ones_like(seen)])} if mask == "given" else {}
    yield model(batch, use_cache=False, **more).logits[:1, before : before + 7]
    yield model(ids, use_cache=False).logits
