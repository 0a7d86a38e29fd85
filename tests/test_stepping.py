"""Decoding by launches, with tape.py in the place of CUDA's graphs: the CPU's tokens, one launch for each."""

from __future__ import annotations

import pytest
import torch

from narrowcast.runtime import Executor
from narrowcast.runtime.stepping import Advance
from tape import Tape
from test_captured import captured
from test_generation import greedy, random_prompt, toy  # noqa: F401  (toy is a fixture)


@pytest.mark.parametrize("length", [1, 17, 40])
def test_greedy_tokens_are_chosen_where_the_graph_runs(toy, length):  # noqa: F811
    module, source = toy
    exe, prompt = captured(source), random_prompt(length)
    assert list(exe.generate_ids(prompt, max_new_tokens=12)) == greedy(module, prompt, 12)
    # One launch per token but for the first, which runs step by step: 11 steps; the prefill was not repeated.
    assert exe.graphs.recordings == 1 and exe.graphs.launches == 10
    assert exe.decoder._steps._program.launches == 1
    # Prefill: ids, start and rows; the first step: the same. After that nothing comes from the host.
    assert exe.graphs.uploads == 6
    assert list(exe.generate_ids(prompt, max_new_tokens=12)) == greedy(module, prompt, 12)
    assert len(exe._programs) == 2


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_the_cpu_gives(toy, batch_invariant, temperature):  # noqa: F811
    _, source = toy
    prompts, options = [random_prompt(n) for n in (5, 1, 30)], {"temperature": temperature, "top_k": 20}
    results = []
    for exe in (
        Executor(source, device="cpu", threads=1),
        captured(source, batch_invariant=batch_invariant),
    ):
        got = [[], [], []]
        for i, token in exe.generate_ids(prompts, max_new_tokens=14, seed=3, **options):
            got[i].append(token)
        results.append(got)
    assert results[0] == results[1]


def test_sequences_that_end_do_not_disturb_the_others(toy):  # noqa: F811
    module, source = toy
    prompts = [random_prompt(n) for n in (5, 9)]
    whole = [greedy(module, p, 20) for p in prompts]
    end = whole[0][4]
    exe = captured(source)
    got = [[], []]
    for i, token in exe.generate_ids(prompts, max_new_tokens=20, eos=[end]):
        got[i].append(token)
    assert got == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]


def test_a_growing_cache_and_the_last_position(toy, monkeypatch):  # noqa: F811
    module, source = toy
    monkeypatch.setattr("narrowcast.runtime.generation.CHUNK", 8)
    monkeypatch.setattr("narrowcast.runtime.cache.MIN_CAPACITY", 4)
    prompts = [random_prompt(n) for n in (21, 3)]
    exe = captured(source)
    got = [[], []]
    for i, token in exe.generate_ids(prompts, max_new_tokens=60):
        got[i].append(token)
    assert got == [greedy(module, p, 60) for p in prompts]
    assert len({p.finish.capacity for p in exe._programs.values() if p.finish}) == 2  # it has grown
    long = random_prompt(196)
    assert list(exe.generate_ids(long)) == list(Executor(source, device="cpu", threads=1).generate_ids(long))


def test_a_sequence_that_has_ended_stays_within_the_cache():
    for choose in (True, False):
        ids, start = torch.zeros(2, 1, dtype=torch.long), torch.tensor([7, 3], dtype=torch.int32)
        logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
        (result,) = Advance(choose, capacity=8)([ids, start, torch.arange(2)], [logits])
        assert start.tolist() == [7, 4] and ids.tolist() == ([[1], [0]] if choose else [[0], [0]])
        assert result.tolist() == ([1, 0] if choose else logits.tolist())


def test_greedy_and_sampled_runs_over_one_cache(toy):  # noqa: F811
    _, source = toy
    exe, plain, prompt = captured(source), Executor(source, device="cpu", threads=1), random_prompt(7)
    for options in ({}, {"temperature": 0.8, "seed": 2}, {}, {"temperature": 0.8, "seed": 4}):
        tokens = list(exe.generate_ids(prompt, max_new_tokens=8, **options))
        assert tokens == list(plain.generate_ids(prompt, max_new_tokens=8, **options))
    assert len(exe.decoder._free) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_decoding_with_the_last_step_alone(toy, temperature):  # noqa: F811
    """What follows the last node is then a launch of its own."""
    _, source = toy
    exe, plain, prompt = (
        captured(source, Tape(["aten.linear"])),
        Executor(source, device="cpu"),
        random_prompt(7),
    )
    options = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
    assert list(exe.generate_ids(prompt, **options)) == list(plain.generate_ids(prompt, **options))
    assert exe.explain(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.int32), torch.tensor([0]),
                       *exe.decoder._free[0].tensors).not_native[-1].op == "aten.linear"  # fmt: skip


def test_runs_that_take_turns(toy):  # noqa: F811
    module, source = toy
    exe = captured(source)
    prompts = [random_prompt(6), random_prompt(6)]
    runs = [exe.generate_ids(p, max_new_tokens=10) for p in prompts]
    got = list(zip(*runs))
    assert [list(t) for t in zip(*got)] == [greedy(module, p, 10) for p in prompts]
    other = exe.generate_ids(prompts[0], max_new_tokens=10, temperature=0.7, seed=1)
    plain = Executor(source, device="cpu", threads=1)
    assert list(other) == list(plain.generate_ids(prompts[0], max_new_tokens=10, temperature=0.7, seed=1))


def test_decoding_with_a_step_alone(toy):  # noqa: F811
    """A plan whose cache is appended to by the CPU: graphs around it, the same tokens."""
    module, source = toy
    exe, prompt = captured(source, Tape(["kv_append"])), random_prompt(9)
    assert list(exe.generate_ids(prompt, max_new_tokens=8)) == greedy(module, prompt, 8)
    assert exe.decoder._steps._program.launches == 5


def test_logits_of_every_position(toy):  # noqa: F811
    module, source = toy
    exe = captured(source)
    for _ in range(3):
        ids = torch.randint(0, 67, (2, 37))
        for row, sequence in zip(exe.logits(ids), ids.tolist()):
            torch.testing.assert_close(row, module.full(sequence), atol=1e-4, rtol=1e-4)
