"""Plans of a few weights whose results can be told in advance, for tests of what stands around a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from narrowcast.graph import Graph, Plan

AUTO = torch.export.Dim.AUTO
WORDS = ["[UNK]", "sun", "rain", "snow", "wind"]


def tokenizer_asset(words=WORDS):
    tokenizers = pytest.importorskip("tokenizers", reason="text needs tokenizers")
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return {"tokenizer.json": tokenizer.to_str().encode()}


class Pooled(nn.Module):
    def __init__(self, pool, width):
        super().__init__()
        self.pool, self.table = pool, nn.Embedding(len(WORDS), width)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        x = self.table(input_ids) * mask
        return x.sum(1) / mask.sum(1) if self.pool else x


def encoder_plan(pool=True, width=16):
    """Embeddings of words, averaged over a text."""
    inputs = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    auto = {0: AUTO, 1: AUTO}
    exported = torch.export.export(Pooled(pool, width).eval(), inputs, dynamic_shapes=(auto, auto))
    return Plan(Graph.from_exported(exported), "encoder", "fp32", assets=tokenizer_asset())


class Counting(nn.Module):
    """A decoder whose likeliest next token is the one after the current."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, input_ids, start, logit_rows, k_cache, v_cache):
        following = (input_ids.flatten().index_select(0, logit_rows) + 1) % self.vocabulary
        return nn.functional.one_hot(following, self.vocabulary).float() + 0 * start.sum()


def decoder_plan(words=WORDS, vocabulary=None, **assets):
    inputs = (
        torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, dtype=torch.int32), torch.tensor([0, 3, 7]),
        torch.zeros(2, 1, 24, 8), torch.zeros(2, 1, 24, 8),
    )  # fmt: skip
    shapes = ({0: AUTO, 1: AUTO}, {0: AUTO}, {0: AUTO}, {0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO})
    exported = torch.export.export(Counting(vocabulary or len(words)), inputs, dynamic_shapes=shapes)
    return Plan(
        Graph.from_exported(exported), "decoder", "fp32", config={"context": 64, "eos_token_id": None},
        assets=tokenizer_asset(words) | assets,
    )  # fmt: skip


class Pictures(nn.Module):
    def forward(self, pixels):
        return pixels.mean((2, 3))


def image_plan():
    """The class of a picture is its strongest colour."""
    exported = torch.export.export(Pictures(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: AUTO},))
    return Plan(
        Graph.from_exported(exported), "image", "fp32", config={"image": {"size": 8}},
        assets={"labels": b"red\ngreen\nblue"},
    )  # fmt: skip
