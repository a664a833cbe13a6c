"""The whole service with each worker in a process of its own: the same tokens, over what one process would not need."""

import asyncio
import importlib.util
from pathlib import Path

import grpc.aio
import pytest
import torch

from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.server import Router
from tests.service import NOTHING_LEFT, collect, request, service
from tests.worker_process import WorkerProcess

SIZES = {"num_blocks": 128, "block_size": 16, "max_num_batched_tokens": 64, "dtype": "float32", "num_threads": 1}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NIXL = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")), reason="needs NIXL"
)


async def nothing_left(worker: WorkerProcess) -> None:
    async with asyncio.timeout(10):
        status = await worker.ask("status")
        while any(status[name] for name in NOTHING_LEFT):
            await asyncio.sleep(0.05)
            status = await worker.ask("status")


@pytest.mark.parametrize(
    ("transport", "sizes"),
    [
        pytest.param("grpc", (16, 16)),
        pytest.param("nixl", (16, 16), marks=NIXL),
        pytest.param("cuda_ipc", (16, 16), marks=GPU),
        pytest.param("cuda_ipc", (16, 64), marks=GPU),
        pytest.param("cuda_ipc", (64, 16), marks=GPU),
    ],
)
async def test_the_same_tokens_as_in_one_process(checkpoint: Path, transport: str, sizes: tuple[int, int]):
    asked = [request(list(range(20 * i, 20 * i + 30 + 37 * i)), 24, ignore_eos=True) for i in range(6)]
    async with service(checkpoint, engine={**SIZES, "device": "cpu"}, transport="local") as s:
        expected = [(await s.generate(one)).token_ids for one in asked]
    assert all(len(set(sequence)) > 3 for answer in expected for sequence in answer), "a model that answers the same"

    last = torch.cuda.device_count() - 1
    devices = ("cuda:0", f"cuda:{last}") if transport == "cuda_ipc" else ("cpu", "cpu")
    starting = [
        WorkerProcess.start(role, str(checkpoint), "auto" if transport == "cuda_ipc" else transport, engine)
        for role, engine in (
            ("prefill", {**SIZES, "device": devices[0], "block_size": sizes[0]}),
            ("decode", {**SIZES, "device": devices[1], "block_size": sizes[1]}),
        )
    ]
    workers = await asyncio.gather(*starting)
    members = [worker.member for worker in workers]
    router = Router(RouterConfig(served_model_name="test-model"), checkpoint)
    try:
        address = await router.start()
        router.set_members(members)
        for worker in workers:
            worker.tell(members)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            answers = await asyncio.gather(*(collect(stub.GenerateStream(one, timeout=60)) for one in asked))
        assert [answer.token_ids for answer in answers] == expected
        assert {answer.timings.kv_transport for answer in answers} == {transport}
        assert all(answer.timings.kv_transfer_bytes and not answer.timings.retries for answer in answers)
        for worker in workers:
            await nothing_left(worker)
            await worker.ask("check")
    finally:
        await router.stop()
        for worker in workers:
            await worker.stop()
