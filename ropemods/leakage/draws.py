"""From groups of documents to a number, its interval and its bootstrap replicates.

A leakage is a squared mean, L = ‖E X‖², where X_g, the map of one group of documents, is a noisy copy of
E X. Squaring the mean of the X_g would add their noise; so only products of two different groups count:

    L̂ = mean over g ≠ h of ⟨X_g, X_h⟩ ,          unbiased, and fine below 0.

All it needs is the Gram matrix of the groups. It splits (Hoeffding) into a value, one number a_g for each
group and a rest b_gh for each pair, and its variance accordingly (K groups):

    ⟨X_g, X_h⟩ = L̂ + a_g + a_h + b_gh            Var L̂ = 4 ζ_a / K + 2 ζ_b / (K (K − 1)).

Replicate r draws standard normal multipliers x_g, one for each group and centred, and is

    L̂ + λ (2/K) Σ_g x_g a_g + μ Σ_{g≠h} x_g x_h b_gh / (K (K − 1)).

This is the multiplier form of resampling documents. Plain resampling has λ = μ = 1, but the a_g carry noise
of the pairs, which where L = 0 makes its intervals √3 too wide; λ and μ are set so that either part has
the variance that the data say, unbiasedly estimated. ζ_a comes out too small as easily as too
large, so half its standard error where L = 0, √(2/K)/2 of that noise, is left in.
Coverage of the 95% interval, simulated over noise of 19 to 400 effective dimensions and planted values
from 0 to far above the noise: 92 to 99.5%.

The multipliers depend on the protocol alone. So replicate r of two reports of one protocol leans on the
same documents, and differences and ratios formed replicate by replicate keep only what differs.

Shapes: R replicates, K groups, X any leading axes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ropemods.leakage.protocol import Protocol

_STREAM = 1
"""Keeps the multipliers apart from other uses of the protocol's seed."""


def multipliers(protocol: Protocol, groups: range | None = None) -> Tensor:
    """x [R, K]: mean 0 over the groups asked for (None: all) and variance 1, in fp64."""
    noise = np.random.default_rng((protocol.seed, _STREAM))
    x_RK = torch.from_numpy(noise.standard_normal((protocol.replicates, protocol.groups)))
    if groups is not None:
        x_RK = x_RK[:, groups.start : groups.stop]
    K = x_RK.shape[1]
    return (x_RK - x_RK.mean(1, keepdim=True)) * (K / (K - 1)) ** 0.5


def pair_mean(gram_XKK: Tensor) -> Tensor:
    """Mean product of two different groups, [X]."""
    K = gram_XKK.shape[-1]
    off = gram_XKK.sum((-1, -2)) - gram_XKK.diagonal(dim1=-2, dim2=-1).sum(-1)
    return off / (K * (K - 1))


def hoeffding(gram_XKK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value [X], group parts a [X, K] and pair parts b [X, K, K] with a diagonal of 0."""
    K = gram_XKK.shape[-1]
    diagonal = torch.eye(K, dtype=torch.bool, device=gram_XKK.device)
    pairs = gram_XKK.masked_fill(diagonal, 0.0)
    value_X = pairs.sum((-1, -2)) / (K * (K - 1))
    a_XK = (pairs.sum(-1) / (K - 1) - value_X[..., None]) * (K - 1) / (K - 2)
    b_XKK = pairs - value_X[..., None, None] - a_XK[..., :, None] - a_XK[..., None, :]
    return value_X, a_XK, b_XKK.masked_fill(diagonal, 0.0)


def variances(a_XK: Tensor, b_XKK: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased ζ_a and ζ_b. ζ_a may come out negative; K (K − 3) / 2 pairs are free."""
    K = a_XK.shape[-1]
    zeta_b = b_XKK.square().sum((-1, -2)) / (K * (K - 3))
    zeta_a = a_XK.square().sum(-1) / (K - 1) - zeta_b / (K - 2)
    return zeta_a, zeta_b


def pair_draws(gram_XKK: Tensor, x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Value [X] and replicates [X, R] of the mean product of two different groups."""
    K = gram_XKK.shape[-1]
    value_X, a_XK, b_XKK = hoeffding(gram_XKK)
    zeta_a, zeta_b = variances(a_XK, b_XKK)
    left_in = 0.5 * (2 / K) ** 0.5 * zeta_b / (K - 2)
    spread_a = a_XK.square().sum(-1) / K  # the ζ_a that λ = 1 would stand for
    tiny = torch.finfo(spread_a.dtype).tiny
    scale_a = ((zeta_a + left_in).clamp(min=0) / spread_a.clamp(min=tiny)).sqrt()
    scale_b = ((K - 1) / (K - 3)) ** 0.5
    linear_XR = 2 / K * (a_XK @ x_RK.T)
    square_XR = ((b_XKK @ x_RK.T) * x_RK.T).sum(-2) / (K * (K - 1))
    moved_XR = scale_a[..., None] * linear_XR + scale_b * square_XR
    return value_X, value_X[..., None] + moved_XR - moved_XR.mean(-1, keepdim=True)


def mean_draws(value_XK: Tensor, x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Value [X] and replicates [X, R] of a plain mean over the groups, with the same multipliers."""
    K = value_XK.shape[-1]
    mean_X = value_XK.mean(-1)
    moved_XR = (value_XK - mean_X[..., None]) @ x_RK.T / (K * (K - 1)) ** 0.5
    return mean_X, mean_X[..., None] + moved_XR - moved_XR.mean(-1, keepdim=True)


def interval(draws_XR: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Low and high [X]: the central part of the replicates."""
    tail = (1 - confidence) / 2
    at = torch.tensor([tail, 1 - tail], dtype=draws_XR.dtype, device=draws_XR.device)
    low_X, high_X = torch.quantile(draws_XR, at, dim=-1)
    return low_X, high_X
