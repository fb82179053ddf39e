"""What one pass yields beside leakage: sink curves, entropy, frequency usage and held-out loss.

All are plain means over sequences. Curves over heads leave out the heads that had a NaN or infinity;
a curve that the attention did not define is NaN. The averages that a comparison is made of (loss, mass on
BOS and on position 1) come by group, with replicates on the same multipliers as the leakage.

Shapes: L layers, H heads, K groups, T queries, F frequencies, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ropemods.leakage.draws import interval, mean_draws, multipliers
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from ropemods.report.records import Entropy, Estimate, Sink, Usage

POINTS = 96
"""Queries at which sink curves are kept."""
LARGEST = 8
"""Channels listed in each layer."""

Rows = tuple[tuple[float, ...], ...]


def loss(sums: Sums) -> Estimate | None:
    """Held-out loss in nats per token on the very crops that were measured."""
    total_K, tokens_K = sums.loss.cpu()
    if not tokens_K.all():
        return None
    return _mean_estimate(total_K / tokens_K, sums.protocol)


def sink(sums: Sums) -> Sink | None:
    """Mass and logit of the BOS column, and mass on position 1, against the query."""
    if not any("bos_mass" in store for store in sums.layers.values()):
        return None
    positions = query_points(sums.protocol.length)
    curves = {
        name: _rows(_mean_heads(sums, layer, name)[list(positions)] for layer in _order(sums))
        for name in ("bos_mass", "bos_logit", "position1_mass")
    }
    heads = (_curve(sums, layer, "bos_mass")[:, sums.protocol.window :].mean(1) for layer in _order(sums))
    return Sink(
        query=positions,
        heads_bos_mass=_rows(heads),
        bos_mass_all=_mean_mass(sums, "bos_mass"),
        position1_mass_all=_mean_mass(sums, "position1_mass"),
        **curves,
    )


def entropy(sums: Sums) -> Entropy | None:
    """Entropy of the attention rows, mean over each bin of queries, and per head over all i ≥ w."""
    if not any("entropy" in store for store in sums.layers.values()):
        return None
    bins = sums.protocol.bins()
    by_layer = [_mean_heads(sums, layer, "entropy") for layer in _order(sums)]
    by_head = (_curve(sums, layer, "entropy")[:, sums.protocol.window :].mean(1) for layer in _order(sums))
    return Entropy(
        bins=bins,
        layers=tuple(tuple(float(x[a:b].mean()) for a, b in bins) for x in by_layer),
        heads=_rows(by_head),
    )


def usage(sums: Sums, wavelengths: Sequence[Sequence[float]]) -> Usage | None:
    """Mean norm of every rotated pair, [L][H][F]; `wavelengths` [L][F] come from the model's rope.

    `largest_channels` lists, per layer, [head, channel, mean of |x|] of the largest ones.
    """
    if not any("usage_tokens" in store for store in sums.layers.values()):
        return None
    found: dict[str, tuple[Rows, ...]] = {}
    largest: dict[str, Any] = {}
    for name in ("query", "key"):
        tables, channels = [], []
        for layer in _order(sums):
            store = sums.layers[layer]
            tokens = store["usage_tokens"].double()
            pairs = f"{name}_pairs"
            tables.append(_rows(store[pairs].double() / tokens) if pairs in store else ())
            channels.append(_largest(store[f"{name}_channels"].double() / tokens))
        found[name], largest[name] = tuple(tables), channels
    rows = tuple(tuple(float(x) for x in row) for row in wavelengths)
    return Usage(
        wavelengths=rows,
        query=found["query"],
        key=found["key"],
        largest_channels=largest,
    )


def query_points(length: int) -> tuple[int, ...]:
    """About POINTS queries from 1 to the last, evenly on a log axis (every one near the start)."""
    steps = (math.log(length - 1) * n / (POINTS - 1) for n in range(POINTS))
    return tuple(sorted({round(math.exp(step)) for step in steps}))


def _order(sums: Sums) -> list[int]:
    return sorted(sums.layers)


def _curve(sums: Sums, layer: int, name: str) -> Tensor:
    """Mean over sequences, [H, T] in fp64; NaN where it was not given or the head was left out."""
    store = sums.layers[layer]
    H = store.good_heads().numel()
    if name not in store:
        return torch.full((H, sums.protocol.length), torch.nan, dtype=torch.float64)
    mean_HT = store[name].double().cpu() / sums.protocol.sequences
    mean_HT[~store.good_heads().cpu()] = torch.nan
    return mean_HT


def _mean_heads(sums: Sums, layer: int, name: str) -> Tensor:
    mean_T = _curve(sums, layer, name).nanmean(0)
    # A BOS that is closed off has the logit −inf: not a number to plot.
    return mean_T.where(mean_T.isfinite(), torch.nan)


def _mean_mass(sums: Sums, name: str) -> Estimate | None:
    """Mean over layers, heads and queries i ≥ w, with replicates."""
    by_head = []
    for layer in _order(sums):
        store = sums.layers[layer]
        if name in store:
            by_head.append(store[f"{name}_by_group"][:, store.good_heads()].double().cpu())
    if not by_head or not sum(x.shape[1] for x in by_head):
        return None
    mean_K = torch.cat(by_head, dim=1).mean(1) / sums.protocol.per_group
    return _mean_estimate(mean_K, sums.protocol)


def _mean_estimate(value_K: Tensor, protocol: Protocol) -> Estimate:
    value, draws_R = mean_draws(value_K, multipliers(protocol))
    low, high = interval(draws_R, protocol.confidence)
    return Estimate(float(value), float(low), float(high), tuple(draws_R.tolist()))


def _largest(mean_HD: Tensor) -> list[list[float]]:
    top = mean_HD.flatten().topk(min(LARGEST, mean_HD.numel()))
    D = mean_HD.shape[1]
    cells = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[cell // D, cell % D, value] for cell, value in cells]


def _rows(rows: Any) -> Rows:
    return tuple(tuple(row.tolist()) for row in rows)
