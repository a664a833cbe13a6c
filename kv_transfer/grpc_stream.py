"""Transport `grpc`: raw frames on one gRPC stream per transfer, /pdserve.v1.KvTransferService/Push. See frames.py.

Life of a stream at the receiving worker, on its event loop:
 1. BEGIN names the ticket and the sender's incarnation; the receiver refuses what it did not grant.
 2. Each CHUNK is scattered straight from the message into the pages, and checked there. A TOKEN's bytes are fetched
    from the object store on a pool thread first, and acknowledged. PLACED chunks lie in the pages already: those that
    have come meanwhile are read back and checked together, on a thread, while more are written.
 3. END gives the counts; the acknowledgement that answers it says that all of it lies in the pages.
 4. A stream that ends otherwise fails its transfer. A ticket that ends otherwise ends its stream, so that the sender
    stops at once. Nothing is visible before Commit in any case.

Per byte a stream costs, beside the socket: one gathering copy and gRPC's own at the sender; gRPC's and one scattering
copy at the receiver; a checksum on each side.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import grpc
import grpc.aio
import numpy as np

from kv_transfer.base import ChunkHeader, Manifest, ObjectStore, TransferBroken, TransferError, TransferUnfit
from kv_transfer.checksum import crc32c
from kv_transfer.frames import Ack, Frame, Kind, begin_frame, chunk_frame, end_frame
from kv_transfer.receiver import Receiver

SERVICE = "pdserve.v1.KvTransferService"
PUSH = f"/{SERVICE}/Push"
_log = logging.getLogger(__name__)


def push_handler(receiver: Receiver, object_store: ObjectStore | None = None) -> grpc.GenericRpcHandler:
    """The generic handler of Push alone. gRPC asks a server's handlers in turn, so the protobuf servicer registered
    under the same service name keeps its own methods."""
    pool = ThreadPoolExecutor(2, thread_name_prefix="kv-fetch") if object_store is not None else None
    handler = _PushHandler(receiver, object_store, pool)
    # Identity serializers (None): the message's bytes are the frame.
    method = grpc.stream_stream_rpc_method_handler(handler.push)
    return grpc.method_handlers_generic_handler(SERVICE, {"Push": method})


class _PushHandler:
    def __init__(self, receiver: Receiver, object_store: ObjectStore | None, pool: ThreadPoolExecutor | None) -> None:
        self._receiver = receiver
        self._object_store = object_store
        self._pool = pool
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="kv-check")  # its thread starts with the first use

    async def push(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        transfer_id, verdict, stream = None, None, _Incoming(context)
        try:
            async with asyncio.timeout(self._receiver.progress_s):
                message = await context.read()
            transfer_id = self._begin(message)
            self._receiver.watch(transfer_id, stream.tell)
            await self._take(transfer_id, stream)
        except TransferError as error:
            verdict = error
        except TimeoutError:
            verdict = TransferBroken("no BEGIN came")
        except Exception as error:
            _log.exception("a transfer failed")
            verdict = TransferUnfit(f"the receiver failed: {error!r}")
        except asyncio.CancelledError:
            verdict = TransferBroken("the sender is gone")
            raise
        finally:
            stream.close()
            if transfer_id is not None and verdict is not None:
                self._receiver.fail(transfer_id, verdict)
        await context.write(Ack(stream.num_chunks, verdict).pack())

    async def _take(self, transfer_id: bytes, stream: "_Incoming") -> None:
        """Everything after BEGIN. Returns when END has come and agrees."""
        while True:
            frame = Frame.parse(await stream.read())
            if frame.transfer_id != transfer_id:
                raise TransferBroken("frame of another transfer")
            if frame.kind is Kind.END:
                await stream.checked()
                self._receiver.end(transfer_id, frame.manifest())
                return
            if frame.kind is Kind.CHUNK:
                self._receiver.chunk(transfer_id, frame.header, [frame.payload])
                stream.num_chunks += 1
            elif frame.kind is Kind.TOKEN:
                is_mapped = await asyncio.get_running_loop().run_in_executor(self._pool, self._fetch, frame)
                stream.num_chunks += 1
                await stream.context.write(Ack(stream.num_chunks, is_mapped=is_mapped).pack())
            elif frame.kind is Kind.PLACED:
                stream.check(frame.header, partial(self._check, transfer_id))
            else:
                raise TransferBroken(f"{frame.kind.name} in the middle of a stream")

    async def _check(self, transfer_id: bytes, headers: list[ChunkHeader]) -> None:
        # A bad chunk fails the ticket, and that ends the stream.
        with contextlib.suppress(TransferError):
            await asyncio.get_running_loop().run_in_executor(self._checks, self._receiver.placed, transfer_id, headers)

    def _begin(self, message: object) -> bytes:
        if not isinstance(message, bytes):
            raise TransferBroken("the stream ended before BEGIN")
        frame = Frame.parse(message)
        if frame.kind is not Kind.BEGIN:
            raise TransferBroken(f"{frame.kind.name} before BEGIN")
        self._receiver.begin(frame.transfer_id, frame.source())
        return frame.transfer_id

    def _fetch(self, frame: Frame) -> bool:
        if self._object_store is None:
            raise TransferBroken("chunk in an object store: this worker has none")
        array, is_mapped = self._object_store.get(frame.token(), frame.header.num_bytes, self._receiver.progress_s)
        self._receiver.chunk(frame.transfer_id, frame.header, [array])
        return is_mapped


class _Incoming:
    """A stream being read, which ends early if its ticket does: released, expired or failed while nothing comes."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self.context = context
        self.num_chunks = 0
        self._loop = asyncio.get_running_loop()
        self._over: TransferError | None = None
        self._placed: list[ChunkHeader] = []  # not looked at yet
        self._checking: asyncio.Task[None] | None = None
        self._reading: asyncio.Task | None = None  # the handler's own task, while it waits for a message

    def tell(self, error: TransferError) -> None:
        """The ticket has ended badly. On any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end, error)

    async def read(self) -> bytes:
        if self._over is not None:
            raise self._over
        self._reading = asyncio.current_task()
        try:
            message = await self.context.read()
        except asyncio.CancelledError:
            if self._over is not None:
                raise self._over from None
            raise
        finally:
            self._reading = None
        if not isinstance(message, bytes):
            raise TransferBroken(f"the stream ended after {self.num_chunks} chunks without END")
        return message

    def check(self, header: ChunkHeader, check: Callable[[list[ChunkHeader]], Coroutine[None, None, None]]) -> None:
        """Leaves a PLACED chunk to be checked, with others that come before the last check has ended."""
        self._placed.append(header)
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check_all(check))

    async def checked(self) -> None:
        """Returns when every chunk left to be checked has been; raises what is unforeseen."""
        if self._checking is not None:
            await self._checking

    async def _check_all(self, check: Callable[[list[ChunkHeader]], Coroutine[None, None, None]]) -> None:
        while self._placed:
            headers, self._placed = self._placed, []
            await check(headers)
            self.num_chunks += len(headers)

    def close(self) -> None:
        if self._checking is not None:
            self._checking.cancel()

    def _end(self, error: TransferError) -> None:
        self._over = error
        if self._reading is not None:
            self._reading.cancel()


class GrpcWire:
    """One Push stream. The acknowledgements are read as they come, so a refusal is noticed while nothing is sent."""

    def __init__(self, channel: grpc.aio.Channel, transfer_id: bytes, source: tuple[str, str]) -> None:
        self._transfer_id = transfer_id
        self._source = source
        self._channel = channel
        self._call: grpc.aio.StreamStreamCall | None = None
        self._acks: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._error: TransferError | None = None  # the receiver's verdict
        self.num_acked = 0
        self.is_mapped = False  # the receiver maps the objects whose tokens came by this stream

    async def begin(self) -> None:
        self._call = self._channel.stream_stream(PUSH)()  # type: ignore[call-arg]  # identity serializers
        self._acks = asyncio.create_task(self._read_acks(self._call))
        await self._write(begin_frame(self._transfer_id, self._source))

    def pack(self, header: ChunkHeader, pages: Sequence[np.ndarray]) -> tuple[ChunkHeader, bytes]:
        header = replace(header, checksum=crc32c(pages))
        return header, chunk_frame(self._transfer_id, header, pages)

    async def send(self, packed: bytes) -> None:
        await self._write(packed)

    async def end(self, manifest: Manifest) -> None:
        await self._write(end_frame(self._transfer_id, manifest))
        await self.done()

    async def done(self) -> None:
        """END has been sent."""
        assert self._call is not None
        await self._call.done_writing()

    async def answered(self, num_chunks: int | None) -> None:
        assert self._acks is not None
        await asyncio.shield(self._acks)
        if self._error is not None or self.num_acked != num_chunks or not await self._is_ok():
            raise await self._reason()

    async def lost(self) -> None:
        assert self._acks is not None
        await asyncio.shield(self._acks)

    async def close(self, error: BaseException | None) -> None:
        if self._call is not None and error is not None:
            self._call.cancel()
        if self._acks is not None:
            await asyncio.wait([self._acks])

    async def wait_acked(self, num_chunks: int) -> None:
        """Returns when the receiver has acknowledged that many chunks."""
        assert self._acks is not None
        while self.num_acked < num_chunks:
            self._progress.clear()
            if self._acks.done():
                raise await self._reason()
            await self._progress.wait()

    async def _write(self, message: bytes) -> None:
        assert self._call is not None
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._reason() from None

    async def _read_acks(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            with contextlib.suppress(grpc.aio.AioRpcError):
                while self._error is None and isinstance(message := await call.read(), bytes):
                    ack = Ack.parse(message)
                    self.num_acked, self._error = ack.num_chunks, ack.error
                    self.is_mapped |= ack.is_mapped
                    self._progress.set()
        finally:
            self._progress.set()

    async def _is_ok(self) -> bool:
        assert self._call is not None
        return await self._call.code() is grpc.StatusCode.OK

    async def _reason(self) -> TransferError:
        """Why the stream ended: the receiver's own word, or else the connection's."""
        assert self._call is not None and self._acks is not None
        await asyncio.shield(self._acks)
        if self._error is not None:
            return self._error
        code, details = await self._call.code(), await self._call.details()
        return TransferBroken(f"the stream broke after {self.num_acked} acknowledged chunks: {code.name} {details}")
