"""Texts of random tokens beside a user's own: rounding then cannot learn the data by heart.

GPTQ fits a layer's weights to the inputs that it sees. The states of a text's tokens resemble each other, so that a
novel's sentences are few inputs in that sense, and the fit helps nothing else. Random tokens of the vocabulary bring
every layer inputs that no text of one kind has. MiniLM int4 in groups of 64, calibrated on 256 sentences of *Emma*,
1 - cosine: *Persuasion* 0.0093 -> 0.0062, Spanish 0.028 -> 0.012, SQL 0.027 -> 0.017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: Texts of random tokens, at least; otherwise as many as there are texts.
LEAST = 256
#: Tokens of a text, at least.
SHORTEST = 4


def random_texts(tokenizer: Any, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Token ids of texts drawn from the vocabulary without its special tokens, begun and ended as the tokenizer does.

    lengths: of the texts that these stand beside, special tokens included; theirs are drawn from them. Nothing comes
    back for an empty vocabulary.
    """
    special = set(tokenizer.get_added_tokens_decoder())
    words = torch.tensor([i for i in range(tokenizer.get_vocab_size()) if i not in special])
    if not len(words) or not lengths:
        return []
    around = tokenizer.encode("").ids
    begin, end = around[: (len(around) + 1) // 2], around[(len(around) + 1) // 2 :]
    generator = torch.Generator().manual_seed(seed)
    count = max(LEAST, len(lengths))
    result = []
    for at in torch.randint(len(lengths), (count,), generator=generator).tolist():
        size = max(SHORTEST, lengths[at] - len(around))
        drawn = words[torch.randint(len(words), (size,), generator=generator)]
        result.append([*begin, *drawn.tolist(), *end])
    return result
