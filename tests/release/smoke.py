"""What an extra of the installed package adds, used once on a tiny model.

python smoke.py EXTRA FOLDER         # FOLDER is what user_program.py left
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from ropemods.cli import main as ropemods

RECIPE = """
model_name_or_path: {folder}/stock
output_dir: {folder}/run
data: {folder}/text.txt
separator: blank-line
mods: [{{kind: truncated_rope, keep: 0.5}}, {{kind: learned_sink}}]
lora: {{r: 2, target_modules: all-linear}}
schedule: {{steps: 2}}
protocol: {{sequences: 16, length: 32, groups: 8, window: 4, early: [4, 8], grid_rows: 8}}
length: 32
held_out: 0.3
held_out_rows: 16
max_steps: 2
per_device_train_batch_size: 4
learning_rate: 1e-3
save_strategy: "no"
use_cpu: true
"""


def train(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    assert ropemods(["train", str(folder / "recipe.yaml")]) == 0
    report = rm.Report.from_json(next((folder / "run").glob("modified*/report.json")))
    assert len(report.to_frame("heads")) == report.model.layers * report.model.heads


def deepspeed(folder: Path) -> None:
    import deepspeed

    train(folder)
    assert deepspeed.__version__


def gguf(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import gguf_files  # type: ignore[import-not-found]

    model = AutoModelForCausalLM.from_pretrained(folder / "stock")
    gguf_files.write(folder / "model.gguf", model)
    loaded = rm.from_pretrained(folder, gguf_file="model.gguf", config=model.config)
    rm.export(rm.apply(loaded, rm.TruncatedRoPE(keep=0.75)), folder / "out.gguf", gguf=folder / "model.gguf")
    assert (folder / "out.gguf").stat().st_size > 50_000


def trl(folder: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "stock")
    tokenizer.pad_token = "<s>"
    model = rm.apply(AutoModelForCausalLM.from_pretrained(folder / "stock"), rm.TruncatedRoPE(keep=0.5))
    args = SFTConfig(str(folder / "sft"), max_steps=2, max_length=32, use_cpu=True, eos_token="w9", report_to="none")
    rows = Dataset.from_list([{"text": f"<s> w{n} w2 w3 w4"} for n in range(16)])
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder / "sft"))
    assert rm.summary(rm.from_pretrained(folder / "sft")).startswith("TruncatedRoPE(keep=0.5)")


def evaluate(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "stock")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model = rm.apply(AutoModelForCausalLM.from_pretrained(folder / "stock"), rm.LearnedSink(init=0.0))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=True, device="cpu")
    request = Instance(request_type="loglikelihood", doc={}, arguments=("w1 w2", " w3"), idx=0)
    ((found, _),) = harness.loglikelihood([request])
    ids = torch.tensor([[0, *tokenizer("w1 w2 w3", add_special_tokens=False).input_ids]])
    with torch.no_grad():
        own = model(ids).logits.log_softmax(-1)[0, -2, ids[0, -1]]
    assert abs(found - float(own)) < 1e-4


if __name__ == "__main__":
    extra, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    {"train": train, "deepspeed": deepspeed, "gguf": gguf, "trl": trl, "eval": evaluate}[extra](folder)
    print(f"{extra}: well")
