"""Which sequences a batch holds is what its mask and positions say to transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ropemods as rm
from ropemods.attention.rows import shown
from ropemods.model import bos
from ropemods.mods import AdaptiveTemperature, LearnedSink, ReplacedBos, TruncatedRoPE, UnrotatedBos
from tests import zoo
from tests.contract import close

MODS = {"sink": LearnedSink(init=0.3), "unrotated": UnrotatedBos(), "replaced": ReplacedBos("noise")}


@pytest.fixture(params=MODS, ids=list(MODS))
def model(request):
    return rm.apply(zoo.build(), MODS[request.param])


def blocks(*lengths: int) -> Tensor:
    """A mask (1, 1, T, T) that shows each token its own sequence."""
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()[None, None]


def additive(mask: Tensor, hidden: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


def two() -> tuple[Tensor, Tensor, Tensor]:
    a, b = zoo.tokens(rows=1, length=5, seed=1), zoo.tokens(rows=1, length=7, seed=2)
    return a, b, torch.cat([a, b], dim=1)


@pytest.mark.parametrize("hidden", [None, -1e4, -1e9, torch.finfo(torch.float32).min, float("-inf")])
@torch.no_grad()
def test_a_block_mask_keeps_sequences_apart_whatever_the_positions(model, hidden) -> None:
    a, b, packed = two()
    mask = blocks(5, 7) if hidden is None else additive(blocks(5, 7), hidden)
    logits = model(packed, attention_mask=mask).logits
    close(logits[:, :5], model(a).logits, 5e-5)
    close(logits[:, 5:], model(b).logits, 5e-5)


@torch.no_grad()
def test_sequences_that_take_turns_in_a_row_are_told_apart_by_their_mask(model) -> None:
    a, b, _ = two()
    b, turn = b[:, :5], torch.arange(10) % 2
    mixed = torch.stack([a, b], -1).reshape(1, 10)
    mask = ((turn[:, None] == turn) & torch.ones(10, 10).tril().bool())[None, None]
    positions = torch.arange(5).repeat_interleave(2)[None]
    logits = model(mixed, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(logits[:, ::2], model(a).logits, 5e-5)
    close(logits[:, 1::2], model(b).logits, 5e-5)


@torch.no_grad()
def test_branches_of_one_prompt_have_its_bos(model) -> None:
    """As in tree attention: two continuations of four tokens, neither of which sees the other."""
    prompt, one, other = zoo.tokens(rows=1, length=5), *torch.randint(3, 61, (2, 1, 4)).unbind()
    mask = torch.ones(13, 13).tril().bool()
    mask[9:, 5:9] = False
    positions = torch.cat([torch.arange(9), torch.arange(5, 9)])[None]
    tree = torch.cat([prompt, one, other], 1)
    logits = model(tree, attention_mask=mask[None, None], position_ids=positions, use_cache=False).logits
    close(logits[:, 5:9], model(torch.cat([prompt, one], 1)).logits[:, 5:], 5e-5)
    close(logits[:, 9:], model(torch.cat([prompt, other], 1)).logits[:, 5:], 5e-5)


def test_a_window_is_followed_back_to_the_bos() -> None:
    """Of two sequences, with a window of three, padding in front, and a cache that has forgotten four tokens."""
    mask = blocks(2, 6, 9)[0]
    mask &= ~torch.ones(17, 17).tril(-3).bool()
    mask[:, :2] = False
    wanted = torch.tensor([[-1] * 2 + [2] * 6 + [8] * 9])
    assert torch.equal(bos.by_visibility(mask, 0), wanted)
    assert (bos.by_visibility(mask[:, 10:, 4:], 10) < 10).all()  # of the cache, which remembers


@pytest.mark.parametrize("step", [-11, 0, 40])
@torch.no_grad()
def test_positions_that_jump_keep_sequences_apart_as_in_transformers(model, step: int) -> None:
    a, b, packed = two()
    positions = torch.cat([torch.arange(5) + 20, torch.arange(7) + 24 + step])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits
    close(logits[:, :5], model(a).logits, 5e-5)
    close(logits[:, 5:], model(b).logits, 5e-5)


def test_a_sequence_behind_a_jump_needs_its_bos(model) -> None:
    positions = torch.cat([torch.arange(5), torch.arange(30, 37)])[None]
    with pytest.raises(ValueError, match="begins at column 5 with token"):
        model(zoo.tokens(rows=1), position_ids=positions, use_cache=False)


@torch.no_grad()
def test_a_jump_under_a_mask_is_one_sequence_as_in_transformers(model) -> None:
    ids = zoo.tokens(rows=1)
    positions = torch.cat([torch.arange(5), torch.arange(30, 37)])[None]
    logits = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
    mask = torch.ones(12, 12).tril().bool()[None, None]
    close(logits, model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits, 5e-5)


@torch.no_grad()
def test_a_hole_in_a_mask_hides_a_token_and_begins_nothing(model) -> None:
    ids = zoo.tokens()
    mask = torch.ones_like(ids)
    mask[:, 4] = 0
    inside = torch.ones(12, 12).tril().bool()
    inside[:, 4] = False
    real = mask.bool()
    wanted = model(ids, attention_mask=inside[None, None], use_cache=False).logits
    close(model(ids, attention_mask=mask, use_cache=False).logits[real], wanted[real], 5e-5)


def test_sequences_with_padding_between_them_are_refused(model) -> None:
    _, _, packed = two()
    mask = torch.ones_like(packed)
    mask[:, 4] = 0
    with pytest.raises(ValueError, match="packs several sequences"):
        model(packed, attention_mask=mask)


def test_a_block_mask_over_a_sequence_without_bos_is_refused(model) -> None:
    with pytest.raises(ValueError, match="begins at column 5 with token"):
        model(zoo.tokens(rows=1), attention_mask=blocks(5, 7))


EVERY = MODS | {"temperature": AdaptiveTemperature(), "spared": AdaptiveTemperature(spare_bos=True)}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("options", [{"attention_mask": torch.ones(1, 12)}, {"use_cache": True}], ids=["mask", "cache"])
def test_packed_sequences_that_would_read_each_other_are_refused(name: str, options: dict) -> None:
    model = rm.apply(zoo.build(), EVERY[name])
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(ValueError, match=r"packs several sequences.*attention_mask=None and use_cache=False"):
        model(two()[2], position_ids=positions, **options)
    with pytest.raises(ValueError, match="packs several sequences"):
        model.model(two()[2], position_ids=positions, **options)


def test_positions_that_padding_repeats_are_no_packing() -> None:
    """As `generate` makes them: 1 at the padding, and then from 0."""
    model = rm.apply(zoo.build(), AdaptiveTemperature())
    ids, mask = zoo.tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    close(logits[:1, 3:], model(ids[:1, 3:]).logits, 5e-5)


def test_a_model_whose_attention_is_stock_refuses_no_batch() -> None:
    _, _, packed = two()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    inputs = {"position_ids": positions, "attention_mask": torch.ones_like(packed)}
    wanted = zoo.build()(packed, **inputs).logits
    assert torch.equal(rm.apply(zoo.build(), AdaptiveTemperature(), strength=0.0)(packed, **inputs).logits, wanted)
    rm.apply(zoo.build(), TruncatedRoPE(0.5))(packed, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.long])
def test_every_way_to_hide_a_key_is_known(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        assert shown(torch.tensor([1, 0], dtype=dtype)).tolist() == [True, False]
        return
    values = torch.tensor([0.0, -3.0, -9000.0, -1e4, -3e4, torch.finfo(dtype).min, float("-inf")], dtype=dtype)
    assert shown(values).tolist() == [True] * 3 + [False] * 4
