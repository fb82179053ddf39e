"""Interventions: what carries the residual leakage, asked by changing something and measuring again.

BOS swaps, at the input. Position 0 holds something else than the BOS embedding:

    zero         the zero vector
    mean         the mean embedding of the vocabulary
    noise        a random vector with the norm of the BOS embedding
    none         no BOS at all: the same text, one query shorter
    reference    random tokens of the vocabulary, one at a time

A drop under a swap proves nothing by itself, since an ordinary token at position 0 may move leakage as far, either way.
So a swap is read against the reference distribution: `rank` counts the random tokens that lower leakage more.

Inside the model:

    clamp        every head reads BOS with the same weight ā from every query: (ā − a_{i,bos}) · v_bos is added to its
                 output, ā being the head's mean weight on BOS over queries i ≥ w. What is lost came through the sink.
    carrier      from block ℓ on, position 0 goes on as if another token had stood there, for every ℓ (eight at most),
                 averaged over four random tokens. What the blocks before ℓ read of BOS stays.

Twins, the same weights:

    window         sliding windows off (where the sequence is longer than the window)
    rope_scaling   rope scaling off: the plain θ ladder

Each gives the early residual and its change, residual with / residual without − 1, whose interval is formed replicate
by replicate, for both read the same documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ropemods.attention.rows import Rows
from ropemods.leakage.capture import capture, forward
from ropemods.leakage.crops import Crops
from ropemods.leakage.estimate import estimate
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.reading import bos_mass
from ropemods.leakage.sums import Sums
from ropemods.model import variants
from ropemods.model.observation import Observation
from ropemods.report.records import Estimate, Intervention, Term

SWAPS = ("zero", "mean", "noise", "none")
NAMES = (*SWAPS, "reference", "clamp", "carrier", "window", "rope_scaling")
REFERENCE = 32
"""Random tokens in the reference distribution."""
DONORS, BLOCKS = 4, 8
"""Tokens that the carrier patch is averaged over, and blocks at which it begins at most."""
_STREAM = 5
"""Keeps the choice of tokens apart from other uses of the protocol's seed."""


@dataclass(frozen=True)
class Effects:
    """What came of the interventions that were asked for."""

    interventions: tuple[Intervention, ...] = ()
    notes: tuple[str, ...] = field(default=())


def check_names(names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise TypeError(f"interventions is a list of names: write [{names!r}]")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"there is no intervention {unknown[0]!r}; there are {', '.join(NAMES)}")


def intervene(
    names: Sequence[str],
    observation: Observation,
    crops: Crops,
    model: nn.Module,
    tokenizer: object,
    residual: Term,
    sums: Sums,
    reference: int = REFERENCE,
    progress: bool = False,
) -> Effects:
    """Run interventions on a model whose residual was measured, in the order of NAMES."""
    if not names:
        return Effects()
    if "reference" in names and reference < 2:
        raise ValueError(f"reference={reference}: a distribution needs at least 2 random tokens, better 32")
    lab = Lab(observation, plain(crops), model, residual.early, progress)
    tokens = random_tokens(observation, tokenizer, crops, max(reference, DONORS))
    kept = [token for token in dict.fromkeys(NAMES) if token in names]
    found: list[Intervention] = []
    spread: tuple[Estimate, ...] = ()
    if "reference" in kept:
        vectors = variants.embedded(observation.model, tokens[:reference])
        spread = tuple(lab.early(f"token {n + 1}", variants.at_input(model, v)) for n, v in enumerate(vectors))
    changes = tuple(lab.change(each).value for each in spread)
    for name in kept:
        if name in SWAPS:
            early = lab.swap(name)
            found += [lab.intervention(name, "swap", each, changes) for each in (early,) if each is not None]
        elif name == "reference":
            found.append(
                lab.intervention(
                    f"random token, mean of {len(spread)}", "swap", mean(spread, lab.protocol.confidence), changes
                )
            )
        elif name == "clamp":
            found.append(lab.intervention("clamp", "clamp", lab.early("clamp", change=clamp(sums, observation))))
        elif name == "carrier":
            found += lab.carriers(tokens[:DONORS])
        else:
            found += lab.twin(name)
    return Effects(tuple(found), tuple(lab.notes))


def plain(crops: Crops) -> Crops:
    """The crops, read in one fold: without the mask term there is nothing to learn first."""
    protocol = dataclasses.replace(crops.protocol, mask_term=False)
    return dataclasses.replace(crops, protocol=protocol, folds_N=torch.zeros_like(crops.folds_N))


def random_tokens(observation: Observation, tokenizer: object, crops: Crops, count: int) -> list[int]:
    """Ordinary tokens of the vocabulary, none of them special, drawn without replacement."""
    size = min(len(tokenizer), observation.model.config.get_text_config(decoder=True).vocab_size)  # type: ignore[arg-type]
    special = {*getattr(tokenizer, "all_special_ids", ()), int(crops.tokens_NT[0, 0])}
    ordinary = [token for token in range(size) if token not in special]
    if len(ordinary) < count:
        raise ValueError(f"the vocabulary has {len(ordinary)} ordinary tokens, and {count} were asked for as reference")
    draw = np.random.default_rng((crops.protocol.seed, _STREAM))
    return [int(token) for token in draw.choice(ordinary, count, replace=False)]


def mean(estimates: Sequence[Estimate], confidence: float) -> Estimate:
    """The mean of estimates whose replicates drew the same documents."""
    replicates_R = np.mean([each.replicates for each in estimates], axis=0)
    return _estimate(float(np.mean([each.value for each in estimates])), replicates_R, confidence)


def clamp(sums: Sums, observation: Observation) -> Callable[[int, Rows, Tensor], Tensor]:
    """What to add to a head's output so that it reads BOS with its mean weight from everywhere."""
    w, N = sums.protocol.window, sums.protocol.sequences
    mean_LH = [sums.layers[layer]["bos_mass"][:, w:].mean(1) / N for layer in range(len(observation.sites))]

    def change(layer: int, rows: Rows, lse_BHT: Tensor) -> Tensor:
        mass_BHT = bos_mass(rows, lse_BHT)
        missing_BHT = mean_LH[layer].to(mass_BHT)[:, None] - mass_BHT
        missing_BHT[..., 0] = 0.0  # the BOS has nothing else to read
        heads = rows.q_BHTD.shape[1] // rows.v_BGSD.shape[1]
        v_BH1D = rows.v_BGSD[:, :, :1].repeat_interleave(heads, dim=1)
        return missing_BHT[..., None].to(v_BH1D.dtype) * v_BH1D

    return change


class Lab:
    """A model, its crops and its early residual; runs variants of it."""

    def __init__(
        self, observation: Observation, crops: Crops, model: nn.Module, before: Estimate, progress: bool
    ) -> None:
        self.observation, self.crops, self.model, self.before = observation, crops, model, before
        self.progress = progress
        self.protocol: Protocol = crops.protocol
        self.notes: list[str] = []
        if not before.low > 0:
            self.notes.append(
                "the early residual without an intervention cannot be told from 0, so changes relative to it are not "
                "given; read more sequences"
            )

    def early(
        self,
        name: str,
        variant: AbstractContextManager[None] | None = None,
        *,
        crops: Crops | None = None,
        change: Callable[[int, Rows, Tensor], Tensor] | None = None,
    ) -> Estimate:
        """The early residual of a variant."""
        crops = self.crops if crops is None else crops
        with nullcontext() if variant is None else variant:
            sums, _ = capture(
                self.observation,
                crops,
                crops.protocol,
                model=self.model,
                everything=False,
                change=change,
                progress=name if self.progress else None,
            )
        return estimate(sums).terms["residual"].early

    def change(self, after: Estimate) -> Estimate:
        """after / before − 1."""
        if not self.before.low > 0:
            return Estimate(float("nan"), float("nan"), float("nan"))
        ratio_R = np.asarray(after.replicates) / np.asarray(self.before.replicates) - 1
        return _estimate(after.value / self.before.value - 1, ratio_R, self.protocol.confidence)

    def intervention(self, name: str, kind: str, early: Estimate, reference: tuple[float, ...] = ()) -> Intervention:
        change = self.change(early)
        known = reference and not np.isnan(change.value) and kind == "swap"
        rank = sum(each < change.value for each in reference) if known else None
        return Intervention(
            name=name, kind=kind, early_residual=early, change=change, rank=rank, reference=reference if known else ()
        )

    def swap(self, name: str) -> Estimate | None:
        if name == "none":
            return self._without_bos()
        return self.early(name, variants.at_input(self.model, self._vector(name)))

    def _vector(self, name: str) -> Tensor:
        bos_E = variants.embedded(self.observation.model, [int(self.crops.tokens_NT[0, 0])])[0]
        if name == "zero":
            return torch.zeros_like(bos_E)
        if name == "mean":
            return variants.mean_embedding(self.observation.model)
        draw = np.random.default_rng((self.protocol.seed, _STREAM, 1)).standard_normal(len(bos_E))
        noise_E = torch.from_numpy(draw).to(bos_E)
        return noise_E * (bos_E.norm() / noise_E.norm())

    def _without_bos(self) -> Estimate | None:
        p = self.protocol
        if p.early[1] > (p.length - 1) // 2:
            self.notes.append(f"none: without BOS there are {p.length - 1} queries, too few for early={p.early}")
            return None
        shorter = dataclasses.replace(p, length=p.length - 1, grid_rows=min(p.grid_rows, p.length - 1 - p.window))
        crops = dataclasses.replace(self.crops, protocol=shorter, tokens_NT=self.crops.tokens_NT[:, 1:])
        attached = getattr(self.observation.model, "ropemods_attached", None)
        if attached is not None and attached.bos_active:
            self.notes.append("none: this model is modified so that it refuses sequences without BOS")
            return None
        return self.early("none", crops=crops)

    def carriers(self, tokens: Sequence[int]) -> Iterator[Intervention]:
        L = len(self.observation.sites)
        starts = sorted({round(n * (L - 1) / (min(L, BLOCKS) - 1)) for n in range(min(L, BLOCKS))}) if L > 1 else [0]
        probe_T = self.crops.tokens_NT[:1]
        donors = [
            variants.first_states(self.observation, lambda v=v: self._run(v, probe_T))
            for v in variants.embedded(self.observation.model, list(tokens))
        ]
        for start in starts:
            name = f"carrier from block {start}"
            runs = [self.early(name, variants.at_block(self.observation, start, states[start])) for states in donors]
            yield self.intervention(name, "carrier", mean(runs, self.protocol.confidence))

    def _run(self, vector_E: Tensor, tokens_BT: Tensor) -> None:
        with variants.at_input(self.model, vector_E):
            forward(self.model, tokens_BT)

    def twin(self, name: str) -> Iterator[Intervention]:
        model, T = self.observation.model, self.protocol.length
        if name == "window":
            window = variants.window_of(model)
            if window is None or window >= T:
                found = "none" if window is None else str(window)
                self.notes.append(f"window: nothing to switch off at {T} tokens (this model's sliding window: {found})")
                return
            twin, title = variants.without_window(model, T), f"sliding window of {window} off"
        else:
            if not variants.scaled_rope(model):
                self.notes.append("rope_scaling: nothing to switch off, this model's rope is not scaled")
                return
            twin, title = variants.without_rope_scaling(model), "rope scaling off"
        with ExitStack() as stack:
            stack.enter_context(twin)
            yield self.intervention(title, "twin", self.early(name))


def _estimate(value: float, replicates_R: np.ndarray, confidence: float) -> Estimate:
    low, high = np.quantile(replicates_R, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return Estimate(value, float(low), float(high), tuple(replicates_R.tolist()))
