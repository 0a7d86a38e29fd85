"""What is written is what is read: bit for bit, by our readers and by the formats' own packages."""

import json

import pytest
import torch

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.exporters import write_compressed_tensors, write_gguf
from narrowcast.exporters.gguf import to_gguf
from narrowcast.formats import GroupedWeight, Int8Weight, from_gguf
from narrowcast.importers.gguf import GGUFFile
from narrowcast.importers.quantized import read_folder
from narrowcast.importers.quantized.codes import with_zeros


def grouped(n, k, bits, group=32, zeros=False, dtype=torch.float16):
    codes, scale = torch.randint(0, 1 << bits, (n, k)), torch.randn(n, k // group).to(dtype)
    zero = torch.randint(0, 1 << bits, scale.shape) if zeros else 1 << (bits - 1)
    return with_zeros(codes, scale, zero, bits, group)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("n, k, group", [(7, 64, 32), (32, 96, 96), (1, 32, 32)])
def test_compressed_tensors(tmp_path, bits, zeros, n, k, group):
    first, rows = (
        grouped(n, k, bits, group, zeros),
        Int8Weight(torch.ones(n, k).to(torch.int8), torch.rand(n)),
    )
    norm = torch.randn(k)
    weights = {"a.weight": first, "b.weight": rows, "c.weight": norm}
    write_compressed_tensors(tmp_path / "m", weights, {"model_type": "llama"})
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["model_type"] == "llama"
    held = read_folder(tmp_path / "m", config["quantization_config"])
    assert torch.equal(held.values["c.weight"], norm)
    assert torch.equal(held.native["a.weight"].dequantize(), first.dequantize())
    assert torch.equal(held.native["b.weight"].dequantize(), rows.dequantize())


def test_compressed_tensors_scattered_groups(tmp_path):
    order = torch.cat([part.sort().values for part in torch.randperm(64).split(32)])
    plain = grouped(5, 64, 4)
    weight = GroupedWeight(4, 32, plain.packed, plain.scale, None, order)
    write_compressed_tensors(tmp_path / "m", {"a.weight": weight})
    config = json.loads((tmp_path / "m/config.json").read_text())
    held = read_folder(tmp_path / "m", config["quantization_config"])
    assert torch.equal(held.native["a.weight"].dequantize(), weight.dequantize())


def test_compressed_tensors_refuses_to_round(tmp_path):
    plain = grouped(5, 64, 4)
    weight = GroupedWeight(4, 32, plain.packed, plain.scale, plain.scale * 0.3 + 0.01)
    with pytest.raises(UnsupportedError, match="offsets that are none"):
        write_compressed_tensors(tmp_path / "m", {"a.weight": weight})
    with pytest.raises(ArgumentError, match="weights must name quantised parameters"):
        write_compressed_tensors(tmp_path / "m", {"a": plain})


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    weight = grouped(9, 96, 8 if kind == "Q8_0" else 4)
    if kind == "Q4_1":
        weight = GroupedWeight(4, 32, weight.packed, weight.scale, torch.randn(9, 3).half())
    assert to_gguf(weight)[0] == kind
    assert torch.equal(from_gguf(to_gguf(weight)[1], kind).packed, weight.packed)
    path, norm = tmp_path / "m.gguf", torch.randn(96)
    metadata = {"llama.block_count": 2, "general.name": "m", "tokens": ["a", "b"], "f": 0.5, "t": True}
    write_gguf(path, {"w": weight, "norm": norm}, "llama", metadata)
    file = GGUFFile(path)
    assert file.info("w").type == kind and torch.equal(file.grouped("w").dequantize(), weight.dequantize())
    assert torch.equal(file.tensor("norm"), norm)
    assert all(file.metadata[k] == v for k, v in metadata.items())
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}["w"]
    values = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type).copy())
    assert torch.equal(values, weight.dequantize())


def test_gguf_groups_of_more_than_32():
    weight = grouped(3, 128, 4, 64)
    assert torch.equal(from_gguf(to_gguf(weight)[1], "Q4_0").dequantize(), weight.dequantize())


def test_gguf_refuses_to_round():
    weight = grouped(3, 64, 4, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="would be rounded"):
        to_gguf(GroupedWeight(8, 32, torch.zeros(3, 64, dtype=torch.uint8), torch.rand(3, 2)))
    with pytest.raises(UnsupportedError, match="8-bit codes with an offset"):
        to_gguf(
            GroupedWeight(8, 32, torch.zeros(3, 64, dtype=torch.uint8), torch.rand(3, 2), torch.rand(3, 2))
        )
    with pytest.raises(UnsupportedError, match="groups of 32"):
        to_gguf(GroupedWeight(8, 16, torch.zeros(3, 64, dtype=torch.uint8), torch.rand(3, 4)))
    assert weight.bits == 8
