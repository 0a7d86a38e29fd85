"""The command line: exit codes, both streams, JSON that parses, and errors without traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import typer
from torch import nn

import narrowcast as nc
import narrowcast_cli
from command_line import one_line
from narrowcast.errors import ArgumentError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.importers.model import Model
from narrowcast.runtime import certify
from narrowcast_cli import output
from small_plans import decoder_plan, encoder_plan, image_plan

VERBS = ("compress", "run", "eval", "bench", "inspect", "verify", "doctor")
AUTO = torch.export.Dim.AUTO


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + x


@pytest.fixture(scope="module")
def model():
    module = Net().eval().requires_grad_(False)
    exported = torch.export.export(module, (torch.randn(3, 64),), dynamic_shapes=({0: AUTO},))
    return Model(exported, "generic")


@pytest.fixture(scope="module")
def plan_file(model, tmp_path_factory):
    """A certified int8 plan."""
    plan = nc.compress(model, recipe="int8", data=[(torch.randn(32, 64),) for _ in range(3)])
    path = tmp_path_factory.mktemp("plan") / "net.plan"
    plan.save(path)
    return path


# --- help, options, entry points ------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(cli, verb):
    result = cli(verb, "--help")
    assert result.code == 0 and result.err == ""
    assert "--json" in result.out and f"narrowcast {verb}" in result.out


def test_help_names_every_verb(cli):
    result = cli("--help")
    assert result.code == 0 and all(verb in result.out for verb in VERBS)


def test_recipes_of_the_help_are_the_recipes(cli):
    from narrowcast.compress import RECIPES

    text = " ".join(cli("compress", "--help").out.replace("│", " ").split())
    for recipe in (*RECIPES, "auto"):
        assert recipe in text
    assert "fp16" not in text and "bf16" not in text


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["doctor", "--loud"], "--loud"),
        (["paint"], "paint"),
        (["inspect"], "plan"),
        (["run", "x.plan", "hello", "--top-p", "2"], "--top-p"),
        (["bench", "x.plan", "--repeats", "many"], "--repeats"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli, arguments, text):
    result = cli(*arguments)
    assert result.code == 2 and result.out == ""
    assert text in result.err and "Traceback" not in result.err


def test_help_loads_no_torch():
    code = (
        "import sys, narrowcast_cli; sys.argv = ['narrowcast', 'compress', '--help']\n"
        "try: narrowcast_cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_as_a_process(plan_file):
    code = "import narrowcast_cli; narrowcast_cli.main()"
    command = [sys.executable, "-c", code, "inspect"]
    good = subprocess.run([*command, plan_file, "--json"], capture_output=True, text=True)
    assert good.returncode == 0 and json.loads(good.stdout)["recipe"] == "int8"
    bad = subprocess.run([*command, plan_file.with_name("none")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.count("\n") == 1 and "there is no file" in bad.stderr


# --- errors to exit codes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ArgumentError("x must be 1, got 2"), 2, "narrowcast: x must be 1, got 2\n"),
        (nc.FormatError("cut off"), 1, "narrowcast: cut off\n"),
        (nc.UnsupportedError("needs a GPU"), 1, "narrowcast: needs a GPU\n"),
        (nc.VerificationError("drifted\n  sample 0\n"), 3, "narrowcast: drifted; sample 0\n"),
        (OSError(28, "No space left"), 1, "narrowcast: [Errno 28] No space left\n"),
        (RuntimeError("linear: x must be 2-D"), 1, "narrowcast: linear: x must be 2-D\n"),
        (MemoryError(), 1, "narrowcast: MemoryError\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
        (typer.Abort(), 1, "interrupted\n"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_errors_become_a_line_and_a_code(capsys, error, code, line):
    def app(standalone_mode):
        raise error

    assert output.run(app) == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    def app(standalone_mode):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        output.run(app)


def test_json_is_written_whole_or_not_at_all(capsys):
    with pytest.raises(ValueError):
        output.print_json({"good": 1, "bad": float("nan")})
    assert capsys.readouterr().out == ""


# --- files that are not what they should be -------------------------------------------------------


@pytest.mark.parametrize("verb", [["inspect"], ["run", "text"], ["bench"]])
def test_files_that_are_no_plans(cli, plan_file, tmp_path, verb):
    verb, *rest = verb
    one_line(cli(verb, tmp_path / "none.plan", *rest), 2, "there is no file")
    bad = tmp_path / "bad.plan"
    bad.write_text("hello, this is no plan at all")
    one_line(cli(verb, bad, *rest), 1, "is not a plan")
    bad.write_bytes(plan_file.read_bytes()[:-7])
    one_line(cli(verb, bad, *rest), 1, "not a whole plan file")


def flipped(plan_file, path):
    data = bytearray(plan_file.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_a_flipped_byte(cli, plan_file, tmp_path):
    bad = flipped(plan_file, tmp_path / "bad.plan")
    one_line(cli("verify", bad), 3, "was altered")
    one_line(cli("inspect", bad), 1, "was altered")


def test_compress_refuses_before_it_writes(cli, tmp_path):
    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0\x01")
    other = tmp_path / "model.bin"
    other.write_bytes(b"something else")
    out = tmp_path / "x.plan"
    one_line(cli("compress", tmp_path / "none.gguf", "-o", out), 2, "must exist")
    one_line(cli("compress", gguf, "-o", out, "--recipe", "int3"), 2, "recipe must be one of")
    one_line(cli("compress", gguf, "-o", out, "--budget", "7"), 2, "budget must lie")
    one_line(cli("compress", gguf, "-o", out, "--distill", "9"), 2, "give prune too")
    one_line(cli("compress", gguf, "-o", out, "--recipe", "auto", "--prune", "0.5"), 2, "prune must be None")
    one_line(cli("compress", gguf, "-o", out, "--json"), 1, "cut.gguf")
    one_line(cli("compress", other, "-o", out), 1, "no model file known here")
    one_line(cli("compress", gguf, "-o", tmp_path / "no" / "x.plan"), 2, "does not exist")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "model.bin"]


def test_prune_and_distill_of_a_shell(cli, monkeypatch, tmp_path):
    """Dry runs take them as well; what was cut is in the plan."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    exported = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: AUTO},))
    model = Model(exported, "image", {"image": {"size": 8}})
    monkeypatch.setattr("narrowcast.compress.api.load_model", lambda source, **options: model)
    monkeypatch.setattr("narrowcast.runtime.tasks.load_folder", lambda *a: torch.randn(60, 3, 8, 8))
    out = tmp_path / "half.plan"
    options = ("--recipe", "fp32", "--data", tmp_path, "--prune", 0.4, "--distill", 20)
    told = cli("compress", "model", "-o", out, *options, "--dry-run", "--json").json
    assert not out.exists()
    made = cli("compress", "model", "-o", out, *options, "--json")
    assert made.code == 0, made.err
    plan = nc.Plan.load(out)
    assert told["bytes"][0] <= plan.weight_bytes <= told["bytes"][1] < made.json["bytes_float32"]
    assert plan.record["pruning"]["share"] >= 0.4 and plan.record["pruning"]["distillation"]["steps"] == 20


# --- inspect --------------------------------------------------------------------------------------


def test_inspect(cli, plan_file):
    data = cli("inspect", plan_file, "--json").json
    assert (data["kind"], data["recipe"]) == ("generic", "int8")
    assert data["bytes"] == plan_file.stat().st_size > data["weight_bytes"]
    assert {layer["precision"] for layer in data["layers"]} == {"int8"}
    assert all(layer["bytes"] > 0 and layer["sqnr_db"] > 20 for layer in data["layers"])
    names = {node["name"] for node in data["nodes"]}
    assert len(names) == len(data["nodes"]) and any("linear" in node["op"] for node in data["nodes"])
    shown = cli("inspect", plan_file, "--nodes")
    assert shown.code == 0 and all(name in shown.out for name in names)
    assert all(layer["name"] in shown.out for layer in data["layers"])


def test_inspect_writes_a_page_and_a_plot(cli, plan_file, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    page, plot = tmp_path / "a.html", tmp_path / "a.png"
    result = cli("inspect", plan_file, "--report", page, "--png", plot)
    assert result.code == 0 and f"wrote {page}" in result.out
    text = page.read_text()
    assert "data:image/png" in text and "<script" not in text and "://" not in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.png"]


def test_inspect_without_matplotlib(cli, plan_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    one_line(cli("inspect", plan_file, "--png", tmp_path / "a.png"), 1, "narrowcast[plot]")
    assert not list(tmp_path.iterdir())


def test_inspect_cannot_write(cli, plan_file, tmp_path):
    one_line(cli("inspect", plan_file, "--report", tmp_path / "no" / "a.html"), 2, "does not exist")


# --- verify ---------------------------------------------------------------------------------------


def test_verify(cli, plan_file):
    data = cli("verify", plan_file, "--json", "--device", "cpu").json
    assert data["ok"] and data["plan"] == str(plan_file)
    assert data["checks"] and all(c["error"] <= c["tolerance"] for c in data["checks"])
    shown = cli("verify", plan_file)
    assert shown.code == 0 and "holds" in shown.out and "tolerance" in shown.out


def float_plan(model):
    graph, _ = optimize(Graph.from_exported(model.exported))
    return Plan(graph, "generic", "fp32")


def test_verify_without_certificate_and_with_drift(cli, model, tmp_path):
    path, x = tmp_path / "net.plan", torch.randn(4, 64)
    plan = float_plan(model)
    plan.save(path)
    one_line(cli("verify", path, "--json"), 3, "no certificate")
    certify(plan, [((x,), (plan.graph.run(x)[0],))])
    plan.samples["reference.0.0"] *= 1.1
    plan.save(path)
    one_line(cli("verify", path), 3, "DRIFT")
    one_line(cli("verify", path, "--device", "tpu"), 2, "device must be")


def test_verify_a_signature(cli, model, tmp_path):
    pytest.importorskip("cryptography", reason="signatures need cryptography")
    from cryptography.hazmat.primitives.asymmetric import ed25519

    path, x = tmp_path / "net.plan", torch.randn(4, 64)
    plan, key = float_plan(model), ed25519.Ed25519PrivateKey.generate()
    certify(plan, [((x,), (plan.graph.run(x)[0],))])
    plan.save(path)
    public = key.public_key().public_bytes_raw()
    one_line(cli("verify", path, "--key", public.hex()), 3, "no signature")
    plan.sign(key.private_bytes_raw())
    plan.save(path)
    assert cli("verify", path, "--key", public.hex()).code == 0
    one_line(cli("verify", path, "--key", "00" * 32), 3, "not signed with this key")
    one_line(cli("verify", path, "--key", "xyz"), 2, "64 hexadecimal digits")


# --- doctor, run, bench ---------------------------------------------------------------------------


def test_doctor(cli, monkeypatch):
    data = cli("doctor", "--json").json
    assert data["self_test"] == "passed" and data["torch"] == torch.__version__
    assert cli("doctor").code == 0
    monkeypatch.setattr(narrowcast_cli.doctor, "self_test", lambda: "failed: wrong numbers")
    broken = cli("doctor", "--json")
    assert broken.code == 1 and broken.json["self_test"].startswith("failed")


@pytest.mark.parametrize("pool", [True, False])
def test_run_compares_sentences(cli, tmp_path, pool):
    path = tmp_path / "words.plan"
    encoder_plan(pool).save(path)
    arguments = ("run", path, "sun rain", "snow", "rain sun")
    if not pool:
        one_line(cli(*arguments), 1, "pooling encoder")
        return
    data = cli(*arguments, "--json").json
    assert data["sentences"] == ["sun rain", "snow", "rain sun"]
    similarity = torch.tensor(data["similarity"])
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3))
    assert similarity[0, 2] > 0.999
    nearest, other = cli(*arguments).out.splitlines()[-2:]
    assert nearest.split() == ["1.000", "rain", "sun"] and other.split()[1:] == ["snow"]


@pytest.fixture
def decoder_file(tmp_path):
    def make(**assets):
        decoder_plan(**assets).save(tmp_path / "words.plan")
        return tmp_path / "words.plan"

    return make


def test_run_answers_a_prompt(cli, decoder_file):
    path = decoder_file()
    data = cli("run", path, "sun", "--max-new-tokens", "3", "--json").json
    assert data["prompt"] == "sun" and data["text"].split() == ["rain", "snow", "wind"]
    for option in ("--stream", "--no-stream"):
        shown = cli("run", path, "sun", "--max-new-tokens", "3", option)
        assert shown.code == 0 and shown.out.split() == ["rain", "snow", "wind"]
    one_line(cli("run", path, "sun", "rain"), 2, "takes one prompt")


def test_run_uses_the_chat_template_unless_told(cli, decoder_file):
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    path = decoder_file(chat_template=b"{{ messages[0].content }} snow")
    arguments = ("run", path, "sun", "--max-new-tokens", "1", "--json")
    assert cli(*arguments).json["text"].split() == ["wind"]
    assert cli(*arguments, "--no-chat").json["text"].split() == ["rain"]


def test_run_needs_a_task(cli, plan_file):
    one_line(cli("run", plan_file, "hello"), 2, "run it from Python")


@pytest.fixture
def image_file(tmp_path):
    image_plan().save(tmp_path / "colours.plan")
    return tmp_path / "colours.plan"


def test_run_classifies_pictures(cli, image_file, tmp_path):
    pictures = pytest.importorskip("PIL.Image", reason="pictures need pillow")
    picture = tmp_path / "green.png"
    pictures.new("RGB", (20, 12), (0, 250, 0)).save(picture)
    data = cli("run", image_file, picture, "--top", "2", "--json").json
    assert data[0]["picture"] == str(picture) and len(data[0]["classes"]) == 2
    assert data[0]["classes"][0]["label"] == "green"
    assert "green" in cli("run", image_file, picture).out
    one_line(cli("run", image_file, tmp_path / "none.png"), 2, "there is no picture")
    picture.write_bytes(b"no picture")
    one_line(cli("run", image_file, picture), 1, "is not a picture")


def test_bench(cli, image_file, plan_file):
    data = cli("bench", image_file, "--repeats", "3", "--threads", "1", "--json").json
    assert data["threads"] == 1 and [row["case"] for row in data["cases"]] == ["batch1", "batch16"]
    assert all(0 < r["narrowcast"]["low"] <= r["narrowcast"]["median"] for r in data["cases"])
    shown = cli("bench", image_file, "--repeats", "3", "--profile")
    assert shown.code == 0 and shown.out.count("batch16") == 2 and "GMAC/s" in shown.out
    profiled = cli("bench", image_file, "--repeats", "3", "--profile", "--json").json
    assert all(row["profile"]["steps"] for row in profiled["cases"])
    one_line(cli("bench", image_file, "--vs", "torch"), 2, "--vs needs --source")
    one_line(cli("bench", image_file, "--vs", "abacus", "--source", "x"), 1, "peer abacus")
    one_line(cli("bench", plan_file), 1, "bench knows the cases")
