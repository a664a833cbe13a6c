"""The receiving side of every two-sided transport: tickets, checks, placement. One per worker, thread-safe.

    grant() ──► GRANTED ──begin()──► RECEIVING ──commit() agrees──► COMPLETE
                   │                     │
                   │   bad or missing chunk, stream broken, manifest differs, lease over at commit
                   │                     ▼
                   ├──────────────►   FAILED          takes nothing more; its pages still belong to its owner
                   │                     │
                   └─────────┬───────────┘
              release() ──► RELEASED
       expire(), lease over ──► EXPIRED

GRANTED, RECEIVING and FAILED are live: the owner's pages are held, and exactly one of commit, release and expire will
say that they no longer are. The other three are tombstones, kept (a bounded number) to answer what comes late.

Every chunk is placed and checked under its ticket's lock, and every way out of RECEIVING takes that lock. So when
release, expire or commit has returned, no byte of that transfer is written any more; they wait for at most one chunk.
"""

import asyncio
import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from kv_transfer.base import (
    ChunkHeader,
    Manifest,
    ManifestBuilder,
    TransferBroken,
    TransferCorrupt,
    TransferError,
    TransferRefused,
)
from kv_transfer.memory import BlockMemory

TICKET_BYTES = 16
MAX_TOMBSTONES = 4096


class State(Enum):
    GRANTED = "granted"
    RECEIVING = "receiving"
    FAILED = "failed"
    COMPLETE = "complete"
    RELEASED = "released"
    EXPIRED = "expired"


_LIVE = frozenset((State.GRANTED, State.RECEIVING, State.FAILED))


class Receiver:
    """Grants pages under single-use tickets and fills them with verified chunks.

    `max_chunk_bytes` bounds what one chunk may bring; `progress_s` is how long commit waits without seeing a new one.
    Methods other than grant and check raise TransferError, or answer that they know no such ticket.
    """

    def __init__(
        self,
        memory: BlockMemory,
        max_chunk_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        progress_s: float = 10.0,
    ) -> None:
        self.memory = memory
        self.max_chunk_bytes = max_chunk_bytes
        self.progress_s = progress_s
        self._clock = clock
        self._lock = threading.Lock()  # the two tables and the counter; taken inside a ticket's lock, never around it
        self._tickets: dict[bytes, _Ticket] = {}
        self._tombstones: OrderedDict[bytes, _Ticket] = OrderedDict()
        self._bytes_received = 0

    @property
    def num_active(self) -> int:
        """Tickets whose pages are held."""
        return len(self._tickets)

    @property
    def bytes_received(self) -> int:
        """Bytes placed since the start, those of failed transfers included."""
        return self._bytes_received

    def grant(
        self, owner: str, source: tuple[str, str], block_ids: Sequence[int], first_block: int, lease_s: float
    ) -> bytes:
        """A ticket for `source` (worker id, incarnation) to fill `block_ids[first_block:]`, for `lease_s` from now.

        `block_ids` are the pages of the logical blocks 0, 1, ...; the caller holds them until the ticket ends.
        """
        assert 0 <= first_block <= len(block_ids) == len(set(block_ids)), (first_block, block_ids)
        assert all(0 <= block_id < self.memory.num_blocks for block_id in block_ids), block_ids
        transfer_id = secrets.token_bytes(TICKET_BYTES)
        ticket = _Ticket(
            transfer_id=transfer_id,
            owner=owner,
            source=source,
            block_ids=tuple(block_ids),
            first_block=first_block,
            lease_s=lease_s,
            expires_s=self._clock() + lease_s,
            covered=np.zeros((len(block_ids) - first_block, self.memory.num_layers), np.bool_),
        )
        with self._lock:
            self._tickets[transfer_id] = ticket
        return transfer_id

    def begin(self, transfer_id: bytes, source: tuple[str, str]) -> None:
        """The sender's stream opens. Once per ticket, by the source it was granted to; a refusal changes nothing."""
        ticket = self._find(transfer_id)
        with ticket.lock:
            self._require_lease(ticket)
            if source != ticket.source:
                raise TransferRefused(f"ticket was granted to {ticket.source}: not to {source}")
            if ticket.state is not State.GRANTED:
                raise TransferRefused(f"ticket is {ticket.state.value}: it can be used once")
            ticket.state = State.RECEIVING

    def chunk(self, transfer_id: bytes, header: ChunkHeader, arrays: Sequence[np.ndarray]) -> None:
        """Places one chunk, its bytes being `arrays` laid end to end, and checks it. A bad one fails the transfer."""
        ticket = self._find(transfer_id)
        with ticket.lock:
            self._require_lease(ticket)
            if ticket.state is not State.RECEIVING or ticket.ended:
                raise ticket.error or TransferRefused(f"chunk for a ticket that is {ticket.state.value}")
            try:
                cells = self._cells(ticket, header, sum(map(len, arrays)))
                # What is checked is what landed: the pages are the ticket's alone until they are committed.
                checksum = self.memory.write(
                    ticket.block_ids[header.block_start : header.block_start + header.block_count],
                    header.layer_start,
                    header.layer_start + header.layer_count,
                    arrays,
                )
                if checksum != header.crc32c:
                    raise TransferCorrupt(f"chunk {header.sequence}: checksum differs from the one taken at the sender")
            except TransferError as error:
                self._fail(ticket, error)
                raise
            cells[...] = True
            ticket.num_covered += cells.size
            ticket.received.add(header)
            ticket.progressed_s = self._clock()
            if ticket.manifest is not None and ticket.received.num_chunks >= ticket.manifest.num_chunks:
                ticket.wake()
        with self._lock:
            self._bytes_received += header.num_bytes

    def end(self, transfer_id: bytes, num_chunks: int, num_bytes: int) -> None:
        """The sender has sent everything: the counts must be those that arrived."""
        ticket = self._find(transfer_id)
        with ticket.lock:
            if ticket.state is State.COMPLETE:
                return
            self._require_lease(ticket)
            if ticket.state is not State.RECEIVING:
                raise ticket.error or TransferRefused(f"end for a ticket that is {ticket.state.value}")
            got = (ticket.received.num_chunks, ticket.received.num_bytes)
            if got != (num_chunks, num_bytes):
                error = TransferBroken(f"{got} chunks and bytes arrived: {(num_chunks, num_bytes)} were sent")
                self._fail(ticket, error)
                raise error
            ticket.ended = True

    def fail(self, transfer_id: bytes, error: TransferError) -> None:
        """The stream is broken. Without effect on a transfer that is over, or has ended well."""
        with contextlib.suppress(TransferRefused):
            ticket = self._find(transfer_id)
            with ticket.lock:
                if ticket.state in (State.GRANTED, State.RECEIVING) and not ticket.ended:
                    self._fail(ticket, error)

    async def commit(self, transfer_id: bytes, manifest: Manifest) -> None:
        """Returns when all that `manifest` counts lies verified in the pages, which are then the owner's to use.

        Waits for chunks under way, as long as they keep coming. Raises TransferError. Repeats its first answer.
        """
        ticket = self._find(transfer_id)
        started_s = self._clock()
        while True:
            with ticket.lock:
                if self._settle(ticket, manifest):
                    return
                waiter = ticket.waiter()
                stalled_s = max(ticket.progressed_s, started_s) + self.progress_s
                wait_s = stalled_s - self._clock()
            try:
                await asyncio.wait_for(waiter, max(wait_s, 0))
            except TimeoutError:
                with ticket.lock:
                    moved = max(ticket.progressed_s, started_s) + self.progress_s > stalled_s
                    if not moved and ticket.state in (State.GRANTED, State.RECEIVING):
                        self._fail(ticket, TransferBroken(f"no chunk came for {self.progress_s} s before the last one"))

    async def over(self, transfer_id: bytes) -> TransferError:
        """Returns once the ticket has ended badly, with what its next chunk would be told. Cancel it otherwise."""
        ticket = self._find(transfer_id)
        while True:
            with ticket.lock:
                if ticket.state in (State.FAILED, State.RELEASED, State.EXPIRED):
                    return ticket.error or TransferRefused(f"ticket is {ticket.state.value}")
                # Complete before its END came: nothing will wake this, nor need it.
                complete = ticket.state is State.COMPLETE
                waiter = asyncio.get_running_loop().create_future() if complete else ticket.waiter()
            await waiter

    def heartbeat(self, transfer_ids: Iterable[bytes]) -> list[bytes]:
        """Renews leases; returns the tickets that are over, failed or unknown."""
        unknown = []
        for transfer_id in transfer_ids:
            with self._lock:
                ticket = self._tickets.get(transfer_id)
            if ticket is None or not self._renew(ticket):
                unknown.append(transfer_id)
        return unknown

    def release(self, transfer_id: bytes) -> bool:
        """Ends a live ticket; True if this call did, and so its owner's pages are free to go."""
        with self._lock:
            ticket = self._tickets.get(transfer_id)
        return ticket is not None and self._end(ticket, State.RELEASED)

    def expire(self) -> list[str]:
        """Ends every ticket whose lease is over; returns their owners, whose pages are free to go."""
        with self._lock:
            tickets = list(self._tickets.values())
        now = self._clock()
        return [ticket.owner for ticket in tickets if now >= ticket.expires_s and self._end(ticket, State.EXPIRED, now)]

    def check(self) -> None:
        """Asserts every invariant. For tests and debugging."""
        with self._lock:
            live, dead = dict(self._tickets), dict(self._tombstones)
        assert not live.keys() & dead.keys() and len(dead) <= MAX_TOMBSTONES
        writable = [block_id for ticket in live.values() for block_id in ticket.block_ids[ticket.first_block :]]
        assert len(writable) == len(set(writable)), "two live tickets may write the same page"
        for ticket in live.values():
            with ticket.lock:
                assert ticket.num_covered == int(ticket.covered.sum())
                offsets = self.memory.layer_offsets
                widths = np.diff(np.array(offsets, np.int64))
                assert ticket.received.num_bytes == int((ticket.covered * widths).sum())
                assert (ticket.error is not None) == (ticket.state is State.FAILED)
                assert ticket.state is not State.GRANTED or ticket.received.num_chunks == 0
        for ticket in dead.values():
            assert ticket.state not in _LIVE and not ticket.waiters and not ticket.block_ids

    def _find(self, transfer_id: bytes) -> "_Ticket":
        with self._lock:
            ticket = self._tickets.get(transfer_id) or self._tombstones.get(transfer_id)
        if ticket is None:
            raise TransferRefused("ticket is unknown: forged, or over long ago")
        return ticket

    def _require_lease(self, ticket: "_Ticket") -> None:
        if ticket.state in _LIVE and self._clock() >= ticket.expires_s:
            raise TransferRefused(f"ticket's lease of {ticket.lease_s} s is over")

    def _cells(self, ticket: "_Ticket", header: ChunkHeader, num_bytes: int) -> np.ndarray:
        """The part of `covered` that the chunk fills, after checking that it may."""
        if header.sequence != ticket.received.num_chunks:
            raise TransferBroken(f"chunk {header.sequence} came: {ticket.received.num_chunks} was next")
        layer_stop, block_stop = header.layer_start + header.layer_count, header.block_start + header.block_count
        num_layers, num_blocks = self.memory.num_layers, len(ticket.block_ids)
        if not 0 <= header.layer_start < layer_stop <= num_layers:
            raise TransferBroken(f"layers [{header.layer_start}, {layer_stop}): must lie in [0, {num_layers})")
        if not ticket.first_block <= header.block_start < block_stop <= num_blocks:
            raise TransferBroken(
                f"blocks [{header.block_start}, {block_stop}): must lie in [{ticket.first_block}, {num_blocks})"
            )
        expected = header.block_count * self.memory.width(header.layer_start, layer_stop)
        if not num_bytes == header.num_bytes == expected:
            raise TransferBroken(f"{num_bytes} bytes came, {header.num_bytes} announced: must be {expected}")
        if num_bytes > self.max_chunk_bytes:
            raise TransferBroken(f"chunk of {num_bytes} bytes: at most {self.max_chunk_bytes} allowed")
        cells = ticket.covered[
            header.block_start - ticket.first_block : block_stop - ticket.first_block, header.layer_start : layer_stop
        ]
        if cells.any():
            raise TransferBroken(f"chunk {header.sequence} overlaps an earlier one")
        return cells

    def _settle(self, ticket: "_Ticket", manifest: Manifest) -> bool:
        """True: complete. False: chunks are missing that may still come. Raises for everything else."""
        if ticket.manifest is None:
            ticket.manifest = manifest
        elif ticket.manifest != manifest:
            raise TransferRefused("commit differs from an earlier one of the same ticket")
        if ticket.state is State.COMPLETE:
            return True
        if ticket.error is not None:
            raise ticket.error
        if ticket.state not in _LIVE:
            raise TransferRefused(f"ticket is {ticket.state.value}")
        try:
            self._require_lease(ticket)
            if ticket.received.num_chunks < manifest.num_chunks and not ticket.ended:
                return False
            if ticket.received.manifest() != manifest:
                raise TransferCorrupt("what arrived differs from the manifest")
            if ticket.num_covered != ticket.covered.size:
                missing = ticket.covered.size - ticket.num_covered
                raise TransferCorrupt(f"{missing} of {ticket.covered.size} (block, layer) pairs never came")
        except TransferError as error:
            self._fail(ticket, error)
            raise
        self._bury(ticket, State.COMPLETE)
        return True

    def _renew(self, ticket: "_Ticket") -> bool:
        with ticket.lock:
            now = self._clock()
            if ticket.state not in (State.GRANTED, State.RECEIVING) or now >= ticket.expires_s:
                return False
            ticket.expires_s = now + ticket.lease_s
            return True

    def _end(self, ticket: "_Ticket", state: State, now: float | None = None) -> bool:
        with ticket.lock:
            if ticket.state not in _LIVE or (now is not None and now < ticket.expires_s):
                return False
            self._bury(ticket, state)
            return True

    def _fail(self, ticket: "_Ticket", error: TransferError) -> None:
        ticket.state = State.FAILED
        ticket.error = error
        ticket.wake()

    def _bury(self, ticket: "_Ticket", state: State) -> None:
        ticket.state = state
        ticket.block_ids = ()
        ticket.covered = np.zeros((0, 0), np.bool_)
        ticket.wake()
        with self._lock:
            del self._tickets[ticket.transfer_id]
            self._tombstones[ticket.transfer_id] = ticket
            while len(self._tombstones) > MAX_TOMBSTONES:
                self._tombstones.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Ticket:
    transfer_id: bytes
    owner: str
    source: tuple[str, str]
    block_ids: tuple[int, ...]  # page of each logical block
    first_block: int
    lease_s: float
    expires_s: float  # on the receiver's clock
    covered: np.ndarray  # bool [num_blocks - first_block, num_layers]
    num_covered: int = 0
    state: State = State.GRANTED
    received: ManifestBuilder = field(default_factory=ManifestBuilder)
    ended: bool = False  # the sender's stream ended with the right counts
    manifest: Manifest | None = None  # of the first commit
    error: TransferError | None = None
    progressed_s: float = float("-inf")
    waiters: list[asyncio.Future] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def waiter(self) -> asyncio.Future:
        """A future of the running loop that the next `wake` resolves."""
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return waiter

    def wake(self) -> None:
        """Lets everyone who waits for this ticket look again, on their own loops."""
        for waiter in self.waiters:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter)
        self.waiters.clear()


def _resolve(waiter: asyncio.Future) -> None:
    if not waiter.done():
        waiter.set_result(None)
