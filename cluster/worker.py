"""One worker process: an engine, both halves of a request's life over it, one gRPC server. No Ray in here.

The role says which half the router will ask of it; the parts are the same, so local prefill, a colocated deployment
and the doctor's canary need nothing more.
"""

import asyncio
import hashlib
import logging
import os
import time
import uuid
from typing import Literal

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import kv_transfer
from cluster.worker_service import WorkerServicer
from decode_worker.decoder import Decoder
from decode_worker.fencing import Fencing
from decode_worker.kv_service import KvTransferServicer, canary_request
from decode_worker.returns import Returns
from decode_worker.session import DecodeServicer
from engine.config import EngineConfig
from engine.dispatch import Dispatcher
from engine.engine import Engine
from engine.kv_cache import DTYPES
from kv_transfer.guards import Guards
from kv_transfer.memory import BlockMemory
from kv_transfer.peers import Peers
from kv_transfer.placement import placement_from_pb
from kv_transfer.receiver import Receiver
from kv_transfer.relayout import Tiles
from kv_transfer.writers import Writers
from prefill_worker.offers import Offers
from prefill_worker.servicer import PrefillServicer
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc
from protos import worker_pb2, worker_pb2_grpc
from protos.grpc_options import SERVER_OPTIONS

Role = Literal["prefill", "decode", "both"]

_ROLES = {
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
    "both": worker_pb2.WORKER_ROLE_BOTH,
}
_HEALTH_PERIOD_S = 1.0
MEASURED_BYTES = 64 << 20  # of the test transfer that measures a link
_CANARY_S = 10.0  # a canary goes after every request: on a busy worker it may find no pages
# A step may take long (a big prefill on a CPU), a thread that died is noticed at once: its heartbeat is infinitely old.
_STALLED_AFTER_S = 120.0
_log = logging.getLogger(__name__)


class Worker:
    """Everything behind one worker id. start() to stop() on one event loop."""

    def __init__(
        self,
        worker_id: str,
        role: Role,
        engine: EngineConfig,
        transport: str = "auto",
        host: str = "127.0.0.1",
        object_store: "kv_transfer.ObjectStore | None" = None,
        kv_return: bool = False,
        measure_links: bool = False,
    ):
        """`kv_return`: what finished runs leave goes back to the prefill worker's prefix cache. `measure_links`: once a
        peer has been met, and while nothing is to do, a test transfer tells the link's GB/s."""
        self.me = kv.WorkerRef(worker_id=worker_id, incarnation=uuid.uuid4().hex[:16])
        self.role = role
        self.state = worker_pb2.WORKER_STATE_STARTING
        self.address = ""
        self.engine: Engine | None = None
        self.progress = "placing"  # what the worker is busy with until it is ready
        self._engine_config = engine
        self._transport = transport
        self._host = host
        self._object_store = object_store
        self._kv_return = kv_return
        self._measures_links = measure_links
        self._measuring: asyncio.Task | None = None

    async def start(self) -> worker_pb2.Member:
        """Loads the model and serves. Raises what loading raises, with nothing left running."""
        loop = asyncio.get_running_loop()
        dispatcher = Dispatcher(loop)
        self.progress = "loading"
        self.engine = await asyncio.to_thread(Engine, self._engine_config, dispatcher.on_events, self._say)
        engine = self.engine
        memory = memory_of(engine)
        layout = engine.layout.to_pb()

        self._receiver = Receiver(memory, kv_transfer.MAX_CHUNK_BYTES, guards=Guards())
        self._transports = kv_transfer.Transports(
            self._transport, self._receiver, (self.me.worker_id, self.me.incarnation), self._object_store
        )
        self._peers = Peers(self.me, layout, self._transports)
        writers = Writers(self._transports, memory.block_size)
        self._prefill = PrefillServicer(engine, dispatcher, self._peers)
        self._offers = Offers(engine, self._receiver, self._peers, writers, is_open=self._kv_return)
        self._returns = Returns(engine, self._peers, is_on=self._kv_return)
        self._decoder = Decoder(engine, dispatcher, self._receiver, self._returns.offer)
        self._fencing = Fencing(engine, self._receiver.quarantine, self._peers)
        self._kv = KvTransferServicer(
            self._decoder, self._offers, self.me, layout, self._transports, writers, self._fencing
        )
        self._service = WorkerServicer(
            self, engine, self._prefill, self._decoder, self._returns, self._receiver, self._transport, self._peers
        )
        dispatcher.after_step(self._service.changed)

        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        kv_grpc.add_KvTransferServiceServicer_to_server(self._kv, self._server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._service, self._server)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(self._prefill, self._server)
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(self._decoder), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        port = self._server.add_insecure_port(f"{self._host}:0")
        self.address = f"{self._host}:{port}"
        self._transports.serve(self._server, self.address, self._kv.commit_from_socket)
        engine.start()
        await self._server.start()
        await self._set_state(worker_pb2.WORKER_STATE_READY)
        self.progress = "ready"
        self._housekeeping = asyncio.create_task(self._keep_house())
        return self.member()

    def member(self) -> worker_pb2.Member:
        return worker_pb2.Member(
            worker_id=self.me.worker_id,
            incarnation=self.me.incarnation,
            address=self.address,
            role=_ROLES[self.role],
            state=self.state,
        )

    def set_members(self, members: list[worker_pb2.Member]) -> None:
        self._peers.set_members(members)

    async def drain(self) -> None:
        """Refuses new work, finishes what is here; returns when nothing is left."""
        await self.begin_drain()
        await self._prefill.idle.wait()
        await self._decoder.runs.idle.wait()
        await self._prefill.close()
        await self._returns.close()

    async def begin_drain(self) -> None:
        self._prefill.draining = self._decoder.draining = True
        self._offers.is_open = False
        await self._set_state(worker_pb2.WORKER_STATE_DRAINING)

    async def stop(self) -> None:
        if self.engine is None:
            return
        self._housekeeping.cancel()
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)
        await self._fencing.close()
        await self._set_state(worker_pb2.WORKER_STATE_STOPPED)
        await self._server.stop(grace=0.2)
        await self._prefill.close()
        await self._returns.close()
        await self._peers.close()
        await self._transports.close()
        await asyncio.to_thread(self.engine.stop)

    @property
    def is_fit(self) -> bool:
        """False: its engine gives no sign of life."""
        return self.state != worker_pb2.WORKER_STATE_UNHEALTHY

    def status(self) -> dict:
        """What `pdserve status` shows of this worker, for JSON."""
        load = self._service.load() if self.engine is not None and self.address else worker_pb2.WorkerLoad()
        fields = {field.name: getattr(load, field.name) for field in worker_pb2.WorkerLoad.DESCRIPTOR.fields}
        fields["links"] = [
            {field.name: getattr(link, field.name) for field in worker_pb2.LinkLoad.DESCRIPTOR.fields}
            for link in load.links
        ]
        fields["state"] = worker_pb2.WorkerState.Name(self.state).removeprefix("WORKER_STATE_").lower()
        return {
            "worker_id": self.me.worker_id,
            "incarnation": self.me.incarnation,
            "role": self.role,
            "address": self.address,
            "pid": os.getpid(),
            "progress": self.progress,
            "transport": self._transport,
            "silent_writers": self._fencing.status() if self.address else [],
            **fields,
        }

    def writer_ended(self, worker_id: str, incarnation: str) -> None:
        """The controller knows that this process has ended: what it may have written to is free."""
        self._fencing.ended(worker_id, incarnation)

    async def check(self) -> None:
        """Every invariant of the engine's pools and the receiver's tickets; AssertionError if one is broken."""
        assert self.engine is not None
        await asyncio.wrap_future(self.engine.check())
        self._receiver.check()

    async def canary(self, target_worker_id: str, num_blocks: int) -> dict:
        """Sends test bytes the way a prompt's KV goes and has the receiver verify them.

        {bytes, seconds, ok, error}, and {transport, why} if ok.
        """
        assert self.engine is not None
        owner = f"canary:{uuid.uuid4().hex}"
        block_size = self.engine.layout.block_size
        longest = self.engine.model_info.max_model_len // block_size  # that a request may reserve
        num_blocks = max(1, min(num_blocks, longest, self.engine.slab.shape[0] // 2))
        probe = canary_request(owner, num_blocks * block_size - 1)
        try:
            reserving = asyncio.wrap_future(self.engine.reserve(owner, probe, len(probe.token_ids)))
            reservation = await asyncio.wait_for(reserving, _CANARY_S)
            return await self._send_canary(target_worker_id, reservation.block_ids[:num_blocks])
        except grpc.aio.AioRpcError as error:
            return {"bytes": 0, "seconds": 0.0, "ok": False, "error": f"{error.code().name}: {error.details()}"}
        except Exception as error:  # the doctor reports whatever is wrong with this path
            return {"bytes": 0, "seconds": 0.0, "ok": False, "error": f"{type(error).__name__}: {error}"}
        finally:
            self.engine.release(owner)

    async def _send_canary(self, target_worker_id: str, block_ids: tuple[int, ...]) -> dict:
        assert self.engine is not None
        slab = self.engine.slab
        seed = hashlib.sha256(self.me.SerializeToString()).digest()
        for position, block in enumerate(block_ids):
            slab[block].fill_(seed[position % len(seed)])
        after = None
        if slab.is_cuda:
            with torch.cuda.device(slab.device):
                after = torch.cuda.Event()
                after.record()
        peer = await self._peers.connect(self._peers.find(target_worker_id))
        request = kv.CanaryRequest(
            source=self.me,
            num_blocks=len(block_ids),
            transport=peer.link.transport,
            block_size=self.engine.layout.block_size,
        )
        granted = await peer.stub.Canary(request, timeout=_CANARY_S)
        started = time.perf_counter()
        outgoing = peer.open(granted.transfer_id, placement_from_pb(granted))
        try:
            # The last block in two parts, for what moves few bytes of a block may not be what moves all of them.
            num_layers, last = self.engine.layout.num_layers, len(block_ids) - 1
            if last:
                outgoing.push(block_ids[:last], 0, 0, num_layers, after)
            outgoing.push(block_ids[last:], last, 0, 1, after)
            if num_layers > 1:
                outgoing.push(block_ids[last:], last, 1, num_layers, after)
            manifest = await peer.commit(granted.transfer_id, outgoing)
            seconds = time.perf_counter() - started
        finally:
            outgoing.abort("canary over")
            await outgoing.wait_closed()
            await peer.release(granted.transfer_id, "canary over")
        peer.gb_per_s = manifest.num_bytes / seconds / 1e9
        sent = {"bytes": manifest.num_bytes, "seconds": seconds, "transport": peer.transport, "why": peer.why}
        return {"ok": True, "error": "", **sent}

    async def _set_state(self, state: worker_pb2.WorkerState) -> None:
        self.state = state
        serving = state == worker_pb2.WORKER_STATE_READY
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", "pdserve.v1.WorkerService"):
            await self._health.set(name, status)
        self._service.changed()

    async def _keep_house(self) -> None:
        """Leases run out and engines die without an event to say so: both are looked at every second."""
        assert self.engine is not None
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            try:
                self._decoder.expire(self._kv.expire)
                self._fencing.look()
                self._measure_a_link()
                alive = self.engine.heartbeat_age_s() < _STALLED_AFTER_S
                if self.state in (worker_pb2.WORKER_STATE_READY, worker_pb2.WORKER_STATE_DRAINING) and not alive:
                    await self._set_state(worker_pb2.WORKER_STATE_UNHEALTHY)
                elif self.state == worker_pb2.WORKER_STATE_UNHEALTHY and alive:
                    await self._set_state(
                        worker_pb2.WORKER_STATE_DRAINING if self._prefill.draining else worker_pb2.WORKER_STATE_READY
                    )
            except Exception:
                _log.exception("housekeeping of worker %s", self.me.worker_id)

    def _measure_a_link(self) -> None:
        """Starts the test transfer to one peer that has had none; only now that no request is here."""
        assert self.engine is not None
        is_busy = self._measuring is not None and not self._measuring.done()
        if not self._measures_links or is_busy or self.engine.stats().num_requests or self._prefill.draining:
            return
        for peer in self._peers.met():
            if not peer.was_tried:
                peer.was_tried = True
                num_blocks = max(1, min(MEASURED_BYTES, self.engine.slab.nbytes // 8) // self.engine.slab.shape[1])
                self._measuring = asyncio.create_task(self.canary(peer.ref.worker_id, num_blocks))
                return

    def _say(self, line: str) -> None:
        self.progress = line


def memory_of(engine: Engine) -> BlockMemory:
    """The engine's pool as transports see it."""
    layout = engine.layout
    tiles = tuple(tuple(Tiles(*entry) for entry in layer) for layer in layout.tiles)
    return BlockMemory(engine.slab, layout.layer_offsets, layout.block_size, tiles, DTYPES[layout.kv_dtype])
