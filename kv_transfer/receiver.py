"""The receiving side of every transport: tickets, checks, placement. One per worker, thread-safe.

Every chunk is placed and checked under its ticket's lock, and every way out of RECEIVING takes that lock. So when
release, expire or commit has returned, no byte of that transfer is written any more; they wait for at most one chunk.

That holds for two-sided transports, where we write. A one-sided writer may be in the middle of a write when its ticket
is released or expires: the ticket then goes to the quarantine (kv_transfer/quarantine.py), and its guard is revoked at
once, so that nothing new begins. A writer commits only what it has seen complete: a commit is a fence.
"""

import asyncio
import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kv_transfer.base import (
    ChunkHeader,
    Manifest,
    Placement,
    TransferBroken,
    TransferCorrupt,
    TransferError,
    TransferRefused,
)
from kv_transfer.guards import Guards
from kv_transfer.invariants import check
from kv_transfer.memory import BlockMemory
from kv_transfer.quarantine import Quarantine
from kv_transfer.ticket import LIVE, State, Ticket, differs, to_come

TICKET_BYTES = 16
MAX_TOMBSTONES = 4096


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
        guards: Guards | None = None,
    ) -> None:
        """`guards`: needed to grant pages to one-sided writers."""
        self.memory = memory
        self.max_chunk_bytes = max_chunk_bytes
        self.progress_s = progress_s
        self._clock = clock
        self._lock = threading.Lock()  # the two tables and the counter; taken inside a ticket's lock, never around it
        self._tickets: dict[bytes, Ticket] = {}
        self._tombstones: OrderedDict[bytes, Ticket] = OrderedDict()
        self.quarantine = Quarantine(guards, clock)
        self._guards = guards
        self._bytes_received = 0
        self.num_corrupt = 0  # transfers in which what arrived was not what was sent

    @property
    def num_active(self) -> int:
        """Tickets whose pages are held."""
        return len(self._tickets)

    @property
    def bytes_received(self) -> int:
        """Bytes placed since the start, those of failed transfers included, those of test transfers not."""
        return self._bytes_received

    @property
    def guards_name(self) -> str:
        """Where one-sided writers find the guards of their tickets."""
        assert self._guards is not None, "one-sided transports need guards"
        return self._guards.name

    def grant(
        self,
        owner: str,
        source: tuple[str, str],
        block_ids: Sequence[int],
        first_block: int,
        lease_s: float,
        writer: str | None = None,
        sent: tuple[int, int] | None = None,
        is_test: bool = False,
    ) -> bytes:
        """A ticket for `source` (worker id, incarnation) to fill `block_ids[first_block:]`, for `lease_s` from now.

        `block_ids` are the pages of the logical blocks 0, 1, ...; the caller holds them until the ticket ends, and out
        of quarantine. `writer`: the process that will write into them by itself (kv_transfer/locality.py), "" if it is
        not known; None: nobody will, chunks come as bytes. Raises MemoryError when there are no guards left.

        `sent`: block size of the source and number of tokens it has in all, where its blocks are not of our size. It
        sends the blocks of its own that hold the tokens from `first_block` on, which must begin with one.
        `is_test`: what comes is not counted.
        """
        assert 0 <= first_block <= len(block_ids) == len(set(block_ids)), (first_block, block_ids)
        assert all(0 <= block_id < self.memory.num_blocks for block_id in block_ids), block_ids
        transfer_id = secrets.token_bytes(TICKET_BYTES)
        coming, size = to_come(self.memory.block_size, len(block_ids), first_block, sent)
        assert not size or self.memory.tiles
        placement = None
        if writer is not None:
            assert self._guards is not None, "one-sided transports need guards"
            placement = Placement(tuple(block_ids), *self._guards.take())
        ticket = Ticket(
            transfer_id=transfer_id,
            owner=owner,
            source=source,
            block_ids=tuple(block_ids),
            first_block=first_block,
            sent=coming,
            block_size=size,
            lease_s=lease_s,
            expires_s=self._clock() + lease_s,
            covered=np.zeros((len(coming), self.memory.num_layers), np.bool_),
            placement=placement,
            writer=writer or "",
            is_test=is_test,
            table=self.memory.table(block_ids) if writer is not None else None,
        )
        with self._lock:
            self._tickets[transfer_id] = ticket
        return transfer_id

    def placement(self, transfer_id: bytes) -> Placement | None:
        """What a one-sided writer must know of its ticket; None for other tickets."""
        return self._find(transfer_id).placement

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
            self._require_receiving(ticket)
            try:
                if ticket.placement is not None:
                    raise TransferBroken("bytes came for a ticket whose writer places them itself")
                if header.num_bytes > self.max_chunk_bytes:
                    raise TransferBroken(f"chunk of {header.num_bytes} bytes: at most {self.max_chunk_bytes} allowed")
                cells = ticket.cells(self.memory, header, sum(map(len, arrays)), ticket.covered, 0)
                # Placed first, to check what landed: the pages are the ticket's alone until they are committed.
                layers = header.layer_start, header.layer_start + header.layer_count
                if ticket.block_size:
                    checksum = self.memory.write_anew(
                        ticket.block_ids, header.block_start, ticket.block_size, *layers, arrays
                    )
                else:
                    block_ids = ticket.block_ids[header.block_start : header.block_start + header.block_count]
                    checksum = self.memory.write(block_ids, *layers, arrays)
                if checksum != header.checksum:
                    raise differs(header)
            except TransferError as error:
                self._fail(ticket, error)
                raise
            self._count(ticket, header, cells)

    def placed(self, transfer_id: bytes, headers: Sequence[ChunkHeader]) -> None:
        """The writer says that these chunks lie in the pages. Reads them back there and checks; blocks meanwhile.

        One call at a time for a ticket. A bad chunk fails the transfer.
        """
        ticket = self._find(transfer_id)
        with ticket.lock:
            self._require_receiving(ticket)
            try:
                if ticket.placement is None:
                    raise TransferBroken("chunks are said to be placed: this ticket lets nobody write")
                claimed = ticket.covered.copy()
                for i, header in enumerate(headers):
                    ticket.cells(self.memory, header, header.num_bytes, claimed, i)[...] = True
            except TransferError as error:
                self._fail(ticket, error)
                raise
            pages = [ticket.pages(self.memory, header) for header in headers]
        # Without the lock: it only reads, and a release need not wait for it.
        digests = self.memory.digests(pages)
        with ticket.lock:
            self._require_receiving(ticket)
            for header, digest in zip(headers, digests, strict=True):
                if digest != header.checksum:
                    corrupt = differs(header)
                    self._fail(ticket, corrupt)
                    raise corrupt
                self._count(ticket, header, ticket.cells(self.memory, header, header.num_bytes, ticket.covered, 0))

    def end(self, transfer_id: bytes, manifest: Manifest) -> None:
        """The sender has sent everything. Raises unless all that was to come has, as `manifest` counts it."""
        ticket = self._find(transfer_id)
        with ticket.lock:
            if ticket.state is State.COMPLETE:
                return
            self._require_lease(ticket)
            if ticket.state is not State.RECEIVING:
                raise ticket.error or TransferRefused(f"end for a ticket that is {ticket.state.value}")
            try:
                ticket.require(manifest)
            except TransferError as error:
                self._fail(ticket, error)
                raise
            ticket.ended = True
            ticket.watcher = None

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

    def settle(self, transfer_id: bytes, manifest: Manifest) -> bool:
        """As `commit`, on any thread and without waiting. False: chunks are under way."""
        ticket = self._find(transfer_id)
        with ticket.lock:
            return self._settle(ticket, manifest)

    def watch(self, transfer_id: bytes, watcher: Callable[[TransferError], None]) -> None:
        """Calls `watcher` once if the ticket ends badly, with what its next chunk would be told: on any thread, under
        the ticket's lock, so it must not block."""
        ticket = self._find(transfer_id)
        with ticket.lock:
            ticket.watcher = watcher
            ticket.wake()

    def heartbeat(self, transfer_ids: Iterable[bytes]) -> list[bytes]:
        """Renews leases; returns the tickets that are over, failed or unknown."""
        with self._lock:
            tickets = {transfer_id: self._tickets.get(transfer_id) for transfer_id in transfer_ids}
        return [transfer_id for transfer_id, ticket in tickets.items() if ticket is None or not self._renew(ticket)]

    def release(self, transfer_id: bytes) -> bool:
        """Ends a live ticket; True if this call did. Its owner's pages are free to go unless it is in quarantine."""
        with self._lock:
            ticket = self._tickets.get(transfer_id)
        return ticket is not None and self._end(ticket, State.RELEASED)

    def expire(self) -> list[str]:
        """Ends every ticket whose lease is over; returns their owners. Their pages go as after `release`."""
        with self._lock:
            tickets = list(self._tickets.values())
        now = self._clock()
        return [ticket.owner for ticket in tickets if now >= ticket.expires_s and self._end(ticket, State.EXPIRED, now)]

    def check(self) -> None:
        """Asserts every invariant. For tests and debugging."""
        with self._lock:
            live, dead, quarantined = dict(self._tickets), dict(self._tombstones), self.quarantine.tickets()
        assert len(dead) <= MAX_TOMBSTONES
        check(self.memory, self._guards, live, dead, quarantined)

    def _find(self, transfer_id: bytes) -> Ticket:
        with self._lock:
            ticket = self._tickets.get(transfer_id) or self._tombstones.get(transfer_id)
        if ticket is None:
            raise TransferRefused("ticket is unknown: forged, or over long ago")
        return ticket

    def _require_receiving(self, ticket: Ticket) -> None:
        self._require_lease(ticket)
        if ticket.state is not State.RECEIVING or ticket.ended:
            raise ticket.error or TransferRefused(f"chunk for a ticket that is {ticket.state.value}")

    def _count(self, ticket: Ticket, header: ChunkHeader, cells: np.ndarray) -> None:
        """A chunk lies verified in its pages; `cells` is its part of `covered`."""
        cells[...] = True
        ticket.num_covered += cells.size
        ticket.received.add(header)
        ticket.progressed_s = self._clock()
        if ticket.manifest is not None and ticket.received.num_chunks >= ticket.manifest.num_chunks:
            ticket.wake()
        with self._lock:
            self._bytes_received += 0 if ticket.is_test else header.num_bytes

    def _require_lease(self, ticket: Ticket) -> None:
        if ticket.state in LIVE and self._clock() >= ticket.expires_s:
            raise TransferRefused(f"ticket's lease of {ticket.lease_s} s is over")

    def _settle(self, ticket: Ticket, manifest: Manifest) -> bool:
        """True: complete. False: chunks are missing that may still come. Raises for everything else."""
        if ticket.manifest is None:
            ticket.manifest = manifest
        elif ticket.manifest != manifest:
            raise TransferRefused("commit differs from an earlier one of the same ticket")
        if ticket.state is State.COMPLETE:
            return True
        if ticket.error is not None:
            raise ticket.error
        if ticket.state not in LIVE:
            raise TransferRefused(f"ticket is {ticket.state.value}")
        try:
            self._require_lease(ticket)
            if not ticket.is_complete(manifest):
                return False
        except TransferError as error:
            self._fail(ticket, error)
            raise
        self._bury(ticket, State.COMPLETE)
        return True

    def _renew(self, ticket: Ticket) -> bool:
        with ticket.lock:
            now = self._clock()
            if ticket.state not in (State.GRANTED, State.RECEIVING) or now >= ticket.expires_s:
                return False
            ticket.expires_s = now + ticket.lease_s
            return True

    def _end(self, ticket: Ticket, state: State, now: float | None = None) -> bool:
        with ticket.lock:
            if ticket.state not in LIVE or (now is not None and now < ticket.expires_s):
                return False
            self._bury(ticket, state)
            return True

    def _fail(self, ticket: Ticket, error: TransferError) -> None:
        with self._lock:
            self.num_corrupt += isinstance(error, TransferCorrupt)
        ticket.state = State.FAILED
        ticket.error = error
        if self._guards is not None and ticket.placement is not None:
            self._guards.revoke(ticket.placement.guard)
        ticket.wake()

    def _bury(self, ticket: Ticket, state: State) -> None:
        ticket.state = state
        ticket.block_ids, ticket.table = (), None
        ticket.covered = np.zeros((0, 0), np.bool_)
        ticket.wake()
        if self._guards is not None and ticket.placement is not None:
            if state is State.COMPLETE:
                self._guards.free(ticket.placement.guard)
            else:
                self._guards.revoke(ticket.placement.guard)
        with self._lock:
            if ticket.placement is not None and state is not State.COMPLETE:
                self.quarantine.add(ticket)
            del self._tickets[ticket.transfer_id]
            self._tombstones[ticket.transfer_id] = ticket
            while len(self._tombstones) > MAX_TOMBSTONES:
                self._tombstones.popitem(last=False)
