"""Dose and response: leakage and loss against strength, with nothing trained.

**Claim.** Strength is a path from the stock model to the modified one (METHODS has a formula for each modification), so
leakage and loss should move along it without jumps, and a fine-tune that walks it should nowhere meet a model much
worse than the end.

**Protocol.** prose3M; each modification alone, at strengths 0, 0.1, … 1; LearnedSink calibrated on held-out crops of
its own. The same crops at every strength, so changes are paired. At strength 0 every modification is the stock model,
so that is measured once.

**Against it** would be a loss on the way that is above both ends, or a residual that does not fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals.claim import Learned
from evals.measured import measured, ratio
from evals.tight_loop import held_out_texts
from ropemods.leakage.crops import make_crops
from ropemods.mods import Mod

MODS: dict[str, Mod] = {
    "TruncatedRoPE": rm.TruncatedRoPE(keep=0.75),
    "AdaptiveTemperature": rm.AdaptiveTemperature(),
    "ReplacedBos zero": rm.ReplacedBos(by="zero"),
    "UnrotatedBos": rm.UnrotatedBos(),
    "LearnedSink": rm.LearnedSink(),
}
PROTOCOL = {
    "nano": {
        "seeds": [0],
        "model": "prose3M",
        "mods": {name: str(mod) for name, mod in MODS.items()},
        "strengths": [round(0.1 * n, 1) for n in range(11)],
        "length": 256,
        "crops": 96,
        "calibration_crops": 16,
    }
}
WHAT = ("residual", "total", "loss")
BUMP = 0.002
"""A loss on the way counts as above both ends from this share on."""


def run(scale: str, data: Path, cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    p: dict[str, Any] = PROTOCOL[scale]
    folder, documents = data / "models" / p["model"], held_out_texts(data, "all")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    protocol = rm.Protocol(sequences=p["crops"], length=p["length"], mask_term=False)
    apart = rm.Protocol(sequences=p["calibration_crops"], groups=8, length=p["length"], seed=1)
    batch = make_crops(documents, tokenizer, apart).tokens_NT

    def at(mods: Sequence[Mod], strength: float) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if mods:
            rm.apply(
                model, *mods, strength=strength, calibration=batch if any(mod.calibrates for mod in mods) else None
            )
        return measured(model, tokenizer, documents, protocol)

    jobs: dict[str, Callable[[], Any]] = {"stock": lambda: at((), 0.0)}
    for name, mod in MODS.items():
        for strength in p["strengths"][1:]:
            jobs[f"{name} at {strength}"] = lambda mod=mod, strength=strength: at((mod,), strength)
    found = cells(jobs)
    curves = {}
    for name in MODS:
        points = [found["stock"], *(found[f"{name} at {strength}"] for strength in p["strengths"][1:])]
        curves[name] = {what: [_change(point, found["stock"], what) for point in points] for what in WHAT}
    stock = {what: found["stock"][what]["value"] for what in WHAT}
    return {"stock": stock, "curves": curves, "bumps": {name: bump(curve["loss"]) for name, curve in curves.items()}}


def _change(point: Any, stock: Any, what: str) -> list[float]:
    estimate = ratio([point], [stock], what)
    return [estimate.value, estimate.low, estimate.high]


def bump(loss: Sequence[Sequence[float]]) -> float:
    """How far the loss on the way rises above the higher of its ends, as a share of the stock loss."""
    values = [value for value, _, _ in loss]
    return max(values) - max(values[0], values[-1])


def section(found: dict[str, Any]) -> str:
    p, stock = found["protocol"], found["stock"]
    lines = [
        "## Dose and response",
        "",
        f"{p['model']}, nothing trained; change against the stock model (early residual {stock['residual']:.4f}, early "
        f"total {stock['total']:.3f}, held-out loss {stock['loss']:.3f}), early queries, mean of layers 1 and up.",
    ]
    for what, digits in (("residual", 0), ("total", 0), ("loss", 2)):
        title = {"residual": "Early residual", "total": "Early total", "loss": "Held-out loss"}[what]
        lines += [
            "",
            f"{title}, per cent:",
            "",
            "| modification | " + " | ".join(map(str, p["strengths"])) + " | at 1 |",
        ]
        lines.append("|---" * (len(p["strengths"]) + 2) + "|")
        for name, curve in found["curves"].items():
            values = " | ".join(f"{100 * value:+.{digits}f}" for value, _, _ in curve[what])
            low, high = (f"{100 * x:+.{digits}f}" for x in curve[what][-1][1:])
            lines.append(f"| {name} | {values} | [{low}, {high}] |")
    humped = [f"{name} ({height:+.2%})" for name, height in found["bumps"].items() if height > BUMP]
    lines += [
        "",
        "A loss on the way above both ends: " + (", ".join(humped) if humped else "none") + ". The last column is the "
        "95% interval at strength 1, over documents. One model of 3M parameters.",
    ]
    return "\n".join(lines)


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    for name, curve in found["curves"].items():
        residual, loss = curve["residual"][-1], curve["loss"][-1]
        rows.append(
            Learned(
                f"{name} put on without training",
                f"early residual {residual[0]:+.0%}, loss {loss[0]:+.2%}; loss on the way at most "
                f"{found['bumps'][name]:+.2%} above the ends",
                f"residual [{residual[1]:+.0%}, {residual[2]:+.0%}], loss [{loss[1]:+.2%}, {loss[2]:+.2%}]",
                "no paper has this curve" + ("; 2606.06160 has −40% for a replaced BOS" if "zero" in name else ""),
                f"{found['protocol']['model']}, 3M parameters",
            )
        )
    return rows
