"""The arms of `before_after.py`: what is searched through, how it chooses, and what is trained."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import ropemods as rm
from ropemods.mods import Mod

RIGHT_LAYERS = (0, 1, 2)
"""Where position is written: the residual of prose3M is 0 up to layer 2 and large from layer 3 on."""
SINK, ZERO = rm.LearnedSink(), rm.ReplacedBos(by="zero")


def raised(first: int, by: float) -> tuple[Mod, ...]:
    """Calibrated sinks, raised from layer `first` on."""
    return rm.LearnedSink(layers=tuple(range(first))), rm.LearnedSink(layers=tuple(range(first, 6)), raised=by)


CANDIDATES: dict[str, tuple[Mod, ...]] = {
    "LearnedSink": (SINK,),
    "LearnedSink, layers 0-2": (rm.LearnedSink(layers=RIGHT_LAYERS),),
    "LearnedSink, layers 3-5": (rm.LearnedSink(layers=(3, 4, 5)),),
    "LearnedSink init -6": (rm.LearnedSink(init=-6.0),),
    "LearnedSink init 2": (rm.LearnedSink(init=2.0),),
    "LearnedSink init 3": (rm.LearnedSink(init=3.0),),
    "LearnedSink init 4": (rm.LearnedSink(init=4.0),),
    "LearnedSink raised 1": (rm.LearnedSink(raised=1.0),),
    "LearnedSink raised 2": (rm.LearnedSink(raised=2.0),),
    "LearnedSink raised 1 from layer 1": raised(1, 1.0),
    "LearnedSink raised 2 from layer 1": raised(1, 2.0),
    "LearnedSink raised 1 from layer 2": raised(2, 1.0),
    "LearnedSink raised 2 from layer 2": raised(2, 2.0),
    "LearnedSink raised 2 from layer 3": raised(3, 2.0),
    "zero": (ZERO,),
    "random token": (rm.ReplacedBos(by="random_token"),),
    "UnrotatedBos": (rm.UnrotatedBos(),),
    "zero + sink 2": (ZERO, rm.LearnedSink(read_bos=True, init=2.0)),
    "AdaptiveTemperature": (rm.AdaptiveTemperature(),),
    "LearnedSink + AdaptiveTemperature sparing BOS": (SINK, rm.AdaptiveTemperature(spare_bos=True)),
}
ONLY_TRAINED = ("random token",)
"""It changes nothing in evaluation, so untrained it cannot be judged."""


@dataclass(frozen=True)
class Plan:
    """A trained arm. `mods` may be "chosen" or "goal": what the search has chosen by that rule."""

    mods: tuple[Mod, ...] | str = ()
    shape: str = "cosine"
    lora: bool = False
    stationary: bool = False
    every_seed: bool = True
    """All seeds; else the first alone."""


TRUNCATED, TRAINABLE = rm.TruncatedRoPE(keep=0.75), rm.AdaptiveTemperature(trainable="head")
UNROTATED, OPEN_SINK = rm.UnrotatedBos(), rm.LearnedSink(read_bos=True)
ALONE_EACH = {
    "TruncatedRoPE": TRUNCATED,
    "AdaptiveTemperature": TRAINABLE,
    "ReplacedBos zero": ZERO,
    "UnrotatedBos": UNROTATED,
    "LearnedSink": SINK,
}
CANCELLED = ("ReplacedBos zero", "UnrotatedBos")
"""Acts on the BOS column, so beside it the sink leaves that column open."""
PAIRS = {
    f"{one} + {other}": (mod, OPEN_SINK if other == "LearnedSink" and one in CANCELLED else also)
    for (one, mod), (other, also) in itertools.combinations(ALONE_EACH.items(), 2)
}
PLANS = {
    "control": Plan(),
    "chosen": Plan("chosen"),
    "goal": Plan("goal"),
    **{name: Plan((mod,)) for name, mod in ALONE_EACH.items()},
    "stationary": Plan(stationary=True),
    "goal, stationary": Plan("goal", stationary=True),
    "goal, hard": Plan("goal", shape="hard"),
    "control, LoRA": Plan(lora=True),
    "goal, LoRA": Plan("goal", lora=True),
    "all five": Plan((TRUNCATED, TRAINABLE, ZERO, UNROTATED, OPEN_SINK)),
    **{name: Plan(mods, every_seed=False) for name, mods in PAIRS.items()},
}


def to_tune(untrained: dict[str, Any], p: dict[str, Any]) -> list[str]:
    """Which candidates get a short fine-tune."""
    fit = ranked(untrained, p["untrained_loss"])
    first = [name for name in fit if name not in ONLY_TRAINED][: p["tune"][0]]
    # The total has candidates of its own, or none would be left to choose from.
    low = [n for n in fit if n not in first and not_higher(untrained, n)][: p["tune"][1]]
    return [*first, *low, *ONLY_TRAINED]


def choose(tuned: dict[str, Any], p: dict[str, Any]) -> dict[str, str | None]:
    """What is run as "chosen", and as "goal" where a candidate keeps the goal's bounds."""
    chosen = ranked(tuned, p["loss"])
    goal = [name for name in ranked(tuned, p["goal_loss"]) if not_higher(tuned, name)]
    return {"chosen": chosen[0] if chosen else None, "goal": goal[0] if goal else None}


def ranked(found: dict[str, Any], allowed: float) -> list[str]:
    """Candidates with at most `allowed` more loss than nothing put on, the least residual first."""
    most = (1 + allowed) * found["nothing"]["loss"]["value"]
    fit = [name for name in found if name != "nothing" and found[name]["loss"]["value"] <= most]
    return sorted(fit, key=lambda name: found[name]["residual"]["value"])


def not_higher(found: dict[str, Any], name: str) -> bool:
    return bool(found[name]["total"]["value"] <= found["nothing"]["total"]["value"])


def planned(picks: dict[str, str | None]) -> dict[str, Plan]:
    """The arms with the search's choices filled in; what would be the same arm twice is left out."""
    plans: dict[str, Plan] = {}
    for name, plan in PLANS.items():
        if isinstance(plan.mods, str):
            pick = picks[plan.mods]
            if pick is None:
                continue
            plan = replace(plan, mods=CANDIDATES[pick])
        if all(replace(plan, every_seed=other.every_seed) != other for other in plans.values()):
            plans[name] = plan
    return plans
