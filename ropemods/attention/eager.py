"""The terms of `rows` with the scores written out: every feature, every device, memory that grows with heads × T².

What a model on `attn_implementation="eager"` asked for. The probabilities are returned, as eager attention's are.
Query heads that share a key/value head are multiplied with it together, so no key or value is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropemods.attention.rows import Rows, additive_mask, soft_capped, wide, with_beta


def tempered(rows: Rows) -> Rows:
    """`rows` with β in the place of the temperature it asks for."""
    if rows.temperature is None:
        return rows
    return _with_beta(rows, *_logits(rows))


def attend(rows: Rows, *, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out_BHTD, the probabilities of the keys (B, H, T, S), and the log of the denominator (B, H, T)."""
    logits, bias = _logits(rows)
    if rows.temperature is not None:
        rows = _with_beta(rows, logits, bias)
    if rows.beta_BHT is not None:
        beta = rows.beta_BHT.unsqueeze(-1)
        if rows.bos is not None and rows.beta_spares_bos:
            beta = torch.where(rows.bos.is_bos_BS[:, None, None, :], torch.ones_like(beta), beta)
        logits = beta * logits
    logits = _plus(logits, bias)
    highest = logits.detach().amax(-1, keepdim=True)
    if rows.sink_H is not None:
        highest = torch.maximum(highest, rows.sink_H.detach().to(highest.dtype)[:, None, None])
    # A row that sees nothing has a highest logit of -inf: its weights are 0, not NaN.
    highest = torch.where(highest == float("-inf"), torch.zeros_like(highest), highest)
    weights = torch.exp(logits - highest)
    total = weights.sum(-1, keepdim=True)
    if rows.sink_H is not None:
        total = total + torch.exp(rows.sink_H.to(total.dtype)[:, None, None] - highest)
    log_z = (highest + total.log()).squeeze(-1).detach()
    probabilities = (weights / torch.where(total == 0, torch.ones_like(total), total)).to(rows.v_BGSD.dtype)
    dropped = torch.nn.functional.dropout(probabilities, p=rows.dropout, training=training)
    return _by_group(dropped, rows.v_BGSD), probabilities, log_z


def _by_group(x_BHTN: Tensor, y_BGNM: Tensor) -> Tensor:
    """Each query head's matrix times that of its key/value head (B, H, T, M)."""
    groups, (heads, queries) = y_BGNM.shape[1], x_BHTN.shape[1:3]
    product = torch.matmul(x_BHTN.unflatten(1, (groups, -1)).flatten(2, 3), y_BGNM)
    return product.unflatten(2, (heads // groups, queries)).flatten(1, 2)


def _with_beta(rows: Rows, logits: Tensor, bias: Tensor | None) -> Rows:
    assert rows.temperature is not None
    counted = _plus(logits, bias)
    if rows.bos is not None and rows.temperature.spare_bos:
        spared = rows.bos.is_bos_BS[:, None, None, :] & ~rows.bos.is_self_BT[:, None, :, None]
        counted = counted.masked_fill(spared, float("-inf"))
    return with_beta(rows, _entropy(counted))


def _logits(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """The logits of all keys, untempered, and what is added to them, if anything: visibility, the BOS weight."""
    dtype = wide(rows.q_BHTD.dtype)
    logits = _by_group(rows.q_BHTD, rows.k_BGSD.transpose(2, 3)) * rows.scale
    logits = soft_capped(logits.to(dtype), rows.softcap)
    bias = _visibility(rows, logits)
    if rows.bos is not None:
        is_bos = rows.bos.is_bos_BS[:, None, None, :]
        logits = torch.where(is_bos, rows.bos.logit_BHT.unsqueeze(-1), logits)
        weight = rows.bos.log_weight_BT(dtype)[:, None, :, None]
        bias = _plus(torch.where(is_bos, weight, torch.zeros_like(weight)), bias)
    return logits, bias


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _visibility(rows: Rows, logits: Tensor) -> Tensor | None:
    """What is added to the logits so that a key is seen or not; None when all are seen."""
    mask = additive_mask(rows, logits.dtype)
    if mask is not None:
        return mask
    if not rows.causal:
        return None
    queries, keys = logits.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=logits.device).triu(1)
    return torch.zeros(queries, keys, dtype=logits.dtype, device=logits.device).masked_fill_(hidden, float("-inf"))


def _entropy(logits: Tensor) -> Tensor:
    """−Σ p log p in nats; 0 for a row that sees one key or none."""
    highest = logits.detach().amax(-1, keepdim=True)
    highest = torch.where(highest == float("-inf"), torch.zeros_like(highest), highest)
    # Hidden keys have p = 0 and a logit of -inf; their product is 0, which floating point does not know.
    logits = (logits - highest).clamp(min=torch.finfo(logits.dtype).min)
    weights = torch.exp(logits)
    total = weights.sum(-1)
    total = torch.where(total == 0, torch.ones_like(total), total)
    return total.log() - (weights * logits).sum(-1) / total
