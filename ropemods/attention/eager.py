"""The terms of `rows` with the scores written out: every feature, every device, memory that grows with heads × T².

What a model on `attn_implementation="eager"` asked for. The probabilities are returned, as eager attention's are.
Query heads that share a key/value head are multiplied with it together, so no key or value is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropemods.attention import slots
from ropemods.attention.rows import Rows, additive_mask, own_column, soft_capped, wide, with_beta


def tempered(rows: Rows) -> Rows:
    """`rows` with β in the place of the rule that asks for it."""
    if rows.entropy_scale is None:
        return rows
    return with_beta(rows, entropy(rows))


def entropy(rows: Rows) -> Tensor:
    """H of every row as its entropy scale reads it."""
    return _entropy_read(rows, *logits_of(rows))


def attend(rows: Rows, *, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out_BHTD, the probabilities of the keys (B, H, T, S), and the log of the denominator (B, H, T)."""
    logits, bias = logits_of(rows)
    if rows.entropy_scale is not None:
        beta = rows.entropy_scale.beta(_entropy_read(rows, logits, bias))
        logits = logits * _of_columns(rows, beta, None if rows.entropy_scale.spares_column else beta)
    logits = _plus(logits, bias)
    joined = slots.together(rows.slots, rows.q_BHTD, logits.dtype)
    highest = logits.detach().amax(-1, keepdim=True)
    if joined is not None:
        highest = torch.maximum(highest, joined.logit_NBHT.detach().amax(0).unsqueeze(-1))
    # A row that sees nothing has a highest logit of -inf: its weights are 0, not NaN.
    highest = torch.where(highest == float("-inf"), torch.zeros_like(highest), highest)
    weights = torch.exp(logits - highest)
    total = weights.sum(-1, keepdim=True)
    if joined is not None:
        slot_weights = torch.exp(joined.logit_NBHT.unsqueeze(-1) - highest)
        total = total + slot_weights.sum(0)
    log_z = (highest + total.log()).squeeze(-1).detach()
    share = torch.where(total == 0, torch.ones_like(total), total)
    probabilities = (weights / share).to(rows.v_BGSD.dtype)
    dropped = torch.nn.functional.dropout(probabilities, p=rows.dropout, training=training)
    out = _by_group(dropped, rows.v_BGSD)
    if joined is not None and joined.value_NHD is not None:
        brought = torch.einsum("nbhtx,nhd->bhtd", slot_weights / share, joined.value_NHD.to(share.dtype))
        out = (out + brought).to(out.dtype)
    return out, probabilities, log_z


def _by_group(x_BHTN: Tensor, y_BGNM: Tensor) -> Tensor:
    """Each query head's matrix times that of its key/value head (B, H, T, M)."""
    groups, (heads, queries) = y_BGNM.shape[1], x_BHTN.shape[1:3]
    product = torch.matmul(x_BHTN.unflatten(1, (groups, -1)).flatten(2, 3), y_BGNM)
    return product.unflatten(2, (heads // groups, queries)).flatten(1, 2)


def _entropy_read(rows: Rows, logits: Tensor, bias: Tensor | None) -> Tensor:
    """H of every row as its entropy scale reads it."""
    assert rows.entropy_scale is not None
    counted = _plus(logits, bias)
    if rows.column is not None and rows.entropy_scale.spares_column:
        spared = rows.column.is_bos_BS[:, None, None, :] & ~rows.column.is_self_BT[:, None, :, None]
        counted = counted.masked_fill(spared, float("-inf"))
    return _entropy(counted)


def _of_columns(rows: Rows, beta_BHT: Tensor, column_BHT: Tensor | None) -> Tensor:
    """A factor on every logit: one on those of keys, another on that of the BOS column."""
    if rows.column is None or column_BHT is beta_BHT:
        return beta_BHT.unsqueeze(-1)
    other = torch.ones_like(beta_BHT) if column_BHT is None else column_BHT
    return torch.where(rows.column.is_bos_BS[:, None, None, :], other.unsqueeze(-1), beta_BHT.unsqueeze(-1))


def logits_of(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """The logits of all keys as a row scale leaves them, and what is added to them, if anything: visibility, the BOS
    weight, biases of keys and offsets."""
    dtype = wide(rows.q_BHTD.dtype)
    logits = _by_group(rows.q_BHTD, rows.k_BGSD.transpose(2, 3)) * rows.scale
    logits = soft_capped(logits.to(dtype), rows.softcap)
    bias = _visibility(rows, logits)
    if rows.column is not None:
        is_bos = rows.column.is_bos_BS[:, None, None, :]
        logits = torch.where(is_bos, rows.column.logit_BHT.unsqueeze(-1), logits)
        weight = rows.column.log_weight_BT(dtype)[:, None, :, None]
        bias = _plus(torch.where(is_bos, weight, torch.zeros_like(weight)), bias)
    if rows.offset_bias is not None:
        column_S = torch.arange(logits.shape[-1], device=logits.device)
        offset_BTS = (own_column(rows).unsqueeze(-1) - column_S).clamp(min=0)
        factors, added = (x_HO.to(dtype)[:, offset_BTS].transpose(0, 1) for x_HO in rows.offset_bias)
        logits, bias = logits * factors, _plus(added, bias)
    if rows.key_bias is not None:
        bias = _plus(rows.key_bias.bias_BHS.to(dtype).unsqueeze(2), bias)
    if rows.row_scale is not None:
        logits = logits * _of_columns(rows, *rows.row_scale)
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
