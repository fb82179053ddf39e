"""Which rotary frequencies queries and keys use.

**Claim** (arXiv 2410.06205): norm sits in the lowest bands, and the highest bands are used mostly by the first and the
last layers; values show no such pattern.

**Protocol.** Every trained model at hand: stories260K, prose3M and the designs (`design_models.py`). Mean 2-norm of
each rotated pair of channels over held-out crops, of queries, keys and, as a control that no rotation touches, values
paired in the same way. A head's share of a band is its norm over the sum of all bands'. Low bands are the slowest
quarter, high bands the fastest; with no pattern either has a quarter. Intervals resample heads. Middle layers are all
but the first and the last.

**Against it** would be a share of the low bands at or below a quarter, or no larger than the values'; and high bands
that the middle layers use as much as the ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals.claim import Learned
from evals.design_models import TRAINING, Models
from evals.tight_loop import held_out_texts
from ropemods.attention.rows import Rows
from ropemods.leakage.capture import forward
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import Documents, join_short, read_documents
from ropemods.model.attention_function import observed
from ropemods.model.attention_layers import AttentionSite
from ropemods.model.observation import observing
from ropemods.mods.base import Call, Layout

GIVEN = ("stories260K", "prose3M")
PROTOCOL = {"nano": {"seeds": [0], "models": list(GIVEN), "designs": TRAINING["nano"], "crops": 64, "length": 128}}
SIDES = ("query", "key", "value")
DRAWS = 1000
Floats = npt.NDArray[np.float64]


def run(scale: str, data: Path, cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    p: dict[str, Any] = PROTOCOL[scale]
    designs = Models(scale, data, say=lambda line: print(line, flush=True))
    jobs: dict[str, Callable[[], Any]] = {name: lambda name=name: given(name, data, p) for name in p["models"]}
    for name in designs.names:
        jobs[f"design {name}"] = lambda name=name: pairs(
            designs.trained(name), designs.tokenizer(), held_out_texts(data, "all"), p
        )
    found = cells(jobs)
    return {"models": {name: {"norms": each, **readings(each)} for name, each in found.items()}}


def given(name: str, data: Path, p: dict[str, Any]) -> dict[str, Any]:
    folder = data / "models" / name
    documents = held_out_texts(data, "all")
    if name == "stories260K":
        # A story is about as long as a crop, so stories are joined.
        documents = join_short(read_documents(data / "text" / "tinystories.txt"), characters=16 * p["length"])
    return pairs(
        AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), documents, p
    )


@torch.no_grad()
def pairs(model: nn.Module, tokenizer: Any, documents: Documents, p: dict[str, Any]) -> dict[str, Any]:
    """Mean norm of every pair, {side: [L][heads][F]}, fastest band first."""
    crops = make_crops(documents, tokenizer, rm.Protocol(sequences=p["crops"], length=p["length"]))
    sums: dict[tuple[int, str], Tensor] = {}
    with observing(model) as observation:
        layout, table = observation.layout, observation.tables[0]
        if layout is None or table is None:
            raise ValueError("usage by frequency needs a model whose rotary channels are known; leave this one out")
        width, order = 2 * table.live().shape[-1], {id(site): n for n, site in enumerate(observation.sites)}

        def observe(site: AttentionSite, rows: Rows, call: Call, lse_BHT: Tensor | None) -> None:
            for side, x_BHTD in zip(SIDES, (rows.q_BHTD, rows.k_BGSD, rows.v_BGSD), strict=True):
                norms_HF = paired(x_BHTD, layout, width).sum((0, 2)).double()
                key = (order[id(site)], side)
                sums[key] = sums.get(key, torch.zeros(())) + norms_HF

        with observed(observe, of=model, want_lse=False):
            for part in crops.tokens_NT.split(16):
                forward(model, part)
        layers = range(len(observation.sites))
    tokens = crops.tokens_NT.numel()
    return {side: [(sums[layer, side] / tokens).tolist() for layer in layers] for side in SIDES}


def paired(x_BHTD: Tensor, layout: Layout, width: int) -> Tensor:
    """The 2-norm of each rotated pair, (B, H, T, F)."""
    x = x_BHTD[..., layout.start : layout.start + width]
    first, second = (x[..., 0::2], x[..., 1::2]) if layout.interleaved else x.chunk(2, -1)
    return (first.square() + second.square()).sqrt()


def readings(norms: dict[str, Any]) -> dict[str, Any]:
    """For each side: the low bands' share, and how much more of the high bands the end layers use."""
    found: dict[str, Any] = {}
    for side in SIDES:
        share_LHF = np.asarray(norms[side])
        share_LHF = share_LHF / share_LHF.sum(-1, keepdims=True)
        quarter = max(1, share_LHF.shape[-1] // 4)
        low_LH, high_LH = share_LHF[..., -quarter:].sum(-1), share_LHF[..., :quarter].sum(-1)
        ends, middle = np.concatenate((high_LH[0], high_LH[-1])), high_LH[1:-1].ravel()
        found[side] = {"low": over_heads([low_LH.ravel()]), "ends": over_heads([ends, middle])}
    return found


def over_heads(groups: Sequence[Floats]) -> list[float]:
    """The mean of one group of heads, or the difference of two means, with a 95% interval."""
    draw = np.random.default_rng(24)
    means = [heads[draw.integers(0, len(heads), (DRAWS, len(heads)))].mean(1) for heads in groups]
    draws_R = means[0] - means[1] if len(groups) == 2 else means[0]
    value = groups[0].mean() - groups[1].mean() if len(groups) == 2 else groups[0].mean()
    low, high = np.quantile(draws_R, (0.025, 0.975))
    return [float(value), float(low), float(high)]


def verdict(model: dict[str, Any], what: str, even: float) -> str:
    """Whether queries and keys show the pattern and values do not."""
    shows = {side: model[side][what][1] > even for side in SIDES}
    lacks = {side: model[side][what][2] < even for side in SIDES}
    if shows["query"] and shows["key"]:
        return "agrees" if not shows["value"] else "values show it too"
    return "disagrees" if lacks["query"] and lacks["key"] else "cannot say"


def section(found: dict[str, Any]) -> str:
    lines = [
        "## Frequency usage (2410.06205)",
        "",
        "Share of a head's norm in the slowest quarter of its bands (25% with no pattern), and by how much the first "
        "and last layers use the fastest quarter more than the middle ones. Values are the control.",
        "",
        "| model | low bands: queries | keys | values | paper | ends over middle: queries | keys | values | paper |",
        "|---" * 9 + "|",
    ]
    for name, model in found["models"].items():
        low = [_shown(model[side]["low"]) for side in SIDES] + [verdict(model, "low", 0.25)]
        ends = [_shown(model[side]["ends"], signed=True) for side in SIDES] + [verdict(model, "ends", 0.0)]
        lines.append("| " + " | ".join([name, *low, *ends]) + " |")
    lines += [
        "",
        "Intervals are over heads, of which these models have 24 to 40. NoPE rotates nothing: there a band is ",
    ]
    lines[-1] += "a name only, a second control."
    return "\n".join(lines)


def _shown(triple: Sequence[float], *, signed: bool = False) -> str:
    value, low, high = (f"{100 * x:{'+' if signed else ''}.0f}" for x in triple)
    return f"{value}% [{low}, {high}]"


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    for what, even, claim in (
        ("low", 0.25, "the slowest quarter of the bands carries more than a quarter of the norm"),
        ("ends", 0.0, "first and last layers use the fastest bands more than the middle ones"),
    ):
        said = {name: verdict(model, what, even) for name, model in found["models"].items()}
        model = found["models"]["prose3M"]
        rows.append(
            Learned(
                f"Frequency usage: {claim}",
                "prose3M: " + ", ".join(f"{side} {100 * model[side][what][0]:+.0f}%" for side in SIDES),
                ", ".join(f"[{100 * model[side][what][1]:+.0f}, {100 * model[side][what][2]:+.0f}]" for side in SIDES),
                "2410.06205: " + ", ".join(f"{name} {each}" for name, each in said.items()),
                "models of 0.2 to 3M parameters, 4 to 16 bands",
            )
        )
    return rows
