"""A modified architecture in use: decoding, padding, training, checkpoints, measurement."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ropemods as rm
from evals import tiny_configs, tiny_models
from evals.architecture_subject import ROUNDING, Lacking, Refused, Subject, distance, example, run
from ropemods.mods import MODS

PROMPT = 5


# Decoding and padding


def cached_decode(subject: Subject) -> str | None:
    return _as_stock(subject, _cache_error, "cached decoding")


def left_padding(subject: Subject) -> str | None:
    return _as_stock(subject, _padding_error, "left padding")


def _as_stock(subject: Subject, error_of: Callable[[PreTrainedModel], float], what: str) -> str | None:
    """The modified model has the property wherever the stock one has it."""
    model = subject.modified(subject.together())
    try:
        error = error_of(model)
    except ValueError:  # what the stock model hands over may be what is refused: a token without its sequence
        if _stock_error(error_of, subject) <= ROUNDING:
            raise
        error = float("inf")
    if error <= ROUNDING:
        return None
    own = _stock_error(error_of, subject)
    if own <= ROUNDING:
        raise AssertionError(f"{what} is off by {error:.1e}, in the stock model by {own:.1e}")
    # Some models lose it where a window or a sparse selection is shorter than the sequence.
    wide = subject.wide()
    wide_own = _stock_error(error_of, wide)
    if wide_own > ROUNDING:
        raise Lacking(f"stock {what} is off by {own:.0e}")
    error = error_of(wide.modified(wide.together()))
    assert error <= ROUNDING, f"{what} within the window is off by {error:.1e}, in the stock model by {wide_own:.1e}"
    return f"within the window; past it stock {what} is off by {own:.0e}"


def _stock_error(error_of: Callable[[PreTrainedModel], float], subject: Subject) -> float:
    try:
        return error_of(subject())
    except Exception as error:
        raise Lacking(f"the stock model fails at it: {type(error).__name__}: {str(error)[:120]}") from error


def _cache_error(model: PreTrainedModel) -> float:
    """Token by token against one pass, and greedy generation against one pass over what it generated."""
    ids = tiny_models.tokens()
    whole = run(model, ids)
    worst = 0.0
    with torch.no_grad():
        out = model(input_ids=ids[:, :PROMPT], use_cache=True)
        for t in range(PROMPT, ids.shape[1]):
            positions = torch.full((len(ids), 1), t)
            step = {"input_ids": ids[:, t : t + 1], "position_ids": positions, "use_cache": True}
            out = model(**step, past_key_values=out.past_key_values)
            worst = max(worst, distance(out.logits[:, -1], whole[:, t]))
    return max(worst, _greedy_error(model, ids[:, :PROMPT]))


def _greedy_error(model: PreTrainedModel, prompt: Tensor) -> float:
    """By how much, of the largest logit, another token was better than the one generated with the cache."""
    pad = tiny_configs.PAD  # its embedding is zero: to sparse attention all keys are then the same
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": pad}
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), suppress_tokens=[pad], **options)
    assert generated.shape[1] == prompt.shape[1] + 5, f"{generated.shape[1] - prompt.shape[1]} tokens were generated"
    logits = run(model, generated[:, :-1])[:, prompt.shape[1] - 1 :]
    chosen = logits.gather(-1, generated[:, prompt.shape[1] :, None])[..., 0]
    logits[..., pad] = float("-inf")
    return ((logits.amax(-1) - chosen).max() / chosen.abs().max()).item()


def _padding_error(model: PreTrainedModel) -> float:
    ids = tiny_models.tokens()
    padded = torch.nn.functional.pad(ids, (3, 0), value=tiny_configs.PAD)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return distance(run(model, padded, attention_mask=mask, position_ids=positions)[:, 3:], run(model, ids))


# Training


def gradients(subject: Subject) -> None:
    """Every parameter of every modification that trains, where the model takes it."""
    subject.together()  # for the refusal of a model that takes none
    for mod in map(example, MODS):
        if not mod.has_parameters or not subject.takes(mod):
            continue
        model, ids = subject.modified([mod]), tiny_models.tokens()
        try:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        except ValueError as refusal:  # what asks for a gradient is seen in training only, as of a mask that is learned
            raise Refused(str(refusal)) from refusal
        loss.backward()
        own = {name: p.grad for name, p in model.named_parameters() if "ropemods" in name}
        lacking = [n for n, g in own.items() if g is None or not g.isfinite().all() or g.abs().max() == 0]
        assert own and not lacking, f"no gradient reaches {', '.join(lacking[:3])} of {mod}"


def training(subject: Subject) -> None:
    """Three steps lower the loss."""
    ids = tiny_models.tokens(rows=4)
    model = subject.modified(subject.together()).train()
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


# Checkpoints


def save_and_reload(subject: Subject) -> str | None:
    model, ids = subject.modified(subject.together()), tiny_models.tokens()
    wanted = run(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded = rm.from_pretrained(folder, attn_implementation=_backend(model))
        except Exception:
            _stock_round_trip(subject)
            raise
        error = distance(run(loaded, ids), wanted)
        if torch.equal(run(loaded, ids), wanted):
            return None
    own = _stock_round_trip(subject)
    assert error <= 2 * own, f"reloaded logits are off by {error:.1e}, those of the stock model by {own:.1e}"
    return f"as exact as the stock model, whose own reload is off by {own:.0e}"


def _backend(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation).removeprefix("ropemods+")


def _stock_round_trip(subject: Subject) -> float:
    """How far stock logits move by saving and loading; `Lacking` where that is more than rounding."""
    model, ids = subject(), tiny_models.tokens()
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, attn_implementation=_backend(model))
        except Exception as error:
            raise Lacking(f"a stock checkpoint does not load: {type(error).__name__}: {str(error)[:100]}") from error
        error = distance(run(loaded, ids), run(model, ids))
    if error > 1e-6:
        raise Lacking(f"a stock checkpoint reloads off by {error:.0e}")
    return error


def stock_load(subject: Subject) -> None:
    """A stock load of a checkpoint is the model that was saved, or an error."""
    ids, together = tiny_models.tokens(), subject.together()
    tables = [next(mod for mod in map(example, MODS) if mod.edits_frequencies)]
    parameters = [next(mod for mod in map(example, MODS) if mod.has_parameters)]
    for mods, strength in ((together, 1.0), (tables, 1.0), (parameters, 0.0)):
        try:
            model = subject.modified(mods, strength)
        except Refused:  # it has a check of its own
            continue
        wanted = run(model, ids)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            try:
                # Of its own class: a few text configs inside multimodal ones are not in transformers' automatic table.
                stock = type(model).from_pretrained(folder, attn_implementation=_backend(model))
                found = run(stock, ids)
            except Exception:
                if strength == 0:
                    _stock_round_trip(subject)
                    raise
                continue
        if not torch.equal(found, wanted):
            # A native spelling of a table may differ in its last bit, and so may what the stock model reloads.
            bound = 1e-5 if mods is tables else 2 * _stock_round_trip(subject)
            assert distance(found, wanted) <= bound, (
                f"a stock load at strength {strength} of {[mod.kind for mod in mods]} gives another model "
                f"(off by {distance(found, wanted):.1e}) and no error"
            )
