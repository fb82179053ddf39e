"""What people do to a model that they have: cast, copy, pickle, switch, resize. It stays what it was, or says no."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.strangers.uses import Subject, use


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def reread(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    return model


def another_embedding(model: Any) -> Any:
    old = model.get_input_embeddings()
    new = type(old)(old.num_embeddings, old.embedding_dim, old.padding_idx)
    if hasattr(old, "scalar_embed_scale"):
        new = copy.deepcopy(old)
    new.weight = old.weight
    model.set_input_embeddings(new)
    return model


def set_implementation(model: Any, name: str) -> Any:
    model.set_attn_implementation(name)
    return model


def set_in_config(model: Any) -> Any:
    model.config._attn_implementation = model.config._attn_implementation.removeprefix("ropemods+")
    return model


def checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model.train().eval()


def resized(model: Any) -> Any:
    model.resize_token_embeddings(80, mean_resizing=False)
    model.resize_token_embeddings(61)
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "state dict": reread,
    "half and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "double and back": lambda model: model.double().float(),
    "to cpu": lambda model: model.to("cpu"),
    "train and eval": lambda model: model.train().eval(),
    "frozen": lambda model: model.requires_grad_(False),
    "tied again": lambda model: model.tie_weights() or model,
    "same implementation": lambda model: set_implementation(model, model.config._attn_implementation.split("+")[-1]),
    "eager": lambda model: set_implementation(model, "eager"),
    "implementation in config": set_in_config,
    "another embedding": another_embedding,
    "resized": resized,
    "checkpointing": checkpointing,
    "shared memory": lambda model: model.share_memory(),
    "data parallel": torch.nn.DataParallel,
}


@use(every=False, way=tuple(WAYS), strength=(0.0, 1.0))
@torch.no_grad()
def test_a_model_that_something_was_done_to(subject: Subject, way: str, strength: float) -> Iterator[Tensor]:
    """At strength 0 it is stock done the same to; above it is what it was, as far as its weights are."""
    ids = subject.ids()
    model = subject.model(strength)
    said = model(ids).logits
    if "back" in way:  # the weights are rounded once, which stock's are too
        half = torch.bfloat16 if "half" in way else torch.float32
        for parameter in model.parameters():
            parameter.copy_(parameter.to(half))
        said = model(ids).logits
    yield WAYS[way](model)(input_ids=ids).logits
    yield WAYS[way](subject.stock())(input_ids=ids).logits if strength == 0.0 else said


@use(every=False, dtype=("bfloat16", "float16", "float64"), how=("cast", "autocast"), strength=(0.0, 1.0))
@torch.no_grad()
def test_a_model_in_another_precision(subject: Subject, dtype: str, how: str, strength: float) -> Iterator[Tensor]:
    """It errs at most twice as much as stock does in it; the answer here is that excess."""
    ids, kind = subject.ids(), getattr(torch, dtype)

    def error(model: Any) -> Tensor:
        if how == "cast":
            half = copy.deepcopy(model).to(kind)
            exact = copy.deepcopy(half).float()
            return (half(ids).logits.float() - exact(ids).logits).square().mean().sqrt()
        with torch.autocast("cpu", dtype=kind):
            rough = model(ids).logits
        return (rough.float() - model(ids).logits).square().mean().sqrt()

    own = error(subject.model(strength))
    yield (own - 2 * error(subject.stock())).clamp(min=0)[None]
    yield torch.zeros(1)


@use(steps=("train", "train in bfloat16", "train with checkpointing", "train with autocast"))
def test_a_training_step_gives_finite_gradients_everywhere(subject: Subject, steps: str) -> Iterator[Tensor]:
    model = subject.model().train()
    if "bfloat16" in steps:
        model = model.to(torch.bfloat16)
    if "checkpointing" in steps:
        model.gradient_checkpointing_enable()
    ids = subject.ids()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    yield torch.tensor([len(missing)])
    yield torch.tensor([0])
