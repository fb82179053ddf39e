"""Config classes' own defaults, made small field by field.

Nothing here knows a model by name. `RULES` says what a field of that name becomes, whichever model has it. Lists with
one entry a layer are cut to the first layer of each kind, so that every kind of layer a model alternates is in the
small one.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES

BOS, EOS, PAD, VOCAB = 1, 2, 0, 64
HEADS, HEAD_DIM, WINDOW, LENGTH = 4, 16, 4, 12
MOST_LAYERS = 5

LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
KEPT = re.compile(
    r"(.*dropout.*|.*_pdrop|.*epsilon|.*multiplier|seed|pretraining_tp|.*theta|.*interval|.*_step|num_labels|.*_cycles|"
    r"H_cycles|L_cycles|hc_.*iters|mtp_.*|.*cache_implementation|.*_eps|.*_freq)"
)
RULES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size.*|.*byte_group_vocab", VOCAB),
    (r"bos_token_id|decoder_start_token_id", BOS),
    (r"eos_token_id", EOS),
    (r".*token_(id|index)|.*_token_id.*|eod_token_id", PAD),
    (r"num_key_value_heads|num_kv_heads|num_query_groups", lambda v, old: min(HEADS, max(1, HEADS * v // heads(old)))),
    (r"num_attention_heads|n_heads|n_head|num_heads", HEADS),
    (r"index(er)?_n_heads", 16),  # scores are ReLU sums: with few heads many keys tie at 0, and none is first
    (r"mamba_n_heads|n_mamba_heads", lambda v, old: 8),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"qk_nope_head_dim|v_head_dim", 8),
    (r"indexer_budget", WINDOW),
    (r"max_window_layers", 1),
    (r"cross_attn_k", 1),
    (r"local_attention", 2 * WINDOW),  # counts both sides
    (r"hidden_size_global|adapter_in_dim|adapter_input_size|adapter_out_dim", HEADS * HEAD_DIM),
    (r"num_layers_per_stack", None),
    (r"head_dim", lambda v, old: 8 if old.get("qk_rope_head_dim") == v else HEAD_DIM),
    (r"kv_channels|attention_head_dim|swa_head_dim|mamba_d_head|mamba_headdim", HEAD_DIM),
    (r"qk_rope_head_dim|index_head_dim|rotary_dim", lambda v, old: 8 if v else v),
    (r".*head_dim", HEAD_DIM),
    (r"hidden_size|d_model|n_embd", HEADS * HEAD_DIM),
    (r"attention_hidden_size|mamba_d_ssm", 2 * HEADS * HEAD_DIM),
    (r"hidden_size_per_layer_input", 8),
    (r"max_position_embeddings|max_seq_len|model_max_length", 64),
    (r"original_max_position_embeddings", 8),
    (r"sliding_window|.*_window(_len|_size)?|attention_chunk_size|index_topk", WINDOW),
    (r"floor_scale", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", lambda v, old: min(v, 1)),
    (r"n_group|topk_group|.*expert_group", 1),
    (r"(n|num).*experts|zero_expert_num", lambda v, old: 4 if v > 4 else v),
    (r".*experts_per_tok(en)?|moe_k|moe_top_?k|num_experts_per_token", lambda v, old: 2 if v > 2 else v),
    (r"num_kv_shared_layers", lambda v, old: min(v, 1)),
    (r"index_block_size", 2),
    (r".*chunk_size|block_size", 4),
    (r".*intermediate_size.*|ffn_dim|.*ffn_hidden_size", lambda v, old: 32 if v else v),
    (r".*rank.*", 16),
    (r"split_ngram_parts|heads_per_ngram|make_ngram.*", 2),
)

REQUIRED: dict[str, Any] = {
    "head_dim": lambda config: None if hasattr(config, "qk_rope_head_dim") else HEAD_DIM,
    "num_key_value_heads": lambda config: HEADS if hasattr(config, "qk_rope_head_dim") else HEADS // 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 2,
    "attn_layer_indices": [1],
    "sliding_window": WINDOW,
    "layer_types": lambda config: _kinds(type(config)),
    "clip_qkv": 8.0,
}
"""What stands in a field whose default is nothing."""
SWITCHES = {"use_sliding_window": True, "use_mem_rope": True, "position_embedding_type": "rope"}
"""Options that are off by default and lead to RoPE or to another kind of layer."""
UNSTATED = {"attn_config": {"rope_theta": 100.0}}
"""Fields of nested configs that models read and no config class states."""


def heads(fields: dict[str, Any]) -> int:
    """Attention heads among the fields of a config, under whichever name."""
    for name in ("num_attention_heads", "n_heads", "n_head", "num_heads"):
        if fields.get(name):
            return fields[name]
    return HEADS


def small(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """An instance of a config class with every size cut by `RULES`."""
    return _small(cls())


def _small(default: PreTrainedConfig) -> PreTrainedConfig:
    cls = type(default)
    # A field is stored under the name that the class's attribute map gives it, and made from its own.
    alias = {stored: name for name, stored in cls.attribute_map.items() if name in _accepted(cls)}
    stated = {alias.get(k, k): v for k, v in vars(default).items() if not k.startswith("_")}
    if (by_layer := default.to_dict().get("per_layer_config")) is not None:
        stated["per_layer_config"] = by_layer
    names = [name for name in (*LAYERS, *default.attribute_map) if isinstance(stated.get(name), int)]
    count = next((stated[name] for name in names if name in LAYERS), None)
    chosen = _representative(stated, count) if count else []
    accepted = _accepted(cls)
    values: dict[str, Any] = {}
    for name, value in stated.items():
        if isinstance(value, PreTrainedConfig):
            inner = {
                k: v for k, v in _small(value).to_dict().items() if k not in ("_name_or_path", "output_attentions")
            }
            values[name] = inner | UNSTATED.get(name, {})
        elif name in LAYERS and count:
            values[name] = len(chosen)
        elif isinstance(value, list) and count and len(value) == count:
            values[name] = [_field(name, value[index], stated) for index in chosen]
        elif value is None and name in REQUIRED:
            filled = REQUIRED[name]
            values[name] = filled(default) if callable(filled) else filled
        elif isinstance(value, dict) and name == "rope_parameters":
            values[name] = _rope(value) or {kind: {"rope_type": "default", "rope_theta": 100.0} for kind in _kinds(cls)}
        elif isinstance(value, dict) and name == "per_layer_config":
            kept = {index: value.get(f"{old:02d}", value.get(str(old))) for index, old in enumerate(chosen)}
            values[name] = {f"{i:02d}": _fields(v, stated) for i, v in kept.items() if v}
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):
            values[name] = _fields(value, stated)
        elif isinstance(value, list) and value and all(type(v) is int for v in value) and count:
            # Indices of layers: those that stand at a chosen one.
            values[name] = [new for new, old in enumerate(chosen) if old in value] if max(value) < count + 1 else value
        else:
            values[name] = SWITCHES.get(name, _field(name, value, stated))
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and set(kinds) == {"linear_attention"}:
        values["layer_types"] = [*kinds[:-1], "full_attention"]
    if stated.get("use_sliding_window") is False:
        values.pop("layer_types", None)  # the config makes it from the switch
    elif isinstance(kinds, list) and stated.get("layer_types") is None and count:
        values |= {name: len(kinds) for name in LAYERS if name in values}
    given = {name: value for name, value in values.items() if name in accepted}
    made = cls(**given)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if hasattr(made, name):
            setattr(made, name, {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}[name])
    return made


def _kinds(cls: type[PreTrainedConfig]) -> list[str] | None:
    """The kinds of layer that the package of a config class speaks of, attention last."""
    folder = Path(inspect.getfile(cls)).parent
    text = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    found = [kind for kind in ALLOWED_ATTN_LAYER_TYPES if f'"{kind}"' in text]
    return sorted(found, key=lambda kind: kind == "full_attention")[-3:] or None


def _accepted(cls: type[PreTrainedConfig]) -> set[str]:
    """What the config class can be made with."""
    names = {"per_layer_config"}
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        names |= set(inspect.signature(base.__init__).parameters)
    unwanted = {"self", "args", "kwargs", "model_type", "architectures", "dtype"}
    unwanted |= {"transformers_version", "attribute_map"}
    return names - unwanted


def _representative(stated: dict[str, Any], count: int) -> list[int]:
    """The first layer of each kind, where a kind is what all lists with an entry a layer say of it."""
    lists = [v for v in stated.values() if isinstance(v, list) and len(v) == count]
    per_layer = stated.get("per_layer_config") or {}
    indices = [
        v
        for k, v in stated.items()
        if isinstance(v, list) and v and len(v) != count and all(type(i) is int for i in v) and max(v) < count
    ]
    seen: dict[str, int] = {}
    for index in range(count):
        kind = [repr(v[index]) for v in lists] + [repr(index in v) for v in indices]
        kind.append(repr(per_layer.get(f"{index:02d}", per_layer.get(str(index)))))
        seen.setdefault("|".join(kind), index)
    chosen = sorted(seen.values())[:MOST_LAYERS]
    rest = [index for index in range(count) if index not in chosen]
    return sorted(chosen + rest[: max(0, 2 - len(chosen))])


def _fields(values: dict[Any, Any], around: dict[str, Any]) -> dict[Any, Any]:
    around = around | values
    return {name: _field(name, value, around) if isinstance(name, str) else value for name, value in values.items()}


def _field(name: str, value: Any, around: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return _fields(value, around)
    if re.fullmatch(r"bos_token_id|eos_token_id|pad_token_id", name):
        return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}[name]
    if name in ("attention_dropout", "attn_pdrop"):
        return 0.0  # so that two passes can be compared; no fused kernel has dropout beside a sink
    if name == "time_step_min":
        return 1e-12  # the chunked scan stops there and the recurrent step does not, so the two would differ
    if type(value) is not int or KEPT.fullmatch(name):
        return value
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule(value, around) if callable(rule) else rule
    return 16 if value > 32 else value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters with a small base, so that low frequencies matter in a short sequence."""
    out: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            out[name] = _rope(entry)
        elif name == "rope_theta":
            out[name] = 100.0 if entry <= 50_000 else 400.0
        elif name == "original_max_position_embeddings":
            out[name] = 8
        elif name == "mrope_section":
            out[name] = [1] * len(entry)
        else:
            out[name] = entry
    return out


WINDOWS = re.compile(
    r"sliding_window|.*_window(_len|_size)?|attention_chunk_size|index_topk|indexer_budget|local_attention|floor_scale|"
    r"original_max_position_embeddings"
)


def wide(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same config with nothing that happens at some length happening within a sequence.

    Windows, chunks and the number of keys that sparse attention keeps are longer, and so are the lengths from which on
    queries are scaled and frequencies change.
    """
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            setattr(config, name, wide(value))
        elif isinstance(value, dict) and name == "rope_parameters":
            setattr(config, name, _wide_rope(value))
        elif type(value) is int and WINDOWS.fullmatch(name):
            setattr(config, name, 4 * LENGTH)
    return config


def _wide_rope(value: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _wide_rope(entry) if isinstance(entry, dict) else 4 * LENGTH if WINDOWS.fullmatch(name) else entry
        for name, entry in value.items()
    }
