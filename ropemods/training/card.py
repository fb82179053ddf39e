"""The model card beside every trained model: what it is, how to load it, what it was trained on, what was found."""

from __future__ import annotations

from pathlib import Path

from ropemods.model.adapter_card import has_page
from ropemods.report.comparison import Comparison
from ropemods.report.words import count
from ropemods.settings.files import write_text
from ropemods.settings.versions import versions_of
from ropemods.training.arm import ARMS
from ropemods.training.arms import ArmResult
from ropemods.training.models import reload_lines
from ropemods.training.session import Session
from ropemods.training.table import duration

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets")


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    return versions_of(*PACKAGES)


PLOT = "leakage.svg"


def write_card(session: Session, result: ArmResult, table: str, compared: Comparison | None) -> Path:
    """README.md in the folder of a trained model, and the figure that it shows."""
    assert result.model is not None
    folder = session.folder / result.model
    plot = None
    if compared is not None:
        figure = compared.plot()
        figure.save(folder / PLOT)
        plot = figure.name
    return write_text(folder / "README.md", card(session, result, table, plot=plot))


def card(session: Session, result: ArmResult, table: str, *, plot: str | None) -> str:
    assert result.model is not None
    recipe, arm = session.recipe, ARMS[result.arm]
    options, lora = recipe.options, recipe.lora is not None
    args = session.arguments()
    text = session.data[arm.text or options.text]
    mods = [f"- {mod}" for mod in recipe.mods] if arm.mods else ["- none: this is the control of a comparison"]
    if arm.mods and recipe.penalty is not None:
        mods.append(f"- trained with {recipe.penalty}; nothing of it is in the model")
    schedule = [f"- {each}" for each in recipe.schedules()] if arm.mods else []
    trained = "a LoRA adapter" if lora else "all parameters"
    lines = [
        *_front_matter(options.model_name_or_path, lora=lora),
        f"# {Path(options.model_name_or_path).name}, {result.name.replace('-', ', seed ')}",
        "",
        f"Fine-tuned from `{options.model_name_or_path}` with ropemods; trained: {trained}.",
        "",
        "## Load it",
        "",
        "```python",
        reload_lines(
            session.folder / result.model,
            mods=arm.mods and bool(recipe.mods),
            lora=lora,
            gguf_file=options.gguf_file,
        ),
        "```",
        "",
        "## Modifications",
        "",
        *mods,
        *schedule,
        "",
        "## Training",
        "",
        f"- text: {text.facts['description']}",
        f"- {result.steps} steps of {session.global_batch} rows, {count(result.tokens)} tokens, seed {result.seed}, "
        f"{duration(result.seconds)}",
        f"- distribution: {session.world}",
        f"- learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value} schedule",
        f"- rows {text.facts['digest']}, recipe {(result.identity or {}).get('recipe')}",
        "",
        "## Found",
        "",
        "Leakage in nats² on held-out documents, with intervals; loss in nats per token. The fair comparison is "
        "modified against control: both read the same rows in the same order.",
        "",
        table,
        "",
        *([f"![{plot}]({PLOT})", ""] if plot else []),
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(base: str, *, lora: bool) -> list[str]:
    """What the hub reads. A local base has no page there to link to."""
    from huggingface_hub import ModelCardData

    linked = has_page(base)
    data = ModelCardData(
        library_name="peft" if lora else "transformers",
        tags=["ropemods"],
        pipeline_tag="text-generation",
        base_model=base if linked else None,
        base_model_relation=("adapter" if lora else "finetune") if linked else None,
    )
    return ["---", data.to_yaml(), "---", ""]
