"""WorkerService: who this worker is, how busy it is, and draining it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from decode_worker.decoder import Decoder
from decode_worker.returns import Returns
from engine.engine import Engine
from kv_transfer.peers import Peers
from kv_transfer.receiver import Receiver
from prefill_worker.servicer import PrefillServicer
from protos import inference_pb2, worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    from cluster.worker import Worker

_MIN_INTERVAL_S = 0.01
_SILENCE_S = 2.0


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(
        self,
        worker: "Worker",
        engine: Engine,
        prefill: PrefillServicer,
        decoder: Decoder,
        returns: Returns,
        receiver: Receiver,
        transport: str,
        peers: Peers,
    ):
        self._worker = worker
        self._engine = engine
        self._prefill = prefill
        self._decoder = decoder
        self._returns = returns
        self._receiver = receiver
        self._transport = transport
        self._peers = peers
        self._watchers: set[asyncio.Event] = set()

    def changed(self) -> None:
        """Something a watcher may want to know happened; on the loop."""
        for watcher in self._watchers:
            watcher.set()

    def load(self) -> worker_pb2.WorkerLoad:
        stats = self._engine.stats()
        return worker_pb2.WorkerLoad(
            state=self._worker.state,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens,
            total_blocks=stats.total_blocks,
            free_blocks=stats.free_blocks,
            reserved_blocks=stats.reserved_blocks,
            pinned_blocks=stats.pinned_blocks,
            transfers_in_flight=self._prefill.num_handoffs + self._returns.num_active + self._receiver.num_active,
            steps=stats.steps,
            prompt_tokens_computed=stats.prompt_tokens_computed,
            prompt_tokens_cached=stats.prompt_tokens_cached,
            tokens_generated=stats.tokens_generated,
            preemptions=stats.preemptions,
            kv_bytes_sent=self._prefill.bytes_sent,
            kv_bytes_received=self._receiver.bytes_received,
            num_runs=self._prefill.num_runs + len(self._decoder.runs),
            kv_returned_bytes=self._returns.num_bytes,
            kv_returned_blocks=self._returns.num_blocks,
            kv_returns_refused=self._returns.num_refused,
            kv_returns_dropped=self._returns.num_dropped,
            prompt_tokens_returned=stats.prompt_tokens_returned,
            quarantined_blocks=stats.quarantined_blocks,
            transfers_corrupt=self._receiver.num_corrupt,
            tickets_quarantined=self._receiver.quarantine.num_held,
            links=[
                worker_pb2.LinkLoad(
                    worker_id=peer.ref.worker_id, transport=peer.transport, why=peer.why, gb_per_s=peer.gb_per_s
                )
                for peer in self._peers.met()
            ],
        )

    async def GetWorker(self, request, context: grpc.aio.ServicerContext) -> worker_pb2.GetWorkerResponse:
        info = self._engine.model_info
        member = self._worker.member()
        return worker_pb2.GetWorkerResponse(
            worker_id=member.worker_id,
            incarnation=member.incarnation,
            role=member.role,
            layout=self._engine.layout.to_pb(),
            model=inference_pb2.ModelInfo(
                max_model_len=info.max_model_len,
                vocab_size=info.vocab_size,
                dtype=info.dtype,
                architectures=info.architectures,
                eos_token_ids=info.eos_token_ids,
            ),
            total_kv_blocks=self._engine.stats().total_blocks,
            transport=self._transport,
        )

    async def WatchLoad(self, request, context: grpc.aio.ServicerContext) -> AsyncIterator[worker_pb2.WorkerLoad]:
        interval_s = max(request.interval.ToNanoseconds() / 1e9, _MIN_INTERVAL_S)
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                yield self.load()
                await asyncio.sleep(interval_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _SILENCE_S)
                changed.clear()
        finally:
            self._watchers.discard(changed)

    async def Drain(self, request, context: grpc.aio.ServicerContext) -> worker_pb2.DrainResponse:
        await self._worker.begin_drain()
        return worker_pb2.DrainResponse(remaining_runs=self._prefill.num_runs + len(self._decoder.runs))
