"""Import, apply, save and reload of a model of a billion parameters, against stock: seconds and peak memory.

    OMP_NUM_THREADS=1 python -m evals.load_cost --folder FOLDER --page PAGE

A random Llama of Llama 3.2 1B's shape in bf16 (2.5 GB; FOLDER needs room for two). Stock and modified are processes of
their own. Memory is the most that a process has held so far, in GiB, so a step that adds nothing repeats the figure of
the one before it. That `apply` copies no weight is checked: every parameter stays at its address.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Nothing of ropemods up here, nor what imports it: its import is one of the steps.
PART = "load"
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "bos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip


def steps(folder: Path, *, modified: bool, shape: dict[str, Any] = SHAPE) -> list[tuple[str, float, float]]:
    """(step, seconds, GiB at most until then)."""
    found = []

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found.append((name, time.perf_counter() - start, peak))
        return value

    def imported() -> Any:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        return torch, AutoModelForCausalLM, LlamaConfig

    torch, auto, config = timed("import torch and transformers", imported)
    if modified:
        assert "ropemods" not in sys.modules, "it is to be imported here, where it is timed"
        rm = timed("import ropemods", lambda: __import__("ropemods"))
    model = timed("make the model", lambda: auto.from_config(config(**shape), dtype=torch.bfloat16))
    if modified:
        before = [p.data_ptr() for p in model.parameters()]
        mods = rm.TruncatedRoPE(0.75), rm.AdaptiveTemperature(), rm.LearnedSink(init=0.0, read_bos=True)
        timed("apply", partial(rm.apply, model, *mods))
        own = [p.data_ptr() for name, p in model.named_parameters() if "ropemods" not in name]
        assert own == before, "apply moved a weight"
    timed("save", partial(model.save_pretrained, folder))
    del model
    timed("reload", lambda: (rm if modified else auto).from_pretrained(folder))
    return found


def table(found: dict[str, list[tuple[str, float, float]]]) -> str:
    from ropemods.report.words import markdown_table

    stock, modified = ({name: each for name, *each in rows} for rows in found.values())
    lines = [
        (name, *(f"{each[name][i]:.2f}" if name in each else "–" for i in (0, 1) for each in (stock, modified)))
        for name in modified
    ]
    return markdown_table(("step", "stock, s", "modified, s", "stock, GiB", "modified, GiB"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--page", type=Path, help=f"write the table behind <!-- {PART} --> of this file")
    parser.add_argument("--only", choices=("stock", "modified"), help="one of the two, in this process, as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(steps(options.folder, modified=options.only == "modified")))
        return
    found = {}
    for name in ("stock", "modified"):
        place = options.folder / name
        command = [sys.executable, "-m", "evals.load_cost", "--folder", str(place), "--only", name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(said.splitlines()[-1])
        shutil.rmtree(place)
    print(table(found))
    if options.page is not None:
        from evals.between import write_between

        write_between(options.page, PART, table(found))


if __name__ == "__main__":
    main()
