"""What one attention call computes: every softmax row, with the three terms a modification may add.

A plain row i is  out_i = Σ_j e^{s_ij} v_j / Σ_j e^{s_ij}  with s_ij = scale · ⟨q_i, k_j⟩.  The modifications add

- a **BOS column** scored apart: key j that is the BOS of query i gets logit b_i and weight w_i instead of s_ij,
- a **temperature**: the logits of the keys are multiplied by β_i, a function of the row's entropy,
- a **sink**: a logit per head that joins the denominator and carries no value.

                    Σ_j e^{β_i s_ij} v_j  +  w_i e^{β′_i b_i} v_bos
    out_i  =  ─────────────────────────────────────────────────────────          (j runs over the other visible keys)
                    Σ_j e^{β_i s_ij}  +  w_i e^{β′_i b_i}  +  e^{sink_h}

β′ is β, or 1 where the temperature spares the BOS. The entropy is taken over the keys (the BOS left out where it is
spared), before the temperature and never over the sink; the sink is never tempered. So the three terms do not see
each other's order: whichever modification comes first, the row is the same.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BosColumn(NamedTuple):
    """The column of each query's BOS, scored apart from the other keys."""

    is_bos_BS: Tensor
    """True where a key is a BOS. In a packed row several are; the mask hides all but the query's own."""
    is_self_BT: Tensor
    """True where a query is itself the BOS: it has nothing else to read, so its own column stays open."""
    logit_BHT: Tensor
    """b_i in fp32 (fp64 for fp64 inputs): scaled and soft-capped, not tempered."""
    log_weight: Tensor
    """log w for every later query (a scalar): 0 leaves the column open, -inf closes it."""

    def log_weight_BT(self, dtype: torch.dtype) -> Tensor:
        weight = self.log_weight.to(dtype)
        return torch.where(self.is_self_BT, torch.zeros_like(weight), weight)

    def closed(self) -> BosColumn:
        return self._replace(log_weight=torch.full_like(self.log_weight, float("-inf")))


class Temperature(NamedTuple):
    """β as a function of a row's entropy; see `ropemods.mods.adaptive_temperature` for the published values."""

    coefficients_HC: Tensor
    """Polynomial in the entropy, highest power first; one row for all heads or one per head."""
    strength: Tensor
    hold_from: float | None
    """Entropy past which β keeps the value it has there; None follows the polynomial to its end."""
    spare_bos: bool

    def beta(self, entropy_BHT: Tensor) -> Tensor:
        """1 + strength · (max(P(H), 1) − 1) where H > 0.5, else 1."""
        entropy = entropy_BHT
        if self.hold_from is not None:
            entropy = entropy.clamp(max=self.hold_from)
        coefficients = self.coefficients_HC.to(entropy.dtype)
        # Horner, highest power first: in ascending order the rule is a no-op, a bug seen in the wild.
        value = torch.zeros_like(entropy)
        for power in range(coefficients.shape[-1]):
            value = value * entropy + coefficients[:, power, None]
        sharpened = torch.where(entropy_BHT > 0.5, value.clamp(min=1.0), torch.ones_like(value))
        return 1 + self.strength.to(entropy.dtype) * (sharpened - 1)


class Rows(NamedTuple):
    """One attention call. `None` terms are absent, and cost nothing."""

    q_BHTD: Tensor
    k_BGSD: Tensor
    v_BGSD: Tensor
    mask: Tensor | None
    """Broadcastable to (B, 1 or H, T, S): boolean (True may be seen) or additive."""
    causal: bool
    """Query i sees keys 0..i. Only without a mask."""
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    bos: BosColumn | None = None
    temperature: Temperature | None = None
    """Asked for; a backend's `tempered` turns it into the factors below."""
    beta_BHT: Tensor | None = None
    """β of each row; the BOS column has it too unless `beta_spares_bos`."""
    beta_spares_bos: bool = False
    sink_H: Tensor | None = None


HIDDEN = -9984.0
"""An additive mask of this or less hides the key, in every dtype: -1e4, as bf16 rounds it."""


def shown(mask: Tensor) -> Tensor:
    """Where a mask, boolean (or of ones and zeros) or additive, shows the key."""
    return mask > HIDDEN if mask.dtype.is_floating_point else mask.bool()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits are reasoned about in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def with_beta(rows: Rows, entropy_BHT: Tensor) -> Rows:
    """`rows` with its temperature resolved, given the entropy it reads."""
    rule = rows.temperature
    assert rule is not None
    return rows._replace(temperature=None, beta_BHT=rule.beta(entropy_BHT), beta_spares_bos=rule.spare_bos)


def additive_mask(rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """The visibility of `rows` as a term to add to the logits; the causal pattern is left implicit."""
    if rows.mask is None or rows.mask.dtype != torch.bool:
        return rows.mask if rows.mask is None else rows.mask.to(dtype)
    return torch.zeros_like(rows.mask, dtype=dtype).masked_fill_(~rows.mask, float("-inf"))


def dot_with_bos(q_BHTD: Tensor, k_bos_BGND: Tensor, scale: float) -> Tensor:
    """scale · ⟨q_i, k_bos⟩ for each query, with one BOS key a row (N = 1) or one a query (N = T); accumulated wide."""
    dtype = wide(q_BHTD.dtype)
    groups = k_bos_BGND.shape[1]
    q_BGRTD = q_BHTD.to(dtype).unflatten(1, (groups, -1))
    if k_bos_BGND.shape[2] == 1:  # one vector for all queries: a product that nothing of their size is made for
        product = torch.matmul(q_BGRTD.flatten(2, 3), k_bos_BGND.to(dtype).transpose(2, 3))
        return (product * scale).view(q_BHTD.shape[:3])
    logit_BGRT = (q_BGRTD * k_bos_BGND.to(dtype).unsqueeze(2)).sum(-1) * scale
    return logit_BGRT.flatten(1, 2)
