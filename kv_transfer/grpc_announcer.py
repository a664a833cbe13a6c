"""What a one-sided sender says over a Push stream, where no control socket is in reach: another host or container."""

import asyncio
import contextlib

import grpc.aio

from kv_transfer.base import Answer, TransferBroken, TransferError
from kv_transfer.frames import Frame, Kind
from kv_transfer.grpc_stream import GrpcWire


class GrpcAnnouncer:
    """One transfer's Push stream: an Announcer (kv_transfer/placed.py)."""

    def __init__(
        self, channel: grpc.aio.Channel, transfer_id: bytes, source: tuple[str, str], progress_s: float
    ) -> None:
        self._wire = GrpcWire(channel, transfer_id, source)
        self._progress_s = progress_s
        self._loop = asyncio.get_running_loop()
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._sending: asyncio.Task[None] | None = None

    def announce(self, frame: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the transfer
            self._loop.call_soon_threadsafe(self._frames.put_nowait, frame)

    def commit(self, frame: bytes) -> None:
        """Commit is a call of its own."""

    async def commit_answer(self) -> Answer | None:
        return None

    async def begin(self) -> None:
        await self._wire.begin()
        self._sending = self._loop.create_task(self._send())

    async def answered(self, num_chunks: int | None) -> None:
        await self._wire.answered(num_chunks)

    async def lost(self) -> None:
        await self._wire.lost()

    async def close(self, error: BaseException | None) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])
        await self._wire.close(error)

    async def _send(self) -> None:
        """Until END. A stream that breaks says so by its acknowledgements; one that takes nothing is dropped."""
        try:
            while True:
                frame = await self._frames.get()
                async with asyncio.timeout(self._progress_s):
                    await self._wire.send(frame)
                if Frame.parse(frame).kind is Kind.END:
                    return await self._wire.done()
        except TimeoutError:
            await self._wire.close(TransferBroken("the receiver took nothing"))
        except TransferError:
            return
