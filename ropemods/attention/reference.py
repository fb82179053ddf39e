"""The oracle: attention with every term, written as the formulas, in fp64, one query at a time where that is clearest.

Nothing here is fast and nothing here shares code with the fast paths; what they compute is right when it equals this.
Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, F rotary frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PAPER = (-0.037, 0.481, -2.3, 4.917, -1.791)


def temperature(entropy: Tensor, *, coefficients=PAPER, beyond: str = "paper", strength: float = 1.0) -> Tensor:
    """β = max(P(H), 1) for H > 0.5, else 1; P(H) = −0.037 H⁴ + 0.481 H³ − 2.3 H² + 4.917 H − 1.791 (2410.01104)."""
    h = entropy
    if beyond == "hold":
        h = torch.minimum(h, torch.tensor(peak(coefficients), dtype=h.dtype))
    a4, a3, a2, a1, a0 = torch.as_tensor(coefficients, dtype=h.dtype).unbind(-1)
    if a4.ndim:  # one polynomial per head, heads on the second axis of the entropy
        a4, a3, a2, a1, a0 = (a[None, :, None] for a in (a4, a3, a2, a1, a0))
    p = a4 * h**4 + a3 * h**3 + a2 * h**2 + a1 * h + a0
    beta = torch.where(entropy > 0.5, torch.maximum(p, torch.ones_like(p)), torch.ones_like(p))
    return 1 + strength * (beta - 1)


def peak(coefficients=PAPER) -> float:
    """The entropy at which the polynomial is largest, by a fine search of [0.5, 8]."""
    grid = torch.linspace(0.5, 8.0, 2_000_001, dtype=torch.float64)
    a4, a3, a2, a1, a0 = coefficients
    return float(grid[(a4 * grid**4 + a3 * grid**3 + a2 * grid**2 + a1 * grid + a0).argmax()])


def truncated_frequencies(inv_freq: Tensor, *, keep: float, which: str = "lowest", strength: float = 1.0) -> Tensor:
    """p-RoPE (2410.06205): the kept fraction turns as before, each dropped frequency is multiplied by 1 − strength."""
    count = len(inv_freq)
    kept = int(keep * (2 * count) // 2)
    out = inv_freq.clone()
    for index in range(count):
        dropped = index >= kept if which == "lowest" else index < count - kept
        if dropped:
            out[index] = inv_freq[index] * (1 - strength)
    return out


def rotate(x_D: Tensor, angle_F: Tensor, *, interleaved: bool = False, start: int = 0) -> Tensor:
    """Turn each rotary pair of one vector by its angle, counterclockwise; the other channels stay."""
    out, frequencies = x_D.clone(), len(angle_F)
    for f in range(frequencies):
        first = start + (2 * f if interleaved else f)
        second = start + (2 * f + 1 if interleaved else f + frequencies)
        cos, sin = math.cos(angle_F[f]), math.sin(angle_F[f])
        out[first] = x_D[first] * cos - x_D[second] * sin
        out[second] = x_D[second] * cos + x_D[first] * sin
    return out


def attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    visible_BTS: Tensor,
    scale: float,
    softcap: float | None = None,
    bos_BT: Tensor | None = None,
    bos_logit_BHT: Tensor | None = None,
    bos_weight_BT: Tensor | None = None,
    sink_H: Tensor | None = None,
    sink_weight: float = 1.0,
    temperature_rule=None,
    spare_bos: bool = False,
) -> Tensor:
    """One row at a time: softmax over what the query sees, with the BOS column, the temperature and the sink.

    `bos_BT` is the column of each query's BOS; `bos_logit_BHT` its logit where it is not the natural one;
    `temperature_rule` maps entropies (B, H, T) to β. A row that sees nothing gives zeros.
    """
    batch, heads, queries, _ = q_BHTD.shape
    groups = k_BGSD.shape[1]
    k_BHSD = k_BGSD.repeat_interleave(heads // groups, dim=1)
    v_BHSD = v_BGSD.repeat_interleave(heads // groups, dim=1)
    s_BHTS = scale * torch.einsum("bhtd,bhsd->bhts", q_BHTD, k_BHSD)
    if softcap is not None:
        s_BHTS = softcap * torch.tanh(s_BHTS / softcap)
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                seen = visible_BTS[b, t].nonzero().flatten()
                logits, values = s_BHTS[b, h, t, seen], v_BHSD[b, h, seen]
                is_bos = torch.zeros_like(seen, dtype=torch.bool) if bos_BT is None else seen == bos_BT[b, t]
                if bos_logit_BHT is not None:
                    logits = torch.where(is_bos, bos_logit_BHT[b, h, t], logits)
                weight = torch.ones_like(logits)
                if bos_weight_BT is not None:
                    weight = torch.where(is_bos, bos_weight_BT[b, t].to(logits.dtype), weight)
                beta = torch.ones_like(logits)
                counted = (weight > 0) & ~(is_bos & spare_bos)
                if temperature_rule is not None and counted.any():
                    log_p = torch.log_softmax(logits[counted] + weight[counted].log(), 0)
                    entropy = -(log_p.exp() * log_p).sum()
                    factor = temperature_rule(entropy.expand(1, heads, 1))[0, h, 0]
                    beta = torch.where(is_bos & spare_bos, beta, factor)
                numerators = weight * torch.exp(beta * logits)
                denominator = numerators.sum()
                if sink_H is not None:
                    denominator = denominator + sink_weight * torch.exp(sink_H[h])
                # A row that sees nothing, and has no sink, has nothing to divide by and gives zeros.
                mixed = (numerators[:, None] * values).sum(0)
                rows.append(mixed if denominator == 0 else mixed / denominator)
    return torch.stack(rows).view(batch, heads, queries, -1)
