"""Logits whose leakage is known exactly: Toeplitz + planted departure + content noise.

Content is drawn from a finite set of patterns with equal chances, so every expectation is a mean over
patterns and the truth carries no error of its own. Heads are independent repetitions of one experiment:
200 heads are 200 draws of the same measurement.

Shapes: P patterns, B sequences, H heads, T queries, S keys, W window, I queries i ≥ w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums


def spread(v_IW: Tensor) -> float:
    """Mean over i and δ of (V − mean_i V)²: the leakage of a map that is known."""
    return float((v_IW - v_IW.mean(0)).square().mean())


def far_spread(v_IW: Tensor, protocol: Protocol, start: int, stop: int) -> float:
    """Mean over queries start ≤ i < stop of (V − V(∞))², the map beginning at query w."""
    w = protocol.window
    far_W = v_IW[protocol.late - w :].mean(0)
    return float((v_IW[start - w : stop - w] - far_W).square().mean())


@dataclass(frozen=True)
class Windowed:
    """Attention over the last w keys only, so that the causal mask shows nothing.

    Content: one of P patterns over the window, redrawn every `block` queries.
    """

    protocol: Protocol
    planted: float
    block: int = 4
    noise: float = 0.5

    def parts(self) -> tuple[Tensor, Tensor]:
        """E s, [T, W], and the patterns, [P, W]."""
        p, source = self.protocol, torch.Generator().manual_seed(7)
        offsets = torch.arange(p.window, dtype=torch.float64)
        early = (12.0 / (12.0 + torch.arange(p.length))).double()
        mean_TW = -0.3 * offsets + self.planted * early[:, None] * torch.cos(1.3 * offsets)
        patterns_PW = self.noise * torch.randn(16, p.window, generator=source, dtype=torch.float64)
        return mean_TW, patterns_PW

    def truth(self) -> Tensor:
        """V(i, δ) of residual and total alike, [I, W]."""
        mean_TW, patterns_PW = self.parts()
        s_PTW = mean_TW + patterns_PW[:, None]
        return (s_PTW - s_PTW.logsumexp(-1, keepdim=True)).mean(0)[self.protocol.window :]

    def draw(self, sequences: int, heads: int, source: torch.Generator) -> Tensor:
        """Banded logits [B, H, T, W]."""
        mean_TW, patterns_PW = self.parts()
        blocks = -(-self.protocol.length // self.block)
        which = torch.randint(len(patterns_PW), (sequences, heads, blocks), generator=source)
        which_BHT = which.repeat_interleave(self.block, -1)[..., : self.protocol.length]
        return (mean_TW + patterns_PW[which_BHT]).float()

    def sums(self, *, heads: int, seed: int = 0) -> Sums:
        source = torch.Generator().manual_seed(seed)

        def give(sums: Sums, groups: list[int]) -> None:
            band = self.draw(len(groups), heads, source)
            sums.add(0, groups, band_BHTW=band, lse_BHT=band.logsumexp(-1))

        return measured(self.protocol, give)


@dataclass(frozen=True)
class Causal:
    """Whole causal rows: a Toeplitz mean, an optional departure from it, and P content patterns."""

    protocol: Protocol
    planted: float = 0.0
    noise: float = 1.0
    patterns: int = 24
    toeplitz_content: bool = False

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Toeplitz mean [T, S], planted departure [T, S], content [P, T, S] of mean 0 over P."""
        T, w = self.protocol.length, self.protocol.window
        source = torch.Generator().manual_seed(11)
        i, j = torch.arange(T).double()[:, None], torch.arange(T).double()
        offset = (i - j).clamp(min=0)
        mean_TS = 1.5 * torch.exp(-offset / 5) - 0.01 * offset
        raw_TS = self.planted * torch.sin(0.4 * i + 0.1 * j) * 20 / (20 + i)
        planted_TS = torch.zeros(T, T, dtype=torch.float64)
        for o in range(T):
            rows = torch.arange(max(w, o + 1), T)  # content cells: i ≥ w and j ≥ 1
            if len(rows):
                cells = raw_TS[rows, rows - o]
                planted_TS[rows, rows - o] = cells - cells.mean()
        if self.toeplitz_content:
            shape = torch.randn(self.patterns, T, generator=source, dtype=torch.float64)
            content_PTS = shape[:, offset.long()]
        else:
            content_PTS = torch.randn(self.patterns, T, T, generator=source, dtype=torch.float64)
        content_PTS = self.noise * (content_PTS - content_PTS.mean(0))
        return mean_TS, planted_TS, content_PTS

    def maps(self) -> dict[str, Tensor]:
        """True V of each term: residual and total [I, W], mask [I, 1]."""
        mean_TS, planted_TS, content_PTS = self.parts()
        w = self.protocol.window
        hidden_TS = ~torch.ones_like(mean_TS).tril().bool()
        s_PTS = (mean_TS + planted_TS + content_PTS).masked_fill(hidden_TS, -torch.inf)
        band_PTW = band_of(s_PTS, w)
        log_Z_PT = s_PTS.logsumexp(-1)
        even_PTS = (mean_TS + content_PTS).masked_fill(hidden_TS, -torch.inf)
        return {
            "residual": (band_PTW - band_PTW.logsumexp(-1, keepdim=True)).mean(0)[w:],
            "total": (band_PTW - log_Z_PT[..., None]).mean(0)[w:],
            "mask": -even_PTS.logsumexp(-1).mean(0)[w:, None],
        }

    def sums(self, *, heads: int, seed: int = 0) -> Sums:
        mean_TS, planted_TS, content_PTS = self.parts()
        T, w, grid = self.protocol.length, self.protocol.window, list(self.protocol.grid())
        hidden_TS = ~torch.ones(T, T).tril().bool()
        s_PTS = (mean_TS + planted_TS + content_PTS).masked_fill(hidden_TS, -torch.inf).float()
        band_PTW, log_Z_PT, rows_PRS = band_of(s_PTS, w), s_PTS.logsumexp(-1), s_PTS[:, grid]
        source = torch.Generator().manual_seed(seed)

        def give(sums: Sums, groups: list[int]) -> None:
            which_BH = torch.randint(self.patterns, (len(groups), heads), generator=source)
            sums.add(
                0,
                groups,
                band_BHTW=band_PTW[which_BH],
                lse_BHT=log_Z_PT[which_BH],
                rows_BHRS=rows_PRS[which_BH] if self.protocol.mask_term else None,
            )

        return measured(self.protocol, give)


def band_of(s_xTS: Tensor, window: int) -> Tensor:
    """The band s[i, i−δ] of whole logits, −inf where i < δ."""
    T = s_xTS.shape[-1]
    band = torch.full((*s_xTS.shape[:-1], window), -torch.inf, dtype=s_xTS.dtype)
    for offset in range(window):
        band[..., offset:, offset] = s_xTS.diagonal(-offset, -2, -1)[..., : T - offset]
    return band


def measured(protocol: Protocol, give: Callable[[Sums, list[int]], None], **options: object) -> Sums:
    """Read every fold through `give(sums, groups)`, in batches, and close it."""
    sums = Sums(protocol, **options)  # type: ignore[arg-type]
    for fold in protocol.folds():
        groups = [g for g in fold for _ in range(protocol.per_group)]
        for start in range(0, len(groups), protocol.batch_size):
            give(sums, groups[start : start + protocol.batch_size])
        sums.close_fold()
    return sums


class LargestTensor(TorchDispatchMode):
    """Remembers the element count of the largest storage that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result
