"""Reports that look real, made without a model.

`fake_report(residual=0.009, ...)` has the shapes, sizes and noise of a measured report. Replicate r
of every report with one seed shares its part of the noise (the documents that were drawn), as
replicates of one protocol do, so paired intervals come out narrower than unpaired ones.

Letters: L layers, H query heads, G key heads, F frequency bands, R replicates.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from ropemods.leakage.protocol import Protocol
from ropemods.report.records import (
    Bin,
    Control,
    Entropy,
    Estimate,
    HeadTerm,
    Intervention,
    LayerTerm,
    ModelFacts,
    Sink,
    Term,
    TextFacts,
    Usage,
)
from ropemods.report.report import Report

REPLICATES = 200
LENGTH = 512
PROTOCOL = Protocol(sequences=1024, length=LENGTH, replicates=REPLICATES)


def shared_noise(seed: int = 0, replicates: int = REPLICATES) -> list[float]:
    """What the bootstrap's draw of documents does to every report of one protocol."""
    draw = random.Random(f"documents {seed}")
    return [draw.gauss(0, 1) for _ in range(replicates)]


def estimate(value: float, spread: float, own: random.Random, *, shared: float = 0.9) -> Estimate:
    """An estimate whose replicates scatter by `spread`; `shared` of it is common to all arms."""
    rest = math.sqrt(1 - shared**2)
    noise = (shared * common + rest * own.gauss(0, 1) for common in shared_noise())
    replicates = [value + spread * z for z in noise]
    ordered = sorted(replicates)
    low, high = ordered[round(0.025 * len(ordered))], ordered[-1 - round(0.025 * len(ordered))]
    return Estimate(value, min(low, value), max(high, value), tuple(replicates))


def _term(size: float, per_layer: list[float], heads: int, decay: float, own: random.Random) -> Term:
    """A term of mean `size` over the early queries, falling with the query as i^-decay."""
    L = len(per_layer)
    mean_weight = sum(per_layer) / L
    weights = [w / mean_weight for w in per_layer]
    # Heads keep their character from arm to arm: a common draw, and a little of the arm's own.
    common = random.Random(f"heads {decay}")
    head_weights = [
        [common.lognormvariate(-0.32, 0.8) * own.lognormvariate(0, 0.15) for _ in range(heads)] for _ in range(L)
    ]
    edges = PROTOCOL.bins()
    by_bin = [size * (start / 16) ** -decay for start, _ in edges]
    early_grid, all_grid = [], []
    for weight, row in zip(weights, head_weights, strict=True):
        scale = heads / sum(row)
        early_grid.append(tuple(size * weight * h * scale for h in row))
        all_grid.append(tuple(0.3 * size * weight * h * scale for h in row))
    noise = 0.05 * size + 2e-5
    return Term(
        all=estimate(0.3 * size, 0.3 * noise, own),
        early=estimate(size, noise, own),
        layers=tuple(
            LayerTerm(
                all=estimate(0.3 * size * w, 0.3 * noise * (w + 0.2), own),
                early=estimate(size * w, noise * (w + 0.2), own),
            )
            for w in weights
        ),
        heads=HeadTerm(all=tuple(all_grid), early=tuple(early_grid)),
        bins=tuple(
            Bin(start=a, stop=b, value=v, low=v - 0.1 * v - 2e-5, high=v + 0.1 * v + 2e-5)
            for (a, b), v in zip(edges, by_bin, strict=True)
        ),
        layer_bins=tuple(tuple(v * w for v in by_bin) for w in weights),
    )


def fake_report(
    *,
    name: str = "prose3M",
    residual: float = 0.0089,
    mask: float = 0.31,
    loss: float = 3.99,
    bos_mass: float = 0.35,
    dropped_bands: int = 0,
    layers: int = 6,
    heads: int = 6,
    mods: tuple[Mapping[str, Any], ...] = (),
    seed: int = 0,
    arm_seed: int = 1,
    protocol: Protocol = PROTOCOL,
    optional: bool = True,
) -> Report:
    """A report with the given headline values; `optional=False` leaves out what may be missing."""
    own = random.Random(f"{seed} {arm_seed}")
    L, H, G, F = layers, heads, max(1, heads // 2), 16
    depth = [i / max(1, L - 1) for i in range(L)]
    residual_layers = [0.0 if i < L // 3 else 1.5 - abs(d - 0.6) for i, d in enumerate(depth)]
    flat = [1.0 - 0.3 * d for d in depth]
    terms = {
        "residual": _term(residual, residual_layers, H, 1.3, own),
        "mask": _term(mask, flat, H, 0.8, own),
        "total": _term(residual + mask * 1.03, flat, H, 0.85, own),
    }
    share = residual / (residual + mask)
    facts: dict[str, Any] = {
        "created": "2026-01-31T12:00:00+00:00",
        "command": f"ropemods measure {name} --text prose.valid.jsonl.xz --sequences 1024",
        "seed": seed,
        "versions": {"ropemods": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "protocol": protocol.to_dict(),
        "protocol_hash": protocol.hash(),
        "model": ModelFacts(
            name=name,
            type="llama",
            layers=L,
            heads=H,
            parameters=3_224_832,
            dtype="float32",
            attention="sdpa",
            mods=mods,
            strength={str(mod["kind"]): 1.0 for mod in mods},
            rope={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "text": TextFacts(
            source="prose.valid.jsonl.xz",
            documents=199,
            sequences=1024,
            tokens=1024 * LENGTH,
            digest="0123abcd4567",
        ),
        "held_out_loss": estimate(loss, 0.02, own, shared=0.995),
        "terms": terms,
    }
    if not optional:
        return Report(**facts)
    query = tuple(range(1, 16)) + tuple(2**k for k in range(4, LENGTH.bit_length() - 1)) + (511,)
    layer_mass = [bos_mass * (0.15 + 1.3 * d) for d in depth]
    bos = tuple(tuple(min(0.97, m + 0.5 / (1 + q)) for q in query) for m in layer_mass)
    edges = PROTOCOL.bins()
    wavelengths = [2 * math.pi * 10000 ** (k / F) for k in range(F)]
    kept = F - dropped_bands
    swaps = tuple(own.gauss(-0.745, 0.03) for _ in range(32))
    return Report(
        **facts,
        closure_gap=estimate(0.004, 0.002, own),
        share=estimate(share, 0.1 * share, own),
        sink=Sink(
            query=query,
            bos_mass=bos,
            bos_logit=tuple(tuple(3 * d - 0.2 * math.log(q) for q in query) for d in depth),
            position1_mass=tuple(tuple(0.02 + 0.4 / (1 + q) for q in query) for _ in depth),
            heads_bos_mass=tuple(tuple(min(0.99, m * own.uniform(0.3, 1.7)) for _ in range(H)) for m in layer_mass),
            bos_mass_all=estimate(sum(layer_mass) / L, 0.004, own),
            position1_mass_all=estimate(0.03, 0.001, own),
        ),
        entropy=Entropy(
            bins=edges,
            layers=tuple(tuple(0.75 * math.log(a) - 0.6 * d for a, _ in edges) for d in depth),
            heads=tuple(tuple(own.uniform(0.5, 4.5) for _ in range(H)) for _ in range(L)),
        ),
        usage=Usage(
            wavelengths=tuple(tuple(w if k < kept else math.inf for k, w in enumerate(wavelengths)) for _ in range(L)),
            query=tuple(_usage_grid(L, i, H, F, own) for i in range(L)),
            key=tuple(_usage_grid(L, i, G, F, own) for i in range(L)),
            largest_channels={"query": [[3, 17]], "key": [[2, 31]]},
        ),
        interventions=(
            _swap("zero embedding", -0.72, residual, swaps, own),
            _swap("mean embedding", -0.54, residual, swaps, own),
            _swap("norm-matched noise", -0.70, residual, swaps, own),
            Intervention(
                name="clamp BOS weight",
                kind="clamp",
                early_residual=estimate(0.8 * residual, 0.03 * residual, own),
                change=estimate(-0.2, 0.03, own),
            ),
        ),
        controls=(
            Control(name="Toeplitz logits", expected=0.0, value=1e-7, low=-2e-6, high=2e-6, passed=True),
            Control(
                name="layer 0 on stationarised text",
                expected="0 within its interval",
                value=0.0001,
                low=-0.0002,
                high=0.0004,
                passed=True,
            ),
            Control(
                name="positions shifted by 5000",
                expected=0.0,
                value=0.0017,
                low=0.0011,
                high=0.0023,
                passed=False,
            ),
        ),
        notes=("Layer 3, head 2: NaN in the logits of 1 sequence; its sums leave that one out.",),
    )


def _usage_grid(L: int, layer: int, rows: int, F: int, own: random.Random) -> tuple[tuple[float, ...], ...]:
    peak = 0.75 * F
    return tuple(
        tuple(1.0 + 2.5 * math.exp(-(((k - peak) / 3) ** 2)) + own.uniform(0, 0.4) + 0.3 * layer / L for k in range(F))
        for _ in range(rows)
    )


def _swap(name: str, change: float, residual: float, reference: tuple[float, ...], own: random.Random) -> Intervention:
    return Intervention(
        name=name,
        kind="swap",
        early_residual=estimate((1 + change) * residual, 0.04 * residual, own),
        change=estimate(change, 0.03, own),
        rank=sum(r < change for r in reference),
        reference=reference,
    )


def four_arms() -> dict[str, Report]:
    """The arms of a fine-tune, in their order; figures near those of a first real run."""
    mods = ({"kind": "truncated_rope", "keep": 0.75}, {"kind": "learned_sink"})
    return {
        "base": fake_report(),
        "untrained": fake_report(residual=0.0041, mask=0.44, loss=4.31, mods=mods, dropped_bands=4, arm_seed=2),
        "control": fake_report(residual=0.0089, mask=0.32, loss=3.969, arm_seed=3),
        "modified": fake_report(
            residual=0.0032,
            mask=0.45,
            loss=3.983,
            bos_mass=0.0,
            mods=mods,
            dropped_bands=4,
            arm_seed=4,
        ),
    }
