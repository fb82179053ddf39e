"""Two modifications on one model: they compose as the formulas say, or are refused, in whichever order they are given.

Every pair of ours is tried on the same layer, on layers of their own and on all layers. A pair is refused exactly where
one would undo or hide what the other does; everywhere else each attention call is what the fp64 oracle makes of both,
the rotary tables and the input of the first layer are what each modification says they are.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from evals import naive_attention
from ropemods.attention import reference
from ropemods.model.attention_layers import attention_layers
from tests import zoo
from tests.contract import close, perturb
from tests.mods.own import Cooled, Levelled, Shifted, Slowed

LAYERS = 2
OURS = {
    "rope": lambda **o: rm.TruncatedRoPE(0.5, **o),
    "no rope": lambda **o: rm.DroppedRoPE(**o),
    "temperature": lambda **o: rm.AdaptiveTemperature(trainable="head", **o),
    "temperature sparing BOS": lambda **o: rm.AdaptiveTemperature(spare_bos=True, beyond="hold", **o),
    "log temperature": lambda **o: rm.LogTemperature(neutral=3, **o),
    "distances": lambda **o: rm.ScaleInvariant(tau=2, start="paper", **o),
    "gate": lambda **o: rm.OutputGate(**o),
    "replaced": lambda **o: rm.ReplacedBos("mean", **o),
    "unrotated": lambda **o: rm.UnrotatedBos(**o),
    "sink": lambda **o: rm.LearnedSink(init=0.3, **o),
    "sink beside BOS": lambda **o: rm.LearnedSink(init=0.3, read_bos=True, **o),
}
PLACES = {
    "all": (None, None),
    "same": ((0,), (-2,)),
    "apart": ((0,), (1,)),
    "first in all": (None, (1,)),
    "second in all": ((1,), None),
}


def pairs():
    """Every two, in every place; in one order or the other, by turns."""
    cases = list(itertools.product(itertools.combinations_with_replacement(OURS, 2), PLACES.items()))
    for index, (names, (place, where)) in enumerate(cases):
        options = [{} if layers is None else {"layers": layers} for layers in where]
        if any(name == "replaced" and each for name, each in zip(names, options, strict=True)):
            continue  # it takes no layers
        mods = [OURS[name](**each) for name, each in zip(names, options, strict=True)]
        yield pytest.param(*mods[:: -1 if index % 2 else 1], id=f"{'-'.join(names)}-{place}")


def layers_of(mod: rm.Mod) -> set[int]:
    return set(range(LAYERS)) if mod.layers is None else {index % LAYERS for index in mod.layers}


def should_be_refused(one: rm.Mod, other: rm.Mod) -> bool:
    """By what the modifications are, written down here anew."""
    both = layers_of(one) & layers_of(other)
    if one.kind == other.kind:
        return bool(both) or one.edits_frequencies
    if one.edits_frequencies and other.edits_frequencies:
        return one.layers is not None or other.layers is not None
    for sink, mod in ((one, other), (other, one)):
        if isinstance(sink, rm.LearnedSink) and not sink.read_bos:
            if isinstance(mod, rm.UnrotatedBos) and both:
                return True
            if isinstance(mod, rm.ReplacedBos) and len(layers_of(sink)) == LAYERS:
                return True
    return False


@pytest.mark.parametrize(("one", "other"), pairs())
def test_a_pair_composes_as_the_formulas_say_or_is_refused(one: rm.Mod, other: rm.Mod) -> None:
    backend = "eager" if "scale_invariant" in (one.kind, other.kind) else "sdpa"  # fused kernels know no distances
    stock, ids, strength = zoo.build("llama", backend), zoo.tokens(rows=1, length=7), 0.6
    model = zoo.build("llama", backend)
    if should_be_refused(one, other):
        with pytest.raises(ValueError, match=r"do nothing|reach no later token|given twice|must stand alone"):
            rm.apply(model, one, other, strength=strength)
        assert torch.equal(model(ids).logits, stock(ids).logits)
        return
    perturb(rm.apply(model, one, other, strength=strength))
    check_tables(model, [one, other], stock, strength)
    check_input(model, [one, other], stock, ids, strength)
    bos = torch.zeros(1, 7, dtype=torch.long)
    with naive_attention.recorded(model) as calls, torch.no_grad():
        model(ids, use_cache=False)
    layers = [layer for _, layer in attention_layers(model)]
    for call in calls:
        site = layers[call.layer].ropemods_site
        table = site.table.live(), *(site.layout or (False, 0))
        wide = [t.double() for t in (call.query, call.key, call.value)]
        wanted = naive_attention.recompute(call, *wide, backend=backend, bos_BT=bos, rotary=table)
        close(call.output.double(), wanted, 2e-5)


def check_tables(model, mods, stock, strength) -> None:
    wanted = stock.model.rotary_emb.inv_freq.double()
    for index, (_, layer) in enumerate(attention_layers(model)):
        edited = wanted
        for mod in (mod for mod in mods if index in layers_of(mod)):
            if mod.edits_frequencies:
                keep = 0.5 if mod.kind == "truncated_rope" else 0.0
                edited = reference.truncated_frequencies(edited, keep=keep, strength=strength)
        close(layer.ropemods_site.table.live().double(), edited, 1e-6)


def check_input(model, mods, stock, ids, strength) -> None:
    weight = stock.get_input_embeddings().weight.double()
    wanted = weight[ids]
    if any(mod.kind == "replaced_bos" for mod in mods):
        wanted[:, 0] = (1 - strength) * weight[zoo.BOS] + strength * weight.mean(0)
    close(model.get_input_embeddings()(ids).double(), wanted, 1e-6)


@pytest.mark.parametrize("other", [rm.UnrotatedBos(layers=[1]), rm.ReplacedBos()], ids=str)
def test_several_sinks_that_close_bos_in_all_layers_together_hide_it_as_one_does(other) -> None:
    sinks = [rm.LearnedSink(init=0.3, layers=[0]), rm.LearnedSink(init=0.3, layers=[-1], read_bos=False)]
    with pytest.raises(ValueError, match=r"LearnedSink closes .*read_bos=True"):
        rm.apply(zoo.build(), *sinks, other)
    rm.apply(zoo.build(), sinks[0], rm.LearnedSink(init=0.3, layers=[1], read_bos=True), other)


def test_what_is_refused_in_some_layers_names_the_others() -> None:
    with pytest.raises(ValueError, match=r"in layers \[0\] both.*give UnrotatedBos the layers \[1\] alone"):
        rm.apply(zoo.build(), rm.UnrotatedBos(), rm.LearnedSink(layers=[0]))
    rm.apply(zoo.build(), rm.UnrotatedBos(layers=[1]), rm.LearnedSink(layers=[0]))


# With a modification of one's own


@pytest.mark.parametrize("mods", [[rm.AdaptiveTemperature(), Cooled()], [Cooled(), rm.AdaptiveTemperature()]], ids=str)
def test_two_temperatures_of_one_row_are_refused_layer_by_layer(mods) -> None:
    with pytest.raises(
        ValueError, match=r"both set the factor read off the entropy of the rows in layer 0.*layers= of its own"
    ):
        rm.apply(zoo.build(), *mods)
    apart = [type(mod)(layers=[index]) for index, mod in enumerate(mods)]
    model, ids = rm.apply(zoo.build(), *apart), zoo.tokens()
    assert all((model(ids).logits - rm.apply(zoo.build(), mod)(ids).logits).abs().max() > 1e-4 for mod in apart)


@pytest.mark.parametrize("order", [1, -1])
def test_two_logits_for_one_bos_column_are_refused_and_its_own_logit_is_none(order) -> None:
    with pytest.raises(ValueError, match="both set the logit of BOS"):
        rm.apply(zoo.build(), *[rm.UnrotatedBos(), Levelled()][::order])
    rm.apply(zoo.build(), *[rm.AdaptiveTemperature(spare_bos=True), Levelled(), Shifted()][::order])


def test_sinks_add_up() -> None:
    ids = zoo.tokens()
    two = rm.apply(zoo.build(), rm.LearnedSink(init=0.3, read_bos=True), Shifted(start=0.3))
    one = rm.apply(zoo.build(), rm.LearnedSink(init=0.3 + torch.tensor(2.0).log().item(), read_bos=True))
    close(two(ids).logits, one(ids).logits, 1e-5)


@pytest.mark.parametrize("scaling", ["default", "dynamic", "longrope"])
@pytest.mark.parametrize("order", [1, -1])
def test_changes_of_frequencies_act_one_after_the_other_and_all_are_recorded(scaling, order, tmp_path) -> None:
    changes = {} if scaling == "default" else {"rope_parameters": zoo.ROPE_SCALINGS[scaling]}
    changes["max_position_embeddings"] = 8
    model, ids = zoo.build(**changes), zoo.tokens(length=20)
    stock = model.model.rotary_emb.inv_freq.double()
    rm.apply(model, *[rm.TruncatedRoPE(0.5), Slowed(by=0.4)][::order], strength=1.0)
    rm.set_strength(model, 0.5, kind="slowed")
    close(model.model.rotary_emb.inv_freq.double(), reference.truncated_frequencies(stock, keep=0.5) * 0.8, 1e-6)
    logits = model(ids).logits  # long enough that dynamic tables are made anew
    if scaling == "dynamic":
        longer = zoo.build(**changes)
        longer(ids)
        stock = longer.model.rotary_emb.inv_freq.double()
        close(model.model.rotary_emb.inv_freq.double(), reference.truncated_frequencies(stock, keep=0.5) * 0.8, 1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(rm.from_pretrained(tmp_path / "saved")(ids).logits, logits)
    if scaling == "default":
        rm.export(model, tmp_path / "stock")
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")(ids).logits, logits, 1e-6)
    rm.set_strength(model, 0.0, kind="slowed")
    whole = rm.apply(zoo.build(**changes), rm.TruncatedRoPE(0.5))
    assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("order", [1, -1])
def test_changes_of_frequencies_for_some_layers_stand_alone(order) -> None:
    with pytest.raises(ValueError, match=r"all change the rotary frequencies.*with layers= one must stand alone"):
        rm.apply(zoo.build(), *[rm.TruncatedRoPE(0.5, layers=[0]), Slowed()][::order])


def test_some_layers_over_dynamic_tables_follow_the_length_too(tmp_path) -> None:
    changes = {"rope_parameters": zoo.ROPE_SCALINGS["dynamic"], "max_position_embeddings": 8}
    ids = zoo.tokens(length=20)
    model = rm.apply(zoo.build(**changes), rm.TruncatedRoPE(0.5, layers=[0, 1]))
    whole = rm.apply(zoo.build(**changes), rm.TruncatedRoPE(0.5))
    close(model(ids).logits, whole(ids).logits, 1e-6)
    close(model(ids[:, :6]).logits, whole(ids[:, :6]).logits, 1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(rm.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
