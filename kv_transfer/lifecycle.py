"""How every transfer at a sender lives and ends, whatever moves its bytes.

    open ──► moving ──seal, all sent──► sealed ──END answered──► verified, closed
               │                          │
               └── aborted, refused, stream lost, stalled ──► what is under way is waited for ──► closed

Sealed means that all of it has left and no local page is read any more: Commit may go out. Closed means that nothing is
written any more either, whatever happened.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from kv_transfer.base import Answer, Manifest, ManifestBuilder, TransferBroken
from kv_transfer.memory import BlockMemory
from kv_transfer.rect import Rect


class Stream(Protocol):
    """What the receiver is told under one ticket, and answers. On the event loop; its methods raise TransferError."""

    async def begin(self) -> None:
        """Opens the stream."""

    async def answered(self, num_chunks: int | None) -> None:
        """END has been sent: returns when the receiver has verified the manifest, of so many chunks. None: it has not,
        and this raises why the stream is over."""

    async def lost(self) -> None:
        """Returns when the peer has ended the stream by itself; then `answered` raises why."""

    async def close(self, error: BaseException | None) -> None:
        """Drops the stream if `error` ended it, which fails the ticket."""


class Lifecycle:
    """An `Outgoing` but for `push`: what differs by kind is how queued pages move."""

    _STALLED: str  # what a timeout means

    def __init__(self, memory: BlockMemory, stream: Stream, progress_s: float) -> None:
        self._memory = memory
        self._stream = stream
        self._progress_s = progress_s
        self._manifest = ManifestBuilder()
        self._lock = threading.Lock()
        self._queue: deque[Rect] = deque()  # pushed, not begun
        self._finishing = False
        self._ended = False  # END has been sent
        self._is_verified = False
        self._closed = False
        self._error: BaseException | None = None
        self._aborted: str | None = None
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._sealed = asyncio.Event()  # or ended by an error
        self._verified = asyncio.Event()  # likewise
        self._moving = self._loop.create_task(self._move())
        self._task = self._loop.create_task(self._run())

    @property
    def num_bytes(self) -> int:
        return self._manifest.num_bytes

    async def seal(self) -> Manifest:
        self._finishing = True
        self._wake.set()
        await self._sealed.wait()
        if not self._ended:
            await self._failed()
        return self._manifest.manifest()

    async def finish(self) -> Manifest:
        manifest = await self.seal()
        await self._verified.wait()
        if not self._is_verified:
            await self._failed()
        return manifest

    def end(self) -> None:
        """`seal` does it."""

    def commit(self, claim: Callable[[Manifest], bytes]) -> None:
        """Commit is a call of its own."""

    async def commit_answer(self) -> Answer | None:
        return None

    def abort(self, reason: str) -> None:
        self._notify(self._abort, reason)

    async def wait_closed(self) -> None:
        await asyncio.shield(self._task)

    def add_closed_callback(self, callback: Callable[[Any], None]) -> None:
        """On the loop: calls `callback` when the transfer is closed."""
        self._task.add_done_callback(lambda _: callback(self))

    async def _failed(self) -> None:
        await self.wait_closed()
        assert self._error is not None
        raise self._error

    async def _step(self) -> bool:
        """Moves some of what is there. False: nothing more can be done before something wakes the loop."""
        raise NotImplementedError

    def _has_moved_all(self) -> bool:
        """Asked after a step that found nothing to do."""
        raise NotImplementedError

    async def _end(self) -> None:
        """Sends END behind everything else."""
        raise NotImplementedError

    async def _drain(self) -> None:
        """Returns when nothing begun is under way; nothing new begins, the queue is empty and stays so."""
        raise NotImplementedError

    def _notify(self, callback, *args) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the transfer
            self._loop.call_soon_threadsafe(callback, *args)

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
            self._sealed.set()
            self._verified.set()
            with self._lock:
                self._closed = True
                self._queue.clear()
            await self._drain()
            await self._stream.close(self._error)

    def _why(self) -> BaseException | None:
        if self._moving.cancelled():
            return TransferBroken(f"aborted: {self._aborted or 'the sender stops'}")
        error = self._moving.exception()
        if isinstance(error, TimeoutError):
            return TransferBroken(f"{self._STALLED} for {self._progress_s} s")
        return error

    async def _move(self) -> None:
        async with asyncio.timeout(self._progress_s):
            await self._stream.begin()
        lost = self._loop.create_task(self._stream.lost())
        lost.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                self._wake.clear()
                if await self._step():
                    continue
                if lost.done() or (self._finishing and self._has_moved_all()):
                    break
                await self._wake.wait()
            async with asyncio.timeout(self._progress_s):
                if not self._ended and not lost.done():
                    await self._end()
                    self._ended = True
                self._sealed.set()
                await self._stream.answered(self._manifest.num_chunks if self._ended else None)
            self._is_verified = True
            self._verified.set()
        finally:
            lost.cancel()
