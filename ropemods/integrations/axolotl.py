"""The plugin for axolotl: modifications, their schedule, a penalty and measurements out of an axolotl config.

    plugins: [ropemods.integrations.axolotl.RopemodsPlugin]
    ropemods:
      mods: [{kind: truncated_rope, keep: 0.75}]
      schedule: {steps: 300}
      penalty: {weight: 3.0}
      measure: {held_out_data: books.jsonl, protocol: {sequences: 64, length: 256}}

`mods`, `schedule` and `penalty` are written as in a recipe of ropemods. `measure` writes `ropemods-before.json`,
`ropemods-after.json` and the comparison of the two to `output_dir`.

axolotl calls `pre_lora_load` when a model is as it will be trained but for its adapter: loaded, quantised, with its
embedding resized and the tokenizer's BOS token. It calls it for reference models too: they are the modified start.

axolotl goes on without a plugin that cannot be imported. So nothing but axolotl and pydantic is imported here until a
hook is called, where an error stops it.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from ropemods.penalty import Penalized

NAME = "ropemods.integrations.axolotl.RopemodsPlugin"
EXAMPLE = "ropemods: {mods: [{kind: truncated_rope, keep: 0.75}]}"


class Measure(BaseModel):
    """What is measured before and after training."""

    model_config = ConfigDict(extra="forbid")
    held_out_data: str = Field(description="text that never trains: a .txt, .jsonl or .parquet file, or a dataset")
    column: str = Field("text", description="the field that holds the text")
    separator: str = Field("auto", description="what parts the documents of a .txt file")
    protocol: dict[str, Any] = Field(default_factory=dict, description="the fields of ropemods.Protocol")


class Settings(BaseModel):
    """What stands under `ropemods:`."""

    model_config = ConfigDict(extra="forbid")
    mods: Any = Field(None, description="modifications, as in a recipe of ropemods")
    schedule: Any = Field(None, description="the arguments of StrengthSchedule; left out, strength is 1 from the start")
    penalty: dict[str, Any] | None = Field(None, description="the arguments of ropemods.penalize")
    measure: Measure | None = None


class RopemodsArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    ropemods: Settings | None = Field(None, description="positional encoding modified while training")

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: dict[str, Any]) -> dict[str, Any]:
        if NAME not in (data.get("plugins") or ()):  # an earlier config of this process had it
            return data
        if data.get("ropemods") is None:
            raise ValueError(f"plugins has {NAME}, and nothing says what it is to do; write for example {EXAMPLE}")
        for reason in refusals(data):
            raise ValueError(f"ropemods: {reason}")
        return data

    @model_validator(mode="after")
    def read(self) -> RopemodsArgs:
        if self.ropemods is not None:
            try:
                asked = read(self.ropemods.model_dump())
            except TypeError as error:  # which pydantic would not take for a message
                raise ValueError(str(error)) from None
            if asked["penalty"] is not None and getattr(self, "rl", None):
                raise ValueError(
                    f"ropemods: penalty joins the loss that the model returns, and rl: {getattr(self, 'rl')} computes "  # noqa: B009
                    "its own; leave penalty out"
                )
        return self


def refusals(config: dict[str, Any]) -> list[str]:
    """What of an axolotl config would lose or change the modifications, or has not been tried with them."""
    found = []
    if config.get("merge_lora"):
        found.append(
            "axolotl merges an adapter into the files of the unmodified base; merge it with ropemods: model = "
            "ropemods.from_pretrained(output_dir).merge_and_unload(), then model.save_pretrained(folder)"
        )
    elif config.get("lora_model_dir"):
        found.append(
            "lora_model_dir puts an adapter on that was trained before, on another model than this config modifies; "
            "to use it, ropemods.from_pretrained(lora_model_dir); to train from it, merge it there, save the model and "
            "begin from that"
        )
    for key in ("context_parallel_size", "tensor_parallel_size"):
        if (config.get(key) or 1) > 1:
            found.append(f"{key}: {config[key]} gives each rank a part of every attention call; set it to 1")
    if config.get("relora"):
        found.append("relora merges adapters into the weights while it trains; use adapter: lora")
    if config.get("attn_implementation") == "fp8":
        found.append("fp8 replaces the attention kernels after the model is loaded; use attn_implementation: sdpa")
    if (config.get("trl") or {}).get("use_vllm"):
        found.append("trl.use_vllm samples from a vLLM that has the unmodified model; set it to false")
    return found


def read(settings: Any) -> dict[str, Any]:
    """The mods, schedule, penalty and protocol of what stands under `ropemods:`."""
    from ropemods.leakage.protocol import Protocol
    from ropemods.training.recipe import check_schedule
    from ropemods.training.recipe_file import modifying

    asked = modifying(settings)
    measure = settings.get("measure")
    asked["protocol"] = None if measure is None else Protocol.from_dict(measure.get("protocol") or {})
    mods = asked["mods"]
    if not mods and asked["penalty"] is None:
        raise ValueError(f"ropemods: neither mods nor penalty, so nothing would change; write for example {EXAMPLE}")
    if mods:
        check_schedule(mods, asked["schedule"])
    elif asked["schedule"]:
        raise ValueError("ropemods: schedule moves modifications, and there are no mods")
    for mod in (mod for mod in mods if mod.calibrates):
        raise ValueError(
            f"ropemods: {mod} takes its start from a batch of text, and axolotl loads its model before its data; give "
            "it a start of its own, as in {kind: learned_sink, init: 0}, or train it with a recipe of ropemods"
        )
    return asked


class RopemodsPlugin(BasePlugin):
    """Puts modifications on what axolotl trains."""

    def __init__(self) -> None:
        super().__init__()
        self.penalized: Penalized | None = None

    def register(self, cfg: Any) -> None:
        import transformers
        from packaging.version import Version

        from ropemods.settings.versions import OLDEST

        if Version(transformers.__version__) < Version(OLDEST["transformers"]):
            raise ImportError(
                f"ropemods needs transformers {OLDEST['transformers']} or later, and {transformers.__version__} is "
                "installed, as axolotl asks for; pip install --no-deps a later one"
            )

    def get_input_args(self) -> str:
        return f"{RopemodsArgs.__module__}.{RopemodsArgs.__name__}"

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        if not cfg.ropemods:
            return
        from ropemods import apply, set_strength
        from ropemods.schedule import StrengthSchedule

        asked = read(cfg.ropemods.to_dict())
        if not asked["mods"]:
            return
        _bind_projections(model)
        apply(model, *asked["mods"])
        for entry in asked["schedule"]:
            schedule = StrengthSchedule(**entry)
            set_strength(model, schedule.at(0), schedule.kind)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        if not cfg.ropemods:
            return []
        from ropemods.penalty import Penalized
        from ropemods.schedule import StrengthSchedule

        asked = read(cfg.ropemods.to_dict())
        callbacks: list[TrainerCallback] = [StrengthSchedule(**entry) for entry in asked["schedule"]]
        callbacks.append(StillThere(asked["mods"]))
        if asked["penalty"] is not None:
            self.penalized = Penalized(model, asked["penalty"])
            callbacks.append(self.penalized.callback())
        return callbacks

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        if not cfg.ropemods or not cfg.ropemods.measure:
            return []
        from ropemods.integrations.measurements import Measurements
        from ropemods.training.text import Source

        measure = cfg.ropemods.measure
        source = Source(name=measure.held_out_data, column=measure.column, separator=measure.separator)
        return [Measurements(trainer.processing_class, source, read(cfg.ropemods.to_dict())["protocol"])]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.ropemods and cfg.sample_packing:
            for name in ("data_collator", "eval_data_collator"):
                if getattr(trainer, name, None) is not None:
                    setattr(trainer, name, PaddingOfTheLast(getattr(trainer, name), trainer.processing_class))

    def post_train(self, cfg: Any, model: Any) -> None:
        if self.penalized is not None:
            self.penalized.remove()
            self.penalized = None


def _bind_projections(model: nn.Module) -> None:
    """axolotl's LoRA kernels rewrite the forward of attention layers, to call what a layer gets with its adapter only.

    `apply` calls the model before, with the projections that axolotl itself binds where there is no adapter.
    """
    from axolotl.monkeypatch.lora_kernels import original_apply_o, original_apply_qkv_optional_v

    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)
        for name, method in (("apply_qkv", original_apply_qkv_optional_v), ("apply_o", original_apply_o)):
            if code is not None and name in code.co_names:
                setattr(module, name, types.MethodType(method, module))


class PaddingOfTheLast:
    """A collator of packed rows that counts the padding behind a row's last sequence as a part of that.

    axolotl counts its positions from 0 and leaves the attention mask out, so that it passes for one more sequence, and
    has no BOS. No token of text sees it either way.
    """

    def __init__(self, collator: Any, tokenizer: Any) -> None:
        self.collator, self.pad = collator, tokenizer.pad_token_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collator(*args, **kwargs)
        if "position_ids" in batch and "attention_mask" not in batch:
            for ids_T, positions_T in zip(batch["input_ids"], batch["position_ids"], strict=True):
                text = (ids_T != self.pad).nonzero()
                end = int(text[-1]) if len(text) else -1
                positions_T[end + 1 :] = torch.arange(1, len(ids_T) - end, device=ids_T.device) + positions_T[end]
        return batch


class StillThere(TrainerCallback):
    """Holds, before the first step, that training begins with the modifications, and trains what of them trains."""

    def __init__(self, mods: tuple[Any, ...]) -> None:
        self.mods = mods

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        from ropemods import summary
        from ropemods.model.wrappers import base_model, unwrapped

        inner = base_model(unwrapped(model))
        if self.mods:
            summary(inner)  # which is an error where something took them off or went around them
        for mod in (mod for mod in self.mods if mod.has_parameters):
            own = [p for name, p in inner.named_parameters() if {"ropemods", mod.kind} <= set(name.split("."))]
            if not any(parameter.requires_grad for parameter in own):
                raise ValueError(
                    f"{mod} has {len(own)} tensors to train, and all are frozen; add '.+ropemods' to "
                    "unfrozen_parameters"
                )
