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
from ropemods.leakage.documents import read_documents
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


def _protocol(model: str, crops: int) -> dict[str, Any]:
    common = {"seeds": [0], "mods": [str(mod) for mod in MODS], "length": 256, "calibration_crops": 8}
    return common | {"model": model, "checksum": MODELS[model].SHA256, "crops": crops}


PROTOCOL = {"nano": _protocol(smollm2.NAME, 64), "gemma3": _protocol(gemma3.NAME, 32)}
CHANGES = ("loss", "residual", "total", "bos_mass", "position1_mass")
DIGITS = {"loss": 2, "residual": 0, "total": 0}


def run(scale: str, data: Path, cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    p: dict[str, Any] = PROTOCOL[scale]
    try:
        folder = MODELS[p["model"]].fetch()
    except smollm2.CannotBeHad as error:
        raise Unavailable(str(error)) from error
    tokenizer, documents = AutoTokenizer.from_pretrained(folder), read_documents(data / "text" / "books.valid.jsonl.xz")
    protocol = rm.Protocol(sequences=p["crops"], length=p["length"], mask_term=False)
    batch_BT = tries.calibration(documents, tokenizer, protocol, AutoConfig.from_pretrained(folder).bos_token_id)
    assert len(batch_BT) == p["calibration_crops"]

    def at(mod: Mod | None) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with nullcontext() if mod is None else tries.put_on(model, mod, batch_BT):
            return measured(model, tokenizer, documents, protocol)

    found = cells({"stock": lambda: at(None)} | {str(mod): lambda mod=mod: at(mod) for mod in MODS})
    stock = found.pop("stock")
    changes = {name: {what: _change(each, stock, what) for what in CHANGES} for name, each in found.items()}
    return {"stock": {what: stock[what]["value"] for what in CHANGES}, "changes": changes}


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
    p, stock = found["protocol"], found["stock"]
    rows = [(name, *(_said(each[what], what) for what in CHANGES)) for name, each in found["changes"].items()]
    head = ("modification", "loss", "early residual", "early total", "mass on BOS", "on position 1")
    return "\n\n".join(
        (
            "## Put on a real model, untrained",
            f"{p['model']}, {p['crops']} crops of {p['length']} tokens of books that are held out here. Stock: loss "
            f"{stock['loss']:.3f}, early residual {stock['residual']:.4f}, early total {stock['total']:.3f}, mass on "
            f"BOS {stock['bos_mass']:.1%}, on position 1 {stock['position1_mass']:.1%}. Changes with 95% intervals "
            "over documents.",
            markdown_table(head, rows),
        )
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    changes = found["changes"]
    dearest = max(changes, key=lambda name: changes[name]["loss"]["value"])
    free = [name for name, each in changes.items() if each["loss"]["high"] < 0.01]
    lower = [name for name, each in changes.items() if each["residual"]["high"] < 0]
    loss = changes[dearest]["loss"]
    return [
        Learned(
            claim="Modifications put on a trained model cost little",
            figure=f"{len(free)} of {len(changes)} less than 1% of loss; the dearest, {dearest}, {loss['value']:+.1%}",
            interval=f"[{loss['low']:+.1%}, {loss['high']:+.1%}]",
            paper="no paper puts them on untrained",
            limits=f"{found['protocol']['model']}; {len(lower)} of them lower the early residual",
        )
    ]
