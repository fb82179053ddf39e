"""The tables of `before_after.py`: arms against their control, the search, and which arm reaches what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.claim import Learned
from evals.measured import mean, ratio

MILESTONE, GOAL = (-0.40, 0.005), (-0.90, 0.002)
"""(change of the early residual, change of the held-out loss)."""
RECOVERED, OVER = 0.005, 8
"""Recovered: within this share of the control's training loss, over so many steps."""
QUANTITIES = ("residual", "mask", "total", "bos_mass", "position1_mass", "loss")
LORA = "control, LoRA"


def collected(
    untrained: Mapping[str, Any],
    tuned: Mapping[str, Any],
    picks: Mapping[str, str | None],
    named: Mapping[str, list[str]],
    cells: Mapping[str, Any],
    p: Mapping[str, Any],
) -> dict[str, Any]:
    """The result file's content out of the cells."""
    arms = {name: _seeds(cells, name, p["seeds"]) for name in named}
    rows = {}
    for name, seeds in arms.items():
        control = arms[LORA if name.endswith("LoRA") else "control"][: len(seeds)]
        row = {"mods": named[name], "seeds": len(seeds), **_values(seeds)}
        if seeds != control:
            row |= _changes(seeds, control)
            row["tokens_to_recover"] = [
                _recovered(a["training"], b["training"], p["batch"] * p["length"])
                for a, b in zip(seeds, control, strict=True)
            ]
        rows[name] = row
    base = cells["base"]
    before = {
        name.removesuffix(", untrained"): {**_values([found]), **_changes([found], [base])}
        for name, found in cells.items()
        if name.endswith(", untrained")
    }
    return {
        "chosen": dict(picks),
        "base": _values([base]),
        "untrained": before,
        "arms": rows,
        "search": {"untrained": _search(untrained), "tuned": _search(tuned)},
        "reached": {name: reached(row) for name, row in rows.items() if "residual_change" in row},
    }


def _seeds(cells: Mapping[str, Any], name: str, seeds: Sequence[int]) -> list[Any]:
    return [cells[f"{name} seed {seed}"] for seed in seeds if f"{name} seed {seed}" in cells]


def _values(seeds: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in QUANTITIES:
        estimate = mean(seeds, what)
        found[what] = [estimate.value, estimate.low, estimate.high]
    return found | {"long_loss": float(np.mean([seed["long_loss"] for seed in seeds]))}


def _changes(seeds: Sequence[Any], against: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in ("residual", "mask", "total", "loss"):
        estimate = ratio(seeds, against, what)
        found[f"{what}_change"] = [estimate.value, estimate.low, estimate.high]
    own, other = (float(np.mean([seed["long_loss"] for seed in arm])) for arm in (seeds, against))
    return found | {"long_loss_change": own / other - 1}


def _search(found: Mapping[str, Any]) -> dict[str, Any]:
    nothing = [found["nothing"]]
    rows = {}
    for name, numbers in found.items():
        rows[name] = {what: numbers[what]["value"] for what in ("residual", "total", "loss")}
        if name != "nothing":
            for what in ("residual", "total", "loss"):
                estimate = ratio([numbers], nothing, what)
                rows[name][f"{what}_change"] = [estimate.value, estimate.low, estimate.high]
    return rows


def _recovered(seen: Sequence[float], control: Sequence[float], tokens: int) -> int | None:
    """Training tokens after which the paired mean stays within RECOVERED of the control's; None if it never does."""
    share_S = (np.asarray(seen) - np.asarray(control)) / np.asarray(control)
    running_S = np.convolve(share_S, np.full(OVER, 1 / OVER), mode="valid")
    above = np.flatnonzero(running_S > RECOVERED)
    first = 0 if not len(above) else int(above[-1]) + OVER
    return None if first >= len(seen) else first * tokens


def reached(row: Mapping[str, Any]) -> dict[str, str]:
    """ "yes" where the whole interval is on the right side, "by its value" where only the value is."""

    def at(end: int, bounds: tuple[float, float], total: bool) -> bool:
        fine = row["residual_change"][end] <= bounds[0] and row["loss_change"][end] <= bounds[1]
        return fine and (not total or row["total_change"][end] <= 0)

    return {
        name: "yes" if at(2, bounds, total) else "by its value" if at(0, bounds, total) else "no"
        for name, bounds, total in (("milestone", MILESTONE, False), ("goal", GOAL, True))
    }


def percent(triple: Sequence[float] | None, digits: int = 0) -> str:
    if triple is None:
        return ""
    value, low, high = (f"{100 * x:+.{digits}f}" for x in triple)
    return f"{value}% [{low}, {high}]"


def _row(name: str, row: Mapping[str, Any], verdict: Mapping[str, str] | None) -> str:
    recover = row.get("tokens_to_recover")
    shown = ""
    if recover:
        # What an arm that never recovers says is that it takes more than was given.
        shown = "not within the run" if None in recover else f"{round(float(np.mean(recover)) / 1000)}k"
    residual, low, high = row["residual"]
    cells = [
        name,
        str(row.get("seeds", 1)),
        f"{residual:.4f} [{low:.4f}, {high:.4f}]",
        percent(row.get("residual_change"), 1),  # so that what is just short of a bound does not look as if it met it
        f"{row['total'][0]:.3f}",
        percent(row.get("total_change")),
        percent(row.get("mask_change")),
        f"{row['bos_mass'][0]:.1%}",
        f"{row['loss'][0]:.4f}",
        percent(row.get("loss_change"), 2),
        f"{row['long_loss']:.3f}" + (f" ({row['long_loss_change']:+.2%})" if "long_loss_change" in row else ""),
        shown,
        "" if verdict is None else verdict["milestone"],
        "" if verdict is None else verdict["goal"],
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| arm | seeds | early residual | against | early total | against | mask, against | BOS mass | held-out loss | "
    "against | loss at twice the length | tokens to recover | milestone | goal |\n" + "|---" * 14 + "|"
)


def section(found: dict[str, Any]) -> str:
    p = found["protocol"]
    tokens = p["steps"] * p["batch"] * p["length"]
    lines = [
        "## Before and after",
        "",
        f"{p['model']}, {tokens:,} tokens of fine-tuning on natural text. Early queries, mean of layers 1 and up, "
        "nats². Trained arms are compared with the control (LoRA with the LoRA control), untrained ones with the base. "
        f"Milestone: {MILESTONE[0]:.0%} residual at {MILESTONE[1]:+.1%} loss; goal: {GOAL[0]:.0%} at {GOAL[1]:+.1%} "
        'and the total not higher. "yes" means the whole interval, "by its value" the value alone.',
        "",
        HEAD,
        _row("base", found["base"], None),
    ]
    lines += [_row(f"{name}, untrained", row, None) for name, row in found["untrained"].items()]
    lines += [_row(name, row, found["reached"].get(name)) for name, row in found["arms"].items()]
    lines += ["", *(f"- {name}: {', '.join(row['mods'])}" for name, row in found["arms"].items() if row["mods"])]
    lines += [
        "",
        "; ".join(f'the search\'s pick for "{rule}": {pick or "none"}' for rule, pick in found["chosen"].items()),
    ]
    lines += [
        "",
        "The search, on other documents: every candidate untrained, and some after a short fine-tune "
        f"({p['search']['steps']} steps), against nothing put on and treated alike.",
        "",
        "| candidate | | early residual | early total | held-out loss |",
        "|---|---|---|---|---|",
    ]
    for stage, rows in found["search"].items():
        for name, row in rows.items():
            if name != "nothing":
                shown = (percent(row[f"{what}_change"], digits) for what, digits in (("residual", 0), ("total", 0)))
                lines.append(f"| {name} | {stage} | {' | '.join(shown)} | {percent(row['loss_change'], 2)} |")
    lines += ["", _said(found), "", *_why(found)]
    return "\n".join(lines)


def _said(found: dict[str, Any]) -> str:
    def those(what: str, how: str) -> str:
        return ", ".join(name for name, each in found["reached"].items() if each[what] == how) or "none"

    return (
        f"Milestone reached with the whole interval: {those('milestone', 'yes')}; by the value alone: "
        f"{those('milestone', 'by its value')}. Goal reached with the whole interval: {those('goal', 'yes')}; by the "
        f"value alone: {those('goal', 'by its value')}. One model of 3M parameters, a short fine-tune; an arm of one "
        "seed has the interval of its documents only."
    )


def _why(found: dict[str, Any]) -> list[str]:
    """Explanations, each given only where the numbers show what it explains."""
    search, arms, said = found["search"]["untrained"], found["arms"], []
    sizes = [search.get(f"LearnedSink init {size}") for size in (-6, 2, 3, 4)]
    if all(sizes):
        totals = [row["total_change"][0] for row in sizes if row]
        if totals == sorted(totals, reverse=True):
            losses = (f"{row['loss_change'][0]:+.2%}" for row in sizes if row)
            said.append(
                "- **Why the total rises, and what lowers it.** Without BOS's mass a row's denominator follows the "
                "number of keys more closely, so closing BOS alone raises the mask's part. A sink logit adds the same "
                "to every denominator; the larger it is, the less the denominator moves. With BOS closed and sink "
                f"logits of -6, 2, 3 and 4 the early total changes by {', '.join(f'{x:+.0%}' for x in totals)}, "
                f"untrained, and the loss by {', '.join(losses)}."
            )
    heat = arms.get("AdaptiveTemperature") or search.get("AdaptiveTemperature")
    if heat and heat["residual_change"][1] > 0:
        said.append(
            "- **Why AdaptiveTemperature raises the residual.** It multiplies a row's logits by a factor read off the "
            "row's entropy, and entropy grows with the number of keys. So logits at one offset differ between early "
            "and late queries by construction, BOS or not."
        )
    layers = search.get("LearnedSink, layers 0-2"), search.get("LearnedSink, layers 3-5")
    if all(layers) and layers[0]["residual_change"][0] < layers[1]["residual_change"][0]:  # type: ignore[index]
        said.append(
            "- **Where position is written.** Closing BOS in layers 0 to 2 lowers the residual, which is measured in "
            "layers 1 and up, more than closing it in layers 3 to 5: the lower layers read position off BOS, and the "
            "upper ones show it."
        )
    return said


def headline(found: dict[str, Any]) -> str:
    """The chosen arm in one sentence, for the project's README."""
    p, row = found["protocol"], found["arms"]["chosen"]
    value, low, high = (-100 * x for x in row["residual_change"])
    mods, tokens = " and ".join(f"`{mod}`" for mod in row["mods"]), p["steps"] * p["batch"] * p["length"]
    return (
        f"On {p['model']} ({tokens:,} tokens of fine-tuning, {row['seeds']} seeds) {mods} "
        f"took away {value:.1f}% [{high:.0f}, {low:.0f}] of the early residual, changed the early total by "
        f"{row['total_change'][0]:+.0%}, and cost {row['loss_change'][0]:+.2%} of loss, all against the same fine-tune "
        "without it."
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    p = found["protocol"]
    limits = f"{p['model']} (3M parameters), {p['steps'] * p['batch'] * p['length']:,} tokens, seeds: "
    rows = []
    for name in ("ReplacedBos zero", "chosen", "goal", "stationary"):
        row = found["arms"].get(name)
        if row is None:
            continue
        change, total, loss = row["residual_change"], row["total_change"], row["loss_change"]
        verdict = found["reached"][name]
        theirs = "−40% for a replaced BOS, untrained" if "zero" in name else "no such arm"
        mods = ", ".join(row["mods"]) or "no modification, rows that begin anywhere"
        rows.append(
            Learned(
                f"Before and after: {mods}, against the control fine-tune",
                f"early residual {change[0]:+.1%}, total {total[0]:+.0%}, loss {loss[0]:+.2%}",
                f"residual [{change[1]:+.0%}, {change[2]:+.0%}], loss [{loss[1]:+.2%}, {loss[2]:+.2%}]",
                f"2606.06160: {theirs}; our milestone: {verdict['milestone']}, goal: {verdict['goal']}",
                f"{limits}{row['seeds']}",
            )
        )
    return rows
