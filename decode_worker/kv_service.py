"""KvTransferService: the receiving side's control plane, for every transport.

Handshake once per peer, then per run: Reserve -> (chunks, by the transport) -> Commit, or Release. On the way back,
from a decode to a prefill worker, Offer takes the place of Reserve. Commit comes as a call or, between workers of one
host that have a control socket, over that; both find the same task.
"""

import asyncio
import contextlib
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import grpc

from decode_worker.decoder import Decoder
from decode_worker.fencing import Fencing
from decode_worker.runs import Run, RunState
from engine.request import FirstToken, Request, SamplingParams
from kv_transfer.base import PROTOCOL_VERSION, Answer, TransferError
from kv_transfer.create import Transports
from kv_transfer.placement import placement_to_pb
from kv_transfer.refusal import Refusal, answer, check_target, manifest_of, verify
from kv_transfer.two_sided import MAX_CHUNK_BYTES
from kv_transfer.writers import Writers
from protos import inference_pb2
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc

LEASE_S = 10.0
# A Reserve may overtake its Expect, which comes from another machine.
EXPECT_LAG_S = 1.0
MAX_COMMIT_ANSWERS = 4096
CANARY_PRIORITY = 2**31 - 1  # after every request
_log = logging.getLogger(__name__)


class Offers(Protocol):
    """Who takes KV for this worker's prefix cache (prefill_worker/offers.py). `offer` and `commit` raise Refusal."""

    def __contains__(self, transfer_id: bytes) -> bool: ...
    async def offer(self, request: kv.OfferRequest) -> kv.OfferResponse: ...
    async def commit(self, request: kv.CommitRequest) -> kv.CommitResponse: ...
    def release(self, transfer_id: bytes) -> bool: ...
    def expire(self, owners: set[str]) -> None: ...


class KvTransferServicer(kv_grpc.KvTransferServiceServicer):
    def __init__(
        self,
        decoder: Decoder,
        offers: Offers,
        me: kv.WorkerRef,
        layout: kv.KvLayout,
        transports: Transports,
        writers: Writers,
        fencing: Fencing,
    ):
        self._decoder = decoder
        self._offers = offers
        self._me = me
        self._layout = layout
        self._transports = transports
        self._writers = writers
        self._fencing = fencing
        self._loop = asyncio.get_running_loop()
        self._commits: OrderedDict[bytes, asyncio.Task[kv.CommitResponse]] = OrderedDict()
        self._canaries: dict[bytes, str] = {}  # ticket -> engine owner

    async def Handshake(self, request, context) -> kv.HandshakeResponse:
        ours = kv.HandshakeResponse(
            target=self._me,
            protocol_version=PROTOCOL_VERSION,
            layout=self._layout,
            endpoints=[
                kv.Endpoint(transport=one.transport, locality=one.locality, data=one.data)
                for one in self._transports.endpoints
            ],
            max_chunk_bytes=MAX_CHUNK_BYTES,
        )
        if request.protocol_version != PROTOCOL_VERSION:
            text = f"protocol_version: {request.source.worker_id} has {request.protocol_version}, "
            text += f"{self._me.worker_id} has {PROTOCOL_VERSION}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        if not set(request.transports) & set(self._transports.speaks):
            text = f"transport: {request.source.worker_id} has {', '.join(request.transports)}, "
            text += f"{self._me.worker_id} has {', '.join(self._transports.speaks)}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        if self._layout.fingerprint not in (request.layout.fingerprint, request.layout.float8_fingerprint):
            text = f"KV layouts differ: {request.source.worker_id} has {_describe(request.layout)}; "
            text += f"{self._me.worker_id} has {_describe(self._layout)}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        self._writers.met(request)
        return ours

    async def Reserve(self, request, context) -> kv.ReserveResponse:
        return await answer(context, lambda: self._reserve(request))

    async def Commit(self, request, context) -> kv.CommitResponse:
        """Shielded: a caller that goes away does not leave the run half adopted."""
        return await answer(context, lambda: asyncio.shield(self._committing(request)))

    def commit_from_socket(self, request: kv.CommitRequest, tell: Callable[[Answer], None]) -> None:
        """On the control server's thread (kv_transfer/control_server.py). `tell` hears what the call would answer.

        What is verified already is adopted from here. The loop does the rest when the engine has answered, or finds
        again what is wrong, and says so: until the first step is launched it would only want Python's lock."""
        run = self._decoder.runs.by_transfer(request.transfer_id)

        def begin() -> None:
            self._committing(request, run).add_done_callback(lambda task: tell(_answer(task)))

        def wake(_: object = None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the socket will be, too
                self._loop.call_soon_threadsafe(begin)

        try:
            adopting = self._adopt_early(run, request) if run is not None else None
        except (Refusal, TransferError, KeyError):
            adopting = None
        if adopting is None:
            wake()
        else:
            adopting.add_done_callback(wake)

    async def Heartbeat(self, request, context) -> kv.HeartbeatResponse:
        unknown = self._decoder.receiver.heartbeat(list(request.transfer_ids))
        return kv.HeartbeatResponse(unknown_transfer_ids=unknown)

    async def Release(self, request, context) -> kv.ReleaseResponse:
        """The prefill worker gives up. It has told the router why, or will be missed there; the run leaves silently."""
        run = self._decoder.runs.by_transfer(request.transfer_id)
        owner = self._canaries.pop(request.transfer_id, None)
        found = owner is not None
        if run is not None and run.state is RunState.GRANTED:
            self._decoder.end(run)
            found = True
        elif self._offers.release(request.transfer_id):
            found = True
        elif owner is not None:
            self._free_canary(request.transfer_id, owner)
        if request.fenced:
            self._fencing.fence(request.transfer_id)
        return kv.ReleaseResponse(found=found)

    async def Fence(self, request, context) -> kv.FenceResponse:
        return await answer(context, lambda: self._fencing.answer(request))

    async def Offer(self, request, context) -> kv.OfferResponse:
        return await answer(context, lambda: self._offers.offer(request))

    async def Canary(self, request, context) -> kv.CanaryResponse:
        return await answer(context, lambda: self._grant_canary(request))

    # Reserve

    async def _reserve(self, request: kv.ReserveRequest) -> kv.ReserveResponse:
        writer = self._writers.find(request)
        run = await self._expected(request)
        try:
            reservation = await self._decoder.reserve(run, request.num_tokens, request.block_size)
        except ValueError as error:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        except asyncio.CancelledError:
            if run.state is RunState.RESERVING:  # the caller gave up waiting; the run may be reserved for again
                self._decoder.engine.release(run.owner)
                run.state = RunState.EXPECTED
                raise
            raise Refusal(grpc.StatusCode.ABORTED, "the run ended while it waited for pages") from None
        if run.state is not RunState.RESERVING:
            self._decoder.engine.release(run.owner)
            raise Refusal(grpc.StatusCode.ABORTED, "the run ended while it waited for pages")
        block_size = self._decoder.engine.layout.block_size
        num_blocks = -(-request.num_tokens // block_size)
        try:
            transfer_id = self._decoder.receiver.grant(
                owner=run.owner,
                source=(request.source.worker_id, request.source.incarnation),
                block_ids=reservation.block_ids[:num_blocks],
                first_block=reservation.num_cached_tokens // block_size,
                lease_s=LEASE_S,
                writer=writer,
                sent=(request.block_size, request.num_tokens),
            )
        except MemoryError as error:
            self._decoder.engine.release(run.owner)
            run.state = RunState.EXPECTED
            raise Refusal(grpc.StatusCode.ABORTED, str(error)) from error
        self._decoder.runs.granted(run, transfer_id)
        self._loop.call_soon(run.token_hash)  # behind the answer, not between commit and adoption
        return kv.ReserveResponse(
            transfer_id=transfer_id,
            cached_tokens=reservation.num_cached_tokens,
            num_blocks=num_blocks,
            lease_ms=int(LEASE_S * 1000),
            placement=placement_to_pb(self._decoder.receiver.placement(transfer_id)),
        )

    async def _expected(self, request: kv.ReserveRequest) -> Run:
        check_target(request.target, self._me)
        run = await self._decoder.runs.wait_for(request.run_id, request.attempt, EXPECT_LAG_S)
        if run is None:
            over = self._decoder.runs.is_over(request.run_id, request.attempt)
            text = "is over here" if over else f"was not announced within {EXPECT_LAG_S:g} s"
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"attempt {request.attempt} of run {request.run_id} {text}")
        if run.source != request.source:
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"run {run.run_id} expects another prefill worker")
        if run.state is not RunState.EXPECTED:
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, f"run {run.run_id} is {run.state.name}: one Reserve a run")
        if request.num_tokens != len(run.request.token_ids):
            text = f"num_tokens {request.num_tokens} is not the run's {len(run.request.token_ids)}"
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)
        return run

    # Commit

    def _committing(self, request: kv.CommitRequest, run: Run | None = None) -> "asyncio.Task[kv.CommitResponse]":
        """Whoever asks, however often: the first request is carried out, and its answer repeated. `run`: that the
        request was for when it came; adopted since, it may have ended with its first step."""
        task = self._commits.get(request.transfer_id)
        if task is None:
            task = self._commits[request.transfer_id] = asyncio.create_task(self._commit(request, run))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            while len(self._commits) > MAX_COMMIT_ANSWERS:
                self._commits.popitem(last=False)
        return task

    async def _commit(self, request: kv.CommitRequest, run: Run | None) -> kv.CommitResponse:
        owner = self._canaries.pop(request.transfer_id, None)
        if owner is not None:
            try:
                await verify(self._decoder.receiver, request)
            finally:
                self._free_canary(request.transfer_id, owner)
            return kv.CommitResponse(num_bytes=request.num_bytes)
        if request.transfer_id in self._offers:
            return await self._offers.commit(request)
        if run is None or run.adopting is None:
            run = self._decoder.runs.by_transfer(request.transfer_id)
        if run is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "no such transfer: it expired, was cancelled or never existed")
        try:
            self._check_claims(run, request)
            await verify(self._decoder.receiver, request)
        except Refusal as refusal:
            corrupt = refusal.code == grpc.StatusCode.DATA_LOSS
            reason = (
                inference_pb2.ERROR_REASON_KV_TRANSFER_CORRUPT
                if corrupt
                else inference_pb2.ERROR_REASON_KV_TRANSFER_FAILED
            )
            self._decoder.fail(run, reason, refusal.message, True)
            raise
        try:
            await self._decoder.adopt(run, _first_tokens(request))
        except (KeyError, ValueError) as error:
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"the run ended before its KV was adopted: {error}") from None
        return kv.CommitResponse(num_bytes=request.num_bytes)

    def _adopt_early(self, run: Run, request: kv.CommitRequest) -> "Future[None] | None":
        """On any thread, without waiting: None, if it would have to. Raises what else keeps it from adopting now."""
        self._check_claims(run, request)
        if not self._decoder.receiver.settle(request.transfer_id, manifest_of(request)):
            return None
        return self._decoder.begin_adoption(run, _first_tokens(request))

    def _check_claims(self, run: Run, request: kv.CommitRequest) -> None:
        token_ids = run.request.token_ids
        if request.num_tokens != len(token_ids) or request.token_hash != run.token_hash():
            raise Refusal(grpc.StatusCode.DATA_LOSS, f"the KV is of other tokens than run {run.run_id} has")
        if len(request.first_tokens) != run.request.sampling.num_sequences:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "one first token per sequence is needed")

    # Canary

    async def _grant_canary(self, request: kv.CanaryRequest) -> kv.CanaryResponse:
        engine, writer = self._decoder.engine, self._writers.find(request)
        owner = f"canary:{uuid.uuid4().hex}"
        probe = canary_request(owner, request.num_blocks * request.block_size - 1)
        try:
            reservation = await asyncio.wrap_future(engine.reserve(owner, probe, len(probe.token_ids)))
        except ValueError as error:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        except asyncio.CancelledError:  # nobody waits for it any more: it must not hold its place before requests
            engine.release(owner)
            raise
        source = (request.source.worker_id, request.source.incarnation)
        sent = (request.block_size, len(probe.token_ids))
        try:
            transfer_id = self._decoder.receiver.grant(
                owner, source, reservation.block_ids, 0, LEASE_S, writer, sent, is_test=True
            )
        except MemoryError as error:
            engine.release(owner)
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        self._canaries[transfer_id] = owner
        placement = placement_to_pb(self._decoder.receiver.placement(transfer_id))
        return kv.CanaryResponse(transfer_id=transfer_id, num_blocks=request.num_blocks, placement=placement)

    def expire(self, owners: set[str]) -> None:
        """The tickets of these owners have ended: canaries and offers among them give their pages back."""
        self._offers.expire(owners)
        for transfer_id, owner in list(self._canaries.items()):
            if owner in owners:
                del self._canaries[transfer_id]
                self._free_canary(transfer_id, owner)

    def _free_canary(self, transfer_id: bytes, owner: str) -> None:
        self._decoder.receiver.release(transfer_id)
        if transfer_id in self._decoder.receiver.quarantine:
            self._decoder.engine.quarantine(owner)
        else:
            self._decoder.engine.release(owner)


def _first_tokens(request: kv.CommitRequest) -> list[FirstToken]:
    return [FirstToken(token.token_id, token.finished) for token in request.first_tokens]


def _answer(task: "asyncio.Task[kv.CommitResponse]") -> Answer:
    """What gRPC would make of it."""
    if task.cancelled():
        return Answer(grpc.StatusCode.CANCELLED.value[0], "the receiver stops")
    error = task.exception()
    if error is None:
        return Answer(grpc.StatusCode.OK.value[0])
    if isinstance(error, Refusal):
        return Answer(error.code.value[0], error.message)
    _log.error("a commit failed", exc_info=error)
    return Answer(grpc.StatusCode.UNKNOWN.value[0], f"{type(error).__name__}: {error}")


def canary_request(owner: str, num_tokens: int) -> Request:
    """A request that only ever reserves: its pages carry test bytes and never become prefix cache."""
    return Request(
        id=owner,
        token_ids=(0,) * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=1),
        priority=CANARY_PRIORITY,
        use_prefix_cache=False,
    )


def _describe(layout: kv.KvLayout) -> str:
    groups = ", ".join(
        f"{g.num_layers} layers of {g.num_kv_heads} heads x {g.key_dim}+{g.value_dim}" for g in layout.groups
    )
    kept = f" with KV in {layout.kv_dtype}" if layout.kv_dtype != layout.dtype else ""
    return (
        f"model {layout.model!r} (weights {layout.weights_digest[:12]}, rope {layout.rope_digest[:12]}), "
        f"{layout.dtype}{kept}, blocks of {layout.block_size} tokens, {groups}"
    )
