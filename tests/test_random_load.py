"""Random load on small pools, with clients that leave at random: no wrong token, nothing left behind."""

import asyncio
import random

import grpc
import pytest

from protos import inference_pb2 as pb
from tests.service import Service, request, service
from tests.transfer import needs_nixl

BIG = {"load_format": "dummy", "num_blocks": 256}
SMALL = {"load_format": "dummy", "num_blocks": 16, "max_model_len": 192}


def random_request(rng: random.Random) -> pb.GenerateRequest:
    """Prompts share prefixes; n, seeds, penalties, priorities, salts and bypasses in all combinations."""
    start = rng.choice((100, 100, 5000))
    ids = [*range(start, start + rng.randint(1, 60)), *(rng.randrange(40_000) for _ in range(rng.randint(0, 20)))]
    return request(
        ids,
        rng.randint(1, 40),
        seed=rng.randrange(2**63),
        temperature=rng.choice((0.0, 0.8, 1.5)),
        num_sequences=rng.choice((1, 1, 1, 2, 3)),
        ignore_eos=True,
        sampling=pb.SamplingParams(
            top_p=rng.choice((1.0, 0.9)), repetition_penalty=rng.choice((1.0, 1.2)), top_k=rng.choice((0, 50))
        ),
        cache=pb.CacheOptions(cache_salt=rng.choice(("", "a")), bypass_prefix_cache=rng.random() < 0.1),
        priority=rng.choice((0, 0, -1, 5)),
    )


async def answer(s: Service, asked: pb.GenerateRequest) -> list[list[int]]:
    return (await s.generate(asked)).token_ids


@pytest.mark.parametrize(
    "setup",
    [
        {},
        {"prefill": 2, "decode": 2},
        {"both": 1},
        pytest.param({"prefill": 2, "decode": 2, "transport": "nixl"}, marks=needs_nixl),
    ],
)
async def test_no_wrong_token_and_nothing_left(tiny, setup):
    rng = random.Random(len(setup))
    asked = [random_request(rng) for _ in range(40)]
    async with service(tiny, engine=BIG) as undisturbed:
        expected = await asyncio.gather(*(answer(undisturbed, one) for one in asked))
    async with service(tiny, engine=SMALL, **setup) as s:

        async def client(number: int) -> int:
            kept = 0
            own = random.Random(number)
            for index in range(number, len(asked), 12):
                if own.random() < 0.4:
                    call = s.stub.GenerateStream(asked[index], timeout=60.0)
                    leaving = asyncio.get_running_loop().call_later(own.random() * 0.3, call.cancel)
                    try:
                        async for _ in call:
                            pass
                    except (asyncio.CancelledError, grpc.aio.AioRpcError):
                        pass
                    leaving.cancel()
                    continue
                assert await answer(s, asked[index]) == expected[index], index
                kept += 1
            return kept

        kept = await asyncio.gather(*(client(number) for number in range(12)))
        assert sum(kept) > 10
