"""`ropemods show`: what a checkpoint or an adapter holds, without loading its weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from ropemods.cli.command import Command
from ropemods.mod_words import registering
from ropemods.settings.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a checkpoint or adapter holds. Reads configs and headers only, no weights: the model's shape, the
    modifications with their options and strengths, the rotary frequencies that are in force (how many are kept and
    dropped, and the wavelength of the first dropped band, whose phase at the context length tells how hard the cut
    is), and whether stock transformers loads it. On a stock model it shows what there would be to modify.
    """

    path: str = option(REQUIRED, "folder of a checkpoint or adapter, or a name on the hub", positional=True)
    paths: bool = option(
        False, "instead: which attention paths of this machine train this model with its modifications, or with any"
    )
    json: bool = option(False, "print JSON instead of text, with the wavelength of every band")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    register: tuple[Any, ...] = registering()


def run(options: Options) -> None:
    from ropemods.cli.description import describe
    from ropemods.cli.stock_checkpoints import quieten

    quieten()
    if options.paths:
        from ropemods.cli.path_table import paths_in_text, paths_of

        able = paths_of(options.path, trust_remote_code=options.trust_remote_code)
        print(json.dumps(able, indent=2) if options.json else paths_in_text(able))
        return
    found = describe(options.path, trust_remote_code=options.trust_remote_code)
    print(json.dumps(found, indent=2) if options.json else in_text(found))


def in_text(found: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    if found["adapter"] is not None:
        rows.append(("adapter", _adapter(found["adapter"])))
    if found["model"] is not None:
        rows.append(("model" if found["adapter"] is None else "base", _model(found["model"])))
    rows += [("mods", _mod(mod)) for mod in found["mods"]] or [("mods", "none")]
    for table in found["rope"]:
        context = found["model"]["context"]
        name = "rope" if table["layer_type"] is None else f"rope of {table['layer_type']} layers"
        partial = next((mod["layers"] for mod in found["mods"] if "keep" in mod and mod.get("layers")), None)
        rows += [(name, line) for line in _rope(table, context, partial)]
    if found["model"] is not None and not found["rope"]:
        rows.append(("rope", "none: this model has no rotary frequencies to modify"))
    rows.append(("stock", f"{'loads it' if found['loads_in_stock_transformers'] else 'no'}: {found['because']}"))
    rows += [("note", note) for note in found["notes"]]
    width = max(len(name) for name, _ in rows) + 2
    lines = [found["path"]]
    for index, (name, text) in enumerate(rows):
        repeated = index > 0 and rows[index - 1][0] == name
        lines.append(f"  {'' if repeated else name:<{width}}{text}")
    return "\n".join(lines)


def _adapter(adapter: dict[str, Any]) -> str:
    parts = [adapter["type"]]
    if adapter["rank"] is not None:
        parts.append(f"rank {adapter['rank']}, alpha {adapter['alpha']}")
    if adapter["targets"]:
        targets = adapter["targets"]
        parts.append(f"on {targets if isinstance(targets, str) else ', '.join(targets)}")
    if adapter["parameters"] is not None:
        parts.append(f"{adapter['parameters']:,} parameters")
    return f"{' · '.join(parts)} · base {adapter['base']}"


def _model(model: dict[str, Any]) -> str:
    shared = "" if model["key_value_heads"] == model["heads"] else f" ({model['key_value_heads']} key/value)"
    parts = [model["type"], f"{model['layers']} layers", f"{model['heads']} heads{shared} of {model['head_dim']}"]
    if model["context"] is not None:
        parts.append(f"context {model['context']:,}")
    parts.append("no BOS token" if model["bos_token_id"] is None else f"BOS {model['bos_token_id']}")
    if model["dtype"] is not None:
        parts.append(model["dtype"])
    if model["parameters"] is not None:
        parts.append(f"{model['parameters']:,} parameters")
    return " · ".join(parts)


def _mod(mod: dict[str, Any]) -> str:
    where = f" · layers {', '.join(map(str, mod['layers']))}" if mod.get("layers") else ""
    stored = f" · {mod['stored']:,} numbers of its own" if mod["stored"] else ""
    off = " (off)" if mod["strength"] == 0 else ""
    return f"{mod['text']} · strength {mod['strength']:g}{off}{where}{stored}"


def _rope(table: dict[str, Any], context: int | None, layers: list[int] | None) -> list[str]:
    parameters = dict(table["parameters"])
    kind = parameters.pop("rope_type")
    described = ", ".join([kind, *(f"{name} {_number(value)}" for name, value in parameters.items())])
    turning = [wavelength for wavelength in table["wavelengths"] if wavelength is not None]
    span = f", wavelengths {_number(turning[0])} to {_number(turning[-1])} tokens" if turning else ""
    lines = [f"{described} · {len(table['wavelengths'])} frequencies{span}"]
    if not table["dropped"]:
        return lines
    how = "stopped" if table["stopped"] == table["dropped"] else _slowed(table)
    where = "" if layers is None else f" in layers {', '.join(map(str, layers))}"
    lines.append(f"{table['kept']} kept, {table['dropped']} {how}{where}")
    first = table["first_dropped_wavelength"]
    if first is not None:
        line = f"first dropped band: wavelength {_number(first)} tokens"
        if context is not None:
            line += f", {_number(2 * math.pi * context / first)} rad at the context of {context:,}"
        lines.append(line)
    return lines


def _slowed(table: dict[str, Any]) -> str:
    pairs = zip(table["wavelengths"], table["wavelengths_in_force"], strict=True)
    factor = next(before / after for before, after in pairs if before and after and before != after)
    return f"slowed to {_number(factor)} of their frequency"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods show ./smollm2-p-rope
        ropemods show HuggingFaceTB/SmolLM2-135M --json
        ropemods show HuggingFaceTB/SmolLM2-135M --paths
    """,
)
