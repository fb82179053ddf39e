"""A strength schedule against a hard cut: how fast a fine-tune recovers from the modification itself.

Claim under test (ours; nobody has published it for p-RoPE): walking the strength from 0 to 1 over the first steps costs
less than putting the modification on at once.

stories260K, AdamW, stories of its training distribution that are not evaluated, each row beginning with BOS at a
story's start. Arms of a seed read the same rows in the same order: control (no modification), and for TruncatedRoPE
alone and for all modifications together a cosine over half the steps and a hard cut at step 0. Held-out loss is read
every few steps from other stories. Seeds draw the rows. `cost` is the mean over the run of the held-out loss above
the control's at the same step, and `end` the same at the last step.

Against it: an end or a cost of the schedule that is not below the hard cut's, seed by seed.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals.claim import Cells, Learned
from evals.tight_loop import rows_of, train
from ropemods.leakage.documents import read_documents
from ropemods.mods import Mod
from ropemods.report.html.charts import Series
from ropemods.report.html.drawing import drawing
from ropemods.report.words import markdown_table, number

MODS: dict[str, tuple[Mod, ...]] = {
    "TruncatedRoPE": (rm.TruncatedRoPE(keep=0.75),),
    "all five": (
        rm.TruncatedRoPE(keep=0.75),
        rm.AdaptiveTemperature(trainable="head"),
        rm.ReplacedBos(by="zero"),
        rm.UnrotatedBos(),
        rm.LearnedSink(read_bos=True),
    ),
}
SHAPES = ("cosine", "hard")
PROTOCOL = {
    "nano": {
        "seeds": [0, 1, 2],
        "model": "stories260K",
        "length": 128,
        "batch": 8,
        "steps": 150,
        "schedule_steps": 75,
        "every": 10,
        "held_out_rows": 48,
        "learning_rate": 5e-4,
        "warmup": 10,
        "mods": {name: [str(mod) for mod in mods] for name, mods in MODS.items()},
    }
}


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    protocol = PROTOCOL[scale]
    jobs = {}
    for seed in protocol["seeds"]:
        jobs[f"control, seed {seed}"] = partial(curve, data, protocol, seed)
        for name in MODS:
            for shape in SHAPES:
                jobs[f"{name}, {shape}, seed {seed}"] = partial(curve, data, protocol, seed, name, shape)
    return {"curves": cells(jobs)}


def curve(data: Path, p: dict[str, Any], seed: int, mods: str | None = None, shape: str = "cosine") -> dict[str, Any]:
    """The held-out loss along one fine-tune, in nats per token: [[step, loss], …]."""
    folder = data / "models" / p["model"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stories = read_documents(data / "text" / "tinystories.txt").texts
    ninth = len(stories) * 9 // 10
    rows = partial(rows_of, tokenizer=tokenizer, bos=model.config.bos_token_id, length=p["length"], text="natural")
    tuned_NT = rows(stories[:ninth], rows=p["steps"] * p["batch"], seed=seed)
    held_out_NT = rows(stories[ninth:], rows=p["held_out_rows"], seed=0)
    schedule = rm.StrengthSchedule(steps=p["schedule_steps"], shape=shape)  # type: ignore[arg-type]
    if mods is not None:
        batch = held_out_NT[:16] if any(mod.calibrates for mod in MODS[mods]) else None
        rm.apply(model, *MODS[mods], strength=0.0, calibration=batch)
    found: list[list[float]] = []

    def at(step: int) -> None:
        if mods is not None:
            rm.set_strength(model, schedule.at(step))
        if step % p["every"] == 0:
            found.append([step, held_out_loss(model, held_out_NT)])

    train(
        model, tuned_NT, batch=p["batch"], learning_rate=p["learning_rate"], warmup=p["warmup"], strength_at=at
    )  # fmt: skip
    return {"curve": found}


@torch.no_grad()
def held_out_loss(model: nn.Module, rows_NT: Tensor) -> float:
    model.eval()
    logits_NTV = model(input_ids=rows_NT, use_cache=False).logits
    model.train()
    return nn.functional.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), rows_NT[:, 1:].flatten()).item()


def above_control(found: dict[str, Any], mods: str, shape: str) -> list[list[tuple[int, float]]]:
    """Per seed: (step, held-out loss above the control's)."""
    curves, out = found["curves"], []
    for seed in found["seeds"]:
        control = curves[f"control, seed {seed}"]["curve"]
        arm = curves[f"{mods}, {shape}, seed {seed}"]["curve"]
        out.append([(step, loss - own) for (step, loss), (_, own) in zip(arm, control, strict=True)])
    return out


def costs(found: dict[str, Any], mods: str, shape: str) -> dict[str, list[float]]:
    """Per seed, in nats per token."""
    curves = above_control(found, mods, shape)
    return {
        "cost": [statistics.fmean(gap for _, gap in curve) for curve in curves],
        "worst": [max(gap for _, gap in curve) for curve in curves],
        "end": [curve[-1][1] for curve in curves],
    }


def _spread(values: list[float]) -> str:
    low, mean, high = (number(v, decimals=4, signed=True) for v in (min(values), statistics.fmean(values), max(values)))
    return f"{mean} [{low}, {high}]"


def winner(found: dict[str, Any], mods: str, quantity: str) -> str:
    """The shape that is lower in every seed, or neither."""
    cosine, hard = (costs(found, mods, shape)[quantity] for shape in SHAPES)
    if all(a < b for a, b in zip(cosine, hard, strict=True)):
        return "schedule"
    return "hard cut" if all(a > b for a, b in zip(cosine, hard, strict=True)) else "neither in every seed"


def section(found: dict[str, Any]) -> str:
    p = found["protocol"]
    rows = [
        (f"{mods}, {shape}", *(_spread(costs(found, mods, shape)[q]) for q in ("cost", "worst", "end")))
        for mods in MODS
        for shape in SHAPES
    ]
    verdicts = [
        f"{mods}: lower cost over the run: {winner(found, mods, 'cost')}; lower end: {winner(found, mods, 'end')}."
        for mods in MODS
    ]
    return "\n\n".join(
        (
            "## A strength schedule against a hard cut",
            f"{p['model']}, {p['steps']} steps of {p['batch']} × {p['length']} tokens; the schedule is a cosine over "
            f"{p['schedule_steps']} steps. Held-out loss above the control's at the same step, nats per token: mean "
            "over the run, worst, and at the end; mean over seeds [least, largest].",
            markdown_table(("arm", "cost over the run", "worst", "end"), rows),
            " ".join(verdicts),
            "With all five the loss peaks where the schedule ends: behind an RMSNorm, shrinking the BOS embedding does "
            "little until it is zero (ropemods/mods/replaced_bos.py), so that part of the change stays a cut.",
        )
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    return [
        Learned(
            claim=f"A strength schedule recovers better than a hard cut ({mods})",
            figure="end of schedule minus end of hard cut: "
            + number(statistics.fmean(gaps := _gaps(found, mods)), decimals=4, signed=True)
            + " nats",
            interval=f"[{number(min(gaps), decimals=4, signed=True)}, {number(max(gaps), decimals=4, signed=True)}] "
            "(range of seeds)",
            paper="no published figure; "
            + ("holds" if max(gaps) < 0 else "fails: the hard cut ends lower" if min(gaps) > 0 else "cannot be told"),
            limits=f"a model of 260k parameters, {found['protocol']['steps']} steps",
        )
        for mods in MODS
    ]


def _gaps(found: dict[str, Any], mods: str) -> list[float]:
    cosine, hard = (costs(found, mods, shape)["end"] for shape in SHAPES)
    return [a - b for a, b in zip(cosine, hard, strict=True)]


def figure(found: dict[str, Any]) -> str:
    panels = {mods: [_series(found, mods, shape, f"arm{n}") for n, shape in enumerate(SHAPES)] for mods in MODS}
    return drawing(
        panels,
        x_label="step",
        y_label="nats per token",
        description="Held-out loss above the control's along the run, mean of the seeds",
    )


def _series(found: dict[str, Any], mods: str, shape: str, look: str) -> Series:
    means = [
        (seeds[0][0], statistics.fmean(gap for _, gap in seeds))
        for seeds in zip(*above_control(found, mods, shape), strict=True)
    ]
    steps, gaps = zip(*(point for point in means if point[0] > 0), strict=True)  # the axis is a logarithm
    return Series(name=shape, look=look, xs=steps, ys=gaps)
