"""The sending side of every one-sided transport: pages are written straight into the receiver's, then announced.

Life of a transfer here:
 1. `open` starts a task on the event loop; the Push stream begins under the ticket.
 2. The engine thread pushes rectangles of pages; each is a queue entry and a task for the launching thread.
 3. That thread joins what queued up meanwhile and starts the write; the write waits for the pages by itself.
 4. The waiting thread waits until the bytes lie there and takes their digest; the loop sends the PLACED frame.
 5. `finish` ends the stream once every write is announced; the receiver answers when it has checked all of them.
 6. Whatever ended the task, every write begun is waited for: closed means that nothing of it is in flight.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kv_transfer.base import (
    ChunkHeader,
    Placement,
    ReadyEvent,
    TransferBroken,
    TransferError,
)
from kv_transfer.frames import placed_frame
from kv_transfer.grpc_stream import GrpcWire
from kv_transfer.lifecycle import Lifecycle
from kv_transfer.memory import BlockMemory
from kv_transfer.rect import Rect

MAX_WRITE_BYTES = 256 << 20  # of one write: what is announced, and checked, at once


class Write(Protocol):
    """One write under way."""

    def wait(self) -> int:
        """Blocks until all of it lies in the receiver's pages; the digest of what was read. Raises TransferError."""


class Writer(Protocol):
    """Writes into one peer's pool. Used on one thread at a time."""

    def write(self, rect: Rect, placement: Placement) -> Write:
        """Starts to copy `rect` where `placement` says; does not block for it. Raises TransferError."""


class Threads:
    """What all transfers of one sender share: a thread that launches and one that waits, in the same order."""

    def __init__(self, name: str, initializer: Callable[[], None] | None = None) -> None:
        self.launching = ThreadPoolExecutor(1, f"{name}-launch", initializer)
        self.waiting = ThreadPoolExecutor(1, f"{name}-wait", initializer)

    def close(self) -> None:
        self.launching.shutdown()
        self.waiting.shutdown()


class PlacedOutgoing(Lifecycle):
    """An `Outgoing` whose bytes a `Writer` moves."""

    _STALLED = "nothing moved"

    def __init__(
        self,
        memory: BlockMemory,
        writer: Writer,
        wire: GrpcWire,
        transfer_id: bytes,
        placement: Placement,
        threads: Threads,
        progress_s: float,
        max_write_bytes: int = MAX_WRITE_BYTES,
    ) -> None:
        self._writer = writer
        self._wire = wire
        self._transfer_id = transfer_id
        self._placement = placement
        self._threads = threads
        self._max_write_bytes = max_write_bytes
        self._num_unsettled = 0  # tasks of the two threads that the loop has not heard the end of
        self._landed: deque[tuple[Rect, int]] = deque()  # on the loop: written, with digest, not announced
        self._failure: BaseException | None = None
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
        rects = self._cut(Rect(tuple(block_ids), block_start, layer_start, layer_stop, after))
        with self._lock:
            if self._closed:
                return
            self._queue.extend(rects)
            self._num_unsettled += len(rects)
        for _ in rects:
            self._threads.launching.submit(self._launch)

    # On the two threads

    def _launch(self) -> None:
        """Starts a write for the oldest rectangle and those that join it; one call per push, so some find none."""
        with self._lock:
            rect = self._queue.popleft() if self._queue and not self._closed else None
            while rect is not None and self._queue and (joined := self._join(rect, self._queue[0])):
                self._queue.popleft()
                rect = joined
        if rect is None:
            return self._notify(self._settle, None)
        try:
            write = self._writer.write(rect, self._placement)
        except BaseException as error:  # the loop decides what it means
            return self._notify(self._settle, error)
        self._threads.waiting.submit(self._wait, rect, write)

    def _cut(self, rect: Rect) -> list[Rect]:
        """By blocks, so that each part is a write; a block is never cut."""
        count = max(1, self._max_write_bytes // self._memory.width(rect.layer_start, rect.layer_stop))
        parts = []
        while len(rect.block_ids) > count:
            head, rect = rect.split_blocks(count)
            parts.append(head)
        return [*parts, rect]

    def _join(self, rect: Rect, following: Rect) -> Rect | None:
        joined = rect.join(following)
        if joined is None or self._num_bytes(joined) > self._max_write_bytes:
            return None
        return joined

    def _wait(self, rect: Rect, write: Write) -> None:
        try:
            digest = write.wait()
        except BaseException as error:
            return self._notify(self._settle, error)
        self._notify(self._settle, None, (rect, digest))

    # On the loop

    def _settle(self, error: BaseException | None, landed: tuple[Rect, int] | None = None) -> None:
        with self._lock:
            self._num_unsettled -= 1
        self._failure = self._failure or error
        if landed is not None:
            self._landed.append(landed)
        self._wake.set()

    async def _step(self) -> bool:
        async with asyncio.timeout(self._progress_s):
            while self._landed:
                await self._announce(*self._landed.popleft())
        if self._failure is not None:
            raise self._failure
        return False

    def _has_moved_all(self) -> bool:
        return not self._num_unsettled and not self._landed

    async def _drain(self) -> None:
        while self._num_unsettled:
            self._wake.clear()
            await self._wake.wait()

    def _why(self) -> BaseException | None:
        error = super()._why()
        if error is None or isinstance(error, TransferError):
            return error
        return TransferBroken(f"the write failed: {type(error).__name__}: {error}")

    async def _announce(self, rect: Rect, digest: int) -> None:
        header = ChunkHeader(
            sequence=self._manifest.num_chunks,
            layer_start=rect.layer_start,
            layer_count=rect.layer_stop - rect.layer_start,
            block_start=rect.block_start,
            block_count=len(rect.block_ids),
            num_bytes=self._num_bytes(rect),
            checksum=digest,
        )
        self._manifest.add(header)
        await self._wire.send(placed_frame(self._transfer_id, header))

    def _num_bytes(self, rect: Rect) -> int:
        return len(rect.block_ids) * self._memory.width(rect.layer_start, rect.layer_stop)
