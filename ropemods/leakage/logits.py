"""Attention logits for measuring, without a T × T tensor.

`banded_logits` gives the few offsets that the residual term compares, `grid_logits` whole rows for a
few queries, which the mask term needs. Both read the rotated q and k that any fused kernel sees.
`pair_norms` gives how much each rotary frequency is used.

All take and return logits before the causal mask's effect on the softmax: scaled, and soft-capped
where the model does that. Results are fp32 (fp64 for fp64 inputs), whatever the model's dtype.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys (= T), D head dim,
W window of offsets, R grid rows, F rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEGLIGIBLE = -80.0
"""Nats below the highest logit at which a weight (2e-35) changes no sum in float32. Exponentials of less, −inf
included, are up to ten times slower on a CPU, so they are not taken."""
ROWS_AT_ONCE = 1024
"""Queries handled together, which bounds the working memory at any length."""


@torch.no_grad()
def banded_logits(q_BHTD: Tensor, k_BGSD: Tensor, *, scale: float, window: int, softcap: float | None = None) -> Tensor:
    """s[i, i−δ] for δ = 0 … window−1, as [B, H, T, W]; −inf where i < δ. Cost O(T · w · D)."""
    _expect_heads(q_BHTD, k_BGSD)
    (B, H, T, D), G = q_BHTD.shape, k_BGSD.shape[1]
    dtype = _wide(q_BHTD.dtype)
    # r numbers the query heads that share a key head.
    band_BGrTW = q_BHTD.new_full((B, G, H // G, T, window), -torch.inf, dtype=dtype)
    for start in range(0, T, ROWS_AT_ONCE):
        stop, first = min(start + ROWS_AT_ONCE, T), max(start - window + 1, 0)
        q_BGrTD = q_BHTD[:, :, start:stop].to(dtype).mul(scale).view(B, G, H // G, -1, D)
        k_BG1SD = k_BGSD[:, :, None, first:stop].to(dtype)
        for offset in range(min(window, stop)):
            query = max(start, offset)  # the first that has a key so far back
            q = q_BGrTD[:, :, :, query - start :]
            k = k_BG1SD[:, :, :, query - offset - first : stop - offset - first]
            band_BGrTW[:, :, :, query:stop, offset] = torch.linalg.vecdot(q, k)
    if softcap is not None:
        # tanh(−inf) is −1, so what has no key is marked again.
        missing = band_BGrTW == -torch.inf
        band_BGrTW.div_(softcap).tanh_().mul_(softcap).masked_fill_(missing, -torch.inf)
    return band_BGrTW.view(B, H, T, window)


@torch.no_grad()
def grid_logits(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    *,
    rows: Sequence[int],
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Whole rows of logits for the queries in `rows`, [B, H, R, S]; −inf on keys the query cannot see."""
    B, H, _, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    _expect_heads(q_BHTD, k_BGSD)
    dtype = _wide(q_BHTD.dtype)
    rows_R = torch.tensor(rows, device=q_BHTD.device)
    q_BGmD = (q_BHTD[:, :, rows_R].to(dtype) * scale).view(B, G, H // G * len(rows), D)
    s_BHRS = torch.matmul(q_BGmD, k_BGSD.to(dtype).mT).view(B, H, len(rows), S)
    if softcap is not None:
        s_BHRS.div_(softcap).tanh_().mul_(softcap)
    offset_RS = rows_R[:, None] - torch.arange(S, device=rows_R.device)
    hidden_RS = offset_RS < 0
    if sliding_window is not None:
        hidden_RS |= offset_RS >= sliding_window
    # Adding is several times faster than filling where a small mask is spread over heads.
    return s_BHRS.add_(torch.zeros_like(offset_RS, dtype=dtype).masked_fill_(hidden_RS, -torch.inf))


@torch.no_grad()
def pair_norms(x_BHTD: Tensor, *, rotary_dim: int | None = None, interleaved: bool = False) -> Tensor:
    """2-norm of every rotated pair of channels, [B, H, T, F]. Rotation does not change it.

    Pair f is channels (f, f + F) of the first `rotary_dim`, or (2f, 2f + 1) where `interleaved`.
    """
    rotary_dim = x_BHTD.shape[-1] if rotary_dim is None else rotary_dim
    x = x_BHTD[..., :rotary_dim].to(_wide(x_BHTD.dtype))
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    return torch.hypot(pairs[..., 0], pairs[..., 1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _expect_heads(q_BHTD: Tensor, k_BGSD: Tensor) -> None:
    H, T = q_BHTD.shape[1:3]
    G, S = k_BGSD.shape[1:3]
    if H % G or T != S:
        raise ValueError(
            f"logits need whole sequences and query heads in whole groups per key head; found "
            f"{H} query heads on {G} key heads, {T} queries on {S} keys. Measure without a cache."
        )
