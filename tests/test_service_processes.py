"""The whole service with each worker in a process of its own: the same tokens, over what one process would not need."""

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.service import NOTHING_LEFT, collect, request, service
from tests.worker_process import WorkerProcess, serving

SIZES = {"num_blocks": 128, "block_size": 16, "max_num_batched_tokens": 64, "dtype": "float32", "num_threads": 1}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NIXL = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")), reason="needs NIXL"
)


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
    async with serving(checkpoint, *workers) as stub:
        answers = await asyncio.gather(*(collect(stub.GenerateStream(one, timeout=60)) for one in asked))
        assert [answer.token_ids for answer in answers] == expected
        assert {answer.timings.kv_transport for answer in answers} == {transport}
        assert all(answer.timings.kv_transfer_bytes and not answer.timings.retries for answer in answers)
        for worker in workers:
            await worker.status_where(lambda status: not any(status[name] for name in NOTHING_LEFT), 10.0)
            await worker.ask("check")
