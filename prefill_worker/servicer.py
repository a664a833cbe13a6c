"""The prefill half of a request's life.

Life of a request here
1. Prefill(request, target) arrives; the engine takes the prompt as a gated sink prompt.
2. Its turn comes near: the engine asks (`wanted`), pages are reserved at the target, the gate opens (`grant`).
3. The prompt is computed in chunks beside others; each finished layer range is pushed while the next is computed.
4. The first token of each sequence is sampled and goes to the router at once.
5. Meanwhile Commit carries the manifest; the target verifies it and adopts. Between workers of one host the engine's
   thread has sent it before the event loop hears of the token.
6. The prompt's blocks here are released and stay as prefix cache.
A run whose sequences all end with their first token gives its pages up instead of step 5.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from engine.dispatch import Dispatcher
from engine.engine import Engine
from engine.request import Event, Failed, Request, Started, Token
from engine.wire import first_token_to_pb, request_from_pb
from kv_transfer.peers import Peers
from prefill_worker.handoff import Handoff, HandoffFailed, has_more
from protos import inference_pb2, worker_pb2, worker_pb2_grpc


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    """PrefillService over an engine. `draining` refuses new runs; `idle` is set while none is here."""

    def __init__(self, engine: Engine, dispatcher: Dispatcher, peers: Peers):
        self._engine = engine
        self._dispatcher = dispatcher
        self._peers = peers
        self._closing: set[asyncio.Task] = set()
        self.draining = False
        self.num_runs = 0
        self.num_handoffs = 0
        self.bytes_sent = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def Prefill(
        self, message: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.PrefillEvent]:
        if self.draining:
            yield _failed(inference_pb2.ERROR_REASON_DRAINING, "the prefill worker is draining", True)
            return
        try:
            request = request_from_pb(message.request)
        except ValueError as error:
            yield _failed(inference_pb2.ERROR_REASON_INVALID_PARAMETER, str(error), False)
            return
        events: asyncio.Queue[Event | HandoffFailed] = asyncio.Queue()
        handoff = self._handoff(message, request, events.put_nowait) if message.HasField("target") else None
        try:
            self._engine.submit(request, handoff)
        except ValueError as error:
            yield _failed(inference_pb2.ERROR_REASON_KV_CACHE_EXHAUSTED, str(error), False)
            return
        # Before the loop runs again, so before the first event can be delivered.
        self._dispatcher.add(request.id, events.put_nowait)
        self.num_runs += 1
        self.num_handoffs += handoff is not None
        self.idle.clear()
        try:
            async for event in self._run(request, handoff, events):
                yield event
        except HandoffFailed as error:
            yield _failed(error.reason, error.message, error.retryable, handoff)
        finally:
            # The handler may be running because the call was cancelled: what is held must still be given back, and in
            # order, so it is a task of its own.
            task = asyncio.create_task(self._close(request, handoff))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _run(
        self, request: Request, handoff: Handoff | None, events: asyncio.Queue[Event | HandoffFailed]
    ) -> AsyncIterator[worker_pb2.PrefillEvent]:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        tokens: list[Token] = []
        while len(tokens) < request.sampling.num_sequences:
            match await events.get():
                case Started(num_cached_tokens=num_cached, num_returned_tokens=num_returned):
                    started_at = loop.time()
                    started = worker_pb2.PrefillStarted(cached_tokens=num_cached, returned_tokens=num_returned)
                    yield worker_pb2.PrefillEvent(started=started)
                case Token() as token:
                    tokens.append(token)
                case Failed() as lost:
                    yield _failed(f"ERROR_REASON_{lost.reason}", lost.message, lost.retryable, handoff)
                    return
                case HandoffFailed() as error:
                    raise error
        tokens.sort(key=lambda token: token.sequence_index)
        first = worker_pb2.FirstTokens(tokens=[first_token_to_pb(token, request.sampling.seed) for token in tokens])
        first.prefill.FromNanoseconds(int((loop.time() - started_at) * 1e9))
        if handoff is None:
            yield worker_pb2.PrefillEvent(first_tokens=first)
            return
        ending = asyncio.create_task(_end(handoff, tokens))  # while the first tokens are being written
        ending.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            yield worker_pb2.PrefillEvent(first_tokens=first)
            await ending
        finally:
            ending.cancel()
        yield worker_pb2.PrefillEvent(
            transferred=worker_pb2.Transferred(
                num_bytes=handoff.num_bytes, transport=handoff.transport, cached_tokens=handoff.cached_tokens
            )
        )

    async def _close(self, request: Request, handoff: Handoff | None) -> None:
        self._dispatcher.remove(request.id)
        try:
            if handoff is not None:
                await handoff.close()
                self.bytes_sent += handoff.num_bytes
        finally:
            # Only now may the pages be handed to others: the transport no longer reads them.
            self._engine.abort(request.id)
            self.num_handoffs -= handoff is not None
            self.num_runs -= 1
            if self.num_runs == 0:
                self.idle.set()

    def _handoff(
        self, message: worker_pb2.PrefillRequest, request: Request, on_failed: Callable[[HandoffFailed], None]
    ) -> Handoff:
        run = message.request
        return Handoff(
            engine=self._engine,
            peers=self._peers,
            request=request,
            run=(run.run_id, run.attempt),
            target=message.target,
            reserve_timeout_s=message.grant_within.ToNanoseconds() / 1e9 if message.HasField("grant_within") else None,
            on_failed=on_failed,
        )


async def _end(handoff: Handoff, tokens: Sequence[Token]) -> None:
    """Hands over what decodes on, or gives it up if nothing does. Raises HandoffFailed."""
    await (handoff.commit(tokens) if has_more(tokens) else handoff.abandon())


def _failed(
    reason: inference_pb2.ErrorReason | str, message: str, retryable: bool, handoff: Handoff | None = None
) -> worker_pb2.PrefillEvent:
    num_bytes = handoff.num_bytes if handoff is not None else 0
    return worker_pb2.PrefillEvent(
        failed=worker_pb2.Failed(reason=reason, message=message, retryable=retryable, num_bytes=num_bytes)
    )
