"""What `penalty.py` trains and measures: token arrays that travel, a plain loop, and readings taken in batches.

Nothing here needs a tokenizer or a text once `prepare` has written the arrays, so the runs can go on another machine.

Shapes: N rows, B batch, T tokens, L layers, H heads, K groups, I queries, W offsets, D hidden size.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ropemods as rm
from evals import gains
from evals.measured import kept
from evals.tight_loop import EXCERPT, rows_of
from ropemods.leakage.capture import Observer, forward, losses, read
from ropemods.leakage.crops import Crops, make_crops
from ropemods.leakage.curves import loss as held_out_loss
from ropemods.leakage.documents import Documents, read_documents
from ropemods.leakage.draws import multipliers, pair_draws
from ropemods.leakage.mask import PSI, interpolation
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from ropemods.model.attention_function import observed
from ropemods.model.observation import observing
from ropemods.mods import Mod
from ropemods.training.text import is_held_out

MODS: dict[str, Mod] = {
    "keyed": rm.KeyedSink(offset=32),
    "log": rm.LogTemperature(),
    "temperature": rm.AdaptiveTemperature(start="model", trainable="head"),
    "anchored": rm.AnchoredBos(offset=32),
    # These do not start at the model.
    "zero": rm.ReplacedBos(by="zero"),
    "mean": rm.ReplacedBos(by="mean"),
    "noise": rm.ReplacedBos(by="noise"),
    "random": rm.ReplacedBos(by="random_token"),
    "truncated": rm.TruncatedRoPE(0.75),
    "unrotated": rm.UnrotatedBos(),
    "sink": rm.LearnedSink(init=0.0),
}
FASTER = 100
"""The learning rate of a modification's parameters over the model's."""
LENGTH, LONG, FAR = 256, 1024, 2048
FAR_BINS = (0, 64, 256, 512, 1024, 2047)
PROBED = (0.1, 0.27, 0.5, 0.73, 0.97)
"""Depths of the hidden states that the probe reads: of 30 layers 3, 8, 15, 22 and 29."""
CHARACTERS = 6
"""Of text for each token that is wanted of it, with room to spare."""
RIDGE = 1e-2
"""The ridge of the probe over the number of tokens, with features of variance 1."""


@dataclass(frozen=True)
class Arm:
    """How a model is trained. A weight of 0 is the control of the same steps and rows."""

    weight: float = 0.0
    steps: int = 96
    warmup: int = 0
    unigram: float = 0.0
    """Share of the penalised rows that are unigram tokens, on which no loss is taken."""
    long: bool = False
    """Half of each step's tokens come as rows of 1024."""
    layers: tuple[float, float] | None = None
    """Penalised layers as shares of the depth, from and up to; None: all but the first."""
    total: float = 0.0
    """Weight of the early total."""
    mods: tuple[str, ...] = ()
    """Of MODS, put on before."""

    @property
    def control(self) -> Arm:
        return Arm(steps=self.steps, long=self.long)

    @property
    def penalised(self) -> bool:
        return self.weight > 0 or self.total > 0

    @property
    def name(self) -> str:
        weights = [f"w{self.weight:g}"] * bool(self.weight) + [f"t{self.total:g}"] * bool(self.total)
        said = [*self.mods, *weights] or ["control"]
        said += [f"{self.steps}"]
        said += [f"warm{self.warmup}"] * bool(self.warmup) + [f"unigram{self.unigram:g}"] * bool(self.unigram)
        said += ["long"] * self.long
        said += [f"layers{self.layers[0]:g}-{self.layers[1]:g}"] if self.layers else []
        return " ".join(said)


# Arrays


def prepare(folder: Path, data: Path, tokenizer: Any, p: dict[str, Any]) -> None:
    """Write every token that a run reads: training rows, held-out crops with their groups, unigram crops."""
    folder.mkdir(parents=True, exist_ok=True)
    text, bos = data / "text", tokenizer.bos_token_id
    train = read_documents(text / "books.train.jsonl.xz").texts
    for name, length, rows in (("train", LENGTH, p["rows"]), ("train_long", LONG, p["rows"] // 16)):
        chosen = excerpts(train, rows * length * CHARACTERS, seed=length)
        tokens = rows_of(chosen, tokenizer, bos=bos, length=length, rows=rows, text="stationary", seed=7)
        np.save(folder / f"{name}.npy", _small(tokens))
    books, prose = (read_documents(text / f"{name}.valid.jsonl.xz") for name in ("books", "prose"))
    halves = {
        part: Documents([t for t in books.texts if is_held_out(t, 0.5) == (part == "search")], f"books.valid, {part}")
        for part in ("search", "report")
    }
    sources = {"search": halves["search"], "report": halves["report"], "other": prose, "unigram": books}
    facts = {}
    for name, protocol in protocols(p).items():
        crops = make_crops(sources[name], tokenizer, protocol, bos_token_id=bos)
        np.save(folder / f"{name}.npy", _small(crops.tokens_NT))
        facts[name] = {"documents": crops.documents, "source": crops.source, "digest": crops.digest}
    far = Protocol(sequences=p["far"], length=FAR, groups=8, seed=0)
    np.save(folder / "far.npy", _small(make_crops(halves["report"], tokenizer, far, bos_token_id=bos).tokens_NT))
    gains.prepare(folder, halves["report"].texts, prose.texts, tokenizer, count=p["passages"])
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def excerpts(texts: Sequence[str], characters: int, *, seed: int) -> list[str]:
    """Stretches of documents, one of each as long as there are documents, until there are so many characters."""
    draw, found, size = np.random.default_rng((seed, 33)), [], 0
    while size < characters:
        for n in draw.permutation(len(texts)):
            start = int(draw.integers(0, max(1, len(texts[n]) - EXCERPT)))
            found.append(texts[n][start : start + EXCERPT])
            size += len(found[-1])
            if size >= characters:
                break
    return found


def protocols(p: dict[str, Any]) -> dict[str, Protocol]:
    """What is measured, by the name of its crops. The last two are instruments that nothing was trained on."""
    common: dict[str, Any] = {"length": LENGTH, "groups": p["groups"], "batch_size": p["measure_batch"]}
    return {
        "search": Protocol(sequences=p["crops"], mask_term=False, **common),
        "report": Protocol(sequences=p["crops"], mask_term=True, **common),
        "other": Protocol(sequences=p["crops"], window=16, early=(16, 64), mask_term=False, **common),
        "unigram": Protocol(sequences=p["crops"], text="unigram", mask_term=False, **common),
    }


def _small(tokens_NT: Tensor) -> np.ndarray:
    return tokens_NT.numpy().astype(np.uint16 if int(tokens_NT.max()) < 2**16 else np.int32)


@dataclass
class Bench:
    """The arrays and the model of a run."""

    folder: Path
    model: Path
    p: dict[str, Any]
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def tokens(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy").astype(np.int64))

    def fresh(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).to(self.device)

    def cell(self, arm: Arm | None, seed: int) -> dict[str, Any]:
        """Train an arm, or take the model as it came, and measure it."""
        begun = time.monotonic()
        model, found = self.fresh(), {}
        if arm is not None:
            found = self.train(model, arm, seed)
            if arm.mods:
                found["summary"] = str(rm.summary(model))
        trained = time.monotonic()
        found["measured"] = self.measure(model.eval())
        found["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        found["seconds"] = {"training": round(trained - begun, 1), "measuring": round(time.monotonic() - trained, 1)}
        return found

    # Training

    def train(self, model: nn.Module, arm: Arm, seed: int) -> dict[str, Any]:
        """AdamW, a cosine to 0, bf16 autocast: nothing else around the penalty."""
        if arm.mods:
            rm.apply(model, *(MODS[name] for name in arm.mods))
        model.train()
        parameters = list(model.parameters())
        added = [q for name, q in model.named_parameters() if "ropemods" in name]
        own = [q for name, q in model.named_parameters() if "ropemods" not in name]
        wide, narrow = ([q for q in own if (q.ndim > 1) == w] for w in (True, False))
        groups = [
            {"params": wide, "weight_decay": 0.1, "initial_lr": self.p["learning_rate"]},
            {"params": narrow, "weight_decay": 0.0, "initial_lr": self.p["learning_rate"]},
            # A modification's numbers start at 0, or small, and have a long way to go.
            {"params": added, "weight_decay": 0.0, "initial_lr": FASTER * self.p["learning_rate"]},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.p["learning_rate"],
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        penalized = None
        if arm.penalised:
            count = model.config.num_hidden_layers  # type: ignore[union-attr]
            layers = None
            if arm.layers is not None:
                layers = range(max(1, round(arm.layers[0] * count)), round(arm.layers[1] * count))
            penalized = rm.penalize(model, weight=arm.weight, total=arm.total, warmup_steps=arm.warmup, layers=layers)
        said: list[Tensor] = []
        for step, parts in enumerate(self.batches(arm, seed)):
            rate = min((step + 1) / self.p["warmup"], (1 + math.cos(math.pi * step / arm.steps)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            for ids, labels in parts:
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
                (loss / len(parts)).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            zero = loss.detach() * 0
            last = None if penalized is None else penalized.last
            plain = loss.detach() if last is None or last.loss is None else last.loss
            said.append(torch.stack((plain.float(), (zero if last is None else last.leakage).float())))
        if penalized is not None:
            penalized.remove()
        loss_S, leakage_S = torch.stack(said).T.tolist()
        if not all(math.isfinite(x) for x in loss_S):
            raise RuntimeError(f"{arm.name}: the loss is not finite")
        return {"loss": [round(x, 4) for x in loss_S], "leakage": [round(x, 5) for x in leakage_S]}

    def batches(self, arm: Arm, seed: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The passes of every step as (ids, labels): the same text in the same order for all arms of a seed."""
        B, draw = self.p["batch"], np.random.default_rng((seed, 31))
        rows, long = self.tokens("train"), self.tokens("train_long")
        content = rows[:, 1:].flatten().numpy()
        each = B // 2 if arm.long else B
        order, far = (torch.from_numpy(draw.permutation(len(x))) for x in (rows, long))
        if each * arm.steps > len(rows):
            raise ValueError(f"{arm.steps} steps read more rows than the {len(rows)} that were prepared")
        noise = np.random.default_rng((seed, 32))
        more = round(B * arm.unigram / (1 - arm.unigram))
        for step in range(arm.steps):
            ids = rows[order[step * each : (step + 1) * each]]
            labels = ids
            if more:
                drawn = torch.from_numpy(noise.choice(content, size=(more, LENGTH)))
                drawn[:, 0] = ids[0, 0]
                ids, labels = torch.cat((ids, drawn)), torch.cat((ids, torch.full_like(drawn, -100)))
            parts = [(ids.to(self.device), labels.to(self.device))]
            if arm.long:
                count = max(1, each * LENGTH // LONG)
                ids = long[far[torch.arange(step * count, (step + 1) * count) % len(far)]].to(self.device)
                parts.append((ids, ids))
            yield parts

    # Measuring

    def measure(self, model: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        stock = model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
        if stock:  # whole rows of logits of 256 tokens are small, and eager attention is the same code everywhere
            model.set_attn_implementation("eager")  # type: ignore[operator]
        for name, protocol in protocols(self.p).items():
            found[name] = self.leakage(model, name, protocol)
        if stock:
            model.set_attn_implementation("sdpa")  # type: ignore[operator]
        found["far"] = self.far_loss(model)
        found["probe"] = self.probe(model)
        found["gains"] = gains.measure(model, self.folder, batch=self.p["measure_batch"])
        return found

    @torch.no_grad()
    def leakage(self, model: nn.Module, name: str, protocol: Protocol) -> dict[str, Any]:
        """Early residual, total and perhaps mask, over layers 1 and up, and the loss."""
        crops = crops_of(self.tokens(name), protocol)
        sums = Sums(protocol)
        with observing(model) as observation:
            observer = Observer(observation, sums, everything=protocol.mask_term)
            with observed(observer, of=model, want_lse=True):
                for tokens_BT in read(crops, protocol, sums, observer, progress=None):
                    sums.add_loss(observer.groups_B, losses(forward(model, tokens_BT), tokens_BT))
        loss = held_out_loss(sums)
        assert loss is not None
        found = {term: early(sums, term) for term in ("residual", "total", *["mask"] * protocol.mask_term)}
        return {**found, "loss": kept(loss.value, loss.replicates)}

    @torch.no_grad()
    def far_loss(self, model: nn.Module) -> dict[str, list[float]]:
        """The loss of long crops by position, a value a crop."""
        rows, size = self.tokens("far"), max(1, self.p["measure_batch"] // 8)
        nll = torch.cat([losses(forward(model, part), part).cpu() for part in rows.split(size)])
        bins = itertools.pairwise(FAR_BINS)
        return {f"{a}-{b}": [round(x, 5) for x in nll[:, a:b].mean(1).tolist()] for a, b in bins}

    @torch.no_grad()
    def probe(self, model: nn.Module) -> dict[str, float]:
        """R² of log position, read off hidden states by a ridge regression: fitted on one half of the report's crops,
        tested on the other half's documents or blocks."""
        rows = self.tokens("report")
        half = len(rows) // 2
        layers = [max(1, round(share * model.config.num_hidden_layers)) for share in PROBED]  # type: ignore[union-attr]
        states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for part in rows.split(self.p["measure_batch"]):
            out = model(
                input_ids=part.to(self.device), use_cache=False, output_hidden_states=True, logits_to_keep=1
            ).hidden_states
            for layer in states:
                states[layer].append(out[layer][:, 1:].float())
        y_T = torch.arange(1, LENGTH, device=self.device).double().log()
        found = {}
        for layer, parts in states.items():
            x_NTD = torch.cat(parts).double()
            fit, test = x_NTD[:half].flatten(0, 1), x_NTD[half:].flatten(0, 1)
            mean, spread = fit.mean(0), fit.std(0) + 1e-9
            fit, test = (fit - mean) / spread, (test - mean) / spread
            y, centre = y_T.repeat(half) - y_T.mean(), y_T.mean()
            gram = fit.T @ fit + RIDGE * len(fit) * torch.eye(fit.shape[1], dtype=fit.dtype, device=self.device)
            told = test @ torch.linalg.solve(gram, fit.T @ y) + centre
            wanted = y_T.repeat(len(x_NTD) - half)
            found[str(layer)] = round(float(1 - (told - wanted).square().mean() / wanted.var(correction=0)), 4)
        return found


def crops_of(tokens_NT: Tensor, protocol: Protocol) -> Crops:
    """Prepared crops as `make_crops` gave them: groups in order, as many in each."""
    folds = torch.tensor([n for n, fold in enumerate(protocol.folds()) for _ in fold])
    return Crops(
        protocol=protocol,
        tokens_NT=tokens_NT,
        groups_N=torch.arange(protocol.groups).repeat_interleave(protocol.per_group),
        folds_N=folds.repeat_interleave(protocol.per_group),
        documents=0,
        source="prepared",
        digest="",
    )


@torch.no_grad()
def early(sums: Sums, term: str) -> dict[str, Any]:
    """The early leakage of layers 1 and up with its replicates, as `estimate` has it, for all heads at once."""
    p, grams = sums.protocol, []
    first, (start, stop) = p.window, p.early
    for layer in sorted(sums.layers)[1:]:
        store = sums.layers[layer]
        if term == "mask":
            groups = p.folds()[-1]
            to_IR = interpolation(p.grid(), range(first, p.length)).to(store[PSI[0]].device)
            sides = [-(store[psi][groups.start : groups.stop].double() @ to_IR.T)[..., None] for psi in PSI]
        else:
            maps_KHIW = store["residual"].double()
            if term == "total":
                maps_KHIW = maps_KHIW + store["log_m"].double()[..., None]
            sides = [maps_KHIW]
        cut = []
        for maps_KHIW in sides:
            far_KH1W = maps_KHIW[:, :, p.late - first :].mean(2, keepdim=True)
            cut.append((maps_KHIW[:, :, start - first : stop - first] - far_KH1W).flatten(1) / p.per_group)
        gram_KK = cut[0] @ cut[-1].T / (cut[0].shape[1])
        grams.append(((gram_KK + gram_KK.T) / 2).cpu())
    x_RK = multipliers(p, p.folds()[-1] if term == "mask" else None)
    value, draws_R = pair_draws(torch.stack(grams).mean(0), x_RK)
    return kept(float(value), draws_R.tolist())
