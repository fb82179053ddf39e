"""Weights that are elsewhere: offloaded to memory or disk, placed by a device map, not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor

from tests.strangers.uses import Subject, use


def placed(subject: Subject, model: Any, where: str) -> Any:
    if where == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if where == "disk":
        return disk_offload(model, subject.folder / "weights", execution_device=torch.device("cpu"))
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@use(
    every=False,
    where=("cpu", "disk", "dispatched"),
    order=("apply first", "place first"),
    then=("read", "generate", "copy", "strength"),
)
@torch.no_grad()
def test_a_model_whose_weights_are_elsewhere(subject: Subject, where: str, order: str, then: str) -> Iterator[Tensor]:
    import ropemods as rm

    ids, at_hand = subject.ids(), subject.model()
    if order == "apply first":
        model = placed(subject, subject.model(), where)
    else:
        model = subject.modified(placed(subject, subject.stock(), where))
    if then == "generate":
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        yield model.generate(ids, **options)
        yield at_hand.generate(ids, **options)
        return
    if then == "strength" and subject.mod is not None:
        for each in (model, at_hand):
            rm.set_strength(each, 0.4)
    if then == "copy":
        model.save_pretrained(subject.folder / "copy")
        model = subject.load(subject.folder / "copy")
    yield model(ids).logits
    yield at_hand(ids).logits


@use(every=False, way=("device map", "low memory", "meta", "offload folder"), strength=(0.5, 1.0))
@torch.no_grad()
def test_a_model_that_is_loaded_in_pieces(subject: Subject, way: str, strength: float) -> Iterator[Tensor]:
    model, ids = subject.model(strength), subject.ids()
    folder = subject.saved(model)
    if way == "meta":
        with init_empty_weights():
            empty = subject.modified(type(model)(subject.stock().config), strength)
        loaded = load_checkpoint_and_dispatch(empty, str(folder), device_map={"": "cpu"})
    elif way == "offload folder":
        names = {name.split(".")[0] for name, _ in model.named_parameters()}
        places = {name: "disk" if n == 0 else "cpu" for n, name in enumerate(sorted(names))}
        loaded = subject.load(folder, device_map=places, offload_folder=str(subject.folder / "weights"))
    else:
        loaded = subject.load(folder, **({"device_map": "cpu"} if way == "device map" else {"low_cpu_mem_usage": True}))
    yield loaded(ids).logits
    yield model(ids).logits
