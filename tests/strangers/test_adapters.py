"""PEFT adapters of any kind, put on in any order, and all that is done with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.strangers.uses import Subject, use


def config(kind: str, model: Any, *, keep: bool) -> Any:
    """An adapter's config, which does something from the start; `keep` saves the modifications' own values with it."""
    attached = getattr(model, "ropemods_attached", None)
    own = attached is not None and any(mod.must_be_saved for mod in attached.mods)
    more: dict[str, Any] = {"modules_to_save": ["ropemods"]} if keep and own else {}
    embedding = next(
        name.rpartition(".")[2] for name, module in model.named_modules() if module is model.get_input_embeddings()
    )
    if kind == "tokens":
        return LoraConfig(
            r=2, target_modules="all-linear", trainable_token_indices=[1, 5], init_lora_weights=False, **more
        )
    targets = [embedding] if kind == "embedding" else "all-linear"
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more)


@use(
    every=False,
    kind=("lora", "embedding", "tokens"),
    order=("before", "after"),
    then=("save", "merge", "disable", "second", "native", "trained"),
)
def test_an_adapted_model_stays_what_it_is(subject: Subject, kind: str, order: str, then: str) -> Iterator[Tensor]:
    """`order`: modifications are put on before the adapter, or after it."""
    ids = subject.ids()
    model = subject.load_stock()
    if order == "before":
        model = subject.modified(model)
    torch.manual_seed(1)
    if then == "native":
        model.add_adapter(config(kind, model, keep=False))
        wrapped: Any = model
    else:
        wrapped = get_peft_model(model, config(kind, model, keep=True))
    if order == "after":
        wrapped = subject.modified(wrapped)
    if then == "second":
        wrapped.add_adapter("second", config(kind, model, keep=False))
        wrapped.set_adapter("second")
    if then == "trained":
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            wrapped.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    wrapped.eval()
    said = wrapped(ids).logits.detach()
    if then in ("save", "second", "native", "trained"):
        folder = subject.saved(wrapped, "adapter")
        yield loaded(subject, folder / "second" if then == "second" else folder)(ids).logits
    elif then == "merge":
        yield wrapped.merge_and_unload()(ids).logits
    else:
        with wrapped.disable_adapter():
            yield wrapped(ids).logits
        said = subject.modified(subject.load_stock())(ids).logits
    yield said


def loaded(subject: Subject, folder: Any) -> Any:
    if subject.mod is None:
        return PeftModel.from_pretrained(subject.load_stock(), folder).eval()
    return subject.load(folder).eval()
