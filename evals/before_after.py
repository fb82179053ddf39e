"""What the modifications do to leakage: fine-tuned with them, against fine-tuned without.

**Claim.** The seed paper (arXiv 2606.06160) replaced the BOS embedding of Llama-3.2-3B before the forward pass and saw
40% less of the residual-stream component at early queries. Milestone: at least 40% less early residual than the
control fine-tune, at no more than 0.5% more held-out loss. Goal: 90% less at no more than 0.2%, with the early total
not above the control's.

**Protocol.** prose3M, AdamW, natural text (rows begin at paragraph starts), the same rows in the same order for every
arm of a seed. Arms: base; untrained (the modification put on, nothing trained); control (fine-tuned without); modified
(strength walked from 0 to 1 as a cosine over the first half; "hard": 1 from the start); stationary (the control, on
rows that begin anywhere); LoRA (rank 16 on all linear layers, beside a LoRA control). Measured on held-out crops, with
other crops for each seed. Seeds draw rows and LoRA's start. Tokens to recover: until the mean paired difference of
eight steps' training loss falls to 0.5% of the control's and stays there; it is read off the training rows.

**Search.** Which combination is run as "chosen" is decided on other documents than those reported: half of the
held-out ones, by a hash of their text. All candidates are measured untrained; the two with the least residual among
those with at most 2% more loss, the next five whose total is not raised, and what cannot be judged untrained get a
short fine-tune. "chosen" is the least residual among those with at most 0.5% more loss than the search's control, and
"goal" the least among those with at most 0.2% more whose total is not higher, where there is one. Pairs have one seed.
The list was extended once, after a first report (LearnedSink: -82%, total +27%, loss +0.11%), by the raised sinks; what
was tried for that was tried on the search's half alone.

**Against it** would be: no modification reaches the milestone; or only such whose interval holds less than 40%.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals import before_after_page as page
from evals.before_after_arms import CANDIDATES, PLANS, Plan, choose, planned, to_tune
from evals.before_after_figure import drawn
from evals.claim import Learned
from evals.measured import measured, plain_loss
from evals.tight_loop import held_out_texts, rows_of, train, training_texts
from ropemods.leakage.documents import Documents
from ropemods.mods import Mod

MODEL = "prose3M"
PROTOCOL = {
    "nano": {
        "seeds": [0, 1, 2],
        "model": MODEL,
        "length": 256,
        "batch": 8,
        "steps": 48,
        "schedule_steps": 24,
        "learning_rate": 3e-4,
        "lora_learning_rate": 2e-3,
        "lora_rank": 16,
        "warmup": 4,
        "documents": 240,
        "crops": 384,
        "long": {"length": 512, "crops": 32},
        "search": {
            "crops": 256,
            "steps": 20,
            "schedule_steps": 8,
            "tune": [2, 5],
            "untrained_loss": 0.02,
            "loss": 0.005,
            "goal_loss": 0.002,
        },
        "candidates": {name: [str(mod) for mod in mods] for name, mods in CANDIDATES.items()},
        "arms": {
            name: [plan.mods if isinstance(plan.mods, str) else [str(mod) for mod in plan.mods], plan.shape]
            + ["LoRA"] * plan.lora
            + ["stationary"] * plan.stationary
            + [3 if plan.every_seed else 1]
            for name, plan in PLANS.items()
        },
    }
}


class Bench:
    """One scale's data, rows and measurements."""

    def __init__(self, scale: str, data: Path) -> None:
        self.p: dict[str, Any] = PROTOCOL[scale]
        self.folder = data / "models" / MODEL
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.report, self.search = held_out_texts(data, "report"), held_out_texts(data, "search")
        self._data = data
        self._rows: dict[tuple[bool, int], Tensor] = {}

    def rows(self, stationary: bool, seed: int) -> Tensor:
        if (stationary, seed) not in self._rows:
            self._rows[stationary, seed] = rows_of(
                training_texts(self._data, self.p["documents"], seed),
                self.tokenizer,
                bos=self.tokenizer.bos_token_id,
                length=self.p["length"],
                rows=self.p["steps"] * self.p["batch"],
                text="stationary" if stationary else "natural",
                seed=seed,
            )
        return self._rows[stationary, seed]

    def model(self, mods: tuple[Mod, ...], *, strength: float = 1.0, seed: int = 0) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        if mods:
            batch = self.rows(False, seed)[:8] if any(mod.calibrates for mod in mods) else None
            rm.apply(model, *mods, strength=strength, calibration=batch)
        return model

    def numbers(
        self, model: nn.Module, documents: Documents, crops: int, seed: int, *, mask: bool = False
    ) -> dict[str, Any]:
        length = self.p["length"]
        protocol = rm.Protocol(sequences=crops, length=length, seed=seed, batch_size=8, mask_term=mask)
        return measured(model, self.tokenizer, documents, protocol)

    def reported(self, model: nn.Module, seed: int) -> dict[str, Any]:
        long = self.p["long"]
        twice = rm.Protocol(sequences=long["crops"], length=long["length"], seed=seed, batch_size=4)
        return {
            **self.numbers(model, self.report, self.p["crops"], seed, mask=True),
            "long_loss": plain_loss(model, self.tokenizer, self.report, twice),
        }

    def trained(self, plan: Plan, seed: int, *, rows: int, schedule_steps: int) -> tuple[nn.Module, list[float]]:
        assert not isinstance(plan.mods, str)
        torch.manual_seed(seed)
        model = self.model(plan.mods, strength=0.0, seed=seed)
        if plan.lora:
            model = self.with_lora(model, any(mod.must_be_saved for mod in plan.mods))
        schedule = rm.StrengthSchedule(steps=schedule_steps, shape=plan.shape)  # type: ignore[arg-type]
        move = (lambda step: rm.set_strength(model, schedule.at(step))) if plan.mods else None
        rate = self.p["lora_learning_rate" if plan.lora else "learning_rate"]
        chosen = self.rows(plan.stationary, seed)[:rows]
        seen = train(
            model, chosen, batch=self.p["batch"], learning_rate=rate, warmup=self.p["warmup"], strength_at=move
        )
        return model, seen

    def with_lora(self, model: nn.Module, trains: bool) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        saved = ["ropemods"] if trains else None
        rank = self.p["lora_rank"]
        return get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=saved)
        )

    # What one cell does.

    def search_untrained(self, mods: tuple[Mod, ...]) -> dict[str, Any]:
        return self.numbers(self.model(mods), self.search, self.p["search"]["crops"], 0)

    def search_trained(self, mods: tuple[Mod, ...]) -> dict[str, Any]:
        s = self.p["search"]
        model, _ = self.trained(Plan(mods), 0, rows=s["steps"] * self.p["batch"], schedule_steps=s["schedule_steps"])
        return self.numbers(model, self.search, s["crops"], 0)

    def untrained(self, mods: tuple[Mod, ...]) -> dict[str, Any]:
        return self.reported(self.model(mods), 0)

    def arm(self, plan: Plan, seed: int) -> dict[str, Any]:
        rows = self.p["steps"] * self.p["batch"]
        model, seen = self.trained(plan, seed, rows=rows, schedule_steps=self.p["schedule_steps"])
        return {**self.reported(model, seed), "training": [round(loss, 5) for loss in seen]}


def run(scale: str, data: Path, cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    bench = Bench(scale, data)
    p = bench.p["search"]
    candidates = {"nothing": (), **CANDIDATES}
    untrained = cells({f"search {n}": lambda m=m: bench.search_untrained(m) for n, m in candidates.items()})
    untrained = {name.removeprefix("search "): found for name, found in untrained.items()}
    tune = ["nothing", *to_tune(untrained, p)]
    tuned = cells({f"tune {n}": lambda m=candidates[n]: bench.search_trained(m) for n in tune})
    tuned = {name.removeprefix("tune "): found for name, found in tuned.items()}
    picks = choose(tuned, p)
    if picks["chosen"] is None:
        raise RuntimeError("no candidate keeps the loss within bounds; widen search.loss")
    plans = planned(picks)
    seeds = bench.p["seeds"]
    jobs: dict[str, Callable[[], Any]] = {"base": lambda: bench.untrained(())}
    # The arms of all seeds come first, so that a run that is cut short has what the claim needs.
    for name, plan in sorted(plans.items(), key=lambda item: not item[1].every_seed):
        for seed in seeds if plan.every_seed else seeds[:1]:
            jobs[f"{name} seed {seed}"] = lambda plan=plan, seed=seed: bench.arm(plan, seed)
    for name in ("chosen", "goal", "LearnedSink", "ReplacedBos zero"):
        if name in plans:
            jobs[f"{name}, untrained"] = lambda mods=plans[name].mods: bench.untrained(mods)
    cells_found = cells(jobs)
    return page.collected(
        untrained,
        tuned,
        picks,
        {n: [str(m) for m in plan.mods or ()] for n, plan in plans.items()},
        cells_found,
        bench.p,
    )


def section(found: dict[str, Any]) -> str:
    return page.section(found)


def learned(found: dict[str, Any]) -> list[Learned]:
    return page.learned(found)


def figure(found: dict[str, Any]) -> str:
    return drawn(found)
