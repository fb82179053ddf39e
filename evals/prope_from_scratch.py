"""p-RoPE from scratch (arXiv 2410.06205, Table 2): which rotary frequencies does a model want when it trains with them?

**Claim.** Gemma-2B trained with the lowest quarter of the frequencies standing still (0.75-RoPE) has a lower perplexity
than RoPE, NoPE, 0.25-RoPE, dropping the highest quarter (reversed) and partial RoPE. The margins are small: 0.75-RoPE
against RoPE is 0.005 nats on Wiki, NoPE against RoPE 0.085, 0.25-RoPE 0.015.

**Protocol, frozen.** A llama of the shape in PROTOCOL, trained from scratch on crops of books and prose (BOS, then a
stretch from anywhere), once over; per seed, every variant has the same starting weights and the same rows in the same
order. Only the frequencies differ: ropemods' own `TruncatedRoPE` where it has the form, otherwise the table is set.
Held-out loss on documents that never trained, one crop of four trained lengths each. Attention is causal, so one pass
gives the loss within the trained length and past it. Differences are to RoPE with θ 10k, paired over seeds and
documents: one interval over seeds (Student's t), one over documents (bootstrap of the seeds' mean). Nothing was tuned.

**Against it** would be: 0.75-RoPE above RoPE with an interval that leaves out 0, or reversed or partial below 0.75-RoPE
so. An interval that holds 0 decides nothing.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, set_seed

import ropemods as rm
from evals.claim import Cells, Learned
from evals.intervals import ends, over_seeds, shown
from evals.tight_loop import held_out_texts, rows_of, train, training_texts
from ropemods.mods import Mod
from ropemods.report.html.charts import Series
from ropemods.report.html.drawing import LOOKS, drawing
from ropemods.training.small_models import Architecture, train_tokenizer

PROTOCOL = {
    "nano": {
        "seeds": [0, 1, 2],
        "length": 128,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 256,
        "vocab_size": 1024,
        "steps": 250,
        "batch": 16,
        "learning_rate": 3e-3,
        "warmup": 30,
        "training_documents": 160,
        "held_out_documents": 128,
    }
}
VARIANTS: dict[str, tuple[float, Mod | None]] = {
    "RoPE, θ 10k": (1e4, None),
    "RoPE, θ 500k": (5e5, None),
    "NoPE": (1e4, rm.TruncatedRoPE(keep=0.0)),
    "0.75-RoPE": (1e4, rm.TruncatedRoPE(keep=0.75)),
    "0.25-RoPE": (1e4, rm.TruncatedRoPE(keep=0.25)),
    "0.75, reversed": (1e4, rm.TruncatedRoPE(keep=0.75, which="highest")),
    "0.75, partial": (1e4, None),
}
"""θ and the modification; partial RoPE is no modification of ours, so its table is set."""
STOCK = "RoPE, θ 10k"
PAPER = {
    "RoPE, θ 10k": 4.4627,
    "RoPE, θ 500k": 4.4485,
    "NoPE": 4.8594,
    "0.75-RoPE": 4.4414,
    "0.25-RoPE": 4.5302,
    "0.75, reversed": 4.4592,
    "0.75, partial": 4.4537,
}
"""Validation perplexity on Wiki. The table does not say which θ the truncated ones have; ours have 10k."""
RANGES = {"trained": (0, 1), "second": (1, 2), "third and fourth": (2, 4)}
"""Stretches of positions, in trained lengths."""


@functools.cache
def prepared(data: Path, vocab_size: int, documents: int) -> tuple[Any, list[str]]:
    texts = training_texts(data, documents, 0)
    return train_tokenizer(texts, vocab_size=vocab_size, documents=400), texts


@functools.cache
def training_rows(data: Path, vocab_size: int, documents: int, length: int, rows: int, seed: int) -> Tensor:
    tokenizer, texts = prepared(data, vocab_size, documents)
    bos = int(tokenizer.bos_token_id)
    return rows_of(texts, tokenizer, bos=bos, length=length, rows=rows, text="stationary", seed=seed)


def architecture(theta: float, protocol: dict[str, Any]) -> Architecture:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return Architecture(
        rope="standard", rope_theta=theta, vocab_size=protocol["vocab_size"], **{name: protocol[name] for name in names}
    )


def partial_frequencies(theta: float, keep: float, head_dim: int) -> Tensor:
    """The whole ladder re-spread over a part of the channels; the others do not turn."""
    turning = int(keep * head_dim) // 2
    index = torch.arange(head_dim // 2)
    return torch.where(index < turning, theta ** (-index / turning), torch.zeros(()))


def build(variant: str, seed: int, bos: int, protocol: dict[str, Any]) -> Any:
    """The untrained model; the seed alone says what its weights are."""
    theta, mod = VARIANTS[variant]
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(
        architecture(theta, protocol).config(length=4 * protocol["length"], bos=bos), dtype=torch.float32
    )
    if mod is not None:
        rm.apply(model, mod)
    if variant.endswith("partial"):
        head_dim = protocol["hidden_size"] // protocol["num_attention_heads"]
        table = model.model.rotary_emb.inv_freq
        table.copy_(partial_frequencies(theta, 0.75, head_dim))
    return model


def held_out_rows(data: Path, tokenizer: Any, protocol: dict[str, Any]) -> Tensor:
    """One crop a document, the same for every variant and seed; shorter documents are left out."""
    draw, length, rows = np.random.default_rng(77), 4 * protocol["length"], []
    for text in held_out_texts(data, "all").texts:
        if len(rows) == protocol["held_out_documents"]:
            break
        start = int(draw.integers(0, max(1, len(text) - 8 * length)))
        ids = tokenizer(text[start : start + 8 * length], add_special_tokens=False).input_ids
        if len(ids) >= length:
            rows.append([tokenizer.bos_token_id, *ids[1:length]])  # the first token may be a part of a word
    if len(rows) < protocol["held_out_documents"]:
        raise ValueError(f"only {len(rows)} held-out documents have {length} tokens; lower held_out_documents")
    return torch.tensor(rows)


def losses_NT(model: Any, rows_NT: Tensor) -> Tensor:
    """The loss of predicting tokens 1 …, for every row."""
    found = []
    with torch.no_grad():
        for tokens_BT in rows_NT.split(16):
            logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1]
            found.append(functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none"))
    return torch.cat(found)


def one(variant: str, seed: int, data: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    vocab_size, documents, length = (protocol[name] for name in ("vocab_size", "training_documents", "length"))
    tokenizer, _ = prepared(data, vocab_size, documents)
    rows = training_rows(data, vocab_size, documents, length, protocol["steps"] * protocol["batch"], seed)
    bos = int(tokenizer.bos_token_id)
    model = build(variant, seed, bos, protocol)
    seen = train(
        model,
        rows,
        batch=protocol["batch"],
        learning_rate=protocol["learning_rate"],
        warmup=protocol["warmup"],
    )
    # Position t here predicts token t + 1; padding in front makes the stretches whole.
    loss_NT = functional.pad(losses_NT(model, held_out_rows(data, tokenizer, protocol)), (1, 0), value=float("nan"))
    bins = [(2**k, 2 ** (k + 1)) for k in range(int(math.log2(4 * length)))]
    return {
        "documents": {name: loss_NT[:, a * length : b * length].nanmean(1).tolist() for name, (a, b) in RANGES.items()},
        "by_position": {str(a): float(loss_NT[:, a:b].nanmean()) for a, b in bins},
        "last_training_loss": float(np.mean(seen[-20:])),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    protocol = PROTOCOL[scale]
    seeds = protocol["seeds"]
    done = cells({f"{v}, seed {s}": lambda v=v, s=s: one(v, s, data, protocol) for s in seeds for v in VARIANTS})
    found: dict[str, Any] = {
        "loss": {},
        "difference": {},
        "over_documents": {},
        "by_position": {},
        "parameters": done[f"{STOCK}, seed {seeds[0]}"]["parameters"],
        "tokens": protocol["steps"] * protocol["batch"] * protocol["length"],
    }
    for variant in VARIANTS:
        cells_SEED = [done[f"{variant}, seed {seed}"] for seed in seeds]
        stock_SEED = [done[f"{STOCK}, seed {seed}"] for seed in seeds]
        positions = cells_SEED[0]["by_position"]
        found["by_position"][variant] = {
            p: float(np.mean([c["by_position"][p] for c in cells_SEED])) for p in positions
        }
        for what in ("loss",) if variant == STOCK else ("loss", "difference", "over_documents"):
            found[what][variant] = {}
        for name in RANGES:
            mine_SN = np.array([c["documents"][name] for c in cells_SEED])
            difference_SN = mine_SN - np.array([c["documents"][name] for c in stock_SEED])
            found["loss"][variant][name] = over_seeds(mine_SN.mean(1).tolist())
            if variant != STOCK:
                found["difference"][variant][name] = over_seeds(difference_SN.mean(1).tolist())
                found["over_documents"][variant][name] = bootstrapped(difference_SN.mean(0))
    return found


def bootstrapped(values_N: np.ndarray) -> dict[str, float]:
    draw = np.random.default_rng(5)
    means = values_N[draw.integers(0, len(values_N), (4000, len(values_N)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values_N.mean()), "low": float(low), "high": float(high)}


def paper_difference(variant: str) -> float:
    return math.log(PAPER[variant] / PAPER[STOCK])


def section(found: dict[str, Any]) -> str:
    protocol, form = found["protocol"], "{:+.4f}"
    length = protocol["length"]
    lines = [
        "## p-RoPE from scratch (2410.06205, Table 2)",
        "",
        f"Llamas of {found['parameters']:,} parameters, {found['tokens']:,} tokens each at length {length}, "
        f"{len(found['seeds'])} seeds; {protocol['held_out_documents']} held-out documents. Loss in nats per token "
        f"(mean of the seeds), and its difference to {STOCK}: with the interval over seeds, then over documents.",
        "",
        f"| | loss to {length} | difference, over seeds | over documents | the paper's, Wiki | "
        f"difference at {length} to {2 * length} | at {2 * length} to {4 * length} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in found["loss"]:
        row = [variant, f"{found['loss'][variant]['trained']['value']:.4f}"]
        if variant == STOCK:
            row += ["", "", "", *(f"loss {found['loss'][variant][n]['value']:.4f}" for n in list(RANGES)[1:])]
        else:
            apart = found["difference"][variant]
            row += [shown(apart["trained"], form), ends(found["over_documents"][variant]["trained"], form)]
            row += [f"{paper_difference(variant):+.4f}".replace("-", "−")]
            row += [shown(apart[name], form) for name in list(RANGES)[1:]]
        lines.append("| " + " | ".join(row) + " |")
    positions = list(next(iter(found["by_position"].values())))
    lines += ["", f"Loss by position (first of the positions), trained to {length}:", ""]
    lines += ["| | " + " | ".join(positions) + " |", "|---|" + "---:|" * len(positions)]
    for variant, by_position in found["by_position"].items():
        lines.append(f"| {variant} | " + " | ".join(f"{by_position[p]:.3f}" for p in positions) + " |")
    decided = [v for v in found["difference"] if decides(found["difference"][v]["trained"])]
    lines += [
        "",
        f"What it shows: within the trained length the seeds tell from {STOCK}: {', '.join(decided) or 'none'}. "
        "What it does not show: which of the others is better, and anything about 2B parameters or 8k tokens. At this "
        f"length the lowest quarter of θ 10k's frequencies turns by less than "
        f"{length * 1e4 ** (-0.75):.2f} rad over a whole row, so keeping or dropping it must be nearly the same.",
    ]
    return "\n".join(lines)


def decides(estimate: dict[str, Any]) -> bool:
    return estimate["low"] > 0 or estimate["high"] < 0


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    claims = {
        "0.75-RoPE": "0.75-RoPE from scratch is better than RoPE",
        "NoPE": "NoPE from scratch is worse than RoPE",
        "0.25-RoPE": "0.25-RoPE from scratch is worse than RoPE",
    }
    for variant, claim in claims.items():
        apart = found["difference"][variant]["trained"]
        wanted = paper_difference(variant)
        same = "agrees" if apart["value"] * wanted > 0 else "has the other sign"
        verdict = same if decides(apart) else "the interval holds 0, so undecided here"
        rows.append(
            Learned(
                f"2410.06205: {claim}",
                f"{apart['value']:+.4f} nats".replace("-", "−"),
                ends(apart, "{:+.4f}"),
                f"{wanted:+.4f} nats (Gemma-2B, Wiki); {verdict}".replace("-0", "−0"),
                f"{found['parameters'] / 1e6:.1f}M parameters, {found['tokens'] / 1e6:.1f}M tokens, length "
                f"{found['protocol']['length']}, {len(found['seeds'])} seeds",
            )
        )
    return rows


def figure(found: dict[str, Any]) -> str:
    stock = found["by_position"][STOCK]
    shown_here = [v for v in found["by_position"] if v != STOCK]
    series = [
        Series(
            name=v, look=look, xs=[float(p) for p in stock], ys=[found["by_position"][v][p] - stock[p] for p in stock]
        )
        for v, look in zip(shown_here, LOOKS, strict=True)
    ]
    return drawing(
        {f"trained to {found['protocol']['length']}": series},
        x_label="position",
        y_label=f"loss − loss of {STOCK}, nats",
        description="Loss by position of models with other rotary frequencies, less that of RoPE.",
    )
