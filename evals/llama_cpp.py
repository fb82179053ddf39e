"""p-RoPE in llama.cpp: log-probabilities of an exported GGUF against those of the model that it was made of.

**Claim.** `ropemods export --gguf` writes a file from which llama.cpp computes the modified model: its
log-probabilities differ from ours by no more than those of the unmodified file do, which is what its quantised
arithmetic costs.

**Protocol, frozen.** SmolLM2-135M in the types of its own GGUF (four bits; llama.cpp rounds activations too), and the
same unpacked to F32. 20 prompts: BOS and 255 tokens from the beginnings of held-out documents, each token scored from
those before it. Ours is transformers in fp32 on the weights that the file unpacks to. A prompt's figure is its mean
absolute difference of log-probability over tokens, and an arm's the mean over prompts, with a 95% bootstrap interval.
Beside it, as a control, the same file without what was modified, against the same modified model: what a reader that
passes over `rope_freqs` would give. The arms over llama3 scaling put that scaling on the stock model first, unlike
anything it was trained on, which tests arithmetic alone.

**Against it** would be an arm whose difference is above the unmodified one's by more than a tenth, or a control that
does as well where the modification changes the model (it hardly does with keep 0.75 at this length).

The package llama-cpp-python is built from source, apart from this repository's environment or in it:
`CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36`
(native code wants instructions that virtual machines may announce and not allow). Without it nothing is written.
"""

from __future__ import annotations

import importlib.util
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
from ropemods.report.words import markdown_table
from ropemods.training import smollm2

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
ARMS: dict[str, dict[str, Any]] = {
    "unmodified": {"mods": []},
    "keep 0.75": {"mods": [rm.TruncatedRoPE(keep=0.75)]},
    "keep 0.25": {"mods": [rm.TruncatedRoPE(keep=0.25)]},
    "keep 0.25 at strength 0.5": {"mods": [rm.TruncatedRoPE(keep=0.25)], "strength": 0.5},
    "BOS mean, keep 0.75": {"mods": [rm.ReplacedBos(by="mean"), rm.TruncatedRoPE(keep=0.75)]},
    "llama3, unmodified": {"mods": [], "llama3": True},
    "llama3, keep 0.5": {"mods": [rm.TruncatedRoPE(keep=0.5)], "llama3": True},
}
PROTOCOL = {
    "nano": {
        "seeds": [0],
        "model": smollm2.NAME,
        "checksum": smollm2.SHA256,
        "prompts": 20,
        "length": 256,
        "types": ["as it is", "F32"],
        "arms": {
            name: {**arm, "mods": [f"{mod}" for mod in arm["mods"]]} | ({"rope": LLAMA3} if "llama3" in arm else {})
            for name, arm in ARMS.items()
        },
        "margin": 1.1,
        "resamples": 2000,
    }
}
MISSING = "llama_cpp is not installed, so nothing is run; evals/llama_cpp.py says how it is built"


def rewritten(source: Path, target: Path, *, unpacked: bool, factors_F: Tensor | None) -> Path:
    """The GGUF `source` with its tensors unpacked, or with factors as llama.cpp's converter writes them for llama3."""
    import gguf

    file = gguf.GGUFReader(source)
    architecture = file.get_field("general.architecture").contents()
    out = gguf.GGUFWriter(target, architecture)
    for key, field in file.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            listed = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            out.add_key_value(key, field.contents(), field.types[0], sub_type=listed)
    if factors_F is not None:
        out.add_tensor("rope_freqs.weight", factors_F.numpy())
    for tensor in file.tensors:
        if unpacked:
            out.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        else:
            out.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target


def prompts(data: Path, folder: Path, protocol: dict[str, Any]) -> list[list[int]]:
    tokenizer, length = AutoTokenizer.from_pretrained(folder), protocol["length"]
    rows = []
    for text in read_documents(data / "text" / "books.valid.jsonl.xz").texts:
        ids = tokenizer(text[: 10 * length], add_special_tokens=False).input_ids[: length - 1]
        if len(ids) == length - 1:
            rows.append([tokenizer.bos_token_id, *ids])
    return rows[: protocol["prompts"]]


def told(log_p_TV: Tensor, ids: list[int]) -> Tensor:
    return log_p_TV[:-1].float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


def by_llama_cpp(file: Path, rows: list[list[int]]) -> list[Tensor]:
    from llama_cpp import GGML_TYPE_F32, Llama

    length = len(rows[0])
    sizes = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "n_threads": torch.get_num_threads()}
    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "flash_attn": False}
    model = Llama(str(file), logits_all=True, verbose=False, **sizes, **cache)
    found = []
    for ids in rows:
        model.reset()
        model.eval(ids)
        found.append(told(torch.from_numpy(np.array(model.scores[: len(ids)])), ids))
    model.close()
    return found


@torch.no_grad()
def ours(model: Any, rows: list[list[int]]) -> list[Tensor]:
    return [told(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], ids) for ids in rows]


def compared(arm: dict[str, Any], data: Path, protocol: dict[str, Any], *, unpacked: bool) -> dict[str, Any]:
    """By prompt: the mean absolute difference of the exported file, and of the base, to the modified model."""
    folder = smollm2.fetch()
    rows = prompts(data, folder, protocol)
    rope = {"rope_parameters": LLAMA3} if arm.get("llama3") else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **rope).eval()
    inv_freq_F = model.model.rotary_emb.inv_freq.double()
    theta_F = LLAMA3["rope_theta"] ** -(torch.arange(len(inv_freq_F)).double() / len(inv_freq_F))
    with tempfile.TemporaryDirectory() as here:
        base = rewritten(
            smollm2.gguf_file(smollm2.CACHE, print),
            Path(here, "base.gguf"),
            unpacked=unpacked,
            factors_F=(theta_F / inv_freq_F).float() if rope else None,
        )
        exported = base
        if arm["mods"]:
            rm.apply(model, *arm["mods"], strength=arm.get("strength", 1.0))
            exported = Path(here, "exported.gguf")
            rm.export(model, exported, gguf=base)
        reference = ours(model, rows)
        found = {"exported": _apart(by_llama_cpp(exported, rows), reference)}
        if arm["mods"]:
            found["control"] = _apart(by_llama_cpp(base, rows), reference)
    return found


def _apart(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [float((a - b).abs().mean()) for a, b in zip(one, other, strict=True)]


def _summary(by_prompt: list[float], protocol: dict[str, Any]) -> dict[str, float]:
    values = np.array(by_prompt)
    draw = np.random.default_rng(protocol["seeds"][0])
    means = values[draw.integers(0, len(values), (protocol["resamples"], len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "largest": float(values.max())}


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    if importlib.util.find_spec("llama_cpp") is None:
        raise Unavailable(MISSING)
    p: dict[str, Any] = PROTOCOL[scale]
    try:
        smollm2.fetch()
    except smollm2.CannotBeHad as error:
        raise Unavailable(str(error)) from error
    jobs = {
        f"{kind}, {name}": lambda arm=arm, kind=kind: compared(arm, data, p, unpacked=kind == "F32")
        for kind in p["types"]
        for name, arm in ARMS.items()
    }
    done = cells(jobs)
    arms = {name: {what: _summary(values, p) for what, values in cell.items()} for name, cell in done.items()}
    return {"arms": arms, "llama_cpp_python": version("llama_cpp_python")}


def _unmodified(name: str) -> str:
    kind, _, arm = name.partition(", ")
    return f"{kind}, llama3, unmodified" if arm.startswith("llama3") else f"{kind}, unmodified"


def holds(found: dict[str, Any], name: str) -> bool:
    arms = found["arms"]
    return arms[name]["exported"]["value"] <= found["protocol"]["margin"] * arms[_unmodified(name)]["exported"]["value"]


def _shown(estimate: dict[str, float] | None) -> str:
    return "" if estimate is None else f"{estimate['value']:.2g} [{estimate['low']:.2g}, {estimate['high']:.2g}]"


def section(found: dict[str, Any]) -> str:
    p = found["protocol"]
    rows = [
        (
            name,
            _shown(arm["exported"]),
            f"{arm['exported']['largest']:.2g}",
            _shown(arm.get("control")),
            ("yes" if holds(found, name) else "**no**") if "control" in arm else "",
        )
        for name, arm in found["arms"].items()
    ]
    head = ("file", "difference, nats a token", "largest prompt", "without what was modified", "as the unmodified")
    return "\n\n".join(
        (
            "## p-RoPE in llama.cpp",
            f"llama-cpp-python {found['llama_cpp_python']}, {p['model']}, {p['prompts']} prompts of {p['length']} "
            "tokens: mean absolute difference of a token's log-probability between llama.cpp on the exported file and "
            f"the modified model in transformers. Last column: at most {p['margin']:g} times the unmodified file's.",
            markdown_table(head, rows),
        )
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    modified = [name for name, arm in found["arms"].items() if "control" in arm]
    main, stock = (found["arms"][f"as it is, {arm}"]["exported"] for arm in ("keep 0.75", "unmodified"))
    return [
        Learned(
            "llama.cpp computes a modified model from its exported GGUF, within what its quantisation gives unmodified",
            f"{sum(holds(found, name) for name in modified)} of {len(modified)} files; keep 0.75 {main['value']:.4f} "
            f"nats a token, unmodified {stock['value']:.4f}",
            f"[{main['low']:.4f}, {main['high']:.4f}]",
            "not in the papers",
            f"{found['protocol']['model']}, llama-cpp-python {found['llama_cpp_python']} on a CPU",
        )
    ]
