"""The numbers of a model that tables here show, as JSON, and differences between arms with intervals.

Leakage is the mean over layers 1 and up (the first layer sees words only, its residual is 0), early queries. Every
number keeps its bootstrap replicates: arms read the same crops, so a ratio or difference is formed replicate by
replicate, and what the documents do to both drops out. Seeds differ in training rows and in crops; a draw takes seeds
with replacement and, within each, one replicate.

Shapes: S seeds, R replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import ropemods as rm
from ropemods.leakage.capture import forward, losses
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import Documents
from ropemods.report import tries
from ropemods.report.records import Estimate, Term
from ropemods.report.report import Report

Numbers = Mapping[str, Any]
"""{quantity: {"value": …, "replicates": […]}}"""
Floats = npt.NDArray[np.float64]


def measured(model: nn.Module, tokenizer: Any, documents: Documents, protocol: rm.Protocol) -> dict[str, Any]:
    """Residual, mask and total (early, layers 1 and up), masses on positions 0 and 1, and held-out loss."""
    report = rm.measure(model, tokenizer, documents, protocol, progress=False, command="evals")
    return numbers(report)


def numbers(report: Report) -> dict[str, Any]:
    return {name: kept(estimate.value, estimate.replicates) for name, estimate in tries.values(report).items()}


def upper_layers(term: Term) -> dict[str, Any]:
    """A term's early leakage, mean of layers 1 and up."""
    estimate = tries.upper_layers(term)
    return kept(estimate.value, estimate.replicates)


def kept(value: float, replicates: Sequence[float] | Floats) -> dict[str, Any]:
    """A quantity as result files hold it."""
    return {"value": float(f"{value:.7g}"), "replicates": [float(f"{x:.5g}") for x in replicates]}


@torch.no_grad()
def plain_loss(model: nn.Module, tokenizer: Any, documents: Documents, protocol: rm.Protocol) -> float:
    """Held-out loss alone, for lengths at which no leakage is measured."""
    crops = make_crops(documents, tokenizer, protocol)
    was_training = model.training
    model.eval()
    found = [losses(forward(model, part), part).mean(1) for part in crops.tokens_NT.split(protocol.batch_size)]
    model.train(was_training)
    return float(torch.cat(found).mean())


def over_seeds(seeds: Sequence[Numbers], name: str) -> tuple[float, Floats]:
    """Mean over the seeds of one quantity, and its draws."""
    return statistic([seeds], lambda values: values[0], name)


def statistic(arms: Sequence[Sequence[Numbers]], form: Callable[[list[Any]], Any], name: str) -> tuple[float, Floats]:
    """`form` of the arms' means over seeds, with draws; seed s of one arm goes with seed s of the others."""
    count = len(arms[0])
    if any(len(arm) != count for arm in arms):
        raise ValueError(f"arms of {[len(arm) for arm in arms]} seeds cannot be paired seed by seed")
    values_AS = np.array([[seed[name]["value"] for seed in arm] for arm in arms])
    replicates_ASR = np.array([[seed[name]["replicates"] for seed in arm] for arm in arms])
    draw = np.random.default_rng(23)
    R = replicates_ASR.shape[2]
    seeds_RS = draw.integers(0, count, (R, count))
    # One seed's crops differ from another's, so their replicates are shuffled apart; arms stay together.
    replicate_RS = np.stack([draw.permutation(R) for _ in range(count)], axis=1)
    drawn_AR = np.stack([replicates_ASR[:, seeds_RS[:, n], replicate_RS[:, n]] for n in range(count)]).mean(0)
    return float(form(list(values_AS.mean(1)))), np.asarray(form(list(drawn_AR)))


def ratio(arm: Sequence[Numbers], against: Sequence[Numbers], name: str) -> Estimate:
    """arm / against − 1, with its 95% interval."""
    value, draws_R = statistic([arm, against], lambda x: x[0] / x[1] - 1, name)
    low, high = np.quantile(draws_R, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def mean(arm: Sequence[Numbers], name: str) -> Estimate:
    value, draws_R = over_seeds(arm, name)
    low, high = np.quantile(draws_R, (0.025, 0.975))
    return Estimate(value, float(low), float(high))
