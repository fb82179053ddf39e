"""What carries the residual leakage of two small trained models: every intervention beside its reference distribution.

Claim under test (2606.06160): position 0's trajectory feeds absolute position into the residual stream, and taking BOS
away there takes the leakage away.

stories260K was trained on packed windows, so that its position 0 was usually mid-story; prose3M always with BOS, and
with BOS alone, at position 0. Both are measured on stationarised crops of text that they did not train on or, for
stories260K, of its training distribution. Each swap is read against random tokens of the vocabulary at position 0.

Against the claim: a BOS swap that lowers early residual no more than the random tokens do says nothing about BOS; a
swap that raises it contradicts the claim for that model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals.claim import Cells, Learned
from ropemods.leakage.documents import Documents, join_short, read_documents
from ropemods.leakage.interventions import NAMES
from ropemods.report.records import Estimate, Intervention
from ropemods.report.report import Report
from ropemods.report.words import interval, markdown_table, number, percent

PROTOCOL = {
    "nano": {
        "seeds": [0],
        "reference": 32,
        "length": 256,
        # Layer 1 of stories260K is small: it takes this many crops to tell it from 0.
        "sequences": {"stories260K": 1536, "prose3M": 512},
        # Each intervention reads these again.
        "intervened": {"stories260K": 512, "prose3M": 256},
    }
}


def text(name: str, data: Path, length: int) -> Documents:
    if name == "stories260K":
        # A story is about as long as a crop, so stories are joined; the model was trained on packed ones.
        stories = read_documents(data / "text" / "tinystories.txt")
        return join_short(stories, characters=16 * length)
    parts = [read_documents(data / "text" / f"{each}.valid.jsonl.xz") for each in ("books", "prose")]
    return Documents([each for part in parts for each in part.texts], "books.valid and prose.valid")


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    protocol = PROTOCOL[scale]
    jobs = {}
    for name in protocol["sequences"]:
        jobs[name] = partial(measured, name, data, protocol, controls=True)
        jobs[f"{name}, interventions"] = partial(measured, name, data, protocol, interventions=NAMES)
    return {"models": cells(jobs)}


def measured(name: str, data: Path, protocol: dict[str, Any], **more: Any) -> dict[str, Any]:
    folder = data / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sequences = protocol["intervened" if "interventions" in more else "sequences"][name]
    report = rm.measure(
        model,
        tokenizer,
        text(name, data, protocol["length"]),
        rm.Protocol(sequences=sequences, length=protocol["length"], batch_size=32, seed=protocol["seeds"][0]),
        reference=protocol["reference"],
        **more,
    )
    return condensed(report)


def condensed(report: Report) -> dict[str, Any]:
    """What the page shows of a report."""
    assert report.sink is not None
    return {
        "sequences": report.text.sequences,
        "documents": report.text.documents,
        "text": report.text.source,
        "digest": report.text.digest,
        "early_residual": ends(report.terms["residual"].early),
        "layers": [
            {
                **{term: ends(report.terms[term].layers[layer].early) for term in ("residual", "mask", "total")},
                "bos_mass": torch.tensor(report.sink.heads_bos_mass[layer]).mean().item(),
            }
            for layer in range(report.model.layers)
        ],
        "interventions": [intervention(each) for each in report.interventions],
        "controls": [
            {"name": each.name, "expected": str(each.expected), "found": str(each.value), "passed": each.passed}
            for each in report.controls
        ],
        "notes": list(report.notes),
    }


def ends(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def intervention(each: Intervention) -> dict[str, Any]:
    return {
        "name": each.name,
        "kind": each.kind,
        "early": ends(each.early_residual),
        "change": ends(each.change),
        "rank": each.rank,
        "reference": sorted(each.reference),
    }


def with_interval(found: list[float], *, decimals: int = 4) -> str:
    value, low, high = found
    return f"{number(value, decimals=decimals)} {interval(low, high, decimals=decimals)}"


def change(found: list[float]) -> str:
    value, low, high = (percent(each, signed=True) for each in found)
    return f"{value} [{low}, {high}]"


def section(found: dict[str, Any]) -> str:
    parts = [
        "## What carries the residual",
        "Early residual leakage (queries 8 to 63) in nats², in two models that met BOS differently in training. An "
        "interval is over documents. *change* is the early residual under the intervention over that without, minus 1; "
        "*random tokens below* counts the random tokens at position 0 that lower it more.",
    ]
    for name in found["protocol"]["sequences"]:
        model, intervened = found["models"][name], found["models"][f"{name}, interventions"]
        parts += [
            f"### {name}",
            f"{model['text']}: layers and controls on {model['sequences']:,} crops, interventions on "
            f"{intervened['sequences']:,}.",
        ]
        parts.append(
            markdown_table(
                ("layer", "residual, early", "mask, early", "total, early", "mass on BOS"),
                [
                    (
                        str(index),
                        *(with_interval(layer[term]) for term in ("residual", "mask", "total")),
                        percent(layer["bos_mass"]),
                    )
                    for index, layer in enumerate(model["layers"])
                ],
            )
        )
        parts.append(
            markdown_table(
                ("intervention", "early residual", "change", "random tokens below"),
                [
                    (
                        each["name"],
                        number(each["early"][0], decimals=4),
                        change(each["change"]),
                        "" if each["rank"] is None else f"{each['rank']} of {len(each['reference'])}",
                    )
                    for each in intervened["interventions"]
                ],
            )
        )
        reference = _reference(intervened)
        parts.append(
            f"The random tokens move it by {percent(reference[0], signed=True)} to "
            f"{percent(reference[-1], signed=True)}, median {percent(reference[len(reference) // 2], signed=True)}; "
            f"{sum(each < 0 for each in reference)} of {len(reference)} lower it."
        )
        failed = [each["name"] for each in model["controls"] if not each["passed"]]
        parts.append(
            f"Controls: {len(model['controls']) - len(failed)} of {len(model['controls'])} gave their known answer"
            + (f"; not {', '.join(failed)}" if failed else "")
            + "."
        )
        notes = dict.fromkeys(model["notes"] + intervened["notes"])
        parts += ["Notes: " + "; ".join(notes) + "."] if notes else []
    parts.append(READING)
    return "\n\n".join(parts)


READING = """**What the two have in common.** Take what position 0 holds out of the sequence (zero, none), or let
every head read it with one constant weight from everywhere (clamp), and little of the early residual is
left. A carrier that takes over from an upper block on changes little: what matters is read in the lower
and middle blocks. So in both models position 0 carries most of it, as the claim has it.

**Where they differ, and why.** prose3M saw BOS at position 0 and nothing else there, so its upper layers lean on that
one trajectory; nearly every random token lowers the residual about as far as zero does, for no other token has
learned to be read so. stories260K met BOS between stories, anywhere in its window, and mid-story text at position 0,
so any token there makes a closed trajectory as good as BOS's. The random tokens fall into two groups: some leave
almost nothing, the others raise the residual several times over, and BOS lies between them.

**What it shows.** A swap's effect is no evidence by itself that *BOS* is special. In prose3M a token at position 0
matters because it is BOS; in stories260K because it is at position 0. That zero would be a better replacement than
another token is shown for stories260K, where no random token lowers the residual further, and not for prose3M, where
some do.

**What it does not show.** Both models are small and barely trained, and their sinks weak beside a large model's. The
clamp and the carrier patch bound the path (through the weight of the sink; through position 0's states from a block
on), they do not name heads. Neither model has a sliding window or a scaled rope, so the twins are with the designs.
One seed of crops."""


def _reference(model: dict[str, Any]) -> list[float]:
    return next(each["reference"] for each in model["interventions"] if each["reference"])


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    for name in found["protocol"]["sequences"]:
        model = found["models"][f"{name}, interventions"]
        reference = _reference(model)
        zero = next(each for each in model["interventions"] if each["name"] == "zero")
        below = sum(each < 0 for each in reference)
        low, high = (percent(end, signed=True) for end in zero["change"][1:])
        rows.append(
            Learned(
                claim=f"BOS carries the early residual: zero at position 0 of {name}",
                figure=percent(zero["change"][0], signed=True),
                interval=f"[{low}, {high}]",
                paper=(
                    "−40% in Llama-3.2-3B. "
                    + ("Agrees in sign" if zero["change"][2] < 0 else "Not seen")
                    + f"; {below} of {len(reference)} random tokens lower it too"
                ),
                limits="one small model, one seed of crops",
            )
        )
    return rows
