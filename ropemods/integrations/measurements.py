"""Leakage before and after a Trainer's run, written where the run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import ropemods
from ropemods.leakage.documents import Documents
from ropemods.leakage.protocol import Protocol
from ropemods.report.report import Report
from ropemods.settings.files import write_text
from ropemods.training.leakage_probe import undisturbed
from ropemods.training.text import Source

BEFORE, AFTER, CHANGE = "ropemods-before.json", "ropemods-after.json", "ropemods-change.md"


class Measurements(TrainerCallback):
    """Measures when training begins and when it ends, and compares."""

    def __init__(self, tokenizer: Any, source: Source, protocol: Protocol) -> None:
        self.tokenizer, self.protocol = tokenizer, protocol
        self.documents = Documents(list(source.documents()), source.name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # a resumed run has this behind it
            self._measure(Path(str(args.output_dir)) / BEFORE, state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir))
        after = self._measure(folder / AFTER, state, model)
        if state.is_world_process_zero and (folder / BEFORE).is_file():
            change = ropemods.compare(folder / BEFORE, after).to_markdown()
            write_text(folder / CHANGE, change)
            print(change)

    def _measure(self, path: Path, state: TrainerState, model: nn.Module) -> Report:
        with undisturbed(model):
            report = ropemods.measure(model, self.tokenizer, self.documents, self.protocol, progress=False)
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            report.to_json(path)
        return report
