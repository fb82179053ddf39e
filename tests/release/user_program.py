"""What a user writes who has ropemods and no extra of it. It is run, and held to `mypy --strict`.

Every public name that gives something back is used, with what it gives going on into what the next one takes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ropemods as rm


def main(folder: Path) -> rm.Comparison:
    words = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{n}": n + 1 for n in range(60)}}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")  # type: ignore[no-untyped-call]
    texts = [" ".join(f"w{(n * n + 7 * seed) % 60}" for n in range(400)) for seed in range(16)]

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model: LlamaForCausalLM = rm.apply(LlamaForCausalLM(config), rm.TruncatedRoPE(keep=0.5), strength=0.0)
    protocol = rm.Protocol(sequences=16, length=32, groups=8, window=4, early=(4, 8))
    before: rm.Report = rm.measure(model, tokenizer, texts, protocol, progress=False)

    schedule = rm.StrengthSchedule(steps=4, shape="cosine")
    ids = torch.randint(1, 61, (8, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with rm.penalize(model.train(), weight=1.0, early=(8, 16)) as penalized:
        for step in range(6):
            rm.set_strength(model, schedule.at(step))
            loss = model(input_ids=ids, labels=ids).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert isinstance(penalized.penalty(), torch.Tensor)
    print(rm.summary(model))

    model.train(False).save_pretrained(folder / "tuned")
    loaded = rm.from_pretrained(folder / "tuned")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    rm.export(model, folder / "stock")
    tokenizer.save_pretrained(folder / "stock")
    (folder / "text.txt").write_text("\n\n".join(texts))

    after: rm.Report = rm.measure(loaded, tokenizer, texts, protocol, progress=False)
    comparison = rm.compare(before, after)
    comparison.to_html(folder / "change.html")
    after.plot("residual by head").save(folder / "heads.svg")
    print(comparison.headline.find("residual", "early"))

    suggestion = rm.suggest(rm.remove(model), tokenizer, texts, length=64, sequences=8, crop=32, progress=False)
    keep: float | None = suggestion.keep
    print("keep:", keep)
    return comparison


if __name__ == "__main__":
    import sys

    print(main(Path(sys.argv[1])))
