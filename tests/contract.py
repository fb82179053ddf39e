"""What every modification owes its user, on every architecture and backend.

A modification's test file inherits `ModContract` and names the variants to hold to it:

    class TestLearnedSink(ModContract):
        variants = {"closed": [LearnedSink(init=0.3)], ...}
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import ropemods as rm
from evals import naive_attention
from ropemods.model.attention_layers import attention_layers
from ropemods.mods import Mod
from ropemods.mods.probe import rows_with
from tests import zoo
from tests.sample import sampled

FEW = ("llama", "gemma3_text", "gpt_neox")
"""One rope table, one a layer type, partial rotary with parallel blocks: for a modification's first variant, and for
graphs. The first variant meets the other architectures too where a modification's place is new, and further variants
these three: both by a sixth of the cases, chosen by a hash of each, beside llama on sdpa, which every variant meets.
CONTRACT=all (`make contract`) runs every case."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Used by tests/conftest.py: spread a contract test over variants, architectures and backends."""
    cls = metafunc.cls
    if cls is None or not issubclass(cls, ModContract) or "variant" not in metafunc.fixturenames:
        return
    traced = metafunc.function.__name__.startswith("test_compiles")
    deep = "deep" in metafunc.function.__name__
    concerns = getattr(metafunc.function, "concerns", lambda mod: True)
    name = f"{metafunc.module.__name__} {metafunc.function.__name__}"
    cases = [
        (variant, (architecture, backend))
        for index, (variant, mods) in enumerate(cls.variants.items())
        for architecture, backend in zoo.pairs()
        if backend in cls.backends
        if (index == 0 and architecture in FEW)
        or (architecture, backend) == ("llama", "sdpa")
        or (
            (architecture in FEW or (index == 0 and not traced and cls.everywhere))
            and sampled(f"{name} {variant} {architecture} {backend}", one_in=6, unless="CONTRACT")
        )
        if not (traced and backend != "sdpa")
        if not (deep and (architecture, backend) != ("llama", "sdpa"))
        if any(concerns(mod) for mod in mods)
    ]
    metafunc.parametrize(("variant", "pair"), cases, ids=["-".join((v, *p)) for v, p in cases])


def concerning(predicate: Callable[[Mod], bool]):
    """Marks a contract test that only modifications of some kind can be held to."""

    def mark(test):
        test.concerns = predicate
        return test

    return mark


def perturb(model: PreTrainedModel, by: float = 0.2) -> None:
    """Move the modifications' parameters off their initial values, so that losing them shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ropemods" in name:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def gradients(model: PreTrainedModel, ids: Tensor, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (actual - wanted).abs().max().item()
    scale = wanted.abs().max().item()
    assert error <= tolerance * max(scale, 1.0), f"largest error {error:.2e} on values up to {scale:.2e}"


def layouts() -> dict[str, dict[str, Tensor]]:
    """The same tokens as plain rows, with padding in front of some, and packed into one row."""
    ids = zoo.tokens(rows=4)
    rows, length = ids.shape
    padded = torch.nn.functional.pad(ids, (3, 0), value=0)
    real = (torch.arange(length + 3) >= 3).long().expand_as(padded).clone()
    return {
        "plain": {"input_ids": ids},
        "padded": {"input_ids": padded, "attention_mask": real},
        "packed": {"input_ids": ids.view(1, -1), "position_ids": torch.arange(length).repeat(rows)[None]},
    }


def autocast_errors(model: PreTrainedModel, inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Root mean square of the errors of the logits of real tokens, and that of all gradients beside their own size."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()

    def run(asked: torch.dtype | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", asked, enabled=asked is not None):
            out = model(labels=ids.masked_fill(~real, -100), use_cache=False, **inputs)
        out.loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return out.logits.detach().float()[real], torch.cat(grads)

    (logits, grads), (exact_logits, exact_grads) = run(dtype), run(None)
    error = (grads - exact_grads).norm() / exact_grads.norm()
    return (logits - exact_logits).pow(2).mean().sqrt().item(), error.item()


@torch.no_grad()
def decoding_error(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """The same of logits that are read with a cache, in pieces of several tokens and of one."""
    ids = zoo.tokens(rows=4)

    def run(asked: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", asked, enabled=asked is not None):
            past, parts = None, []
            for part in ids.split([6, 1, 2, 3], 1):
                out = model(part, past_key_values=past, use_cache=True)
                past, parts = out.past_key_values, [*parts, out.logits.float()]
        return torch.cat(parts, 1)

    return (run(dtype) - run(None)).pow(2).mean().sqrt().item()


@functools.cache
def stock_autocast_errors(pair: tuple[str, str], layout: str, dtype: torch.dtype) -> tuple[float, float]:
    return autocast_errors(zoo.build(*pair).train(), layouts()[layout], dtype)


@functools.cache
def stock_decoding_error(pair: tuple[str, str], dtype: torch.dtype) -> float:
    return decoding_error(zoo.build(*pair), dtype)


class ModContract:
    variants: ClassVar[dict[str, list[Mod]]] = {}
    backends: ClassVar[tuple[str, ...]] = ("eager", "sdpa")
    everywhere: ClassVar[bool] = True
    """Whether the first variant meets every architecture; False where others of the same place have met them all."""
    moved: ClassVar[float] = 0.2
    """How far its parameters are moved off their initial values."""

    def model(self, pair: tuple[str, str], variant: str, strength: float = 1.0, **changes) -> PreTrainedModel:
        model = zoo.build(*pair, **changes)
        rm.apply(model, *self.variants[variant], strength=strength)
        perturb(model, self.moved)
        return model

    # Strength

    def test_strength_zero_is_bitwise_stock(self, pair, variant) -> None:
        stock, ids = zoo.build(*pair), zoo.tokens()
        model = self.model(pair, variant, strength=0.0)
        assert torch.equal(model(ids).logits, stock(ids).logits)
        wanted, found = gradients(stock, ids), gradients(model, ids)
        assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
        assert not any("ropemods" in name and grad.abs().sum() > 0 for name, grad in found.items())

    def test_strength_one_changes_the_model(self, pair, variant) -> None:
        ids = zoo.tokens()
        model = self.model(pair, variant).train(self.in_training(variant))
        torch.manual_seed(0)
        assert (model(ids).logits - zoo.build(*pair)(ids).logits).abs().max() > 1e-4

    def in_training(self, variant: str) -> bool:
        """Whether the variant acts in training only, as its test says that inherits this."""
        return False

    @concerning(lambda mod: type(mod).stage is not Mod.stage)
    @pytest.mark.parametrize("strength", [0.5, 1.0])
    def test_every_attention_call_equals_the_fp64_oracle(self, pair, variant, strength) -> None:
        model = self.model(pair, variant, strength)
        ids, inputs = zoo.tokens(length=8), {}
        bos = torch.zeros(2, 8, dtype=torch.long)
        if strength == 1.0:  # with padding in front of the first row, and so with a mask
            ids[0, :2], ids[0, 2], bos[0] = 0, zoo.BOS, 2
            inputs["attention_mask"] = (ids != 0).long()
        real = torch.ones_like(ids, dtype=torch.bool) if not inputs else inputs["attention_mask"].bool()
        with naive_attention.recorded(model) as calls, torch.no_grad():
            model(ids, use_cache=False, **inputs)
        layers = [layer for _, layer in attention_layers(model)]
        for call in calls:
            site = layers[call.layer].ropemods_site
            table = site.table.live(), *(site.layout or (False, 0))
            generator = torch.Generator().manual_seed(call.layer)
            weight = torch.randn(call.output.shape, generator=generator, dtype=torch.float64) * real[..., None, None]
            wide = [t.detach().double().requires_grad_() for t in (call.query, call.key, call.value)]
            stages = getattr(call.module, "ropemods", torch.nn.Module())
            exact = copy.deepcopy(stages).double()  # or rows would be summed into their gradients in fp32, one by one
            wanted = naive_attention.recompute(
                call, *wide, backend=pair[1], bos_BT=bos, rotary=table, own=exact if list(exact.children()) else None
            )
            close(call.output.double() * real[..., None, None], wanted * real[..., None, None], 2e-5)
            if not site.active:  # the stock function's own business, and its own precision
                continue

            again = [t.detach().double().requires_grad_() for t in (call.query, call.key, call.value)]
            mask = call.mask if call.mask is None or call.mask.dtype == torch.bool else call.mask.double()
            interface = transformers.AttentionInterface()[f"ropemods+{pair[1]}"]
            found, _ = interface(call.module, *again, mask, **call.options)
            close(found * real[..., None, None], wanted * real[..., None, None], 1e-9)
            grads = [
                torch.autograd.grad((out * weight).sum(), [*x, *own.parameters()], allow_unused=True)
                for out, x, own in ((wanted, wide, exact), (found, again, stages))
            ]
            for expected, got in zip(*grads, strict=True):
                if expected is None:
                    assert got is None or got.abs().max() == 0
                else:
                    # Parameters of the modification are fp32, so their gradients are rounded to it.
                    close(got.double(), expected, 1e-9 if got.dtype == torch.float64 else 1e-6)

    # Decoding, padding, batching, packing

    def test_cached_decode_equals_one_pass(self, pair, variant) -> None:
        model, ids = self.model(pair, variant), zoo.tokens()
        whole = model(ids).logits
        for prompt in (1, 5):
            past = model(ids[:, :prompt], use_cache=True).past_key_values
            for t in range(prompt, ids.shape[1]):
                step = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
                close(step.logits[:, 0], whole[:, t], 2e-5)

    def test_static_cache_equals_one_pass(self, pair, variant) -> None:
        model, ids = self.model(pair, variant), zoo.tokens()
        whole = model(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        step = model(ids[:, :6], past_key_values=cache, use_cache=True)
        close(step.logits, whole[:, :6], 2e-5)
        for t in range(6, ids.shape[1]):
            step = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            close(step.logits[:, 0], whole[:, t], 2e-5)

    def test_left_padding_changes_nothing(self, pair, variant) -> None:
        model, ids = self.model(pair, variant), zoo.tokens()
        whole = model(ids).logits
        padded = torch.nn.functional.pad(ids, (3, 0), value=0)
        mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
        close(model(padded, attention_mask=mask).logits[:, 3:], whole, 5e-5)

    def test_padded_generation_equals_unpadded(self, pair, variant) -> None:
        model, ids = self.model(pair, variant), zoo.tokens(rows=1, length=6)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 6:]
        longer = zoo.tokens(rows=1, length=9, seed=3)
        batch = torch.cat([torch.nn.functional.pad(ids, (3, 0), value=0), longer])
        mask = torch.ones_like(batch)
        mask[0, :3] = 0
        together = model.generate(batch, attention_mask=mask, **options)[:1, 9:]
        assert torch.equal(together, alone)

    def test_a_row_does_not_depend_on_its_batch(self, pair, variant) -> None:
        model, ids = self.model(pair, variant), zoo.tokens(rows=3)
        close(model(ids).logits[1:2], model(ids[1:2]).logits, 2e-5)

    def test_packed_sequences_equal_separate_ones(self, pair, variant) -> None:
        model = self.model(pair, variant)
        a, b = zoo.tokens(rows=1, length=5, seed=1), zoo.tokens(rows=1, length=7, seed=2)
        packed = torch.cat([a, b], dim=1)
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
        logits = model(packed, position_ids=positions, use_cache=False).logits
        close(logits[:, :5], model(a).logits, 2e-5)
        close(logits[:, 5:], model(b).logits, 2e-5)

    @concerning(lambda mod: mod.needs_bos or type(mod).stage is not Mod.stage)
    def test_packed_sequences_that_would_mix_are_refused(self, pair, variant) -> None:
        model = self.model(pair, variant)
        packed = zoo.tokens(rows=2, length=6).reshape(1, 12)
        positions = torch.arange(6).repeat(2)[None]
        with pytest.raises(ValueError, match="packs several sequences"):
            model(packed, position_ids=positions, attention_mask=torch.ones_like(packed))

    # Training

    def test_gradient_checkpointing_changes_nothing(self, pair, variant) -> None:
        model, ids = self.model(pair, variant).train(), zoo.tokens()
        torch.manual_seed(0)
        wanted = gradients(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        found = gradients(model, ids)
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            close(found[name], grad, 1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_deep_model_has_finite_gradients_and_trains(self, pair, variant, dtype) -> None:
        """28 layers, where what grows by a factor a layer shows; under autocast for the half precisions.

        The scaler of fp16 losses begins too high, as it does for the stock model, and skips steps until it has found a
        scale that can be held. It must find one in eight steps, and keep it for eight.
        """
        model, ids = rm.apply(zoo.deep(), *self.variants[variant]).train(), zoo.tokens()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        losses, skipped = [], []
        for _ in range(16 if dtype == torch.float16 else 4):
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            skipped.append(not all(p.grad.isfinite().all() for p in model.parameters()))
            scaler.step(optimizer)
            scaler.update()
        assert not any(skipped[-8:])
        assert losses[-1] < losses[0]

    def test_every_parameter_of_the_modification_gets_a_gradient(self, pair, variant) -> None:
        model = self.model(pair, variant)
        found = gradients(model, zoo.tokens())
        own = [name for name, _ in model.named_parameters() if "ropemods" in name]
        assert all(found[name].abs().max() > 0 for name in own)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_errs_at_most_twice_as_much_as_stock(self, pair, variant, dtype) -> None:
        """Logit error against the fp32 model, next to the same error of the stock model."""
        ids = zoo.tokens(rows=4)

        def error(model: PreTrainedModel) -> float:
            # The halved weights are the reference's weights too, so only the arithmetic differs.
            half = copy.deepcopy(model).to(dtype)
            exact = copy.deepcopy(half).to(torch.float32)(ids).logits
            return (half(ids).logits.float() - exact).pow(2).mean().sqrt().item()

        assert error(self.model(pair, variant)) <= 2 * error(zoo.build(*pair))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_errs_at_most_twice_as_much_as_stock(self, pair, variant, dtype) -> None:
        """Against fp32, next to the same error of the stock model; gradients with their layers checkpointed.

        The rule of a temperature has corners, at which the rounding of an entropy turns a gradient by more than itself;
        beside one, gradients are held to be finite.
        """
        model = self.model(pair, variant).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        rule = rows_with(self.variants[variant], head_dim=8, dtype=torch.float32).entropy_scale
        cornered = rule is not None and rule.cornered
        for layout in layouts():
            logits, grads = stock_autocast_errors(pair, layout, dtype)
            own_logits, own_grads = autocast_errors(model, layouts()[layout], dtype)
            assert own_logits <= 2 * logits, layout
            assert own_grads <= (float("inf") if cornered else 2 * grads), layout  # which NaN is not
        assert decoding_error(model.eval(), dtype) <= 2 * stock_decoding_error(pair, dtype)

    def test_compiles_whole_under_autocast(self, pair, variant) -> None:
        model, ids = self.model(pair, variant), layouts()["plain"]["input_ids"]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = compiled(ids, use_cache=False).logits.float()
        error = (found - model(ids, use_cache=False).logits).pow(2).mean().sqrt()
        assert error <= 2 * stock_autocast_errors(pair, "plain", torch.bfloat16)[0]
        torch._dynamo.reset()

    def test_compiles_whole_and_strength_does_not_recompile(self, pair, variant) -> None:
        model, ids = self.model(pair, variant), zoo.tokens()
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        graphs = []
        with torch.no_grad():
            for strength in (1.0, 0.3, 0.7):
                rm.set_strength(model, strength)
                close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 1e-5)
                graphs.append(counter.frame_count)
            assert graphs[0] > 0 and len(set(graphs)) == 1
            rm.set_strength(model, 0.0)
            close(compiled(ids, use_cache=False).logits, zoo.build(*pair)(ids).logits, 1e-5)
            with_stock = counter.frame_count
            rm.set_strength(model, 1.0)
            compiled(ids, use_cache=False)
        assert counter.frame_count == with_stock <= 2 * graphs[0]
        torch._dynamo.reset()

    # Checkpoints

    @pytest.mark.parametrize("strength", [0.3, 1.0])
    def test_save_and_load_is_bitwise(self, pair, variant, strength, tmp_path) -> None:
        model, ids = self.model(pair, variant, strength), zoo.tokens()
        wanted = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = rm.from_pretrained(tmp_path, attn_implementation=pair[1])
        assert torch.equal(loaded(ids).logits, wanted)
        assert type(loaded) is type(model)
        assert rm.summary(loaded) == rm.summary(model)
        rm.set_strength(loaded, 0.0)
        assert torch.equal(loaded(ids).logits, zoo.build(*pair)(ids).logits)

    @pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
    def test_a_stock_load_is_exact_or_fails(self, pair, variant, strength, tmp_path) -> None:
        model, ids = self.model(pair, variant, strength), zoo.tokens()
        wanted = model(ids).logits
        model.save_pretrained(tmp_path)
        try:
            stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=pair[1])
        except Exception as refusal:  # each architecture refuses an unknown rope type with an error of its own
            assert "ropemods" in str(refusal) and strength > 0
        else:
            assert torch.equal(stock(ids).logits, wanted)

    def test_export_is_the_same_model_or_says_why_not(self, pair, variant, tmp_path) -> None:
        model, ids = self.model(pair, variant), zoo.tokens()
        wanted = model(ids).logits
        try:
            rm.export(model, tmp_path)
        except ValueError as refusal:
            assert "cannot be written into a stock checkpoint" in str(refusal)
            assert not list(tmp_path.iterdir())
        else:
            stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=pair[1])
            assert not hasattr(stock.config, "ropemods")
            close(stock(ids).logits, wanted, 1e-6)
        assert torch.equal(model(ids).logits, wanted)

    def test_remove_is_bitwise_stock(self, pair, variant) -> None:
        stock, ids = zoo.build(*pair), zoo.tokens()
        model = rm.remove(self.model(pair, variant))
        assert torch.equal(model(ids).logits, stock(ids).logits)
        assert model.config.to_dict() == stock.config.to_dict()
        assert model.state_dict().keys() == stock.state_dict().keys()
        assert not any(hasattr(m, "ropemods") or m._forward_pre_hooks for m in model.modules())

    def test_lora_round_trip(self, pair, variant, tmp_path) -> None:
        from peft import LoraConfig, get_peft_model

        base = zoo.build(*pair)
        base.save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation=pair[1])
        rm.apply(model, *self.variants[variant], strength=0.6)
        config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["ropemods"], init_lora_weights=False)
        wrapped = get_peft_model(model, config)
        perturb(wrapped)
        ids = zoo.tokens()
        wanted = wrapped(ids).logits
        wrapped.save_pretrained(tmp_path / "adapter")
        loaded = rm.from_pretrained(tmp_path / "adapter", attn_implementation=pair[1])
        close(loaded.eval()(ids).logits, wrapped.eval()(ids).logits, 1e-6)
        close(wanted, wrapped(ids).logits, 1e-6)
