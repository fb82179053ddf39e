"""An architecture that transformers does not ship: a parallel block whose layers take turns.

Every second layer turns the last channels of its heads, neighbours in pairs and clockwise; the others have no RoPE and
see a window. Queries and keys are normed, values are narrower than keys, and the attention module has a name of its
own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class TideConfig(PreTrainedConfig):
    model_type = "tide"

    vocab_size: int = 64
    hidden_size: int = 48
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    turned_dim: int = 12
    value_dim: int = 8
    sliding_window: int = 4
    max_position_embeddings: int = 64
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0
    rope_parameters: dict | None = None

    def __post_init__(self, **kwargs):
        self.layer_types = ["full_attention" if n % 2 == 0 else "sliding_attention" for n in range(3)]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
        super().__post_init__(**kwargs)


class TideRotaryEmbedding(nn.Module):
    def __init__(self, config: TideConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: TideConfig, *args, **kwargs) -> tuple[Tensor, float]:
        exponent = torch.arange(0, config.turned_dim, 2).float() / config.turned_dim
        return config.rope_parameters["rope_theta"] ** -exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    still, pairs = x[..., : -2 * cos.shape[-1]], x[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2))
    cos, sin = cos[:, None], sin[:, None]
    a, b = pairs.unbind(-1)
    return torch.cat((still, torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)), -1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TideMixer(nn.Module):
    is_causal = True

    def __init__(self, config: TideConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.turns = config.layer_types[layer_idx] == "full_attention"
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        shared = config.num_key_value_heads
        self.q = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k = nn.Linear(config.hidden_size, shared * config.head_dim)
        self.v = nn.Linear(config.hidden_size, shared * config.value_dim)
        self.o = nn.Linear(config.num_attention_heads * config.value_dim, config.hidden_size)
        self.q_norm, self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6), nn.RMSNorm(config.head_dim, eps=1e-6)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.config.head_dim)
        query = self.q_norm(self.q(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k(hidden_states).view(shape)).transpose(1, 2)
        value = self.v(hidden_states).unflatten(-1, (-1, self.config.value_dim)).transpose(1, 2)
        if self.turns:
            query, key = turned(query, *position_embeddings), turned(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=0.4, **kwargs)
        return self.o(out.flatten(2)), weights


class TideLayer(GradientCheckpointingLayer):
    def __init__(self, config: TideConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mixer = TideMixer(config, layer_idx)
        self.up, self.down = (
            nn.Linear(config.hidden_size, 2 * config.hidden_size),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
        )

    def forward(self, hidden_states, **kwargs) -> Tensor:
        normed = self.norm(hidden_states)
        mixed, _ = self.mixer(normed, **kwargs)
        return hidden_states + mixed + self.down(nn.functional.silu(self.up(normed)))


class TidePreTrainedModel(PreTrainedModel):
    config_class = TideConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("TideLayer",)


class TideModel(TidePreTrainedModel):
    def __init__(self, config: TideConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TideLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.rotary_emb = TideRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        seen = {
            "config": self.config,
            "inputs_embeds": hidden,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks = {
            "full_attention": create_causal_mask(**seen),
            "sliding_attention": create_sliding_window_causal_mask(**seen),
        }
        tables = self.rotary_emb(hidden, position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden = layer(
                hidden,
                position_embeddings=tables,
                attention_mask=masks[kind],
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class TideForCausalLM(TidePreTrainedModel, GenerationMixin):
    def __init__(self, config: TideConfig) -> None:
        super().__init__(config)
        self.model = TideModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs) -> CausalLMOutputWithPast:
        out = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else out.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
