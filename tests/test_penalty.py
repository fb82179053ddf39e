"""The penalty trains on what it says, once, whatever is between the layers and the optimizer, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ropemods as rm
from ropemods.attention.rows import Rows, shown
from ropemods.model import attention_function, deviations
from ropemods.model.anatomy import survey
from ropemods.model.attention_layers import attention_layers
from tests import forked, zoo

OPTIONS = {"early": (4, 8), "window": 4, "late": 4}
LENGTH = 24


def batch(seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    ids = zoo.tokens(rows, LENGTH, seed=seed)
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def warmed(model: nn.Module, **options) -> rm.Penalized:
    """With a running mean, as after a first step."""
    penalized = rm.penalize(model, **({"weight": 3.0} | OPTIONS | options))
    model.train()
    with torch.random.fork_rng():
        model(**batch(seed=100), use_cache=False)
    penalized.step()
    return penalized


def backward(model: nn.Module, **given) -> dict[str, Tensor]:
    model.zero_grad()
    model(**(batch() | given), use_cache=False).loss.backward()
    return gradients(model)


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest gradient of that parameter."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-12)) for n in b)


def naive_deviations(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """D (LHEW) and M (LHE1) from whole T × T logits with a graph."""
    (start, stop), w = OPTIONS["early"], OPTIONS["window"]
    layers = [module for _, module in attention_layers(model)]
    found: list[tuple[Tensor, Tensor]] = []

    def listen(call: attention_function.Asked) -> None:
        k = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        s = call.query @ k.mT * call.options["scaling"]
        if call.options.get("softcap"):
            s = call.options["softcap"] * torch.tanh(s / call.options["softcap"])
        seen = torch.ones(LENGTH, LENGTH).tril() > 0 if call.mask is None else shown(call.mask)
        r, m = {}, {}
        late = range(LENGTH // 2, LENGTH, (LENGTH // 2) // OPTIONS["late"])
        for i in (*range(start, stop), *late):
            row = torch.stack([s[:, :, i, i - offset] for offset in range(w)], -1)
            r[i] = (row - row.logsumexp(-1, keepdim=True)).mean(0)
            whole = s[:, :, i].masked_fill(~seen[..., i, :], -torch.inf)
            m[i] = (row.logsumexp(-1) - whole.logsumexp(-1)).mean(0)[..., None]
        far = [torch.stack([x[i] for i in late]).mean(0) for x in (r, m)]
        found.append(
            tuple(torch.stack([x[i] - y for i in range(start, stop)], 1) for x, y in zip((r, m), far, strict=True))
        )

    survey(model)
    with attention_function.passing(layers), attention_function.asked(model, listen):
        model(input_ids=ids, use_cache=False)
    return tuple(torch.stack(x) for x in zip(*found[1:], strict=True))


WEIGHTS = [{"weight": 3.0}, {"weight": 2.0, "total": 0.7}]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["residual", "total"])
@pytest.mark.parametrize(("architecture", "backend"), zoo.pairs())
def test_gradient_is_that_of_the_formula_in_fp64(architecture: str, backend: str, weights: dict[str, float]) -> None:
    model = zoo.build(architecture, backend, dtype=torch.float64)
    before, now = zoo.tokens(4, LENGTH, seed=100), zoo.tokens(4, LENGTH, seed=0)
    D_before, M_before = (x.detach() for x in naive_deviations(model, before))
    D, M = naive_deviations(model, now)
    wanted_value = weights["weight"] * 2 * (D_before * D).mean()
    wanted_value = wanted_value + weights.get("total", 0.0) * 2 * ((D_before + M_before) * (D + M)).mean()
    wanted = torch.autograd.grad(wanted_value, list(model.parameters()), allow_unused=True)
    plain = backward(model)
    penalized = warmed(model, **weights)
    both = backward(model)
    assert float(penalized.last.leakage) == pytest.approx(float((D_before * D).mean()), rel=1e-6)
    assert float(penalized.last.penalty) == pytest.approx(float(wanted_value.detach()), rel=1e-6)
    model.zero_grad()
    model(**batch(), use_cache=False)
    penalized.penalty().backward()
    alone = gradients(model)
    # Norms of most architectures compute in fp32 whatever the model is in, so sums of gradients are rounded there.
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(alone.get(name, torch.zeros_like(parameter)), gradient, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(both[name], plain[name] + gradient, rtol=1e-4, atol=1e-5)
    assert max(float(g.abs().max()) for g in wanted if g is not None) > 1e-3


def test_mean_of_earlier_steps_is_corrected_for_its_start() -> None:
    model = zoo.build().train()
    penalized = rm.penalize(model, weight=1.0, momentum=0.8, **OPTIONS)
    seen = []
    for seed in range(3):
        seen.append(naive_deviations(model.eval(), zoo.tokens(4, LENGTH, seed=seed))[0].detach())
        model.train()(**batch(seed))
        penalized.step()
    wanted = sum(0.2 * 0.8 ** (2 - n) * d for n, d in enumerate(seen)) / (1 - 0.8**3)
    model(**batch(9))
    last = naive_deviations(model.eval(), batch(9)["input_ids"])[0]
    assert float(penalized.last.leakage) == pytest.approx(float((wanted * last).mean()), rel=1e-4)


def test_expected_penalty_is_twice_the_squared_mean_and_nothing_for_noise() -> None:
    """200 repetitions of two steps, of logits with a planted deviation and of logits without one."""
    T, w, N = 64, 8, 8
    plan = deviations.plan(
        [(row, 0, T) for row in range(N)], early=(8, 16), window=w, late=8, device=torch.device("cpu")
    )
    draw = torch.Generator().manual_seed(0)
    offset = torch.randn(1, 1, w, generator=draw)
    planted = 0.5 * torch.randn(1, 8, w, generator=draw)

    def repetition(planted_HEW: Tensor) -> float:
        """Keys that are a basis make the band of logits whatever the queries say."""
        found = []
        for _ in range(2):
            band_NTW = offset + 0.7 * torch.randn(N, T, w, generator=draw)
            band_NTW[:, 8:16] += planted_HEW
            q = torch.zeros(N, 1, T, T)
            for delta in range(w):
                for i in range(w, T):
                    q[:, 0, i, i - delta] = band_NTW[:, i, delta]
            k = torch.eye(T).expand(N, 1, T, T)
            one = deviations.read(Rows(q, k, k, mask=None, causal=True, scale=1.0), plan)
            found.append(deviations.deviations(one.q_NQHD[None], one.k_NCGD[None], None, one, plan))
        return float(2 * (found[0] * found[1]).mean())

    shift = torch.randn(4000, 1, 8, w, generator=draw) * 0.7 + offset
    with_it, without = shift + planted, shift
    centred = with_it.log_softmax(-1).mean(0) - without.log_softmax(-1).mean((0, 2), keepdim=True)[0]
    wanted = float(2 * centred.square().mean())
    values = torch.tensor([repetition(planted) for _ in range(200)])
    null = torch.tensor([repetition(torch.zeros_like(planted)) for _ in range(200)])
    assert abs(float(values.mean()) - wanted) < 4 * float(values.std()) / 200**0.5 + 0.01 * wanted
    assert abs(float(null.mean())) < 3 * float(null.std()) / 200**0.5
    assert float(values.mean()) > 10 * abs(float(null.mean()))


def test_logits_that_know_offsets_only_are_not_penalised() -> None:
    """Constant queries and keys, rotated: Toeplitz logits have no deviation at all."""
    T, D = 64, 16
    plan = deviations.plan([(0, 0, T)], early=(8, 16), window=8, late=8, device=torch.device("cpu"))
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10 ** -torch.linspace(0, 2, D // 2, dtype=torch.float64)
    x = torch.randn(2, D // 2, 2, dtype=torch.float64)
    turn = torch.stack((torch.stack((angle.cos(), -angle.sin()), -1), torch.stack((angle.sin(), angle.cos()), -1)), -2)
    q, k = (torch.einsum("tfxy,fy->tfx", turn, each).flatten(1)[None, None] for each in x)
    one = deviations.read(Rows(q, k, k, mask=None, causal=True, scale=0.3), plan)
    found = deviations.deviations(one.q_NQHD[None], one.k_NCGD[None], None, one, plan)
    assert float(found.abs().max()) < 1e-12


def test_first_step_is_the_plain_model_bit_for_bit() -> None:
    plain = backward(zoo.build().train())
    model = zoo.build().train()
    rm.penalize(model, weight=3.0, **OPTIONS)
    found = backward(model)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = zoo.build().train()
    warmed(model)
    wanted = backward(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = model.penalized._runs
    found = backward(model)
    assert differ(found, wanted) < 1e-5
    assert model.penalized._runs - runs == 4, "a recomputed layer was read again"


def test_two_passes_before_one_backward_get_each_their_own_gradient() -> None:
    """With checkpointing, the first pass's layers are recomputed after the second has been read."""
    model = zoo.build().train()
    warmed(model)
    wanted = {n: g / 2 for n, g in backward(model, **batch(1)).items()}
    for name, g in backward(model, **batch(2)).items():
        wanted[name] += g / 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    first, second = (model(**batch(seed), use_cache=False).loss for seed in (1, 2))
    ((first + second) / 2).backward()
    assert differ(gradients(model), wanted) < 1e-5


def test_one_row_eight_times_is_eight_rows_once() -> None:
    def run(size: int) -> dict[str, Tensor]:
        model = zoo.build()
        rm.penalize(model.train(), weight=3.0, **OPTIONS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(3):
            for part in batch(step, rows=8)["input_ids"].split(size):
                (model(input_ids=part, labels=part).loss * size / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.named_parameters())

    whole, apart = run(8), run(1)
    assert all(torch.allclose(whole[name], apart[name], atol=1e-5) for name in whole)


class Some(torch.utils.data.Dataset):
    """Rows with as many targets each."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids = zoo.tokens(1, LENGTH, seed=n)[0]
        labels = ids.clone()
        labels[:6] = -100
        return {"input_ids": ids, "labels": labels}


def trained(tmp_path: Path, **changes) -> tuple[nn.Module, list[dict]]:
    model = zoo.build()
    penalized = rm.penalize(model, weight=3.0, **OPTIONS)
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", report_to="none",
        use_cpu=True, save_strategy="no", train_sampling_strategy="sequential", max_grad_norm=0.0, logging_steps=1,
        disable_tqdm=True, max_steps=3, **changes,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Some(), callbacks=[penalized.callback()])
    trainer.train()
    return model, [log for log in trainer.state.log_history if "loss" in log]


def test_trainer_scales_the_penalty_by_no_count_of_batches(tmp_path: Path) -> None:
    """Its loss is a sum over a step's tokens; the penalty is weighed by the same tokens, and logged beside it."""
    whole, logs = trained(tmp_path, per_device_train_batch_size=8)
    apart, apart_logs = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for log, other in zip(logs, apart_logs, strict=True):
        assert other["penalty"] == pytest.approx(log["penalty"], rel=1e-3)
        assert other["loss"] == pytest.approx(log["loss"], rel=1e-4)
    assert logs[0]["penalty"] == 0 and abs(logs[2]["penalty"]) > 1e-4
    assert all(torch.allclose(p, dict(apart.named_parameters())[n], atol=1e-4) for n, p in whole.named_parameters())


def test_share_of_a_batch_is_its_tokens_over_the_step_s() -> None:
    model = zoo.build().train()
    penalized = warmed(model)
    one = batch()
    mean = model(**one).loss
    plain, penalty = penalized.last.loss, penalized.last.penalty
    tokens = one["labels"][:, 1:].numel()
    quarter = model(**one, num_items_in_batch=torch.tensor(4 * tokens)).loss
    assert float(quarter) == pytest.approx(float(mean) / 4, rel=1e-5)
    assert float(mean) == pytest.approx(float(plain + penalty), rel=1e-6)


def test_penalty_of_a_loss_of_your_own_is_added_by_hand_and_never_forgotten() -> None:
    model = zoo.build().train()
    penalized = warmed(model)
    wanted = backward(model)
    ids = batch()["input_ids"]
    model.zero_grad()
    logits = model(input_ids=ids).logits
    own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (own + penalized.penalty()).backward()
    assert differ(gradients(model), wanted) < 1e-5
    logits = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match=r"in no loss.*penalized\.penalty\(\)"):
        logits.sum().backward()


def test_padding_and_packed_rows_are_penalised_as_the_sequences_they_hold() -> None:
    model = zoo.build()
    ids = zoo.tokens(2, LENGTH)
    rm_alone = warmed(model)
    plain = copy.deepcopy(model.config)
    model(input_ids=ids, labels=ids)
    wanted = float(rm_alone.last.penalty)
    for side in ("left", "right"):
        pad, ones = torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)
        parts = [pad, ids] if side == "left" else [ids, pad]
        mask = torch.cat([pad, ones] if side == "left" else [ones, pad], 1)
        model(input_ids=torch.cat(parts, 1), attention_mask=mask, labels=torch.cat(parts, 1))
        assert float(rm_alone.last.penalty) == pytest.approx(wanted, rel=1e-4), side
    row = torch.cat((ids[:1], ids[1:, :6], ids[1:]), 1)
    positions = torch.cat((torch.arange(LENGTH), torch.arange(6), torch.arange(LENGTH)))[None]
    model(input_ids=row, position_ids=positions, labels=row, use_cache=False)
    assert float(rm_alone.last.penalty) == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match="packs several sequences"):
        model(input_ids=row, position_ids=positions, attention_mask=torch.ones_like(row), labels=row)
    with pytest.raises(ValueError, match="prepared attention mask"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril(), labels=ids)
    assert model.config.to_dict() == plain.to_dict()


def test_batches_that_are_never_long_enough_are_an_error() -> None:
    model = zoo.build().train()
    rm.penalize(model, weight=1.0, **OPTIONS)
    short = zoo.tokens(2, 12)
    with pytest.raises(ValueError, match="no sequence of 16 tokens or more"):
        for _ in range(20):
            model(input_ids=short, labels=short)


def test_an_optimizer_that_never_steps_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropemods.penalty.STEPLESS_PASSES", 3)
    model = zoo.build().train()
    rm.penalize(model, weight=1.0, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"call penalized\.step\(\)"):
        for _ in range(5):
            model(**batch())


def test_evaluation_and_generation_know_nothing_of_it() -> None:
    stock = zoo.build()
    model = zoo.build()
    penalized = warmed(model)
    model.eval()
    assert torch.equal(model(**batch()).loss, stock(**batch()).loss)
    steps = penalized._runs
    with torch.no_grad():
        assert torch.equal(model.train()(**batch()).loss, stock(**batch()).loss)
    assert penalized._runs == steps


def test_removal_leaves_the_stock_model_and_checkpoints_never_knew(tmp_path: Path) -> None:
    stock, model = zoo.build().train(), zoo.build().train()
    before = {id(m): set(vars(m)) for m in model.modules()}
    with warmed(model):
        model.save_pretrained(tmp_path / "penalised")
    stock.save_pretrained(tmp_path / "stock")
    wanted, found = ({f.name: f for f in (tmp_path / n).iterdir()} for n in ("stock", "penalised"))
    assert wanted.keys() == found.keys()
    assert all(wanted[name].read_bytes() == found[name].read_bytes() for name in wanted)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "penalised")
    assert torch.equal(loaded(**batch()).logits, stock.eval()(**batch()).logits)
    stock.train()
    assert {id(m): set(vars(m)) for m in model.modules()} == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    ours, theirs = backward(model), backward(stock)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("penalty_first", [True, False])
def test_with_modifications_in_either_order(penalty_first: bool) -> None:
    mods = [rm.TruncatedRoPE(0.5), rm.AdaptiveTemperature(trainable="head"), rm.LearnedSink(init=0.2)]
    model = zoo.build().train()
    if penalty_first:
        penalized = warmed(model)
        rm.apply(model, *mods, strength=0.8)
        model(**batch(100))
        penalized.step()
    else:
        rm.apply(model, *mods, strength=0.8)
        penalized = warmed(model)
    found = backward(model)
    assert float(penalized.last.penalty) != 0
    assert max(float(g.abs().max()) for n, g in found.items() if "temperature" in n) > 0
    rm.remove(model)
    with_penalty = backward(model)
    penalized.remove()
    assert differ(backward(model), with_penalty) > 1e-3, "removing modifications took the penalty along"
    assert model.config._attn_implementation == "sdpa"


def test_temperature_s_gradient_is_part_of_the_penalty_s() -> None:
    """Against differences of the penalty, in fp64."""
    model = rm.apply(zoo.build(dtype=torch.float64), rm.AdaptiveTemperature(trainable="head"), strength=1.0)
    penalized = warmed(model)
    offsets = model.model.layers[1].self_attn.ropemods.adaptive_temperature.offsets

    def penalty() -> Tensor:
        model(**batch())
        return penalized.penalty()

    model.zero_grad()
    penalty().backward()
    # As stored: the stages' own dtype is the model's, so half a thousandth is far above rounding.
    for entry in ((0, 0), (1, 3)):
        found, moved = float(offsets.grad[entry]), []
        for change in (1e-4, -2e-4):
            with torch.no_grad():
                offsets[entry] += change
            moved.append(float(penalty()))
        with torch.no_grad():
            offsets[entry] += 1e-4
        assert found == pytest.approx((moved[0] - moved[1]) / 2e-4, rel=1e-3, abs=1e-7)


MODS = {
    "slot": [rm.KeyedSink(trains="all"), rm.LogTemperature()],
    "BOS column": [rm.AnchoredBos(offset=3), rm.LearnedSink(init=0.3, read_bos=True)],
    "offsets": [rm.ScaleInvariant()],
    "temperature": [rm.AdaptiveTemperature(trainable="head", start="model"), rm.UnrotatedBos()],
}


@pytest.mark.parametrize("total", [0.0, 2.0])
@pytest.mark.parametrize("mods", list(MODS))
def test_gradient_is_the_penalty_s_slope_with_every_term_of_a_row(mods: str, total: float) -> None:
    """Along a random direction in all parameters, in fp64. Norms compute in fp32 all the same, so steps are wide, and
    two of them are joined so that the error is of their fourth power."""
    backend = "eager" if mods == "offsets" else "sdpa"
    model = rm.apply(zoo.build(backend=backend, dtype=torch.float64), *MODS[mods]).train()
    penalized = warmed(model, total=total)
    model.zero_grad()
    model(**batch())
    penalized.penalty().backward()
    found = gradients(model)
    draw = torch.Generator().manual_seed(1)
    way = {n: torch.randn(g.shape, generator=draw, dtype=torch.float64) for n, g in found.items()}

    def penalty_at(step: float) -> float:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(way.get(name, 0.0), alpha=step)
        model(**batch())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(way.get(name, 0.0), alpha=step)
        return float(penalized.last.penalty)

    once, twice = ((penalty_at(h) - penalty_at(-h)) / (2 * h) for h in (1e-3, 2e-3))
    slope = sum(float((found[n] * way[n]).sum()) for n in found)
    assert abs(slope) > 1e-2
    assert (4 * once - twice) / 3 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_trains_on_it(order: str) -> None:
    from peft import LoraConfig, get_peft_model

    inner = zoo.build()
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    if order == "before":
        rm.penalize(inner, weight=3.0, **OPTIONS)
    model = get_peft_model(inner, config).train()
    penalized = inner.penalized if order == "before" else rm.penalize(model, weight=3.0, **OPTIONS)
    model(**batch(100))
    penalized.step()
    with_penalty = backward(model)
    penalized.remove()
    assert with_penalty and differ(backward(model), with_penalty) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_comes_near_fp32(dtype: torch.dtype) -> None:
    model = zoo.build()
    penalized = warmed(model)
    model(**batch())
    wanted = float(penalized.last.penalty)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**batch()).loss
    assert float(penalized.last.penalty) == pytest.approx(wanted, rel=0.1)
    loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_loss_scaling_scales_it_too() -> None:
    model = zoo.build()
    warmed(model)
    wanted = backward(model)
    model.zero_grad()
    (model(**batch()).loss * 1024).backward()
    assert differ({n: g / 1024 for n, g in gradients(model).items()}, wanted) < 1e-5


def test_compiled_model_trains_alike() -> None:
    model = zoo.build().train()
    warmed(model)
    wanted = backward(model)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    for _ in range(2):
        model.zero_grad()
        compiled(**batch(), use_cache=False).loss.backward()
    assert differ(gradients(model), wanted) < 1e-4
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    for seed in range(3):
        compiled(**batch(seed), use_cache=False).loss.backward()
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames, "every pass compiles anew"


def test_warm_up_is_linear_in_steps() -> None:
    options = rm.Penalty(weight=4.0, warmup_steps=8)
    assert [options.weight_after(n) for n in (0, 2, 8, 100)] == [0.0, 1.0, 4.0, 4.0]


def test_total_warms_up_from_zero_beside_the_residual() -> None:
    model = zoo.build().train()
    penalized = rm.penalize(model, weight=3.0, total=1.5, warmup_steps=2, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    said = []
    for _ in range(4):
        model(**batch()).loss.backward()
        said.append(float(penalized.last.penalty))
        optimizer.step()
    # Nothing moves, so the penalty is that of the same deviations throughout, by what the weights have risen to.
    assert said[0] == 0
    assert said[1] == pytest.approx(said[3] / 2, rel=1e-4) and said[2] == pytest.approx(said[3], rel=1e-4)


def test_running_mean_survives_in_checkpoints(tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        model = zoo.build()
        penalized = rm.penalize(model, weight=3.0, **OPTIONS)
        args = TrainingArguments(
            output_dir=str(tmp_path), learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", report_to="none",
            use_cpu=True, save_strategy="steps", save_steps=2, disable_tqdm=True, max_steps=steps, logging_steps=1,
            per_device_train_batch_size=4, train_sampling_strategy="sequential",
        )  # fmt: skip
        return Trainer(model, args, train_dataset=Some(), callbacks=[penalized.callback()])

    whole = trainer(4)
    whole.train()
    saved = load_file(tmp_path / "checkpoint-2" / "ropemods_penalty.safetensors")
    assert saved["progress"].tolist() == [2, 2]
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted = dict(whole.model.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in resumed.model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0}, r"remove\(\)"),
        ({"weight": 1.0, "total": -1.0}, "none below 0"),
        ({"weight": -1.0}, "above 0"),
        ({"weight": 1.0, "window": 1}, "window"),
        ({"weight": 1.0, "early": (4, 64)}, "early"),
        ({"weight": 1.0, "momentum": 1.0}, "momentum"),
        ({"weight": 1.0, "layers": (7,)}, "do not exist"),
    ],
)
def test_options_that_cannot_be_are_refused_in_words(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rm.penalize(zoo.build(), **options)


def test_copies_of_the_model_evaluate_as_the_model_does() -> None:
    model = zoo.build()
    penalized = warmed(model)
    model(**batch())
    ema = copy.deepcopy(model).eval()
    assert torch.equal(ema(**batch()).logits, model.eval()(**batch()).logits)
    penalized.remove()


def test_one_penalty_at_a_time() -> None:
    model = zoo.build()
    rm.penalize(model, weight=1.0, **OPTIONS)
    with pytest.raises(ValueError, match="penalised already"):
        rm.penalize(model, weight=2.0, **OPTIONS)


def test_chosen_layers_alone_are_read() -> None:
    model = zoo.build(num_hidden_layers=4).train()
    penalized = warmed(model, layers=[-1])
    assert penalized.state()["mean"].shape[0] == 1
    model.zero_grad()
    model(**batch())
    penalized.penalty().backward()
    assert model.model.layers[3].self_attn.v_proj.weight.grad.abs().max() == 0
    assert model.model.layers[3].self_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "total"), [("ddp", 1.0), ("fsdp2", 0.0), ("zero2", 0.0), ("zero3", 1.0)])
def test_two_ranks_penalise_as_one_process_does(kind: str, total: float, tmp_path: Path) -> None:
    from tests.ranks import penalty_worker

    wanted, model = penalty_worker.alone(total)
    forked.run(penalty_worker.main, kind, total, tmp_path, ranks=2)
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found == pytest.approx(wanted, abs=2e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with contextlib.suppress(AttributeError):
        model.penalized.remove()
    torch.testing.assert_close(loaded(**batch()).logits, model.eval()(**batch()).logits, atol=1e-3, rtol=1e-3)
