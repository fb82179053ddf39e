"""Initial values fitted to the model's own output: a few steps on those numbers alone, before any training.

The teacher is the model with its modifications at strength 0, the pupil the same at strength 1, and what is made small
is the Kullback-Leibler divergence of their next tokens on a calibration batch. Adam moves what the stages name
(`Stage.distilled`), everything else stands still; what was found becomes the start (`Stage.settle`).

Cost: `STEPS` passes forward and back over the batch, and as many forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropemods.model.short_pass import evaluating
from ropemods.mods.base import Stage

STEPS, RATE = 12, 0.4
"""Adam's first steps are of about `RATE` whatever the gradient is, in nats of a logit; it falls to 0 over them all."""


def distil(model: PreTrainedModel, stages: list[Stage], ids_BT: Tensor, strength: Callable[[float], None]) -> None:
    numbers = [parameter for stage in stages for parameter in stage.distilled()]
    optimizer = torch.optim.Adam(numbers, RATE, betas=(0.7, 0.95))
    rows = ids_BT.split(1)
    with evaluating(model), _alone(model, numbers):
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / STEPS)
            for row in rows:
                strength(0.0)
                with torch.no_grad():
                    wanted = _log_probabilities(model, row)
                strength(1.0)
                found = _log_probabilities(model, row)
                (nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean") / len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for stage in stages:
        stage.settle()


def _log_probabilities(model: PreTrainedModel, row: Tensor) -> Tensor:
    return model(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)


@contextlib.contextmanager
def _alone(model: nn.Module, numbers: list[nn.Parameter]) -> Iterator[None]:
    """A gradient for these numbers and no others of the model, put back as it was."""
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in numbers:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in trains.items():
            parameter.requires_grad_(before)
