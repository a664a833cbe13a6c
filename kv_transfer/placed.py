"""The sending side of every one-sided transport: pages are written straight into the receiver's, then announced.

Life of a transfer here:
 1. `open` tells the receiver that it begins under the ticket, and starts a task on the event loop that sees it end.
 2. The engine thread pushes rectangles of pages; each is a queue entry and a task for the launching thread. What need
    not be waited for is launched at once, if nothing is before it.
 3. What queued up meanwhile is joined, and the write started; the write waits for the pages by itself.
 4. The waiting thread waits until the bytes lie there, takes their digest and sends the PLACED frame.
 5. `end` lets END follow the last frame, sent by whoever sees that it was the last, and `commit` lets COMMIT follow
    END; the receiver answers when it has verified all of it, and once more when it has adopted it.
 6. Whatever ended the task, every write begun is waited for: closed means that nothing of it is in flight.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kv_transfer.base import (
    Answer,
    ChunkHeader,
    Manifest,
    Placement,
    ReadyEvent,
    TransferError,
    TransferRefused,
    TransferUnfit,
)
from kv_transfer.frames import commit_frame, end_frame, placed_frame
from kv_transfer.lifecycle import Lifecycle, Stream
from kv_transfer.memory import BlockMemory
from kv_transfer.rect import Rect

MAX_WRITE_BYTES = 512 << 20  # of one write: what is announced, and checked, at once
# Of the last write: nothing moves any more while the receiver checks it, and less would come before it is done with the
# one before.
MAX_LAST_BYTES = 128 << 20


class Write(Protocol):
    """One write under way."""

    def wait(self) -> int:
        """Blocks until all of it lies in the receiver's pages; the digest of what was read. Raises TransferError."""


class Writer(Protocol):
    """Writes into one peer's pool. Used on one thread at a time."""

    @property
    def is_instant(self) -> bool:
        """Whether `write` only launches: a thread of its own would cost more."""

    def write(self, rect: Rect, placement: Placement) -> Write:
        """Starts to copy `rect` where `placement` says; does not wait for the copy. Raises TransferError."""


class Announcer(Stream, Protocol):
    """What the receiver is told of one transfer. BEGIN goes by itself, before everything else."""

    def announce(self, frame: bytes) -> None:
        """Sends a frame behind the ones before. On any thread; never blocks. A failure ends the stream."""

    def commit(self, frame: bytes) -> None:
        """Sends COMMIT, as `announce` would, if it can at all."""

    async def commit_answer(self) -> Answer | None:
        """To COMMIT. None: it could not be sent here, or nothing more can come."""


class Threads:
    """What all transfers of one sender share: a thread that launches and one that waits, in the same order."""

    def __init__(self, name: str, initializer: Callable[[], None] | None = None) -> None:
        self.launching = ThreadPoolExecutor(1, f"{name}-launch", initializer)
        self.waiting = ThreadPoolExecutor(1, f"{name}-wait", initializer)
        self._turn = threading.Lock()  # who launches
        self._lock = threading.Lock()
        self._num_queued = 0

    def launch(self, work: Callable[[], None], at_once: bool) -> None:
        """Runs `work` on the launching thread; here, if `at_once` and nothing is before it."""
        with self._lock:
            is_here = at_once and not self._num_queued and self._turn.acquire(blocking=False)
            self._num_queued += not is_here
        if not is_here:
            self.launching.submit(self._launch, work)
            return
        try:
            work()
        finally:
            self._turn.release()

    def close(self) -> None:
        self.launching.shutdown()
        self.waiting.shutdown()

    def _launch(self, work: Callable[[], None]) -> None:
        with self._turn:
            try:
                work()
            finally:
                with self._lock:
                    self._num_queued -= 1


class PlacedOutgoing(Lifecycle):
    """An `Outgoing` whose bytes a `Writer` moves."""

    _STALLED = "the receiver answered nothing"

    def __init__(
        self,
        memory: BlockMemory,
        writer: Writer,
        announcer: Announcer,
        transfer_id: bytes,
        placement: Placement,
        threads: Threads,
        progress_s: float,
        max_write_bytes: int = MAX_WRITE_BYTES,
    ) -> None:
        self._writer = writer
        self._announcer = announcer
        self._transfer_id = transfer_id
        self._placement = placement
        self._threads = threads
        self._max_write_bytes = max_write_bytes
        self._num_unsettled = 0  # pushed rectangles that have not landed, failed, or been joined to one before
        self._failure: BaseException | None = None
        self._claim: Callable[[Manifest], bytes] | None = None
        super().__init__(memory, announcer, progress_s)

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
        at_once = after is None and self._writer.is_instant
        for _ in rects:
            self._threads.launch(self._launch, at_once)

    def end(self) -> None:
        self._finishing = True
        self._send_end()

    def commit(self, claim: Callable[[Manifest], bytes]) -> None:
        with self._lock:
            if self._claim is not None:
                return
            self._claim = claim
            is_behind = self._ended
        if is_behind:
            self._send_commit(claim)
        else:
            self.end()

    async def commit_answer(self) -> Answer | None:
        return await self._announcer.commit_answer() if self._claim is not None else None

    # On the launching and the waiting thread

    def _launch(self) -> None:
        """Starts a write for the oldest rectangle and those that join it; one call per push, so some find none."""
        with self._lock:
            is_over = self._closed or self._failure is not None  # nothing follows what was left half done
            rect = self._queue.popleft() if self._queue and not is_over else None
            while rect is not None and self._queue and (joined := self._join(rect, self._queue[0])):
                self._queue.popleft()
                rect = joined
        if rect is None:
            return self._settle(None)
        try:
            write = self._writer.write(rect, self._placement)
        except BaseException as error:  # the loop decides what it means
            return self._settle(error)
        self._threads.waiting.submit(self._wait, rect, write)

    def _cut(self, rect: Rect) -> list[Rect]:
        """By blocks, so that each part is a write; a block is never cut. The last layers end with a small one, those
        before it halve what is left: each is checked while the next ones are written."""
        width = self._memory.width(rect.layer_start, rect.layer_stop)
        most, last = (max(1, size // width) for size in (self._max_write_bytes, MAX_LAST_BYTES))
        is_last = rect.layer_stop == self._memory.num_layers
        parts = []
        while len(rect.block_ids) > most or (is_last and len(rect.block_ids) > last):
            head, rect = rect.split_blocks(min(most, -(-len(rect.block_ids) // 2)) if is_last else most)
            parts.append(head)
        return [*parts, rect]

    def _join(self, rect: Rect, following: Rect) -> Rect | None:
        joined = rect.join(following)
        if joined is None or self._num_bytes(joined) > self._max_write_bytes:
            return None
        return joined

    def _wait(self, rect: Rect, write: Write) -> None:
        try:
            header = ChunkHeader(
                sequence=self._manifest.num_chunks,
                layer_start=rect.layer_start,
                layer_count=rect.layer_stop - rect.layer_start,
                block_start=rect.block_start,
                block_count=len(rect.block_ids),
                num_bytes=self._num_bytes(rect),
                checksum=write.wait(),
            )
            self._manifest.add(header)
            self._announcer.announce(placed_frame(self._transfer_id, header))
        except BaseException as error:
            return self._settle(error)
        self._settle(None)

    def _settle(self, error: BaseException | None) -> None:
        """The loop need not hear of what goes well before the last."""
        with self._lock:
            self._num_unsettled -= 1
            self._failure = self._failure or error
            is_news = self._failure is not None or not self._num_unsettled
        self._send_end()
        if is_news:
            self._notify(self._wake.set)

    def _send_end(self) -> None:
        """On any thread: once, behind the last frame, if it has been said that there will be no more."""
        with self._lock:
            if not self._finishing or self._num_unsettled or self._failure or self._closed or self._ended:
                return
            self._ended = True
            claim = self._claim
        self._announcer.announce(end_frame(self._transfer_id, self._manifest.manifest()))
        if claim is not None:
            self._send_commit(claim)

    def _send_commit(self, claim: Callable[[Manifest], bytes]) -> None:
        """All frames of chunks have gone; should it overtake END, the receiver does not mind."""
        self._announcer.commit(commit_frame(self._transfer_id, claim(self._manifest.manifest())))

    # On the loop

    async def _step(self) -> bool:
        if isinstance(self._failure, TransferRefused):  # a guard that was revoked: why is on its way
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._progress_s):
                    await self._stream.answered(None)
        if self._failure is not None:
            raise self._failure
        return False

    def _has_moved_all(self) -> bool:
        return not self._num_unsettled

    async def _end(self) -> None:
        self._send_end()

    async def _drain(self) -> None:
        while self._num_unsettled:
            self._wake.clear()
            await self._wake.wait()

    def _why(self) -> BaseException | None:
        error = super()._why()
        if error is None or isinstance(error, TransferError):
            return error
        return TransferUnfit(f"the write failed: {type(error).__name__}: {error}")

    def _num_bytes(self, rect: Rect) -> int:
        return len(rect.block_ids) * self._memory.width(rect.layer_start, rect.layer_stop)
