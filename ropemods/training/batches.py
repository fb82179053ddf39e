"""Rows on disk, the order in which a run reads them, and the batches that a model is given.

The order is a permutation of the rows drawn from the run's seed, one permutation after another where the text is read
several times. The Trainer reads it from beginning to end, so the batch of a step depends on the step and on the global
batch size, not on the number of ranks that share it.

Shapes: N rows, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ropemods.training.token_rows import Ints, Packing, Row


@dataclass(frozen=True)
class Rows:
    """Rows of tokens with the position of each token, −1 for padding."""

    tokens_NT: Ints
    positions_NT: Ints

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def tokens(self) -> int:
        """Tokens in all of them, padding left out."""
        return int((self.positions_NT >= 0).sum())


def first_sequences(rows: Rows, wanted: int) -> Tensor:
    """(B, T): the first sequence of each of `wanted` rows, cut to the shortest: no padding, no second sequence.

    The rows are those of the first few times as many with the longest; where nothing is padded or packed, the first.
    """
    positions_NT = np.asarray(rows.positions_NT[: 8 * wanted])
    broken_NT = positions_NT[:, 1:] != positions_NT[:, :-1] + 1
    length_N = np.where(broken_NT.any(1), broken_NT.argmax(1) + 1, positions_NT.shape[1])
    chosen = np.sort(np.argsort(-length_N, kind="stable")[:wanted])
    return torch.from_numpy(rows.tokens_NT[chosen, : length_N[chosen].min()].astype("int64"))


class Ordered(Dataset[Row]):
    """Rows in the order in which a run reads them."""

    def __init__(self, rows: Rows, order_N: npt.NDArray[np.int64]) -> None:
        self.rows, self.order_N = rows, order_N

    def __len__(self) -> int:
        return len(self.order_N)

    def __getitem__(self, index: int) -> Row:
        row = self.order_N[index]
        return Row(self.rows.tokens_NT[row], self.rows.positions_NT[row])

    def tokens(self) -> int:
        """Tokens that a run reads, padding left out."""
        by_row_N = (np.asarray(self.rows.positions_NT) >= 0).sum(1)
        return int(by_row_N[self.order_N].sum())


def order(rows: int, *, wanted: int, seed: int) -> npt.NDArray[np.int64]:
    """`wanted` indices of rows: as many permutations of all rows as that takes, each drawn anew."""
    draw = np.random.default_rng((seed, 12))
    times = -(-wanted // rows)
    return np.concatenate([draw.permutation(rows) for _ in range(times)])[:wanted]


def collator(packing: Packing) -> Callable[[list[Row]], dict[str, Tensor]]:
    """What makes a batch of rows. What the model is told of positions follows from the packing."""

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        tokens_BT = torch.from_numpy(np.stack([row.tokens for row in rows])).long()
        positions_BT = torch.from_numpy(np.stack([row.positions for row in rows])).long()
        # Padding is not predicted, and neither is a BOS that sees nothing before it.
        labels_BT = tokens_BT.masked_fill(positions_BT <= 0, -100)
        batch = {"input_ids": tokens_BT, "labels": labels_BT}
        if packing == "restart":
            # Positions and no mask: so transformers learns that a row holds several sequences.
            batch["position_ids"] = positions_BT
        elif (positions_BT < 0).any():
            batch["attention_mask"] = (positions_BT >= 0).long()
        return batch

    return collate
