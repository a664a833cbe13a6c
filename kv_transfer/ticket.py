"""One grant of pages, and how far its filling has come. The Receiver owns it; every field is guarded by `lock`.

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
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch

from kv_transfer.base import (
    ChunkHeader,
    Manifest,
    ManifestBuilder,
    Placement,
    TransferBroken,
    TransferCorrupt,
    TransferError,
    TransferRefused,
)
from kv_transfer.memory import BlockMemory, Pages


class State(Enum):
    GRANTED = "granted"
    RECEIVING = "receiving"
    FAILED = "failed"
    COMPLETE = "complete"
    RELEASED = "released"
    EXPIRED = "expired"


LIVE = frozenset((State.GRANTED, State.RECEIVING, State.FAILED))


@dataclass(slots=True, eq=False)
class Ticket:
    transfer_id: bytes
    owner: str
    source: tuple[str, str]
    block_ids: tuple[int, ...]  # page of each logical block
    first_block: int  # pages before it are not to be written
    sent: range  # logical blocks to come, in the sender's size
    block_size: int  # of the sender, 0: as ours
    lease_s: float
    expires_s: float  # on the receiver's clock
    covered: np.ndarray  # bool [len(sent), num_layers]
    placement: Placement | None  # set: one-sided
    writer: str  # its process
    is_test: bool  # its bytes are nobody's KV
    table: torch.Tensor | None = None  # of `block_ids`, where a GPU digests them
    num_covered: int = 0
    state: State = State.GRANTED
    received: ManifestBuilder = field(default_factory=ManifestBuilder)
    ended: bool = False  # the sender's stream ended with the right counts
    manifest: Manifest | None = None  # of the first commit
    error: TransferError | None = None
    progressed_s: float = float("-inf")
    waiters: list[asyncio.Future] = field(default_factory=list)
    watcher: Callable[[TransferError], None] | None = None  # hears once of a bad end, under the lock
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
        if self.state not in (State.GRANTED, State.RECEIVING):
            watcher, self.watcher = self.watcher, None
            if watcher is not None and (verdict := self.verdict()) is not None:
                watcher(verdict)

    def verdict(self) -> TransferError | None:
        """What its next chunk would be told, if it has ended badly."""
        if self.state in (State.FAILED, State.RELEASED, State.EXPIRED):
            return self.error or TransferRefused(f"ticket is {self.state.value}")
        return None

    def is_complete(self, manifest: Manifest) -> bool:
        """False: chunks are missing that may still come. Raises TransferCorrupt if what came is not what was sent."""
        if self.received.num_chunks < manifest.num_chunks and not self.ended:
            return False
        self.require(manifest)
        return True

    def require(self, manifest: Manifest) -> None:
        """Raises TransferError unless what came is what was sent, and everything that was to come."""
        got, sent = self.received.manifest(), manifest
        if got.num_chunks < sent.num_chunks:
            raise TransferBroken(f"{got.num_chunks} chunks arrived: {sent.num_chunks} were sent")
        if got != sent:
            raise TransferCorrupt("what arrived differs from the manifest")
        if self.num_covered != self.covered.size:
            missing = self.covered.size - self.num_covered
            raise TransferCorrupt(f"{missing} of {self.covered.size} (block, layer) pairs never came")

    def cells(
        self, memory: BlockMemory, header: ChunkHeader, num_bytes: int, covered: np.ndarray, num_before: int
    ) -> np.ndarray:
        """The part of `covered` that the chunk fills, after checking that it may; `num_before` are being checked."""
        if header.sequence != self.received.num_chunks + num_before:
            raise TransferBroken(f"chunk {header.sequence} came: {self.received.num_chunks + num_before} was next")
        layer_stop, block_stop = header.layer_start + header.layer_count, header.block_start + header.block_count
        num_layers, sent = memory.num_layers, self.sent
        if not 0 <= header.layer_start < layer_stop <= num_layers:
            raise TransferBroken(f"layers [{header.layer_start}, {layer_stop}): must lie in [0, {num_layers})")
        if not sent.start <= header.block_start < block_stop <= sent.stop:
            raise TransferBroken(
                f"blocks [{header.block_start}, {block_stop}): must lie in [{sent.start}, {sent.stop})"
            )
        expected = header.block_count * memory.width(header.layer_start, layer_stop, self.block_size)
        if not num_bytes == header.num_bytes == expected:
            raise TransferBroken(f"{num_bytes} bytes came, {header.num_bytes} announced: must be {expected}")
        cells = covered[header.block_start - sent.start : block_stop - sent.start, header.layer_start : layer_stop]
        if cells.any():
            raise TransferBroken(f"chunk {header.sequence} overlaps an earlier one")
        return cells

    def pages(self, memory: BlockMemory, header: ChunkHeader) -> Pages:
        """Our pages that hold the chunk. What a partly filled last block of the sender has behind ours is left out."""
        layers = header.layer_start, header.layer_start + header.layer_count
        first, stop = header.block_start, header.block_start + header.block_count
        if not self.block_size:
            return Pages(self.block_ids[first:stop], first, *layers, table=self.table)
        ours = memory.block_size
        tokens = first * self.block_size, min(stop * self.block_size, len(self.block_ids) * ours)
        first = tokens[0] // ours
        return Pages(self.block_ids[first : -(-tokens[1] // ours)], first, *layers, tokens, self.table)


def to_come(block_size: int, num_blocks: int, first_block: int, sent: tuple[int, int] | None) -> tuple[range, int]:
    """The sender's logical blocks that fill ours from `first_block` on, and their size, 0: ours. `sent`: that size, and
    the number of tokens in all."""
    if sent is None or sent[0] == block_size:
        return range(first_block, num_blocks), 0
    size, num_tokens = sent
    first, rest = divmod(first_block * block_size, size)
    assert rest == 0, (sent, first_block)
    return range(first, max(-(-num_tokens // size), first)), size


def differs(header: ChunkHeader) -> TransferCorrupt:
    return TransferCorrupt(f"chunk {header.sequence}: checksum differs from the one taken at the sender")


def _resolve(waiter: asyncio.Future) -> None:
    if not waiter.done():
        waiter.set_result(None)
