"""Which modifications may stand on which model, and beside each other: else an error, before anything is put on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ropemods.model import config_record, rope_tables
from ropemods.model.anatomy import Anatomy, survey
from ropemods.mods import Mod, recordable


def check_mods(mods: Sequence[Mod]) -> None:
    for mod in mods:
        if not isinstance(mod, Mod):
            raise TypeError(f"expected modifications such as TruncatedRoPE(0.75), got {mod!r}")
        if (reason := recordable(mod)) is not None:
            raise ValueError(reason)


def admitted(model: PreTrainedModel, mods: list[Mod], recorded: config_record.Record | None) -> Anatomy:
    """What the model is made of, or the reason why these modifications cannot stand on it."""
    check_mods(mods)
    if not rope_tables.find(model):
        raise ValueError(rope_tables.lacking(model))
    anatomy = survey(model)
    count = len(anatomy.layers)
    for mod in mods:
        outside = [i for i in mod.layers or () if not -count <= i < count]
        if outside:
            raise ValueError(
                f"{mod.kind}: layers {outside} do not exist; this model has {count}, from 0 to {count - 1}"
            )
        if not mod.acts_on(count):
            raise ValueError(f"{mod} chooses none of this model's {count} attention layers; choose one of them")
        if recorded is None:  # what stood together when it was saved is read as it was
            reason = mod.conflict([other for other in mods if other is not mod], count)
            if reason is not None:
                raise ValueError(reason)
    _check_one_of_a_kind(mods, count)
    edits = [mod for mod in mods if mod.edits_frequencies]
    if len(edits) > 1 and any(mod.for_some_layers for mod in edits):
        raise ValueError(
            f"{' and '.join(map(str, edits))} all change the rotary frequencies. They act one after the other where "
            "each takes every layer; with layers= one must stand alone, since the selected layers get one other table"
        )
    return anatomy


def bos_token(model: PreTrainedModel, mods: list[Mod], recorded: config_record.Record | None) -> int | None:
    """The token that these modifications look for; None where they look for none.

    A checkpoint's record holds it: what the config says may have been changed since (a Trainer writes its tokenizer's).
    """
    needing = [mod.kind for mod in mods if mod.needs_bos]
    looking = needing or [mod.kind for mod in mods if mod.calibrates]  # at what BOS had, if there is one
    if not looking:
        return None
    token = model.config.get_text_config().bos_token_id
    if recorded is not None and recorded.bos_token_id is not None:
        token = recorded.bos_token_id
    if token is None and not needing:
        return None
    if token is None:
        raise ValueError(
            f"{needing[0]} needs a BOS token and this model's config has none (bos_token_id is None); set "
            "model.config.bos_token_id to the token your sequences begin with, and put it in front of each"
        )
    weight = model.get_input_embeddings().weight
    size = getattr(weight, "ds_shape", weight.shape)[0]
    if type(token) is not int or not 0 <= token < size:
        where = "the config" if recorded is None else "the checkpoint's record"
        raise ValueError(
            f"{looking[0]} looks for a BOS token, and bos_token_id in {where} is {token!r}, which is none of the "
            f"model's {size} tokens; it is the id, a whole number from 0, of the token that your sequences begin with"
        )
    return token


def _check_one_of_a_kind(mods: list[Mod], layer_count: int) -> None:
    """In a layer. Twice in a model stands only what acts in its layers alone, with layers of its own each time."""
    for n, mod in enumerate(mods):
        for other in (other for other in mods[:n] if other.kind == mod.kind):
            whole = not (mod.for_some_layers and other.for_some_layers)
            beyond = whole or mod.edits_frequencies or mod.shared_stage()
            if beyond or any(mod.selects(i, layer_count) and other.selects(i, layer_count) for i in range(layer_count)):
                raise ValueError(
                    f"{mod.kind} was given twice, as {other} and as {mod}; one of a kind, or each with `layers` that "
                    "the others do not have (and nothing that all layers share)"
                )


def bos_elsewhere(model: PreTrainedModel, mods: Sequence[Mod]) -> str | None:
    """What there is to say where a modification of the BOS token also meets that token inside and behind sequences."""
    bos, ends = model.ropemods_attached.bos_token_id, model.config.get_text_config().eos_token_id
    kinds = [mod.kind for mod in mods if mod.needs_bos and mod.embedding_stage(bos) is not None]
    if not kinds or bos not in (ends if isinstance(ends, list | tuple) else [ends]):
        return None
    return (
        f"token {bos} begins sequences and ends them too in this model, and {kinds[0]} changes its embedding wherever "
        "it stands, as a row of the embedding table would; if your text has it inside or behind sequences, set "
        "model.config.bos_token_id to a token that only begins them, and train with that"
    )
