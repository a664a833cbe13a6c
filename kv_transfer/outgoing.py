"""The sending side of every two-sided transport: a queue of pushed pages, cut into chunks, moved by a wire.

Life of a transfer here:
 1. `open` starts a task on the sender's event loop; the wire begins the stream under the ticket.
 2. The engine thread pushes rectangles of pages; each is a queue entry and a wake-up, nothing else.
 3. The task cuts them into chunks, first joining what queued up meanwhile (the next layers of the same blocks).
 4. A chunk's pages are read, checksummed and packed by the wire, on the loop or, where packing may block, on a pool
    thread while the chunk before it is sent. One transfer holds two packed chunks and what the wire has in flight,
    however long the prompt is.
 5. `seal` ends the stream behind the last chunk; `finish` waits until the receiver has verified all of it.
 6. Whatever ended the task, the pool's reads are waited for, then the transfer is closed.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from kv_transfer.base import ChunkHeader, Manifest, ReadyEvent
from kv_transfer.lifecycle import Lifecycle, Stream
from kv_transfer.memory import BlockMemory
from kv_transfer.rect import Rect


class Wire(Stream, Protocol):
    """How one transfer's chunks reach the receiver. `close` also drops whatever `pack` kept."""

    def pack(self, header: ChunkHeader, pages: Sequence[np.ndarray]) -> tuple[ChunkHeader, Any]:
        """Makes of a chunk's pages what `send` takes, and puts their checksum into the header. Runs on the loop, or on
        a pool thread."""

    async def send(self, packed: Any) -> None:
        """Returns when the chunk is on its way and the next may follow."""

    async def end(self, manifest: Manifest) -> None:
        """Sends END."""


class ChunkedOutgoing(Lifecycle):
    """An `Outgoing` over a wire."""

    _STALLED = "the receiver took nothing"

    def __init__(
        self, memory: BlockMemory, wire: Wire, pool: ThreadPoolExecutor | None, max_chunk_bytes: int, progress_s: float
    ) -> None:
        self._wire = wire
        self._pool = pool
        self._max_chunk_bytes = max_chunk_bytes
        self._num_chunks = 0  # cut so far; the manifest has those that were sent
        self._reads: deque[Future[tuple[ChunkHeader, Any]]] = deque()  # chunks being packed, at most two
        super().__init__(memory, wire, progress_s)

    def push(
        self,
        block_ids: Sequence[int],
        block_start: int,
        layer_start: int,
        layer_stop: int,
        after: ReadyEvent | None = None,
    ) -> None:
        assert not self._finishing and 0 <= layer_start < layer_stop <= self._memory.num_layers
        with self._lock:
            if self._closed:
                return
            self._queue.append(Rect(tuple(block_ids), block_start, layer_start, layer_stop, after))
        self._notify(self._wake.set)

    async def _step(self) -> bool:
        """Starts reading the next chunk, and sends the one before it. False: there was neither."""
        chunk = self._next_chunk()
        if chunk is not None:
            if chunk.after is not None and not chunk.after.query():
                await self._loop.run_in_executor(None, chunk.after.synchronize)
            self._reads.append(self._read(chunk))
            self._num_chunks += 1
        if len(self._reads) > 1 or (self._reads and chunk is None):
            read = self._reads[0]
            header, packed = read.result() if read.done() else await asyncio.wrap_future(read)
            self._reads.popleft()
            self._manifest.add(header)
            async with asyncio.timeout(self._progress_s):
                await self._wire.send(packed)
            return True
        return chunk is not None

    def _has_moved_all(self) -> bool:
        return True  # a step sends what there is

    async def _end(self) -> None:
        await self._wire.end(self._manifest.manifest())

    async def _drain(self) -> None:
        for read in self._reads:
            if not read.cancel():
                await asyncio.gather(asyncio.wrap_future(read), return_exceptions=True)

    def _read(self, chunk: Rect) -> "Future[tuple[ChunkHeader, Any]]":
        if self._pool is not None:
            return self._pool.submit(self._pack, self._num_chunks, chunk)
        read: Future[tuple[ChunkHeader, Any]] = Future()
        read.set_result(self._pack(self._num_chunks, chunk))
        return read

    def _next_chunk(self) -> Rect | None:
        with self._lock:
            if not self._queue:
                return None
            rect = self._queue.popleft()
            while self._queue and (joined := rect.join(self._queue[0])):
                self._queue.popleft()
                rect = joined
            chunk, *rest = self._cut(rect)
            self._queue.extendleft(reversed(rest))
            return chunk

    def _cut(self, rect: Rect) -> list[Rect]:
        """The first chunk of `rect` and what is left. A chunk has some layers of one block, or several blocks."""
        memory, layer_stop = self._memory, rect.layer_stop
        width = memory.width(rect.layer_start, layer_stop)
        if width > self._max_chunk_bytes and len(rect.block_ids) > 1:
            head, tail = rect.split_blocks(1)
            return [*self._cut(head), tail]
        if width > self._max_chunk_bytes:
            while layer_stop > rect.layer_start + 1 and width > self._max_chunk_bytes:
                layer_stop -= 1
                width = memory.width(rect.layer_start, layer_stop)
            return [replace(rect, layer_stop=layer_stop), replace(rect, layer_start=layer_stop)]
        count = self._max_chunk_bytes // width
        return [rect] if len(rect.block_ids) <= count else list(rect.split_blocks(count))

    def _pack(self, sequence: int, chunk: Rect) -> tuple[ChunkHeader, Any]:
        pages = self._memory.read(chunk.block_ids, chunk.layer_start, chunk.layer_stop)
        header = ChunkHeader(
            sequence=sequence,
            layer_start=chunk.layer_start,
            layer_count=chunk.layer_stop - chunk.layer_start,
            block_start=chunk.block_start,
            block_count=len(chunk.block_ids),
            num_bytes=sum(map(len, pages)),
            checksum=0,  # the wire's to fill in, as it reads the pages
        )
        return self._wire.pack(header, pages)
