"""What decode workers offer to this worker's prefix cache: the receiving half of the way back.

    Offer --(all here)--> answered without a ticket
      |  --(busy)-------> refused, at once
      +--> GRANTED --chunks, Commit verifies--> inserted: visible to the next prompt
              +--> released, expired, corrupt --> its blocks are free again, wiped

An offer waits for nothing and takes blocks only where they are plenty (engine/loans.py). The tokens come with it and
their hashes are computed here, so what becomes visible is filed under what it was said to be the KV of, within the
namespace; that the bytes are that KV is the word of a member worker, as it is when a prompt's KV goes the other way.
"""

import asyncio
import math
import uuid
from dataclasses import dataclass

import grpc

from engine.engine import Engine
from engine.prefix import block_hashes
from engine.wire import token_hash
from kv_transfer.peers import Peers
from kv_transfer.placement import placement_to_pb
from kv_transfer.receiver import Receiver
from kv_transfer.refusal import Refusal, check_target, verify
from kv_transfer.writers import Writers
from protos import kv_transfer_pb2 as kv

LEASE_S = 10.0
MAX_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Granted:
    owner: str  # of the engine's loan
    num_tokens: int
    token_hash: bytes


class Offers:
    """On one event loop. `is_open` False refuses all new ones: the policy is off, or the worker drains."""

    def __init__(self, engine: Engine, receiver: Receiver, peers: Peers, writers: Writers, is_open: bool):
        self.is_open = is_open
        self._engine = engine
        self._receiver = receiver
        self._peers = peers
        self._writers = writers
        self._granted: dict[bytes, Granted] = {}

    def __contains__(self, transfer_id: bytes) -> bool:
        return transfer_id in self._granted

    async def offer(self, request: kv.OfferRequest) -> kv.OfferResponse:
        """Raises Refusal."""
        self._check(request)
        writer = self._writers.find(request)
        block_size = self._engine.layout.block_size
        token_ids = list(request.token_ids)
        owner = f"offer:{uuid.uuid4().hex}"
        hashes = block_hashes(token_ids, block_size, request.cache_namespace)
        try:
            reservation = await asyncio.wrap_future(self._engine.reserve_cache(owner, hashes, request.block_size))
        except asyncio.CancelledError:
            self._engine.release(owner)
            raise
        if reservation is None:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"no room for {len(hashes)} blocks beside requests")
        if reservation.num_cached_tokens == len(token_ids):
            self._engine.release(owner)
            return kv.OfferResponse(cached_tokens=len(token_ids))
        try:
            transfer_id = self._receiver.grant(
                owner=owner,
                source=(request.source.worker_id, request.source.incarnation),
                block_ids=reservation.block_ids,
                first_block=reservation.num_cached_tokens // block_size,
                lease_s=LEASE_S,
                writer=writer,
                sent=(request.block_size, len(token_ids)),
            )
        except MemoryError as error:
            self._engine.release(owner)
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        self._granted[transfer_id] = Granted(owner, len(token_ids), token_hash(token_ids))
        return kv.OfferResponse(
            transfer_id=transfer_id,
            cached_tokens=reservation.num_cached_tokens,
            lease_ms=int(LEASE_S * 1000),
            placement=placement_to_pb(self._receiver.placement(transfer_id)),
        )

    async def commit(self, request: kv.CommitRequest) -> kv.CommitResponse:
        """Of a granted offer. Visible to prompts once this has returned. Raises Refusal."""
        granted = self._granted[request.transfer_id]
        try:
            if (request.num_tokens, request.token_hash) != (granted.num_tokens, granted.token_hash):
                raise Refusal(grpc.StatusCode.DATA_LOSS, "the KV is of other tokens than were offered")
            await verify(self._receiver, request)
            await asyncio.wrap_future(self._engine.insert(granted.owner))
        except KeyError:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "the offer was released before it was committed") from None
        finally:
            self.release(request.transfer_id)
        return kv.CommitResponse(num_bytes=request.num_bytes)

    def release(self, transfer_id: bytes) -> bool:
        """Gives up what was granted; False if it is over. Its blocks are free or, one-sided, quarantined."""
        granted = self._granted.pop(transfer_id, None)
        if granted is None:
            return False
        self._receiver.release(transfer_id)
        if transfer_id in self._receiver.quarantine:
            self._engine.quarantine(granted.owner)
        else:
            self._engine.release(granted.owner)
        return True

    def expire(self, owners: set[str]) -> None:
        """The receiver has ended the tickets of `owners`: their writers stopped renewing them."""
        for transfer_id, granted in list(self._granted.items()):
            if granted.owner in owners:
                self.release(transfer_id)

    def _check(self, request: kv.OfferRequest) -> None:
        check_target(request.target, self._peers.source)
        if not self.is_open:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "no KV is taken back: kv_return is off, or the worker drains")
        if not self._peers.is_member(request.source.worker_id, request.source.incarnation):
            text = f"worker {request.source.worker_id} ({request.source.incarnation}) is not a member"
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, text)
        if len(self._granted) >= MAX_AT_ONCE:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_AT_ONCE} offers are being taken in already")
        length, block_size = (
            len(request.token_ids),
            math.lcm(max(request.block_size, 1), self._engine.layout.block_size),
        )
        info = self._engine.model_info
        if not 0 < length <= info.max_model_len or length % block_size:
            text = f"token_ids: {length} is not a multiple of {block_size} in [{block_size}, {info.max_model_len}]"
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)
        if max(request.token_ids) >= info.vocab_size:
            text = f"token_ids: token id {max(request.token_ids)} is not in [0, {info.vocab_size - 1}]"
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)
