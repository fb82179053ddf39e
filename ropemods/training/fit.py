"""Training one arm with transformers' Trainer: the callbacks, a resume that is checked, the saved model."""

from __future__ import annotations

import gc
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ropemods.penalty import Penalized, Penalty
from ropemods.training import checkpoints, peak_memory, world
from ropemods.training.batches import Ordered, collator, order
from ropemods.training.checkpoints import CompleteCheckpoints
from ropemods.training.guard import Diverged, LossGuard
from ropemods.training.leakage_probe import LeakageProbe
from ropemods.training.measuring import held_out_documents
from ropemods.training.progress import Progress
from ropemods.training.session import Session
from ropemods.training.token_rows import Text
from ropemods.training.tracked_arm import TrackedArm

PROBED_TOKENS = 64
"""Tokens of held-out text on which a saved model is held against the one in memory."""


@dataclass(frozen=True)
class Fitted:
    """What training an arm left."""

    model: Path
    tokens: int
    """Trained on, padding left out."""
    seconds: float
    peak_bytes: int | None
    curve: list[tuple[int, float]]
    """(step, loss) of every log."""
    probes: list[tuple[int, float, float, float]]
    """(step, early residual, low, high)."""
    dtype: torch.dtype
    logits_BTV: Tensor
    """What the trained model said of `probe_ids`, before it was saved."""


class StateWorld(TrainerCallback):
    """States the distribution in force when training begins, and stops where it is not the one asked for."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.trainer: Trainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.trainer is not None
        found = world.in_force(self.trainer.model_wrapped)
        world.check(self.session.world, found)
        self.session.say(
            f"  in force: {found} · {args.device.type} · {self.session.global_batch} rows a step "
            f"({args.per_device_train_batch_size} × {args.gradient_accumulation_steps} × {found.size})"
        )


def fit(
    session: Session,
    model: nn.Module,
    folder: Path,
    *,
    arm: str,
    mods: bool,
    penalty: Penalty | None,
    seed: int,
    text: Text,
    run: TrackedArm,
) -> Fitted:
    """Train `model`, from the last complete checkpoint in `folder` if there is one, and save it to `folder`/model."""
    recipe, data = session.recipe, session.data[text]
    identity = session.identity(arm, seed, text)
    start = _resume_from(session, folder, identity)
    rows = Ordered(data.rows, order(len(data.rows), wanted=session.steps * session.global_batch, seed=seed))
    guard = LossGuard(factor=recipe.options.guard_factor, patience=recipe.options.guard_patience)
    kept = CompleteCheckpoints(keep=recipe.training.get("save_total_limit"), facts=identity)
    stated = StateWorld(session)
    penalized = None if penalty is None else Penalized(model, penalty)
    penalties = [] if penalized is None else [penalized.callback()]
    probes = []
    if recipe.options.probe_steps and recipe.probe is not None:
        probe = LeakageProbe(
            session.base.tokenizer,
            held_out_documents(data),
            recipe.probe,
            every=recipe.options.probe_steps,
            bos_token_id=session.base.bos,
        )
        probes = [probe]
        run.probe = probe
    args = session.arguments(
        output_dir=str(folder),
        seed=seed,
        # Parameters of a modification at strength 0 take no part in the loss, which DDP has to be told.
        ddp_find_unused_parameters=recipe.training.get(
            "ddp_find_unused_parameters", mods and any(mod.has_parameters for mod in recipe.mods)
        ),
    )
    trainer = Trainer(
        model,
        args,
        data_collator=collator(data.options.row_packing),
        train_dataset=rows,
        eval_dataset=Ordered(
            data.held_out_rows, order(len(data.held_out_rows), wanted=len(data.held_out_rows), seed=0)
        ),
        callbacks=[*(recipe.schedules() if mods else []), *penalties, *probes, guard, kept, stated],
    )
    stated.trainer = trainer
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    trainer.add_callback(Progress)
    trainer.add_callback(run)
    if start is not None:
        kept.seconds_before = checkpoints.read(start)["seconds"]
        session.say(f"  resuming from {start}")
    peak_memory.restart()
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if penalized is not None:
        penalized.remove()
    if guard.verdict is not None:
        raise Diverged(f"{arm}, seed {seed}: {guard.verdict}\n  losses: {guard.recovery()}")
    session.say(f"  losses: {guard.recovery()}")
    fitted = Fitted(
        model=folder / "model",
        tokens=rows.tokens(),
        seconds=kept.seconds(),
        peak_bytes=peak_memory.peak_bytes(),
        curve=guard.curve,
        probes=probes[0].curve if probes else [],
        dtype=next(p.dtype for p in trainer.model.parameters() if p.is_floating_point()),
        logits_BTV=_logits(trainer, probe_ids(session)),
    )
    _save(trainer, session, fitted.model)
    _release(trainer)
    return fitted


def probe_ids(session: Session) -> Tensor:
    """A little held-out text (1, T), BOS first."""
    rows = session.data[session.recipe.options.text].held_out_rows
    return torch.from_numpy(rows.tokens_NT[:1, :PROBED_TOKENS].astype("int64"))


@torch.no_grad()
def _logits(trainer: Trainer, ids_BT: Tensor) -> Tensor:
    """Of the model as it is wrapped: under ZeRO-3 and FSDP only that one has its parameters."""
    trainer.model_wrapped.eval()
    out = trainer.model_wrapped(input_ids=ids_BT.to(trainer.args.device), use_cache=False)
    return out.logits.float().cpu()


def _resume_from(session: Session, folder: Path, identity: dict[str, Any]) -> Path | None:
    if not session.recipe.options.resume_from_checkpoint:
        return None
    start = checkpoints.last_complete(folder)
    if start is not None:
        _check_same_run(session, start, identity)
    args = session.arguments(output_dir=str(folder))
    with world.first_of_ranks(args):
        for torn in checkpoints.discard_incomplete(folder) if args.should_save else []:
            print(f"  {torn} was not written to its end and is left out", flush=True)
    return start


def _check_same_run(session: Session, start: Path, identity: dict[str, Any]) -> None:
    said = checkpoints.read(start)
    different = [
        f"{key} was {said.get(key)!r} and is {value!r}" for key, value in identity.items() if said.get(key) != value
    ]
    if different:
        raise ValueError(
            f"{start} belongs to another run: {'; '.join(different)}. Resume with the recipe it was trained with, or "
            "take another output_dir"
        )
    if said["world_size"] != session.world.size and session.world.kind.startswith("zero"):
        raise ValueError(
            f"{start} was written by {said['world_size']} ranks and DeepSpeed cannot go on from it with "
            f"{session.world.size}; resume with as many"
        )


def _save(trainer: Trainer, session: Session, target: Path) -> None:
    """The model and its tokenizer, in one step: a folder of that name is always whole."""
    partial = target.with_name(f"{target.name}.partial")
    writes = trainer.args.should_save
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    _wait()
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(partial))
    _wait()
    if writes:
        session.base.tokenizer.save_pretrained(partial)
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe says the same in JSON
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    _wait()


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _release(trainer: Trainer) -> None:
    """Give back the memory of a training run before the next one needs it."""
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = trainer.deepspeed = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
