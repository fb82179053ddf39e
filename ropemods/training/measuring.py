"""What is measured of every arm, in one place and in the same way: leakage and held-out loss.

The leakage is `ropemods.measure` on the held-out documents under the recipe's protocol. The held-out loss beside it is
read from rows made like the training rows, so it says how well the model does on the text it was tuned for.

Every arm is measured as a plain model that each rank holds whole: a trained arm is read back from what it saved. So the
numbers belong to the checkpoint that a user gets, and no launcher can make them differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ropemods
from ropemods.leakage.documents import Documents, join_short
from ropemods.leakage.protocol import Protocol
from ropemods.report.report import Report
from ropemods.training.batches import Ordered, collator
from ropemods.training.data import Data


@dataclass(frozen=True)
class Measured:
    """One arm's numbers."""

    loss: float
    """Nats per token on the held-out rows."""
    tokens: int
    """Tokens that were predicted for it."""
    report: Report | None
    """None where the recipe has no protocol."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def measure(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    protocol: Protocol | None,
    *,
    bos: int,
    device: torch.device,
    batch_size: int = 8,
    command: str | None = None,
) -> Measured:
    """Everything that the table says of an arm."""
    model = model.to(device).eval()
    loss, tokens = held_out_loss(model, data, device=device, batch_size=batch_size)
    report = None
    if protocol is not None:
        documents = held_out_documents(data)
        report = ropemods.measure(model, tokenizer, documents, protocol, bos_token_id=bos, command=command)
    return Measured(loss, tokens, report)


def held_out_documents(data: Data) -> Documents:
    """The held-out documents as a measurement takes them; short ones joined where the recipe says so."""
    documents = Documents(data.held_out_documents, f"{data.options.source.name}, documents that never trained")
    if data.options.held_out_join == 0:
        return documents
    return join_short(documents, characters=data.options.held_out_join)


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Data, *, device: torch.device, batch_size: int = 8) -> tuple[float, int]:
    """Mean loss over all held-out tokens, and their number. Ranks share the rows; every rank gets the same answer."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = Ordered(data.held_out_rows, np.arange(rank, len(data.held_out_rows), world))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in DataLoader(mine, batch_size=batch_size, collate_fn=collator(data.options.row_packing)):
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        labels_BT = inputs.pop("labels")
        logits_BTV = model(**inputs, use_cache=False).logits
        sums += _loss(logits_BTV, labels_BT)
    if world > 1:
        dist.all_reduce(sums)
    total, tokens = sums.tolist()
    return total / tokens, int(tokens)


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """(summed loss, predicted tokens) of a batch."""
    predicted, wanted = logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten()
    loss = nn.functional.cross_entropy(predicted, wanted, ignore_index=-100, reduction="sum")
    return torch.stack((loss.double(), (wanted != -100).sum().double()))


def unigram_loss(data: Data, *, vocabulary: int) -> float:
    """The held-out loss of token frequencies alone (of the training rows, each count one higher): a floor to beat."""
    counts_V = np.ones(vocabulary)
    train, held_out = data.rows, data.held_out_rows
    np.add.at(counts_V, train.tokens_NT[train.positions_NT > 0], 1)
    wanted = held_out.tokens_NT[held_out.positions_NT > 0]
    return float(-np.log(counts_V[wanted] / counts_V.sum()).mean())
