"""Retrieval in context: do the modifications help a model find something in a context longer than it trained on?

**Claim.** Two papers say they should: softmax disperses as the context grows (arXiv 2410.01104), and rotary frequencies
that drift with distance spoil a match by content (arXiv 2410.06205). Here both are put to two tasks that need nothing
else: recall of key-value pairs, and a passkey.

**Protocol, frozen.** *Recall*: BOS, k₁ v₁ k₂ v₂ …, a separator, then as many keys again, each drawn anew; right when
the value after a key is the most likely token. *Passkey*: BOS, random filler with a marker and one value somewhere,
then the marker; right when that value is the most likely token. A small llama learns both, from scratch, on contexts of
up to the trained length, each batch of one task and one length; it is tested at 1, 2 and 4 times that length, where the
pairs are as many times more. Seeds have starting weights, training and test contexts of their own; variants of a seed
share them, so differences to stock are paired. Intervals: Student's t over the seeds. Shape and steps were settled on
seed 100 of the stock model at the trained length alone.

**Against it** would be: a variant that is no better than stock at 2 and 4 times the length. A model that has not
learned a task at the trained length says nothing about longer ones, and its row says so.

Shapes: B contexts, T tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

import ropemods as rm
from evals.claim import Cells, Learned
from evals.intervals import ends, over_seeds, shown
from ropemods.mods import Mod

PROTOCOL = {
    "nano": {
        "seeds": [0, 1, 2],
        "length": 32,
        "steps": 1000,
        "batch": 64,
        "learning_rate": 3e-3,
        "warmup": 50,
        "passkey_every": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
        "embedding_range": 1.0,
        "keys": 64,
        "values": 16,
        "filler": 16,
        "test_contexts": 128,
    }
}
BOS, SEPARATOR, MARKER, FIRST = 0, 1, 2, 3
TASKS = ("recall", "passkey")
TEMPERATURE = rm.AdaptiveTemperature(beyond="hold", trainable="head")
TRAINED: dict[str, tuple[Mod, ...]] = {
    "stock": (),
    "temperature trained in": (TEMPERATURE,),
    "0.75-RoPE": (rm.TruncatedRoPE(keep=0.75),),
    "0.25-RoPE": (rm.TruncatedRoPE(keep=0.25),),
    "0.75-RoPE, temperature trained in": (rm.TruncatedRoPE(keep=0.75), TEMPERATURE),
}
PUT_ON: dict[str, Mod] = {
    "temperature at test time": rm.AdaptiveTemperature(),
    "temperature at test time, hold": rm.AdaptiveTemperature(beyond="hold"),
}
"""On the trained stock model, without training."""
LEARNED_FROM = 90.0
"""Accuracy in % at the trained length from which a task counts as learned."""


def contexts(
    task: str, count: int, length: int, protocol: dict[str, Any], draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens, and which of them are answers: True at each token that must be told from those before it."""
    values_from = FIRST + protocol["keys"]
    if task == "passkey":
        filler_from = values_from + protocol["values"]
        tokens_BT = filler_from + torch.randint(0, protocol["filler"], (count, length), generator=draw)
        value_B = values_from + torch.randint(0, protocol["values"], (count,), generator=draw)
        place_B = torch.randint(1, length - 4, (count,), generator=draw)
        row_B = torch.arange(count)
        tokens_BT[:, 0] = BOS
        tokens_BT[row_B, place_B], tokens_BT[row_B, place_B + 1] = MARKER, value_B
        tokens_BT[:, -2], tokens_BT[:, -1] = MARKER, value_B
        answer_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        answer_BT[:, -1] = True
        return tokens_BT, answer_BT
    pairs = (length - 2) // 4
    key_BP = FIRST + _distinct(count, protocol["keys"], pairs, draw)
    value_BP = values_from + torch.randint(0, protocol["values"], (count, pairs), generator=draw)
    # Asked again and again: were each asked once, those still to come could be told by elimination, without recall.
    order_BP = torch.randint(0, pairs, (count, pairs), generator=draw)
    shown_BT = torch.stack([key_BP, value_BP], 2).flatten(1)
    asked_BT = torch.stack([key_BP.gather(1, order_BP), value_BP.gather(1, order_BP)], 2).flatten(1)
    column_B1 = torch.zeros(count, 1, dtype=torch.long)
    tokens_BT = torch.cat([column_B1 + BOS, shown_BT, column_B1 + SEPARATOR, asked_BT], 1)
    answer_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    answer_BT[:, 2 * pairs + 3 :: 2] = True
    return tokens_BT, answer_BT


def _distinct(count: int, among: int, wanted: int, draw: torch.Generator) -> Tensor:
    return torch.rand(count, among, generator=draw).argsort(1)[:, :wanted]


def build(seed: int, protocol: dict[str, Any], mods: tuple[Mod, ...]) -> Any:
    # transformers' 0.02 is meant for wide models: at 64 it leaves every attention row all but uniform for long.
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    config = LlamaConfig(
        vocab_size=FIRST + protocol["keys"] + protocol["values"] + protocol["filler"],
        max_position_embeddings=4 * protocol["length"],
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=None,
        **{name: protocol[name] for name in shape},
    )
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with (
        torch.no_grad()
    ):  # as nn.Embedding has it: else the layers drown the tokens, and recall is not learned for long
        model.model.embed_tokens.weight.mul_(protocol["embedding_range"] / protocol["initializer_range"])
    return rm.apply(model, *mods) if mods else model


def train(model: nn.Module, seed: int, protocol: dict[str, Any]) -> list[float]:
    """AdamW with a cosine, on answers only."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=protocol["learning_rate"], weight_decay=0.01, foreach=True)
    steps, warmup, seen = protocol["steps"], protocol["warmup"], []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = protocol["learning_rate"] * min((step + 1) / warmup, cosine)
        length = int(torch.randint(protocol["length"] // 4, protocol["length"] + 1, (1,), generator=draw))
        # The passkey is learned at once, recall takes its time.
        task = TASKS[step % protocol["passkey_every"] == 0]
        tokens_BT, answer_BT = contexts(task, protocol["batch"], length, protocol, draw)
        # Only the hidden states before an answer go through the head.
        hidden_BTD = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state[:, :-1]
        wanted = answer_BT[:, 1:]
        loss = functional.cross_entropy(model.lm_head(hidden_BTD[wanted]), tokens_BT[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
    model.eval()
    return seen


def accuracy(model: nn.Module, seed: int, protocol: dict[str, Any]) -> dict[str, dict[str, float]]:
    """In %, by task and by how many trained lengths the context has."""
    draw = torch.Generator().manual_seed(50_000 + seed)
    found: dict[str, dict[str, float]] = {}
    for task in TASKS:
        found[task] = {}
        for times in (1, 2, 4):
            tokens_BT, answer_BT = contexts(task, protocol["test_contexts"], times * protocol["length"], protocol, draw)
            with torch.no_grad():
                told_BT = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1].argmax(-1)
            right_BT = told_BT == tokens_BT[:, 1:]
            found[task][str(times)] = 100 * float(right_BT[answer_BT[:, 1:]].float().mean())
    return found


def one(variant: str, seed: int, protocol: dict[str, Any]) -> dict[str, Any]:
    """A trained variant; the stock one is also tested with modifications put on."""
    model = build(seed, protocol, TRAINED[variant])
    train(model, seed, protocol)
    found = {variant: accuracy(model, seed, protocol)}
    for name, mod in PUT_ON.items() if variant == "stock" else ():
        rm.apply(model, mod)
        found[name] = accuracy(model, seed, protocol)
        rm.remove(model)
    return found


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    protocol = PROTOCOL[scale]
    seeds = protocol["seeds"]
    done = cells({f"{v}, seed {s}": lambda v=v, s=s: one(v, s, protocol) for s in seeds for v in TRAINED})
    by_row: dict[str, list[Any]] = {}
    for variant in TRAINED:
        for seed in seeds:
            for row, result in done[f"{variant}, seed {seed}"].items():
                by_row.setdefault(row, []).append(result)
    found: dict[str, Any] = {"accuracy": {}, "difference": {}}
    for row, results in by_row.items():
        for task in TASKS:
            for times in ("1", "2", "4"):
                mine = [result[task][times] for result in results]
                stock = [result[task][times] for result in by_row["stock"]]
                found["accuracy"].setdefault(row, {}).setdefault(task, {})[times] = over_seeds(mine)
                apart = over_seeds([a - b for a, b in zip(mine, stock, strict=True)])
                found["difference"].setdefault(row, {}).setdefault(task, {})[times] = apart
    return found


def section(found: dict[str, Any]) -> str:
    protocol = found["protocol"]
    length = protocol["length"]
    lines = [
        "## Retrieval in context",
        "",
        f"Llamas of {protocol['num_hidden_layers']} layers, {protocol['hidden_size']} wide, trained from scratch on "
        f"both tasks with contexts of {length // 4} to {length} tokens; {len(found['seeds'])} seeds, "
        f"{protocol['steps']} steps. Accuracy in %, and in the second table its paired difference to stock in points.",
        "",
        "| | " + " | ".join(f"{task}, {t} ×" for task in TASKS for t in (1, 2, 4)) + " |",
        "|---|" + "---:|" * 6,
    ]
    for row, tasks in found["accuracy"].items():
        note = "" if learned_both(tasks) else " (not learned)"
        lines.append(f"| {row}{note} | " + " | ".join(shown(e) for task in TASKS for e in tasks[task].values()) + " |")
    lines += ["", lines[4], lines[5]]
    for row, tasks in found["difference"].items():
        if row != "stock":
            cells = (shown(e, "{:+.1f}") for task in TASKS for e in tasks[task].values())
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    better, worse = (
        [f"{r} ({task}, {t} ×)" for r, task, t, e in _longer(found) if (e["low"] > 0 if sign > 0 else e["high"] < 0)]
        for sign in (1, -1)
    )
    lines += [
        "",
        f"What it shows: past the trained length, better than stock with the whole interval: "
        f"{', '.join(better) or 'none'}; worse so: {', '.join(worse) or 'none'}. What it does not show: retrieval in "
        f"text, where keys are not single tokens. A row is marked *not learned* "
        f"where either task is under {LEARNED_FROM:g}% at the trained length.",
    ]
    return "\n".join(lines)


def learned_both(tasks: dict[str, Any]) -> bool:
    return all(tasks[task]["1"]["value"] >= LEARNED_FROM for task in TASKS)


def _longer(found: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    rows = ((r, tasks) for r, tasks in found["difference"].items() if r != "stock")
    return [(r, task, t, tasks[task][t]) for r, tasks in rows for task in TASKS for t in ("2", "4")]


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    for row in ("temperature at test time", "temperature trained in", "0.75-RoPE", "0.25-RoPE"):
        apart = found["difference"][row]["recall"]["4"]
        verdict = "helps" if apart["low"] > 0 else "hurts" if apart["high"] < 0 else "undecided: the interval holds 0"
        both = learned_both(found["accuracy"][row]) and learned_both(found["accuracy"]["stock"])
        rows.append(
            Learned(
                f"retrieval past the trained length: {row} against stock",
                f"{apart['value']:+.1f} points, recall at 4 ×".replace("-", "−"),
                ends(apart, "{:+.1f}"),
                f"no such figure in the papers, which expect a gain; {verdict}",
                f"2 layers, length {found['protocol']['length']}, {len(found['seeds'])} seeds"
                + ("" if both else "; not learned at the trained length"),
            )
        )
    return rows
