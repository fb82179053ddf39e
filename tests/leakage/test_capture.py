"""Reading a model's attention: what is kept agrees with attention written out, and the model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import ropemods as rm
from ropemods.attention import eager
from ropemods.attention.rows import Rows
from ropemods.leakage import reading
from ropemods.leakage.capture import capture, losses
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import read_documents
from ropemods.leakage.interventions import plain
from ropemods.leakage.protocol import Protocol
from ropemods.model.attention_function import observed
from ropemods.model.casts import in_dtype
from ropemods.model.observation import observing
from tests import zoo
from tests.leakage.small import PROTOCOL, documents, tokenizer
from tests.leakage.synthetic import LargestTensor, band_of

MODS = {
    "none": (),
    "truncated_rope": (rm.TruncatedRoPE(0.5),),
    "temperature": (rm.AdaptiveTemperature(),),
    "temperature, BOS spared": (rm.AdaptiveTemperature(spare_bos=True),),
    "replaced_bos": (rm.ReplacedBos("mean"),),
    "unrotated_bos": (rm.UnrotatedBos(),),
    "learned_sink": (rm.LearnedSink(init=0.5),),
    "all": (
        rm.TruncatedRoPE(0.5),
        rm.AdaptiveTemperature(),
        rm.ReplacedBos("noise"),
        rm.UnrotatedBos(),
        rm.LearnedSink(init=0.3, read_bos=True),
    ),
}
GRID = Protocol(length=32, early=(8, 16), grid_rows=24, groups=8, sequences=8)


def seen(model: torch.nn.Module) -> Iterator[tuple[Rows, Tensor]]:
    """The rows and denominators of every layer on one batch."""
    found: list[tuple[Rows, Tensor]] = []
    ids = zoo.tokens(rows=3, length=GRID.length)
    with (
        torch.no_grad(),
        observing(model),
        observed(lambda s, r, c, lse: found.append((r, lse)), of=model, want_lse=True),
    ):
        model(input_ids=ids, use_cache=False)
    assert len(found) == 2
    yield from found


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("mods", MODS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_what_is_read_agrees_with_attention_written_out(backend: str, mods: str, strength: float) -> None:
    model = zoo.build("llama", backend)
    if MODS[mods]:
        rm.apply(model, *MODS[mods], strength=strength)
    grid = list(GRID.grid())
    for rows, lse in seen(model):
        _, p_BHTS, log_Z = eager.attend(rows)
        local, whole = reading.local(rows, lse, GRID), reading.whole(rows, lse, GRID)
        close = {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(local.lse_BHT, log_Z, **close)
        torch.testing.assert_close(whole.bos_mass_BHT, p_BHTS[..., 0], **close)
        torch.testing.assert_close(whole.position1_mass_BHT, p_BHTS[..., 1], **close)
        w = GRID.window
        # a = e^(s − log Z): from the band and log Z come the attention weights.
        weights = (local.band_BHTW - lse[..., None]).exp()[:, :, w:]
        torch.testing.assert_close(weights, band_of(p_BHTS, w)[:, :, w:], **close)
        rows_p = (whole.rows_BHRS - lse[:, :, grid, None]).exp()
        torch.testing.assert_close(rows_p, p_BHTS[:, :, grid], **close)
        keys = p_BHTS[:, :, grid] / p_BHTS[:, :, grid].sum(-1, keepdim=True)
        entropy = -(keys * keys.clamp(min=1e-30).log()).sum(-1)
        torch.testing.assert_close(whole.entropy_BHT[:, :, grid], entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "backend"), [("gemma2", "eager"), ("mistral", "eager"), ("mistral", "sdpa")])
def test_windows_and_soft_caps_are_honoured(architecture: str, backend: str) -> None:
    for rows, lse in seen(zoo.build(architecture, backend)):
        _, p_BHTS, _ = eager.attend(rows)
        whole = reading.whole(rows, lse, GRID)
        torch.testing.assert_close(whole.bos_mass_BHT, p_BHTS[..., 0], rtol=2e-5, atol=2e-5)
        hidden = p_BHTS[:, :, list(GRID.grid())] == 0
        assert torch.equal(whole.rows_BHRS == -torch.inf, hidden)


def test_the_band_does_not_see_the_mask() -> None:
    windowed = next(reading.local(*each, GRID) for each in seen(zoo.build("mistral")))
    open_ = next(reading.local(*each, GRID) for each in seen(zoo.build("mistral", sliding_window=None)))
    torch.testing.assert_close(windowed.band_BHTW, open_.band_BHTW)
    assert not torch.allclose(windowed.lse_BHT, open_.lse_BHT)


def test_attention_that_is_not_causal_is_refused() -> None:
    q = torch.randn(1, 2, 16, 8)
    rows = Rows(q, q, q, mask=None, causal=False, scale=0.3)
    assert "not causal" in str(reading.complaint(rows))
    bias = torch.zeros(1, 1, 16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), torch.finfo(torch.float32).min)
    assert reading.complaint(rows._replace(mask=bias)) is None
    assert "ALiBi" in str(reading.complaint(rows._replace(mask=bias - torch.arange(16) * 0.1)))
    assert "cache" in str(reading.complaint(rows._replace(q_BHTD=q[:, :, :4])))


def state(model: torch.nn.Module) -> dict[str, object]:
    """Everything that could betray that a model was measured."""
    return {
        "names": [{name for name in vars(module)} for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "objects": [id(p) for p in model.parameters()],
        "attention": model.config._attn_implementation,
        "training": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize(("architecture", "backend"), zoo.pairs())
@pytest.mark.parametrize("fails", [False, True])
def test_a_stock_model_is_left_bitwise_as_it_was(architecture: str, backend: str, fails: bool) -> None:
    model = zoo.build(architecture, backend).train()
    ids = zoo.tokens()
    logits = model.eval()(ids).logits
    model.train()
    before, weights = state(model), copy.deepcopy(model.state_dict())
    try:
        with in_dtype(model, torch.float64), observing(model):
            model(input_ids=ids)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(ids).logits, logits)


def test_another_dtype_keeps_ties_gradients_and_the_parameters_themselves() -> None:
    model = zoo.build("llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    model(zoo.tokens()).logits.sum().backward()
    parameters, gradients = list(model.parameters()), [p.grad for p in model.parameters()]
    with in_dtype(model, torch.float32):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.lm_head.weight, parameters[0].float())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is grad for p, grad in zip(parameters, gradients, strict=True))


def test_memory_of_one_pass_has_nothing_that_grows_with_the_square_of_the_length() -> None:
    sizes = []
    for length in (512, 1024):
        protocol = Protocol(sequences=8, length=length, groups=8, batch_size=1, replicates=100)
        crops = make_crops(read_documents(documents(1500, 8)), tokenizer(), protocol)
        with LargestTensor() as largest, observing(zoo.build("llama", max_position_embeddings=2048)) as observation:
            capture(observation, crops, protocol)
        sizes.append(largest.numel)
    assert sizes[1] <= 2.05 * sizes[0]


def test_a_batch_taken_in_parts_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = make_crops(read_documents(documents()), tokenizer(), PROTOCOL)
    model, sums = zoo.build("mistral"), []
    for at_once in (1 << 22, 1):
        monkeypatch.setattr("ropemods.leakage.capture.AT_ONCE", at_once)
        with observing(model) as observation:
            sums.append(capture(observation, crops, PROTOCOL)[0].state())
    for name, tensor in sums[0].items():
        torch.testing.assert_close(tensor, sums[1][name], rtol=1e-5, atol=1e-5)


def test_what_an_observer_returns_is_added_to_the_heads_output() -> None:
    """Taking BOS's contribution away by hand is the same as closing nothing and adding −a·v."""
    model = zoo.build("llama")
    ids = zoo.tokens()
    with torch.no_grad(), observing(model), observed(lambda s, r, c, lse: None, of=model, want_lse=True):
        same = model(input_ids=ids, use_cache=False).logits
    with (
        torch.no_grad(),
        observing(model),
        observed(lambda s, r, c, lse: torch.ones_like(r.q_BHTD), of=model, want_lse=True),
    ):
        moved = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(same, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert (moved - same).abs().max() > 1e-2


def test_losses_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropemods.leakage.capture.LOGITS_AT_ONCE", 3 * zoo.VOCAB)
    model, ids = zoo.build("llama"), zoo.tokens()
    out = model(ids, labels=ids)
    torch.testing.assert_close(losses(out.logits, ids).mean(), out.loss)


def test_the_crops_of_one_fold_are_the_same_crops() -> None:
    crops = make_crops(read_documents(documents()), tokenizer(), PROTOCOL)
    flat = plain(crops)
    (batches,) = flat.folds()
    assert torch.equal(torch.cat([tokens for tokens, _ in batches]), crops.tokens_NT)


def test_a_layer_that_runs_twice_in_a_pass_is_refused() -> None:
    model = zoo.build()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="layer 0 of this model: it makes several attention calls"):
        rm.measure(model, tokenizer(), documents(), PROTOCOL, progress=False)
