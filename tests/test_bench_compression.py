"""The compression bench without its models: rows, shares, absent tools, held-out texts, rounding to nearest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "demo")]

import models  # noqa: E402

import bench_compression as bench  # noqa: E402
import held_out_texts  # noqa: E402
import nearest  # noqa: E402
import peers  # noqa: E402
from narrowcast.compress import metrics  # noqa: E402
from narrowcast.compress.default_text import PASSAGES  # noqa: E402
from narrowcast.compress.gptq import INT4, INT4_SYMMETRIC  # noqa: E402


@pytest.fixture
def seed():
    value = torch.seed() % 2**31
    print(f"seed {value}")
    torch.manual_seed(value)


@pytest.mark.parametrize("grid", [INT4, INT4_SYMMETRIC], ids=["zero point", "symmetric"])
def test_nearest_is_nearest(grid, seed):
    weight = torch.randn(24, 96) * torch.rand(24, 1)
    weight[3] = 0
    weight[4].abs_()
    made = nearest.nearest_codes(weight, grid, 32)
    back = made.dequantize()
    grids = (torch.arange(grid.low, grid.high + 1.0) * made.scale[..., None] + made.offset[..., None])[
        :, :, None
    ]
    distance = (weight.unflatten(1, (-1, 32))[..., None] - grids).abs().amin(-1).flatten(1)
    torch.testing.assert_close((weight - back).abs(), distance, rtol=1e-3, atol=1e-6)
    assert (back[3] == 0).all() and made.codes.min() >= grid.low and made.codes.max() <= grid.high
    # What the ops are handed is what was rounded.
    torch.testing.assert_close(made.weight().dequantize().float(), back, rtol=0, atol=1e-6)
    # Half a step everywhere, but for ends that a rounded zero point moves and the largest value's other side.
    steps = made.scale.abs().repeat_interleave(32, 1)
    assert ((weight - back).abs() <= steps * 1.01).all()


def row(tool: str, recipe: str, kl: float | None) -> dict:
    rest = {"reason": "absent"} if kl is None else {"accuracy": {"kl": kl}}
    return {"model": "m", "tool": tool, "recipe": recipe, **rest}


def test_shares_of_nearest():
    formats = {"int4": "int4 nearest", "int4 g64": "int4 g64 nearest"}
    rows = [
        row("narrowcast", "int8", 0.1), row("narrowcast", "int4", 0.3), row("narrowcast", "int4 g64", 0.5),
        row("nearest", "int4 nearest", 1.5), row("nearest", "int4 g64 nearest", None), row("other", "int4", 0.3),
    ]  # fmt: skip
    shares = [r.get("share_of_nearest") for r in bench.with_shares(rows, formats, bench.LOSS["decoder"])]
    assert shares == [None, 0.2, None, None, None, None]


def test_rows_of_other_models_stay(tmp_path):
    path = tmp_path / "rows.json"
    assert bench.read(path) == []
    for model, recipes in (("a", ["x"]), ("b", ["y", "z"]), ("a", ["v"])):
        rows = [{"model": model, "recipe": recipe} for recipe in recipes]
        bench.write(model, rows, {"room": "machine", "for": model}, path)
    assert [(r["model"], r["recipe"]) for r in bench.read(path)] == [("b", "y"), ("b", "z"), ("a", "v")]
    assert json.loads(path.read_text())[0] == {"room": "machine", "for": "a"}


def test_what_fails_is_a_row_that_says_why():
    def make():
        raise RuntimeError("no kernel\nand much more")

    task = peers.Task(None, Path(), [], 1)
    part = bench.Part("m", task, [], lambda engine: {"kl": 0.1}, {}, 4)
    assert bench.measured(part, peers.Recipe("tool", "way", make)) == {
        "model": "m", "tool": "tool", "recipe": "way", "reason": "RuntimeError: no kernel",
    }  # fmt: skip
    engine = peers.Engine("tool way", lambda: lambda: None, 1.26, 3, 2.0, note="said")
    found = bench.measured(part, peers.Recipe("tool", "way", lambda: engine))
    assert (found["seconds"], found["cpu_seconds"], found["bytes"], found["note"]) == (1.3, 2.0, 3, "said")
    assert found["accuracy"] == {"kl": 0.1} and found["bytes_float32"] == 4


def test_a_tool_that_is_absent_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(peers, "COMPRESSORS", ("torch", "torchao", "llama_cpp"))
    offered = peers.compressors("encoder", peers.Task(None, Path(), [], 1))
    assert [(r.tool, r.name) for r in offered] == [
        ("torch", "int8 dynamic"),
        ("torchao", "all"),
        ("llama_cpp", "all"),
    ]
    with pytest.raises(ImportError, match="torchao"):
        offered[1].make()
    with pytest.raises(peers.Unsupported, match="language models"):
        offered[2].make()


def test_metrics_are_written_with_their_bounds(seed):
    reference = torch.randn(40, 10)
    found = bench.rounded(metrics.image_metrics(reference, reference + 0.1), ("agreement", "kl"))
    assert found["agreement"] == 1 and found["bounds_95"]["agreement"] == [1, 1] and abs(found["kl"]) < 1e-9
    assert bench.accuracy_shown(found | {"kl": 0.0})[::2] == ["1.0000", "0.00000"]


def test_scored_rows_are_the_second_half(seed):
    ids, logits = torch.randint(30, (21,)), torch.randn(21, 30)
    whole, half = metrics.DecoderMetrics(), metrics.DecoderMetrics()
    whole.add(ids, logits, logits * 0.9)
    half.add(ids, bench._behind(10, logits[10:]), logits * 0.9)
    assert torch.equal(whole.rows[0], half.rows[0])


def test_held_out_texts_are_held_out():
    kinds = (held_out_texts.CODE, held_out_texts.SPANISH, held_out_texts.SQL)
    texts = [t for kind in kinds for t in kind]
    calibration = (models.DATA / "emma.txt").read_text() + "".join(PASSAGES)
    assert all(len(kind) >= 20 for kind in kinds) and len(set(texts)) == len(texts)
    assert not any(text in calibration for text in texts)
