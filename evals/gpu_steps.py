"""A whole training step with each modification against the stock step, on random weights: only time is measured.

Autocast in bfloat16 over fp32 weights, AdamW, clipping: a step as the Trainer makes it. Stock and modified run in
turns, and the ratio is taken within each pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ropemods as rm
from ropemods import clock
from ropemods.attention import paths
from ropemods.mods import Mod


@dataclass(frozen=True, kw_only=True)
class Size:
    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    batch: int
    length: int


SIZES = (
    Size(name="135M", hidden=576, inner=1536, layers=30, heads=9, groups=3, vocabulary=49152, batch=8, length=2048),
    Size(name="1B", hidden=2048, inner=8192, layers=16, heads=32, groups=8, vocabulary=32000, batch=2, length=4096),
)
TOY = (Size(name="toy", hidden=32, inner=64, layers=2, heads=4, groups=2, vocabulary=64, batch=1, length=24),)
MODS: dict[str, tuple[Mod, ...]] = {
    "stock again": (),
    "TruncatedRoPE": (rm.TruncatedRoPE(keep=0.75),),
    "AdaptiveTemperature": (rm.AdaptiveTemperature(trainable="head"),),
    "LearnedSink": (rm.LearnedSink(init=0.0),),
    "UnrotatedBos": (rm.UnrotatedBos(),),
    "ReplacedBos": (rm.ReplacedBos(by="mean"),),
    "rope, temperature, sink": (
        rm.TruncatedRoPE(keep=0.75),
        rm.AdaptiveTemperature(trainable="head"),
        rm.LearnedSink(init=0.0),
    ),
}


def model_of(size: Size, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        bos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).train()


def parameters(size: Size) -> int:
    """Of a model of this size, near enough."""
    attention = 2 * size.hidden**2 * (1 + size.groups / size.heads)
    return round(size.vocabulary * size.hidden + size.layers * (attention + 3 * size.hidden * size.inner))


def measuring(size: Size, device: str, *, pairs: int) -> dict[str, Any]:
    """Leakage measured with everything, in bfloat16, over a plain forward of the same tokens."""
    from evals.leakage_cost import crops_of, measured, plain, protocol_of

    model = model_of(size, device).eval().to(torch.bfloat16)
    crops = crops_of(model, protocol_of(size.length, max(8, 2 * size.batch), size.batch))
    first, second = (lambda: plain(model, crops)), (lambda: measured(model, crops))
    ratio = clock.ratio(first, second, pairs=pairs, device=device)
    memory = clock.peak_bytes(second, device) / clock.peak_bytes(first, device)
    return {"ratio": asdict(ratio), "memory": memory}


def step_of(model: LlamaForCausalLM, size: Size, device: str) -> Callable[[], None]:
    source = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, size.vocabulary, (size.batch, size.length), generator=source)
    ids_BT[:, 0] = 1
    ids_BT = ids_BT.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device == "cuda")

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(size: Size, mods: tuple[Mod, ...], path: str, device: str, *, pairs: int) -> dict[str, Any]:
    """The modified step's time and peak memory over the stock step's."""
    stock, modified = model_of(size, device), model_of(size, device)
    if mods:
        rm.apply(modified, *mods)
    with paths.using(path):
        first, second = step_of(stock, size, device), step_of(modified, size, device)
        ratio = clock.ratio(first, second, pairs=pairs, device=device)
        memory = clock.peak_bytes(second, device) / clock.peak_bytes(first, device)
    return {"ratio": asdict(ratio), "memory": memory, "parameters": sum(p.numel() for p in stock.parameters())}
