"""The tables of `designs.py`, and what the intervals say of the five claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.claim import Learned
from evals.measured import mean, ratio
from ropemods.report.records import Estimate

STUDIED = ("standard", "NTK", "window")


def collected(cells: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The result file's content: no replicates, but every interval that is shown."""
    leaks = {name: cells[f"{name}: leakage"] for name in names}
    designs: dict[str, Any] = {}
    for name, leak in leaks.items():
        designs[name] = {
            **{term: _triple(mean([leak], term)) for term in ("residual", "mask", "total", "bos_mass", "loss")},
            "training": leak["training"],
            "residual_by_layer": [
                [x["value"], *np.quantile(x["replicates"], (0.025, 0.975))] for x in leak["residual_by_layer"]
            ],
            "mask_by_layer": leak["mask_by_layer"],
            "bos_mass_by_layer": leak["bos_mass_by_layer"],
            "growth": _triple(growth(leak)),
            "sink": cells[f"{name}: sink"],
            "swaps": cells[f"{name}: swaps"]["found"],
            "notes": cells[f"{name}: swaps"]["notes"],
        }
        if name != "standard":
            designs[name]["residual_against_standard"] = _triple(ratio([leak], [leaks["standard"]], "residual"))
            designs[name]["growth_against_standard"] = _triple(growth(leak, leaks["standard"]))
    return {"designs": designs, "claims": claims(designs)}


def growth(leak: dict[str, Any], against: dict[str, Any] | None = None) -> Estimate:
    """Early residual of the last two layers less that of layers 1 and 2; with `against`, the difference of two."""

    def of(found: dict[str, Any], what: str) -> Any:
        layers = [np.asarray(layer[what]) for layer in found["residual_by_layer"]]
        return (layers[-1] + layers[-2]) / 2 - (layers[1] + layers[2]) / 2

    value, draws = of(leak, "value"), of(leak, "replicates")
    if against is not None:
        value, draws = value - of(against, "value"), draws - of(against, "replicates")
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def verdict(interval: Sequence[float], *, below: float | None = None, above: float | None = None) -> str:
    """By the interval's side of a bound."""
    _, low, high = interval
    if below is not None:
        return "agrees" if high < below else "disagrees" if low > below else "cannot say"
    assert above is not None
    return "agrees" if low > above else "disagrees" if high < above else "cannot say"


def claims(designs: dict[str, Any]) -> list[dict[str, Any]]:
    """The five, each with figure, interval and verdict."""
    residuals = {name: designs[name]["residual"] for name in STUDIED}
    masks = {name: designs[name]["mask"] for name in STUDIED}
    both = all(low > 0 for _, low, _ in (*residuals.values(), *masks.values()))
    zero = _swap(designs["standard"], "zero")
    rank = None if zero is None else zero["rank"]
    change = None if zero is None else zero["change"]
    rows = [
        {
            "claim": "mask and residual are both there, in all three designs",
            "figure": "; ".join(f"{n} residual {v[0]:.4f}, mask {masks[n][0]:.3f}" for n, v in residuals.items()),
            "interval": "; ".join(f"{n} residual [{v[1]:.4f}, {v[2]:.4f}]" for n, v in residuals.items()),
            "verdict": "agrees" if both else "cannot say",
        },
        {
            "claim": "NTK scaling has less residual than standard RoPE",
            **_change(designs["NTK"]["residual_against_standard"]),
            "verdict": verdict(designs["NTK"]["residual_against_standard"], below=0.0),
        },
        {
            "claim": "with a sliding window the residual grows more with depth than with standard RoPE",
            "figure": "growth {:+.4f} more".format(*designs["window"]["growth_against_standard"]),
            "interval": "[{1:+.4f}, {2:+.4f}] nats²".format(*designs["window"]["growth_against_standard"]),
            "verdict": verdict(designs["window"]["growth_against_standard"], above=0.0),
        },
    ]
    if change is None:
        rows.append(_unknown("replacing the BOS embedding takes away early residual (the paper: 40%)"))
    else:
        of = len(zero["of"]) if zero else 0
        rows.append(
            {
                "claim": "replacing the BOS embedding takes away early residual (the paper: 40%)",
                "figure": f"zero: {change[0]:+.0%}; {rank} of {of} random tokens take away more",
                "interval": f"[{change[1]:+.0%}, {change[2]:+.0%}]",
                "verdict": verdict(change, below=0.0),
            }
        )
    rows.append(_anchored(designs["standard"]["sink"]))
    return rows


def _anchored(sink: dict[str, Any]) -> dict[str, Any]:
    """Exact counts on few crops, so no interval: a fixed state, a state that varies, and less mass."""
    fixed = sink["BOS"]["spread"] < 1e-6
    varies = sink["another token"]["spread"] > 0.01
    less = sink["another token"]["mass"] < sink["BOS"]["mass"]
    strong = sink["BOS"]["mass"] > 2 * sink["even"]
    said = "agrees" if fixed and varies and less else "disagrees"
    return {
        "claim": "the sink hangs on the token at position 0, whose state is fixed where that is BOS",
        "figure": (
            f"mass at queries 8 to 31: BOS {sink['BOS']['mass']:.1%}, another token there "
            f"{sink['another token']['mass']:.1%}, no BOS {sink['no BOS']['mass']:.1%}, evenly spread "
            f"{sink['even']:.1%}; spread of the state {sink['BOS']['spread']:.1g} and "
            f"{sink['another token']['spread']:.2g}"
        ),
        "interval": "none: one set of crops",
        "verdict": said if strong else f"cannot say: no strong sink has formed ({said} as far as it goes)",
    }


def _swap(design: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((each for each in design["swaps"] if each["name"] == name), None)


def _unknown(claim: str) -> dict[str, Any]:
    return {"claim": claim, "figure": "not defined", "interval": "the residual holds 0", "verdict": "cannot say"}


def _change(triple: Sequence[float]) -> dict[str, str]:
    return {"figure": f"{triple[0]:+.0%}", "interval": f"[{triple[1]:+.0%}, {triple[2]:+.0%}]"}


def _triple(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def _shown(triple: Sequence[float], digits: int) -> str:
    return "{0:.{d}f} [{1:.{d}f}, {2:.{d}f}]".format(*triple, d=digits)


def section(found: dict[str, Any]) -> str:
    designs = found["designs"]
    first = next(iter(designs.values()))["training"]
    lines = [
        "## Leakage across designs (2606.06160)",
        "",
        f"Models of about {first['parameters']:,} parameters, {first['tokens']:,} tokens each, alike but for the rope "
        "or the window; one seed. Early queries, mean of layers 1 and up, nats²; sink is the mass on BOS.",
        "",
        "| design | residual | against standard | mask | total | sink | held-out loss |",
        "|---|---|---|---|---|---:|---:|",
    ]
    for name, row in designs.items():
        against = row.get("residual_against_standard")
        lines.append(
            f"| {name} | {_shown(row['residual'], 4)} | "
            + ("" if against is None else "{:+.0%} [{:+.0%}, {:+.0%}]".format(*against))
            + f" | {_shown(row['mask'], 3)} | {_shown(row['total'], 3)} | {row['bos_mass'][0]:.1%} | "
            f"{row['loss'][0]:.3f} |"
        )
    layers = range(1, len(next(iter(designs.values()))["mask_by_layer"]))
    lines += ["", "Early residual by depth, and how much the last two layers have over layers 1 and 2:", ""]
    lines += [
        "| design | " + " | ".join(f"layer {n}" for n in layers) + " | growth |",
        "|---" * (len(layers) + 2) + "|",
    ]
    for name, row in designs.items():
        by = " | ".join(f"{row['residual_by_layer'][n][0]:.4f}" for n in layers)
        lines.append(f"| {name} | {by} | {_shown(row['growth'], 4)} |")
    lines += ["", "What a change at position 0, or of the same weights, does to the early residual:", ""]
    lines += ["| design | change | effect | random tokens that take away more |", "|---|---|---|---|"]
    for name, row in designs.items():
        for each in row["swaps"]:
            change = each["change"]
            effect = "not defined" if change is None else "{:+.0%} [{:+.0%}, {:+.0%}]".format(*change)
            rank = "" if each["rank"] is None else f"{each['rank']} of {len(each['of'])}"
            lines.append(f"| {name} | {each['name']} | {effect} | {rank} |")
    lines += ["", "The abstract's five claims:", "", "| claim | figure | 95% interval | here |", "|---|---|---|---|"]
    lines += [f"| {c['claim']} | {c['figure']} | {c['interval']} | {c['verdict']} |" for c in found["claims"]]
    lines += [
        "",
        "A change is not defined where the residual without it cannot be told from 0. These models are small and "
        "barely trained; what they disagree with may hold for large ones.",
    ]
    return "\n".join(lines)


def learned(found: dict[str, Any]) -> list[Learned]:
    training = next(iter(found["designs"].values()))["training"]
    limits = f"{training['parameters']:,} parameters, {training['tokens']:,} tokens, one seed"
    return [
        Learned(f"Designs: {c['claim']}", c["figure"], c["interval"], f"2606.06160: {c['verdict']}", limits)
        for c in found["claims"]
    ]
