"""Pages that a one-sided writer may still write to, and how they come back.

Life of a quarantined ticket here
1. Its run, return or canary ended without a commit: receiver and engine keep its pages from everybody.
2. The writer closes the transfer and says so (Release, fenced): the pages are free. Nearly all end like this.
3. It ended instead: a process of this host is seen to be gone, of others the controller says so (cluster/fencing.py).
4. It says nothing: it is asked (Fence) which of its tickets it still uses, and gives them up. Those that it does not
   use are free; it may never have heard of them, if the answer that granted them was lost.
5. Whom no answer comes from, or who still writes, is in this worker's status, with its age; the controller ends it.
"""

import asyncio
import contextlib
from collections.abc import Callable

import grpc

from engine.engine import Engine
from kv_transfer import locality
from kv_transfer.peers import Peers
from kv_transfer.quarantine import Quarantine, SilentWriter
from kv_transfer.refusal import check_target
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc
from protos.grpc_options import CHANNEL_OPTIONS

ASK_AFTER_S = 2.0  # a writer that is well has said it by itself by then
ASK_TIMEOUT_S = 2.0


class Fencing:
    """On one event loop. `look` now and then."""

    def __init__(self, engine: Engine, quarantine: Quarantine, peers: Peers) -> None:
        self._engine = engine
        self._quarantine = quarantine
        self._peers = peers
        self._asking: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Frees what writers of this host have left behind, and asks the silent ones."""
        self._fence_gone(lambda source, process: locality.is_gone(process))
        silent = [writer for writer in self._quarantine.writers() if writer.age_s >= ASK_AFTER_S]
        if silent and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask_all(silent))

    def fence(self, transfer_id: bytes) -> None:
        """Its writer has stopped: pages in quarantine are free."""
        owner = self._quarantine.fence(transfer_id)
        if owner is not None:
            self._engine.release(owner)

    def ended(self, worker_id: str, incarnation: str) -> None:
        """That incarnation's process is known to have ended."""
        self._fence_gone(lambda source, process: source == (worker_id, incarnation))

    async def answer(self, request: kv.FenceRequest) -> kv.FenceResponse:
        """Of the tickets that this worker writes under, or does not. Raises Refusal."""
        check_target(request.target, self._peers.source)
        return kv.FenceResponse(open_transfer_ids=self._peers.transfers.disown(request.transfer_ids))

    def status(self) -> list[dict]:
        """Whom this worker waits for, for JSON."""
        return [
            {
                "worker_id": writer.source[0],
                "incarnation": writer.source[1],
                "process": writer.process,
                "num_tickets": len(writer.transfer_ids),
                "age_s": round(writer.age_s, 3),
            }
            for writer in self._quarantine.writers()
        ]

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def _fence_gone(self, is_gone: Callable[[tuple[str, str], str], bool]) -> None:
        for owner in self._quarantine.fence_gone(is_gone):
            self._engine.release(owner)

    async def _ask_all(self, silent: list[SilentWriter]) -> None:
        await asyncio.gather(*(self._ask(writer) for writer in silent))

    async def _ask(self, writer: SilentWriter) -> None:
        address = self._peers.address(*writer.source)
        if not address:  # it left the membership: only its end is to be waited for
            return
        worker_id, incarnation = writer.source
        target = kv.WorkerRef(worker_id=worker_id, incarnation=incarnation)
        request = kv.FenceRequest(target=target, source=self._peers.source, transfer_ids=writer.transfer_ids)
        with contextlib.suppress(grpc.aio.AioRpcError):  # silence, too, is an answer
            async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                answer = await kv_grpc.KvTransferServiceStub(channel).Fence(request, timeout=ASK_TIMEOUT_S)
                for transfer_id in set(writer.transfer_ids) - set(answer.open_transfer_ids):
                    self.fence(transfer_id)
