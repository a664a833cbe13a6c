"""The sending end of the control socket: frames leave from any thread, answers come on the event loop."""

import asyncio
import contextlib
import socket
import threading
from collections import deque

from kv_transfer.base import Answer, TransferBroken, TransferError
from kv_transfer.control import (
    MAX_PACKET_BYTES,
    NO_TRANSFER,
    address,
    is_name,
    new_socket,
    parse_answer,
    receive,
    stranger,
)
from kv_transfer.frames import Ack, abort_frame, begin_frame


class ControlLink:
    """One receiver's socket. Made, opened and closed on the event loop."""

    def __init__(self, connection: socket.socket, source: tuple[str, str]) -> None:
        self._connection = connection
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._backlog: deque[bytes] = deque()  # frames that the receiver has no room for; under the lock
        self._streams: dict[bytes, ControlStream] = {}
        self._commits: dict[bytes, ControlStream] = {}  # not answered yet; a stream may have closed by then
        self._error: TransferError | None = None  # why the link is over
        self._loop.add_reader(connection, self._read)

    @classmethod
    async def connect(cls, name: str, source: tuple[str, str], timeout_s: float) -> "ControlLink":
        """Raises TransferBroken where the socket cannot be reached."""
        return cls(await asyncio.to_thread(_dial, name, timeout_s), source)

    @property
    def is_over(self) -> bool:
        """The socket is gone. The receiver may be there."""
        return self._error is not None

    def open(self, transfer_id: bytes) -> "ControlStream":
        begin = begin_frame(transfer_id, self._source)
        stream = self._streams[transfer_id] = ControlStream(self, transfer_id, begin)
        if self._error is not None:
            stream.settle(Ack(0, self._error))
        return stream

    def send(self, frame: bytes) -> None:
        """On any thread; never blocks. What cannot be sent any more ends every transfer of the link."""
        with self._lock:
            if self._error is not None:
                return
            if not self._backlog:
                try:
                    self._connection.send(frame)
                    return
                except BlockingIOError:
                    self.notify(self._loop.add_writer, self._connection, self._flush)
                except OSError as error:
                    return self.notify(self._lose, _gone(error))
            self._backlog.append(frame)

    def commit(self, transfer_id: bytes, stream: "ControlStream", frame: bytes) -> None:
        """As `send`; the stream hears the answer, or that there will be none."""
        with self._lock:
            is_over = self._error is not None
            if not is_over:
                self._commits[transfer_id] = stream
        if is_over:
            return self.notify(stream.hear, None)
        self.send(frame)

    def forget(self, transfer_id: bytes, stream: "ControlStream") -> None:
        if self._streams.get(transfer_id) is stream:  # not another that was opened under the same ticket
            del self._streams[transfer_id]

    def close(self) -> None:
        """No transfer is under way."""
        self._lose(TransferBroken("the link is closed"))

    def notify(self, callback, *args) -> None:
        """Calls back on the event loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the link
            self._loop.call_soon_threadsafe(callback, *args)

    def _read(self) -> None:
        try:
            while self._error is None and (packet := receive(self._connection)) is not None:
                if not packet:
                    return self._lose(TransferBroken("the receiver is gone: it has closed the control socket"))
                transfer_id, answer = parse_answer(packet)
                if isinstance(answer, Answer):
                    if (stream := self._commits.pop(transfer_id, None)) is not None:
                        stream.hear(answer)
                elif transfer_id == NO_TRANSFER:
                    return self._lose(answer.error or TransferBroken("the receiver has cut the link off"))
                elif (stream := self._streams.get(transfer_id)) is not None:
                    stream.settle(answer)
        except OSError as error:
            self._lose(_gone(error))
        except TransferError as error:
            self._lose(error)

    def _flush(self) -> None:
        with self._lock:
            if self._error is not None:
                return
            try:
                while self._backlog:
                    self._connection.send(self._backlog[0])
                    self._backlog.popleft()
            except BlockingIOError:
                return
            except OSError as error:
                return self.notify(self._lose, _gone(error))
            self._loop.remove_writer(self._connection)

    def _lose(self, error: TransferError) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            self._backlog.clear()
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
            self._connection.close()
        for stream in list(self._streams.values()):
            stream.settle(Ack(0, error))
        while self._commits:
            self._commits.popitem()[1].hear(None)


class ControlStream:
    """One transfer's frames, its one acknowledgement, and the answer to its COMMIT: an Announcer
    (kv_transfer/placed.py)."""

    def __init__(self, link: ControlLink, transfer_id: bytes, begin: bytes) -> None:
        self._link = link
        self._transfer_id = transfer_id
        self._lock = threading.Lock()
        self._begin = begin  # BEGIN, until it is sent: by whoever sends first, which may be a thread
        self._ack: Ack | None = None
        self._over = asyncio.Event()
        self._answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()

    def announce(self, frame: bytes) -> None:
        with self._lock:
            self._send_begin()
            self._link.send(frame)

    def commit(self, frame: bytes) -> None:
        if len(frame) > MAX_PACKET_BYTES:
            return self._link.notify(self.hear, None)
        self._link.commit(self._transfer_id, self, frame)

    async def commit_answer(self) -> Answer | None:
        return await asyncio.shield(self._answer)

    async def begin(self) -> None:
        with self._lock:
            self._send_begin()

    async def answered(self, num_chunks: int | None) -> None:
        await self._over.wait()
        assert self._ack is not None
        if self._ack.error is not None:
            raise self._ack.error
        if self._ack.num_chunks != num_chunks:
            raise TransferBroken(f"the receiver has {self._ack.num_chunks} chunks: {num_chunks} were announced")

    async def lost(self) -> None:
        await self._over.wait()

    async def close(self, error: BaseException | None) -> None:
        if error is not None and self._ack is None:
            self._link.send(abort_frame(self._transfer_id, str(error)))
        self._link.forget(self._transfer_id, self)

    def _send_begin(self) -> None:
        begin, self._begin = self._begin, b""
        if begin:
            self._link.send(begin)

    def settle(self, ack: Ack) -> None:
        if self._ack is None:
            self._ack = ack
            self._over.set()

    def hear(self, answer: Answer | None) -> None:
        if not self._answer.done():
            self._answer.set_result(answer)


def _dial(name: str, timeout_s: float) -> socket.socket:
    if not is_name(name):
        raise TransferBroken(f"{name!r} is no control socket")
    connection = new_socket()
    try:
        connection.settimeout(timeout_s)
        connection.connect(address(name))
        if who := stranger(connection):
            raise TransferBroken(f"the control socket is held by {who}")
        connection.setblocking(False)
    except OSError as error:
        connection.close()
        raise TransferBroken(f"the control socket cannot be reached: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _gone(error: OSError) -> TransferBroken:
    return TransferBroken(f"the receiver is gone: {error}")
