"""`penalize`: leakage trained away. The early residual leakage of every batch joins the training loss.

    penalized = rm.penalize(model, weight=3.0)
    Trainer(model, …, callbacks=[penalized.callback()]).train()
    penalized.remove()                      # the model is a stock model, and so was every checkpoint of it

What joins the loss is weight × P. With D(i, δ) of `model/deviations.py`, for each layer, head and early query i,

    P = mean of 2 · D̄(i, δ) · D(i, δ)          D̄ = bias-corrected running mean of *earlier* steps' D, a constant

Its gradient is that of the mean square of E D, the early residual that `measure` reports, nearly without noise: the
square of one batch's D would pay for its noise, and a product with what other batches said does not. In the first step
there is no D̄, and nothing is penalised. P / 2 estimates the early residual without bias, so it may be negative.

`total=` asks the same of whole rows' log-probabilities, D(i, δ) + M(i) of `model/whole_rows.py`, so of the
denominators as well. They grow with the row by themselves, and a model holds them still by what does not: the BOS that
it parks on, a slot, a temperature that grows (`LogTemperature`).

**Where it joins.** A model that is called with `labels` in training mode returns a loss with the penalty in it, so
Trainer and plain loops need no change. Where the loss is computed from something else, as you may do and TRL's trainers
do, add `penalized.penalty()`; a batch whose loss is without it is an error.
`penalized.last` holds the loss without it, and `penalized.callback()` logs both in a Trainer.

**A step** is an optimizer's. The batches of one step are penalised against the same D̄ and together, over all ranks,
make the step's D, so 8 rows at once and 8 times one row train alike. It is noticed when a torch optimizer steps.

**Rows.** Queries count from the start of their own sequence: padding on either side and packed rows with position_ids
that restart are told apart. Sequences shorter than 2 · early[1] are left out; many batches in a row without any that
is long enough are an error.

It works with modifications or without, with LoRA (penalise the PEFT model or its base), DDP, FSDP, ZeRO, gradient
checkpointing and autocast. `torch.compile` breaks the graph at each attention layer, so it must not ask for fullgraph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from ropemods.model import attention_function, deviations, layer_losses
from ropemods.model.attention_layers import attention_layers, heads_of
from ropemods.model.layer_losses import Pass, Weights
from ropemods.model.wrappers import base_model

EMPTY_PASSES = 16
"""So many batches in a row without a sequence that is long enough are a mistake."""
STEPLESS_PASSES = 4096
"""So many batches without an optimizer's step are a step that was not noticed."""


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """How leakage is penalised."""

    weight: float
    """Nats of loss for one nat² of 2 × the early residual."""
    total: float = 0.0
    """The same for the early total."""
    warmup_steps: int = 0
    """The weight rises linearly from 0 over so many optimizer steps."""
    layers: tuple[int, ...] | None = None
    """Attention layers by index (negative from the end); None: all but the first, which sees words only."""
    early: tuple[int, int] = (8, 64)
    """The queries that are penalised, first ≤ i < last, counted from the start of their sequence."""
    window: int = 8
    """w: offsets 0 … w − 1 are compared."""
    late: int = 32
    """Queries that stand for "far from the start", evenly spread over the second half of each sequence."""
    momentum: float = 0.9
    """Of the running mean."""

    def __post_init__(self) -> None:
        for name in ("layers", "early"):  # lists, as JSON and YAML give them
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("weight", "total", "momentum"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"penalty: {name} takes a number, found {value!r}")
        for name, least in (("warmup_steps", 0), ("window", 2), ("late", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"penalty: {name} must be a whole number from {least} up, not {value!r}")
        if not (min(self.weight, self.total) >= 0 and 0 < self.weight + self.total < float("inf")):
            raise ValueError(
                f"penalty: weight={self.weight}, total={self.total}: none below 0, and one above 0; to train on "
                "without the penalty, call remove() on what penalize returned"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"penalty: momentum={self.momentum}: from 0 to below 1")
        whole = len(self.early) == 2 and all(type(query) is int for query in self.early)
        if not whole or not self.window <= self.early[0] < self.early[1]:
            raise ValueError(
                f"penalty: early={self.early}: two queries, the first at least window={self.window}, rising"
            )
        if self.layers is not None and (not self.layers or any(type(layer) is not int for layer in self.layers)):
            raise ValueError(f"penalty: layers={self.layers}: indices of attention layers, or left out for all")

    @property
    def least(self) -> int:
        """Tokens that a sequence must have, so that early and late queries do not meet."""
        return 2 * self.early[1]

    def weight_after(self, steps: int) -> float:
        return self.weight * self.risen(steps)

    def risen(self, steps: int) -> float:
        """The share of both weights that is in force."""
        return min(1.0, steps / self.warmup_steps) if self.warmup_steps else 1.0

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def chosen(self, count: int) -> list[int]:
        """The layers of a model that has so many."""
        outside = [layer for layer in self.layers or () if not -count <= layer < count]
        if outside:
            raise ValueError(f"penalty: layers {outside} do not exist; this model has {count}, from 0 to {count - 1}")
        if self.layers is None and count < 2:
            raise ValueError("penalty: this model has one attention layer, which sees words only; nothing leaks there")
        return sorted({layer % count for layer in self.layers}) if self.layers is not None else list(range(1, count))


class Last(NamedTuple):
    """What the latest forward pass in training said; tensors without a graph, so that nobody waits for them."""

    penalty: Tensor
    """As it was added to the loss."""
    leakage: Tensor
    """D̄ D: an unbiased estimate of the early residual, from one batch."""
    loss: Tensor | None = None
    """Without the penalty; None where the model was given no labels."""


class Penalized:
    """A model whose leakage is penalised while it trains; as a context manager it removes the penalty at its end."""

    def __init__(self, model: nn.Module, options: Penalty) -> None:
        self.options = options
        self.steps = 0
        """Optimizer steps seen."""
        self.last: Last | None = None
        self._inner = base_model(model)
        if getattr(self._inner, "penalized", None) is not None:
            raise ValueError("this model is penalised already; call remove() on what penalize returned first")
        layers = [module for _, module in attention_layers(self._inner)]
        if not layers:
            raise ValueError(
                f"no attention layer of {type(self._inner).__name__} goes through transformers' attention interface, "
                "so the penalty has nothing to read; models with their own attention code are not supported"
            )
        self._layers = {layers[n]: n for n in options.chosen(len(layers))}
        self._mean: Tensor | None = None
        """Running mean (LHEX), biased towards 0 until `_corrected`."""
        self._known = 0
        """Steps that the mean knows."""
        self._sum: Tensor | None = None
        self._runs = 0
        self._passes = self._empty = 0
        self._penalty: Tensor | None = None
        self._plan: tuple[Any, deviations.Plan] | None = None
        self._said: Tensor | None = None
        self._device = torch.device("cpu")
        handles = layer_losses.install(self._inner, self)
        try:
            attention_function.use_interface(self._inner, layers)
        except ValueError:
            for handle in handles:
                handle.remove()
            raise
        this = weakref.ref(self)

        def stepped(*_: Any) -> None:
            alive = this()
            if alive is not None and alive._passes:
                alive.step()

        self._inner.penalized = self  # type: ignore[assignment]
        self._handles = [*handles, register_optimizer_step_post_hook(stepped)]

    def penalty(self) -> Tensor:
        """The penalty of the latest forward pass, weighted, with its graph; for a loss that you compute yourself.

        It is in `outputs.loss` already where the model was given labels.
        """
        if self.last is None:
            raise RuntimeError("there is no penalty yet: call the model in training mode first")
        return self.last.penalty if self._penalty is None else self._penalty

    @property
    def weight(self) -> float:
        """Of the residual, in force now."""
        return self.options.weight_after(self.steps)

    def step(self) -> None:
        """End an optimizer step. Called by itself when a torch optimizer steps; yours to call where none does."""
        total, runs = self._over_ranks()
        if total is not None and runs:
            now = total / runs
            before = torch.zeros_like(now) if self._mean is None else self._mean
            # A step that overflowed in half precision is skipped by its scaler, and must not stay in the mean.
            moved = self.options.momentum * before + (1 - self.options.momentum) * now
            self._mean = torch.where(now.isfinite(), moved, before)
            self._known += 1
        self._sum, self._runs, self._passes = None, 0, 0
        self.steps += 1

    def remove(self) -> None:
        """Take the penalty off: the model is as it was before `penalize`, but for what it learned."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._penalty = None
        if getattr(self._inner, "penalized", None) is self:
            del self._inner.penalized
            attention_function.leave([layer for _, layer in attention_layers(self._inner)])

    def callback(self) -> TrainerCallback:
        """For transformers' Trainer: logs the penalty beside the loss, and keeps the running mean in checkpoints."""
        from ropemods.penalty_callback import PenaltyCallback

        return PenaltyCallback(self)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, as named tensors; `load` takes it back."""
        progress = {"progress": torch.tensor([self.steps, self._known])}
        return progress if self._mean is None else {"mean": self._mean, **progress}

    def load(self, state: dict[str, Tensor]) -> None:
        mean = state.get("mean")
        if mean is not None and mean.shape[-1] != self._columns:
            raise ValueError(
                f"penalty: the running mean of this checkpoint has {mean.shape[-1]} columns, and window and total make "
                f"{self._columns}; go on with the window of its run, and with a total where it had one"
            )
        self.steps, self._known = state["progress"].tolist()
        self._mean = mean
        self._sum, self._runs, self._passes = None, 0, 0

    def __enter__(self) -> Penalized:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Penalized:
        return self  # an average of the model, say, which is a copy that does not train

    # What model/layer_losses.py asks of the owner of a pass.

    def begin(self, runs: Callable[..., Sequence[tuple[int, int, int]]], device: torch.device) -> Pass | None:
        self._penalty, self._device = None, device
        self._passes += 1
        if self._passes > STEPLESS_PASSES:
            raise RuntimeError(
                f"{STEPLESS_PASSES} batches went by without an optimizer's step, so the penalty never learned what "
                "leaks; call penalized.step() after each step, if your optimizer is not a torch optimizer"
            )
        options = self.options
        found = tuple(runs(least=options.least))
        if not found:
            self._empty += 1
            if self._empty >= EMPTY_PASSES:
                raise ValueError(
                    f"{EMPTY_PASSES} batches in a row held no sequence of {options.least} tokens or more, so nothing "
                    f"was penalised (queries {options.early[0]} to {options.early[1] - 1} are compared with the "
                    "second half); train on longer sequences, or give earlier queries, as in early=(8, 16)"
                )
            self.last = Last(*torch.zeros(2, device=device))
            return None
        self._empty = 0
        if self._plan is None or self._plan[0] != (found, device):
            made = deviations.plan(found, early=options.early, window=options.window, late=options.late, device=device)
            self._plan = (found, device), made
        weights = Weights(options.weight, options.total)
        return Pass(self._plan[1], self._layers, weights, self._corrected(device), options.risen(self.steps))

    def end(self, this: Pass) -> Tensor | None:
        found = this.deviations()
        self._sum = found * this.plan.runs if self._sum is None else self._sum + found * this.plan.runs
        self._runs += this.plan.runs
        if this.mean_LHEX is None:
            self.last = Last(*found.new_zeros(2))
            return None
        residual = (this.mean_LHEX * found)[..., : this.plan.window].mean()
        self.last = Last(this.penalty(found), residual)
        return self.last.penalty

    def left(self, penalty: Tensor) -> None:
        self._penalty = penalty

    def with_penalty(self, loss: Tensor, share: Tensor | float) -> Tensor:
        assert self.last is not None
        last = self.last = self.last._replace(loss=loss.detach(), penalty=self.last.penalty * share)
        said = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=loss.device) for x in (*last[:2], share, 1)])
        self._said = said if self._said is None else self._said + said
        return loss if self._penalty is None else loss + (self._penalty * share).to(loss.device)

    def said(self) -> dict[str, float]:
        """Means since this was last asked: the penalty in the loss, and the leakage."""
        if self._said is None:
            return {}
        (penalty, leakage, shares, count), self._said = self._said.tolist(), None
        return {"penalty": penalty / max(shares, 1e-30), "leakage": leakage / count}

    @property
    def _columns(self) -> int:
        """Of deviations: an offset each, and the denominators' where the total counts."""
        return self.options.window + (self.options.total > 0)

    def _corrected(self, device: torch.device) -> Tensor | None:
        if self._mean is None or self.options.risen(self.steps) == 0:
            return None
        return (self._mean / (1 - self.options.momentum**self._known)).to(device)

    def _over_ranks(self) -> tuple[Tensor | None, int]:
        """The sum of this step's deviations and the runs it is over; a rank without any takes part too."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._sum, self._runs
        total = self._sum
        if total is None:
            layer = next(iter(self._layers))
            shape = (len(self._layers), heads_of(layer), self.options.early[1] - self.options.early[0])
            total = torch.zeros(*shape, self._columns, device=self._device)
        runs = torch.tensor([float(self._runs)], device=total.device)
        dist.all_reduce(total)
        dist.all_reduce(runs)
        return total, int(runs)


def penalize(
    model: nn.Module,
    *,
    weight: float,
    total: float = 0.0,
    warmup_steps: int = 0,
    layers: Sequence[int] | None = None,
    early: tuple[int, int] = (8, 64),
    window: int = 8,
    late: int = 32,
    momentum: float = 0.9,
) -> Penalized:
    """Add weight × the early residual leakage of every training batch, and total × the early total, to the model's
    loss, until `remove()`.

    The arguments are the fields of `Penalty`, which says what each means.
    """
    options = Penalty(
        weight=weight,
        total=total,
        warmup_steps=warmup_steps,
        layers=None if layers is None else tuple(layers),
        early=early,
        window=window,
        late=late,
        momentum=momentum,
    )
    return Penalized(model, options)
