"""Refusing a batch for what its values are, also from inside a compiled or exported graph.

A graph that is being traced has no values to look at. There the question becomes an operation of the graph: it hands
on what it was given, so that nothing can leave it out, and raises when the graph runs, with the words that an
uncompiled model would have used.

Asking waits for the device. Once a prompt has been read, where every decoded token would wait, and while a CUDA graph
is recorded, which may not wait, the question is left with the device: an assertion there, which on CUDA ends the
process's use of the device and has only general words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import custom_op

from ropemods.model import bos

GENERAL = (
    "ropemods: the tokens of this call do not continue what its cache holds, or a sequence does not begin with the "
    "BOS token; run the same call on a CPU (or with its prompt, uncompiled) to be told which"
)


def checked(value: Tensor, problem: Tensor, column: Tensor, token: Tensor, bos_token_id: int, *, decodes: bool):
    """`value`, or an error where a row has a problem (see `bos.complaint`)."""
    if is_compiling():
        return _checked(value, problem, column, token, bos_token_id, decodes)
    _check(problem, column, token, bos_token_id, decodes)
    return value


def _check(problem: Tensor, column: Tensor, token: Tensor, bos_token_id: int, decodes: bool) -> None:
    cuda = problem.device.type == "cuda"
    if cuda and (decodes or torch.cuda.is_current_stream_capturing()):
        torch._assert_async((problem == bos.FINE).all(), GENERAL)
        return
    reason = bos.complaint(problem, column, token, bos_token_id)
    if reason is not None:
        raise ValueError(reason)


@custom_op("ropemods::checked", mutates_args=())
def _checked(value: Tensor, problem: Tensor, column: Tensor, token: Tensor, bos_token_id: int, decodes: bool) -> Tensor:
    _check(problem, column, token, bos_token_id, decodes)
    return value.clone()


@_checked.register_fake
def _like_value(
    value: Tensor, problem: Tensor, column: Tensor, token: Tensor, bos_token_id: int, decodes: bool
) -> Tensor:
    return torch.empty_like(value)
