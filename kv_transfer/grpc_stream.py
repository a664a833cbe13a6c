"""Transport `grpc`: raw frames on one gRPC stream per transfer, /pdserve.v1.KvTransferService/Push. See frames.py.

Life of a stream at the receiving worker, on its event loop:
 1. BEGIN names the ticket and the sender's incarnation; the receiver refuses what it did not grant.
 2. Each CHUNK is checked and scattered straight from the message into the pages. A TOKEN's bytes are fetched from the
    object store on a pool thread first, and acknowledged.
 3. END gives the counts; the acknowledgement that answers it says that all of it lies in the pages.
 4. A stream that ends otherwise fails its transfer. Nothing is visible before Commit in any case.

Per byte a stream costs, beside the socket: one gathering copy and gRPC's own at the sender; gRPC's and one scattering
copy at the receiver; a checksum on each side.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import numpy as np

from kv_transfer.base import ChunkHeader, Manifest, ObjectStore, TransferBroken, TransferError
from kv_transfer.frames import Frame, Kind, begin_frame, chunk_frame, end_frame, pack_ack, parse_ack
from kv_transfer.receiver import Receiver

SERVICE = "pdserve.v1.KvTransferService"
PUSH = f"/{SERVICE}/Push"


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

    async def push(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        transfer_id, num_chunks = None, 0
        failure: TransferError = TransferBroken("the sender is gone")
        try:
            async with asyncio.timeout(self._receiver.progress_s):
                message = await context.read()
            transfer_id = self._begin(message)
            while isinstance(message := await context.read(), bytes):
                frame = Frame.parse(message)
                if frame.transfer_id != transfer_id:
                    raise TransferBroken("frame of another transfer")
                if frame.kind is Kind.END:
                    self._receiver.end(transfer_id, *frame.counts())
                    await context.write(pack_ack(num_chunks))
                    return
                if frame.kind is Kind.CHUNK:
                    self._receiver.chunk(transfer_id, frame.header, [frame.payload])
                elif frame.kind is Kind.TOKEN:
                    await asyncio.get_running_loop().run_in_executor(self._pool, self._fetch, frame)
                    await context.write(pack_ack(num_chunks + 1))
                else:
                    raise TransferBroken("a second BEGIN")
                num_chunks += 1
            raise TransferBroken(f"the stream ended after {num_chunks} chunks without END")
        except TransferError as error:
            failure = error
            await context.write(pack_ack(num_chunks, error))
        except TimeoutError:
            await context.write(pack_ack(0, TransferBroken("no BEGIN came")))
        except Exception as error:
            failure = TransferBroken(f"the receiver failed: {error!r}")
            raise
        finally:
            if transfer_id is not None:
                self._receiver.fail(transfer_id, failure)  # without effect after END

    def _begin(self, message: object) -> bytes:
        if not isinstance(message, bytes):
            raise TransferBroken("the stream ended before BEGIN")
        frame = Frame.parse(message)
        if frame.kind is not Kind.BEGIN:
            raise TransferBroken(f"{frame.kind.name} before BEGIN")
        self._receiver.begin(frame.transfer_id, frame.source())
        return frame.transfer_id

    def _fetch(self, frame: Frame) -> None:
        if self._object_store is None:
            raise TransferBroken("chunk in an object store: this worker has none")
        arrays = self._object_store.get(frame.token(), self._receiver.progress_s)
        self._receiver.chunk(frame.transfer_id, frame.header, arrays)


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

    async def begin(self) -> None:
        self._call = self._channel.stream_stream(PUSH)()  # type: ignore[call-arg]  # identity serializers
        self._acks = asyncio.create_task(self._read_acks(self._call))
        await self._write(begin_frame(self._transfer_id, self._source))

    def pack(self, header: ChunkHeader, pages: Sequence[np.ndarray]) -> bytes:
        return chunk_frame(self._transfer_id, header, pages)

    async def send(self, packed: bytes) -> None:
        await self._write(packed)

    async def end(self, manifest: Manifest) -> None:
        await self._write(end_frame(self._transfer_id, manifest.num_chunks, manifest.num_bytes))
        assert self._call is not None and self._acks is not None
        await self._call.done_writing()
        await asyncio.shield(self._acks)
        if self._error is not None or self.num_acked != manifest.num_chunks or not await self._is_ok():
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
                    self.num_acked, self._error = parse_ack(message)
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
