"""What measuring costs, as tables: the figures of `evals/leakage_cost.py` beside their targets."""

from __future__ import annotations

from typing import Any

from evals.claim import Learned
from ropemods.report.words import markdown_table

TARGETS = {"time": 1.5, "memory": 1.3, "attentions": 10.0}


def section(found: dict[str, Any]) -> str:
    rows = []
    for name, time_of in found["time"].items():
        plain_, attentions = time_of["measured / plain"], time_of["with_attentions / measured"]
        shares = found["memory"][name]["measured / plain"]
        rows.append(
            (
                name,
                f"{plain_['ratio']:.2f} ({plain_['min']:.2f} to {plain_['max']:.2f})",
                f"{shares['process']:.2f}",
                f"{shares['over_model']:.2f}",
                f"{attentions['ratio']:.1f}",
                f"{beyond_the_forward(time_of):.0f}",
                f"{time_of['whole_over_pass']:.2f}",
            )
        )
    head = (
        "model",
        "time / plain forward",
        "peak memory / plain",
        "the same over the loaded model",
        "output_attentions / measuring, time",
        "the same beyond the plain forward",
        "with the bootstrap / the pass",
    )
    lengths = [
        (each, *(f"{taken[way] / 2**20:.0f}" for way in ("plain", "measured")))
        for each, taken in found["growth"].items()
    ]
    return "\n\n".join(
        (
            "## What measuring costs",
            f"T = {found['protocol']['length']}, one thread. Residual, mask, total, sink, entropy and usage in one "
            f"pass. Targets: {TARGETS['time']}, {TARGETS['memory']}, and at least {TARGETS['attentions']:.0f}. "
            + ("All met." if not missed(found) else f"**Missed: {', '.join(missed(found))}.**")
            + " Of the time with output_attentions, much is the model's linear layers, which both ways pay.",
            markdown_table(head, rows),
            "Memory above the loaded model by length, prose3M, batch 1, in MiB:",
            markdown_table(("T", "plain forward", "measuring"), lengths),
            f"From the shortest to the longest, T grows by {_grown(found)[0]:.0f} and the memory of measuring by "
            f"{_grown(found)[1]:.1f}.",
        )
    )


def beyond_the_forward(time_of: dict[str, Any]) -> float:
    """What output_attentions takes more than the plain forward, over what measuring takes more than it."""
    measuring = time_of["measured / plain"]["ratio"]
    return (time_of["with_attentions / measured"]["ratio"] * measuring - 1) / (measuring - 1)


def missed(found: dict[str, Any]) -> list[str]:
    """The targets that a figure lies beyond, in words."""
    out = []
    for name, time_of in found["time"].items():
        if time_of["measured / plain"]["ratio"] > TARGETS["time"]:
            out.append(f"time of {name}")
        if found["memory"][name]["measured / plain"]["process"] > TARGETS["memory"]:
            out.append(f"memory of {name}")
        if time_of["with_attentions / measured"]["ratio"] < TARGETS["attentions"]:
            out.append(f"output_attentions of {name}")
    return out


def _grown(found: dict[str, Any]) -> tuple[float, float]:
    lengths = found["protocol"]["lengths"]
    taken = [found["growth"][str(length)]["measured"] for length in (lengths[0], lengths[-1])]
    return lengths[-1] / lengths[0], taken[1] / taken[0]


def learned(found: dict[str, Any]) -> list[Learned]:
    return [
        Learned(
            claim=f"Measuring costs little more than reading the text ({name})",
            figure=f"{time_of['measured / plain']['ratio']:.2f} times the plain forward",
            interval=f"{time_of['measured / plain']['min']:.2f} to {time_of['measured / plain']['max']:.2f} (range)",
            paper="no figure known",
            limits=f"T = {found['protocol']['length']}, one CPU thread",
        )
        for name, time_of in found["time"].items()
    ]
