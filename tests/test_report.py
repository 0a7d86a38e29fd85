"""The report of a plan: one page and the same content as JSON, with warnings that rest on measurements."""

from __future__ import annotations

import json
import random
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import narrowcast as nc
from command_line import one_line
from narrowcast.compress import calibration_data, hygiene
from narrowcast.errors import FormatError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.page import write_page
from narrowcast.graph.report import layers_of, report_of
from narrowcast.importers.model import Model
from narrowcast.runtime.timing import time_layers
from small_plans import tokenizer_asset

AUTO = torch.export.Dim.AUTO
HOSTILE = "<script>alert('$x')</script>&amp;"


class Reader(HTMLParser):
    """Tags, attributes and text of a page; text of a cell as a browser shows it."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "data")]

    def handle_data(self, data):
        self.text += data


class Net(nn.Module):
    """A convolution, a wide and a narrow dense layer, and one whose depth no group divides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.odd = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.odd(torch.relu(self.b(torch.relu(self.a(x))) + x))


def export(module, x=None):
    x = torch.randn(3, 64) if x is None else x
    return torch.export.export(module.eval().requires_grad_(False), (x,), dynamic_shapes=({0: AUTO},))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return Model(export(Net()), "generic")


def batches(count, rows=100, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, 64, generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def plan(model):
    return nc.compress(model, recipe="int8", data=batches(4), keep_float=["b"])


@pytest.fixture(scope="module")
def plan_file(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "net.plan"
    plan.save(path)
    return path


# --- content --------------------------------------------------------------------------------------


def test_the_page_shows_what_the_json_holds(cli, plan_file, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    page = tmp_path / "net.html"
    result = cli("inspect", plan_file, "--report", page, "--json")
    data, read = result.json, Reader(page.read_text())
    assert data["kind"] == "generic" and data["bytes"] == plan_file.stat().st_size
    assert data["bytes_float32"] == 4 * (64 * 96 + 96 + 96 * 64 + 64 + 64 * 10 + 10)
    for row in data["layers"]:
        assert row["name"] in read.text and f"{row['bytes']:,}" in read.text
        assert row["ms"]["sample"] > 0 and f"{row['ms']['sample']:.4f}" in read.text
    assert data["left_in_float"] == [{"name": "b", "op": "linear", "why": "asked for"}]
    assert "asked for" in read.text and data["timing"]["cases"]["sample"] > 0
    assert sum(part["bytes"] for part in data["precisions"].values()) == data["weight_bytes"]
    ratio = data["data"]["held_out_over_calibration"]
    assert 0.5 < ratio < 1.5 and f"{ratio:.5g}" in read.text
    # Nothing is loaded or run: the plot is the only thing that a page refers to, and it is inside.
    assert "script" not in read.tags and "link" not in read.tags and "://" not in page.read_text()
    assert len(read.links) == 1 and read.links[0].startswith("data:image/png;base64,iVBOR")
    assert list(tmp_path.iterdir()) == [page]


def test_without_matplotlib_the_page_says_so(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_page(report_of(plan), tmp_path / "a.html")
    read = Reader((tmp_path / "a.html").read_text())
    assert "img" not in read.tags and "narrowcast[plot]" in read.text and "Not timed" in read.text


def test_compress_writes_a_report(cli, model, tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="the model of this test is an ONNX file")
    import onnx
    from onnx import helper, numpy_helper

    weight = torch.randn(64, 64).numpy()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", 1, [4, 64])],
        [helper.make_tensor_value_info("y", 1, [4, 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    plan, page = tmp_path / "m.plan", tmp_path / "m.html"
    result = cli("compress", tmp_path / "m.onnx", "-o", plan, "--recipe", "fp32", "--report", page, "--json")
    assert result.code == 0, result.err
    report = result.json["report"]
    assert report["model"] == "m.onnx" and [r["precision"] for r in report["layers"]] == ["float32"]
    assert report["data_recorded"] and report["data"] is None and report["timing"] is None
    read = Reader(page.read_text())
    assert "This plan was made without data." in read.text and "the recipe is fp32" in read.text
    assert cli("inspect", plan, "--json").json["layers"] == report["layers"]


def test_an_fp32_plan_lists_every_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(50, 16), nn.Linear(16, 16)

        def forward(self, ids):
            return self.mix(self.table(ids)) @ self.table.weight.t()

    ids = torch.randint(50, (2, 5))
    rows = layers_of(Plan(Graph.from_exported(export(Tied(), ids)), "generic", "fp32"))
    assert {"table", "mix"} <= {r["name"] for r in rows} and {r["precision"] for r in rows} == {"float32"}
    assert all(r["why"] == "the recipe is fp32" for r in rows)
    assert sum(r["bytes"] for r in rows) == 4 * (50 * 16 + 16 * 16 + 16)  # a tied table counts once


def test_bytes_of_nested_names_count_once(plan):
    copy = Plan(plan.graph, "generic", "int8", record=json.loads(json.dumps(plan.record)))
    copy.record["layers"].append({"name": "a.q", "op": "linear", "precision": "int8"})
    rows = {r["name"]: r["bytes"] for r in layers_of(copy)}
    assert rows["a"] + rows["a.q"] == {r["name"]: r["bytes"] for r in layers_of(plan)}["a"]


def test_notes_of_rounding_are_shown(plan):
    copy = Plan(plan.graph, "generic", "int4", record={"first_damping": 0.01, "layers": [
        {"name": "a", "op": "linear_grouped", "precision": "int4", "damping": 0.1, "dead": 3, "notes": ["a retry"]},
    ]})  # fmt: skip
    assert layers_of(copy)[0]["notes"] == [
        "a retry", "3 of its inputs were zero in all of the calibration data", "rounded with damping 0.1",
    ]  # fmt: skip


# --- hostile and old plans ------------------------------------------------------------------------


def test_names_are_escaped(plan, tmp_path):
    record = json.loads(json.dumps(plan.record))
    record["layers"][0]["name"] = record["layers"][0]["why"] = HOSTILE
    record["warnings"] = [HOSTILE]
    copy = Plan(plan.graph, "generic", HOSTILE, record=record, source={"name": HOSTILE}, written_by=HOSTILE)
    copy.certificate = {
        "metrics": {HOSTILE: 1.0},
        "measured_on": dict.fromkeys(("device", "kernels", "torch"), HOSTILE),
    }
    write_page(report_of(copy), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    read = Reader(text)
    assert "script" not in read.tags and "<script" not in text
    assert read.text.count(HOSTILE) >= 8


def test_a_plan_without_the_figures_says_so(cli, plan, tmp_path):
    old = Plan(plan.graph, "generic", "int8", record=plan.record, certificate={"metrics": {}, "bounds": {}})
    old.save(tmp_path / "old.plan")
    result = cli("inspect", tmp_path / "old.plan", "--report", tmp_path / "old.html")
    assert result.code == 0 and "not timed: a plan without a certificate" in result.err
    assert "was made by a version that did not measure it" in Reader((tmp_path / "old.html").read_text()).text
    assert not report_of(old)["data_recorded"]


@pytest.mark.parametrize(
    "record, certificate",
    [
        ({"layers": "all"}, {}),
        ({"layers": ["a"]}, {}),
        ({"layers": [{"sqnr_db": "loud"}]}, {}),
        ({"warnings": 3}, {}),
        ({}, {"metrics": {"kl": "low"}}),
        ({}, {"data": "fine"}),
        ({}, {"data": {"unit": "tokens"}}),
        ({}, {"bounds": {"kl": [0.1]}}),
        ({}, {"measured_on": {"device": "cpu"}}),
        ({"layers": [{"notes": [{"a": 1}]}]}, {}),
        ({"layers": [{"dead": "many"}]}, {}),
        ({"bytes_float32": "1 GB"}, {}),
    ],
)
def test_a_record_that_is_no_record(cli, plan, tmp_path, record, certificate):
    bad = Plan(plan.graph, "generic", "int8", record=record, certificate=certificate)
    with pytest.raises(FormatError, match="not well formed"):
        report_of(bad)
    bad.save(tmp_path / "bad.plan")
    one_line(cli("inspect", tmp_path / "bad.plan", "--report", tmp_path / "a.html"), 1, "not well formed")


def _leaves(value, path=()):
    """The paths of everything in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from _leaves(item, (*path, key))


def test_whatever_is_replaced_in_a_document_reads_or_is_refused(plan, tmp_path, monkeypatch, seed):
    """No part of a record or a certificate can make a page fail otherwise than with a FormatError."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # the plot takes its time
    document = {"record": plan.record, "certificate": plan.certificate}
    wrong = ("text", -1.5, None, [], {}, [1, "a"], True)
    cases = [(path, value) for path in _leaves(document) for value in wrong]
    refused = 0
    for path, value in random.Random(seed).sample(cases, 150):
        copy = json.loads(json.dumps(document))
        place = copy
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        try:
            write_page(report_of(Plan(plan.graph, "generic", "int8", **copy)), tmp_path / "a.html")
        except FormatError as error:
            assert "not well formed" in str(error)
            refused += 1
    assert refused > 20


def test_unwritable_paths_leave_nothing(cli, plan_file, tmp_path, monkeypatch):
    one_line(cli("inspect", plan_file, "--report", tmp_path / "no" / "a.html"), 2, "does not exist")
    one_line(cli("inspect", plan_file, "--report", tmp_path), 2, "it is a folder")
    gguf = tmp_path / "none.gguf"
    out = tmp_path / "x.plan"
    one_line(cli("compress", gguf, "-o", out, "--report", tmp_path / "no" / "a.html"), 2, "does not exist")
    page = tmp_path / "a.html"
    page.write_text("the old page")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    one_line(cli("inspect", plan_file, "--report", page), 1, "No space left")
    assert page.read_text() == "the old page" and list(tmp_path.iterdir()) == [page]


# --- hygiene of the data --------------------------------------------------------------------------


def described(kind, calibration, held_out, errors, recipe="int8", **options):
    return hygiene.describe(kind, recipe, calibration, held_out, errors, **options)


class Embedder(nn.Module):
    """Sums of random word vectors, through two layers: as many different inputs as there are words."""

    def __init__(self, words, width=128):
        super().__init__()
        self.table, self.up, self.down = (
            nn.Embedding(words, width),
            nn.Linear(width, 256),
            nn.Linear(256, width),
        )

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        x = self.down(torch.relu(self.up(x))) * attention_mask[..., None]
        return x.sum(1)


def test_gptq_on_too_little_data_is_called_overfitted(monkeypatch):
    tokenizer = tokenizer_asset(["[UNK]", *(f"w{i}" for i in range(2000))])
    torch.manual_seed(3)
    ids = torch.randint(2001, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    shapes = ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO})
    module = Embedder(2001).eval().requires_grad_(False)
    embedder = Model(torch.export.export(module, ids, dynamic_shapes=shapes), "encoder", {}, tokenizer)

    def texts(count):
        return [" ".join(f"w{i}" for i in torch.randint(2000, (8,)).tolist()) for _ in range(count)]

    ratio = lambda p: p.certificate["data"]["held_out_over_calibration"]  # noqa: E731
    little = texts(50)
    helped = nc.compress(embedder, recipe="int4", data=little)
    monkeypatch.setattr(calibration_data, "random_texts", lambda *arguments: [])
    few, many = (nc.compress(embedder, recipe="int4", data=data) for data in (little, texts(1500)))
    assert ratio(helped) < ratio(few)  # random texts keep the data from being learnt by heart
    assert ratio(few) > hygiene.OVERFIT > ratio(many) > 0.7, (ratio(few), ratio(many))
    assert any(w.startswith("overfitted: ") for w in few.record["warnings"])
    assert any("320 tokens, give 2048 or more" in w for w in few.record["warnings"])
    assert many.certificate["data"]["warnings"] == [] == many.record["warnings"]
    assert many.certificate["data"]["calibration"]["rows"] == 9600
    assert many.certificate["data"]["widest_rounded"] == 256


def test_data_that_was_calibrated_on_is_not_held_out(model):
    (same,) = batches(1)
    plan = nc.compress(model, recipe="int8", data=[same, same])
    assert plan.certificate["data"]["shared"] == 1.0
    assert any("100% of the held-out data was calibrated on as well" in w for w in plan.record["warnings"])
    float32 = nc.compress(model, recipe="fp32", data=[same, same])
    assert float32.record["warnings"] == [] and float32.certificate["data"]["calibration"] is None


def test_padding_is_counted():
    ids = torch.arange(40).reshape(4, 10)
    mask = torch.ones_like(ids)
    mask[1:, 2:] = 0
    data = described("encoder", [(ids, mask)], [(ids + 40, mask)], (torch.rand(4), torch.rand(4)))
    assert data["calibration"]["rows"] == 16 and data["calibration"]["padding"] == 0.6
    assert any("60% of the calibration tokens are padding" in w for w in data["warnings"])
    assert data["shared"] == 0
    # Rows are the same when what counts of them is, however far they were padded.
    shorter = ids[1:, :3], mask[1:, :3]
    assert described("encoder", [(ids, mask)], [shorter], (None, torch.rand(3)))["shared"] == 1.0


def test_missing_bos():
    tokenizers = pytest.importorskip("tokenizers", reason="text needs tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "<s>": 1, "a": 2}, "[UNK]"))
    assert hygiene.begin_token(words, None) is None and hygiene.begin_token(words, 7) == 7
    words.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert hygiene.begin_token(words, None) == 1
    with_bos, without = torch.tensor([[1, 2, 2, 2]]), torch.tensor([[2, 2, 2, 2]])
    errors = torch.rand(60), torch.rand(60)
    data = described("decoder", [(with_bos,), (without,)], [(without,)], errors, begin=1)
    assert abs(data["without_begin_token"] - 2 / 3) < 1e-9
    assert any(w.startswith("missing BOS: 67% of the windows") for w in data["warnings"])
    good = described("decoder", [(with_bos,)], [(with_bos,)], errors, begin=1)
    assert not any("BOS" in w for w in good["warnings"])


def test_errors_that_are_no_numbers_are_left_out():
    x = torch.randn(4, 8)
    data = described("generic", [(x,)], [(x + 1,)], (torch.full((4,), torch.nan), torch.rand(4)))
    assert data["calibration"]["error"] is None and data["held_out_over_calibration"] is None
    json.dumps(data, allow_nan=False)


def test_times_belong_to_their_layers(plan):
    timing = time_layers(plan, repeats=3, threads=1)
    rows = layers_of(plan, timing["nodes"])
    spent = sum(row["ms"]["sample"] for row in rows)
    assert all(len(row["ms"]) == 1 for row in rows) and 0 < spent <= timing["cases"]["sample"]
    assert timing["threads"] == 1 and re.fullmatch(r"\w+", timing["kernels"])


def test_a_layer_without_a_step_of_its_own_has_no_time(plan, tmp_path):
    timing = time_layers(plan, repeats=3, threads=1)
    timing["nodes"]["sample"] = {}
    write_page(report_of(plan, timing), tmp_path / "a.html")
    assert "sample ms" in Reader((tmp_path / "a.html").read_text()).text
