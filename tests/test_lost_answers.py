"""Calls between workers that fail before they arrive, or whose answers are lost, at random: no wrong token, and every
page, ticket and reservation comes back."""

import asyncio
import random

import grpc
import pytest

from decode_worker import fencing, kv_service
from kv_transfer import peers
from prefill_worker import offers
from protos.kv_transfer_pb2_grpc import KvTransferServiceStub as Stub
from tests.service import request, service
from tests.transfer import needs_nixl

BIG = {"load_format": "dummy", "num_blocks": 256}
SMALL = {"load_format": "dummy", "num_blocks": 24, "max_model_len": 192}


class Lossy:
    """A KvTransferService stub of which one call in six goes wrong, one way or the other."""

    rng = random.Random(0)
    num_lost = 0

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = Stub(channel)

    def __getattr__(self, name: str):
        call = getattr(self._stub, name)
        if name == "Handshake":
            return call

        async def lossy(*args, **kwargs):
            fate = Lossy.rng.randrange(12)
            if fate:
                answer = await call(*args, **kwargs)
            if fate < 2:
                Lossy.num_lost += 1
                raise grpc.aio.AioRpcError(
                    grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details="lost"
                )
            return answer

        return lossy


@pytest.mark.parametrize("transport", ["grpc", pytest.param("nixl", marks=needs_nixl)])
async def test_no_wrong_token_and_nothing_left(tiny, transport: str, monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(1)
    asked = [
        request([*range(start, start + rng.randint(20, 90))], rng.randint(2, 40), seed=start, ignore_eos=True)
        for start in (100 * (i % 20) for i in range(60))
    ]
    async with service(tiny, engine=BIG) as undisturbed:
        expected = [(await undisturbed.generate(one)).token_ids for one in asked]
    for module in (kv_service, offers):
        monkeypatch.setattr(module, "LEASE_S", 1.0)
    monkeypatch.setattr(fencing, "ASK_AFTER_S", 0.2)
    monkeypatch.setattr(peers, "RELEASE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(peers.kv_grpc, "KvTransferServiceStub", Lossy)
    Lossy.num_lost, seats, num_right = 0, asyncio.Semaphore(8), 0
    async with service(tiny, 2, 2, transport=transport, engine=SMALL, kv_return=True) as s:

        async def ask(index: int) -> None:
            nonlocal num_right
            async with seats:
                try:
                    answer = await s.generate(asked[index])
                except grpc.aio.AioRpcError as error:
                    assert error.code() == grpc.StatusCode.UNAVAILABLE, error
                else:
                    assert answer.token_ids == expected[index]
                    num_right += 1

        async with asyncio.TaskGroup() as tasks:
            for index in range(len(asked)):
                tasks.create_task(ask(index))
        await s.settle(30.0)
    assert Lossy.num_lost > 10 and num_right > 40, (Lossy.num_lost, num_right)
