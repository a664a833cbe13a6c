"""One prompt's KV on its way to a decode worker.

    wanted -> reserving -> granted -> pushing ... -> committed
                 |            |          |
                 +------------+----------+--> failed | abandoned

The engine thread calls the KVSink hooks, of which `sampled` sends the commit where the link can do so from any thread;
everything else runs on the event loop.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

import grpc

from engine.engine import Engine
from engine.request import Request, Token
from engine.wire import token_hash
from kv_transfer.base import Outgoing, ReadyEvent, TransferCorrupt, TransferError
from kv_transfer.peers import Peer, PeerIncompatible, Peers, PeerUnavailable
from kv_transfer.placement import placement_from_pb
from protos import inference_pb2
from protos import kv_transfer_pb2 as kv

_log = logging.getLogger(__name__)


class HandoffFailed(Exception):
    """Why the KV did not arrive, in the words of worker.proto's Failed."""

    def __init__(self, reason: inference_pb2.ErrorReason, message: str, retryable: bool):
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retryable = retryable


class Handoff:
    """The KVSink of one prompt: reserves pages just before the prompt is computed, pushes, commits."""

    def __init__(
        self,
        engine: Engine,
        peers: Peers,
        request: Request,
        run: tuple[str, int],
        target: kv.WorkerRef,
        reserve_timeout_s: float | None,
        on_failed: Callable[[HandoffFailed], None],
    ):
        """`reserve_timeout_s` bounds the wait for pages, None: as long as the run lasts. `on_failed` hears, on the loop
        and at most once, of what goes wrong before `commit`."""
        self._engine = engine
        self._peers = peers
        self._request = request
        self._run_id, self._attempt = run
        self._target = target
        self._reserve_timeout_s = reserve_timeout_s
        self._loop = asyncio.get_running_loop()
        self._reserving: asyncio.Task | None = None
        self._peer: Peer | None = None
        self._transfer_id = b""
        self._outgoing: Outgoing | None = None
        self._is_posted = False  # a commit, of which `commit` tells how it went
        self._committed = False
        self._closed = False
        self._on_failed = on_failed
        self._failed = False
        self.cached_tokens = 0
        self._token_hash = b""
        self._first_tokens: list[Token] = []  # engine thread only

    # KVSink, on the engine thread

    @property
    def receiver(self) -> str:
        return self._target.worker_id

    def wanted(self) -> None:
        self._loop.call_soon_threadsafe(self._start_reserving)

    def ready(
        self,
        block_ids: Sequence[int],
        block_start: int,
        layer_start: int,
        layer_stop: int,
        after: ReadyEvent | None = None,
    ) -> None:
        outgoing = self._outgoing
        if outgoing is not None and not self._closed:
            outgoing.push(block_ids, block_start, layer_start, layer_stop, after)
            layout, num_tokens = self._engine.layout, len(self._request.token_ids)
            if layer_stop == layout.num_layers and (block_start + len(block_ids)) * layout.block_size >= num_tokens:
                outgoing.end()

    def sampled(self, token: Token) -> None:
        """With the last one the commit goes out. The loop awaits its answer."""
        self._first_tokens.append(token)
        is_all = len(self._first_tokens) == self._request.sampling.num_sequences
        if is_all and has_more(self._first_tokens) and not self._closed and not self._failed:
            assert self._outgoing is not None and self._peer is not None, "the engine computes only granted prompts"
            self._is_posted = True
            self._peer.post_commit(self._transfer_id, self._outgoing, self._claim(self._first_tokens))

    # On the loop

    @property
    def num_bytes(self) -> int:
        """KV bytes that left here for this prompt, adopted or not."""
        return self._outgoing.num_bytes if self._outgoing is not None else 0

    @property
    def transport(self) -> str:
        """What it goes over; empty before the handshake."""
        return self._peer.transport if self._peer is not None else ""

    async def commit(self, first_tokens: Sequence[Token]) -> None:
        """Returns once the decode worker has verified and adopted. Raises HandoffFailed."""
        assert self._outgoing is not None and self._peer is not None, "the engine computes only granted prompts"
        try:
            await self._peer.commit(self._transfer_id, self._outgoing, self._claim(first_tokens))
        except TransferError as error:
            raise _failed(error, self._target) from error
        except PeerUnavailable as error:
            raise HandoffFailed(inference_pb2.ERROR_REASON_DECODE_WORKER_LOST, str(error), True) from error
        except grpc.aio.AioRpcError as error:
            raise _from_status(error, self._target) from error
        self._committed = True

    async def abandon(self) -> None:
        """Every sequence ended with its first token: nothing is left to adopt. `num_bytes` is final afterwards."""
        if self._outgoing is not None:
            self._outgoing.abort("the first token was the last")
            await self._outgoing.wait_closed()

    async def close(self) -> None:
        """Gives up what is held at the receiver unless committed; afterwards no page here is read any more."""
        self._closed = True
        if self._reserving is not None and not self._reserving.done():
            self._reserving.cancel()
            await asyncio.gather(self._reserving, return_exceptions=True)
        if self._outgoing is not None:
            if not self._committed:
                self._outgoing.abort("given up")
            await self._outgoing.wait_closed()
        if self._peer is not None and self._transfer_id and not self._committed:
            await self._peer.release(self._transfer_id, "given up by the prefill worker")

    def _claim(self, first_tokens: Sequence[Token]) -> kv.CommitRequest:
        """Number and hash of the tokens whose KV it is, and each sequence's first one."""
        token_ids = self._request.token_ids
        tokens = sorted(first_tokens, key=lambda token: token.sequence_index)
        adopted = [kv.AdoptedToken(token_id=token.token_id, finished=token.finish is not None) for token in tokens]
        known = self._token_hash or token_hash(token_ids)
        return kv.CommitRequest(num_tokens=len(token_ids), token_hash=known, first_tokens=adopted)

    def _start_reserving(self) -> None:
        if not self._closed and self._reserving is None:
            self._reserving = asyncio.create_task(self._reserve())
            self._reserving.add_done_callback(self._reserved)

    async def _reserve(self) -> None:
        try:
            self._peer = await self._peers.connect(self._target)
            answer = await self._peer.stub.Reserve(
                kv.ReserveRequest(
                    run_id=self._run_id,
                    attempt=self._attempt,
                    source=self._peers.source,
                    target=self._target,
                    num_tokens=len(self._request.token_ids),
                    transport=self._peer.link.transport,
                    block_size=self._engine.layout.block_size,
                ),
                timeout=self._reserve_timeout_s,
            )
            self._begin(self._peer, answer)
        except TransferError as error:
            self._fail(_failed(error, self._target))
        except PeerIncompatible as error:
            self._fail(HandoffFailed(inference_pb2.ERROR_REASON_INCOMPATIBLE_WORKERS, str(error), False))
        except PeerUnavailable as error:
            self._fail(HandoffFailed(inference_pb2.ERROR_REASON_DECODE_WORKER_LOST, str(error), True))
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                text = f"{self._target.worker_id} had no pages for it within {self._reserve_timeout_s:g} s"
                self._fail(HandoffFailed(inference_pb2.ERROR_REASON_NO_GRANT, text, True))
            else:
                self._fail(_from_status(error, self._target))
        except asyncio.CancelledError:
            # Not by us: the peer left the membership, and its channel was closed under the call.
            text = f"{self._target.worker_id} left while it was asked for pages"
            self._fail(HandoffFailed(inference_pb2.ERROR_REASON_DECODE_WORKER_LOST, text, True))
            raise

    def _begin(self, peer: Peer, answer: kv.ReserveResponse) -> None:
        self._transfer_id = answer.transfer_id
        self.cached_tokens = answer.cached_tokens
        peer.hold(answer.transfer_id, answer.lease_ms / 1000, self._peers.source, self._lease_lost)
        self._outgoing = peer.open(answer.transfer_id, placement_from_pb(answer))
        self._engine.grant(self._request.id, answer.cached_tokens // self._engine.layout.block_size)
        self._token_hash = token_hash(self._request.token_ids)  # while it is computed, not behind it

    def _lease_lost(self) -> None:
        message = f"the lease of the pages at {self._target.worker_id} is over"
        self._fail(HandoffFailed(inference_pb2.ERROR_REASON_KV_TRANSFER_FAILED, message, True))

    def _reserved(self, task: asyncio.Task) -> None:
        """A bug in reserving must end the run, not leave it waiting for its deadline."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("reserving for %s failed", self._request.id, exc_info=error)
            self._fail(HandoffFailed(inference_pb2.ERROR_REASON_INTERNAL, f"{type(error).__name__}: {error}", True))

    def _fail(self, error: HandoffFailed) -> None:
        if not self._failed and not self._is_posted:
            self._failed = True
            self._on_failed(error)


def has_more(first_tokens: Sequence[Token]) -> bool:
    """Whether anything is left to decode behind them."""
    return any(token.finish is None for token in first_tokens)


def _failed(error: TransferError, target: kv.WorkerRef) -> HandoffFailed:
    reason = (
        inference_pb2.ERROR_REASON_KV_TRANSFER_CORRUPT
        if isinstance(error, TransferCorrupt)
        else inference_pb2.ERROR_REASON_KV_TRANSFER_FAILED
    )
    return HandoffFailed(reason, f"KV transfer to {target.worker_id}: {error}", True)


def _from_status(error: grpc.aio.AioRpcError, target: kv.WorkerRef) -> HandoffFailed:
    """What a refused Reserve or Commit means for the run."""
    code, text = error.code(), f"{target.worker_id}: {error.details()}"
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return HandoffFailed(inference_pb2.ERROR_REASON_INCOMPATIBLE_WORKERS, text, False)
    if code == grpc.StatusCode.DATA_LOSS:
        return HandoffFailed(inference_pb2.ERROR_REASON_KV_TRANSFER_CORRUPT, text, True)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return HandoffFailed(inference_pb2.ERROR_REASON_KV_CACHE_EXHAUSTED, text, False)
    if code == grpc.StatusCode.UNAVAILABLE:
        return HandoffFailed(inference_pb2.ERROR_REASON_DECODE_WORKER_LOST, text, True)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return HandoffFailed(inference_pb2.ERROR_REASON_KV_TRANSFER_FAILED, f"{text} (no answer in time)", True)
    return HandoffFailed(inference_pb2.ERROR_REASON_KV_TRANSFER_FAILED, f"{code.name}: {text}", True)
