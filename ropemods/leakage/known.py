"""Synthetic logits whose leakage is known exactly, measured by the code that measures models.

Logits are a known mean plus content, and content is one of P patterns with equal chances, so expectations are means
over patterns and the true leakage has no error of its own. Layers are independent repetitions of one experiment.

    toeplitz   whole causal rows, mean and content depend on the offset alone: residual 0, mask = total
    planted    a mean D(i, δ) on a window of constant size: mask 0, residual = total = the leakage of D

Shapes: N repetitions, P patterns, B sequences, T queries, S keys, W window, I queries i ≥ w.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ropemods.leakage.estimate import estimate
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from ropemods.report.records import Term

PROTOCOL = Protocol(sequences=64, groups=16, length=64, early=(8, 32), grid_rows=24, replicates=400)
PATTERNS = 16
CONTENT = 0.6
"""Spread of the content, in nats."""


@dataclass(frozen=True)
class Known:
    """A kind of logits, [P, T, S] with −inf on hidden keys, and the leakage that they have."""

    logits_PTS: Tensor
    block: int
    """Content is drawn anew every so many queries."""
    truth: float

    def measured(self, repetitions: int, seed: int, *, mask_term: bool) -> dict[str, Term]:
        """The terms found in independent repetitions, each as a layer of one head."""
        protocol = PROTOCOL if mask_term else dataclasses.replace(PROTOCOL, mask_term=False)
        source = torch.Generator().manual_seed(seed)
        s_PTS, grid = self.logits_PTS.float(), list(protocol.grid())
        band_PTW, log_Z_PT = _band(s_PTS, protocol.window), s_PTS.logsumexp(-1)
        sums = Sums(protocol)
        for fold in protocol.folds():
            groups = [group for group in fold for _ in range(protocol.per_group)]
            for layer in range(repetitions):
                blocks = torch.randint(len(s_PTS), (len(groups), -(-protocol.length // self.block)), generator=source)
                which_BT = blocks.repeat_interleave(self.block, -1)[:, : protocol.length]
                at_T = torch.arange(protocol.length)
                sums.add(
                    layer,
                    groups,
                    band_BHTW=band_PTW[which_BT, at_T][:, None],
                    lse_BHT=log_Z_PT[which_BT, at_T][:, None],
                    rows_BHRS=s_PTS[which_BT[:, grid], at_T[grid]][:, None] if mask_term else None,
                )
            sums.close_fold()
        sums.merge()
        return dict(estimate(sums).terms)


def toeplitz() -> Known:
    """Causal rows that depend on the offset alone."""
    T, source = PROTOCOL.length, torch.Generator().manual_seed(11)
    i, j = torch.arange(T).double()[:, None], torch.arange(T).double()
    offset = (i - j).clamp(min=0)
    content_PT = CONTENT * torch.randn(PATTERNS, T, generator=source, dtype=torch.float64)
    s_PTS = 1.5 * torch.exp(-offset / 5) - 0.01 * offset + content_PT[:, offset.long()]
    return Known(s_PTS.masked_fill(j > i, -torch.inf), T, 0.0)


def planted(size: float) -> Known:
    """A departure D(i, δ) of a given size on a window of constant size, in which all attention lies."""
    T, w = PROTOCOL.length, PROTOCOL.window
    source = torch.Generator().manual_seed(7)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    offset = i - j
    inside = (offset >= 0) & (offset < w)
    at = offset.clamp(0, w - 1)
    content_PW = CONTENT * torch.randn(PATTERNS, w, generator=source, dtype=torch.float64)
    departure_TS = size * 12.0 / (12.0 + i) * torch.cos(1.3 * offset.double())
    s_PTS = (-0.3 * offset + departure_TS + content_PW[:, at]).masked_fill(~inside, -torch.inf)
    band_PTW = _band(s_PTS, w)[:, w:]
    true_IW = (band_PTW - band_PTW.logsumexp(-1, keepdim=True)).mean(0)
    return Known(s_PTS, 4, float((true_IW - true_IW.mean(0)).square().mean()))


def covered(known: Known, repetitions: int, name: str = "residual", *, seed: int = 0) -> float:
    """The share of repetitions whose interval holds the truth."""
    term = known.measured(repetitions, seed, mask_term=False)[name]
    hits = sum(layer.all.low <= known.truth <= layer.all.high for layer in term.layers)
    return hits / repetitions


def _band(s_PTS: Tensor, window: int) -> Tensor:
    """s[i, i−δ] as [P, T, W]; −inf where there is no key so far back."""
    T = s_PTS.shape[-1]
    band = torch.full((*s_PTS.shape[:-1], window), -torch.inf, dtype=s_PTS.dtype)
    for offset in range(window):
        band[..., offset:, offset] = s_PTS.diagonal(-offset, -2, -1)[..., : T - offset]
    return band


def reindexed(protocol: Protocol, seed: int) -> Callable[[Tensor], Tensor]:
    """Puts the queries i ≥ w of every sequence and head in a random order, each with its whole band.

    What was planted at some query then stands anywhere, so the expectation is the same at every query: a null.
    """
    source = torch.Generator().manual_seed(seed)

    def reindex(band_BHTW: Tensor) -> Tensor:
        B, H, T, W = band_BHTW.shape
        w = protocol.window
        order_BHI = torch.rand(B, H, T - w, generator=source).argsort(-1).to(band_BHTW.device)
        mixed = band_BHTW[:, :, w:].gather(2, order_BHI[..., None].expand(-1, -1, -1, W))
        return torch.cat((band_BHTW[:, :, :w], mixed), dim=2)

    return reindex
