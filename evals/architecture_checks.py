"""What every architecture must hold to with ropemods on it, one function a check.

A check returns nothing when it holds and fails with a sentence when it does not. `Lacking` says that the stock model
has no such property, which is then nothing that a modification could break.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ropemods as rm
from evals import naive_attention, tiny_models
from ropemods.attention.reference import truncated_frequencies
from ropemods.mods import Mod

ROUNDING = 5e-4
"""Of fp32 logits of a few layers, relative to the largest; a lost modification is off by several per cent."""
SINGLE_CALL = 2e-5

TEMPERATURE: list[Mod] = [rm.AdaptiveTemperature()]
TRUNCATED: list[Mod] = [rm.TruncatedRoPE(0.5)]
REPLACED: list[Mod] = [rm.ReplacedBos(by="zero")]
SINK: list[Mod] = [rm.LearnedSink(init=0.5)]
UNROTATED: list[Mod] = [rm.UnrotatedBos()]
ALL: list[Mod] = [
    rm.TruncatedRoPE(0.5),
    rm.ReplacedBos(by="mean"),
    rm.UnrotatedBos(),
    rm.LearnedSink(init=0.3, read_bos=True),
    rm.AdaptiveTemperature(trainable="head"),
]


class Lacking(Exception):
    """The stock model itself does not have the property."""


class Refused(Exception):
    """`apply` declined, with a reason."""


Build = Callable[[], PreTrainedModel]


def together(build: Build) -> list[Mod]:
    """Those of `ALL` that the model takes; what it refuses has a check, and a reason, of its own."""
    taken = []
    for mod in ALL:
        try:
            rm.apply(build(), mod)
        except ValueError:
            continue
        taken.append(mod)
    if not taken:
        modified(build, ALL[:1])
    return taken


def modified(build: Build, mods: list[Mod], strength: float = 1.0) -> PreTrainedModel:
    model = build()
    try:
        rm.apply(model, *mods, strength=strength)
    except ValueError as refusal:
        raise Refused(str(refusal)) from refusal
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ropemods" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def run(model: PreTrainedModel, ids: Tensor, **inputs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


def distance(found: Tensor, wanted: Tensor) -> float:
    return (found.double() - wanted.double()).abs().max().item() / max(1.0, wanted.abs().max().item())


def near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    error = distance(found, wanted)
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest value"


def acts(found: Tensor, stock: Tensor, what: str) -> None:
    change = distance(found, stock)
    assert change > 1e-3, f"{what} changed the logits by {change:.1e} of the largest only"


# Each modification


def strength_zero(build: Build) -> None:
    ids = tiny_models.tokens()
    model = modified(build, together(build), strength=0.0)
    assert torch.equal(run(model, ids), run(build(), ids)), "not bitwise stock at strength 0"
    rm.set_strength(model, 1.0)
    rm.remove(model)
    assert torch.equal(run(model, ids), run(build(), ids)), "not bitwise stock after remove"


def p_rope(build: Build) -> None:
    """Against a stock model whose rope tables are cut by hand."""
    ids = tiny_models.tokens()
    stock, model = build(), modified(build, TRUNCATED)
    before = run(stock, ids)
    text = stock.config.get_text_config(decoder=True)
    for module in stock.modules():
        if getattr(module, "config", None) is not text and "ision" in type(module).__name__:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and buffer.ndim == 1:
                buffer.copy_(truncated_frequencies(buffer, keep=0.5))
    near(run(model, ids), run(stock, ids), 1e-6, "p-RoPE against cut tables")
    acts(run(model, ids), before, "TruncatedRoPE")


def replaced_bos(build: Build) -> None:
    """Against a stock model whose BOS row is zeroed."""
    ids = tiny_models.tokens()
    stock, model = build(), modified(build, REPLACED)
    before = run(stock, ids)
    embedding = stock.get_input_embeddings()
    weight = embedding.weight.detach().clone()
    weight[tiny_models.BOS] = 0
    embedding.weight = nn.Parameter(weight)  # of its own: a tied head keeps the old row
    near(run(model, ids), run(stock, ids), 1e-6, "ReplacedBos against a zeroed row")
    acts(run(model, ids), before, "ReplacedBos")


def on_rows(chosen: list[Mod] | None) -> Callable[[Build], None]:
    """A check of modifications of softmax rows, at each of the model's own attention calls."""

    def check(build: Build) -> None:
        ids = tiny_models.tokens()
        mods = chosen or together(build)
        model = modified(build, mods)
        layers = [m for m in model.modules() if getattr(m, "ropemods_site", None) is not None]
        with naive_attention.recorded(model) as calls, naive_attention.inputs_of(layers) as inputs:
            found = run(model, ids)
        calls = [call for call in calls if getattr(call.module, "ropemods", None) is not None]
        assert calls, "no modified attention layer was reached"
        taken: dict[int, list] = {}
        for module, args, kwargs in inputs:
            taken.setdefault(id(module), []).append((args, kwargs))
        made: dict[int, int] = {}
        for call in calls:
            # A layer may be called several times, and may call its attention several times a call.
            key = id(call.module)
            attended = sum(1 for each in calls if each.module is call.module) // len(taken[key])
            args, kwargs = taken[key][made.get(key, 0) // attended]
            made[key] = made.get(key, 0) + 1
            unrotated = None
            if any(mod.kind == "unrotated_bos" for mod in mods):
                unrotated = _unrotated(model, call, args, kwargs)
            wanted = naive_attention.attend(call, mods, unrotated)
            near(call.output, wanted, SINGLE_CALL, f"attention of layer {call.module.layer_idx}")
        acts(found, run(build(), ids), " and ".join(mod.kind for mod in mods))

    return check


def _unrotated(model: PreTrainedModel, call: naive_attention.Recorded, args: tuple, kwargs: dict) -> Tensor:
    """The BOS column's logits with nothing rotated: the layer run again with every table standing still."""
    saved = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                saved.append((buffer, buffer.clone()))
    rotary = [m for m in model.modules() if any(n.endswith("inv_freq") for n, _ in m.named_buffers(recurse=False))]

    def still(value):
        """Every position's table is that of position 0."""
        if isinstance(value, Tensor):
            return value[:, :1].expand_as(value) if value.ndim == 3 else value[:1].expand_as(value)
        if isinstance(value, dict):
            return {key: still(each) for key, each in value.items()}
        return type(value)(still(each) for each in value)

    names = [name for name in kwargs if "position_embeddings" in name or name in ("freqs_cis",)]
    args = tuple(still(a) if _is_table(a) else a for a in args)
    kwargs = kwargs | {name: still(kwargs[name]) for name in names if kwargs[name] is not None}
    for buffer, _ in saved:
        buffer.zero_()
    try:
        with naive_attention.recorded(model) as again, torch.no_grad():
            call.module(*args, **kwargs)
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
    assert rotary
    return naive_attention.logits(again[-1])[..., 0]


def _is_table(value) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, Tensor) for each in value)


# Use


def cached_decode(build: Build) -> None:
    ids = tiny_models.tokens()
    error = _cache_error(modified(build, together(build)), ids)
    if error > ROUNDING:
        own = _stock_error(lambda: _cache_error(build(), ids))
        if own > ROUNDING:
            raise Lacking(f"stock cached decoding is off by {own:.0e}")
        raise AssertionError(f"cached decoding is off by {error:.1e}, stock by {own:.1e}")


def _stock_error(measure: Callable[[], float]) -> float:
    try:
        return measure()
    except Exception as error:
        raise Lacking(f"the stock model fails at it: {type(error).__name__}: {str(error)[:120]}") from error


def _cache_error(model: PreTrainedModel, ids: Tensor) -> float:
    whole = run(model, ids)
    worst = 0.0
    with torch.no_grad():
        out = model(input_ids=ids[:, :5], use_cache=True)
        for t in range(5, ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            worst = max(worst, distance(out.logits[:, -1], whole[:, t]))
    return worst


def left_padding(build: Build) -> None:
    ids = tiny_models.tokens()
    error = _padding_error(modified(build, together(build)), ids)
    if error > ROUNDING:
        own = _stock_error(lambda: _padding_error(build(), ids))
        if own > ROUNDING:
            raise Lacking(f"stock left-padded logits are off by {own:.0e}")
        raise AssertionError(f"left-padded logits are off by {error:.1e}, stock by {own:.1e}")


def _padding_error(model: PreTrainedModel, ids: Tensor) -> float:
    padded = torch.nn.functional.pad(ids, (3, 0), value=tiny_models.PAD)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return distance(run(model, padded, attention_mask=mask, position_ids=positions)[:, 3:], run(model, ids))


def gradients(build: Build) -> None:
    mods = [rm.LearnedSink(init=0.3), rm.AdaptiveTemperature(trainable="head")]
    model, ids = modified(build, mods), tiny_models.tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if "ropemods" in name}
    lacking = [n for n, grad in own.items() if grad is None or not grad.isfinite().all() or grad.abs().max() == 0]
    assert own and not lacking, f"no gradient reaches {', '.join(lacking[:3])}"


def save_and_reload(build: Build) -> None:
    model, ids = modified(build, together(build)), tiny_models.tokens()
    wanted = run(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded = rm.from_pretrained(folder, attn_implementation=rm_backend(model))
        except Exception:
            _stock_round_trip(build)
            raise
        if not torch.equal(run(loaded, ids), wanted):
            _stock_round_trip(build)
            raise AssertionError(f"reloaded logits are off by {distance(run(loaded, ids), wanted):.1e}")


def rm_backend(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation).removeprefix("ropemods+")


def _stock_round_trip(build: Build) -> None:
    model, ids = build(), tiny_models.tokens()
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, attn_implementation=rm_backend(model))
        except Exception as error:
            raise Lacking(f"a stock checkpoint does not load: {type(error).__name__}: {str(error)[:100]}") from error
        if not torch.equal(run(loaded, ids), run(model, ids)):
            raise Lacking(f"a stock checkpoint reloads off by {distance(run(loaded, ids), run(model, ids)):.0e}")


def stock_load(build: Build) -> None:
    """A stock load of a checkpoint is the model that was saved, or an error."""
    ids = tiny_models.tokens()
    for mods, strength in ((together(build), 1.0), (TRUNCATED, 1.0), (SINK, 0.0)):
        try:
            model = modified(build, mods, strength)
        except Refused:  # it has a check of its own
            continue
        wanted = run(model, ids)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            try:
                # Of its own class: a few text configs inside multimodal ones are not in transformers' automatic table.
                stock = type(model).from_pretrained(folder, attn_implementation=rm_backend(model))
                found = run(stock, ids)
            except Exception:
                if strength == 0:
                    _stock_round_trip(build)
                    raise
                continue
        if not torch.equal(found, wanted):
            _stock_round_trip(build)
            # A native spelling of a table may differ in its last bit.
            assert mods is TRUNCATED and distance(found, wanted) < 1e-5, (
                f"a stock load at strength {strength} of {[mod.kind for mod in mods]} gives another model "
                f"(off by {distance(found, wanted):.1e}) and no error"
            )


def training(build: Build) -> None:
    ids = tiny_models.tokens(rows=4)
    model = modified(build, together(build)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in three steps"


CHECKS: dict[str, Callable[[Build], None]] = {
    "strength 0": strength_zero,
    "p-RoPE": p_rope,
    "temperature": on_rows(TEMPERATURE),
    "replaced BOS": replaced_bos,
    "sink": on_rows(SINK),
    "unrotated BOS": on_rows(UNROTATED),
    "all mods": on_rows(None),
    "cache": cached_decode,
    "left padding": left_padding,
    "gradients": gradients,
    "reload": save_and_reload,
    "stock load": stock_load,
    "training": training,
}


def check_all(build: Build) -> dict[str, dict[str, str]]:
    """Every check's outcome: pass, refused, stock (the stock model lacks it) or fail, with the reason."""
    try:
        made = build()
        run(made, tiny_models.tokens())
    except Exception as error:
        reason = f"the stock model does not run here: {type(error).__name__}: {_line(error)}"
        return {name: {"outcome": "stock", "reason": reason} for name in CHECKS}

    def fresh() -> PreTrainedModel:
        return copy.deepcopy(made)

    return {name: outcome(check, fresh) for name, check in CHECKS.items()}


def outcome(check: Callable[[Build], None], build: Build) -> dict[str, str]:
    try:
        check(build)
    except Refused as refusal:
        return {"outcome": "refused", "reason": _line(refusal)}
    except Lacking as lack:
        return {"outcome": "stock", "reason": _line(lack)}
    except AssertionError as failure:
        return {"outcome": "fail", "reason": _line(failure)}
    except Exception as error:
        return {"outcome": "fail", "reason": f"{type(error).__name__}: {_line(error)}"}
    return {"outcome": "pass", "reason": ""}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
