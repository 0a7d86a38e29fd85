import pytest
import torch
from torch import nn

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph, Plan
from narrowcast.runtime import Executor
from narrowcast.runtime.encoding import padded

WORDS = ["[UNK]", "a", "b", "c", "d", "e"]


class Mean(nn.Module):
    """Attention under the mask, then mean pooling (or the hidden states)."""

    def __init__(self, pool):
        super().__init__()
        self.pool, self.table, self.layer = pool, nn.Embedding(len(WORDS), 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        bias = (1.0 - attention_mask[:, None, :].float()) * -1e9
        x = x + torch.softmax(x @ self.layer(x).transpose(1, 2) + bias, -1) @ x
        if not self.pool:
            return x
        mask = attention_mask[..., None].float()
        return nn.functional.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)


def make(pool=True, kind="encoder", **config):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=40)
    module = Mean(pool).eval()
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    inputs = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    graph = Graph.from_exported(torch.export.export(module, inputs, dynamic_shapes=(auto, auto)))
    assets = {"tokenizer.json": tokenizer.to_str().encode()}
    return module, Plan(graph, kind, "fp32", config=config, assets=assets)


def alone(module, text):
    ids = torch.tensor([[WORDS.index(w) if w in WORDS else 0 for w in text.split()]])
    with torch.no_grad():
        return module(ids, torch.ones_like(ids))[0]


TEXTS = ["a b", " ".join(["c", "d"] * 10), "e", "a q c", "b"]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_text_gets_what_it_gets_alone(batch_invariant):
    module, plan = make()
    exe = Executor(plan, device="cpu", threads=1, batch_invariant=batch_invariant)
    out = exe.encode(TEXTS, batch_size=2)
    for row, text in zip(out, TEXTS, strict=True):
        torch.testing.assert_close(row, alone(module, text), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exe.encode("a b"), out[0])
    assert exe.waste["tokens"] == 2 + 20 + 1 + 3 + 1 + 2
    assert exe.waste["computed"] == 2 * 16 + 2 * 16 + 32 + 16
    if batch_invariant:
        assert torch.equal(out, torch.cat([exe.encode([t]) for t in TEXTS]))


def test_hidden_states_end_with_the_longest_text():
    module, plan = make(pool=False)
    out = Executor(plan, device="cpu", threads=1).encode(TEXTS[:2])
    assert out.shape == (2, 20, 16) and not out[0, 2:].any()
    torch.testing.assert_close(out[0, :2], alone(module, TEXTS[0]), atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_at_the_last_position():
    module, plan = make(max_position_embeddings=18)
    exe = Executor(plan, device="cpu", threads=1)
    torch.testing.assert_close(exe.encode("a b " * 30), alone(module, "a b " * 9), atol=1e-5, rtol=1e-5)
    assert exe.waste["computed"] == 18


def test_arguments_are_checked():
    _, plan = make()
    exe = Executor(plan, device="cpu", threads=1)
    with pytest.raises(ArgumentError, match="texts must not be empty"):
        exe.encode([])
    with pytest.raises(ArgumentError, match="batch_size must be"):
        exe.encode(["a"], batch_size=0)
    with pytest.raises(UnsupportedError, match="needs an encoder, this graph is 'image'"):
        Executor(make(kind="image")[1], device="cpu").encode("a")


def test_padded():
    ids, mask = padded([[5], [1, 2, 3]], 16, None)
    assert ids.shape == (2, 16) and ids[1, :4].tolist() == [1, 2, 3, 0] and mask.sum(1).tolist() == [1, 3]
    assert padded([[1] * 17], 16, 20)[0].shape == (1, 20)
    assert padded([[]], 16, None)[0].shape == (1, 16)
