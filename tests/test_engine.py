"""The engine as a whole: equal to transformers, to itself in other company, and to itself across a hand-off."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Failed, FinishReason, FirstToken, Request, SamplingParams
from tests.engines import Listener, assert_idle, checkpoint, greedy, make_engine, run
from tests.references import FILE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampled(name: str, ids: list[int], seed: int = 1, max_tokens: int = 20, **params) -> Request:
    return Request(
        name, tuple(ids), len(ids), SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, **params)
    )


# ---------------------------------------------------------------- equal to transformers


def test_greedy_equals_generate_on_the_real_model(smollm2: Path) -> None:
    """The references are generate's own, from tests/references.py; a service test computes some of them again."""
    entries = json.loads(FILE.read_text())[:8]
    requests = [greedy(str(i), entry["prompt"], 16) for i, entry in enumerate(entries)]
    found = run(smollm2, requests, max_num_batched_tokens=48)
    assert [found.outputs[str(i), 0] for i in range(8)] == [entry["output"][:16] for entry in entries]


# ---------------------------------------------------------------- equal to itself

KINDS = {
    "plain": dict(),
    "truncated": dict(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01),
    "penalised": dict(temperature=1.2, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
    "biased": dict(temperature=2.0, logit_bias={5: 4.0, 6: -50.0}, min_tokens=5, logprobs=3),
}


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


# ---------------------------------------------------------------- hand-off


class Handoff:
    """What the two workers do, in one process: A's sink reserves at B, copies bytes as they become ready, B adopts."""

    receiver = "b"

    def __init__(self, a: Engine, b: Engine, listener: Listener, request: Request):
        self.a, self.b, self.listener, self.request = a, b, listener, request
        self.owner = f"peer/{request.id}"
        self.reported: Counter[tuple[int, int]] = Counter()
        self.num_bytes = 0
        self.reservation = None
        self.calls = []

    def start(self) -> None:
        self.a.submit(self.request, self)

    def wanted(self) -> None:
        future = self.b.reserve(self.owner, self.request, len(self.request.token_ids))
        future.add_done_callback(self.granted)

    def granted(self, future) -> None:
        self.reservation = future.result()
        self.a.grant(self.request.id, self.reservation.num_cached_tokens // self.b.layout.block_size)

    def ready(self, block_ids, block_start, layer_start, layer_stop) -> None:
        self.calls.append((block_start, len(block_ids), layer_start, layer_stop))
        start, stop = (self.a.layout.layer_offsets[layer] for layer in (layer_start, layer_stop))
        for i, block_id in enumerate(block_ids, start=block_start):
            self.b.slab[self.reservation.block_ids[i], start:stop] = self.a.slab[block_id, start:stop]
            self.num_bytes += stop - start
            for layer in range(layer_start, layer_stop):
                self.reported[i, layer] += 1

    def finish(self, timeout: float = 60) -> dict:
        """Waits for the first tokens, adopts at B, frees at A."""
        name, n = self.request.id, self.request.sampling.num_sequences
        self.listener.until(lambda: all((name, i) in self.listener.outputs for i in range(n)), timeout)
        first = [FirstToken(self.listener.outputs[name, i][0], (name, i) in self.listener.finished) for i in range(n)]
        bs, num_layers = self.a.layout.block_size, self.a.layout.num_layers
        blocks = range(self.reservation.num_cached_tokens // bs, -(-len(self.request.token_ids) // bs))
        assert self.reported == Counter((b, layer) for b in blocks for layer in range(num_layers))
        assert self.num_bytes == len(blocks) * self.a.layout.block_bytes
        self.b.adopt(self.owner, self.request, first).result(10)
        self.a.release(name)
        return {(name, i): [t.token_id] for i, t in enumerate(first)}


@pytest.fixture(scope="module")
def pair(llama: Path):
    """Two engines that live as long as the module, each with its listener."""
    la, lb = Listener(), Listener()
    with make_engine(llama, la, max_num_batched_tokens=40) as a, make_engine(llama, lb) as b:
        assert a.layout.fingerprint == b.layout.fingerprint
        yield a, b, la, lb


def test_disaggregated_equals_colocated(llama: Path, pair) -> None:
    a, b, la, lb = pair
    requests = [
        sampled(kind, prompt(28 + 9 * i, i), seed=i, **params) for i, (kind, params) in enumerate(KINDS.items())
    ]
    requests += [sampled(f"n2-{n}", prompt(n, n), num_sequences=2) for n in (31, 32, 33)]
    requests += [greedy("long", prompt(150, 5), 25), greedy("one", prompt(9, 6), 1)]
    colocated = run(llama, requests)
    handoffs = [Handoff(a, b, la, request) for request in requests]
    for handoff in handoffs:
        handoff.start()
    first = {}
    for handoff in handoffs:
        first |= handoff.finish()
    going = {key for key in first if key not in la.finished}
    lb.until(lambda: going <= lb.finished)
    for key, tokens in first.items():
        assert tokens + lb.outputs.get(key, []) == colocated.outputs[key], key
    offsets = [t.offset for t in lb.tokens if t.request_id == "long"]
    assert offsets == list(range(1, 25))
    assert_idle(a)
    assert_idle(b)


def test_what_the_receiver_holds_is_not_sent_again(pair) -> None:
    a, b, la, lb = pair
    ids = prompt(70, 1033)
    sent = []
    for name in ("turn1", "turn2"):
        request = greedy(name, ids, 12)
        handoff = Handoff(a, b, la, request)
        handoff.start()
        handoff.finish()
        lb.wait(request)
        sent.append(handoff.num_bytes // a.layout.block_bytes)
        ids = [*ids, *la.outputs[name, 0], *lb.outputs[name, 0], *prompt(7, 34)]
    assert sent == [5, 1]  # 70 tokens; then 89, of which 81 are held: five whole blocks
    a.submit(greedy("kept", ids[:70], 1), Silent(a))
    la.until(lambda: ("kept", 0) in la.finished)
    assert la.started["kept"] == 64
    a.release("kept")
    assert_idle(a)
    assert_idle(b)


class Silent:
    """A sink that grants itself and sends nothing."""

    receiver = "nobody"

    def __init__(self, engine: Engine, fail_at: str = ""):
        self.engine, self.fail_at = engine, fail_at
        self.asked = threading.Event()

    def wanted(self) -> None:
        self.asked.set()
        if self.fail_at == "wanted":
            raise OSError("no receiver")
        if self.fail_at != "grant":
            for name in list(self.engine._sinks):
                self.engine.grant(name, 0)

    def ready(self, block_ids, block_start, layer_start, layer_stop) -> None:
        if self.fail_at == "ready":
            raise OSError("broken pipe")


@pytest.mark.parametrize("where", ["wanted", "ready"])
def test_a_failing_sink_fails_its_request_alone(pair, where: str) -> None:
    a, _, la, _ = pair
    bad, good = greedy(f"bad-{where}", prompt(30, 1), 4), greedy(f"good-{where}", prompt(30, 2), 4)
    a.submit(bad, Silent(a, where))
    a.submit(good)
    la.wait(good)
    la.until(lambda: bad.id in la.failed)
    assert la.failed[bad.id].reason == "INTERNAL" and (bad.id, 0) not in la.outputs
    assert_idle(a)


def test_layers_are_reported_as_they_are_computed(llama: Path, pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.runner

    a, b, la, lb = pair
    monkeypatch.setattr(engine.runner, "REPORT_BYTES", 1)
    handoff = Handoff(a, b, la, request := greedy("layers", prompt(75, 77), 3))
    handoff.start()
    handoff.finish()
    lb.wait(request)
    layers = a.layout.num_layers
    chunks = [(0, 2), (2, 3)]  # 40 tokens fill two blocks; the other 35 end the prompt in block 4
    assert handoff.calls == [(s, n, i, i + 1) for s, n in chunks for i in range(layers)]


def test_reservations_are_released_cancelled_and_gone(pair) -> None:
    _, b, _, _ = pair
    request = greedy("r", prompt(40), 4)
    reservation = b.reserve("x", request, 40).result(10)
    assert len(reservation.block_ids) == 3 and b.stats().reserved_blocks == 3
    b.release("x")
    b.release("x")
    with pytest.raises(KeyError):
        b.adopt("x", request, [FirstToken(1, False)]).result(10)
    assert_idle(b)
    assert len(b.reserve("hog", greedy("hog", prompt(5), 4), 500).result(10).block_ids) == 32
    hogs = [b.reserve(f"hog{i}", greedy(f"hog{i}", prompt(5), 4), 500) for i in range(5)]
    assert all(future.result(10) for future in hogs[:3])  # the pool holds four
    b.release("hog4")
    with pytest.raises(CancelledError):
        hogs[4].result(10)
    assert hogs[3].cancel()  # whoever asked has gone away
    for owner in ("hog", "hog0", "hog1", "hog2"):
        b.release(owner)
    deadline = time.monotonic() + 10
    while b.stats().num_requests and time.monotonic() < deadline:
        b.check().result(10)
    assert_idle(b)
    with pytest.raises(ValueError, match="num_tokens"):
        b.reserve("y", request, 4000)


# ---------------------------------------------------------------- aborts and faults


def test_abort_in_every_phase(llama: Path) -> None:
    listener = Listener()
    with make_engine(llama, listener, num_blocks=24, max_num_batched_tokens=16, max_model_len=380) as engine:
        other = greedy("other", prompt(20), 150)
        engine.submit(other)
        # waiting for seats and blocks, in mid-prompt, decoding, forked
        for name, request in {
            "queued": greedy("queued", prompt(300), 50),
            "prompt": greedy("prompt", prompt(200), 50),
            "decode": greedy("decode", prompt(8), 300),
            "forks": sampled("forks", prompt(9), max_tokens=100, num_sequences=3),
        }.items():
            engine.submit(request)
            if name == "prompt":
                listener.until(lambda: "prompt" in listener.started)
            elif name != "queued":
                listener.until(lambda key=(name, 0): len(listener.outputs.get(key, ())) > 3)
            engine.abort(name)
            engine.abort(name)
            engine.check().result(10)
            seen = len(listener.tokens)
            engine.check().result(10)
            assert not [t for t in listener.tokens[seen:] if t.request_id == name]
        # a sink prompt: not yet granted, granted, pinned
        for name, kind in (("asked", "grant"), ("pinned", "")):
            sink = Silent(engine, kind)
            engine.submit(greedy(name, prompt(40), 4), sink)
            assert sink.asked.wait(10)
            if name == "pinned":
                listener.until(lambda: ("pinned", 0) in listener.outputs)
            engine.abort(name)
        # reservations: held and queued
        engine.reserve("held", greedy("held", prompt(20), 4), 20).result(10)
        waiting = engine.reserve("waits", greedy("waits", prompt(300), 4), 330)
        engine.abort("held")
        engine.abort("waits")
        engine.check().result(10)
        assert waiting.cancelled()
        engine.abort("never heard of")
        listener.wait(other)
        assert_idle(engine)
    assert not listener.failed


def test_nan_in_one_request_stays_there(llama: Path, tmp_path: Path) -> None:
    """A token whose embedding is NaN poisons its own KV and logits; nobody else may notice, then or later."""
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    clean = [greedy(str(i), [t for t in prompt(37, i) if t != 77], 30) for i in range(4)]
    clean = [replace(r, sampling=replace(r.sampling, logit_bias={77: -100.0})) for r in clean]
    expected = run(llama, clean).outputs
    listener = Listener()
    with make_engine(tmp_path, listener, num_blocks=14, max_num_batched_tokens=16) as engine:
        for i, request in enumerate(clean):
            engine.submit(request)
            engine.submit(greedy(f"bad{i}", [*prompt(20, i + 9), 77, *prompt(12, i)], 5))
        listener.wait(*clean)
        listener.until(lambda: len(listener.failed) == 4)
        assert {f.reason for f in listener.failed.values()} == {"NON_FINITE_LOGITS"}
        for request in clean:  # on blocks that held NaN a moment ago
            engine.submit(again := replace(request, id=f"again{request.id}"))
            listener.wait(again)
        assert_idle(engine)
    for request in clean:
        assert listener.outputs[request.id, 0] == listener.outputs[f"again{request.id}", 0] == expected[request.id, 0]


def test_a_lost_step_fails_its_requests_and_the_engine_goes_on(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    with make_engine(llama, listener) as engine:
        model = engine._runner.model
        own, bombs = type(model).logits, [True]

        def logits(self, batch):
            if bombs and any(row.sequence.request.id == "victim" for row in batch.rows):
                bombs.pop()
                raise RuntimeError("out of luck")
            return own(self, batch)

        monkeypatch.setattr(type(model), "logits", logits)
        engine.submit(greedy("victim", prompt(30), 4))
        listener.until(lambda: "victim" in listener.failed)
        assert listener.failed["victim"] == Failed("victim", "INTERNAL", "the step failed: RuntimeError: out of luck")
        engine.submit(after := greedy("victim", prompt(30), 4))
        listener.failed.clear()
        listener.wait(after)
        assert_idle(engine)


def test_bad_input_is_refused_at_once(pair) -> None:
    a, _, la, _ = pair
    with pytest.raises(ValueError, match="token_ids: 0 tokens"):
        a.submit(Request("e", (), 0, SamplingParams()))
    with pytest.raises(ValueError, match="131"):
        a.submit(greedy("e", [131]))
    with pytest.raises(ValueError, match="512 tokens is not in"):
        a.submit(greedy("e", [5] * 512))
    a.submit(twice := greedy("twice", prompt(9), 30))
    with pytest.raises(ValueError, match="twice"):
        a.submit(twice)
    la.wait(twice)
    assert_idle(a)
    with pytest.raises(ValueError, match="block_size: 20"):
        EngineConfig("x", block_size=20)
    with pytest.raises(ValueError, match="dtype: 'int8'"):
        EngineConfig("x", dtype="int8")


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
    prints = {
        make_engine(llama, listener, served_model_name="m").layout.fingerprint,
        make_engine(llama, listener, served_model_name="m", block_size=32).layout.fingerprint,
        make_engine(llama, listener, served_model_name="m", dtype="bfloat16").layout.fingerprint,
        make_engine(llama, listener, served_model_name="m", load_format="dummy").layout.fingerprint,
        make_engine(other, listener, served_model_name="m").layout.fingerprint,
    }
    assert len(prints) == 5
    assert make_engine(llama, listener, num_blocks=None, kv_cache_gib=0.01).slab.shape[0] == int(0.01 * 2**30) // 16384
    assert make_engine(llama, listener, num_blocks=4).model_info.max_model_len == 64
