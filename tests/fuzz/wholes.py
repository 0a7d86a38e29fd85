"""One small whole model in every format that is read, for corrupt.py to damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

import quantized_files
from narrowcast.formats import GGUF_BLOCKS

HIDDEN, MIDDLE, HEADS, KV_HEADS, VOCABULARY = 64, 96, 4, 2, 96


def _llama_state() -> dict[str, torch.Tensor]:
    """The parameters of a Llama of one layer under the names of Hugging Face."""
    layer, kv = "model.layers.0.", HIDDEN * KV_HEADS // HEADS
    sizes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN), f"{layer}input_layernorm.weight": (HIDDEN,),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}self_attn.q_proj.weight": (HIDDEN, HIDDEN), f"{layer}self_attn.k_proj.weight": (kv, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (kv, HIDDEN), f"{layer}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{layer}mlp.gate_proj.weight": (MIDDLE, HIDDEN), f"{layer}mlp.up_proj.weight": (MIDDLE, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, MIDDLE),
    }  # fmt: skip
    return {name: torch.randn(size) for name, size in sizes.items()}


def _hugging_face(name: str, shards: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        writer, settings = quantized_files.FORMATS[name]
        tensors = {}
        for key, value in _llama_state().items():
            module = key.removesuffix(".weight")
            tensors |= writer(module, *value.shape)[0] if "proj" in key else {key: value}
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": 1,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 2,
        }  # fmt: skip
        path = quantized_files.save(folder / name, tensors, settings, **config)
        if shards > 1:
            _split(path / "model.safetensors", shards)
        return path

    return write


def _split(file: Path, shards: int) -> None:
    """A file of weights as several with an index."""
    tensors = safetensors.torch.load_file(str(file))
    file.unlink()
    names, places = list(tensors), {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        safetensors.torch.save_file(part, str(file.with_name(shard)), metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))


# --- GGUF -------------------------------------------------------------------------------------------

GGUF_NUMBERS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
_CODES = {int: 4, float: 6, bool: 7, str: 8, list: 9}


def gguf_text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _gguf_value(v) -> bytes:
    if isinstance(v, list):
        return struct.pack("<IQ", _CODES[type(v[0])], len(v)) + b"".join(_gguf_value(x) for x in v)
    letter = {bool: "?", int: "I", float: "f"}.get(type(v))
    return gguf_text(v) if letter is None else struct.pack(f"<{letter}", v)


def gguf_bytes(metadata: list[tuple[str, object]], tensors: list[tuple[str, int, list[int], bytes]]) -> bytes:
    """A file of version 3. tensors: name, type number, dimensions in the file's order, bytes."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, v in metadata:
        out += gguf_text(key) + struct.pack("<I", _CODES[type(v)]) + _gguf_value(v)
    data = b""
    for name, kind, dims, raw in tensors:
        out += gguf_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    return out + b"\0" * (-len(out) % 32) + data


def gguf_parts(kind: str) -> tuple[list[tuple[str, object]], list[tuple[str, int, list[int], bytes]]]:
    """Keys and tensors of a Llama of one layer, its matrices in one type."""
    printable = sorted({*range(33, 127), *range(161, 173), *range(174, 256)})
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = ["<|end|>", *letters, "ab"]
    elements, size = GGUF_BLOCKS[kind]
    hidden = 256 if elements == 256 else 64
    metadata: list[tuple[str, object]] = [
        ("general.architecture", "llama"), ("general.name", "small"), ("llama.block_count", 1),
        ("llama.context_length", 40), ("llama.embedding_length", hidden), ("llama.feed_forward_length", hidden),
        ("llama.attention.head_count", 4), ("llama.attention.head_count_kv", 2),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5), ("llama.rope.freq_base", 10000.0),
        ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm"), ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.merges", ["a b"]), ("tokenizer.ggml.token_type", [3] + [1] * (len(tokens) - 1)),
        ("tokenizer.ggml.eos_token_id", 0), ("tokenizer.ggml.add_bos_token", False),
    ]  # fmt: skip
    tensors = []

    def matrix(name: str, rows: int) -> None:
        raw = torch.randint(0, 256, (rows * hidden // elements, size), dtype=torch.uint8)
        if kind == "Q8_0":  # numbers that a model may have: it becomes a plan, too
            raw[:, :2] = torch.tensor([0.002], dtype=torch.float16).view(torch.uint8)
        tensors.append((name, GGUF_NUMBERS[kind], [hidden, rows], raw.numpy().tobytes()))

    def norm(name: str) -> None:
        tensors.append((name, 0, [hidden], torch.ones(hidden).numpy().tobytes()))

    matrix("token_embd.weight", len(tokens))
    norm("output_norm.weight")
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        matrix(f"blk.0.{name}.weight", hidden // 2 if name in ("attn_k", "attn_v") else hidden)
    norm("blk.0.attn_norm.weight")
    norm("blk.0.ffn_norm.weight")
    return metadata, tensors


def _gguf(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"{kind.lower()}.gguf"
        path.write_bytes(gguf_bytes(*gguf_parts(kind)))
        return path

    return write


# --- ONNX -------------------------------------------------------------------------------------------


def _onnx(name: str, n_bits: bool) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import onnx

        helper = onnx.helper
        if n_bits:
            weights = {"q": torch.randint(0, 256, (8, 2, 16), dtype=torch.uint8), "s": torch.rand(16)}
            weights["z"] = torch.randint(0, 256, (8,), dtype=torch.uint8)
            options = {"domain": "com.microsoft", "K": 64, "N": 8, "bits": 4, "block_size": 32}
            nodes = [helper.make_node("MatMulNBits", ["x", "q", "s", "z"], ["y"], name="layer", **options)]
        else:
            weights = {"xs": torch.tensor(0.02), "xz": torch.tensor(3, dtype=torch.int8)}
            weights |= {"q": torch.randint(-127, 128, (64, 8)).to(torch.int8), "s": torch.rand(8)}
            weights |= {"z": torch.zeros(8, dtype=torch.int8), "shape": torch.tensor([-1, 2, 4])}
            nodes = [
                helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="quantize"),
                helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dequantize"),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], name="weight", axis=1),
                helper.make_node("MatMul", ["xd", "w"], ["a"], name="product"),
                helper.make_node("Reshape", ["a", "shape"], ["y"], name="reshape"),
            ]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", 64])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in weights.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        path = folder / f"{name}.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
        return path

    return write


# --- plans ------------------------------------------------------------------------------------------


def _plan(folder: Path) -> Path:
    """A decoder in grouped codes and an int8 cache, with a tokenizer and a certificate."""
    import narrowcast

    plan = narrowcast.compress(str(_gguf("Q8_0")(folder)), recipe="native", kv_cache="int8")
    path = folder / "small.plan"
    plan.save(path)
    return path


#: name -> what writes a whole model into a folder and returns the path to load.
WHOLES: dict[str, Callable[[Path], Path]] = {
    **{name: _hugging_face(name, 2 if name in ("gptq", "awq") else 1) for name in quantized_files.FORMATS},
    **{f"gguf-{kind.lower()}": _gguf(kind) for kind in GGUF_NUMBERS},
    "onnx-qdq": _onnx("qdq", False),
    "onnx-matmulnbits": _onnx("matmulnbits", True),
    "plan": _plan,
}
