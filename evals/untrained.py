"""What each modification costs two real models before any training, and what it does to their leakage.

**Claim.** A modification for an existing model should start at the model: put on untrained, at strength 1, it should
cost next to no loss, and not raise what it is there to lower.

**Protocol.** SmolLM2-135M and Gemma 3 270M, trained models with real attention sinks, the second with windows in most
layers. Stationarised crops of 256 tokens of held-out books (64, and 32 for Gemma, which is slower), the same for every
modification, so changes are paired; what calibrates does so on other crops. Leakage is that of
early queries, mean of layers 1 and up. Nothing is trained, and nothing is chosen by what is reported here.

**Against it** would be a loss that rises by more than 1%, or a residual that rises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals import gemma3
from evals.claim import Learned, Unavailable
from evals.measured import measured, ratio
from ropemods.leakage import tries
from ropemods.leakage.documents import Documents, read_documents
from ropemods.mods import Mod
from ropemods.report.words import markdown_table
from ropemods.training import smollm2

MODS: tuple[Mod, ...] = (
    rm.TruncatedRoPE(keep=0.75),
    rm.TruncatedRoPE(keep=0.5),
    rm.DroppedRoPE(every=4),
    rm.ReplacedBos(by="mean"),
    rm.ReplacedBos(by="zero"),
    rm.UnrotatedBos(),
    rm.AnchoredBos(offset=32),
    rm.AnchoredBos(),
    rm.LearnedSink(),
    rm.LearnedSink(raised=2.0),
    rm.LearnedSink(init=0.0),
    rm.KeyedSink(offset=32),
    rm.KeyedSink(),
    rm.KeyedSink(value=False),
    rm.AdaptiveTemperature(),
    rm.AdaptiveTemperature(start="model"),
    rm.LogTemperature(),
    rm.OutputGate(),
)
MODELS: dict[str, Any] = {smollm2.NAME: smollm2, gemma3.NAME: gemma3}
PROTOCOL = {
    "nano": {
        "seeds": [0],
        "models": {name: place.SHA256 for name, place in MODELS.items()},
        "mods": [str(mod) for mod in MODS],
        "length": 256,
        "crops": {smollm2.NAME: 64, gemma3.NAME: 32},
        "calibration_crops": 8,
    }
}
CHANGES = ("loss", "residual", "total", "bos_mass", "position1_mass")
DIGITS = {"loss": 2, "residual": 0, "total": 0}


def run(scale: str, data: Path, cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    p: dict[str, Any] = PROTOCOL[scale]
    documents = read_documents(data / "text" / "books.valid.jsonl.xz")
    found = {name: _of_model(name, p, documents, cells) for name in p["models"]}
    return {
        "stock": {name: each[0] for name, each in found.items()},
        "changes": {n: each[1] for n, each in found.items()},
    }


def _of_model(name: str, p: dict[str, Any], documents: Documents, cells: Callable[..., dict[str, Any]]) -> tuple:
    try:
        folder = MODELS[name].fetch()
    except smollm2.CannotBeHad as error:
        raise Unavailable(str(error)) from error
    tokenizer = AutoTokenizer.from_pretrained(folder)
    protocol = rm.Protocol(sequences=p["crops"][name], length=p["length"], mask_term=False)
    bos = AutoConfig.from_pretrained(folder).bos_token_id
    batch_BT = tries.calibration(documents, tokenizer, protocol, bos)
    assert len(batch_BT) == p["calibration_crops"]

    def at(mod: Mod | None) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with nullcontext() if mod is None else tries.put_on(model, mod, batch_BT):
            return measured(model, tokenizer, documents, protocol)

    jobs = {f"{name}: stock": lambda: at(None)} | {f"{name}: {mod}": lambda mod=mod: at(mod) for mod in MODS}
    found = {cell.removeprefix(f"{name}: "): each for cell, each in cells(jobs).items()}
    stock = found.pop("stock")
    changes = {mod: {what: _change(each, stock, what) for what in CHANGES} for mod, each in found.items()}
    return {what: stock[what]["value"] for what in CHANGES}, changes


def _change(each: Any, stock: Any, what: str) -> dict[str, float]:
    """Relative; of a mass, which may begin near 0, the mass itself."""
    if what not in DIGITS:
        return {"value": each[what]["value"]}
    estimate = ratio([each], [stock], what)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _said(change: dict[str, float], what: str) -> str:
    if what not in DIGITS:
        return f"{change['value']:.1%}"
    value, low, high = (f"{100 * change[key]:+.{DIGITS[what]}f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value}% [{low}, {high}]"


def section(found: dict[str, Any]) -> str:
    return "\n\n".join(("## Put on real models, untrained", *(_table(found, name) for name in found["changes"])))


def _table(found: dict[str, Any], name: str) -> str:
    p, stock, changes = found["protocol"], found["stock"][name], found["changes"][name]
    rows = [(mod, *(_said(each[what], what) for what in CHANGES)) for mod, each in changes.items()]
    head = ("modification", "loss", "early residual", "early total", "mass on BOS", "on position 1")
    return "\n\n".join(
        (
            f"{name}, {p['crops'][name]} crops of {p['length']} tokens of books that are held out here. Stock: loss "
            f"{stock['loss']:.3f}, early residual {stock['residual']:.4f}, early total {stock['total']:.3f}, mass on "
            f"BOS {stock['bos_mass']:.1%}, on position 1 {stock['position1_mass']:.1%}. Changes with 95% intervals "
            "over documents.",
            markdown_table(head, rows),
        )
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    return [_learned(name, changes) for name, changes in found["changes"].items()]


def _learned(name: str, changes: dict[str, Any]) -> Learned:
    dearest = max(changes, key=lambda mod: changes[mod]["loss"]["value"])
    free = [mod for mod, each in changes.items() if each["loss"]["high"] < 0.01]
    lower = [mod for mod, each in changes.items() if each["residual"]["high"] < 0]
    loss = changes[dearest]["loss"]
    return Learned(
        claim="Modifications put on a trained model cost little",
        figure=f"{len(free)} of {len(changes)} less than 1% of loss; the dearest, {dearest}, {loss['value']:+.1%}",
        interval=f"[{loss['low']:+.1%}, {loss['high']:+.1%}]",
        paper="no paper puts them on untrained",
        limits=f"{name}; {len(lower)} of them lower the early residual: {', '.join(lower) or 'none'}",
    )
