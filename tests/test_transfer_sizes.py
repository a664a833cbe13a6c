"""What depends on sizes: blocks of another size at either end, and the memory that a long prompt takes on its way."""

import random
from pathlib import Path

import pytest

import kv_transfer
from kv_transfer.base import BlockMemory
from kv_transfer.receiver import Receiver
from kv_transfer.relayout import Tiles, whole_blocks
from tests.transfer import ONE_SIDED, TRANSPORTS, devices, make_memory, make_tiled, tokens, transfer_pair


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("source_size", "target_size"), [(16, 64), (64, 16), (16, 16), (48, 32)])
async def test_blocks_of_another_size_are_laid_anew(
    transport: str, source_size: int, target_size: int, request: pytest.FixtureRequest
):
    """Prompts of whole and broken blocks on either side, with and without a prefix that is there already."""
    if transport in ONE_SIDED - {"cuda_ipc"}:
        pytest.skip("copies cannot lay blocks anew: between such pools auto takes grpc (choose.EQUAL_BLOCKS)")
    stores = request.getfixturevalue("ray_stores") if transport == "ray_store" else (None, None)
    sizes = zip((source_size, target_size), (1, 2), devices(transport), strict=True)
    source, target = (make_tiled(40, size, seed, device) for size, seed, device in sizes)
    rng = random.Random(0)
    async with transfer_pair(transport, stores[0], source, target, 20000, receiver_store=stores[1]) as pair:
        for num_tokens, num_cached in ((1, 0), (200, 0), (192, 96), (201, 192), (130, 64), (192, 192)):
            num_cached = whole_blocks(num_cached, source_size, target_size)
            source_ids, target_ids = (
                rng.sample(range(40), -(-num_tokens // size)) for size in (source_size, target_size)
            )
            expected, before = tokens(source, source_ids)[:num_tokens], target.slab.cpu().clone()
            kept = tokens(target, target_ids)[:num_cached]
            transfer_id = pair.grant(target_ids, num_cached // target_size, sent=(source_size, num_tokens))
            outgoing, first = pair.open(transfer_id), num_cached // source_size
            middle = (first + len(source_ids)) // 2
            for start, stop in ((first, middle), (middle, len(source_ids))):
                for layer in range(source.num_layers if stop > start else 0):
                    outgoing.push(source_ids[start:stop], start, layer, layer + 1)
            await pair.receiver.commit(transfer_id, await outgoing.finish())
            arrived = tokens(target, target_ids)[:num_tokens]
            assert arrived[num_cached:].equal(expected[num_cached:]) and arrived[:num_cached].equal(kept)
            others = [block for block in range(40) if block not in target_ids[num_cached // target_size :]]
            assert target.slab.cpu()[others].equal(before[others])
            pair.receiver.check()


@pytest.mark.parametrize("missing", [0, 1, 4])
async def test_coverage_is_counted_in_the_senders_blocks(transport: str, missing: int):
    """70 tokens are five blocks of 16 and two of 64: without one of the five nothing is committed."""
    if transport == "ray_store" or transport in ONE_SIDED - {"cuda_ipc"}:
        pytest.skip("the receiver counts alike, whatever brought the bytes")
    sizes = zip((16, 64), (1, None), devices(transport), strict=True)
    source, target = (make_tiled(8, size, seed, device) for size, seed, device in sizes)
    async with transfer_pair(transport, None, source, target) as pair:
        transfer_id = pair.grant([3, 5], sent=(16, 70))
        outgoing = pair.open(transfer_id)
        for block in range(5):
            if block != missing:
                outgoing.push([block], block, 0, source.num_layers)
        with pytest.raises(kv_transfer.TransferCorrupt, match="4 of 20"):
            await pair.receiver.commit(transfer_id, await outgoing.finish())
        assert pair.receiver.release(transfer_id)
        over = pair.grant([3, 5], sent=(16, 70))
        outgoing = pair.open(over)
        outgoing.push([0], 5, 0, source.num_layers)  # would fit into the last page
        with pytest.raises(kv_transfer.TransferBroken, match=r"must lie in \[0, 5\)|is pushed"):
            await outgoing.finish()
        assert pair.receiver.release(over)


async def test_memory_of_a_transfer_is_bounded(
    transport: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    """Of 64 MiB queued at once, only what packing, stream and socket buffer hold is read and not placed."""
    if transport in ONE_SIDED:
        pytest.skip("nothing is staged")
    stores = request.getfixturevalue("ray_stores") if transport == "ray_store" else (None, None)
    offsets, chunk_bytes = (0, 1 << 17, 1 << 19), 1 << 19
    num_read, most = 0, 0
    read, place = BlockMemory.read, Receiver.chunk

    def counted_read(memory, *args):
        nonlocal num_read
        num_read += 1
        return read(memory, *args)

    def counted_place(receiver, transfer_id, header, arrays):
        nonlocal most
        most = max(most, num_read - header.sequence)
        place(receiver, transfer_id, header, arrays)

    monkeypatch.setattr(BlockMemory, "read", counted_read)
    monkeypatch.setattr(Receiver, "chunk", counted_place)
    memories = make_memory(128, 1, offsets), make_memory(128, None, offsets)
    async with transfer_pair(transport, stores[0], *memories, chunk_bytes, receiver_store=stores[1]) as pair:
        transfer_id = pair.grant(range(128))
        outgoing = pair.open(transfer_id)
        outgoing.push(range(128), 0, 0, 2)
        await pair.receiver.commit(transfer_id, await outgoing.finish())
        assert num_read == 128 and most * chunk_bytes <= 20 << 20
        assert pair.is_equal(range(128), range(128))


@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (64, 16)])
async def test_extra_memory_does_not_grow_with_the_prompt(
    transport: str, sizes: tuple[int, int], request: pytest.FixtureRequest
):
    """192 MiB go through this process, which is sender and receiver: its peak resident size rises by a part of that."""
    if transport in ONE_SIDED - {"cuda_ipc"} and sizes != (16, 16):
        pytest.skip("copies cannot lay blocks anew")
    stores = (None, None)
    if transport == "ray_store":
        request.getfixturevalue("ray_stores")
        from cluster.object_store import RayObjectStore

        stores = RayObjectStore(), RayObjectStore()
    source, target = (
        of_128_kib(1536, size, seed, device)
        for size, seed, device in zip(sizes, (1, None), devices(transport), strict=True)
    )
    pages, taken = range(source.num_blocks), range(target.num_blocks)
    async with transfer_pair(transport, stores[0], source, target, receiver_store=stores[1]) as pair:
        transfer_id = pair.grant(taken, sent=(sizes[0], 1536))
        outgoing = pair.open(transfer_id)
        before = reset_peak()
        outgoing.push(pages, 0, 0, source.num_layers)
        await pair.receiver.commit(transfer_id, await outgoing.finish())
        extra = resident_bytes("VmHWM") - before
        assert tokens(source, pages).equal(tokens(target, taken))
    assert extra <= 64 << 20, f"{extra >> 20} MiB for 192"


def of_128_kib(num_tokens: int, block_size: int, seed: int | None, device: str) -> BlockMemory:
    """A pool of so many tokens of that size, as Llama-3.1-8B's are, in 8 layers."""
    layer = block_size * (16 << 10)
    plain = make_memory(num_tokens // block_size, seed, tuple(range(0, 8 * layer + 1, layer)))
    slab = plain.slab[:, : plain.layer_offsets[-1]].contiguous().to(device)
    return BlockMemory(slab, plain.layer_offsets, block_size, ((Tiles(64, 256),),) * 8)


def reset_peak() -> int:
    """The resident size now, from which the peak (VmHWM) counts again."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10
