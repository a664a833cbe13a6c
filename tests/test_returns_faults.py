"""What a return leaves behind when either side is killed in the middle of it: nothing. Over each transport that two
processes can have, with a `held` decode worker, which has pushed what it returns and does not commit it."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch

from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.server import Router
from tests.service import NOTHING_LEFT, Answer, collect, request, service
from tests.test_service_processes import GPU
from tests.transfer import ONE_SIDED, needs_nixl
from tests.worker_process import WorkerProcess

BLOCK = 16
SIZES = {"num_blocks": 64, "block_size": BLOCK, "dtype": "float32", "num_threads": 1}
PROMPT, NUM_OUTPUT = list(range(40)), 60
OWN, HELD = 40 // BLOCK * BLOCK, (40 + NUM_OUTPUT - 1) // BLOCK * BLOCK  # tokens in whole blocks


@pytest.fixture(params=["grpc", pytest.param("nixl", marks=needs_nixl), pytest.param("cuda_ipc", marks=GPU)])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Chats:
    """A router over workers in processes of their own, of which some may be killed and others come."""

    model: Path
    transport: str
    router: Router
    stub: inference_pb2_grpc.InferenceServiceStub
    workers: dict[str, WorkerProcess]
    started: list[WorkerProcess]

    async def start(self, role: str, **options: Any) -> None:
        """In the place of the last one of its role."""
        on_gpu = self.transport == "cuda_ipc"
        number = 0 if role == "prefill" else torch.cuda.device_count() - 1
        engine = {**SIZES, "device": f"cuda:{number}" if on_gpu else "cpu"}
        worker = await WorkerProcess.start(
            role, str(self.model), "auto" if on_gpu else self.transport, engine, kv_return=True, **options
        )
        self.started.append(worker)
        self.workers[role] = worker

    def tell(self) -> None:
        members = [worker.member for worker in self.workers.values()]
        self.router.set_members(members)
        for worker in self.workers.values():
            worker.tell(members)

    async def turn(self, prompt: list[int]) -> Answer:
        answer = await collect(self.stub.GenerateStream(request(prompt, NUM_OUTPUT, ignore_eos=True), timeout=60))
        assert answer.timings.kv_transport == self.transport
        return answer

    async def status_where(self, role: str, holds: Callable[[dict], Any], within_s: float = 20.0) -> dict:
        return await self.workers[role].status_where(holds, within_s)

    async def nothing_left(self, role: str) -> dict:
        def holds(status: dict) -> bool:
            free = status["free_blocks"] == status["total_blocks"]
            return free and not any(status[name] for name in NOTHING_LEFT) and not status["silent_writers"]

        status = await self.status_where(role, holds)
        await self.workers[role].ask("check")
        return status


@asynccontextmanager
async def chats(model: Path, transport: str, **decode: Any) -> AsyncIterator[Chats]:
    router = Router(RouterConfig(served_model_name="test-model"), model)
    started: list[WorkerProcess] = []
    try:
        address = await router.start()
        async with grpc.aio.insecure_channel(address) as channel:
            built = Chats(model, transport, router, inference_pb2_grpc.InferenceServiceStub(channel), {}, started)
            await asyncio.gather(built.start("prefill"), built.start("decode", **decode))
            built.tell()
            yield built
    finally:
        await router.stop()
        for worker in started:
            await worker.stop()


@pytest.fixture(scope="module")
async def expected(checkpoint: Path) -> list[list[int]]:
    """The tokens of two turns of a chat, of one process without a return."""
    async with service(checkpoint, engine={**SIZES, "device": "cpu"}, transport="local") as s:
        first = (await s.generate(request(PROMPT, NUM_OUTPUT, ignore_eos=True))).token_ids[0]
        second = (await s.generate(request([*PROMPT, *first, 7], NUM_OUTPUT, ignore_eos=True))).token_ids[0]
    assert len(set(first)) > 3
    return [first, second]


@pytest.mark.parametrize("transport", [pytest.param("cuda_ipc", marks=GPU)])
async def test_nobody_is_killed(checkpoint: Path, transport: str, expected: list[list[int]]):
    """What test_returns.py shows in one process, over a transport that needs two."""
    async with chats(checkpoint, transport) as s:
        assert (await s.turn(PROMPT)).token_ids[0] == expected[0]
        returned = (await s.nothing_left("decode"))["kv_returned_bytes"]
        second = await s.turn([*PROMPT, *expected[0], 7])
        assert second.token_ids[0] == expected[1]
        assert second.prompt_info.num_cached_tokens == HELD and second.timings.returned_tokens == HELD - OWN
        await s.status_where("prefill", lambda status: status["kv_bytes_received"] > returned > 0)
        assert not (await s.nothing_left("prefill"))["tickets_quarantined"]


async def test_either_side_is_killed(checkpoint: Path, transport: str, expected: list[list[int]]):
    """What was sent lies in the prefill worker's pages and never becomes cache; all pages come back, on either side."""
    again = [*PROMPT, *expected[0], 7]
    async with chats(checkpoint, transport, is_held=True) as s:
        assert (await s.turn(PROMPT)).token_ids[0] == expected[0]
        await s.status_where("prefill", lambda status: status["kv_bytes_received"])
        s.workers["decode"].signal(signal.SIGKILL)
        left = await s.nothing_left("prefill")
        assert left["tickets_quarantined"] == (transport in ONE_SIDED)
        await s.start("decode", is_held=True)
        s.tell()
        second = await s.turn(again)
        assert second.token_ids[0] == expected[1]
        assert second.prompt_info.num_cached_tokens == OWN and not second.timings.returned_tokens

        await s.status_where("prefill", lambda status: status["kv_bytes_received"] > left["kv_bytes_received"])
        s.workers["prefill"].signal(signal.SIGKILL)
        left = await s.nothing_left("decode")
        assert (left["kv_returned_bytes"], left["kv_returns_dropped"]) == (0, 1)
        await s.start("prefill")
        s.tell()
        third = await s.turn(again)
        assert third.token_ids[0] == expected[1] and not third.prompt_info.num_cached_tokens
