"""How an arm is run: build, train, save, read back, measure. What the arms are is in `arm.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

import ropemods
from ropemods.report.report import Report
from ropemods.settings.files import write_text
from ropemods.settings.json_records import decode, read_json
from ropemods.training import measuring, models, peak_memory
from ropemods.training.arm import Arm
from ropemods.training.fit import Fitted, fit, probe_ids
from ropemods.training.measuring import Measured
from ropemods.training.session import Session
from ropemods.training.token_rows import Text
from ropemods.training.tracked_arm import TrackedArm, scalars, tracked


class ReloadDiffers(RuntimeError):
    """What was saved is not the model that was trained."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """A row of the table."""

    arm: str
    seed: int | None
    """None for an arm that is not trained."""
    identity: dict[str, Any] | None
    loss: float
    perplexity: float
    held_out_tokens: int
    report: str | None
    """Where its report is, from output_dir."""
    model: str | None
    """Where the trained model is, from output_dir."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    curve: tuple[tuple[int, float], ...] = ()
    """(step, training loss)."""
    probes: tuple[tuple[int, float, float, float], ...] = ()
    """(step, early residual, low, high)."""
    reload_difference: float | None = None
    """The largest difference of a logit between the model in memory and the one read back."""

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}-{self.seed}"

    def read_report(self, folder: Path) -> Report | None:
        return None if self.report is None else Report.from_json(folder / self.report)


def run_arm(session: Session, arm: Arm, seed: int | None) -> ArmResult:
    """Run one arm, or read what it found where that is done already and the recipe resumes."""
    name = arm.name if seed is None else f"{arm.name}-{seed}"
    folder = session.folder / name
    text = arm.text or session.recipe.options.text
    identity = None if seed is None else session.identity(arm.name, seed, text)
    done = _done(session, folder, identity)
    if done is not None:
        session.say(f"{name}: done before, read from {folder}")
        return done
    session.say(f"{name}:")
    if session.first:
        folder.mkdir(parents=True, exist_ok=True)
    with tracked(session, name, folder, _before(session)) as run:
        peak_memory.restart()
        if seed is None:
            model, fitted, difference = _untrained(session, arm), None, None
        else:
            model, fitted, difference = _trained(session, arm, seed, text, folder, run)
        found = measuring.measure(
            model,
            session.base.tokenizer,
            session.data[session.recipe.options.text],
            session.recipe.protocol,
            bos=session.base.bos,
            device=session.device,
            batch_size=session.batch[0],
            command=session.command,
        )
        result = _result(session, arm, seed, identity, folder, found, fitted, difference)
        run.measured(scalars(found.loss, found.report), model)
        run.close(model, failed=False)
    session.say(f"  held-out loss {found.loss:.4f}, perplexity {found.perplexity:.2f}")
    return result


def _before(session: Session) -> dict[str, float]:
    """What was measured of the model that every trained arm starts from, where that has been done."""
    path = session.folder / "base" / "result.json"
    if "base" not in session.recipe.options.arms or not path.is_file():
        return {}
    base = read_result(path)
    return scalars(base.loss, base.read_report(session.folder))


def _untrained(session: Session, arm: Arm) -> nn.Module:
    model = models.load(session.recipe, session.base)
    if arm.mods:
        models.modified(session.recipe, model, session.calibration(), strength=1.0)
        session.say(_indented(ropemods.summary(model)))
    return model


def _trained(
    session: Session, arm: Arm, seed: int, text: Text, folder: Path, run: TrackedArm
) -> tuple[nn.Module, Fitted | None, float | None]:
    set_seed(seed)  # what LoRA draws
    model = models.load(session.recipe, session.base)
    mods = arm.mods and bool(session.recipe.mods)
    if mods:
        models.modified(session.recipe, model, session.calibration(), strength=0.0)
    model = models.with_lora(session.recipe, model, mods=mods)
    session.say(f"  {models.trainable(model)}")
    penalty = session.recipe.penalty if arm.mods else None
    fitted = fit(session, model, folder, arm=arm.name, mods=mods, penalty=penalty, seed=seed, text=text, run=run)
    del model
    back = models.reload(session.recipe, session.base, fitted.model, mods=mods, dtype=fitted.dtype)
    return back, fitted, _difference(session, back, fitted)


@torch.no_grad()
def _difference(session: Session, back: nn.Module, fitted: Fitted) -> float:
    """How far the saved model's logits are from those in memory; an error where that is more than rounding."""
    args = session.arguments()
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    # DeepSpeed trains weights that are themselves of the lower precision.
    autocast = mixed is not None and not session.world.kind.startswith("zero")
    back = back.to(session.device).eval()
    with torch.autocast(session.device.type, dtype=mixed, enabled=autocast):
        out = back(input_ids=probe_ids(session).to(session.device), use_cache=False)
    logits_BTV = out.logits.float().cpu()
    difference = float((logits_BTV - fitted.logits_BTV).abs().max())
    scale = float(fitted.logits_BTV.abs().max())
    allowed = (1e-5 if mixed is None and fitted.dtype == torch.float32 else 2e-2) * scale
    if not difference <= allowed:
        raise ReloadDiffers(
            f"{fitted.model} gives logits that differ by up to {difference:.3g} (of {scale:.3g}) from those of the "
            "model in memory, so it is not the model that was trained; its numbers would be another model's"
        )
    return difference


def _done(session: Session, folder: Path, identity: dict[str, Any] | None) -> ArmResult | None:
    path = folder / "result.json"
    if session.recipe.options.resume_from_checkpoint:
        if not path.is_file():
            return None
        found = read_result(path)
        return found if found.identity == identity else None
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds an earlier run of this arm; go on with it (--resume_from_checkpoint), take another "
            "output_dir, or remove it"
        )
    return None


def _result(
    session: Session,
    arm: Arm,
    seed: int | None,
    identity: dict[str, Any] | None,
    folder: Path,
    found: Measured,
    fitted: Fitted | None,
    difference: float | None,
) -> ArmResult:
    report = None
    if found.report is not None:
        report = str((folder / "report.json").relative_to(session.folder))
    result = ArmResult(
        arm=arm.name,
        seed=seed,
        identity=identity,
        loss=found.loss,
        perplexity=found.perplexity,
        held_out_tokens=found.tokens,
        report=report,
        model=None if fitted is None else str(fitted.model.relative_to(session.folder)),
        steps=0 if fitted is None else session.steps,
        tokens=0 if fitted is None else fitted.tokens,
        seconds=0.0 if fitted is None else fitted.seconds,
        peak_bytes=peak_memory.peak_bytes() if fitted is None else fitted.peak_bytes,
        curve=() if fitted is None else tuple(fitted.curve),
        probes=() if fitted is None else tuple(fitted.probes),
        reload_difference=difference,
    )
    if session.first:
        if found.report is not None:
            found.report.to_json(folder / "report.json")
        write_text(folder / "result.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


def read_result(path: Path) -> ArmResult:
    found: ArmResult = decode(ArmResult, read_json(path, "Delete it to run its arm again."), str(path))
    return found


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
