"""cuda_ipc's own part, on a pretended GPU: page tables, looks at guards, slots used again, the copy engine, small last
writes. What the real driver makes of it is test_cuda_ipc.py's to show, on GPUs."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import kv_transfer
from benchmarks import transfer_trace
from benchmarks.cuda_peer import make_memory
from kv_transfer import cuda_copy, cuda_ipc, locality, placed
from kv_transfer.base import BlockMemory, Endpoint, Link, Outgoing
from kv_transfer.control_link import ControlLink, ControlStream
from kv_transfer.control_server import ControlServer
from kv_transfer.cuda_driver import DriverError
from kv_transfer.cuda_pages import PageTables
from kv_transfer.cuda_slot import Looks, Slot
from kv_transfer.guards import Guards
from kv_transfer.receiver import Receiver
from tests import fake_cuda
from tests.fake_cuda import Event, Gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real thing is there: test_cuda_ipc.py")
SOURCE, LAYERS = ("sender", "0"), 4


@dataclass
class Pushing:
    source: BlockMemory
    target: BlockMemory
    receiver: Receiver
    guards: Guards
    link: Link

    def open(self, block_ids, first_block: int = 0) -> tuple[bytes, Outgoing]:
        transfer_id = self.receiver.grant("owner", SOURCE, block_ids, first_block, 60.0, "writer")
        return transfer_id, self.link.open(transfer_id, placement=self.receiver.placement(transfer_id))

    def is_equal(self, mine, theirs) -> bool:
        return self.source.slab[list(mine)].equal(self.target.slab[list(theirs)])


@asynccontextmanager
async def pushing(
    monkeypatch: pytest.MonkeyPatch, copies: bool = False, prepare: Callable[[], None] = lambda: None
) -> AsyncIterator[Pushing]:
    fake_cuda.install(monkeypatch)
    prepare()
    monkeypatch.setattr(cuda_copy, "works", lambda address, device: copies)
    monkeypatch.setattr(cuda_copy, "MIN_RUN_BYTES", 4096)
    shape = (16, 40, LAYERS, 2, 64)
    source, target = make_memory("cpu", *shape, seed=1), make_memory("cpu", *shape)
    guards = Guards()
    receiver = Receiver(target, kv_transfer.MAX_CHUNK_BYTES, guards=guards)
    control = ControlServer(receiver)
    memory = target.slab.data_ptr().to_bytes(8, "little").hex() + "00" * 56
    handle = cuda_ipc.PoolHandle(
        memory, 0, 40, target.slab.shape[1], 16, "GPU-0", guards.name, locality.process(), control.name
    )
    sender = cuda_ipc.CudaIpcSender(source, SOURCE, 10.0, num_programs=3)
    try:
        link = await sender.connect("127.0.0.1:9", Endpoint("cuda_ipc", data=handle.encode()))
        assert link.note == ""
        yield Pushing(source, target, receiver, guards, link)
        receiver.check()
    finally:
        await sender.close()
        control.close()
        guards.close()


async def test_scattered_pages_in_stretches_and_behind_events(monkeypatch: pytest.MonkeyPatch):
    async with pushing(monkeypatch) as it:
        for seed in range(3):
            mine, theirs = (random.Random(seed + part).sample(range(40), 12) for part in (0, 100))
            transfer_id, outgoing = it.open(theirs, 2)
            events = [Event().hold() for _ in range(2)]
            outgoing.push(mine[2:7], 2, 0, 2)
            outgoing.push(mine[2:7], 2, 2, 3, events[0])  # type: ignore[arg-type]
            outgoing.push(mine[2:7], 2, 3, 4, events[1])  # type: ignore[arg-type]
            outgoing.push(mine[7:], 7, 0, LAYERS)
            for event in events:
                event.let_pass()
            await it.receiver.commit(transfer_id, await outgoing.finish())
            assert it.is_equal(mine[2:], theirs[2:])
        pool = it.link._pool  # type: ignore[attr-defined]
        assert 1 <= len(pool._slots._free) <= 6  # used again


async def test_writes_are_cut_and_the_last_one_is_small(monkeypatch: pytest.MonkeyPatch):
    async with pushing(monkeypatch) as it:
        width = it.source.width(0, LAYERS)
        monkeypatch.setattr(placed, "MAX_LAST_BYTES", 2 * width)
        mine, theirs = list(range(12)), list(range(20, 32))
        transfer_id = it.receiver.grant("owner", SOURCE, theirs, 0, 60.0, "writer")
        outgoing = it.link.open(transfer_id, 5 * width, it.receiver.placement(transfer_id))
        outgoing.push(mine, 0, 0, LAYERS)
        manifest = await outgoing.finish()
        await it.receiver.commit(transfer_id, manifest)
        assert it.is_equal(mine, theirs) and manifest.num_chunks == 4  # of 5, 4, 2 and 1


async def test_what_is_computed_after_a_release_is_not_written(monkeypatch: pytest.MonkeyPatch):
    """Launched while the ticket is live; when the layers are done, it is not."""
    async with pushing(monkeypatch) as it:
        transfer_id, outgoing = it.open([5, 6])
        after = Event().hold()
        outgoing.push([1, 2], 0, 0, LAYERS, after)  # type: ignore[arg-type]
        await asyncio.to_thread(it.link._sender.threads.launching.submit(bool).result)  # type: ignore[attr-defined]
        assert it.link._pool.stream.work  # type: ignore[attr-defined]  # launched
        assert it.receiver.release(transfer_id)
        after.let_pass()
        with pytest.raises(kv_transfer.TransferError):
            await outgoing.finish()
        await outgoing.wait_closed()
        assert not it.target.slab.any()
        assert it.receiver.quarantine.fence(transfer_id) is not None


async def test_a_write_behind_another_looks_at_its_guard_while_that_one_is_under_way(monkeypatch: pytest.MonkeyPatch):
    async with pushing(monkeypatch) as it:
        first_id, first = it.open([5])
        second_id, second = it.open([6])
        after = Event().hold()
        first.push([1], 0, 0, LAYERS, after)  # type: ignore[arg-type]
        second.push([2], 0, 0, LAYERS)  # behind it on the stream
        assert it.receiver.release(second_id)
        after.let_pass()
        await it.receiver.commit(first_id, await first.finish())
        with pytest.raises(kv_transfer.TransferError):
            await second.finish()
        await second.wait_closed()
        assert it.is_equal([1], [5]) and not it.target.slab[6].any()
        assert it.receiver.quarantine.fence(second_id) is not None


async def test_long_runs_go_by_the_copy_engine_and_what_it_refuses_by_the_kernel(monkeypatch: pytest.MonkeyPatch):
    async with pushing(monkeypatch, copies=True) as it:
        pool, copy, num_copies = it.link._pool, cuda_copy._copy, 0  # type: ignore[attr-defined]

        def counted(*args) -> None:
            nonlocal num_copies
            num_copies += 1
            copy(*args)

        monkeypatch.setattr(cuda_copy, "_copy", counted)
        for mine, theirs in (([1, 2, 3], [9, 4, 7]), ([8, 0, 5], [11, 12, 2])):
            transfer_id, outgoing = it.open(theirs)
            outgoing.push(mine, 0, 0, LAYERS)
            await it.receiver.commit(transfer_id, await outgoing.finish())
            assert it.is_equal(mine, theirs)
        assert num_copies == 2 and pool._beside is not None

        def refused(*args) -> None:
            raise DriverError("cuMemcpyBatchAsync: error 801")

        monkeypatch.setattr(cuda_copy, "_copy", refused)
        transfer_id, outgoing = it.open([20, 21])
        outgoing.push([6, 7], 0, 0, LAYERS)
        await it.receiver.commit(transfer_id, await outgoing.finish())
        assert it.is_equal([6, 7], [20, 21]) and pool._beside is None


async def test_copies_do_not_wait_for_digests_and_digests_not_for_copies(monkeypatch: pytest.MonkeyPatch):
    async with pushing(monkeypatch, copies=True) as it:
        pool = it.link._pool  # type: ignore[attr-defined]
        for held in (pool._beside, pool.stream):
            blocked = Event().hold()
            held.wait_event(blocked)
            transfer_id, outgoing = it.open([9, 4, 7])
            outgoing.push([1, 2], 0, 0, LAYERS)
            outgoing.push([3], 2, 0, LAYERS)
            Gpu.advance()
            assert len(held.work) > 2 and not (pool.stream if held is pool._beside else pool._beside).work
            assert it.is_equal([1, 2, 3], [9, 4, 7]) == (held is pool._beside)
            blocked.let_pass()
            await it.receiver.commit(transfer_id, await outgoing.finish())
            assert it.is_equal([1, 2, 3], [9, 4, 7])
            it.target.slab.zero_()


@pytest.mark.parametrize("copies", [False, True])
async def test_the_benchmark_that_stamps_every_step(monkeypatch: pytest.MonkeyPatch, copies: bool):
    patched = [(cuda_ipc._Writer, "write"), (cuda_ipc._Write, "wait"), (cuda_copy, "copy_blocks"), (Slot, "digest")]
    patched += [(Looks, "begins"), (PageTables, "fill"), (ControlLink, "send"), (ControlStream, "settle")]
    for owner, name in patched:  # so that it is undone
        monkeypatch.setattr(owner, name, getattr(owner, name))
    async with pushing(monkeypatch, copies, lambda: transfer_trace.trace_sender("cuda_ipc")) as it:
        transfer_id, outgoing = it.open([9, 4, 7])
        transfer_trace.stamps.clear()
        outgoing.push([1, 2, 3], 0, 0, LAYERS)
        await it.receiver.commit(transfer_id, await outgoing.finish())
    said = [what for _, what in transfer_trace.stamps]
    expected = ["launching", *(["copying", "copy called"] if copies else []), "page ids on their way", "launched"]
    assert said[: len(expected)] == expected
    assert {"PLACED sent", "END sent", "landed, digest known", "answer read"} < set(said)
    assert [what for what in said if what.startswith(transfer_trace.WRITTEN)] == [f"{transfer_trace.WRITTEN} 1000 us"]


async def test_a_copy_whose_digest_cannot_be_launched_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """Closed says that nothing is written any more: the receiver then gives its pages to others."""
    async with pushing(monkeypatch, copies=True) as it:

        def fails(*args) -> None:
            raise torch.OutOfMemoryError("no room for page ids")

        monkeypatch.setattr(PageTables, "fill", fails)
        it.link._pool.stream.wait_event(blocked := Event().hold())  # type: ignore[attr-defined]
        _, outgoing = it.open([5, 6])
        push = asyncio.create_task(asyncio.to_thread(outgoing.push, [1, 2], 0, 0, LAYERS))
        closed = asyncio.create_task(outgoing.wait_closed())
        await asyncio.wait([closed], timeout=0.3)
        assert not closed.done() and not it.target.slab.any()
        blocked.let_pass()
        await asyncio.gather(push, closed)
        assert it.is_equal([1, 2], [5, 6])


async def test_a_kernel_that_fails_says_so_and_the_stream_goes_on(monkeypatch: pytest.MonkeyPatch):
    async with pushing(monkeypatch) as it:
        launch = cuda_ipc.launch

        def fails(*args) -> None:
            raise RuntimeError("an illegal instruction")

        monkeypatch.setattr(cuda_ipc, "launch", fails)
        transfer_id, outgoing = it.open([5])
        outgoing.push([1], 0, 0, LAYERS)
        with pytest.raises(kv_transfer.base.TransferUnfit, match="the write failed: RuntimeError: an illegal"):
            await outgoing.finish()
        assert it.receiver.release(transfer_id) and it.receiver.quarantine.fence(transfer_id) is not None
        monkeypatch.setattr(cuda_ipc, "launch", launch)
        transfer_id, outgoing = it.open([5])
        outgoing.push([1], 0, 0, LAYERS)
        await it.receiver.commit(transfer_id, await outgoing.finish())
        assert it.is_equal([1], [5])
        Gpu.advance()
        assert not any(stream.work for stream in Gpu.streams)
