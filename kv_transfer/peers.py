"""The workers that a worker sends KV to: membership, handshake, leases.

A peer is one incarnation of a worker. Its address comes from membership, never from a request; a restarted worker is
a new peer with a new handshake.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

import grpc

from kv_transfer import locality
from kv_transfer.base import (
    PROTOCOL_VERSION,
    Answer,
    Endpoint,
    Link,
    Manifest,
    Outgoing,
    Placement,
    TransferCorrupt,
    TransferRefused,
    TransferUnfit,
)
from kv_transfer.choose import ONE_SIDED
from kv_transfer.create import Transports
from kv_transfer.open_transfers import OpenTransfers
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc
from protos import worker_pb2
from protos.grpc_options import CHANNEL_OPTIONS

HANDSHAKE_TIMEOUT_S = 5.0
# Membership reaches the router and the workers at about the same time, not at the same instant.
MEMBERSHIP_LAG_S = 2.0
# Commit answers once the receiver has checked every byte, so it may wait for chunks still on the wire.
COMMIT_TIMEOUT_S = 30.0
# A commit that the control socket has not answered by then is asked for over gRPC too, which repeats the answer, and
# whose keepalive notices a peer that has stopped.
COMMIT_PATIENCE_S = 1.0
RELEASE_TIMEOUT_S, RELEASE_TRIES = 2.5, 2
# Transfers in a row that were not verified, for which their transport is to blame, until it is not used any more with
# this peer; the first one of all suffices.
MAX_UNFIT = 2
_UNFIT = (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.INTERNAL)
_OF_NO_TOKENS = kv.CommitRequest()  # of a test transfer
_log = logging.getLogger(__name__)


class PeerUnavailable(Exception):
    """The worker is not a member, or does not answer."""


class PeerIncompatible(Exception):
    """The worker's KV means something else (model, weights, layout, protocol), or no transport is shared."""


class Peer:
    """One incarnation of a worker, past its handshake: a channel, the link that KV takes, the leases held there.

    `why` says what was passed over for the link's transport.
    """

    def __init__(
        self,
        ref: kv.WorkerRef,
        channel: grpc.aio.Channel,
        link: Link,
        why: str,
        block_size: int,
        transfers: OpenTransfers,
        transport: str = "",
    ):
        self.ref = ref
        self.link = link
        self.transport = transport or link.transport  # as status and timings say it: with what happens on the way
        self.block_size = block_size  # tokens per block there
        self.why = why
        self.gb_per_s = 0.0  # of a verified test transfer; 0: not measured
        self._stub = kv_grpc.KvTransferServiceStub(channel)
        self._channel = channel
        self._transfers = transfers
        self._leases: dict[bytes, Callable[[], None]] = {}
        self._renewing: asyncio.Task | None = None
        self._unheard: dict[bytes, kv.ReleaseRequest] = {}  # fences of one-sided transfers, not answered yet
        self._repeating: asyncio.Task | None = None
        self.was_tried = False  # by a test transfer, to measure the link
        self.is_unfit: Callable[[str], None] | None = None  # told once, why the transport is not to be used any more
        self._num_unfit = MAX_UNFIT - 1  # transfers not verified since the last one that was
        self._is_closed = False

    @property
    def stub(self) -> kv_grpc.KvTransferServiceStub:
        """Raises PeerUnavailable once it has left the membership."""
        if self._is_closed:
            raise self._left()
        return self._stub

    def open(self, transfer_id: bytes, placement: Placement | None) -> Outgoing:
        """Begins the transfer of a grant of this peer. Raises TransferRefused."""
        return self._transfers.add(transfer_id, lambda: self.link.open(transfer_id, placement=placement))

    def hold(self, transfer_id: bytes, lease_s: float, source: kv.WorkerRef, lost: Callable[[], None]) -> None:
        """Renew the ticket's lease until `drop`; `lost` is called once if the receiver says it is over."""
        self._leases[transfer_id] = lost
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew(source, lease_s / 4))

    def drop(self, transfer_id: bytes) -> None:
        self._leases.pop(transfer_id, None)

    def post_commit(self, transfer_id: bytes, outgoing: Outgoing, claim: kv.CommitRequest) -> None:
        """On any thread: nothing more is pushed, and Commit goes out by itself where the link can send it so. `commit`
        with the same arguments, which must follow, hears the answer, or asks by a call."""
        outgoing.commit(lambda manifest: _filled(claim, transfer_id, manifest).SerializeToString())

    async def commit(self, transfer_id: bytes, outgoing: Outgoing, claim: kv.CommitRequest = _OF_NO_TOKENS) -> Manifest:
        """Ends the transfer; returns once the peer has verified every byte and taken it in. The lease is over then.

        `claim`: what the KV is of, its tokens and the first ones behind; transfer and manifest are filled in. Raises
        TransferError, PeerUnavailable, or the refusal's AioRpcError.
        """
        try:
            manifest = await self._commit(transfer_id, outgoing, claim)
        except (TransferCorrupt, TransferUnfit) as error:
            self._count_unfit(str(error))
            raise
        except grpc.aio.AioRpcError as error:
            if error.code() in _UNFIT:
                self._count_unfit(error.details() or error.code().name)
            raise
        self._num_unfit = 0
        self.drop(transfer_id)
        return manifest

    async def _commit(self, transfer_id: bytes, outgoing: Outgoing, claim: kv.CommitRequest) -> Manifest:
        self.post_commit(transfer_id, outgoing, claim)
        manifest = await outgoing.seal()
        answer = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COMMIT_PATIENCE_S):
                answer = await outgoing.commit_answer()
        if answer is not None:
            if answer.code:
                raise _refusal(answer)
            return manifest
        try:
            await self.stub.Commit(_filled(claim, transfer_id, manifest), timeout=COMMIT_TIMEOUT_S)
        except asyncio.CancelledError:
            if self._is_closed:  # its channel was closed under the call: no cancellation of ours
                raise self._left() from None
            raise
        return manifest

    def _count_unfit(self, why: str) -> None:
        self._num_unfit += 1
        if self._num_unfit >= MAX_UNFIT and self.is_unfit is not None:
            tell, self.is_unfit = self.is_unfit, None
            tell(f"a transfer was not verified: {why}")

    async def release(self, transfer_id: bytes, reason: str) -> None:
        """Gives a ticket up, as far as the peer can be told. The transfer must be closed: no write is in flight any
        more, and the receiver of a one-sided one waits to hear that: told again until it has heard."""
        self.drop(transfer_id)
        request = kv.ReleaseRequest(transfer_id=transfer_id, reason=reason, fenced=True)
        for _ in range(RELEASE_TRIES):
            if self._is_closed:
                return
            try:
                await self._stub.Release(request, timeout=RELEASE_TIMEOUT_S, wait_for_ready=True)
                return
            except grpc.aio.AioRpcError:
                continue
            except asyncio.CancelledError:
                if not self._is_closed:
                    raise
        if self.link.transport in ONE_SIDED:
            self._unheard[transfer_id] = request
            if self._repeating is None or self._repeating.done():
                self._repeating = asyncio.create_task(self._repeat())

    def _left(self) -> PeerUnavailable:
        return PeerUnavailable(f"worker {self.ref.worker_id} ({self.ref.incarnation}) has left")

    async def _repeat(self) -> None:
        """Until the receiver has heard every fence: its pages stay in quarantine as long."""
        while self._unheard:
            await asyncio.sleep(RELEASE_TIMEOUT_S)
            for transfer_id, request in list(self._unheard.items()):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._stub.Release(request, timeout=RELEASE_TIMEOUT_S)
                    del self._unheard[transfer_id]

    async def _renew(self, source: kv.WorkerRef, period_s: float) -> None:
        """Runs while leases are held. A peer that cannot be reached lets them expire; the push notices its death."""
        while self._leases:
            await asyncio.sleep(period_s)
            if not self._leases:
                return
            request = kv.HeartbeatRequest(source=source, transfer_ids=list(self._leases))
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await self._stub.Heartbeat(request, timeout=period_s)
                for transfer_id in answer.unknown_transfer_ids:
                    lost = self._leases.pop(transfer_id, None)
                    if lost is not None:
                        lost()

    async def close(self) -> None:
        self._is_closed = True
        if self._renewing is not None:
            self._renewing.cancel()
        if self._repeating is not None:
            self._repeating.cancel()
        await self.link.close()
        await self._channel.close(None)


def _filled(claim: kv.CommitRequest, transfer_id: bytes, manifest: Manifest) -> kv.CommitRequest:
    request = kv.CommitRequest(
        transfer_id=transfer_id,
        num_chunks=manifest.num_chunks,
        num_bytes=manifest.num_bytes,
        digest=manifest.digest,
    )
    request.MergeFrom(claim)
    return request


def _refusal(answer: Answer) -> grpc.aio.AioRpcError:
    """As the call would have ended."""
    code = next((code for code in grpc.StatusCode if code.value[0] == answer.code), grpc.StatusCode.UNKNOWN)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=answer.text)


class Peers:
    """Membership and the open peers; `connect` gives the handshaken peer for a reference."""

    def __init__(self, source: kv.WorkerRef, layout: kv.KvLayout, transports: Transports):
        self.source = source
        self.transfers = OpenTransfers()
        self._layout = layout
        self._transports = transports
        self._members: dict[str, worker_pb2.Member] = {}
        self._changed = asyncio.Condition()
        self._connecting: dict[tuple[str, str], asyncio.Task[Peer]] = {}
        self._unfit: dict[tuple[str, str], dict[str, str]] = {}  # transports to a peer, and why
        self._replaced: dict[tuple[str, str], list[Peer]] = {}  # that end what they have begun
        self._tasks: set[asyncio.Task] = set()

    def set_members(self, members: Iterable[worker_pb2.Member]) -> None:
        """On the loop. Channels to incarnations that left are closed; their transfers have died or soon will."""
        self._members = {member.worker_id: member for member in members}
        for key in [key for key in self._connecting if not self.is_member(*key)]:
            self._spawn(self._close(self._connecting.pop(key)))
            self._unfit.pop(key, None)
            for peer in self._replaced.pop(key, ()):
                self._spawn(peer.close())
        self._spawn(self._announce())

    def find(self, worker_id: str) -> kv.WorkerRef:
        """Raises PeerUnavailable."""
        member = self._members.get(worker_id)
        if member is None:
            raise PeerUnavailable(f"worker {worker_id} is not a member; members: {sorted(self._members)}")
        return kv.WorkerRef(worker_id=worker_id, incarnation=member.incarnation)

    def is_member(self, worker_id: str, incarnation: str) -> bool:
        """Whether membership knows this incarnation now."""
        member = self._members.get(worker_id)
        return member is not None and member.incarnation == incarnation

    def address(self, worker_id: str, incarnation: str) -> str:
        """Of that incarnation; empty if it is no member."""
        return self._members[worker_id].address if self.is_member(worker_id, incarnation) else ""

    async def connect(self, ref: kv.WorkerRef) -> Peer:
        """Raises PeerUnavailable or PeerIncompatible."""
        key = (ref.worker_id, ref.incarnation)
        try:
            async with asyncio.timeout(MEMBERSHIP_LAG_S), self._changed:
                await self._changed.wait_for(lambda: self.is_member(*key))
        except TimeoutError:
            raise PeerUnavailable(f"worker {ref.worker_id} ({ref.incarnation}) is not a member") from None
        task = self._connecting.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._connecting[key] = asyncio.create_task(self._handshake(ref))
        return await asyncio.shield(task)

    def met(self) -> list[Peer]:
        """Peers past their handshakes."""
        done = [task for task in self._connecting.values() if task.done() and not task.cancelled()]
        return [task.result() for task in done if task.exception() is None]

    async def close(self) -> None:
        for task in list(self._connecting.values()):
            await self._close(task)
        self._connecting.clear()
        for peer in (peer for replaced in self._replaced.values() for peer in replaced):
            await peer.close()
        self._replaced.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handshake(self, ref: kv.WorkerRef) -> Peer:
        address = self._members[ref.worker_id].address
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        request = kv.HandshakeRequest(
            source=self.source,
            protocol_version=PROTOCOL_VERSION,
            layout=self._layout,
            transports=self._transports.speaks,
            process=locality.process(),
        )
        stub = kv_grpc.KvTransferServiceStub(channel)
        try:
            answer = await stub.Handshake(request, timeout=HANDSHAKE_TIMEOUT_S, wait_for_ready=True)
            if answer.target != ref:
                raise PeerUnavailable(f"{address} is worker {answer.target.worker_id} ({answer.target.incarnation})")
            endpoints = [Endpoint(one.transport, one.locality, one.data) for one in answer.endpoints]
            is_rounded = answer.layout.fingerprint != self._layout.fingerprint
            unfit = self._unfit.get((ref.worker_id, ref.incarnation), {})
            connection = await self._transports.connect(address, endpoints, answer.layout.block_size, is_rounded, unfit)
        except BaseException as error:
            await channel.close(None)
            if isinstance(error, TransferRefused):
                raise PeerIncompatible(str(error)) from error
            if not isinstance(error, grpc.aio.AioRpcError):
                raise
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise PeerIncompatible(error.details()) from error
            raise PeerUnavailable(f"worker {ref.worker_id} at {address}: {error.code().name}") from error
        said = f"{connection.link.transport} as {answer.layout.kv_dtype}" if is_rounded else ""
        peer = Peer(ref, channel, connection.link, connection.why, answer.layout.block_size, self.transfers, said)
        if connection.link.transport not in unfit:  # else it is the only one
            peer.is_unfit = lambda why: self._replace(peer, why)
        _log.info("KV to %s goes over %s; %s", ref.worker_id, peer.transport, peer.why or "nothing passed over")
        return peer

    def _replace(self, peer: Peer, why: str) -> None:
        """Shakes hands again, for another transport where there is one; what `peer` has begun goes its way."""
        key = (peer.ref.worker_id, peer.ref.incarnation)
        task = self._connecting.get(key)
        if task is None or not task.done() or task.cancelled() or task.exception() or task.result() is not peer:
            return  # it has left
        _log.warning("KV to %s: %s: %s", peer.ref.worker_id, peer.link.transport, why)
        self._unfit.setdefault(key, {})[peer.link.transport] = why
        self._replaced.setdefault(key, []).append(peer)
        self._connecting[key] = handshake = asyncio.create_task(self._handshake(peer.ref))
        handshake.add_done_callback(lambda done: done.cancelled() or done.exception())  # who connects tries again

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _close(self, task: asyncio.Task[Peer]) -> None:
        """Of a handshake that failed, whoever asked for it has heard."""
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            await task.result().close()

    def _spawn(self, coroutine) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
