"""The downstream harness: `lm-eval` on a modified checkpoint, through its Python API, with a local task and no network.

**Claim.** A checkpoint with modifications in it is a transformers model to others too: lm-eval runs it as it runs the
stock model, sees its BOS, and reports what the model itself computes.

**Protocol, frozen.** stories260K, stock and with modifications put on (no training), saved and loaded again. The task
is made on the spot: the beginning of a story, four continuations, of which one is its own; right when that one is the
most likely. BOS: the harness is told `add_bos_token=True`, and what reaches the model is read by a hook: exactly one
BOS, at column 0, in every row. Every log-likelihood of the harness is computed again from the model's own logits.
Without BOS the modified model must refuse to run, since its modifications act on BOS.

**Against it** would be: an error, a row without BOS, a log-likelihood that differs from the model's own by more than
rounding, or a modified model whose figures are those of the stock one. The accuracies are no claim: the modifications
are untrained, and the text is the model's training text.

Without lm_eval (`pip install 'ropemods[eval]'`) the program writes nothing and says so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals.claim import Cells, Learned, Unavailable
from ropemods.leakage.documents import read_documents

PROTOCOL = {
    "nano": {
        "seeds": [0],
        "model": "stories260K",
        "questions": 64,
        "choices": 4,
        "context_words": 40,
        "continuation_words": 12,
    }
}
MODS = (rm.TruncatedRoPE(keep=0.75), rm.LearnedSink(init=0.0), rm.AdaptiveTemperature())
TASK = "own_continuation"
MISSING = "lm_eval is not installed, so the harness is not run: pip install 'ropemods[eval]'"
ROUNDING = 1e-3
"""Nats, of a sum over a continuation."""


def questions(data: Path, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """Beginnings of stories, each with its own continuation among those of others."""
    long = protocol["context_words"] + protocol["continuation_words"]
    stories = [s.split() for s in read_documents(data / "text" / "tinystories.txt").texts]
    stories = [words for words in stories if len(words) >= long]
    draw = np.random.default_rng((protocol["seeds"][0], 41))
    chosen = draw.permutation(len(stories))[: protocol["questions"]]
    ends = [" ".join(stories[n][protocol["context_words"] : long]) for n in chosen]
    rows = []
    for n, story in enumerate(chosen):
        others = [m for m in draw.permutation(len(chosen)) if m != n][: protocol["choices"] - 1]
        place = int(draw.integers(0, protocol["choices"]))
        choices = [ends[m] for m in others]
        choices.insert(place, ends[n])
        context = " ".join(stories[story][: protocol["context_words"]])
        rows.append({"context": context, "choices": choices, "own": place})
    return rows


def task(path: Path) -> dict[str, Any]:
    """In the harness's words; nothing is fetched."""
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "own",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def checkpoint(data: Path, protocol: dict[str, Any], folder: Path, *, modified: bool) -> tuple[Any, Any]:
    """The model as its user would load it, after a save."""
    source = data / "models" / protocol["model"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    if modified:
        rm.apply(model, *MODS)
    model.save_pretrained(folder)
    return (rm.from_pretrained(folder) if modified else AutoModelForCausalLM.from_pretrained(folder)).eval(), tokenizer


def evaluated(model: Any, tokenizer: Any, rows: list[dict[str, Any]], *, add_bos: bool) -> dict[str, Any]:
    """What lm-eval says, and every row of tokens that it gave to the model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    seen: list[Tensor] = []

    def read(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    hook = model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "questions.json"
            path.write_text("\n".join(map(json.dumps, rows)))
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu", add_bos_token=add_bos)
            results = simple_evaluate(
                lm, tasks=[task(path)], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
            )
    finally:
        hook.remove()
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return {
        "accuracy": 100 * results["results"][TASK]["acc,none"],
        "log_likelihoods": [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples],
        "rows": [row.tolist() for batch in seen for row in batch],
    }


def own_log_likelihoods(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[list[float]]:
    """The same from the model's logits: BOS, the context, a space, the continuation."""
    found = []
    for row in rows:
        values = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['context']} {choice}", add_special_tokens=False).input_ids
            context = tokenizer(row["context"], add_special_tokens=False).input_ids
            ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
            with torch.no_grad():
                log_p_TV = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            told_T = log_p_TV.gather(1, ids[0, 1:, None]).squeeze(1)
            values.append(float(told_T[len(context) :].sum()))
        found.append(values)
    return found


def one(data: Path, protocol: dict[str, Any], *, modified: bool) -> dict[str, Any]:
    rows = questions(data, protocol)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = checkpoint(data, protocol, Path(folder), modified=modified)
    found = evaluated(model, tokenizer, rows, add_bos=True)
    bos = tokenizer.bos_token_id
    own = own_log_likelihoods(model, tokenizer, rows)
    apart = np.abs(np.array(own) - np.array(found["log_likelihoods"])).max()
    result = {
        "accuracy": found["accuracy"],
        "log_likelihoods": found["log_likelihoods"],
        "rows": len(found["rows"]),
        "rows_with_one_bos_in_front": sum(row[0] == bos and bos not in row[1:] for row in found["rows"]),
        "largest_difference_to_the_model": float(apart),
    }
    if modified:
        try:
            evaluated(model, tokenizer, rows, add_bos=False)
            result["without_bos"] = "ran"
        except ValueError as refusal:
            result["without_bos"] = f"refused: {refusal}"
    return result


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    if importlib.util.find_spec("lm_eval") is None:
        raise Unavailable(MISSING)
    protocol = PROTOCOL[scale]
    done = cells({n: lambda n=n: one(data, protocol, modified=n == "modified") for n in ("stock", "modified")})
    told = [np.array(done[name].pop("log_likelihoods")) for name in done]
    return {
        "models": done,
        "mods": [mod.kind for mod in MODS],
        "modified_from_stock": float(np.abs(told[0] - told[1]).mean()),
        "lm_eval": version("lm_eval"),
    }


def verdicts(found: dict[str, Any]) -> dict[str, bool]:
    models = found["models"]
    return {
        "one BOS in front of every row": all(m["rows"] == m["rows_with_one_bos_in_front"] > 0 for m in models.values()),
        "log-likelihoods are the model's own": all(
            m["largest_difference_to_the_model"] <= ROUNDING for m in models.values()
        ),
        "the modifications reached the harness": found["modified_from_stock"] > ROUNDING,
        "without BOS the modified model refuses": models["modified"]["without_bos"].startswith("refused"),
    }


def section(found: dict[str, Any]) -> str:
    protocol = found["protocol"]
    lines = [
        "## lm-eval on a modified checkpoint",
        "",
        f"lm-eval {found['lm_eval']} through its Python API, {protocol['model']}, {protocol['questions']} questions of "
        f"{protocol['choices']} choices made of local text; {', '.join(found['mods'])} put on untrained, saved and "
        "loaded again.",
        "",
        "| | accuracy | standard error | rows seen by the model | with one BOS, in front | largest difference to "
        "its own log-likelihoods |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, model in found["models"].items():
        error = standard_error(model["accuracy"], protocol["questions"])
        lines.append(
            f"| {name} | {model['accuracy']:.1f}% | {error:.1f} | {model['rows']} | "
            f"{model['rows_with_one_bos_in_front']} | {model['largest_difference_to_the_model']:.1e} nats |"
        )
    lines += ["", *(f"- {question}: {'yes' if yes else '**no**'}" for question, yes in verdicts(found).items())]
    lines += [
        f"- told without BOS, the modified model: {found['models']['modified']['without_bos']}",
        "",
        "What it does not show: quality. The modifications are untrained and the text is the model's training text.",
    ]
    return "\n".join(lines)


def standard_error(percent: float, count: int) -> float:
    return math.sqrt(percent * (100 - percent) / count)


def learned(found: dict[str, Any]) -> list[Learned]:
    answers = verdicts(found)
    return [
        Learned(
            "lm-eval runs a modified checkpoint as it is, BOS in place",
            f"{sum(answers.values())} of {len(answers)} checks hold",
            "none: checks, no estimate",
            "not in the papers",
            f"one model of 260K parameters, one local task, lm-eval {found['lm_eval']}",
        )
    ]
