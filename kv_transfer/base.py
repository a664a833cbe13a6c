"""The vocabulary of KV transfer: errors, chunk headers, manifests, and what every transport implements.

    TransferError                  a transfer ended without its pages becoming visible
    ├── TransferRefused            the ticket is unknown, expired, used before, or not this peer's
    ├── TransferBroken             the peer is gone, stalled, or broke the order of the stream
    │   └── TransferUnfit          what moves or checks the bytes failed at either end: another transport may work
    └── TransferCorrupt            bytes arrived that are not the bytes that were read

Ranges, here and on the wire: logical blocks count from 0 along the prompt; layers from 0. A chunk holds a rectangle

    blocks [block_start, block_start + block_count)  x  layers [layer_start, layer_start + layer_count)

as, for each block in order, the contiguous bytes of its layers. The chunks of a transfer cover
[first_block, num_blocks) x [0, num_layers) exactly once, in any order of rectangles, numbered 0, 1, 2, ... as sent.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kv_transfer.memory import BlockMemory as BlockMemory

PROTOCOL_VERSION = 4  # of the hand-off: workers that differ refuse each other at the handshake


class TransferError(Exception):
    """A transfer ended without its pages becoming visible."""


class TransferRefused(TransferError):
    """The ticket is unknown, expired, used before, or granted to another peer."""


class TransferBroken(TransferError):
    """The peer is gone, made no progress, or sent chunks out of order or range."""


class TransferUnfit(TransferBroken):
    """What moves or checks the bytes failed at either end, a kernel, say: another transport may work."""


class TransferCorrupt(TransferError):
    """Checksum or manifest does not match what was read at the sender."""


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """One chunk's place and checksum; its packed form goes on the wire and into the manifest's digest."""

    sequence: int
    layer_start: int
    layer_count: int
    block_start: int
    block_count: int
    num_bytes: int  # of the chunk's bytes, wherever they travel
    checksum: int  # of the same bytes: their CRC-32C, or for a PLACED chunk the memory's own digest

    # Little-endian, in order; the layers u16, the checksum u64, the others u32.
    STRUCT = struct.Struct("<IHHIIIQ")

    def pack(self) -> bytes:
        return self.STRUCT.pack(
            self.sequence,
            self.layer_start,
            self.layer_count,
            self.block_start,
            self.block_count,
            self.num_bytes,
            self.checksum,
        )

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> "ChunkHeader":
        return cls(*cls.STRUCT.unpack_from(data, offset))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a whole transfer consisted of. Equal at both sides, or nothing becomes visible."""

    num_chunks: int
    num_bytes: int
    digest: bytes  # SHA-256 over the packed chunk headers in order of sequence


class ManifestBuilder:
    """Adds chunks in order of sequence; `manifest()` is what they amount to so far."""

    __slots__ = ("_sha256", "num_bytes", "num_chunks")

    def __init__(self) -> None:
        self.num_chunks = 0
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()

    def add(self, header: ChunkHeader) -> None:
        assert header.sequence == self.num_chunks
        self._sha256.update(header.pack())
        self.num_chunks += 1
        self.num_bytes += header.num_bytes

    def manifest(self) -> Manifest:
        return Manifest(self.num_chunks, self.num_bytes, self._sha256.digest())


class ReadyEvent(Protocol):
    """A torch.cuda.Event, recorded behind the kernels that write the pages."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """To COMMIT: a gRPC status, as the call of that name would end with."""

    code: int  # 0: adopted
    text: str = ""


class Outgoing(Protocol):
    """One transfer at the sender. `push` and `abort` may be called on any thread and never block."""

    @property
    def num_bytes(self) -> int:
        """Bytes that have left so far, whatever became of them."""

    def push(
        self,
        block_ids: Sequence[int],
        block_start: int,
        layer_start: int,
        layer_stop: int,
        after: ReadyEvent | None = None,
    ) -> None:
        """Queues local pages `block_ids`, the logical blocks from `block_start`, layers [layer_start, layer_stop).

        They are final once `after` has passed (None: now), and must stay so until `seal` returns or `wait_closed`
        does: they are read later. Order is kept. A transfer that has failed ignores it; `finish` tells why.
        """

    async def seal(self) -> Manifest:
        """Ends the stream; returns when nothing pushed will be read here any more and all of it has been sent, which
        the receiver may still be checking: its answer to Commit with this manifest tells. Raises TransferError."""

    async def finish(self) -> Manifest:
        """`seal`, and returns when the receiver has verified the whole manifest. Raises TransferError."""

    def end(self) -> None:
        """Nothing more is pushed. On any thread, as `commit`, or left to `seal`."""

    def commit(self, claim: Callable[[Manifest], bytes]) -> None:
        """`end`, and where the link can, COMMIT follows the last frame by itself, with the packed CommitRequest that
        `claim` makes of the manifest. On any thread; the first call counts."""

    async def commit_answer(self) -> Answer | None:
        """To `commit`, behind `seal`. None: it was not sent so, or its answer is lost; Commit over gRPC tells."""

    def abort(self, reason: str) -> None:
        """Gives up. Idempotent, without effect on a finished transfer."""

    async def wait_closed(self) -> None:
        """Returns when the transfer is over, however it ended, and no local page will be read any more."""

    def add_closed_callback(self, callback: Callable[["Outgoing"], None]) -> None:
        """On the loop: calls `callback` when the transfer is closed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way into a receiver's pool, as it says at the handshake."""

    transport: str
    locality: str = ""  # works where the sender's own value for this transport is equal; empty: anywhere
    data: bytes = b""  # an exported memory handle, an agent's metadata


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a one-sided writer puts the logical blocks, and the guard that says for how long it may."""

    page_ids: tuple[int, ...]  # of the logical blocks 0, 1, ... in the receiver's pool
    guard: int  # slot of the receiver's guard table (kv_transfer/guards.py)
    generation: int  # what the slot holds while the ticket is live; no other ticket ever has the same


class Link(Protocol):
    """The way to one peer over one transport. Used on the loop that made it."""

    @property
    def transport(self) -> str: ...

    @property
    def note(self) -> str:
        """What it does without, and why; empty: nothing."""

    def open(
        self, transfer_id: bytes, max_chunk_bytes: int | None = None, placement: Placement | None = None
    ) -> Outgoing:
        """Starts a transfer under a ticket of this peer. Chunks are at most `max_chunk_bytes` long, the smaller of the
        receiver's limit and ours; one-sided transports need the grant's `placement` instead. Raises TransferError, on a
        closed link for one."""

    async def close(self) -> None:
        """Aborts what is open, waits until no page is read, lets go of connections and mappings."""


class Sender(Protocol):
    """One transport's sending half in a worker. Made and used on one event loop."""

    async def connect(self, address: str, endpoint: Endpoint) -> Link:
        """Opens the way to the receiver at `address`. Raises TransferError when it cannot be used after all."""

    async def close(self) -> None:
        """Closes every link."""


class ObjectStore(Protocol):
    """Memory shared with the peer outside our sockets: Ray's object store in `cluster`, a dict in tests."""

    def put(self, arrays: Sequence[np.ndarray]) -> tuple[bytes, int]:
        """Copies the arrays' bytes, one after the other, into an object that is kept until `drop`; returns its token
        and the bytes' crc32c. Blocks."""

    def get(self, token: bytes, num_bytes: int, timeout_s: float) -> tuple[np.ndarray, bool]:
        """The object's first bytes, uint8, read-only, and whether they are the memory that `put` filled, not a copy.
        They stay as they are until the peer hears that they have been read. Blocks; raises TransferBroken."""

    def drop(self, token: bytes, mapped: bool = False) -> None:
        """Lets go of an object that `put` made here. `mapped`: its reader has it as the memory itself and reads it no
        more, so the next `put` may fill it again. Idempotent."""
