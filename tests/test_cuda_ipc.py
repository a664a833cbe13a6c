"""The real thing: pages of one process's GPU pool pushed into another process's. One GPU is enough, two are used."""

import asyncio
import ctypes
import hashlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

import kv_transfer
from benchmarks.cuda_peer import SOURCE, Peer, make_memory
from kv_transfer.base import BlockMemory, Endpoint, Link, Placement, TransferBroken
from kv_transfer.create import create_sender
from kv_transfer.rect import Rect
from kv_transfer.rounding import RoundedMemory

SHAPE = (64, 64, 8, 4, 128)  # block size, blocks, layers, heads, dim
LAYERS = SHAPE[2]


def test_a_pool_handle_survives_the_wire():
    from kv_transfer.cuda_ipc import PoolHandle

    socket = "pdserve-" + "0" * 32
    handle = PoolHandle("ab" * 64, 4096, 10, 1 << 20, 64, "GPU-1", "/proc/1/fd/3", "boot/pid:1:2", socket)
    assert PoolHandle.decode(handle.encode()) == handle
    for broken in (
        b"",
        b"[]",
        b"{}",
        handle.encode().replace(b"4096", b"-1"),
        handle.encode().replace(b"ab", b"a", 1),
        handle.encode().replace(b"/proc/1/fd/3", b"/etc/passwd"),
    ):
        with pytest.raises(TransferBroken, match="pool handle cannot be read"):
            PoolHandle.decode(broken)


def test_a_pool_on_the_cpu_has_no_cuda_ipc():
    from kv_transfer.create import _missing

    memory = make_memory("cpu", 16, 2, 1, 1, 16)
    assert _missing("cuda_ipc", memory, None) == "the pool is not in GPU memory"


def test_runs_of_blocks_by_the_copy_engine(monkeypatch: pytest.MonkeyPatch):
    from kv_transfer import cuda_copy, cuda_driver

    moved: list[str] = []

    def copy(targets, sources, num_bytes: int, stream) -> None:
        moved.append(f"{len(targets)} blocks")
        for there, here in zip(targets.tolist(), sources.tolist(), strict=True):
            ctypes.memmove(there, here, num_bytes)

    def copy_one(there: int, here: int, num_bytes: int, stream) -> None:
        moved.append("a block")
        ctypes.memmove(there, here, num_bytes)

    monkeypatch.setattr(cuda_copy, "_copy", copy)
    monkeypatch.setattr(cuda_driver, "copy_on_device", copy_one)
    source, target = make_memory("cpu", 16, 6, 4, 2, 16, seed=1), make_memory("cpu", 16, 8, 4, 2, 16)
    run = source.layer_offsets[1], source.layer_offsets[3]
    sides = ((source, [4, 0, 5]), (target, [1, 7, 2]))
    places = ((memory.slab.data_ptr(), memory.slab.shape[1], ids) for memory, ids in sides)
    cuda_copy.copy_blocks(*places, run, None, lambda: moved.append("begun"))  # type: ignore[arg-type]
    assert moved == ["a block", "begun", "2 blocks"]
    assert torch.equal(target.slab[[1, 7, 2], slice(*run)], source.slab[[4, 0, 5], slice(*run)])
    assert target.slab.count_nonzero() == source.slab[[4, 0, 5], slice(*run)].count_nonzero()


@asynccontextmanager
async def pushing(
    kept: tuple[int, int] = (2, 2), block_size: int = SHAPE[0]
) -> AsyncIterator[tuple[BlockMemory, Peer, Link]]:
    """`kept`: bytes of an element here and there, 1: float8; `block_size`: there."""
    torch.cuda.set_device(0)
    source = make_memory("cuda:0", *SHAPE, kept[0], seed=1)
    if kept[0] != kept[1]:
        source.slab.view(torch.bfloat16).normal_()
        source = RoundedMemory.of(source)
    peer = await Peer.start(f"cuda:{torch.cuda.device_count() - 1}", block_size, *SHAPE[1:], kept[1])
    sender = create_sender("cuda_ipc", source, SOURCE, progress_s=10.0)
    try:
        endpoint = next(e for e in peer.endpoints if e.transport == "cuda_ipc")
        yield source, peer, await sender.connect(peer.address, endpoint)
    finally:
        await sender.close()
        await peer.stop()


def hashes(memory: BlockMemory, block_ids) -> list[str]:
    return [hashlib.sha256(page.cpu().numpy().tobytes()).hexdigest() for page in memory.slab[list(block_ids)]]


def event() -> torch.cuda.Event:
    found = torch.cuda.Event(blocking=True)
    found.record()
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    async def test_pages_arrive_as_they_are_computed(self):
        busy = torch.randn(8192, 8192, device="cuda:0")
        async with pushing() as (source, peer, link):
            for seed in range(3):
                torch.manual_seed(seed)
                mine, theirs = torch.randperm(64)[:24].tolist(), torch.randperm(64)[:24].tolist()
                transfer_id, placement = await peer.grant(theirs, "cuda_ipc")
                outgoing = link.open(transfer_id, placement=placement)
                for start, stop in ((0, 10), (10, 24)):
                    for layer in range(LAYERS):
                        busy = busy @ busy * 1e-4
                        source.slab[
                            mine[start:stop], source.layer_offsets[layer] : source.layer_offsets[layer + 1]
                        ] += 1
                        outgoing.push(mine[start:stop], start, layer, layer + 1, event())
                await peer.commit(transfer_id, await outgoing.finish())
                assert await peer.ask("pages", block_ids=theirs) == hashes(source, mine)
            assert await peer.ask("check") == 0

    @pytest.mark.parametrize(
        "kept, block_size", [((2, 2), 16), ((2, 2), 128), ((1, 1), 64), ((2, 1), 64), ((2, 1), 16)], ids=str
    )
    async def test_pools_of_other_blocks_and_dtypes(self, kept: tuple[int, int], block_size: int):
        """Against the same laid anew, and rounded, on the host. The last block is partly filled."""
        async with pushing(kept, block_size) as (source, peer, link):
            num_tokens = 11 * 64 + 20
            mine = torch.randperm(64)[:12].tolist()
            theirs = torch.randperm(64)[: -(-num_tokens // block_size)].tolist()
            transfer_id, placement = await peer.grant(theirs, "cuda_ipc", sent=(64, num_tokens))
            outgoing = link.open(transfer_id, placement=placement)
            for start, stop in ((0, 5), (5, 12)):
                for layer in range(0, LAYERS, 2):
                    outgoing.push(mine[start:stop], start, layer, layer + 2)
            await peer.commit(transfer_id, await outgoing.finish())
            wanted = make_memory("cpu", block_size, *SHAPE[1:], kept[1])
            wanted.write_anew(theirs, 0, 64, 0, LAYERS, source.read(mine, 0, LAYERS))
            assert await peer.ask("pages", block_ids=theirs) == hashes(wanted, theirs)

    async def test_long_runs_go_by_the_copy_engine(self, monkeypatch: pytest.MonkeyPatch):
        from kv_transfer import cuda_copy

        monkeypatch.setattr(cuda_copy, "MIN_RUN_BYTES", 1)
        copies, copy = [], cuda_copy.copy_blocks
        monkeypatch.setattr(cuda_copy, "copy_blocks", lambda *args: (copies.append(args[2]), copy(*args)))
        async with pushing() as (source, peer, link):
            if link._pool._beside is None:  # type: ignore[attr-defined]
                pytest.skip("the driver has no batches of copies")
            mine, theirs = torch.randperm(64)[:24].tolist(), torch.randperm(64)[:24].tolist()
            transfer_id, placement = await peer.grant(theirs, "cuda_ipc")
            outgoing = link.open(transfer_id, placement=placement)
            outgoing.push(mine[:10], 0, 0, LAYERS)
            outgoing.push(mine[10:], 10, 0, 3)
            outgoing.push(mine[10:], 10, 3, LAYERS)
            await peer.commit(transfer_id, await outgoing.finish())
            assert await peer.ask("pages", block_ids=theirs) == hashes(source, mine)
            offsets = source.layer_offsets
            assert copies == [(0, offsets[LAYERS]), (0, offsets[3]), (offsets[3], offsets[LAYERS])]

    async def test_a_bit_that_changed_where_it_landed_is_seen(self):
        async with pushing() as (_, peer, link):
            transfer_id, placement = await peer.grant([5, 6], "cuda_ipc")
            assert placement is not None
            # The writer is told to put the second block where the receiver does not look for it.
            elsewhere = Placement((5, 7), placement.guard, placement.generation)
            outgoing = link.open(transfer_id, placement=elsewhere)
            outgoing.push([1, 2], 0, 0, LAYERS)
            with pytest.raises(kv_transfer.TransferCorrupt):
                await outgoing.finish()
            assert await peer.ask("release", transfer_id=transfer_id.hex())
            assert await peer.ask("check") == 1
            assert await peer.ask("fence", transfer_id=transfer_id.hex()) == "owner"

    async def test_a_released_ticket_is_written_no_more(self):
        async with pushing() as (_, peer, link):
            before = await peer.ask("pages", block_ids=[5, 6])
            transfer_id, placement = await peer.grant([5, 6], "cuda_ipc")
            outgoing = link.open(transfer_id, placement=placement)
            await asyncio.sleep(0.2)
            # Launched while the ticket is live, run after it is over: the kernel itself must see that.
            busy = torch.randn(8192, 8192, device="cuda:0")
            for _ in range(100):
                busy = busy @ busy * 1e-4
            outgoing.push([1, 2], 0, 0, LAYERS, event())
            await asyncio.sleep(0.02)
            assert await peer.ask("release", transfer_id=transfer_id.hex())
            with pytest.raises(kv_transfer.TransferError):
                await outgoing.finish()
            assert await peer.ask("pages", block_ids=[5, 6]) == before
            assert await peer.ask("fence", transfer_id=transfer_id.hex()) == "owner"

    async def test_a_receiver_that_dies_breaks_the_transfer_and_nothing_else(self):
        async with pushing() as (_, peer, link):
            transfer_id, placement = await peer.grant(range(64), "cuda_ipc")
            outgoing = link.open(transfer_id, placement=placement)
            for _ in range(4):
                for layer in range(LAYERS):
                    outgoing.push(range(64), 0, layer, layer + 1)
            peer.process.kill()
            for layer in range(LAYERS):
                outgoing.push(range(64), 0, layer, layer + 1)
            with pytest.raises(kv_transfer.TransferBroken):
                await outgoing.finish()
            await outgoing.wait_closed()
            await peer.process.wait()
            assert torch.ones(8, device="cuda:0").sum().item() == 8

    async def test_writes_after_the_receivers_death_harm_nobody(self):
        """In a process of its own: an illegal access would end every later test here."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.test_cuda_ipc"), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 120)
        assert output.split()[-1:] == [b"unharmed"], output

    async def test_connecting_to_a_receiver_that_is_gone_says_so(self):
        async with pushing() as (source, peer, _):
            (endpoint,) = (e for e in peer.endpoints if e.transport == "cuda_ipc")
            await peer.stop()
            sender = create_sender("cuda_ipc", source, SOURCE)
            started = time.monotonic()
            with pytest.raises(TransferBroken, match="cannot be mapped"):
                await sender.connect(peer.address, Endpoint("cuda_ipc", "", endpoint.data))
            assert time.monotonic() - started < 5
            await sender.close()


async def write_to_the_dead() -> None:
    async with pushing() as (source, peer, link):
        pool = link._pool  # type: ignore[attr-defined]
        transfer_id, placement = await peer.grant(range(64), "cuda_ipc")
        outgoing = link.open(transfer_id, placement=placement)
        peer.process.kill()
        await peer.process.wait()
        pages = pool.tables(placement)
        for _ in range(20):  # past the guard, which died with its owner only as far as its name goes
            pool.push(Rect(tuple(range(64)), 0, 0, LAYERS, None), (0, 64 * 64), pages, placement).wait()
            await asyncio.sleep(0.1)
        assert source.slab.sum().item() and torch.ones(8, device="cuda:0").sum().item() == 8
        outgoing.abort("over")
        await outgoing.wait_closed()
    print("unharmed")


if __name__ == "__main__":
    asyncio.run(write_to_the_dead())
