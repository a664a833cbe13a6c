"""Random chats of three turns on pools far too small for them, with what turns leave going back to the prefill workers:
no wrong token, nothing left behind, whoever leaves or dies meanwhile."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass

import grpc
import pytest

from cluster.worker import Worker
from protos import inference_pb2 as pb
from tests.service import Service, request, service
from tests.transfer import needs_nixl

NUM_CHATS = 80
CONCURRENCY = 16
BIG = {"load_format": "dummy", "num_blocks": 512}
SMALL = {"load_format": "dummy", "num_blocks": 16, "max_model_len": 176}
COUNTERS = (
    "kv_returned_blocks",
    "kv_returns_refused",
    "kv_returns_dropped",
    "prompt_tokens_returned",
    "preemptions",
)


@dataclass(frozen=True)
class Turn:
    asked: pb.GenerateRequest
    answer: list[int]


def first_prompt(rng: random.Random) -> list[int]:
    start = rng.choice((100, 100, 5000))
    return [*range(start, start + rng.randint(1, 40)), *(rng.randrange(40_000) for _ in range(rng.randint(0, 10)))]


async def recorded(s: Service, number: int) -> list[Turn]:
    """A chat as an undisturbed service answers it."""
    rng = random.Random(number)
    ids, turns = first_prompt(rng), []
    fields = dict(
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(2**63),
        ignore_eos=True,
        cache=pb.CacheOptions(cache_salt=rng.choice(("", "", "a")), bypass_prefix_cache=rng.random() < 0.05),
        priority=rng.choice((0, 0, 5)),
    )
    for _ in range(3):
        asked = request(ids, rng.randint(1, 30), **fields)
        answer = (await s.generate(asked)).token_ids[0]
        turns.append(Turn(asked, answer))
        ids = [*ids, *answer, *(rng.randrange(40_000) for _ in range(rng.randint(1, 6)))]
    return turns


async def leave(s: Service, asked: pb.GenerateRequest, after_s: float) -> None:
    call = s.stub.GenerateStream(asked, timeout=60.0)
    leaving = asyncio.get_running_loop().call_later(after_s, call.cancel)
    try:
        async for _ in call:
            pass
    except (asyncio.CancelledError, grpc.aio.AioRpcError):
        pass
    leaving.cancel()


async def held(s: Service, number: int, turns: list[Turn]) -> tuple[int, int]:
    """The same chat among others. Returns how many turns were answered, and how many were lost with their workers."""
    rng = random.Random(-number)
    answered = lost = 0
    for turn in turns:
        if rng.random() < 0.2:
            await leave(s, turn.asked, rng.random() * 0.2)
        try:
            answer = (await s.generate(turn.asked)).token_ids[0]
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            lost += 1
        else:
            assert answer == turn.answer, (number, turn.asked)
            answered += 1
    return answered, lost


async def all_at_once(calls: list) -> list:
    seats = asyncio.Semaphore(CONCURRENCY)

    async def seated(call):
        async with seats:
            return await call

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(seated(call)) for call in calls]
    return [task.result() for task in running]


async def through_small_pools(
    tiny, transport: str, chats: list[list[Turn]], decode_blocks: int, kills: bool
) -> tuple[int, dict[str, int]]:
    """Turns lost with their workers, and the workers' counters."""
    decode = {"num_blocks": decode_blocks}
    small = service(tiny, 2, 2, transport=transport, engine=SMALL, decode_engine=decode, kv_return=True)
    async with small as s:
        totals: Counter[str] = Counter()

        async def kill_some() -> None:
            """Each worker dies once and comes back as another incarnation."""
            for worker in list(s.workers) if kills else ():
                await asyncio.sleep(1.0)
                totals.update(counters(worker))
                await s.kill(worker)

        killing = asyncio.create_task(kill_some())
        outcomes = await all_at_once([held(s, number, turns) for number, turns in enumerate(chats)])
        await killing
        await s.settle(30.0)
        for worker in s.workers:
            totals.update(counters(worker))
        answered, lost = map(sum, zip(*outcomes, strict=True))
        assert answered + lost == sum(map(len, chats))
        return lost, totals


def counters(worker: Worker) -> dict[str, int]:
    return {name: value for name, value in worker.status().items() if name in COUNTERS}


@pytest.mark.parametrize("transport", ["grpc", pytest.param("nixl", marks=needs_nixl)])
async def test_many_chats(tiny, transport: str):
    async with service(tiny, engine=BIG) as undisturbed:
        chats = await all_at_once([recorded(undisturbed, number) for number in range(NUM_CHATS)])
    lost, totals = await through_small_pools(tiny, transport, chats, 80, kills=False)
    assert lost == 0
    assert totals["kv_returned_blocks"] and totals["prompt_tokens_returned"] and totals["kv_returns_refused"], totals
    # So few blocks that runs are preempted leave none to lend: most returns are dropped.
    lost, totals = await through_small_pools(tiny, transport, chats, 16, kills=True)
    assert lost <= CONCURRENCY, "a run that lost its worker is tried again"
    assert totals["preemptions"] and totals["kv_returned_blocks"] and totals["kv_returns_dropped"], totals
