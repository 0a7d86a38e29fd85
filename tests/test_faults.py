"""Faults put in on purpose: each is reported by name, and none passes in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import narrowcast as nc
import quantized_files as files
from command_line import one_line
from narrowcast.compress.sequential import round_in_sequence
from narrowcast.compress.transformer import int4_targets
from narrowcast.errors import ArgumentError, FormatError, UnsupportedError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.graph.report import report_of
from narrowcast.importers import load_model
from narrowcast.importers.model import Model
from narrowcast.importers.quantized import read_folder
from test_gptq_sequence import encoder, texts
from test_importers_gguf import tiny_llama

AUTO = torch.export.Dim.AUTO
ops = torch.ops.narrowcast


class Net(nn.Module):
    """Two layers whose inputs are 96 and 80: a multiple of 32 only, and of neither."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(96)
        self.a, self.b = nn.Linear(96, 80), nn.Linear(80, 96)

    def forward(self, x):
        return self.b(torch.relu(self.a(self.norm(x)))) + x


@pytest.fixture(scope="module")
def net():
    exported = torch.export.export(
        Net().eval().requires_grad_(False), (torch.randn(3, 96),), dynamic_shapes=({0: AUTO},)
    )
    return Model(exported, "generic")


def notes(plan, name):
    return next(row["notes"] for row in report_of(plan)["layers"] if row["name"] == name)


# --- weights and inputs -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_a_dead_hessian(recipe):
    """A norm of zeros: the layers behind it see nothing, are rounded to nearest, and every one is named."""
    damaged = encoder()
    for name in ("norm.0.weight", "norm.0.bias"):
        damaged.exported.state_dict[name].zero_()
    plan = nc.compress(damaged, recipe=recipe, data=texts(40, 1))
    dead = [w for w in plan.record["warnings"] if "no calibration data reached it: rounded to nearest" in w]
    assert len(dead) == 2 and all(w.startswith("layer ") for w in dead), plan.record["warnings"]
    assert any("no calibration data reached it" in note for note in notes(plan, "down.0"))


def test_dead_inputs_are_counted_in_the_report():
    """Single channels of zeros, which a whole Hessian hides."""
    damaged = encoder()
    for name in ("norm.0.weight", "norm.0.bias"):
        damaged.exported.state_dict[name][3:8] = 0
    plan = nc.compress(damaged, recipe="int4", data=texts(40, 1))
    layer = next(row for row in report_of(plan)["layers"] if row["dead"])
    assert layer["dead"] == 5
    assert "5 of its inputs were zero in all of the calibration data" in layer["notes"]


@pytest.mark.parametrize("recipe", ["int4", "int8", "int8-weight"])
def test_a_weight_of_nan(recipe):
    damaged = encoder()
    damaged.exported.state_dict["up.1.weight"][3, 2] = float("nan")
    with pytest.raises(ArgumentError, match=r"weight \S*up\.1\.weight\S* holds NaN: the model is damaged"):
        nc.compress(damaged, recipe=recipe, data=texts(40, 1))


def test_a_weight_of_infinity_is_refused():
    damaged = encoder()
    damaged.exported.state_dict["up.1.weight"][3, 2] = float("inf")
    with pytest.raises(ArgumentError, match=r"weight \S*up\.1\S* holds infinities: the model is damaged"):
        nc.compress(damaged, recipe="int4", data=texts(40, 1))


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_a_layer_that_matches_nothing(recipe):
    with pytest.raises(ArgumentError, match=r"keep_float must name layers; there is no 'dwon\.0'.*down"):
        nc.compress(encoder(), recipe=recipe, data=texts(40, 1), keep_float=["down.0", "dwon.0"])


def test_inputs_that_are_not_finite():
    """One bad row of data is left out of the Hessian, and the layer says so."""
    graph = optimize(Graph.from_exported(encoder().exported))[0]
    (table,) = (name for name in graph.weights if name.startswith("table"))
    graph.weights[table] = graph.weights[table].clone()
    graph.weights[table][0] = float("nan")
    ids = torch.randint(1, 8, (4, 9))
    ids[1, -1] = 0
    rounded = round_in_sequence(graph, int4_targets(graph, 32, 8, set()), [(ids, torch.ones_like(ids))])
    assert all("1 of its input rows were not finite and were left out" in r.notes for r in rounded.values())


# --- sizes that no kernel takes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, wanted, groups, precisions",
    [
        ("int8", 64, {"a": 32, "b": 0}, {"a": "int8", "b": "int8"}),
        ("int8", 96, {"a": 0, "b": 0}, {"a": "int8", "b": "int8"}),
        ("int4", 64, {"a": 32, "b": 0}, {"a": "int4", "b": "float32"}),
        ("int8-weight", 64, {"a": 32, "b": 0}, {"a": "int8", "b": "float32"}),
    ],
)
def test_groups_that_divide_no_layer(net, recipe, wanted, groups, precisions):
    """Never an error: another group, one scale per token or float, and the layer's row says which."""
    if recipe != "int8":
        model = _as_encoder(net)
        data = texts(40, 1)
    else:
        model, data = net, [(torch.randn(40, 96),) for _ in range(3)]
    plan = nc.compress(model, recipe=recipe, data=data, group_size=wanted)
    rows = {row["name"].split(".")[-1]: row for row in report_of(plan)["layers"] if row["op"] != "embedding"}
    assert {n: rows[n]["group_size"] for n in groups} == groups
    assert {n: rows[n]["precision"] for n in groups} == precisions
    for name, depth in (("a", 96), ("b", 80)):
        if rows[name]["precision"] == "float32":
            assert rows[name]["why"] == "K % 32 != 0"
        elif groups[name] not in (wanted, 0) or depth > wanted:
            (note,) = rows[name]["notes"]
            assert note.startswith(f"groups of {wanted} do not divide its {depth} inputs: it has ")
            assert any(note in w for w in plan.record["warnings"])


class Words(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.table, self.net = nn.Embedding(8, 96), net

    def forward(self, input_ids, attention_mask):
        return (self.net(self.table(input_ids)) * attention_mask[..., None]).sum(1)


def _as_encoder(net) -> Model:
    """The two layers behind a table of words: recipes with groups are for encoders and decoders."""
    inner = Net().eval()
    ids = torch.randint(8, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    shapes = ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO})
    exported = torch.export.export(Words(inner).eval().requires_grad_(False), ids, dynamic_shapes=shapes)
    return Model(exported, "encoder", {}, encoder().assets)


@pytest.mark.parametrize("wanted", [48, -32, 1])
def test_groups_of_no_kernel_are_refused(net, wanted):
    with pytest.raises(ArgumentError, match=f"group_size must be a multiple of 32, got {wanted}"):
        nc.compress(net, recipe="int8", data=[(torch.randn(9, 96),)] * 2, group_size=wanted)


def test_symmetric_is_for_int4(net):
    with pytest.raises(ArgumentError, match="symmetric must be False for recipe int8"):
        nc.compress(net, recipe="int8", symmetric=True)


def test_symmetric_weights_have_no_offset():
    plan = nc.compress(encoder(), recipe="int4", data=texts(40, 1), symmetric=True)
    calls = list(plan.graph.calls(ops.linear_grouped.default))
    assert len(calls) == 4 and all(call.args[3] is None and call.args[5] == 4 for call in calls)
    assert plan.certificate["loss"] < 0.05


def test_the_command_line_says_it_too(cli, tmp_path):
    """Groups of 64 of 96 inputs, asked for in a shell: done in groups of 32, with a line per layer."""
    source, text, out = (
        tiny_llama(tmp_path / "tiny.gguf", layers=1),
        tmp_path / "t.txt",
        tmp_path / "tiny.plan",
    )
    text.write_text("a tiny model counts its words, one after another, and says none of them twice. " * 12)
    options = ("--recipe", "int4", "--group-size", 64, "--symmetric", "--data", text)
    summary = cli("compress", source, "-o", out, *options, "--json").json
    assert any(
        "groups of 64 do not divide its 96 inputs: it has groups of 32" in w for w in summary["warnings"]
    )
    calls = {tuple(call.args[3:6]) for call in nc.Plan.load(out).graph.calls(ops.linear_grouped.default)}
    assert {(None, 64, 4), (None, 32, 4)} <= calls
    one_line(
        cli("compress", source, "-o", out, "--recipe", "int8", "--symmetric"), 2, "only int4 has zero points"
    )
    one_line(cli("compress", source, "-o", out, "--group-size", 40), 2, "multiple of 32, got 40")


# --- checkpoints that lie -----------------------------------------------------------------------------


def checkpoint(folder, told: int, stored: int, rows=64, columns=256):
    """Trained weights, centred on zero, with zero points as version ``stored`` keeps them."""
    weight = torch.randn(rows, columns) * 0.05
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(1, 15).long()
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).long().flatten(1)
    kept = zero - 1 if stored == 1 else zero
    tensors = {
        "a.qweight": files.dense(codes, 4).t(), "a.qzeros": files.dense(kept.t(), 4), "a.scales": scale.t(),
    }  # fmt: skip
    return files.save(folder, tensors, files.gptq_settings(version=told)), weight


@pytest.mark.parametrize("told", [1, 2])
@pytest.mark.parametrize("stored", [1, 2])
def test_zero_points_of_another_version(tmp_path, told, stored):
    """GPTQ files of version 1 keep zero points less one: read as the other version, every weight is a step off."""
    folder, weight = checkpoint(tmp_path / "m", told, stored)
    held = read_folder(folder, files.gptq_settings(version=told))
    error = (held.values["a.weight"] - weight).norm() / weight.norm()
    if told == stored:
        assert held.warnings == [] and error < 0.15
        return
    assert error > 0.25
    (warning,) = held.warnings
    assert "steps off zero on average" in warning and "checkpoint_format gptq or gptq_v2" in warning


def test_a_doubt_about_the_source_reaches_the_plan():
    doubtful = encoder()
    doubtful.warnings.append("its 4-bit weights lie +1.00 steps off zero on average")
    plan = nc.compress(doubtful, recipe="int8", data=texts(40, 1))
    assert "its 4-bit weights lie +1.00 steps off zero on average" in plan.record["warnings"]


def test_formats_without_a_kernel(tmp_path):
    """NF4 is read exactly and has no kernel: native refuses it."""
    from test_importers_quantized import model_folder

    model = load_model(model_folder(tmp_path, "nf4")[0])
    model.assets = encoder().assets
    with pytest.raises(UnsupportedError, match=r"values of a table \(NF4\) have no kernel: use int4"):
        nc.compress(model, recipe="native", data=" ".join(texts(40, 1)))


def test_a_plan_that_calls_an_op_that_is_not_there(net, tmp_path):
    """A plan of another version may ask for what these libraries lack."""
    graph = optimize(Graph.from_exported(net.exported))[0]
    plan = Plan(graph, "generic", "fp32")
    document = plan._document(plan._tensors())
    call = next(n for n in document["graph"]["nodes"] if n["op"] == "call_function")
    call["target"] = "narrowcast.linear_ternary.default"
    from narrowcast.graph.serialize import from_json

    with pytest.raises(FormatError, match="linear_ternary"):
        from_json(document["graph"], graph.weights)
