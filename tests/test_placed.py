"""One-sided transfers, with a writer on the CPU in place of a GPU's: it copies pages into the receiver's pool."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio
import pytest

import kv_transfer
from kv_transfer.base import BlockMemory
from kv_transfer.create import push_handler
from kv_transfer.grpc_announcer import GrpcAnnouncer
from kv_transfer.guards import Guards, open_guards
from kv_transfer.placed import PlacedOutgoing, Threads
from kv_transfer.receiver import Receiver
from tests.one_sided import CpuWriter
from tests.transfer import LAYER_OFFSETS, NUM_LAYERS, SOURCE, Passing, make_memory


@dataclass
class OneSided:
    source: BlockMemory
    target: BlockMemory
    receiver: Receiver
    writer: CpuWriter
    threads: Threads
    channel: grpc.aio.Channel

    def grant(self, block_ids) -> bytes:
        return self.receiver.grant("owner", SOURCE, block_ids, 0, 30.0, "writer")

    def open(self, transfer_id: bytes) -> PlacedOutgoing:
        wire = GrpcAnnouncer(self.channel, transfer_id, SOURCE, 5.0)
        placement = self.receiver.placement(transfer_id)
        assert placement is not None
        return PlacedOutgoing(self.source, self.writer, wire, transfer_id, placement, self.threads, 5.0)

    def is_equal(self, source_ids, target_ids) -> bool:
        end = LAYER_OFFSETS[-1]
        return self.source.slab[list(source_ids), :end].equal(self.target.slab[list(target_ids), :end])


@asynccontextmanager
async def one_sided() -> AsyncIterator[OneSided]:
    source, target, guards = make_memory(32, seed=1), make_memory(32), Guards()
    receiver = Receiver(target, kv_transfer.MAX_CHUNK_BYTES, progress_s=5.0, guards=guards)
    server = grpc.aio.server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.add_generic_rpc_handlers((push_handler(receiver),))
    await server.start()
    threads, writer = Threads("test"), CpuWriter(source, target, open_guards(guards.name))
    writer.gate.set()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield OneSided(source, target, receiver, writer, threads, channel)
            receiver.check()
    finally:
        threads.close()
        await server.stop(None)


async def test_pages_are_placed_checked_and_committed():
    async with one_sided() as pair:
        source_ids, target_ids = [7, 3, 30, 0, 12], [1, 31, 2, 17, 4]
        transfer_id = pair.grant(target_ids)
        outgoing = pair.open(transfer_id)
        for start, stop in ((0, 3), (3, 5)):
            for layer in range(NUM_LAYERS):
                outgoing.push(source_ids[start:stop], start, layer, layer + 1)
                await asyncio.sleep(0.001 * (layer % 2))
        manifest = await outgoing.finish()
        await pair.receiver.commit(transfer_id, manifest)
        assert pair.is_equal(source_ids, target_ids)
        assert manifest.num_bytes == 5 * LAYER_OFFSETS[-1] == pair.receiver.bytes_received
        assert manifest.num_chunks == pair.writer.num_writes <= 2 * NUM_LAYERS


async def test_a_push_is_written_once_its_pages_are_final():
    async with one_sided() as pair:
        transfer_id, after = pair.grant([5]), Passing()
        outgoing = pair.open(transfer_id)
        outgoing.push([9], 0, 0, NUM_LAYERS, after)
        committing = asyncio.create_task(outgoing.finish())
        await asyncio.sleep(0.05)
        assert not pair.writer.begun.is_set() and not committing.done()
        pair.source.slab[9] = 77
        after.passed.set()
        await pair.receiver.commit(transfer_id, await committing)
        assert (pair.target.slab[5, : LAYER_OFFSETS[-1]] == 77).all()


async def test_a_byte_that_changed_on_the_way_is_never_committed():
    async with one_sided() as pair:
        pair.writer.flip = True
        transfer_id = pair.grant([5, 6])
        outgoing = pair.open(transfer_id)
        outgoing.push([9, 8], 0, 0, NUM_LAYERS)
        with pytest.raises(kv_transfer.TransferCorrupt, match="checksum"):
            await outgoing.finish()
        assert pair.receiver.release(transfer_id) and transfer_id in pair.receiver.quarantine
        assert pair.receiver.quarantine.fence(transfer_id) == "owner"


async def test_a_write_that_fails_fails_the_transfer():
    async with one_sided() as pair:
        pair.writer.fails = True
        transfer_id = pair.grant([5])
        outgoing = pair.open(transfer_id)
        outgoing.push([9], 0, 0, 1)
        pair.writer.fails = False
        outgoing.push([9], 0, 1, NUM_LAYERS)
        with pytest.raises(kv_transfer.TransferBroken, match="the write failed: RuntimeError: an unspecified"):
            await outgoing.finish()
        assert pair.writer.num_writes == 1  # nothing is written behind it
        assert pair.receiver.release(transfer_id)


async def test_closed_means_that_nothing_is_in_flight():
    async with one_sided() as pair:
        pair.writer.gate.clear()
        transfer_id = pair.grant([5, 6])
        outgoing = pair.open(transfer_id)
        outgoing.push([9], 0, 0, NUM_LAYERS)
        outgoing.push([8], 1, 0, NUM_LAYERS)
        await asyncio.to_thread(pair.writer.begun.wait, 5)
        outgoing.abort("given up")
        closed = asyncio.create_task(outgoing.wait_closed())
        await asyncio.sleep(0.05)
        assert not closed.done()
        pair.writer.gate.set()
        await closed
        num_writes = pair.writer.num_writes  # one, if the second had not been launched
        outgoing.push([7], 0, 0, NUM_LAYERS)
        assert pair.writer.num_writes == num_writes <= 2
        assert pair.receiver.release(transfer_id)


async def test_a_writer_delayed_past_release_writes_nowhere():
    async with one_sided() as pair:
        pair.writer.gate.clear()
        transfer_id = pair.grant([5, 6])
        outgoing = pair.open(transfer_id)
        outgoing.push([9, 8], 0, 0, NUM_LAYERS)
        await asyncio.to_thread(pair.writer.begun.wait, 5)
        assert pair.receiver.release(transfer_id) and transfer_id in pair.receiver.quarantine
        pair.writer.gate.set()
        with pytest.raises(kv_transfer.TransferError):
            await outgoing.finish()
        assert not pair.target.slab.any()
        assert pair.receiver.quarantine.fence(transfer_id) == "owner"  # what the sender says once it is closed
