"""Controls: measurements whose answer is known beforehand, run beside a measurement to show that it can be trusted.

    Toeplitz logits, causal mask        residual 0, mask = total
    planted D(i, δ), constant window    mask 0, residual = total = the planted value
    coverage                            95% intervals hold the planted value in 90 to 99% of 200 repetitions
    layer 0                             residual 0 within its interval: its queries and keys know no position yet
    queries in random order             residual 0 in every layer: what depends on position is scattered
    position_ids + c                    logits unchanged to rounding, for RoPE knows offsets only; bfloat16 beside it
    position 0                          its output is the same in every prompt: it sees only itself

The first three are synthetic (`known.py`) and test the estimator; the others test the model at hand and how it is read.
Layer 0 is no control where a modification makes its logits depend on the whole row (a temperature), and a shift of
positions none where absolute positions are learned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ropemods.attention.rows import Rows
from ropemods.leakage.capture import capture, forward
from ropemods.leakage.crops import Crops
from ropemods.leakage.estimate import estimate
from ropemods.leakage.interventions import plain
from ropemods.leakage.known import Known, covered, planted, reindexed, toeplitz
from ropemods.model import casts
from ropemods.model.attention_function import observed
from ropemods.model.attention_layers import AttentionSite
from ropemods.model.observation import Observation
from ropemods.mods.base import Call
from ropemods.report.records import Control, Estimate, Term

REPETITIONS = 200
PLANTED = 1.0
EXACT = 1e-10
"""nats² that float32 logits cannot tell from 0: where the answer is exactly 0, the interval is that narrow."""
SHIFT = 100
"""c of the shifted positions."""
ROUNDING = 1e-3
"""Shifted float32 logits may differ by this share of their spread; seen on small models: 1e-5 at c = 100."""
SAME = 1e-4
"""The same for position 0, which only batching can move."""


def run_controls(
    observation: Observation, crops: Crops, model: nn.Module, terms: dict[str, Term] | None, progress: bool = False
) -> tuple[Control, ...]:
    """Every control, the synthetic ones first. `terms` are those measured of the model."""
    found = [*synthetic()]
    residual = None if terms is None else terms.get("residual")
    if residual is not None and not _scaled_by_row(observation, crops, model):
        found.append(within("layer 0: residual", 0.0, residual.layers[0].all))
    found += shuffled(observation, crops, model, progress)
    found += shifted(observation, crops, model)
    found.append(position_zero(observation, crops, model))
    return tuple(found)


def within(name: str, expected: float, found: Estimate) -> Control:
    """Passed when the interval holds the expected value."""
    return Control(
        name=name,
        expected=expected,
        value=found.value,
        low=found.low,
        high=found.high,
        passed=found.low - EXACT <= expected <= found.high + EXACT,
    )


def synthetic(repetitions: int = REPETITIONS) -> list[Control]:
    even, bent = toeplitz(), planted(PLANTED)
    found = []
    terms = even.measured(8, 1, mask_term=True)
    found.append(within("Toeplitz logits: residual", 0.0, terms["residual"].all))
    found.append(_closure("Toeplitz logits: mask − total", terms["mask"].all, terms["total"].all))
    terms = bent.measured(8, 2, mask_term=True)
    found.append(within("planted D, constant window: mask", 0.0, terms["mask"].all))
    found.append(within("planted D, constant window: residual", bent.truth, terms["residual"].all))
    found.append(within("planted D, constant window: total", bent.truth, terms["total"].all))
    found.append(coverage("coverage of the planted value", bent, repetitions))
    found.append(coverage("coverage of a planted 0", planted(0.0), repetitions))
    return found


def coverage(name: str, known: Known, repetitions: int) -> Control:
    """With the interval (Wilson's) of a share seen in so many repetitions."""
    share = covered(known, repetitions)
    z, n = 1.96, repetitions
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Control(
        name=name,
        expected="0.90 to 0.99",
        value=share,
        low=(middle - half) / scale,
        high=(middle + half) / scale,
        passed=0.90 <= share <= 0.99,
    )


def shuffled(observation: Observation, crops: Crops, model: nn.Module, progress: bool = False) -> list[Control]:
    crops = plain(crops)
    reindex = reindexed(crops.protocol, crops.protocol.seed)
    title = "control" if progress else None
    sums, _ = capture(
        observation, crops, crops.protocol, model=model, everything=False, reindex=reindex, progress=title
    )
    return [within("queries in random order: residual", 0.0, estimate(sums).terms["residual"].all)]


@torch.no_grad()
def shifted(observation: Observation, crops: Crops, model: nn.Module) -> list[Control]:
    """The largest change of a logit when all positions are c higher."""
    tokens_BT = crops.tokens_NT[:2]
    found = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        try:
            with casts.in_dtype(model, dtype):
                apart, spread = _drift(model, tokens_BT)
        except ValueError:  # a model that is spread over ranks cannot be converted
            continue
        passed = dtype == torch.bfloat16 or apart <= ROUNDING * spread
        expected = "reported" if dtype == torch.bfloat16 else f"at most {ROUNDING * spread:.2g}"
        title = f"position_ids + {SHIFT}: change of logits in {name}"
        found.append(Control(name=title, expected=expected, value=apart, low=math.nan, high=math.nan, passed=passed))
    return found


def _drift(model: nn.Module, tokens_BT: Tensor) -> tuple[float, float]:
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    plain_BTV = forward(model, tokens_BT, position_ids=positions_BT.to(model.device)).float()  # type: ignore[arg-type]
    moved_BTV = forward(model, tokens_BT, position_ids=(positions_BT + SHIFT).to(model.device)).float()  # type: ignore[arg-type]
    return float((plain_BTV - moved_BTV).abs().max()), float(plain_BTV.std())


@torch.no_grad()
def position_zero(observation: Observation, crops: Crops, model: nn.Module) -> Control:
    """The largest difference, over prompts, of the logits at position 0."""
    logits_BTV = forward(model, crops.tokens_NT[:4])
    first_BV = logits_BTV[:, 0].float()
    apart, spread = float((first_BV - first_BV[:1]).abs().max()), float(first_BV.std())
    return Control(
        name="position 0 across prompts: change of logits",
        expected=f"at most {SAME * spread:.2g}",
        value=apart,
        low=math.nan,
        high=math.nan,
        passed=apart <= SAME * spread,
    )


def _closure(name: str, mask: Estimate, total: Estimate) -> Control:
    replicates = sorted(a - b for a, b in zip(mask.replicates, total.replicates, strict=True))
    at = len(replicates) - 1
    low, high = replicates[round(0.025 * at)], replicates[round(0.975 * at)]
    return within(name, 0.0, Estimate(mask.value - total.value, low, high))


def _scaled_by_row(observation: Observation, crops: Crops, model: nn.Module) -> bool:
    """Whether layer 0 multiplies rows by a factor, which knows how long a row is."""
    seen: set[str] = set()

    def look(site: AttentionSite, rows: Rows, call: Call, _: Tensor | None) -> None:
        if site is observation.sites[0]:
            seen.update(rows.names())

    with observed(look, of=observation.model, want_lse=False):
        forward(model, crops.tokens_NT[:1])
    return not seen.isdisjoint({"RowScale", "EntropyScale"})
