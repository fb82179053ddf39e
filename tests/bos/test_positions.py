"""Distances to the BOS are those of the rotary positions, also where a model makes these itself."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import ropemods as rm
from ropemods.model import attention_function
from ropemods.mods import LearnedSink, UnrotatedBos

IMAGE, START, END = 5, 7, 8
GRID = 4
"""An image of GRID × GRID tokens, whose positions go up by GRID."""


def vision_language_model() -> PreTrainedModel:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
    text = shape | {"num_key_value_heads": 2, "vocab_size": 61, "pad_token_id": 0, "rope_parameters": rope}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    eyes |= {"patch_size": 2, "spatial_merge_size": 1, "temporal_patch_size": 1, "window_size": 4}
    config = Qwen2_5_VLConfig(
        text_config=text | {"bos_token_id": 1, "eos_token_id": 2},
        vision_config=eyes | {"fullatt_block_indexes": [0]},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def with_image() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 9, START, *[IMAGE] * GRID**2, END, 10, 11, 12]])
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(GRID**2, 12, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, GRID, GRID]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "attention_mask": torch.ones_like(ids),
    }


@torch.no_grad()
def test_text_behind_an_image_is_as_far_from_the_bos_as_its_rotary_position_says() -> None:
    model, distances, turned = rm.apply(vision_language_model(), LearnedSink(init=0.3)), [], []

    def look(site, rows, call, lse):
        distances.append(call.bos_distance_BT[0])

    handle = model.get_decoder().rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: turned.append(args[1] if len(args) > 1 else kwargs["position_ids"]), with_kwargs=True
    )
    with attention_function.observed(look, of=model, want_lse=False):
        cache = model(**with_image()).past_key_values
        model(input_ids=torch.tensor([[13]]), past_key_values=cache)
    handle.remove()
    for found, axes in ((distances[0], turned[0]), (distances[-1], turned[1])):
        assert torch.equal(found, axes[0, 0])
    assert distances[0][-1] == 3 + GRID + 3 and distances[-1] == 3 + GRID + 4


@torch.no_grad()
@pytest.mark.parametrize("mod", [UnrotatedBos(), rm.AnchoredBos(offset=2), rm.KeyedSink(offset=2)], ids=str)
def test_an_image_is_refused_where_queries_are_turned_by_their_distance(mod: rm.Mod) -> None:
    model = rm.apply(vision_language_model(), mod)
    with pytest.raises(ValueError, match=r"not one number \(an image.*set the strength of that modification to 0"):
        model(**with_image())
    model(input_ids=torch.tensor([[1, 9, 10, 11]]))
    rm.set_strength(model, 0.0)
    model(**with_image())
