"""The engine as a whole: equal to transformers, to itself in other company, and alive."""

import json
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.request import FinishReason, FirstToken, Request, SamplingParams
from tests.engines import KINDS, Listener, assert_idle, checkpoint, greedy, make_engine, prompt, run, sampled
from tests.references import FILE

# ---------------------------------------------------------------- equal to transformers


def test_greedy_equals_generate_on_the_real_model(smollm2: Path) -> None:
    """The references are generate's own, from tests/references.py; a service test computes some of them again."""
    entries = json.loads(FILE.read_text())[:8]
    requests = [greedy(str(i), entry["prompt"], 16) for i, entry in enumerate(entries)]
    found = run(smollm2, requests, max_num_batched_tokens=48)
    assert [found.outputs[str(i), 0] for i in range(8)] == [entry["output"][:16] for entry in entries]


# ---------------------------------------------------------------- equal to itself


def test_seeded_sampling_is_the_same_twice_and_in_any_company(llama: Path) -> None:
    chosen = [sampled(kind, prompt(30, i), seed=i, **params) for i, (kind, params) in enumerate(KINDS.items())]
    alone = {}
    for request in chosen:
        alone |= run(llama, [request]).outputs
    crowd = [sampled(f"other{i}", prompt(5 + 9 * i, 50 + i), seed=9, num_sequences=2) for i in range(4)]
    together = run(llama, [*crowd[:2], *chosen, *crowd[2:]], max_num_batched_tokens=29, max_num_seqs=16)
    for key, tokens in alone.items():
        assert together.outputs[key] == tokens, key
    assert len(set(map(tuple, alone.values()))) == len(alone)
    other = run(llama, [replace(chosen[0], sampling=replace(chosen[0].sampling, seed=77))])
    assert other.outputs["plain", 0] != alone["plain", 0]


def test_n_sequences_are_those_of_their_index(llama: Path) -> None:
    for length in (31, 32, 33):
        found = run(llama, [sampled("n", prompt(length), num_sequences=3)])
        assert len({tuple(found.outputs["n", i]) for i in range(3)}) == 3
        single = run(llama, [sampled("n", prompt(length))])
        assert single.outputs["n", 0] == found.outputs["n", 0]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_continues_where_it_was(llama: Path, kind: str) -> None:
    whole = sampled("r", prompt(25), **KINDS[kind])
    tokens = run(llama, [whole]).outputs["r", 0]
    for cut in (1, 7, 19):
        resumed = replace(whole, token_ids=(*whole.token_ids, *tokens[:cut]))
        found = run(llama, [resumed])
        assert found.outputs["r", 0] == tokens[cut:]
        assert [t.offset for t in found.tokens] == list(range(cut, 20))


def test_prefix_cache_computes_only_what_is_new(llama: Path) -> None:
    listener, cold = Listener(), Listener()
    with make_engine(llama, listener) as engine:
        first = greedy("1", prompt(50), 20)
        engine.submit(first)
        listener.wait(first)
        computed = engine.stats().prompt_tokens_computed
        history = [*first.token_ids, *listener.outputs["1", 0], *prompt(9, 1)]
        second = greedy("2", history, 20)
        engine.submit(second)
        listener.wait(second)
        stats = engine.stats()
        assert listener.started["2"] == stats.prompt_tokens_cached == 64
        assert stats.prompt_tokens_computed - computed == len(history) - 64
        engine.submit(greedy("3", history, 1, namespace=b"else"))
        engine.submit(bypass := greedy("4", history, 20, use_prefix_cache=False))
        listener.wait(bypass)
        assert listener.started["3"] == listener.started["4"] == 0
        assert_idle(engine)
    with make_engine(llama, cold, enable_prefix_caching=False) as engine:
        engine.submit(second)
        cold.wait(second)
    assert listener.outputs["2", 0] == listener.outputs["4", 0] == cold.outputs["2", 0]


def test_tiny_pool_preempts_and_everyone_finishes(llama: Path) -> None:
    requests = [greedy(str(i), prompt(20 + i, i), 60, priority=i % 2) for i in range(8)]
    requests += [sampled(f"n{i}", prompt(18, 90 + i), num_sequences=2, max_tokens=40) for i in range(2)]
    roomy = run(llama, requests)
    listener = Listener()
    with make_engine(llama, listener, num_blocks=12) as engine:
        for request in requests:
            engine.submit(request)
        listener.wait(*requests)
        assert engine.stats().preemptions == len(listener.preempted) > 0
        assert_idle(engine)
    assert listener.outputs == roomy.outputs and not roomy.preempted


# ---------------------------------------------------------------- endings


def test_how_a_sequence_ends(llama: Path) -> None:
    ids = prompt(20)
    tokens = run(llama, [Request("x", tuple(ids), 20, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))])
    tokens = tokens.outputs["x", 0]
    stop = next(t for t in tokens[4:] if t not in tokens[:4])
    at = tokens.index(stop)

    def ends(engine_options=None, **params):
        request = Request("x", tuple(ids), 20, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, **params))
        listener = run(llama, [request], **(engine_options or {}))
        return listener.tokens[-1].offset, listener.tokens[-1].finish

    offset, finish = ends(stop_token_ids=frozenset({stop}))
    assert offset == at and finish.reason is FinishReason.STOP and finish.stop_token_id == stop
    offset, finish = ends(stop_token_ids=frozenset({stop}), min_tokens=at + 2)
    assert offset > at + 1
    assert ends()[0] == 29 and ends()[1].reason is FinishReason.LENGTH
    offset, finish = ends(dict(max_model_len=32))
    assert offset == 11 and finish.reason is FinishReason.LENGTH


def test_eos(llama: Path, tmp_path: Path) -> None:
    free = run(llama, [replace(g := greedy("x", prompt(20), 12), sampling=replace(g.sampling, ignore_eos=True))])
    tokens = free.outputs["x", 0]
    eos = tokens[5]
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, eos]}))
    found = run(tmp_path, [greedy("x", prompt(20), 12)])
    assert found.outputs["x", 0] == tokens[: tokens.index(eos) + 1]
    assert found.tokens[-1].finish.reason is FinishReason.STOP and found.tokens[-1].finish.eos_token_id == eos


# ---------------------------------------------------------------- the thread


def test_idle_engine_sleeps_and_still_has_a_heartbeat(pair) -> None:
    a, _, _, _ = pair
    thread = a._thread
    assert thread is not None and thread.native_id is not None
    stat = Path(f"/proc/self/task/{thread.native_id}/stat")

    def cpu_ticks() -> int:
        fields = stat.read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(0.1)
    before = cpu_ticks()
    time.sleep(1.5)
    assert cpu_ticks() - before <= 1  # of 150
    assert a.heartbeat_age_s() < 1.0


def test_an_idle_engine_makes_ready_what_prompts_would_wait_for(llama: Path) -> None:
    """On its own thread, one thing between two looks at the inbox; a failure ends it and nothing else."""
    listener = Listener()
    engine = make_engine(llama, listener)
    request, last = greedy("a", prompt(5), max_tokens=3), threading.Event()
    made: list[tuple[str, int]] = []

    def make(i: int) -> None:
        if i == 1:
            engine.submit(request)  # served before the third
        made.append((threading.current_thread().name, len(listener.tokens)))
        if i == 2:
            last.set()
            raise RuntimeError("this one cannot be made")

    engine._runner._ahead = (partial(make, i) for i in range(9))
    with engine:
        listener.wait(request)
        assert last.wait(30)
        other = greedy("b", prompt(9))
        engine.submit(other)
        listener.wait(other)
    assert made == [("engine", 0), ("engine", 0), ("engine", 3)]


def test_an_adoption_is_answered_once_its_step_is_launched(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hears of it would want Python's lock while the step is launched."""
    listener, request = Listener(), greedy("a", prompt(20), max_tokens=3)
    engine = make_engine(llama, listener)
    own, asked, answered = engine._runner.launch, threading.Event(), []

    def launch(plan, sinks):
        assert asked.wait(10)
        answered.append(adopted.done())
        return own(plan, sinks)

    monkeypatch.setattr(engine._runner, "launch", launch)
    with engine:
        engine.reserve("owner", request, 20).result(10)
        adopted = engine.adopt("owner", request, [FirstToken(5, False)])
        asked.set()
        adopted.result(10)
        assert answered[:1] == [False]
        listener.wait(request)
        finished = greedy("b", prompt(20), max_tokens=1)  # and where there is nothing to launch
        engine.reserve("owner", finished, 20).result(10)
        engine.adopt("owner", finished, [FirstToken(5, True)]).result(10)
        assert_idle(engine)


def test_a_dead_thread_has_no_heartbeat(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama, Listener())
    assert engine.heartbeat_age_s() == float("inf")
    engine.start()
    assert engine.heartbeat_age_s() < 5
    engine.stop()
    engine.stop()
    assert engine.heartbeat_age_s() == float("inf")


def test_layout_says_what_the_bytes_are(pair, llama: Path, tmp_path: Path) -> None:
    a, _, _, _ = pair
    layout, message = a.layout, a.layout.to_pb()
    assert a.slab.shape == (128, layout.block_bytes) and a.slab.dtype == torch.uint8
    assert layout.block_bytes == 4 * 2 * 2 * 16 * 16 * 4 == message.block_bytes
    assert layout.layer_offsets == tuple(range(0, layout.block_bytes + 1, 4096))
    assert message.fingerprint == layout.fingerprint and message.groups[0].num_layers == 4
    other = checkpoint(tmp_path, "llama", rope_parameters=dict(rope_theta=5e5, rope_type="default"))
    listener = Listener()
    larger = make_engine(llama, listener, served_model_name="m", block_size=32).layout
    prints = {
        make_engine(llama, listener, served_model_name="m").layout.fingerprint,
        larger.fingerprint,  # the same bytes, laid into blocks of another size
        make_engine(llama, listener, served_model_name="m", dtype="bfloat16").layout.fingerprint,
        make_engine(llama, listener, served_model_name="m", load_format="dummy").layout.fingerprint,
        make_engine(other, listener, served_model_name="m").layout.fingerprint,
    }
    assert len(prints) == 4 and larger.block_bytes == 2 * layout.block_bytes
    assert make_engine(llama, listener, num_blocks=None, kv_cache_gib=0.01).slab.shape[0] == int(0.01 * 2**30) // 16384
    assert make_engine(llama, listener, num_blocks=4).model_info.max_model_len == 64
