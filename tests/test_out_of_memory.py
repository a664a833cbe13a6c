"""A step that finds no memory is computed in smaller ones: same tokens, same KV told once, nobody else the worse."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
import torch

import engine.runner
from cluster.worker import Role
from engine.request import Request, SamplingParams
from engine.sequence import Row, RowResult
from engine.sequence import Sequence as Seq
from engine.shrink import OutOfMemory, compute_in_parts, is_out_of_memory
from tests.engines import KINDS, Listener, assert_idle, checkpoint, greedy, make_engine, prompt, run, sampled
from tests.handoff import Handoff
from tests.scarcity import make_scarce
from tests.service import request, service

PATHS = {"reference": dict(), "paged": dict(paged=True, block_size=16)}


# ---------------------------------------------------------------- the arithmetic


def rows_of(sizes: Sequence[tuple[int, int, bool]]) -> list[Row]:
    """(first token, number of tokens, whether they end the prompt) each; sinks, with all blocks of 16 they complete."""
    rows = []
    for start, count, ends in sizes:
        request = Request(str(len(rows)), (5,) * (start + count + (0 if ends else 9)), 1, SamplingParams())
        row = Row(Seq(request, 0, list(request.token_ids), 0), start, count)
        stop = -(-row.stop // 16) if ends else row.stop // 16
        row.report = (start // 16, stop) if stop > start // 16 else None
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_every_token_and_block_once_in_order(seed: int) -> None:
    rng = random.Random(seed)
    rows = rows_of([(rng.randrange(90), rng.choice([1, 1, 7, 40, 200]), rng.random() < 0.6) for _ in range(6)])
    room = rng.choice([1, 3, 16, 50])
    seen: dict[str, list[int]] = {row.sequence.request.id: [] for row in rows}
    blocks: dict[str, list[int]] = {row.sequence.request.id: [] for row in rows}

    def compute(parts: list[Row]) -> list[RowResult]:
        if sum(part.num_tokens for part in parts) > room:
            raise OutOfMemory(set())
        assert len({part.sequence.request.id for part in parts}) == len(parts), "two parts of one row in one step"
        for part in parts:
            seen[part.sequence.request.id] += range(part.start, part.stop)
            blocks[part.sequence.request.id] += range(*part.report or (0, 0))
            assert not part.report or part.samples or part.report[1] * 16 <= part.stop, "a block told of too early"
        return [RowResult(tokens=[(7, None)] if part.samples else []) for part in parts]

    results = compute_in_parts(rows, set(), 16, compute)
    for row, result in zip(rows, results, strict=True):
        name = row.sequence.request.id
        assert seen[name] == list(range(row.start, row.stop))
        assert blocks[name] == list(range(*row.report or (0, 0)))
        assert bool(result.tokens) == row.samples and result.error is None


def test_what_finds_no_memory_alone_fails_alone() -> None:
    rows = rows_of([(30, 1, True), (40, 1, True), (0, 60, True), (0, 33, True)])
    done = []

    def compute(parts: list[Row]) -> list[RowResult]:
        if any(part.sequence is rows[1].sequence for part in parts):
            raise OutOfMemory(set())
        done.extend(parts)
        return [RowResult(tokens=[(7, None)] if part.samples else []) for part in parts]

    results = compute_in_parts(rows, {id(rows[3])}, 16, compute)
    assert [result.error and result.error[0] for result in results] == [None, "OUT_OF_MEMORY", None, "OUT_OF_MEMORY"]
    assert not [part for part in done if part.sequence is rows[3].sequence], "announced KV was computed again"
    assert "max_num_batched_tokens" in results[1].error[1] and "had left" in results[3].error[1]


def test_the_hosts_allocator_counts_too() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert is_out_of_memory(raised.value) and not is_out_of_memory(RuntimeError("shapes differ"))


# ---------------------------------------------------------------- the engine

WIDTH = 600  # of the MLP: no other tensor has that many columns


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("wide"), "llama", intermediate_size=WIDTH)


def crowd() -> list[Request]:
    requests = [sampled(kind, prompt(30 + 9 * i, i), seed=i, **p) for i, (kind, p) in enumerate(KINDS.items())]
    requests += [greedy(f"g{i}", prompt(n, i), 25) for i, n in enumerate((90, 3, 61, 16))]
    return [*requests, sampled("n", prompt(33, 9), num_sequences=3)]


def refuses_large(op: int, shape: torch.Size) -> bool:
    """Room for the MLP of 20 tokens, in steps of up to 64."""
    return len(shape) > 1 and shape[-1] == WIDTH and shape.numel() > 20 * WIDTH


@pytest.mark.parametrize("path", PATHS)
def test_large_steps_are_cut_and_nobody_notices(wide: Path, path: str) -> None:
    requests = crowd()
    expected = run(wide, requests).outputs
    listener = Listener()
    with make_engine(wide, listener, **PATHS[path]) as engine:
        scarcity = make_scarce(engine, refuses_large)
        for request in requests:
            engine.submit(request)
        listener.wait(*requests)
        assert scarcity.num_refused > 3
        assert_idle(engine)
    assert listener.outputs == expected


@pytest.mark.parametrize("path", PATHS)
def test_one_refusal_anywhere_changes_no_token(llama: Path, path: str) -> None:
    requests = crowd()
    expected = run(llama, requests).outputs
    rng = random.Random(3)
    for _ in range(6):
        listener, left = Listener(), iter(range(rng.randrange(2000), -2, -1))
        with make_engine(llama, listener, **PATHS[path]) as engine:
            scarcity = make_scarce(engine, lambda op, shape, left=left: next(left, -2) == 0)
            for request in requests:
                engine.submit(request)
            listener.wait(*requests)
            assert scarcity.num_refused == 1
            assert_idle(engine)
        assert listener.outputs == expected


@pytest.mark.parametrize("path", PATHS)
def test_a_sink_hears_of_each_block_and_layer_once(wide: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Handoff.finish` counts; what was refused in the first layer had not been told to anyone."""
    monkeypatch.setattr(engine.runner, "REPORT_BYTES", 1)
    requests = [sampled(f"s{n}", prompt(n, n), num_sequences=2) for n in (31, 64, 150)]
    expected = run(wide, requests).outputs
    la, lb = Listener(), Listener()
    with make_engine(wide, la, **PATHS[path]) as a, make_engine(wide, lb) as b:
        scarcity = make_scarce(a, refuses_large)
        handoffs = [Handoff(a, b, la, request) for request in requests]
        for handoff in handoffs:
            handoff.start()
        for handoff, request in zip(handoffs, requests, strict=True):
            first = handoff.finish()
            lb.wait(request)
            for key, tokens in first.items():
                assert tokens + lb.outputs[key] == expected[key]
        assert scarcity.num_refused
        assert_idle(a)
        assert_idle(b)


@pytest.mark.parametrize("path", PATHS)
def test_announced_kv_is_never_written_again(llama: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out after two layers were told to a sink: that request fails, those beside it do not."""
    monkeypatch.setattr(engine.runner, "REPORT_BYTES", 1)
    request, others = greedy("sink", prompt(40, 1), 9), [greedy(f"o{i}", prompt(9 + i, i), 30) for i in range(3)]
    expected = run(llama, others).outputs
    la, lb = Listener(), Listener()
    with make_engine(llama, la, **PATHS[path]) as a, make_engine(llama, lb) as b:
        handoff = Handoff(a, b, la, request)
        told = []

        def refuses(op: int, shape: torch.Size) -> bool:
            if len(handoff.calls) < 2 or told:
                return False
            told.append(len(handoff.calls))
            return True

        scarcity = make_scarce(a, refuses)
        for other in others:
            a.submit(other)
        handoff.start()
        la.until(lambda: "sink" in la.failed)
        la.wait(*others)
        assert la.failed["sink"].reason == "OUT_OF_MEMORY" and la.failed["sink"].retryable
        assert [call[2:] for call in handoff.calls] == [(0, 1), (1, 2)] and scarcity.num_refused == 1
        b.release(handoff.owner)
        assert_idle(a)
        assert_idle(b)
    assert la.outputs == expected


def test_no_memory_at_all_fails_requests_not_the_engine(llama: Path) -> None:
    listener, starved = Listener(), [True]
    with make_engine(llama, listener) as engine:
        make_scarce(engine, lambda op, shape: bool(starved))
        requests = crowd()
        for request in requests:
            engine.submit(request)
        listener.until(lambda: len(listener.failed) == len(requests))
        assert {failed.reason for failed in listener.failed.values()} == {"OUT_OF_MEMORY"}
        assert_idle(engine)
        starved.clear()
        listener.failed.clear()
        for request in requests:
            engine.submit(request)
        listener.wait(*requests)
        assert_idle(engine)
    assert listener.outputs == run(llama, requests).outputs


# ---------------------------------------------------------------- the service


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_another_worker_takes_what_one_has_no_memory_for(tiny: Path, role: Role) -> None:
    asked = [request([*range(i, i + 40)], 12, ignore_eos=True) for i in range(5, 45, 10)]
    settings = dict(engine=dict(load_format="dummy"), prefill=2, decode=2)
    async with service(tiny, **settings) as it:
        expected = [(await it.generate(one)).token_ids for one in asked]
    async with service(tiny, **settings) as it:
        starved = it.worker(role).engine
        assert starved is not None
        scarcity = make_scarce(starved, lambda op, shape: True)
        answers = await asyncio.gather(*map(it.generate, asked))
        assert [answer.token_ids for answer in answers] == expected
        assert scarcity.num_refused


async def test_no_worker_with_memory_is_said_so(tiny: Path) -> None:
    async with service(tiny, engine=dict(load_format="dummy")) as it:
        one = it.worker("prefill").engine
        assert one is not None
        make_scarce(one, lambda op, shape: True)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await it.generate(request([*range(5, 45)], 12))
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "ran out of memory" in str(raised.value.details())
        await it.settle()
