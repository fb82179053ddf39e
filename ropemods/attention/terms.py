"""The terms that may be added to softmax rows. Each says what it holds, how two of it compose, and what it does to one
row written out (`plain_row`).

    ℓ_ij = β_i · a(i − j) · s_ij + c_j + m(i − j)              s_ij scaled and soft-capped; b_i in the BOS column

                  Σ_j w_ij e^{ℓ_ij} v_j + Σ_s e^{z_is} ν_s
        out_i = ─────────────────────────────────────────
                    Σ_j w_ij e^{ℓ_ij} + Σ_s e^{z_is}

| term         | holds                                   | two of it                                              |
| RowScale     | β, a factor on each row's logits        | the product                                            |
| EntropyScale | a rule from a row's entropy to a β      | refused; it reads rows as every RowScale leaves them   |
| Column       | the BOS's logit b and weight w          | the last logit that was claimed; weights multiply      |
| Slot         | a logit z of its own, with a value or none | each stands                                         |
| KeyBias      | c, added to every logit of a key        | the sum                                                |
| OffsetBias   | a and m by how far back a key stands    | products of a, sums of m                               |

The entropy is taken over the keys (the BOS left out where it is spared), before its β and never over slots, which
nothing multiplies. So terms do not see each other's order: whichever modification comes first, the row is the same.

Shapes: B batch, H query heads, T queries, S keys, D head dim, O offsets.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ropemods.attention.plain_row import PlainRow


class Term(Protocol):
    """What every term can do."""

    def naive(self, row: PlainRow) -> None:
        """What it does to one row, in the precision of the row."""


class RowScale(NamedTuple):
    """β of each row, known."""

    beta_BHT: Tensor
    column_BHT: Tensor | None
    """On the logit of the BOS column: β as well, or None where it is spared."""

    def joined(self, other: RowScale) -> RowScale:
        of_column = [x for x in (self.column_BHT, other.column_BHT) if x is not None]
        column = of_column[0] * of_column[1] if len(of_column) == 2 else next(iter(of_column), None)
        return RowScale(self.beta_BHT * other.beta_BHT, column)

    def naive(self, row: PlainRow) -> None:
        column = 1.0 if self.column_BHT is None else self.column_BHT.expand(self.beta_BHT.shape)[row.at]
        row.scales.append((self.beta_BHT[row.at], column))


class EntropyScale(NamedTuple):
    """β as a function of a row's entropy; see `ropemods.mods.adaptive_temperature` for the published values."""

    coefficients_HC: Tensor
    """Polynomial in the entropy, highest power first; one row for all heads or one per head."""
    strength: Tensor
    hold_from: float | None = None
    """Entropy past which β keeps the value it has there; None follows the polynomial to its end."""
    spares_column: bool = False
    cornered: bool = True
    """Whether β is 1 up to an entropy of 0.5 and never below it, as published; else the polynomial as it is."""

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
        if self.cornered:
            value = torch.where(entropy_BHT > 0.5, value.clamp(min=1.0), torch.ones_like(value))
        return 1 + self.strength.to(entropy.dtype) * (value - 1)

    def naive(self, row: PlainRow) -> None:
        head = row.at[1] if len(self.coefficients_HC) > 1 else 0
        coefficients = self.coefficients_HC[head]

        def beta(entropy: Tensor) -> Tensor:
            h = entropy if self.hold_from is None else entropy.clamp(max=self.hold_from)
            highest = len(coefficients) - 1
            value = sum((c.to(h.dtype) * h ** (highest - n) for n, c in enumerate(coefficients)), torch.zeros_like(h))
            if self.cornered:
                value = torch.maximum(value, torch.ones_like(value)) if entropy > 0.5 else torch.ones_like(value)
            return 1 + self.strength.to(h.dtype) * (value - 1)

        row.rule = beta, self.spares_column


class Column(NamedTuple):
    """The column of each query's BOS, scored apart from the other keys."""

    is_bos_BS: Tensor
    """True where a key is a BOS. In a packed row several are; the mask hides all but the query's own."""
    is_self_BT: Tensor
    """True where a query is itself the BOS: it has nothing else to read, so its own column stays open."""
    logit_BHT: Tensor
    """b_i in fp32 (fp64 for fp64 inputs): scaled and soft-capped, with no factor on it."""
    log_weight: Tensor
    """log w for every later query (a scalar): 0 leaves the column open, -inf closes it."""

    def log_weight_BT(self, dtype: torch.dtype) -> Tensor:
        weight = self.log_weight.to(dtype)
        return torch.where(self.is_self_BT, torch.zeros_like(weight), weight)

    def weighed(self) -> Tensor:
        """The column's logit with its weight in it (B, H, T)."""
        return self.logit_BHT + self.log_weight_BT(self.logit_BHT.dtype)[:, None]

    def closed(self) -> Column:
        return self._replace(log_weight=torch.full_like(self.log_weight, float("-inf")))

    def naive(self, row: PlainRow) -> None:
        if row.bos is not None:
            row.bos_logit = self.logit_BHT[row.at].to(row.query_D.dtype)
            row.bos_log_weight = self.log_weight_BT(row.query_D.dtype).expand(len(self.logit_BHT), -1)[row.at[::2]]


class Slot(NamedTuple):
    """A place in every row that no token stands in."""

    logit: Tensor
    """z: one a head (H), or one a row (B, H, T)."""
    value_HD: Tensor | None = None

    def logit_BHT(self, like_BHT: Tensor) -> Tensor:
        logit = self.logit if self.logit.ndim == 3 else self.logit[:, None]
        return logit.to(like_BHT.dtype).expand_as(like_BHT)

    def naive(self, row: PlainRow) -> None:
        head, dtype = row.at[1], row.query_D.dtype
        logit = self.logit[row.at] if self.logit.ndim == 3 else self.logit[head]
        row.slots.append((logit.to(dtype), None if self.value_HD is None else self.value_HD[head].to(dtype)))


class KeyBias(NamedTuple):
    """What is added to the logits of each key, whatever multiplies them."""

    bias_BHS: Tensor
    """One for all (1) or one a sequence and head."""

    def joined(self, other: KeyBias) -> KeyBias:
        return KeyBias(self.bias_BHS + other.bias_BHS)

    def naive(self, row: PlainRow) -> None:
        (b, h, _), (batch, heads, _) = row.at, self.bias_BHS.shape
        row.add(self.bias_BHS[b % batch, h % heads, row.columns].to(row.query_D.dtype))


class OffsetBias(NamedTuple):
    """What multiplies a logit, and what is added to it, by how far before its query a key stands."""

    scale_HO: Tensor
    """a, of offset 0 first; one row for all heads or one a head."""
    bias_HO: Tensor
    """m."""

    def joined(self, other: OffsetBias) -> OffsetBias:
        return OffsetBias(self.scale_HO * other.scale_HO, self.bias_HO + other.bias_HO)

    def naive(self, row: PlainRow) -> None:
        head, dtype = row.at[1], row.query_D.dtype
        scale = self.scale_HO[head % len(self.scale_HO)][row.offsets_N].to(dtype)
        row.factors_N = scale if row.factors_N is None else row.factors_N * scale
        row.add(self.bias_HO[head % len(self.bias_HO)][row.offsets_N].to(dtype))
