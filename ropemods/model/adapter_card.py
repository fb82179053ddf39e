"""The card in the folder of an adapter: what its base was modified with, and how both load again.

PEFT writes a form there that nobody has filled in; a card that somebody has written keeps its text and is given the
part on loading.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LOADING = "## Load it"
FORM = "# Model Card for Model ID"


def write(folder: Path, mods: list[Any], strength: dict[str, float], base: str) -> None:
    """Write README.md, or mend the one that is there."""
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / "README.md"
    data = ModelCardData(library_name="peft", pipeline_tag="text-generation")
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{data.to_yaml()}\n---\n")
    tags = {*(card.data.get("tags") or ()), "ropemods"}
    if has_page(base):
        card.data["base_model"] = base
    else:
        card.data.pop("base_model", None)
        tags = {tag for tag in tags if not tag.startswith("base_model:")}
    card.data["tags"] = sorted(tags)
    loading = _loading(folder, mods, strength, base)
    if not card.text.strip() or FORM in card.text:
        versions = card.text.partition("### Framework versions")
        card.text = f"# Adapter of a modified model\n\n{loading}\n\n{versions[1]}{versions[2]}".rstrip() + "\n"
    elif LOADING in card.text:
        # What is between backticks is not taken for the next heading.
        card.text = re.sub(rf"{LOADING}\n(?:```.*?```|(?!#).)*", lambda _: f"{loading}\n\n", card.text, flags=re.DOTALL)
    else:
        card.text = f"{card.text.rstrip()}\n\n{loading}\n"
    card.save(path)


def has_page(base: str) -> bool:
    """Whether a base may be linked to: a folder here has no page on the hub, which refuses metadata that say so."""
    return not Path(base).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None


def _loading(folder: Path, mods: list[Any], strength: dict[str, float], base: str) -> str:
    lines = [f"- {mod}, strength {strength[mod.kind]:g}" for mod in mods]
    return "\n".join(
        [
            LOADING,
            "",
            f"It belongs on `{base or 'its base'}` with these modifications of positional encoding, which "
            "ropemods puts there; PEFT alone refuses it.",
            "",
            *lines,
            "",
            "```python",
            "import ropemods as rm",
            "",
            f"model = rm.from_pretrained({str(folder)!r})",
            "```",
        ]
    )
