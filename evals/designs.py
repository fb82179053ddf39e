"""How leakage differs between designs: models trained alike but for the rope or the window.

**Claims**, those of the seed paper's abstract (arXiv 2606.06160), in our words:

1. the mask's and the residual's component are both there under standard RoPE, NTK scaling and sliding windows;
2. NTK scaling has less residual than standard RoPE;
3. with a sliding window the residual grows with depth, more than without;
4. replacing the BOS embedding takes away 40% of the early residual;
5. the sink hangs on the token: position 0 is one fixed state wherever BOS stands there, and another token there gets
   another state and less attention.

**Protocol.** Four small models (`design_models.py`), one seed, equal in all but the design. Measured on held-out crops,
the same for all, so differences are paired. Swaps are read against 16 random tokens at position 0. Twins are the same
weights with the window or the rope scaling off; NTK scaling as it is trained here is only another θ and has no twin.
Growth with depth is the early residual of the last two layers less that of layers 1 and 2. The sink is read at queries
8 to 31, which every window sees whole, and compared with what attention spread evenly would give.

**Verdicts** follow from the intervals by rule: "agrees" where the interval is on the claim's side, "disagrees" where it
is on the other, and "cannot say" where it holds both. **Against the claims** would be intervals on the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ropemods as rm
from evals import designs_page as page
from evals.claim import Learned
from evals.design_models import TRAINING, Models
from evals.measured import numbers
from evals.tight_loop import held_out_texts
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import Documents
from ropemods.report.records import Intervention

STUDIED = ("standard", "NTK", "window")
"""The paper's three; they get the reference distribution of the swaps."""
PROTOCOL = {
    "nano": {
        "seeds": [0],
        "training": TRAINING["nano"],
        "crops": 768,
        "swap_crops": 768,
        "reference": 16,
        "anchor_crops": 64,
        "anchor_queries": [8, 32],
    }
}


def run(scale: str, data: Path, cells: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    p = PROTOCOL[scale]
    models = Models(scale, data, say=lambda line: print(line, flush=True))
    documents = held_out_texts(data, "all")
    jobs: dict[str, Callable[[], Any]] = {}
    for name in models.names:
        jobs[f"{name}: leakage"] = lambda name=name: leakage(models, name, documents, p)
        jobs[f"{name}: sink"] = lambda name=name: anchor(models, name, documents, p)
    for name in models.names:
        jobs[f"{name}: swaps"] = lambda name=name: swaps(models, name, documents, p)
    return page.collected(cells(jobs), models.names)


def leakage(models: Models, name: str, documents: Documents, p: dict[str, Any]) -> dict[str, Any]:
    """Terms and sink mass, over layers 1 and up and by layer."""
    protocol = rm.Protocol(sequences=p["crops"], length=models.p["length"], batch_size=16)
    report = rm.measure(models.trained(name), models.tokenizer(), documents, protocol, progress=False, command="evals")
    assert report.sink is not None
    layers = report.terms["residual"].layers
    return {
        **numbers(report),
        "training": models.training(name),
        "residual_by_layer": [{"value": x.early.value, "replicates": list(x.early.replicates)} for x in layers],
        "mask_by_layer": [x.early.value for x in report.terms["mask"].layers],
        "bos_mass_by_layer": [float(np.mean(heads)) for heads in report.sink.heads_bos_mass],
    }


def swaps(models: Models, name: str, documents: Documents, p: dict[str, Any]) -> dict[str, Any]:
    """Interventions, each as {name, change, interval, rank}; the paper's designs with their reference distribution."""
    wanted = ["zero", "mean", "clamp", "window", "rope_scaling"] + ["reference"] * (name in STUDIED)
    protocol = rm.Protocol(sequences=p["swap_crops"], length=models.p["length"], batch_size=16, mask_term=False)
    report = rm.measure(
        models.trained(name),
        models.tokenizer(),
        documents,
        protocol,
        interventions=wanted,
        reference=p["reference"],
        progress=False,
        command="evals",
    )
    return {"found": [swap(each) for each in report.interventions], "notes": list(report.notes)}


def swap(found: Intervention) -> dict[str, Any]:
    """Plain JSON; None where a change is not defined because there was nothing to change."""
    defined = found.change.value == found.change.value
    change = [found.change.value, found.change.low, found.change.high] if defined else None
    return {"name": found.name, "kind": found.kind, "change": change, "rank": found.rank, "of": list(found.reference)}


@torch.no_grad()
def anchor(models: Models, name: str, documents: Documents, p: dict[str, Any]) -> dict[str, Any]:
    """Attention to position 0, and how far its last state differs between sequences, for what may stand there."""
    model, tokenizer = models.trained(name, attn_implementation="eager"), models.tokenizer()
    protocol = rm.Protocol(sequences=p["anchor_crops"], length=models.p["length"], seed=1)
    tokens_NT = make_crops(documents, tokenizer, protocol).tokens_NT
    draw = torch.Generator().manual_seed(0)
    other_NT = tokens_NT.clone()
    other_NT[:, 0] = torch.randint(1, model.config.vocab_size, (len(tokens_NT),), generator=draw)
    first, last = p["anchor_queries"]
    even = float(np.mean([1 / (i + 1) for i in range(first, last)]))
    found = {}
    for what, ids_NT in (("BOS", tokens_NT), ("another token", other_NT), ("no BOS", tokens_NT[:, 1:])):
        out = model(input_ids=ids_NT, output_attentions=True, output_hidden_states=True, use_cache=False)
        mass = torch.stack([p_BHTS[:, :, first:last, 0].mean() for p_BHTS in out.attentions[1:]])
        found[what] = {"mass": float(mass.mean()), "spread": spread(out.hidden_states[-2])}
    return {"even": even, **found}


def spread(states_NTE: Tensor) -> float:
    """How much position 0 differs between sequences, as a share of how much later positions do."""
    variance_T = states_NTE.var(0).sum(-1)
    return float(variance_T[0] / variance_T[8:].mean())


def section(found: dict[str, Any]) -> str:
    return page.section(found)


def learned(found: dict[str, Any]) -> list[Learned]:
    return page.learned(found)
