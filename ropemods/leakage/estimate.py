"""From sums to leakage: residual, mask and total with intervals, by layer, head and query.

For a map V(i, δ) of one term and one head (LEAKAGE's table; queries i ≥ w, offsets δ < w):

    L     = mean over i, δ of (V(i, δ) − mean_i V(i, δ))²                       "all"
    ℓ(i)  = mean over δ of (V(i, δ) − V(∞, δ))²,  V(∞) = mean over the last half of the queries
    early = mean of ℓ over the early queries; bins = mean of ℓ over [8, 16), [16, 32), …

Both subtract something linear in V, so it is subtracted from every group's own map V_g, and the square
becomes the Gram matrix of the groups (`draws.py`). Means over heads and layers are means of Gram
matrices. Centring and bins are sums over queries, so nothing larger than one head's maps is made.

    residual  V_g = E_g[s_{i,i−δ} − logsumexp_W s_i]
    total     V_g = residual + E_g log m_i
    mask      V_g = −E_g ψ_i, interpolated from the grid to all queries, in two chains: a product takes
              one map from either (`mask.py`)

Shapes: L layers, H heads, K groups, R replicates, I queries i ≥ w, W offsets, M measures
(all, early, then the bins).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ropemods.leakage.curves import entropy, loss, sink
from ropemods.leakage.draws import interval, multipliers, pair_draws, pair_mean
from ropemods.leakage.mask import PSI, interpolation
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from ropemods.report.records import Bin, Entropy, Estimate, HeadTerm, LayerTerm, Sink, Term

ALL, EARLY, BINS = 0, 1, 2
"""Where a measure stands on the M axis; bins are from BINS on."""


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """The sections of a report that come from sums. What was not measured is absent or None."""

    terms: Mapping[str, Term]
    closure_gap: Estimate | None
    share: Estimate | None
    held_out_loss: Estimate | None
    sink: Sink | None
    entropy: Entropy | None
    notes: tuple[str, ...] = field(default=())


@torch.no_grad()
def estimate(sums: Sums) -> Estimates:
    """Every estimate of complete sums (merged, where there are ranks)."""
    _expect_complete(sums)
    p = sums.protocol
    notes = sums.notes()
    heads = next(iter(sums.layers.values())).good_heads().numel()
    terms: dict[str, Term] = {}
    draws: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("residual", "mask", "total"):
        if name == "mask" and not p.mask_term:
            continue
        grams = [_layer_grams(sums, layer, name) for layer in sorted(sums.layers)]
        without = [n for n, gram in enumerate(grams) if gram is None]
        if name == "mask" and without:
            notes.append(f"mask: not defined in layers {without} (no rows of logits were given)")
        if len(without) == len(grams):
            continue
        # A layer without a good head has its own notes.
        good = [sums.layers[layer].good_heads().cpu() for layer in sorted(sums.layers)]
        unclear = [
            n for n, gram in enumerate(grams) if gram is not None and good[n].any() and gram[good[n]].isnan().all()
        ]
        if name == "mask" and unclear:
            notes.append(
                f"mask: not defined in layers {unclear}: which keys a query sees differs from one sequence to another"
            )
        x_RK = multipliers(p, p.folds()[-1] if name == "mask" else None)
        terms[name], draws[name] = _term(grams, x_RK, p, heads)
    gap = share = None
    if "mask" in terms:
        (residual, residual_R), (mask, mask_R), (total, total_R) = (
            draws[name] for name in ("residual", "mask", "total")
        )
        gap = _estimate(residual + mask - total, residual_R + mask_R - total_R, p)
        share = _estimate(residual / (residual + mask), residual_R / (residual_R + mask_R), p)
    return Estimates(
        terms=terms,
        closure_gap=gap,
        share=share,
        held_out_loss=loss(sums),
        sink=sink(sums),
        entropy=entropy(sums),
        notes=tuple(notes),
    )


def group_maps(sums: Sums, layer: int, head: int, term: str) -> tuple[Tensor, Tensor] | None:
    """V_g [K, I, W] of one head in fp64, as the two sides of a product; None where not measured.

    The sides are one and the same, but for the mask: two chains, on the groups of the last fold, W = 1.
    """
    p, store = sums.protocol, sums.layers[layer]
    if term == "mask":
        if PSI[0] not in store:
            return None
        groups, to_queries_IR = p.folds()[-1], interpolation(p.grid(), range(p.window, p.length))
        a, b = (store[name][groups.start : groups.stop, head].double().cpu() for name in PSI)
        left, right = (-(psi_KR @ to_queries_IR.T)[..., None] / p.per_group for psi_KR in (a, b))
        return left, right
    maps_KIW = store["residual"][:, head].double().cpu()
    if term == "total":
        maps_KIW = maps_KIW + store["log_m"][:, head].double().cpu()[..., None]
    maps_KIW = maps_KIW / p.per_group
    return maps_KIW, maps_KIW


def grams(left_KIW: Tensor, right_KIW: Tensor, protocol: Protocol) -> Tensor:
    """Mean products of every two groups' maps for each measure, [M, K, K]."""
    products = []
    for x, y in zip(_measures(left_KIW, protocol), _measures(right_KIW, protocol), strict=True):
        product_KK = x.flatten(1) @ y.flatten(1).T / x[0].numel()
        products.append((product_KK + product_KK.T) / 2)
    return torch.stack(products)


def _measures(maps_KIW: Tensor, protocol: Protocol) -> list[Tensor]:
    """The maps with what each measure subtracts taken off, on the queries that it averages over."""
    first = protocol.window  # maps begin at query w
    far_K1W = maps_KIW[:, protocol.late - first :].mean(1, keepdim=True)
    parts = [maps_KIW - maps_KIW.mean(1, keepdim=True)]
    for start, stop in (protocol.early, *protocol.bins()):
        parts.append(maps_KIW[:, start - first : stop - first] - far_K1W)
    return parts


def _layer_grams(sums: Sums, layer: int, term: str) -> Tensor | None:
    """[H, M, K, K] of one layer, NaN for the heads that were left out."""
    by_head = []
    for head, good in enumerate(sums.layers[layer].good_heads().tolist()):
        maps = group_maps(sums, layer, head, term)
        if maps is None:
            return None
        gram_MKK = grams(*maps, sums.protocol)
        by_head.append(gram_MKK if good else torch.full_like(gram_MKK, torch.nan))
    return torch.stack(by_head)


def _term(
    layers: list[Tensor | None], x_RK: Tensor, protocol: Protocol, heads: int
) -> tuple[Term, tuple[Tensor, Tensor]]:
    """A report's term from the layers' Gram matrices, and the replicates of its "all"."""
    shape = (heads, BINS + len(protocol.bins()), x_RK.shape[1], x_RK.shape[1])
    missing = torch.full(shape, torch.nan, dtype=torch.float64)
    grams_L = [missing if gram is None else gram for gram in layers]
    value_LM, draws_LMR = pair_draws(torch.stack([gram.nanmean(0) for gram in grams_L]), x_RK)
    value_M, draws_MR = pair_draws(torch.cat(grams_L).nanmean(0), x_RK)
    by_head = [pair_mean(gram_HMKK) for gram_HMKK in grams_L]

    def at(n: int) -> Estimate:
        return _estimate(value_M[n], draws_MR[n], protocol)

    def at_layer(layer: int, n: int) -> Estimate:
        return _estimate(value_LM[layer, n], draws_LMR[layer, n], protocol)

    bins = [(edges, at(BINS + n)) for n, edges in enumerate(protocol.bins())]
    term = Term(
        all=at(ALL),
        early=at(EARLY),
        layers=tuple(LayerTerm(all=at_layer(layer, ALL), early=at_layer(layer, EARLY)) for layer in range(len(layers))),
        heads=HeadTerm(
            all=_grid(value_HM[:, ALL] for value_HM in by_head),
            early=_grid(value_HM[:, EARLY] for value_HM in by_head),
        ),
        bins=tuple(Bin(start=edges[0], stop=edges[1], value=e.value, low=e.low, high=e.high) for edges, e in bins),
        layer_bins=_grid(value_LM[:, BINS:]),
    )
    return term, (value_M[ALL], draws_MR[ALL])


def _grid(rows: Iterable[Tensor]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row.tolist()) for row in rows)


def _estimate(value: Tensor, draws_R: Tensor, protocol: Protocol) -> Estimate:
    low, high = interval(draws_R, protocol.confidence)
    return Estimate(float(value), float(low), float(high), tuple(draws_R.tolist()))


def _expect_complete(sums: Sums) -> None:
    p = sums.protocol
    if not sums.layers:
        raise ValueError("these sums are empty: no layer's attention was seen")
    for layer, store in sorted(sums.layers.items()):
        for group, count in enumerate(store["count"].tolist()):
            if count != p.per_group:
                raise ValueError(
                    f"layer {layer} has {count:g} of the {p.per_group} sequences of group {group}: "
                    "read every fold to its end, and merge the ranks, before estimating"
                )
