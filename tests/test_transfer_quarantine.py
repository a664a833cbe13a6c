"""Pages of a one-sided transfer that was given up stay out of use until its writer has stopped or ended."""

import asyncio
from types import SimpleNamespace

import grpc.aio
import numpy as np
import pytest

import kv_transfer
from kv_transfer import locality, peers
from kv_transfer.base import ChunkHeader, Endpoint, ManifestBuilder
from kv_transfer.create import create_sender
from kv_transfer.guards import NUM_SLOTS, Guards, open_guards
from kv_transfer.memory import Pages
from kv_transfer.open_transfers import OpenTransfers
from kv_transfer.receiver import Receiver
from kv_transfer.writers import Writers
from protos import kv_transfer_pb2 as kv
from tests.scheduling import Simulator, make_request
from tests.transfer import NUM_LAYERS, SOURCE, make_memory


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def guards() -> Guards:
    return Guards()


@pytest.fixture
def receiver(guards: Guards) -> Receiver:
    return Receiver(make_memory(32, seed=2), kv_transfer.MAX_CHUNK_BYTES, Clock(), guards=guards)


def grant(receiver: Receiver, block_ids=(1, 2), owner: str = "owner", writer: str = "process") -> bytes:
    return receiver.grant(owner, SOURCE, block_ids, 0, 10.0, writer)


def placed(receiver: Receiver, block_ids, block_start: int = 0, sequence: int = 0, flip: int = 0) -> ChunkHeader:
    """What a writer says that has put there what lies there."""
    (digest,) = receiver.memory.digests([Pages(block_ids, block_start, 0, NUM_LAYERS)])
    num_bytes = len(block_ids) * receiver.memory.width(0, NUM_LAYERS)
    return ChunkHeader(sequence, 0, NUM_LAYERS, block_start, len(block_ids), num_bytes, digest ^ flip)


async def test_a_commit_is_a_fence(receiver: Receiver, guards: Guards):
    transfer_id = grant(receiver, [4, 5, 6])
    receiver.begin(transfer_id, SOURCE)
    manifest = ManifestBuilder()
    for headers in ([placed(receiver, [4])], [placed(receiver, [5], 1, 1), placed(receiver, [6], 2, 2)]):
        receiver.placed(transfer_id, headers)
        for header in headers:
            manifest.add(header)
    await receiver.commit(transfer_id, manifest.manifest())
    assert transfer_id not in receiver.quarantine and guards.num_taken == 0
    receiver.check()


@pytest.mark.parametrize("flip", [1, 1 << 31, 1 << 63])
def test_what_did_not_land_is_not_taken(receiver: Receiver, guards: Guards, flip: int):
    transfer_id = grant(receiver)
    placement = receiver.placement(transfer_id)
    assert placement is not None
    receiver.begin(transfer_id, SOURCE)
    with pytest.raises(kv_transfer.TransferCorrupt):
        receiver.placed(transfer_id, [placed(receiver, [1, 2], flip=flip)])
    assert guards.words[placement.guard] == 0  # its writer stops at once
    assert receiver.release(transfer_id) and transfer_id in receiver.quarantine
    receiver.check()


def test_placed_chunks_keep_the_rules_of_chunks(receiver: Receiver):
    for headers, text in [
        ([placed(receiver, [1], sequence=1)], "0 was next"),
        ([placed(receiver, [1]), placed(receiver, [1], sequence=2)], "1 was next"),
        ([placed(receiver, [1]), placed(receiver, [1], sequence=1)], "overlaps"),
        ([placed(receiver, [1], 2)], "must lie in"),
    ]:
        transfer_id = grant(receiver)
        receiver.begin(transfer_id, SOURCE)
        with pytest.raises(kv_transfer.TransferBroken, match=text):
            receiver.placed(transfer_id, headers)
        assert receiver.release(transfer_id)
    two_sided = receiver.grant("owner", SOURCE, [1], 0, 10.0)
    receiver.begin(two_sided, SOURCE)
    with pytest.raises(kv_transfer.TransferBroken, match="lets nobody write"):
        receiver.placed(two_sided, [placed(receiver, [1])])
    receiver.release(two_sided)
    assert two_sided not in receiver.quarantine and len(receiver.quarantine) == 4
    receiver.check()


def test_only_the_writers_word_or_its_end_frees_the_pages(receiver: Receiver, guards: Guards):
    words = open_guards(guards.name)  # as another process sees them
    released, expired, silent = (grant(receiver, [i], f"owner {i}", f"process {i}") for i in (1, 2, 3))
    slots = [receiver.placement(t).guard for t in (released, expired, silent)]  # type: ignore[union-attr]
    assert [int(words[slot]) for slot in slots] == [1, 2, 3]
    assert receiver.release(released)
    receiver._clock.now = 11.0  # type: ignore[attr-defined]
    assert sorted(receiver.expire()) == ["owner 2", "owner 3"]
    assert not words[slots].any() and len(receiver.quarantine) == 3 == guards.num_taken
    receiver.check()
    assert receiver.quarantine.fence(released) == "owner 1" and receiver.quarantine.fence(released) is None
    assert receiver.quarantine.fence(b"forged forged!!!") is None
    assert receiver.quarantine.fence_gone(lambda source, process: process == "process 3") == ["owner 3"]
    assert expired in receiver.quarantine and guards.num_taken == 1
    assert receiver.quarantine.fence(expired) == "owner 2"
    receiver.check()
    fresh = receiver.placement(grant(receiver))
    assert fresh is not None and fresh.generation == 4  # never one that a stale writer may hold


def test_a_speaker_that_seems_to_be_dead_is_one_that_cannot_be_seen():
    """Where /proc hides other users' processes, theirs look as if they had ended."""
    transports = SimpleNamespace(speaks=("cuda_ipc",))
    writers, source = Writers(transports, 16), kv.WorkerRef(worker_id="p", incarnation="i")  # type: ignore[arg-type]
    asked = kv.ReserveRequest(source=source, transport="cuda_ipc", block_size=16)
    me = locality.process()
    hidden = me.rpartition(":")[0] + ":1"
    for process, known in ((me, me), (hidden, "")):
        writers.met(kv.HandshakeRequest(source=source, process=process))
        assert writers.find(asked) == known


def test_guards_run_out_with_words(guards: Guards):
    for _ in range(NUM_SLOTS):
        guards.take()
    with pytest.raises(MemoryError, match=f"all {NUM_SLOTS} guards are taken"):
        guards.take()
    assert np.count_nonzero(guards.words) == NUM_SLOTS


def test_the_engine_keeps_quarantined_blocks_from_everybody():
    sim = Simulator(num_blocks=5)
    first, second = make_request("first", range(40)), make_request("second", range(100, 140))
    sim.scheduler.reserve("first", first, 40)
    sim.step()
    assert set(sim.granted) == {"first"}
    sim.scheduler.quarantine("first")
    sim.scheduler.quarantine("nobody")
    assert sim.scheduler.abort("first") == []
    sim.scheduler.reserve("second", second, 40)
    sim.step()
    stats = sim.scheduler.stats()
    assert (stats.quarantined_blocks, stats.reserved_blocks, stats.free_blocks) == (3, 0, 2)
    assert set(sim.granted) == {"first"}
    sim.scheduler.release("first")
    sim.step()
    assert set(sim.granted) == {"first", "second"}
    assert sim.scheduler.stats().quarantined_blocks == 0


class Deaf:
    """A receiver that does not answer the first Release calls."""

    def __init__(self, times: int) -> None:
        self.times, self.heard = times, asyncio.Event()

    async def Release(self, request: kv.ReleaseRequest, timeout: float, **options) -> kv.ReleaseResponse:
        self.times -= 1
        if self.times >= 0:
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())
        assert request.fenced and request.transfer_id == b"ticket"
        self.heard.set()
        return kv.ReleaseResponse(found=True)


async def test_a_writer_repeats_its_fence_until_it_is_heard(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "RELEASE_TIMEOUT_S", 0.01)
    channel = grpc.aio.insecure_channel("127.0.0.1:9")
    link = await create_sender("grpc", make_memory(4), SOURCE).connect("127.0.0.1:9", Endpoint("grpc"))
    monkeypatch.setattr(link, "transport", "cuda_ipc")
    peer = peers.Peer(kv.WorkerRef(worker_id="decode-0"), channel, link, "", 16, OpenTransfers())
    peer._stub = stub = Deaf(peers.RELEASE_TRIES + 3)  # type: ignore[assignment]
    await peer.release(b"ticket", "given up")
    assert not stub.heard.is_set()
    await asyncio.wait_for(stub.heard.wait(), 5)
    await peer.close()
