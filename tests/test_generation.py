import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.runtime import Executor
from narrowcast.runtime.cache import KVCache, capacity_for, padded_length
from narrowcast.runtime.sampling import Sampling
from narrowcast.runtime.text import TextStream, apply_chat_template

ops = torch.ops.narrowcast
VOCABULARY, WIDTH, HEADS, POSITIONS = 67, 32, 2, 200


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, start, k_cache, v_cache):
        batch, length = x.shape[:2]
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        ops.kv_append(k_cache, v_cache, k, v, start)
        y = ops.attention_decode(q, k_cache, v_cache, start + length)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(x)))


class Toy(nn.Module):
    """A decoder with the inputs of the contract."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            self.head.weight.mul_(8)  # clear winners, so that rounding changes no token

    def forward(self, input_ids, start, logit_rows, *caches):
        position = start[:, None].long() + torch.arange(input_ids.shape[1])
        x = self.tokens(input_ids) + self.places(position.clamp(max=POSITIONS - 1))
        for i, block in enumerate(self.blocks):
            x = block(x, start, *caches[2 * i : 2 * i + 2])
        return self.head(x.flatten(0, 1).index_select(0, logit_rows))

    def full(self, ids):
        """Logits of a sequence, everything computed at once."""
        caches = [torch.zeros(1, HEADS, len(ids), WIDTH // HEADS) for _ in range(4)]
        start = torch.zeros(1, dtype=torch.int32)
        with torch.no_grad():
            return self(torch.tensor([ids]), start, torch.arange(len(ids)), *caches)


class Source:
    kind = "decoder"

    def __init__(self, graph, config, assets=None):
        self.graph, self.config, self.assets = graph, config, assets or {}


def tokenizer_json():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(torch.seed())
    module = Toy().eval().requires_grad_(False)
    auto = torch.export.Dim.AUTO
    caches = [torch.zeros(2, HEADS, 24, WIDTH // HEADS) for _ in range(4)]
    inputs = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, dtype=torch.int32)
    rows = torch.tensor([0, 3, 7])
    shapes = ({0: auto, 1: auto}, {0: auto}, {0: auto}, tuple({0: auto, 2: auto} for _ in caches))
    exported = torch.export.export(module, (*inputs, rows, *caches), dynamic_shapes=shapes)
    config = {"context": POSITIONS, "eos_token_id": None}
    source = Source(Graph.from_exported(exported), config, {"tokenizer.json": tokenizer_json()})
    return module, source


def greedy(module, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(module.full(ids)[-1].argmax()))
    return ids[len(prompt) :]


def random_prompt(length):
    return torch.randint(0, VOCABULARY, (length,)).tolist()


@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_greedy_equals_recomputing_everything(toy, length):
    module, source = toy
    prompt = random_prompt(length)
    exe = Executor(source, device="cpu", threads=1)
    assert list(exe.generate_ids(prompt, max_new_tokens=12)) == greedy(module, prompt, 12)


def test_chunked_prefill_and_growing_cache(toy, monkeypatch):
    module, source = toy
    monkeypatch.setattr("narrowcast.runtime.generation.CHUNK", 8)
    monkeypatch.setattr("narrowcast.runtime.cache.MIN_CAPACITY", 4)
    exe = Executor(source, device="cpu", threads=1)
    prompts = [random_prompt(n) for n in (21, 3, 8)]
    expected = [greedy(module, p, 30) for p in prompts]
    got = [[], [], []]
    for i, token in exe.generate_ids(prompts, max_new_tokens=30):
        got[i].append(token)
    assert got == expected
    computed, asked = exe.waste["computed"], exe.waste["tokens"]
    assert asked == 32 + 29 * 3 and computed >= asked


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_each_sequence_gives_alone(toy, batch_invariant, temperature):
    _, source = toy
    exe = Executor(source, device="cpu", threads=1, batch_invariant=batch_invariant)
    options = {"max_new_tokens": 9, "temperature": temperature, "top_k": 20, "top_p": 0.9}
    prompts = [random_prompt(n) for n in (5, 1, 30)]
    got = [[], [], []]
    for i, token in exe.generate_ids(prompts, seed=3, **options):
        got[i].append(token)
    for i, prompt in enumerate(prompts):
        assert got[i] == list(exe.generate_ids(prompt, seed=3 + i, **options))


def test_one_program_serves_all_tokens(toy):
    _, source = toy
    exe = Executor(source, device="cpu", threads=1)
    list(exe.generate_ids(random_prompt(10), max_new_tokens=40))
    assert len(exe._programs) == 2  # prefill and decode
    programs = set(exe._programs.values())
    list(exe.generate_ids(random_prompt(12), max_new_tokens=40))
    assert set(exe._programs.values()) == programs


def test_ends_at_eos_and_at_the_last_position(toy):
    module, source = toy
    exe = Executor(source, device="cpu", threads=1)
    prompt = random_prompt(POSITIONS - 4)
    expected = greedy(module, prompt, 4)
    assert list(exe.generate_ids(prompt)) == [
        *expected, int(module.full([*prompt, *expected])[-1].argmax())
    ]  # fmt: skip
    prompt = random_prompt(6)
    tokens = greedy(module, prompt, 8)
    end = tokens[5]
    assert list(exe.generate_ids(prompt, max_new_tokens=8, eos=[end])) == tokens[: tokens.index(end)]
    for ids in (end, [end, 0]):
        exe = Executor(
            Source(source.graph, {"context": POSITIONS, "eos_token_id": ids}), device="cpu", threads=1
        )
        short = list(exe.generate_ids(prompt, max_new_tokens=8))
        assert short == tokens[: len(short)] and tokens[len(short)] in (end, 0)
    assert list(exe.generate_ids(prompt, max_new_tokens=0)) == []


def test_logits_of_every_position(toy, monkeypatch):
    module, source = toy
    monkeypatch.setattr("narrowcast.runtime.generation.CHUNK", 16)
    exe = Executor(source, device="cpu", threads=1)
    ids = torch.randint(0, VOCABULARY, (2, 37))
    out = exe.logits(ids)
    for row, sequence in zip(out, ids.tolist()):
        torch.testing.assert_close(row, module.full(sequence), atol=1e-4, rtol=1e-4)


def test_text_streams_in_pieces(toy):
    _, source = toy
    exe = Executor(source, device="cpu", threads=1)
    ids = list(exe.generate_ids("+-*/", max_new_tokens=20))
    whole = exe.decoder.decode(ids)
    pieces = list(exe.generate("+-*/", max_new_tokens=20))
    assert "".join(pieces) == whole and len(pieces) > 5
    stop = whole[3:5]
    assert "".join(exe.generate("+-*/", max_new_tokens=20, stop=stop)) == whole[: whole.find(stop)]
    batch = ["", ""]
    for i, piece in exe.generate(["+-*/", "++"], max_new_tokens=20):
        batch[i] += piece
    assert batch == [whole, "".join(exe.generate("++", max_new_tokens=20))]


def test_arguments_are_checked(toy):
    _, source = toy
    exe = Executor(source, device="cpu", threads=1)
    for prompt in ([], random_prompt(POSITIONS + 1)):
        with pytest.raises(ArgumentError, match="prompt 0 must have"):
            next(exe.generate_ids(prompt))
    with pytest.raises(ArgumentError, match=r"ids must be \[B, S\]"):
        exe.logits(torch.zeros(2, POSITIONS + 1, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="chat template"):
        exe.generate([{"role": "user", "content": "x"}])
    with pytest.raises(UnsupportedError, match="needs a decoder, this graph is 'generic'"):
        Executor(source.graph, device="cpu", threads=1).generate("x")
    with pytest.raises(UnsupportedError, match="number of its positions"):
        Executor(Source(source.graph, {}), device="cpu").generate([1])
    with pytest.raises(UnsupportedError, match="tokenizer"):
        Executor(Source(source.graph, source.config), device="cpu", threads=1).generate("x")


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_sampling_arguments(bad):
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        Sampling(**bad)


def test_sampling_probabilities():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(Sampling(temperature=1).probabilities(logits), p)
    torch.testing.assert_close(Sampling(temperature=0.5).probabilities(logits), torch.softmax(2 * logits, -1))
    assert Sampling(temperature=1, top_k=2).probabilities(logits).nonzero().flatten().tolist() == [1, 2]
    assert p[1] < 0.7 < p[1] + p[2]
    kept = Sampling(temperature=1, top_p=0.7).probabilities(logits)
    torch.testing.assert_close(kept, torch.tensor([0, p[1], p[2], 0]) / (p[1] + p[2]))
    assert Sampling(temperature=1, top_p=0.1).probabilities(logits)[1] == 1
    a, b = (Sampling(temperature=1, seed=5).generators(1)[0] for _ in range(2))
    draws = [Sampling(temperature=1).draw(logits, a) for _ in range(2000)]
    assert draws[:50] == [Sampling(temperature=1).draw(logits, b) for _ in range(50)]
    assert abs(draws.count(1) / 2000 - p[1]) < 0.05


def test_stream_holds_back_incomplete_characters_and_stops():
    data = "aé漢🙂b".encode()

    def decode(ids):
        return bytes(ids).decode("utf-8", errors="replace")

    stream = TextStream(decode)
    pieces = [stream.add(b) for b in data]
    assert [p for p in pieces if p] == ["a", "é", "漢", "🙂", "b"]
    assert stream.add(0xE6) == "" and stream.finish() == "\ufffd"

    stream = TextStream(decode, ["END", "NDX"])
    out = [stream.add(b) for b in b"aENbEND!"]
    assert out == ["a", "", "", "ENb", "", "", "", ""] and stream.stopped
    stream = TextStream(decode, ["END"])
    assert [stream.add(b) for b in b"xEN"] == ["x", "", ""] and stream.finish() == "EN"


def test_chat_template_is_sandboxed():
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "user", "content": "hi"}]
    text = apply_chat_template({"chat_template": template.encode()}, messages, "^")
    assert text == "^<user>hi\n<assistant>"
    hostile = b"{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UnsupportedError, match="chat template"):
        apply_chat_template({"chat_template": hostile}, messages)
    with pytest.raises(ArgumentError, match="only users"):
        apply_chat_template({"chat_template": b"{{ raise_exception('only users') }}"}, messages)


def test_buckets():
    assert [padded_length(n) for n in (1, 2, 16, 17, 64, 65, 97, 129, 193, 400)] == [
        1, 16, 16, 32, 64, 96, 128, 192, 256, 512,
    ]  # fmt: skip
    assert [capacity_for(n, 1000) for n in (1, 128, 129, 600, 1000)] == [128, 128, 256, 1000, 1000]


def test_cache_grows_and_keeps():
    cache = KVCache([(torch.float32, 2, 4), (torch.float32, 2, None)], 3, 8, torch.device("cpu"))
    for t in cache.tensors:
        t.normal_()
    before = [t.clone() for t in cache.tensors]
    cache.grow(16)
    assert [t.shape for t in cache.tensors] == [(3, 2, 16, 4), (3, 2, 16)]
    for new, old in zip(cache.tensors, before):
        assert torch.equal(new[:, :, :8], old) and not new[:, :, 8:].any()
    assert cache.bytes == sum(t.nbytes for t in cache.tensors)
