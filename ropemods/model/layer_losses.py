"""A number that is trained on and read inside the attention layers: how it gets out of them, and its gradient in.

A forward pass in training carries a `Pass` to its attention layers, as a keyword argument, like what `model_inputs`
finds. The layers hand it their rows; the decoder's exit turns what was read into the penalty. The gradient comes back
the same way. Two identities in the graph do that:

    exit     hidden states and penalty leave one node together, so its backward knows how much the penalty counts,
             whatever became of the loss since (accumulation, loss scaling, a factor of yours), and before any layer
    layer    queries and keys pass through a node that adds the penalty's gradient to theirs

So nothing in between has to know. A layer that is recomputed (gradient checkpointing, reentrant or not) is given the
Pass of its own forward pass, reads nothing again and gets its gradient once; parameters may be sharded or adapted,
since the gradient enters at queries and keys, not at weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ropemods.attention.rows import Rows
from ropemods.model import deviations, whole_rows
from ropemods.model.attention_layers import entrances
from ropemods.model.deviations import Plan, Read
from ropemods.model.sequences import runs_of

PASS = "ropemods_pass"
BIASES = {"KeyBias", "OffsetBias"}
"""Terms that act on single logits of a row, and that only whole rows show."""
AT_ONCE = 1 << 24
"""Numbers of the keys' windows that are worked on together."""


class Weights(NamedTuple):
    """Nats of loss for one nat² of 2 × the residual, and of 2 × the total."""

    residual: float
    total: float


class Pass:
    """One forward pass in training: what was read of its layers, and the gradient on its way back to them."""

    def __init__(
        self,
        plan: Plan,
        layers: dict[nn.Module, int],
        weights: Weights,
        mean_LHEX: Tensor | None,
        risen: float,
    ) -> None:
        """`mean_LHEX` is what is multiplied with this batch's deviations, a constant; None where nothing is penalised
        yet. `risen` is the share of the weights that is in force: what is read does not depend on it."""
        self.plan, self.layers, self.mean_LHEX = plan, layers, mean_LHEX
        self.total = weights.total > 0
        self.weight_LHEX = None if mean_LHEX is None else risen * _weight(mean_LHEX, weights, plan.window)
        self.open = True
        self.seen: dict[int, Read] = {}
        self.whole: dict[int, Rows] = {}
        """Layers of which whole rows are read."""
        self.put_back: dict[int, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]] = {}
        """What adds the penalty's gradient to that of a layer's tensors."""

    def through(self, module: nn.Module, rows: Rows) -> Rows:
        """Read a layer's rows, and give them back with the node that brings the gradient."""
        layer = self.layers.get(module)
        if layer is None:
            return rows
        if rows.q_BHTD.shape[2] != rows.k_BGSD.shape[2]:
            raise ValueError(
                f"the penalty needs whole sequences; attention layer {layer} has {rows.q_BHTD.shape[2]} queries on "
                f"{rows.k_BGSD.shape[2]} keys. Train without a cache of earlier tokens"
            )
        wholly = self.total or bool(rows.names() & BIASES)
        if self.open:  # not when a layer is recomputed
            if layer in self.seen or layer in self.whole:
                raise ValueError(
                    f"attention layer {layer} makes several attention calls in a forward pass, and the penalty reads "
                    "one map a layer; leave it out with layers=…"
                )
            with torch.no_grad():
                if wholly:
                    self.whole[layer] = whole_rows.read(rows)
                else:
                    self.seen[layer] = deviations.read(rows, self.plan)
        if self.weight_LHEX is None:
            return rows
        way = whole_rows if wholly else deviations
        return way.with_tensors(rows, _Layer.apply(self, layer, *way.tensors(rows)))

    @torch.no_grad()
    def deviations(self) -> Tensor:
        """D of all layers, with M behind it where the total counts (LHEX), when the last has been read."""
        self.open = False
        missing = sorted(set(self.layers.values()) - set(self.seen) - set(self.whole))
        if missing:
            raise ValueError(
                f"the penalty did not reach the attention layers {missing}: this model does not hand keyword arguments "
                "down to its attention, or skipped these layers; leave them out with layers=…"
            )
        found: dict[int, Tensor] = {}
        for part in self._parts():
            found |= zip(part, self._of(part, self._stacked(part)), strict=True)
        for layer, rows in self.whole.items():
            found[layer] = whole_rows.deviations(rows, self.plan, total=self.total)
        home = found[max(found)].device
        return torch.stack([found[layer].to(home) for layer in sorted(found)])

    def penalty(self, deviations_LHEX: Tensor) -> Tensor:
        assert self.weight_LHEX is not None
        return (self.weight_LHEX * deviations_LHEX).sum()

    def send_back(self, scale: Tensor) -> None:
        """The gradient of `scale` times the penalty, made ready for every layer."""
        assert self.weight_LHEX is not None
        weight_HEX = dict(zip(sorted({*self.seen, *self.whole}), self.weight_LHEX, strict=True))
        for part in self._parts():
            with torch.enable_grad():
                stacked = [None if x is None else x.requires_grad_() for x in self._stacked(part)]
                found = self._of(part, stacked)
                value = (torch.stack([weight_HEX[layer] for layer in part]).to(found.device) * found).sum()
            wanted = [x for x in stacked if x is not None]
            grads = torch.autograd.grad(value, wanted, scale.to(value.device, value.dtype))
            for n, layer in enumerate(part):
                more = [grad[n] for grad in grads]
                self.put_back[layer] = partial(deviations.put_back, plan=self.plan, more=more)
        for layer, rows in self.whole.items():
            options = {"seen": rows, "plan": self.plan, "weight_HEX": weight_HEX[layer], "scale": scale}
            self.put_back[layer] = partial(whole_rows.put_back, **options)

    def _parts(self) -> list[list[int]]:
        """Neighbouring layers of one shape, so many that their keys' windows fit the working memory."""
        parts: list[list[int]] = []
        for layer in sorted(self.seen):
            one = self.seen[layer]
            most = AT_ONCE // (one.k_NCGD[0, 0].numel() * self.plan.query_NQ.numel() * self.plan.window)
            if parts and len(parts[-1]) < most and _alike(self.seen[parts[-1][0]], one):
                parts[-1].append(layer)
            else:
                parts.append([layer])
        return parts

    def _stacked(self, part: list[int]) -> list[Tensor | None]:
        q_L, k_L, beta_L = zip(*(self.seen[layer][:3] for layer in part), strict=True)
        return [torch.stack(q_L), torch.stack(k_L), None if beta_L[0] is None else torch.stack(beta_L)]

    def _of(self, part: list[int], stacked: list[Tensor | None]) -> Tensor:
        q_LNQHD, k_LNCGD, beta_LNQH = stacked
        assert q_LNQHD is not None and k_LNCGD is not None
        with torch.autocast(q_LNQHD.device.type, enabled=False):
            return deviations.deviations(q_LNQHD, k_LNCGD, beta_LNQH, self.seen[part[0]], self.plan)


def _weight(mean_LHEX: Tensor, weights: Weights, window: int) -> Tensor:
    """What a penalty is the sum of, times the deviations: of 2 D̄ D, a mean over layers, heads, queries and offsets,
    and of 2 (D̄ + M̄) (D + M)."""
    D_LHEW, M_LHEx = mean_LHEX.split((window, mean_LHEX.shape[-1] - window), -1)
    weight_LHEX = weights.residual * D_LHEW
    if weights.total:
        T_LHEW = D_LHEW + M_LHEx
        whole_LHEX = torch.cat((T_LHEW, T_LHEW.sum(-1, keepdim=True)), -1)
        weight_LHEX = torch.cat((weight_LHEX, torch.zeros_like(M_LHEx)), -1) + weights.total * whole_LHEX
    return weight_LHEX * (2 / D_LHEW.numel())


def _alike(one: Read, other: Read) -> bool:
    return (one.scale, one.softcap, *((x.shape, x.device) for x in one.tensors)) == (
        other.scale, other.softcap, *((x.shape, x.device) for x in other.tensors)
    )  # fmt: skip


class _Layer(torch.autograd.Function):
    """What a layer's logits are made of, as it is; on the way back the penalty's gradient joins its own."""

    @staticmethod
    def forward(ctx: Any, this: Pass, layer: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.this, ctx.layer = this, layer
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        put_back = ctx.this.put_back.pop(ctx.layer, None)
        return None, None, *(grads if put_back is None else put_back(grads))


class _Exit(torch.autograd.Function):
    """Hidden states as they are, and the penalty; on the way back it knows what the penalty counts for."""

    @staticmethod
    def forward(ctx: Any, this: Pass, value: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ctx.this, ctx.like = this, (hidden.shape, hidden.dtype, hidden.device)
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden), value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hidden: Tensor | None, scale: Tensor | None) -> tuple[None, None, Tensor]:
        if scale is None:
            raise RuntimeError(
                "the penalty of this forward pass is in no loss, so it would not train. The model adds it to its own "
                "loss where it is given labels; to a loss of your own add penalized.penalty(), "
                "the tensor of the latest pass (label smoothing and compute_loss_func in Trainer are such losses)"
            )
        ctx.this.send_back(scale)
        if hidden is None:
            shape, dtype, device = ctx.like
            hidden = torch.zeros(shape, dtype=dtype, device=device)
        return None, None, hidden


class Owner(Protocol):
    """What decides about the passes of a model."""

    def begin(self, runs: Callable[..., Sequence[tuple[int, int, int]]], device: torch.device) -> Pass | None: ...

    def end(self, this: Pass) -> Tensor | None:
        """Take note of a pass, and return its penalty's value where it has one."""

    def left(self, penalty: Tensor) -> None:
        """Take the penalty with its graph."""

    def with_penalty(self, loss: Tensor, share: Tensor | float) -> Tensor:
        """The loss with the penalty."""


def install(model: PreTrainedModel, owner: Owner) -> list:
    """Hook the decoder and the model around it; returns what removes the hooks."""
    decoder = entrances(model)[-1]
    parameters = inspect.signature(type(decoder).forward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"{type(decoder).__name__} takes no keyword arguments for its attention layers, so the penalty cannot "
            "reach them; models like this are not supported"
        )
    names = list(parameters)[1:]

    @torch.compiler.disable
    def before(entrance: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if not (entrance.training and torch.is_grad_enabled()):
            return None
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        this = owner.begin(lambda **options: runs_of(model, given, **options), tokens.device)
        return None if this is None else (args, kwargs | {PASS: this})

    @torch.compiler.disable
    def after(entrance: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
        this = kwargs.get(PASS)
        if this is None:
            return None
        value = owner.end(this)
        if value is None:
            return None
        hidden, penalty = _Exit.apply(this, value, output[0])
        owner.left(penalty)
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output["last_hidden_state"] = hidden
        return output

    @torch.compiler.disable
    def add(entrance: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
        if not (entrance.training and torch.is_grad_enabled()) or kwargs.get("labels") is None:
            return None
        loss = output[0] if isinstance(output, tuple) else output["loss"]
        loss = owner.with_penalty(loss, share_of(kwargs))
        if isinstance(output, tuple):
            return loss, *output[1:]
        output["loss"] = loss
        return output

    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]
    return handles if decoder is model else [*handles, model.register_forward_hook(add, with_kwargs=True)]


def share_of(given: dict[str, Any]) -> Tensor | float:
    """This batch's share of the loss of an optimizer step.

    A mean over the batch is 1: whoever accumulates divides. transformers' Trainer hands `num_items_in_batch` down
    instead, of all batches and ranks together, by which the model divides a sum; then the penalty counts by the same
    tokens, and a step's batches add up to the mean of their penalties, not to its multiple.
    """
    items = given.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = given.get("shift_labels")
    labels = given["labels"][..., 1:] if shifted is None else shifted
    return labels.ne(-100).sum() / items
