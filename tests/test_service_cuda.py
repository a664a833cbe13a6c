"""The whole service with its engines on a GPU: the same tokens as on the CPU, in fp32, over each transport."""

import asyncio

import pytest
import torch

from tests.service import request, service

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"num_blocks": 128, "block_size": 16, "max_num_batched_tokens": 64, "dtype": "float32"}


def asked() -> list:
    greedy = [request(list(range(20 * i, 20 * i + 30 + 11 * i)), 24, ignore_eos=True) for i in range(8)]
    sampled = [
        request(list(range(7 * i, 7 * i + 50)), 12, seed=i, temperature=0.9, num_sequences=1 + i % 3, ignore_eos=True)
        for i in range(4)
    ]
    return greedy + sampled


@pytest.mark.parametrize("transport", ["local", "grpc"])
async def test_tokens_are_those_of_the_cpu(checkpoint, transport):
    async def answers(device: str, **setup) -> tuple[list, int]:
        async with service(checkpoint, engine={**SIZES, "device": device}, transport=transport, **setup) as s:
            found = await asyncio.gather(*(s.generate(one) for one in asked()))
            canary = await s.workers[0].canary(s.workers[-1].me.worker_id, 4)
            assert canary["ok"], canary["error"]
            return [answer.token_ids for answer in found], sum(a.timings.kv_transfer_bytes for a in found)

    expected, _ = await answers("cpu")
    assert all(len(set(sequence)) > 3 for answer in expected for sequence in answer), "a model that answers the same"
    found, num_bytes = await answers("cuda")
    assert found == expected
    assert num_bytes > 0


async def test_a_cancelled_request_leaves_nothing_on_the_gpu(checkpoint):
    async with service(checkpoint, engine={**SIZES, "device": "cuda"}) as s:
        call = s.stub.GenerateStream(request(list(range(400)), 1000, ignore_eos=True))
        await call.read()
        call.cancel()
        await s.settle(5.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
async def test_an_engine_works_on_the_gpu_it_was_given(checkpoint):
    async with service(checkpoint, engine={**SIZES, "device": "cuda:0"}, transport="grpc") as s:
        expected = [(await s.generate(one)).token_ids for one in asked()[:3]]
    placed = {"device": "cuda:1"}
    async with service(checkpoint, engine={**SIZES, "device": "cuda:0"}, decode_engine=placed, transport="grpc") as s:
        assert [(await s.generate(one)).token_ids for one in asked()[:3]] == expected
