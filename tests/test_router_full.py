"""Full decode workers: a run goes where pages are, else waits for them until its deadline, and loses no attempt."""

import asyncio
from pathlib import Path

import grpc

from tests.router_front import Front, routed
from tests.test_router import ask, expected, failure, ids_of, read
from tests.test_router_faults import prefers


async def told(front: Front, free: dict[str, int]) -> None:
    clients = front.router.pool.workers
    await front.until(lambda: all(clients[name].load.free_blocks == blocks for name, blocks in free.items()))


async def test_a_run_goes_where_pages_are_free(smollm2: Path) -> None:
    async with routed(smollm2, decode=2) as front:
        session = await prefers(front, "d0")
        front.cluster.workers["d0"].faults.full = True
        await told(front, {"d0": 0})
        messages = await read(front.client.GenerateStream(ask(session_id=session), timeout=5))
        assert (messages[-1].timings.decode_worker, messages[-1].timings.retries) == ("d1", 0)


async def test_without_a_grant_another_decode_worker_is_tried(smollm2: Path) -> None:
    async with routed(smollm2, decode=2, grant_wait_s=0.2, max_attempts=1) as front:
        session = await prefers(front, "d0")
        faults = front.cluster.workers["d0"].faults
        faults.full, faults.tells_load = True, False
        messages = await read(front.client.GenerateStream(ask(session_id=session), timeout=5))
        assert ids_of(messages) == expected(8)
        assert (messages[-1].timings.decode_worker, messages[-1].timings.retries) == ("d1", 1)
        assert front.cluster.workers["d0"].events("expect", "cancel") == ["expect", "cancel"]
        faults.full = False  # what was full once is not avoided for good
        messages = await read(front.client.GenerateStream(ask(session_id=session), timeout=5))
        assert messages[-1].timings.decode_worker == "d0"


async def test_where_all_are_full_a_run_waits_and_loses_no_attempt(smollm2: Path) -> None:
    async with routed(smollm2, decode=2, grant_wait_s=0.05, max_attempts=1) as front:
        for name in ("d0", "d1"):
            front.cluster.workers[name].faults.full = True
        await told(front, {"d0": 0, "d1": 0})
        reading = asyncio.create_task(read(front.client.GenerateStream(ask(priority=3), timeout=10)))
        prefill = front.cluster.workers["p0"]
        await front.until(lambda: len(prefill.requests) == 4)
        assert {r.priority for r in prefill.requests} == {3}
        assert [r.attempt for r in prefill.requests] == [0, 1, 2, 3]
        for name in ("d0", "d1"):
            front.cluster.workers[name].faults.full = False
        assert ids_of(await reading) == expected(8)


async def test_waiting_for_pages_is_no_busy_loop_and_ends_at_the_deadline(smollm2: Path) -> None:
    async with routed(smollm2, decode=2, grant_wait_s=0.05) as front:
        for name in ("d0", "d1"):
            front.cluster.workers[name].faults.full = True
        code, words = await failure(front.client.Generate(ask(), timeout=2.0))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED and "eadline" in words
        assert 3 <= len(front.cluster.workers["p0"].requests) <= 6


async def test_the_only_decode_worker_keeps_the_run_in_its_queue(smollm2: Path) -> None:
    async with routed(smollm2, grant_wait_s=0.05) as front:
        front.cluster.workers["d0"].faults.full = True
        reading = asyncio.create_task(read(front.client.GenerateStream(ask(), timeout=10)))
        prefill = front.cluster.workers["p0"]
        await front.until(lambda: len(prefill.requests) == 1)
        await asyncio.sleep(0.3)
        front.cluster.workers["d0"].faults.full = False
        assert (await reading)[-1].timings.retries == 0 and len(prefill.requests) == 1


async def test_silence_before_the_prompt_begins_blames_both_workers(smollm2: Path) -> None:
    async with routed(smollm2, decode=2, progress_s=0.3, grant_wait_s=60) as front:
        session = await prefers(front, "d0")
        faults = front.cluster.workers["d0"].faults
        faults.full, faults.tells_load = True, False
        messages = await read(front.client.GenerateStream(ask(session_id=session), timeout=10))
        assert (messages[-1].timings.decode_worker, messages[-1].timings.retries) == ("d1", 1)


async def test_what_can_never_fit_is_refused_before_prefill(smollm2: Path) -> None:
    async with routed(smollm2, decode=0, wait=False) as front:
        await front.cluster.add("d0", "decode", num_blocks=8)
        front.router.set_members(front.cluster.members())
        await front.until(lambda: front.router.pool.num_ready() == (1, 1))
        code, words = await failure(front.client.Generate(ask(200), timeout=5))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "KV blocks; worker 'd0' has 8" in words
        assert front.cluster.workers["p0"].requests == []
        assert (await front.client.Generate(ask(100), timeout=5)).usage.completion_tokens == 100
