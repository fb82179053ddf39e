"""The replaced BOS, folded into the embedding row of a stock checkpoint."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ropemods.model.attention_layers import Stages


@torch.no_grad()
def fold_embedding(model: PreTrainedModel, state: dict[str, Tensor], config: PreTrainedConfig) -> PreTrainedConfig:
    """Put what stands at the BOS into the row of `state`; returns the config, untied if the head must keep the old row.

    The input embedding may scale its rows (Gemma's does), so the row is what gives the modified output, by the factor
    that the module applies to the row it has.
    """
    embedding = model.get_input_embeddings()
    stages = getattr(embedding, "ropemods", None)
    active = [s for _, s in stages.stages() if s.active] if isinstance(stages, Stages) else []
    if not active:
        return config
    weight = embedding.weight
    name = next(k for k, v in model.named_parameters(remove_duplicate=False) if v is weight)
    token = model.ropemods_attached.bos_token_id
    ids = torch.tensor([[token]], device=weight.device)
    stock = embedding.forward(ids)[0, 0]
    wanted = embedding.ropemods(stock[None, None], ids, embedding)[0, 0]
    scale = (stock.double() @ weight[token].double()) / (weight[token].double() @ weight[token].double())
    if not torch.allclose(stock.double(), scale * weight[token].double(), rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"{type(embedding).__name__} does more to a row than scale it, so no row gives the replaced BOS"
        )
    folded = weight.detach().clone()
    folded[token] = (wanted.double() / scale.round(decimals=6)).to(weight.dtype)
    head = model.get_output_embeddings()
    if head is not None and head.weight is weight:
        # The head scores the BOS as an output by the old row, so the two can no longer be one matrix.
        config = copy.deepcopy(config)
        for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
            part.tie_word_embeddings = False
        head_name = next(k for k, m in model.named_modules() if m is head)
        state[f"{head_name}.weight"] = weight.detach().clone()
    state[name] = folded
    return config
