"""The way back: what a run left in this worker's prefix cache goes to the prefill worker that knows its prompt.

Life of a return here
1. A run ended by itself (or by a stop string). Its whole blocks are in the prefix cache; the last token has no KV yet.
2. It waits its turn: few go at once, and those that wait too long are dropped, the oldest first.
3. The blocks that are still cached are pinned (`retain`), unless few are free here.
4. Offer names the tokens. The prefill worker answers with a ticket for the blocks it lacks, or that it is busy.
5. Those are pushed, and Commit verifies them, as for any transfer. Then the next turn of the chat finds them there.
6. However it ended, the pins are released once no page is read any more, and an unused ticket is given up.

Nobody waits for a return, and nothing depends on it: what fails is dropped and counted.
"""

import asyncio
import logging
import uuid
from collections import deque
from dataclasses import dataclass

import grpc

from decode_worker.runs import Run
from engine.engine import Engine
from engine.prefix import block_hashes
from engine.wire import token_hash
from kv_transfer.base import TransferError
from kv_transfer.peers import Peer, PeerIncompatible, Peers, PeerUnavailable
from kv_transfer.placement import placement_from_pb
from kv_transfer.relayout import whole_blocks
from protos import kv_transfer_pb2 as kv

MAX_AT_ONCE = 2  # each reads pages and sends bytes beside running requests
MAX_WAITING = 32
OFFER_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """A finished run: whole blocks of prompt and answer whose KV was computed."""

    source: kv.WorkerRef  # the worker that prefilled it
    token_ids: list[int]
    namespace: bytes
    num_prompt_tokens: int  # that the prefill worker computed itself


class Returns:
    """On one event loop. Counters are cumulative."""

    def __init__(self, engine: Engine, peers: Peers, is_on: bool):
        self.num_bytes = 0
        self.num_blocks = 0
        self.num_refused = 0  # by the prefill worker, as its blocks were short
        self.num_dropped = 0
        self._is_on = is_on
        self._engine = engine
        self._peers = peers
        self._waiting: deque[Turn] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def num_active(self) -> int:
        return len(self._tasks)

    def offer(self, run: Run) -> None:
        """`run` is over here. Runs that leave nothing to return are passed over; a fork's answers are not one chat."""
        if not self._is_on:
            return
        request = run.request
        block_size = self._engine.layout.block_size
        num_blocks = (len(request.token_ids) + len(run.output) - 1) // block_size
        is_more = num_blocks > len(request.token_ids) // block_size
        if run.source is None or not request.use_prefix_cache or not run.output or not is_more:
            return
        if self._is_closed:
            self.num_dropped += 1
            return
        token_ids = [*request.token_ids, *run.output][: num_blocks * block_size]
        self._waiting.append(Turn(run.source, token_ids, request.namespace, len(request.token_ids)))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self.num_dropped += 1
        self._start_some()

    async def close(self) -> None:
        """Drops what waits and what is under way; afterwards no page is read."""
        self._is_closed = True
        self.num_dropped += len(self._waiting)
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start_some(self) -> None:
        while self._waiting and len(self._tasks) < MAX_AT_ONCE:
            task = asyncio.create_task(self._run(self._waiting.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a bug ended a return", exc_info=error)
        self._start_some()

    async def _run(self, turn: Turn) -> None:
        owner = f"return:{uuid.uuid4().hex}"
        is_done = False
        try:
            is_done = await self._return(owner, turn)
        except (TransferError, PeerUnavailable, PeerIncompatible) as error:
            _log.info("a return to %s was dropped: %s", turn.source.worker_id, error)
        except grpc.aio.AioRpcError as error:
            text = f"{error.code().name}: {error.details()}"
            _log.info("a return to %s was dropped: %s", turn.source.worker_id, text)
        finally:
            self._engine.release(owner)
            self.num_dropped += not is_done

    async def _return(self, owner: str, turn: Turn) -> bool:
        """Whether there is nothing more to do for `turn`. Raises what its calls raise."""
        if not self._peers.is_member(turn.source.worker_id, turn.source.incarnation):
            return False
        peer = await self._peers.connect(turn.source)
        sizes = block_size, _ = self._engine.layout.block_size, peer.block_size
        num_held = whole_blocks(turn.num_prompt_tokens, peer.block_size)
        token_ids = turn.token_ids[: whole_blocks(len(turn.token_ids), *sizes)]
        if len(token_ids) <= num_held:
            return True
        hashes = block_hashes(token_ids, block_size, turn.namespace)
        block_ids = await asyncio.wrap_future(self._engine.retain(owner, hashes))
        token_ids = token_ids[: whole_blocks(len(block_ids) * block_size, *sizes)]
        block_ids = block_ids[: len(token_ids) // block_size]
        if len(token_ids) <= num_held:
            return False
        try:
            granted = await peer.stub.Offer(
                kv.OfferRequest(
                    source=self._peers.source,
                    target=turn.source,
                    token_ids=token_ids,
                    cache_namespace=turn.namespace,
                    transport=peer.link.transport,
                    block_size=block_size,
                ),
                timeout=OFFER_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            self.num_refused += 1
            return True
        if granted.transfer_id:
            await self._push(peer, granted, block_ids, token_ids)
        return True

    async def _push(
        self, peer: Peer, granted: kv.OfferResponse, block_ids: tuple[int, ...], token_ids: list[int]
    ) -> None:
        transfer_id, first_block = granted.transfer_id, granted.cached_tokens // self._engine.layout.block_size
        is_committed = False
        outgoing = peer.open(transfer_id, placement_from_pb(granted))
        peer.hold(transfer_id, granted.lease_ms / 1000, self._peers.source, lambda: outgoing.abort("the lease is over"))
        try:
            outgoing.push(block_ids[first_block:], first_block, 0, self._engine.layout.num_layers)
            claim = kv.CommitRequest(num_tokens=len(token_ids), token_hash=token_hash(token_ids))
            manifest = await peer.commit(transfer_id, outgoing, claim)
            is_committed = True
            self.num_bytes += manifest.num_bytes
            self.num_blocks += len(block_ids) - first_block
        finally:
            peer.drop(transfer_id)
            outgoing.abort("given up")
            await outgoing.wait_closed()
            if not is_committed:
                await peer.release(transfer_id, "given up by the decode worker")
