"""What it costs a trained model to stop its rotary frequencies, untrained: by share, by end and band by band.

**Claim.** arXiv 2410.06205 trains p-RoPE from scratch and finds the lowest frequencies of little use. If that is so of
a model that was trained with all of them, stopping its lowest quarter should cost next to nothing, stopping its highest
far more (the paper's reversed control), and a low band alone less than a high band alone.

**Protocol.** Stationarised crops of held-out books, as many documents as crops where the text has them. Loss of a crop
with frequencies stopped, minus the loss of the same crop without; the mean over crops with Student's interval, so 95%
over documents. Every share is floored to bands as the paper does. Keep 1 is the model itself, whose loss is given.
Bands are dropped one at a time at the shortest length only, and 0 is the fastest. Nothing is trained and nothing is
chosen by what is reported. Scale smollm2: 8 crops of 256 and 3 of 2048, cut from 64 and 16 so that it takes 15 minutes
of a core; scale long: 2 crops of 8192, of which the interval hardly speaks.

**Against it** would be keep 0.75 with an interval above +0.5% of the loss, a reversed cut that costs no more than the
cut from below, or low bands (the slowest quarter) that cost more on average than high ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals.claim import Learned, Unavailable
from evals.intervals import over_seeds
from ropemods.leakage.capture import forward, losses
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import Documents, read_documents
from ropemods.report.words import markdown_table
from ropemods.training import smollm2

KEEPS = (0.9, 0.75, 0.5, 0.25, 0.0)
COMMON: dict[str, Any] = {"seeds": [0], "keeps": list(KEEPS), "reversed": [0.9, 0.75, 0.5, 0.25]}
PROTOCOL: dict[str, dict[str, Any]] = {
    "nano": COMMON | {"model": "prose3M", "crops": {"64": 16, "256": 8}, "bands": True},
    "smollm2": COMMON
    | {"model": smollm2.NAME, "checksum": smollm2.SHA256, "crops": {"256": 8, "2048": 3}, "bands": True},
    "long": COMMON | {"model": smollm2.NAME, "checksum": smollm2.SHA256, "crops": {"8192": 2}, "bands": False},
}
TOKENS_AT_ONCE = 2048


@rm.register
@dataclasses.dataclass(frozen=True)
class StoppedBand(rm.Mod):
    """One rotary frequency stops turning; band 0 is the fastest."""

    kind: ClassVar[str] = "stopped_band"
    band: int = 0

    def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
        stopped_F = torch.arange(len(inv_freq_F), device=inv_freq_F.device) == self.band
        return torch.where(stopped_F, inv_freq_F * (1 - alpha), inv_freq_F)


def folder_of(p: dict[str, Any], data: Path) -> Path:
    if p["model"] != smollm2.NAME:
        return data / "models" / str(p["model"])
    try:
        return smollm2.fetch()
    except smollm2.CannotBeHad as error:
        raise Unavailable(str(error)) from error


def run(scale: str, data: Path, cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    p = PROTOCOL[scale]
    folder = folder_of(p, data)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer, books = AutoTokenizer.from_pretrained(folder), read_documents(data / "text" / "books.valid.jsonl.xz")
    config = model.config
    bands = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    mods: dict[str, rm.Mod | None] = {"stock": None}
    mods |= {f"keep {keep:g}": rm.TruncatedRoPE(keep=keep) for keep in p["keeps"]}
    mods |= {f"reversed {keep:g}": rm.TruncatedRoPE(keep=keep, which="highest") for keep in p["reversed"]}
    alone: dict[str, rm.Mod | None] = {f"band {band}": StoppedBand(band=band) for band in range(bands)}
    found = {}
    for length, crops in p["crops"].items():
        rows_NT = crops_of(books, tokenizer, int(length), crops)
        some = mods | (alone if p["bands"] and length == min(p["crops"], key=int) else {})
        jobs = {
            f"{length} {name}": lambda mod=mod, rows=rows_NT: crop_losses(model, mod, rows)
            for name, mod in some.items()
        }
        done = {name.split(" ", 1)[1]: value for name, value in cells(jobs).items()}
        stock_N = done.pop("stock")
        found[length] = {
            "stock": float(np.mean(stock_N)),
            "changes": {name: paired(each_N, stock_N) for name, each_N in done.items()},
        }
    return {"lengths": found, "frequencies": bands}


def crops_of(documents: Documents, tokenizer: Any, length: int, count: int) -> Tensor:
    """`count` crops; a protocol deals at least eight, of which the first of every few are read."""
    dealt = max(8, count)
    protocol = rm.Protocol(sequences=dealt, length=length, groups=8 if dealt < 16 else None, mask_term=False)  # type: ignore[arg-type]
    rows_NT = make_crops(documents, tokenizer, protocol).tokens_NT
    return rows_NT[:: dealt // count][:count]


@torch.no_grad()
def crop_losses(model: Any, mod: rm.Mod | None, rows_NT: Tensor) -> list[float]:
    """Mean loss of every crop with a modification put on, which is taken off again."""
    if mod is not None:
        rm.apply(model, mod)
    try:
        parts = rows_NT.split(max(1, TOKENS_AT_ONCE // rows_NT.shape[1]))
        found = [losses(forward(model, part), part).double().mean(1) for part in parts]
    finally:
        if mod is not None:
            rm.remove(model)
    return [round(x, 7) for x in torch.cat(found).tolist()]


def paired(ours_N: Sequence[float], theirs_N: Sequence[float]) -> dict[str, float]:
    """The mean difference over crops with Student's 95% interval."""
    found = over_seeds([ours - theirs for ours, theirs in zip(ours_N, theirs_N, strict=True)])
    return {key: found[key] for key in ("value", "low", "high")}


def said(change: dict[str, float] | None, stock: float) -> str:
    """In percent of the model's own loss."""
    if change is None:
        return ""
    value, low, high = (f"{100 * change[key] / stock:+.2f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value}% [{low}, {high}]"


def quarters(found: dict[str, Any]) -> tuple[float, float] | None:
    """Mean cost in nats of a band alone among the fastest and among the slowest quarter."""
    changes = next(iter(found["lengths"].values()))["changes"]
    if "band 0" not in changes:
        return None
    costs = [changes[f"band {band}"]["value"] for band in range(found["frequencies"])]
    quarter = max(1, len(costs) // 4)
    return float(np.mean(costs[:quarter])), float(np.mean(costs[-quarter:]))


def section(found: dict[str, Any]) -> str:
    p, lengths = found["protocol"], found["lengths"]
    names = [name for name in next(iter(lengths.values()))["changes"] if not name.startswith("band")]
    head = ("rotary frequencies", *(f"{length} tokens" for length in lengths))
    rows = [("all (keep 1): loss", *(f"{each['stock']:.3f}" for each in lengths.values()))]
    rows += [(name, *(said(each["changes"][name], each["stock"]) for each in lengths.values())) for name in names]
    count = ", ".join(f"{crops} of {length}" for length, crops in p["crops"].items())
    parts = [
        "## Rotary frequencies stopped, untrained",
        f"{p['model']}, {count} tokens of held-out books. Change of the loss in percent of it, paired over crops, "
        "95%. *keep* stops the slowest bands, *reversed* the fastest.",
        markdown_table(head, rows),
    ]
    costs = quarters(found)
    if costs is not None:
        length, each = next(iter(lengths.items()))
        F = found["frequencies"]
        bands = [(str(band), said(each["changes"][f"band {band}"], each["stock"])) for band in range(F)]
        parts += [
            f"Each of the {F} bands stopped alone ({length} tokens; 0 is the fastest). A band of the fastest quarter "
            f"costs {100 * costs[0] / each['stock']:.2f}% on average, one of the slowest "
            f"{100 * costs[1] / each['stock']:.2f}%.",
            markdown_table(("band", "loss"), bands),
        ]
    return "\n\n".join(parts)


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    limits = f"{found['protocol']['model']}, {{}} crops of {{}} tokens, nothing trained"
    for length, each in found["lengths"].items():
        cut, back = each["changes"]["keep 0.75"], each["changes"]["reversed 0.75"]
        bound = 0.005 * each["stock"]
        verdict = (
            "agrees" if cut["high"] < bound < back["low"] else "disagrees" if cut["low"] > bound else "cannot be told"
        )
        rows.append(
            Learned(
                f"2410.06205: the slowest quarter of a trained model's rotary frequencies can go ({length} tokens)",
                f"loss {said(cut, each['stock']).split(' ')[0]}; the fastest quarter "
                f"{said(back, each['stock']).split(' ')[0]}",
                " and ".join("[" + said(x, each["stock"]).split("[")[1] for x in (cut, back)),
                f"the paper trains from scratch; {verdict}",
                limits.format(found["protocol"]["crops"][length], length),
            )
        )
    return rows
