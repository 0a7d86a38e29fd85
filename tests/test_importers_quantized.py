"""Checkpoints of other tools: values bit for bit, models that run on them, and settings that contradict them."""

import json
import math

import pytest
import torch

import quantized_files as files
from narrowcast.compress.transformer import quantize_grouped
from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight, Int8Weight
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.importers import load_model
from narrowcast.importers.quantized import read_folder, settings_of
from narrowcast.runtime import Executor

ops = torch.ops.narrowcast


def read(tmp_path, written, settings):
    tensors, expected = written
    folder = files.save(tmp_path / "m", tensors, settings)
    held = read_folder(folder, settings)
    assert set(held.values) == held.quantised == {"a.weight"}
    return held.native.get("a.weight"), held.values["a.weight"], expected


GPTQ = [
    {"bits": bits, "group": group, "act_order": act, "version": version, "symmetric": symmetric}
    for bits in (2, 3, 4, 8)
    for group, act, version, symmetric in (
        (32, False, 1, False), (32, True, 2, False), (64, True, 1, True), (192, False, 2, True),
        (128, False, 1, False),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", GPTQ, ids=lambda c: "-".join(map(str, c.values())))
def test_gptq(tmp_path, case):
    settings = files.gptq_settings(case["bits"], case["group"], case["version"])
    native, values, expected = read(tmp_path, files.gptq("a", 32, 192, **case), settings)
    assert torch.equal(native.dequantize(), expected) and torch.equal(values, expected)
    if case["bits"] < 4 or (case["bits"] == 4 and case["symmetric"]):
        assert native.bits == 4 and native.offset is None and native.scale.dtype == torch.float16
    assert (native.columns is not None) == case["act_order"]
    assert native.group_size == (64 if case["group"] == 128 else case["group"])


def test_gptq_without_an_index(tmp_path):
    native, _, expected = read(tmp_path, files.gptq("a", 8, 64, g_idx=False), files.gptq_settings())
    assert torch.equal(native.dequantize(), expected)


def test_gptq_layer_with_other_bits(tmp_path):
    native, _, expected = read(tmp_path, files.gptq("a", 32, 64, bits=8, group=64), files.gptq_settings())
    assert native.bits == 8 and torch.equal(native.dequantize(), expected)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_awq(tmp_path, version, dtype):
    written = files.awq("a", 24, 96, version=version, dtype=dtype)
    native, _, expected = read(tmp_path, written, files.awq_settings(version=version))
    assert torch.equal(native.dequantize(), expected)
    # A zero point times a float32 is not exact: such a layer takes 8 bits rather than another value.
    assert native.bits == (8 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group, act_order", [(32, False), (32, True), (-1, False)])
def test_pack_quantized(tmp_path, bits, asymmetric, group, act_order):
    written = files.pack_quantized("a", 13, 96, bits, group, asymmetric, act_order)
    native, _, expected = read(tmp_path, written, files.compressed_settings(bits=bits, group=group))
    assert torch.equal(native.dequantize(), expected)
    assert native.group_size == (96 if group == -1 else group)


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_long_scales_stay_exact(tmp_path, bits, asymmetric):
    """A float32 scale of 24 digits times a code and plus an offset would round twice in 4 bits."""
    written = files.pack_quantized("a", 13, 96, bits, asymmetric=asymmetric, dtype=torch.float32)
    native, _, expected = read(tmp_path, written, files.compressed_settings(bits=bits))
    assert native.bits == 8 and native.offset is None and torch.equal(native.dequantize(), expected)


@pytest.mark.parametrize("bits", [3, 5])
def test_pack_quantized_with_empty_bits(tmp_path, bits):
    written = files.pack_quantized("a", 5, 96, bits, padded=True)
    native, _, expected = read(tmp_path, written, files.compressed_settings(bits=bits))
    assert torch.equal(native.dequantize(), expected)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("int8_inputs", [False, True])
def test_int_quantized(tmp_path, per_tensor, int8_inputs):
    settings = files.compressed_settings("int-quantized", 8, int8_inputs=int8_inputs)
    native, _, expected = read(tmp_path, files.int_quantized("a", 7, 50, per_tensor=per_tensor), settings)
    assert isinstance(native, Int8Weight if int8_inputs else GroupedWeight)
    assert torch.equal(native.dequantize(), expected)


def test_int_quantized_asymmetric(tmp_path):
    settings = files.compressed_settings("int-quantized", 8, int8_inputs=True)
    written = files.int_quantized("a", 7, 50, asymmetric=True, dtype=torch.float16)
    native, _, expected = read(tmp_path, written, settings)
    assert isinstance(native, GroupedWeight) and torch.equal(native.dequantize(), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(8, 64), (5, 27)])
def test_nf4(tmp_path, nested, shape):
    native, values, expected = read(tmp_path, files.nf4("a", *shape, nested=nested), files.BNB)
    assert native is None and torch.equal(values, expected)


def test_bitsandbytes_int8(tmp_path):
    native, _, expected = read(tmp_path, files.bnb_int8("a", 9, 40), files.BNB)
    assert native.bits == 8 and torch.equal(native.dequantize(), expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole_zeros", [False, True])
def test_hqq(tmp_path, bits, dtype, whole_zeros):
    written = files.hqq("a", 8, 96, bits, dtype=dtype, whole_zeros=whole_zeros)
    native, _, expected = read(tmp_path, written, {"quant_method": "hqq"})
    assert native.group_size == 32
    if bits < 8 or whole_zeros:
        assert torch.equal(native.dequantize(), expected)
        return
    # Codes centred on 128: the offset (128 - zero) * scale has up to 31 digits and is rounded to 24.
    step = native.scale.float().abs().repeat_interleave(32, 1)
    assert bool(((native.dequantize() - expected).abs() <= step * 256 * 2**-23).all())


@pytest.mark.parametrize("columns, group, axis", [(96, 32, 0), (48, 32, 1)])
def test_hqq_groups_that_no_kernel_takes(tmp_path, columns, group, axis):
    written = files.hqq("a", 8, columns, group=group, axis=axis)
    native, value, expected = read(tmp_path, written, {"quant_method": "hqq"})
    assert native is None and torch.equal(value, expected)


@pytest.mark.parametrize("int8_inputs", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits, group", [(8, None), (4, 32), (3, 16)])
def test_torchao_bytes(tmp_path, int8_inputs, asymmetric, bits, group):
    written = files.torchao_bytes("a", 9, 64, bits, group, int8_inputs, asymmetric)
    native, _, expected = read(tmp_path, written, files.TORCHAO)
    assert isinstance(native, Int8Weight) == (int8_inputs and not asymmetric and group is None)
    assert torch.equal(native.dequantize(), expected)
    if bits < 8:
        assert native.bits == 4


def test_torchao_int4(tmp_path):
    native, _, expected = read(tmp_path, files.torchao_int4("a", 9, 64), files.TORCHAO)
    assert torch.equal(native.dequantize(), expected)


@pytest.mark.parametrize("rows, columns", [(16, 1024), (13, 960)])
def test_torchao_tiles(tmp_path, rows, columns):
    native, _, expected = read(tmp_path, files.torchao_tiles("a", rows, columns), files.TORCHAO)
    assert native.shape == (rows, columns) and torch.equal(native.dequantize(), expected)


# --- whole models -----------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def model_folder(tmp_path, name):
    """A Llama in one of the formats, and the same model in float."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    writer, settings = files.FORMATS[name]
    tensors = {}
    for key, value in model.state_dict().items():
        if "proj" not in key:
            tensors[key] = value
            continue
        written, expected = writer(key.removesuffix(".weight"), *value.shape)
        if not name.startswith(("nf4", "bnb")):
            # The size of a trained weight, by a power of two: exact.
            factor = 2.0 ** round(math.log2(0.05 / float(expected.std())))
            small = [k for k in written if k.endswith(("scales", "scale", "_zero_point"))]
            written |= {k: written[k] * factor for k in small if written[k].is_floating_point()}
            expected = expected * factor
        tensors |= written
        value.copy_(expected)
    return files.save(tmp_path / "llama", tensors, settings, **model.config.to_dict()), model


@pytest.mark.parametrize("name", files.FORMATS)
def test_model_runs_on_its_own_codes(tmp_path, name):
    folder, reference = model_folder(tmp_path, name)
    imported = load_model(folder)
    graph = optimize(Graph.from_exported(imported.exported, imported.native))[0]
    decisions = quantize_grouped(
        graph, {}, 4, 32, 32, set(), native=True
    )  # float32: codes are what is tested
    graph.native = {}
    layers = {d.name: d for d in decisions if "head" not in d.name}
    op = {"nf4": "linear", "int-quantized": "linear_dynamic_int8", "torchao-int8": "linear_dynamic_int8"}.get(
        name, "linear_grouped"
    )
    assert layers and {d.op for d in layers.values()} == {op}, layers
    exe = Executor(Plan(graph, "decoder", "native", config=imported.config), device="cpu", threads=1)
    ids = torch.randint(0, 96, (1, 11))
    with torch.no_grad():
        expected = reference(ids).logits[0]
    error = float((exe.logits(ids)[0] - expected).norm() / expected.norm())
    assert error < (0.05 if op == "linear_dynamic_int8" else 1e-4)


def test_a_weight_without_a_place_is_an_error(tmp_path):
    folder, _ = model_folder(tmp_path, "gptq")
    held = read_folder(
        folder, settings := settings_of(folder, json.loads((folder / "config.json").read_text()))
    )
    assert len(held.native) == 7
    tensors = {k.replace("up_proj", "upp_proj"): v for k, v in files.safetensors.torch.load_file(
        str(folder / "model.safetensors")).items()}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    files.save(folder, tensors, settings, **config)
    with pytest.raises(FormatError, match=r"lacks the weight|has no place"):
        load_model(folder)


# --- files that lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("a.scales"), "the tensor 'a.scales' is missing"),
        (lambda t: t.update({"a.g_idx": t["a.g_idx"] + 1}), "a.g_idx must hold groups below 2"),
        (lambda t: t["a.g_idx"].zero_(), "a.g_idx must give every group 32 columns"),
        (lambda t: t.update({"a.qzeros": t["a.qzeros"][:, :0]}), r"a.qzeros must be int32 \[rows, 1\]"),
        (lambda t: t.update({"a.scales": t["a.scales"].double()}), "a.scales must be float16 or bfloat16"),
        (lambda t: t.update({"a.weight": torch.zeros(8, 64)}), "both quantised and in float"),
    ],
)
def test_contradictions_are_named(tmp_path, change, message):
    tensors, _ = files.gptq("a", 8, 64)
    change(tensors)
    folder = files.save(tmp_path / "m", tensors, files.gptq_settings())
    with pytest.raises(FormatError, match=message):
        read_folder(folder, files.gptq_settings())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "aqlm"}, "the quant_method must be one of"),
        (
            files.gptq_settings() | {"checkpoint_format": "marlin"},
            "checkpoint_format must be gptq or gptq_v2",
        ),
        (files.awq_settings(version="marlin"), "AWQ version must be gemm or gemv"),
        (files.compressed_settings("marlin-24"), "format must be one of"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, settings, message):
    folder = files.save(tmp_path / "m", files.gptq("a", 8, 64)[0], settings)
    with pytest.raises(UnsupportedError, match=message):
        read_folder(folder, settings)
