"""The whole service as users run it: Ray actors on two nodes of one machine, the real model, real gRPC."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import psutil
import pytest
import ray
from grpc_status import rpc_status

from cluster import launch
from cluster.config import DeploymentConfig
from cluster.launch import Deployment, parts
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.references import load
from tests.service import NOTHING_LEFT, Answer, collect, request
from tests.transfer import needs_nixl

BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * 4  # SmolLM2: layers, K and V, heads, tokens, dim, fp32


@contextmanager
def deployed(
    transport: str = "grpc", kv_return: bool = False, fence_timeout_s: float = 30.0, **pools: dict[str, Any]
) -> Iterator[Deployment]:
    """One prefill worker on one node, one decode worker on the other; afterwards no process of it is left."""
    small = {"num_blocks": 200, "max_num_batched_tokens": 64, "num_threads": 1}
    config = DeploymentConfig.model_validate(
        {
            "name": "test",
            "transport": transport,
            "kv_return": kv_return,
            "fence_timeout_s": fence_timeout_s,
            "router": {"port": 0, "retry_wait_s": 60},
            "pools": {
                name: {**small, "label_selector": {"pool": name}, **pools.get(name, {})}
                for name in ("prefill", "decode")
            },
        }
    )
    deployment = launch.up(config, print)
    pids: set[int] = set()
    try:
        yield deployment
        pids = {part["pid"] for part in parts(deployment.status()) if part["pid"]}
    finally:
        deployment.down()
    assert not {pid for pid in pids if psutil.pid_exists(pid)}


@asynccontextmanager
async def client(deployment: Deployment) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(deployment.status()["router"]["address"]) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def until(deployment: Deployment, holds: Callable[[dict], bool], within_s: float = 60.0) -> dict:
    deadline = time.monotonic() + within_s
    while not holds(status := await asyncio.to_thread(deployment.status)):
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.1)
    return status


def workers(status: dict) -> dict[str, dict]:
    return {worker["id"]: worker for pool in status["pools"].values() for worker in pool["workers"]}


def is_idle(status: dict) -> bool:
    """No worker holds anything for a request any more."""
    reports = [worker["report"] for worker in workers(status).values()]
    free = all(report["free_blocks"] == report["total_blocks"] for report in reports)
    return free and not any(report[name] for report in reports for name in NOTHING_LEFT)


async def greedy(stub: inference_pb2_grpc.InferenceServiceStub, row: dict, timeout: float = 120.0) -> Answer:
    return await collect(stub.GenerateStream(request(row["prompt"], 32), timeout=timeout))


@pytest.mark.parametrize("transport", ["grpc", "ray_store"])
async def test_greedy_tokens_are_those_of_transformers(two_nodes, transport):
    """Twenty prompts of 34 to 288 tokens at once, chunked and mixed, through two processes on two nodes."""
    rows = load()
    with deployed(transport) as deployment:
        there = workers(deployment.status())
        assert there["prefill-0"]["node"] != there["decode-0"]["node"]
        async with client(deployment) as stub:
            answers = await asyncio.gather(*(greedy(stub, row) for row in rows))
        for row, answer in zip(rows, answers, strict=True):
            assert answer.token_ids[0] == row["output"], row["question"]
            timings = answer.timings
            assert (timings.kv_transport, timings.prefill_worker, timings.decode_worker) == (
                transport,
                "prefill-0",
                "decode-0",
            )
            num_blocks = -(-len(row["prompt"]) // 16) - timings.decode_cached_tokens // 16
            assert timings.kv_transfer_bytes == num_blocks * BLOCK_BYTES
        status = await until(deployment, is_idle)
        moved = sum(answer.timings.kv_transfer_bytes for answer in answers)
        assert workers(status)["prefill-0"]["report"]["kv_bytes_sent"] == moved
        assert workers(status)["decode-0"]["report"]["kv_bytes_received"] == moved


@pytest.mark.parametrize("transport", ["ray_store", pytest.param("nixl", marks=needs_nixl)])
async def test_the_next_turn_computes_only_the_new_message(two_nodes, transport):
    """What the first turn left at the decode worker is in the prefill worker's cache, by the same way back."""
    prompt, message = load()[0]["prompt"], load()[1]["prompt"][-12:]
    with deployed(transport, kv_return=True) as deployment:
        async with client(deployment) as stub:
            first = await collect(stub.GenerateStream(request(prompt, 24, ignore_eos=True), timeout=120.0))
            await until(deployment, lambda s: workers(s)["decode-0"]["report"]["kv_returned_blocks"])
            again = [*prompt, *first.token_ids[0], *message]
            second = await collect(stub.GenerateStream(request(again, 24, ignore_eos=True), timeout=120.0))
            whole = request(again, 24, ignore_eos=True, cache=pb.CacheOptions(bypass_prefix_cache=True))
            computed = await collect(stub.GenerateStream(whole, timeout=120.0))
        own, held = len(prompt) // 16 * 16, (len(prompt) + 23) // 16 * 16
        assert second.timings.returned_tokens == held - own and second.timings.kv_transport == transport
        assert second.token_ids == computed.token_ids and not computed.timings.returned_tokens
        status = await until(deployment, is_idle)
        reports = {name: worker["report"] for name, worker in workers(status).items()}
        assert reports["decode-0"]["kv_returned_bytes"] == reports["prefill-0"]["kv_bytes_received"] > 0


async def test_pools_scale_under_load_without_a_failure(two_nodes):
    rows = load()[:8]
    with deployed() as deployment:
        done: list[Answer] = []
        stopping = asyncio.Event()

        async def keep_asking(stub: inference_pb2_grpc.InferenceServiceStub, first: int) -> None:
            number = first
            while not stopping.is_set():
                row = rows[number % len(rows)]
                answer = await greedy(stub, row)
                assert answer.token_ids[0] == row["output"], row["question"]
                done.append(answer)
                number += 1

        async with client(deployment) as stub, asyncio.TaskGroup() as tasks:
            for first in range(3):
                tasks.create_task(keep_asking(stub, first))
            try:
                await asyncio.to_thread(deployment.scale, {"decode": 2})
                await until(deployment, launch.is_settled)
                served = len(done)
                await asyncio.to_thread(deployment.scale, {"prefill": 2})
                await until(deployment, launch.is_settled)
                await until(deployment, lambda _: len({a.timings.decode_worker for a in done}) == 2)
                await asyncio.to_thread(deployment.scale, {"prefill": 1, "decode": 1})
                await until(deployment, launch.is_settled)
                assert len(done) > served
            finally:
                stopping.set()
        status = await until(deployment, is_idle)
        assert set(workers(status)) == {"prefill-0", "decode-0"}
        assert all(answer.timings.retries == 0 for answer in done)


async def test_prefill_worker_killed_mid_transfer(two_nodes):
    """A prompt of 1,152 tokens takes seconds in chunks of 64, and its KV leaves as it is computed."""
    prompt = load()[18]["prompt"] * 4
    asked = request(prompt, 16, ignore_eos=True, cache=pb.CacheOptions(bypass_prefix_cache=True))
    with deployed() as deployment:
        there = workers(deployment.status())
        async with client(deployment) as stub:
            unharmed = await collect(stub.GenerateStream(asked, timeout=60.0))
            async with watching(there["decode-0"]["address"]) as bytes_received:
                before = await bytes_received()
                asking = asyncio.create_task(collect(stub.GenerateStream(asked, timeout=120.0)))
                while await bytes_received() == before:
                    await asyncio.sleep(0.01)
            os.kill(there["prefill-0"]["pid"], signal.SIGKILL)
            reasons = {"PREFILL_WORKER_LOST", "KV_TRANSFER_FAILED", "NO_HEALTHY_WORKER"}
            await right_or_unavailable(asking, unharmed.token_ids[0], reasons)
            await back_and_serving(deployment, stub, "prefill-0", there["prefill-0"]["incarnation"])


@needs_nixl
async def test_prefill_worker_that_stops_in_the_middle_of_its_writes(two_nodes):
    """It hangs and holds the other's pages: the controller has it ended, and both are as they were."""
    prompt = load()[18]["prompt"] * 4
    asked = request(prompt, 16, ignore_eos=True, cache=pb.CacheOptions(bypass_prefix_cache=True))
    with deployed("nixl", fence_timeout_s=1.0) as deployment:
        there = workers(deployment.status())
        async with client(deployment) as stub:
            async with watching(there["decode-0"]["address"]) as bytes_received:
                call = stub.GenerateStream(asked, timeout=120.0)
                while not await bytes_received():
                    await asyncio.sleep(0.01)
            os.kill(there["prefill-0"]["pid"], signal.SIGSTOP)
            call.cancel()
            status = await until(deployment, lambda s: s["controller"]["writers_killed"])
            assert workers(status)["decode-0"]["report"]["tickets_quarantined"] == 1
            await back_and_serving(deployment, stub, "prefill-0", there["prefill-0"]["incarnation"])
        assert not psutil.pid_exists(there["prefill-0"]["pid"])


async def test_decode_worker_killed_mid_stream(two_nodes):
    row = load()[5]
    with deployed() as deployment:
        there = workers(deployment.status())
        async with client(deployment) as stub:
            call = stub.GenerateStream(request(row["prompt"], 32), timeout=120.0)
            heard = asyncio.Event()
            asking = asyncio.create_task(collect(listening(call, heard)))
            await heard.wait()
            os.kill(there["decode-0"]["pid"], signal.SIGKILL)
            await right_or_unavailable(asking, row["output"], {"DECODE_WORKER_LOST", "NO_HEALTHY_WORKER"})
            await back_and_serving(deployment, stub, "decode-0", there["decode-0"]["incarnation"])


async def listening(call: Any, heard: asyncio.Event) -> AsyncIterator[pb.GenerateStreamResponse]:
    """The stream as it is; `heard` is set in the middle of decoding."""
    async for message in call:
        if message.HasField("delta") and message.delta.token_offset >= 5:
            heard.set()
        yield message


@asynccontextmanager
async def watching(address: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """KV bytes that the worker has received, as of now."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)

        async def bytes_received() -> int:
            watch = stub.WatchLoad(worker_pb2.WatchLoadRequest(), timeout=10.0)
            received = (await watch.read()).kv_bytes_received
            watch.cancel()
            return received

        yield bytes_received


async def right_or_unavailable(asking: asyncio.Task[Answer], expected: list[int], reasons: set[str]) -> None:
    """Never hangs, never an OK with wrong tokens."""
    try:
        answer = await asyncio.wait_for(asking, 120.0)
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        details = rpc_status.from_call(error).details
        assert any(reason.encode() in detail.value for detail in details for reason in reasons), details
    else:
        assert answer.token_ids[0] == expected
        assert answer.timings.retries >= 1


async def back_and_serving(
    deployment: Deployment, stub: inference_pb2_grpc.InferenceServiceStub, worker_id: str, incarnation: str
) -> None:
    """The killed actor is replaced by another incarnation, everything of the dead one is given back, and it serves."""
    await until(deployment, lambda status: launch.is_settled(status) and workers(status)[worker_id]["restarts"] == 1)
    row = load()[0]
    assert (await greedy(stub, row)).token_ids[0] == row["output"]
    status = await until(deployment, is_idle)
    assert workers(status)[worker_id]["incarnation"] != incarnation


def test_ray_is_left_as_it_was(two_nodes):
    named = ray.util.list_named_actors(all_namespaces=True)
    assert not [actor for actor in named if actor["namespace"] == "pdserve-test"]
