"""Generation of transformers' that puts several sequences in one row: as each alone, or refused before it begins."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import ropemods as rm
from tests import zoo

PROMPTS = [[zoo.BOS, 5, 6, 7], [zoo.BOS, 9, 10, 11, 12, 13], [zoo.BOS, 20]]


def batched(model) -> list[list[int]]:
    found = model.generate_batch(
        PROMPTS,
        generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32),
        progress_bar=False,
    )
    return [each.generated_tokens for each in found.values()]


def test_frequencies_act_in_it_as_ever() -> None:
    model = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]
    assert batched(model) == alone


def test_what_looks_for_the_bos_is_refused_until_its_strength_is_0() -> None:
    model = rm.apply(zoo.build(), rm.ReplacedBos("mean"))
    with pytest.raises(ValueError, match="continuous batching puts parts of several sequences in one row"):
        batched(model)
    rm.set_strength(model, 0.0)
    assert batched(model) == batched(zoo.build())
