"""Several models, or one, in several threads: what each does alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import ropemods as rm
from tests.strangers.uses import Subject, use

THREADS = 3


def together(jobs: list[Callable[[], Tensor]]) -> Tensor:
    """All at once, each a few times; the first error is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        return torch.cat([each.result() for each in [pool.submit(job) for job in jobs]])


@use(
    every=False,
    what=(
        "forward one",
        "forward several",
        "apply",
        "apply beside stock",
        "load",
        "generate",
        "strength",
        "remove",
        "train",
    ),
)
def test_threads_give_what_one_after_the_other_gives(subject: Subject, what: str) -> Iterator[Tensor]:
    one, folder = subject.model(), None
    texts = [subject.ids(seed=n) for n in range(THREADS)]
    if what == "load":
        folder = subject.saved(one)

    def job(n: int) -> Callable[[], Tensor]:
        ids = texts[n]

        def run() -> Tensor:
            with torch.set_grad_enabled(what == "train"):
                if what == "forward one":
                    return one(ids, use_cache=False).logits
                if what == "load":
                    assert folder is not None
                    with alone:
                        loaded = subject.load(folder)
                    return loaded(ids).logits
                if what == "apply beside stock" and n % 2:
                    return subject.stock()(ids).logits
                model = models[n] if what == "forward several" else subject.model()
                if what == "generate":
                    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                    return model.generate(ids, **options)
                if what == "strength" and subject.mod is not None:
                    rm.set_strength(model, n / 10)
                if what == "remove" and subject.mod is not None:
                    rm.remove(model)
                if what == "train":
                    model(input_ids=ids, labels=ids).loss.backward()
                    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])[None]
                return model(ids).logits

        return run

    # Two stock loads at once leave transformers without `tie_weights`; `rm.from_pretrained` sees to that itself.
    alone = threading.Lock() if subject.mod is None else contextlib.nullcontext()
    models = [subject.model() for _ in texts]
    jobs = [job(n) for n in range(len(texts))]
    yield together(jobs)
    yield torch.cat([each() for each in jobs])
