"""A real tokenizer in which every token of every document is a word of its own.

Word w3_17 is token 17 of document 3, so a crop tells exactly where it was cut.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_texts(lengths: list[int]) -> list[str]:
    return [" ".join(f"w{n}_{i}" for i in range(length)) for n, length in enumerate(lengths)]


def make_tokenizer(texts: list[str], *, bos: bool = True) -> PreTrainedTokenizerFast:
    words = dict.fromkeys(word for text in texts for word in text.split())
    vocabulary = {word: n for n, word in enumerate(["<s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def places(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[tuple[int, int]]:
    """(document, index in it) of every token."""
    words = tokenizer.convert_ids_to_tokens(tokens)
    found = [re.fullmatch(r"w(\d+)_(\d+)", word) for word in words]
    return [(int(m[1]), int(m[2])) for m in found if m]
