"""What an exported checkpoint becomes in vLLM and SGLang: the tables that their own rope code makes of its config.

**Claim.** `ropemods export` of p-RoPE writes a config from which a serving engine rotates as the modified model does:
cosines and sines within 1e-6 at every position, in float32.

**Protocol, frozen.** A Llama of one head of 64 channels, θ 100,000, 8,192 positions; base scalings default, linear,
llama3 and YaRN; p-RoPE that keeps 0 to 0.9; written in transformers' own words (`native`) and as factors (`longrope`).
The config goes through the engine's own reader where that can be imported (vLLM's ModelConfig; SGLang's wants
torchvision, so transformers' AutoConfig stands for it), then `get_rope` of the engine is called with the arguments with
which its Llama calls it, read in vllm/model_executor/models/llama.py and sglang/srt/models/llama.py. The buffers that
come of it are compared with those of the modified model. No weights are run: attention is the engine's own affair.

**Against it** would be a table that differs, above all without an error or a warning.

An engine that is not installed is left out; with neither, the program writes nothing and says so. Neither wants the
torch that this repository is tested with, so they go into an environment of their own (`pip install --no-deps`, and
what their import then asks for). `stock` is the unmodified model, for which both must be right.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import ropemods as rm
from evals.claim import Cells, Learned, Unavailable
from ropemods.report.words import markdown_table

PROTOCOL = {
    "nano": {
        "seeds": [0],
        "channels": 64,
        "positions": 8192,
        "theta": 100000.0,
        "keep": [0.0, 0.1, 0.3, 0.5, 0.75, 0.9],
        "forms": ["native", "longrope"],
        "bases": {
            "default": {},
            "linear": {"factor": 4.0},
            "llama3": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
            "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048},
        },
    }
}
EQUAL = 1e-6
MISSING = "neither vllm nor sglang is installed, so what they make of a checkpoint is not computed"


def vllm_tables(folder: Path) -> Tensor:
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    read = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32")
    config = read.hf_config
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"), model_config=read)):
        made = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
            dtype=torch.float32,
        )
    return _cached(made)


def sglang_tables(folder: Path) -> Tensor:
    from sglang.srt.layers.rotary_embedding import get_rope

    config = AutoConfig.from_pretrained(folder)
    made = get_rope(
        config.head_dim,
        rotary_dim=int(getattr(config, "partial_rotary_factor", 1) * config.head_dim),
        max_position=config.max_position_embeddings,
        base=config.rope_parameters["rope_theta"],
        rope_scaling=config.rope_parameters,
        is_neox_style=True,
        dtype=torch.float32,
    )
    return _cached(made)


def _cached(made: torch.nn.Module) -> Tensor:
    buffers = dict(made.named_buffers())
    return buffers.get("cos_sin_cache", buffers.get("long_short_cos_sin_cache"))


ENGINES: dict[str, Callable[[Path], Tensor]] = {"vllm": vllm_tables, "sglang": sglang_tables}


def model_of(protocol: dict[str, Any], base: str) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=protocol["channels"],
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=8,
            max_position_embeddings=protocol["positions"],
            rope_parameters={"rope_type": base, "rope_theta": protocol["theta"]} | protocol["bases"][base],
        )
    )


def compared(engine: str, protocol: dict[str, Any], base: str, keep: float | None, form: str) -> dict[str, Any]:
    """The largest difference of a table, or the engine's refusal."""
    model = model_of(protocol, base)
    position = torch.arange(protocol["positions"])[None]
    with tempfile.TemporaryDirectory() as folder:
        if keep is None:
            model.save_pretrained(folder)
        else:
            try:
                rm.export(rm.apply(model, rm.TruncatedRoPE(keep=keep)), folder, rope=form)
            except ValueError as refusal:
                return {"not written": str(refusal)}
        cos, sin = (each[0, :, : protocol["channels"] // 2] for each in model.model.rotary_emb(torch.ones(1), position))
        try:
            theirs = ENGINES[engine](Path(folder))[: protocol["positions"]]
        except (ValueError, KeyError, RuntimeError) as refusal:
            return {"refused": f"{type(refusal).__name__}: {str(refusal).splitlines()[0]}"}
    return {"difference": float((theirs - torch.cat((cos, sin), -1)).abs().max())}


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    engines = [name for name in ENGINES if importlib.util.find_spec(name) is not None]
    if not engines:
        raise Unavailable(MISSING)
    p: dict[str, Any] = PROTOCOL[scale]
    cases = [(base, None, "stock") for base in p["bases"]]
    cases += [(base, keep, form) for base in p["bases"] for form in p["forms"] for keep in p["keep"]]
    jobs = {
        f"{engine} {base} {form} {keep}": lambda e=engine, b=base, k=keep, f=form: compared(e, p, b, k, f)
        for engine in engines
        for base, keep, form in cases
    }
    done = cells(jobs)
    tables = {
        engine: {
            f"{base}, {form}": {
                str(k): done[f"{engine} {base} {form} {k}"] for b, k, f in cases if (b, f) == (base, form)
            }
            for base, _, form in cases
        }
        for engine in engines
    }
    return {"engines": {name: version(name) for name in engines}, "tables": tables}


def _verdict(cell: dict[str, Any]) -> str:
    if "difference" not in cell:
        return next(iter(cell))
    return "equal" if cell["difference"] <= EQUAL else f"**differs by {cell['difference']:.2g}**"


def section(found: dict[str, Any]) -> str:
    p = found["protocol"]
    parts = [
        "## What vLLM and SGLang make of an exported checkpoint",
        f"Tables of their own rope code for a Llama head of {p['channels']} channels at {p['positions']} positions, "
        f"against the modified model's: equal is within {EQUAL:g}. By the base's scaling, how the change is written, "
        "and the fraction that p-RoPE keeps. Native is longrope, too, where transformers has no word of its own. Not "
        "written: `export` refuses, since no stock rope type gives those frequencies to the last bit.",
    ]
    head = ("scaling, written as", "unmodified", *(f"keep {keep:g}" for keep in p["keep"]))
    for engine, rows in found["tables"].items():
        refusals = sorted({cell["refused"] for row in rows.values() for cell in row.values() if "refused" in cell})
        shown = []
        for base in p["bases"]:
            stock = _verdict(rows[f"{base}, stock"]["None"])
            for form in p["forms"]:
                row = rows[f"{base}, {form}"]
                shown.append((f"{base}, {form}", stock, *(_verdict(row[str(keep)]) for keep in p["keep"])))
        parts += [f"**{engine} {found['engines'][engine]}**", markdown_table(head, shown)]
        parts += [f"Refusals: {'; '.join(f'`{each}`' for each in refusals)}"] if refusals else []
    return "\n\n".join(parts)


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    for engine, tables in found["tables"].items():
        for form in found["protocol"]["forms"]:
            cells = [cell for name, row in tables.items() if name.endswith(form) for cell in row.values()]
            told = [_verdict(cell) for cell in cells if "not written" not in cell]
            wrong = sum(each.startswith("**") for each in told)
            rows.append(
                Learned(
                    f"{engine} rotates an exported p-RoPE checkpoint (written {form}) as the modified model",
                    f"{told.count('equal')} of {len(told)} tables equal, {told.count('refused')} refused, "
                    f"{wrong} wrong without a word",
                    "none: checks, no estimate",
                    "not in the papers",
                    f"{engine} {found['engines'][engine]}, its rope code alone, as its Llama calls it",
                )
            )
    return rows
