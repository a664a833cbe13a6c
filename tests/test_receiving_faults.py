"""A receiving worker whose own engine, guards or peers say no: nobody waits for it, and nothing is left behind."""

import asyncio
import threading
from concurrent.futures import Future

import grpc.aio
import pytest

from kv_transfer.base import Endpoint, Manifest
from kv_transfer.create import create_sender
from kv_transfer.one_sided import OneSidedSender
from kv_transfer.open_transfers import OpenTransfers
from kv_transfer.peers import Peer, Peers, PeerUnavailable
from kv_transfer.placed import Threads
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc
from tests.service import request, service
from tests.transfer import SOURCE, make_memory, needs_nixl

SMALL = {"load_format": "dummy", "num_blocks": 64}


async def test_a_run_that_cannot_be_adopted_is_tried_again(tiny, monkeypatch: pytest.MonkeyPatch):
    """The router has heard that it was adopted, and would wait for its tokens until the deadline."""
    async with service(tiny, engine=SMALL) as s:
        asked = request(list(range(40)), 8, ignore_eos=True)
        expected = (await s.generate(asked)).token_ids
        engine = s.worker("decode").engine
        adopt, num_failed = engine.adopt, 0

        def fails_once(*args):
            nonlocal num_failed
            if num_failed:
                return adopt(*args)
            num_failed += 1
            future: Future[None] = Future()
            future.set_exception(ValueError("it was made for another request"))
            return future

        monkeypatch.setattr(engine, "adopt", fails_once)
        answer = await s.generate(asked, timeout=10)
        assert answer.token_ids == expected and answer.timings.retries == 1 == num_failed


@needs_nixl
async def test_pages_come_back_when_no_guard_is_left(tiny):
    async with service(tiny, engine=SMALL, transport="nixl", kv_return=True) as s:
        prefill, decode = s.worker("prefill"), s.worker("decode")
        assert (await prefill.canary("decode-1", 2))["ok"]
        taken = {worker: [] for worker in (prefill, decode)}

        def take_all(worker) -> None:
            with pytest.raises(MemoryError):
                while True:
                    taken[worker].append(worker._receiver._guards.take()[0])

        take_all(decode)
        refused = await prefill.canary("decode-1", 2)
        assert not refused["ok"] and "guards are taken" in refused["error"]
        with pytest.raises(grpc.aio.AioRpcError, match="guards are taken"):
            await s.generate(request(list(range(40)), 8, ignore_eos=True), timeout=10)
        for slot in taken.pop(decode):
            decode._receiver._guards.free(slot)
        take_all(prefill)
        await s.generate(request(list(range(40)), 60, ignore_eos=True))
        async with asyncio.timeout(10):
            while decode.status()["kv_returns_refused"] != 1:
                await asyncio.sleep(0.01)
        for slot in taken.pop(prefill):
            prefill._receiver._guards.free(slot)
        await s.settle()


class Failing:
    """Transports of a worker that finds a bug in them."""

    speaks = ("grpc",)

    async def connect(self, *args) -> None:
        raise ZeroDivisionError


async def test_a_bug_in_one_handshake_does_not_keep_the_others_open(tiny):
    async with service(tiny, engine=SMALL) as s:
        decode = s.worker("decode")
        peers = Peers(s.worker("prefill").me, decode.engine.layout.to_pb(), Failing())  # type: ignore[arg-type]
        peers.set_members([decode.member()])
        with pytest.raises(ZeroDivisionError):
            await peers.connect(decode.me)
        peers.set_members([])
        await peers.close()
        peers.set_members([decode.member()])
        with pytest.raises(ZeroDivisionError):
            await peers.connect(decode.me)
        await peers.close()


class SlowPool:
    """A receiver's pool that takes as long to map as a test says."""

    control = ""

    def __init__(self) -> None:
        self.begun, self.may_go, self.closed = threading.Event(), threading.Event(), threading.Event()

    def map(self, endpoint: Endpoint) -> "SlowPool":
        self.begun.set()
        assert self.may_go.wait(10)
        return self

    def close(self) -> None:
        self.closed.set()


async def test_a_pool_mapped_for_nobody_is_let_go():
    """The handshake is given up, or times out, while a thread maps the pool."""
    pool = SlowPool()
    sender = OneSidedSender("placed", make_memory(2), SOURCE, 1.0, Threads("test"), pool.map)  # type: ignore[arg-type]
    connecting = asyncio.create_task(sender.connect("", Endpoint("placed")))
    await asyncio.to_thread(pool.begun.wait, 10)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    pool.may_go.set()
    assert await asyncio.to_thread(pool.closed.wait, 10)
    await sender.close()


class Hanging(kv_grpc.KvTransferServiceServicer):
    """A receiver that answers no Commit."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()

    async def Commit(self, request: kv.CommitRequest, context: grpc.aio.ServicerContext) -> kv.CommitResponse:
        self.is_asked.set()
        await asyncio.Event().wait()
        raise AssertionError


class Sealed:
    def commit(self, claim: object) -> None:
        pass

    async def seal(self) -> Manifest:
        return Manifest(0, 0, b"")

    async def commit_answer(self) -> None:
        return None


async def test_a_peer_that_leaves_during_commit_is_unavailable():
    """Its channel is closed under the call, which is no cancellation of ours."""
    server, servicer = grpc.aio.server(), Hanging()
    kv_grpc.add_KvTransferServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    link = await create_sender("grpc", make_memory(4), SOURCE).connect(address, Endpoint("grpc"))
    ref = kv.WorkerRef(worker_id="decode-0", incarnation="i")
    peer = Peer(ref, grpc.aio.insecure_channel(address), link, "", 16, OpenTransfers())
    committing = asyncio.create_task(peer.commit(b"ticket", Sealed()))  # type: ignore[arg-type]
    await servicer.is_asked.wait()
    await peer.close()
    with pytest.raises(PeerUnavailable, match="decode-0"):
        await committing
    await server.stop(None)
