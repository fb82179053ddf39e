"""Leakage trained away on a real model: `rm.penalize`, its weight, its length, and what else it changes.

**Claim.** The early residual can be lowered by training on it (95% or more, the goal; 90%, the milestone), with the
early total lower too, at 0.1% (0.2%) more loss than the same fine-tune without; and not by fooling the number: other
instruments, that nothing was trained on, fall with it.

**Protocol.** Full fine-tunes, AdamW 5e-5 (a modification's own numbers 5e-3), cosine, bf16 autocast, 8 × 256 tokens a
step, stationarised crops of books.train; the same rows in the same order for every arm of a seed. Measured in fp32 on
held-out documents: books.valid in two halves, one to search on and one to report, by residual, total and (report) mask;
and by instruments that nothing is trained on: prose.valid with another window (16) and other queries (16 to 63);
unigram tokens; the R² of a ridge probe of log position on hidden states at five depths, tested on other blocks of text
than it was fitted on; the loss of 2048-token crops by position; and what a user could get (`gains`). Leakage is the
mean over layers 1 and up; intervals are paired with the control of the same steps, rows and seed. Which arm is best is
decided on the search half, with the loss there.

**Against it** would be: no arm under the control's interval; or one whose other instruments do not move with it.

It also runs by itself, where no text and no tokenizer is:

    python -m evals.penalty prepare FOLDER --model MODEL --data ../shared/data --scale smollm2
    python -m evals.penalty run FOLDER --model MODEL --output CELLS --scale smollm2 --minutes 6
    python -m evals.penalty show CELLS --scale smollm2          the table, and the result file for the page

Cells are written one by one, the most telling first, and a run goes on where it stopped. Those of scale smollm2 take
half an hour each on two cores; the finished ones are in evals/cells/penalty, from where `run … --output` goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from evals.claim import KEPT, RESULTS, Cells, Learned, hash_of, write
from evals.measured import mean, ratio
from evals.penalty_bench import MODS, Arm, Bench, prepare
from ropemods.report.words import markdown_table

COMMON = {"learning_rate": 5e-5, "warmup": 4, "batch": 8}
PLANS: dict[str, list[tuple[Arm, tuple[int, ...]]]] = {
    "nano": [(Arm(steps=8), (0, 1)), (Arm(10.0, steps=8), (0, 1))],
    "smollm2": [
        # 197k tokens, minutes on a CPU: what a weight does, and three seeds for what may be claimed.
        (Arm(steps=96), (0,)),
        (Arm(10.0, steps=96), (0,)),
        (Arm(30.0, steps=96, unigram=0.25), (0,)),
        (Arm(3.0, steps=96), (0,)),
        # The total as well, and what can hold a row's denominator still.
        (Arm(3.0, steps=96, total=1.0, mods=("log",)), (0,)),
        (Arm(3.0, steps=96, total=0.3), (0, 1, 2)),
        (Arm(3.0, steps=96, total=1.0), (0,)),
        (Arm(3.0, steps=96, total=1.0, mods=("keyed", "log")), (0,)),
        (Arm(steps=96), (1,)),
        (Arm(10.0, steps=96), (1,)),
        (Arm(3.0, steps=96), (1,)),
        (Arm(30.0, steps=96, unigram=0.25), (1,)),
        (Arm(steps=96), (2,)),
        (Arm(3.0, steps=96), (2,)),
        (Arm(10.0, steps=96), (2,)),
        (Arm(30.0, steps=96, unigram=0.25), (2,)),
        (Arm(10.0, steps=96, layers=(0.3, 1.0)), (0,)),
        (Arm(30.0, steps=96), (0,)),
        # 100k tokens: what modifications do by themselves.
        (Arm(steps=49), (0,)),
        *((Arm(steps=49, mods=(name,)), (0,)) for name in MODS),
        # A million tokens: what more training gives.
        (Arm(steps=512), (0,)),
        (Arm(10.0, steps=512), (0,)),
        (Arm(30.0, steps=512, unigram=0.25), (0,)),
        (Arm(10.0, steps=512, unigram=0.25), (0,)),
        (Arm(3.0, steps=512), (0,)),
        (Arm(30.0, steps=512, unigram=0.5), (0,)),
        (Arm(steps=512), (1, 2)),
        (Arm(30.0, steps=512, unigram=0.25), (1, 2)),
        (Arm(10.0, steps=512), (1, 2)),
        # What else may matter.
        (Arm(steps=192), (0,)),
        (Arm(30.0, steps=192, warmup=48), (0,)),
        (Arm(steps=192, long=True), (0,)),
        (Arm(10.0, steps=192, long=True), (0,)),
    ],
}
"""Arms with seeds, the most telling first: a run that is cut short has lost the least."""
PROTOCOL = {
    "nano": {
        "seeds": [0, 1],
        "model": "prose3M",
        **COMMON,
        "groups": 16, "rows": 128, "crops": 64, "far": 8, "measure_batch": 16, "passages": 4,
    },
    "smollm2": {
        "seeds": [0, 1, 2],
        "model": "SmolLM2-135M",
        **COMMON,
        "groups": 32, "rows": 4096, "crops": 128, "far": 32, "measure_batch": 64, "passages": 24,
    },
}  # fmt: skip
for _scale, _plan in PLANS.items():
    PROTOCOL[_scale]["cells"] = [f"{arm.name} seed {seed}" for arm, seeds in _plan for seed in seeds]
FOUND = "found"
"""Shares of contexts, of which some are 0, so that nothing is relative to them."""
TERMS = ("residual", "total", "mask", "loss")


def jobs_of(bench: Bench, scale: str) -> dict[str, Callable[[], Any]]:
    jobs: dict[str, Callable[[], Any]] = {"base": lambda: bench.cell(None, 0)}
    for arm, seeds in PLANS[scale]:
        for seed in seeds:
            jobs[f"{arm.name} seed {seed}"] = lambda arm=arm, seed=seed: bench.cell(arm, seed)
    return jobs


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    p = PROTOCOL[scale]
    model = data / "models" / p["model"]
    folder = KEPT / "penalty" / f"{scale}-{hash_of(p)}-tokens"
    if not (folder / "facts.json").is_file():
        prepare(folder, data, AutoTokenizer.from_pretrained(model), p)
    done = cells(jobs_of(Bench(folder, model, p), scale))
    return collected(done, scale) | {"text": json.loads((folder / "facts.json").read_text())}


def collected(done: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """Every arm against the control of its steps and rows, over the seeds that both have."""
    base = done["base"]["measured"]
    rows = {}
    for arm in dict.fromkeys(arm for arm, _ in PLANS[scale]):
        seeds = PROTOCOL[scale]["seeds"]
        pairs = [[done.get(f"{a.name} seed {seed}") for a in (arm, arm.control)] for seed in seeds]
        both = [(one, other) for one, other in pairs if one is not None and other is not None]
        if not both:
            continue
        row: dict[str, Any] = {
            "seeds": len(both),
            "steps": arm.steps,
            "weight": arm.weight,
            "total": arm.total,
            "instruments": {},
        }
        for name in ("search", "report", "other", "unigram"):
            ours, theirs = ([pair[n]["measured"][name] for pair in both] for n in (0, 1))
            found = row["instruments"][name] = {}
            for term in (term for term in TERMS if term in ours[0]):
                found[term] = _ends(mean(ours, term))
                if arm != arm.control:
                    found[f"{term}_change"] = _ends(ratio(ours, theirs, term))
        row["probe"] = {k: _mean(pair[0]["measured"]["probe"][k] for pair in both) for k in base["probe"]}
        row["far"] = {k: _mean(np.mean(pair[0]["measured"]["far"][k]) for pair in both) for k in base["far"]}
        if arm != arm.control:
            row["far_change"] = {k: _paired(both, "far", k) for k in base["far"]}
        with_gains = [pair for pair in both if all("gains" in cell["measured"] for cell in pair)]
        if with_gains:
            names = with_gains[0][0]["measured"]["gains"]
            row["gains"] = {k: _mean(np.mean(pair[0]["measured"]["gains"][k]) for pair in with_gains) for k in names}
            if arm != arm.control:
                row["gains_change"] = {k: _paired(with_gains, "gains", k) for k in names if not k.startswith(FOUND)}
        row["seconds"] = {k: _mean(pair[0]["seconds"][k] for pair in both) for k in ("training", "measuring")}
        rows[arm.name] = row
    of_base = {
        name: {term: _ends(mean([base[name]], term)) for term in TERMS if term in base[name]}
        for name in ("search", "report", "other", "unigram")
    }
    far = {k: round(float(np.mean(x)), 5) for k, x in base["far"].items()}
    left = [name for name in PROTOCOL[scale]["cells"] if name not in done]
    told = {"arms": rows, "best": best(rows), "left": left}
    return {"base": {"instruments": of_base, "probe": base["probe"], "far": far}, **told}


def best(rows: Mapping[str, Any]) -> str | None:
    """The least residual on the search half among arms with at most 0.1% more loss there."""
    fit = {
        name: row["instruments"]["search"]
        for name, row in rows.items()
        if (row["weight"] or row["total"]) and row["instruments"]["search"]["loss_change"]["value"] <= 0.001
    }
    return min(fit, key=lambda name: fit[name]["residual"]["value"]) if fit else None


def _paired(both: list[tuple[Any, Any]], what: str, key: str) -> dict[str, float]:
    """The relative change of what has a value a crop, with an interval over crops of all seeds."""
    ours, theirs = (np.concatenate([pair[n]["measured"][what][key] for pair in both]) for n in (0, 1))
    draw = np.random.default_rng(29).integers(0, len(ours), (2000, len(ours)))
    drawn = ours[draw].mean(1) / theirs[draw].mean(1) - 1
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(ours.mean() / theirs.mean() - 1), "low": float(low), "high": float(high)}


def _ends(estimate: Any) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 5)


def _shown(row: Mapping[str, Any], name: str, term: str) -> str:
    """`0.0023 (−93% [−101, −84])`."""
    found = row["instruments"][name]
    value, change = found[term]["value"], found.get(f"{term}_change")
    text = f"{value:.4f}" if term == "residual" else f"{value:.3f}"
    if change is None:
        return text
    form = "{:+.2f}" if term == "loss" else "{:+.0f}"
    at, low, high = (form.format(100 * change[k]).replace("-", "−") for k in ("value", "low", "high"))
    return f"{text} ({at}% [{low}, {high}])"


GAINS = (
    "What a user could get (`evals/gains.py`): how much a token's loss differs between places of the same passage, the "
    "loss there, and a few tokens asked for at the end of 256, 512 and 1024 tokens: their loss, and how often all of "
    "them are the most likely."
)
COLUMNS = (
    ("report", "residual"), ("report", "mask"), ("report", "total"), ("report", "loss"),
    ("other", "residual"), ("other", "total"), ("other", "loss"), ("unigram", "residual"), ("unigram", "total"),
)  # fmt: skip


def table(found: Mapping[str, Any]) -> str:
    head = ["", "seeds", *(f"{name}: {term}" for name, term in COLUMNS), "probe R²", "loss at 2048, last half"]
    lines = [head, ["---"] * len(head)]
    far = next(reversed(found["base"]["far"]))
    for name, row in {"base": found["base"], **found["arms"]}.items():
        probe = " ".join(f"{x:.2f}" for x in row["probe"].values())
        said = [_shown(row, *column) for column in COLUMNS]
        change = row.get("far_change", {}).get(far)
        last = f"{row['far'][far]:.3f}" + (f" ({100 * change['value']:+.2f}%)" if change else "")
        lines.append([name, str(row.get("seeds", "")), *said, probe, last.replace("-", "−")])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def gains_table(found: Mapping[str, Any]) -> str:
    """What a user could get, by arm; nothing where no cell has it."""
    rows = {name: row for name, row in found["arms"].items() if "gains" in row}
    if not rows:
        return ""
    names = list(next(iter(rows.values()))["gains"])
    return markdown_table(("", *names), [(arm, *(_gain(row, name) for name in names)) for arm, row in rows.items()])


def _gain(row: Mapping[str, Any], name: str) -> str:
    """`0.431 (−3.0% [−4.1, −1.9])`."""
    text, change = f"{row['gains'][name]:.3f}", row.get("gains_change", {}).get(name)
    if change is not None:
        text += " ({:+.1f}% [{:+.1f}, {:+.1f}])".format(*(100 * change[k] for k in ("value", "low", "high")))
    return text.replace("-", "−")


def section(found: dict[str, Any]) -> str:
    p = found["protocol"]
    chosen = found["best"]
    said = "No arm so far keeps the loss within 0.1% on the search half."
    if chosen:
        said = f"Chosen on the search half, at 0.1% more loss or less: **{chosen}**."
    return "\n".join(
        [
            "## Leakage trained away",
            "",
            f"{p['model']}, `rm.penalize` by weight and steps of 8 × 256 tokens, each against the control of the same "
            "steps and rows. Only the residual is trained on, and only on training text.",
            "",
            table(found),
            "",
            said,
            *(["", GAINS, "", gains_table(found)] if gains_table(found) else []),
            *([f"Not run yet: {len(found['left'])} of {len(p['cells'])} cells."] if found["left"] else []),
            "",
        ]
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    name = found["best"]
    if name is None:
        return []
    row = found["arms"][name]
    report = row["instruments"]["report"]
    residual, total, loss = (report[f"{term}_change"] for term in ("residual", "total", "loss"))
    return [
        Learned(
            claim="The early residual can be trained away",
            figure="{:.0f}%, total {:.0f}%, loss {:+.2f}%".format(*(100 * x["value"] for x in (residual, total, loss))),
            interval=f"[{100 * residual['low']:.0f}, {100 * residual['high']:.0f}]%",
            paper="The seed paper replaces BOS and sees −40%; it trains nothing.",
            limits=f"{found['protocol']['model']}, {name}, {row['seeds']} seed(s), against the same fine-tune without",
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evals.penalty", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("prepare", "run", "show"))
    parser.add_argument("folder", type=Path, help="of tokens (prepare, run) or of cells (show)")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, help="where cells are written (run), or the result file (show)")
    parser.add_argument("--scale", choices=list(PROTOCOL), default="smollm2")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell that would not end in time")
    parser.add_argument(
        "--share", default="1/1", metavar="N/OF", help="the n-th of so many shares, for processes side by side"
    )
    parser.add_argument("--only", nargs="*", default=[""], help="cells whose name has one of these words in it")
    options = parser.parse_args()
    p = PROTOCOL[options.scale]
    if options.what == "prepare":
        prepare(options.folder, options.data, AutoTokenizer.from_pretrained(options.model), p)
        return
    if options.what == "show":
        show(options.folder, options.scale, options.output or RESULTS)
        return
    began, rate = time.monotonic(), 0.0
    bench = Bench(options.folder, options.model, p)
    cells = Cells(options.output, say=lambda line: print(f"{time.monotonic() - began:6.1f} s {line}", flush=True))
    share, shares = map(int, options.share.split("/"))
    for name, job in list(jobs_of(bench, options.scale).items())[share - 1 :: shares]:
        if not any(word in name for word in options.only):
            continue
        steps = steps_of(name)
        left = 60 * options.minutes - (time.monotonic() - began)
        if rate * (steps + 40) > left:  # what is measured takes about as long as so many steps
            print(f"{name}: left out, {left:.0f} s are left", flush=True)
            continue
        start = time.monotonic()
        cells({name: job})
        if steps:
            rate = max(rate, (time.monotonic() - start) / (steps + 40))
    show(options.output, options.scale)


def steps_of(name: str) -> int:
    """Of a cell by its name: 0 of the base."""
    return next((int(word) for word in name.split() if word.isdigit()), 0)


def show(folder: Path, scale: str, results: Path | None = None) -> None:
    done = {cell["cell"]: cell["result"] for cell in (json.loads(path.read_text()) for path in folder.glob("*.json"))}
    if "base" not in done:
        return
    found = collected(done, scale)
    print(table(found), gains_table(found), sep="\n\n", flush=True)
    if results is not None:
        machine = ", ".join(sorted({cell["device"] for cell in done.values()}))
        seconds = sum(sum(cell["seconds"].values()) for cell in done.values())
        print(f"wrote {write('penalty', scale, found, seconds=seconds, results=results, machine=machine)}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
