"""TRL's trainers on a tiny model, with TRL's own defaults (bf16 and gradient checkpointing among them)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)

import ropemods as rm
from tests import zoo

MODS = (rm.TruncatedRoPE(0.5), rm.LearnedSink(init=0.3))
WITH_REFERENCE = ("dpo", "kto", "grpo", "rloo")


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, and a BOS in front, as real ones put it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<s>": zoo.BOS, "</s>": 2} | {f"w{n}": n for n in range(3, zoo.VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", zoo.BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_base(folder: Path) -> Path:
    zoo.build().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def modified(base: Path, trainer: str = "sft", *mods: rm.Mod, **options: Any) -> PreTrainedModel:
    """As the trainer wants its model: a causal LM, for the reward trainer one with a score."""
    if trainer == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    return rm.apply(model, *(mods or MODS), **options)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], **options)


def words(first: int, count: int) -> str:
    return " ".join(f"w{3 + (7 * first + n) % (zoo.VOCAB - 3)}" for n in range(count))


def rows(trainer: str) -> Dataset:
    numbers = range(8)
    if trainer == "sft":
        return Dataset.from_list([{"text": words(n, 4 + n)} for n in numbers])
    prompts = [{"prompt": words(n, 2 + n % 3)} for n in numbers]
    if trainer in ("grpo", "rloo"):
        return Dataset.from_list(prompts)
    if trainer == "kto":
        more: list[dict[str, Any]] = [{"completion": " " + words(n + 1, 3), "label": n % 2 == 0} for n in numbers]
    else:
        more = [{"chosen": " " + words(n + 1, 3), "rejected": " " + words(n + 2, 5)} for n in numbers]
    return Dataset.from_list([prompt | each for prompt, each in zip(prompts, more, strict=True)])


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def make(trainer: str, model: Any, folder: Path, *, callbacks: list | None = None, cls: Any = None, **options: Any):
    """A trainer of that name; what is not an argument of its config goes to the trainer."""
    names = ("peft_config", "ref_model", "train_dataset", "eval_dataset")
    to_trainer = {name: options.pop(name) for name in names if name in options}
    generates = trainer in ("grpo", "rloo")
    more = {"num_generations": 2, "max_completion_length": 4} if generates else {}
    given = {
        "max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-2,
    } | more | options  # fmt: skip
    name = {"sft": "SFT", "reward": "Reward"}.get(trainer, trainer.upper())
    return (cls or getattr(trl, f"{name}Trainer"))(
        model,
        args=getattr(trl, f"{name}Config")(str(folder / "run"), **given),
        processing_class=tokenizer(),
        callbacks=callbacks,
        **({"reward_funcs": reward} if generates else {}),
        **({"train_dataset": rows(trainer)} | to_trainer),
    )


def ready(trainer: str, base: Path, folder: Path, *, adapter: bool, **options: Any) -> Trainer:
    """A trainer of a modified model, with the reference model that it asks for."""
    model = modified(base, trainer)
    if adapter:
        # The head of a reward model is new, so TRL advises to save it.
        options["peft_config"] = lora(**({"modules_to_save": ["score"]} if trainer == "reward" else {}))
    elif trainer in ("dpo", "kto"):
        options["ref_model"] = copy.deepcopy(model)
    elif trainer == "rloo":  # which takes none
        model.save_pretrained(folder / "start")
        model = rm.from_pretrained(folder / "start")
    return make(trainer, model, folder, **options)


def logits(trainer: Trainer, model: Any, ids: Tensor | None = None) -> Tensor:
    """Of a model that a trainer has prepared, outside its autocast."""
    bare = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    was, ids = bare.training, zoo.tokens() if ids is None else ids
    with torch.no_grad():
        found = bare.eval()(ids).logits
    bare.train(was)
    return found


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
