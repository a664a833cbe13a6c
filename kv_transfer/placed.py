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
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kv_transfer.base import (
    ChunkHeader,
    Manifest,
    ManifestBuilder,
    Placement,
    ReadyEvent,
    TransferBroken,
    TransferError,
)
from kv_transfer.frames import placed_frame
from kv_transfer.grpc_stream import GrpcWire
from kv_transfer.memory import BlockMemory
from kv_transfer.outgoing import Rect

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


class PlacedOutgoing:
    """An `Outgoing` whose bytes a `Writer` moves."""

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
        self._memory = memory
        self._writer = writer
        self._wire = wire
        self._transfer_id = transfer_id
        self._placement = placement
        self._threads = threads
        self._progress_s = progress_s
        self._max_write_bytes = max_write_bytes
        self._manifest = ManifestBuilder()
        self._lock = threading.Lock()
        self._queue: deque[Rect] = deque()  # pushed, not launched
        self._num_unsettled = 0  # tasks of the two threads that the loop has not heard the end of
        self._landed: deque[tuple[Rect, int]] = deque()  # on the loop: written, with digest, not announced
        self._failure: BaseException | None = None
        self._finishing = False
        self._closed = False
        self._aborted: str | None = None
        self._error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._moving = self._loop.create_task(self._move())
        self._task = self._loop.create_task(self._run())

    @property
    def num_bytes(self) -> int:
        return self._manifest.num_bytes

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

    async def finish(self) -> Manifest:
        self._finishing = True
        self._wake.set()
        await asyncio.shield(self._task)
        if self._error is not None:
            raise self._error
        return self._manifest.manifest()

    def abort(self, reason: str) -> None:
        self._notify(self._abort, reason)

    async def wait_closed(self) -> None:
        await asyncio.shield(self._task)

    def add_closed_callback(self, callback: "Callable[[PlacedOutgoing], None]") -> None:
        """On the loop: calls `callback` when the transfer is closed."""
        self._task.add_done_callback(lambda _: callback(self))

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

    def _notify(self, callback, *args) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the transfer
            self._loop.call_soon_threadsafe(callback, *args)

    # On the loop

    def _settle(self, error: BaseException | None, landed: tuple[Rect, int] | None = None) -> None:
        with self._lock:
            self._num_unsettled -= 1
        self._failure = self._failure or error
        if landed is not None:
            self._landed.append(landed)
        self._wake.set()

    def _abort(self, reason: str) -> None:
        if self._aborted is None:
            self._aborted = reason
            self._moving.cancel()

    async def _run(self) -> None:
        """Sees the transfer to its end and cleans up. `abort` never cancels this: nothing may cut cleaning short."""
        try:
            await asyncio.wait([self._moving])
            self._error = self._why()
        finally:
            with self._lock:
                self._closed = True
            while self._num_unsettled:
                self._wake.clear()
                await self._wake.wait()
            await self._wire.close(self._error)

    def _why(self) -> BaseException | None:
        if self._moving.cancelled():
            return TransferBroken(f"aborted: {self._aborted or 'the sender stops'}")
        error = self._moving.exception()
        if isinstance(error, TimeoutError):
            return TransferBroken(f"nothing moved for {self._progress_s} s")
        if error is None or isinstance(error, TransferError):
            return error
        return TransferBroken(f"the write failed: {type(error).__name__}: {error}")

    async def _move(self) -> None:
        async with asyncio.timeout(self._progress_s):
            await self._wire.begin()
        lost = self._loop.create_task(self._wire.lost())
        lost.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                self._wake.clear()
                async with asyncio.timeout(self._progress_s):
                    while self._landed:
                        await self._announce(*self._landed.popleft())
                if self._failure is not None:
                    raise self._failure
                if lost.done() or (self._finishing and not self._num_unsettled and not self._landed):
                    break
                await self._wake.wait()
            async with asyncio.timeout(self._progress_s):
                await self._wire.end(self._manifest.manifest())
        finally:
            lost.cancel()

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
