"""What a sender or a receiver killed in the middle does to a transfer, over each transport between processes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

import kv_transfer
from kv_transfer.base import Endpoint, Manifest, Placement
from tests.transfer import CUDA_IPC, LAYER_OFFSETS, NUM_LAYERS, Pair, needs_nixl, transfer_pair
from tests.transfer_peer import Nursery, nursery, where

NUM_BLOCKS = 4  # and as many chunks


@pytest.fixture(scope="module")
def peers() -> Iterator[Nursery]:
    with nursery() as peers:
        yield peers


@pytest.fixture(params=["grpc", "ray_store", pytest.param("nixl", marks=needs_nixl), CUDA_IPC])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ray_address(transport: str, request: pytest.FixtureRequest) -> str:
    """Where a child finds the object store; empty if it needs none."""
    if transport != "ray_store":
        return ""
    request.getfixturevalue("ray_stores")
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture
async def pair(transport: str, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    stores = request.getfixturevalue("ray_stores") if transport == "ray_store" else (None, None)
    async with transfer_pair(transport, stores[0], receiver_store=stores[1]) as pair:
        yield pair


@pytest.mark.parametrize("num_chunks", range(NUM_BLOCKS + 1))
async def test_sender_killed_after_every_chunk(
    pair: Pair, peers: Nursery, transport: str, ray_address: str, num_chunks: int
):
    transfer_id = pair.grant(range(NUM_BLOCKS))
    way = (pair.address, pair.endpoint.data.hex(), transfer_id.hex(), where(pair, transfer_id))
    with peers.child("send", transport, ray_address, *way, num_chunks) as (pid, _):
        await pair.received(num_chunks * LAYER_OFFSETS[-1])
        os.kill(pid, signal.SIGKILL)
        if num_chunks:
            with pytest.raises(kv_transfer.TransferBroken, match=r"without END|sender is gone"):
                await asyncio.wait_for(pair.receiver.commit(transfer_id, Manifest(99, 99, b"")), 3)
    assert pair.receiver.release(transfer_id)
    if pair.is_one_sided:  # its end is the word that it does not have for us any more
        assert pair.receiver.quarantine.fence_gone(lambda source, process: True) == ["owner"]
    pair.receiver.check()
    again = pair.grant(range(NUM_BLOCKS))  # another sender, the same pages
    outgoing = pair.open(again)
    outgoing.push(range(NUM_BLOCKS), 0, 0, NUM_LAYERS)
    await pair.receiver.commit(again, await outgoing.finish())
    assert pair.is_equal(range(NUM_BLOCKS), range(NUM_BLOCKS))
    assert pair.receiver.num_active == 0


async def test_receiver_killed(pair: Pair, peers: Nursery, transport: str, ray_address: str):
    with peers.child("receive", transport, ray_address) as (pid, (address, data, ticket, placement)):
        link = await pair.connect(address, Endpoint(transport, data=bytes.fromhex(data)))
        outgoing = link.open(bytes.fromhex(ticket), None, Placement(*placement) if placement else None)
        outgoing.push(range(8), 0, 0, 1)
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(outgoing.wait_closed(), 3)  # noticed though nothing more is pushed
        outgoing.push(range(8), 0, 1, 2)
        with pytest.raises(kv_transfer.TransferBroken):
            await outgoing.finish()


async def test_receiver_stopped(pair: Pair, peers: Nursery, transport: str, ray_address: str):
    """A host that hangs closes no connection: the keepalive pings notice."""
    if transport != "grpc":
        pytest.skip("a stream is a stream, whatever its chunks hold")
    with peers.child("receive", transport, ray_address) as (pid, (address, data, ticket, placement)):
        link = await pair.connect(address, Endpoint(transport, data=bytes.fromhex(data)))
        outgoing = link.open(bytes.fromhex(ticket), None, Placement(*placement) if placement else None)
        outgoing.push(range(8), 0, 0, 1)
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGSTOP)
        await asyncio.wait_for(outgoing.wait_closed(), 8)
        with pytest.raises(kv_transfer.TransferBroken):
            await outgoing.finish()
