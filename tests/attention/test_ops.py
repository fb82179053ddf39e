"""The custom operators of `flash` as torch's tools see them: opcheck, compilation, recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropemods.attention import flash
from ropemods.attention.slots import Slots

ops = torch.ops.ropemods


def inputs(
    dtype: torch.dtype = torch.float32, *, groups: int = 2, queries: int = 9, keys: int = 9
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and two slots' logits and values, all with gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes = (1, 4, queries, 8), (1, groups, keys, 8), (1, groups, keys, 8), (2, 1, 4, queries), (2, 4, 8)
    q, k, v, logit, value = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v, logit, value


def hidden(queries: int, keys: int) -> Tensor:
    return torch.zeros(1, 1, queries, keys).masked_fill(torch.rand(queries, keys) < 0.3, float("-inf"))


def tempered(q: Tensor, k: Tensor, v: Tensor, logit: Tensor, value: Tensor) -> Tensor:
    """Both operators, one behind the other."""
    entropy = flash.row_entropy(q, k, mask=None, causal=True, scale=0.3)
    rows = q * entropy.unsqueeze(-1), k, v
    out, _ = flash.attend_with_slots(*rows, Slots(logit, value), mask=None, causal=True, scale=0.3)
    return out


def gradients(function, *leaves: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(function(*leaves).square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_finds_nothing(dtype: torch.dtype, masked: bool) -> None:
    q, k, v, logit, value = inputs(dtype, keys=12 if masked else 9)
    rest = (hidden(9, 12).to(dtype) if masked else None, not masked, 0.3)
    torch.library.opcheck(ops.row_entropy, (q, k, *rest))
    for slots in ((logit, value), (logit, None), (None, None)):
        torch.library.opcheck(ops.attend_with_slots, (q, k, v, *slots, *rest))


def test_compiled_whole_it_gives_the_same_output_and_gradients() -> None:
    leaves = inputs()
    compiled = torch.compile(tempered, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), tempered(*leaves))
    torch.testing.assert_close(gradients(compiled, *leaves), gradients(tempered, *leaves))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward_pass_it_gives_the_same_gradients(reentrant: bool) -> None:
    leaves = inputs()
    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    checkpoint(tempered, *again, use_reentrant=reentrant).square().sum().backward()
    for found, wanted in zip(again, gradients(tempered, *leaves), strict=True):
        assert torch.equal(found.grad, wanted)


def test_gradients_equal_finite_differences() -> None:
    leaves = inputs(torch.float64, queries=3, keys=3)
    assert torch.autograd.gradcheck(tempered, leaves)


def test_slots_without_gradient_get_none() -> None:
    q, k, v, logit, value = inputs()
    slots = Slots(logit.detach(), value.detach())
    out, lse = flash.attend_with_slots(q, k, v, slots, mask=None, causal=True, scale=0.3)
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("keys", [1, 9, 16, 33])
@pytest.mark.parametrize("shape", ["one row", "every row", "turned"])
def test_a_mask_is_handed_to_the_memory_efficient_kernel_as_it_reads_one(keys: int, shape: str) -> None:
    """It refuses a mask that is not of every head, or whose rows do not begin at multiples of 16 numbers."""
    q, k = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, keys, 8)
    mask = torch.randn(2, 1, 1 if shape == "one row" else 5, keys)
    if shape == "turned":
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    found = flash.aligned(mask, q, k)
    assert found is not None and found.shape == (2, 4, 5, keys) and torch.equal(found, mask.expand(2, 4, 5, keys))
    assert all(stride % 16 == 0 for stride in found.stride()[:3]) and (keys == 1 or found.stride(3) == 1)
    assert found.untyped_storage().nbytes() <= 4 * 2 * 5 * (keys + 16)
