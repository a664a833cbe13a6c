"""The receiving end of the control socket: one thread that reads every link's frames and asks the Receiver itself.

Life of a transfer here:
 1. BEGIN names the ticket and the sender's incarnation; the Receiver refuses what it did not grant.
 2. PLACED chunks that have come meanwhile are read back and checked together, while more are written.
 3. END brings the manifest; the acknowledgement that answers it says that all of it has been verified.
 4. COMMIT, behind END, is not judged here: its answer comes from who adopts, on any thread, whatever became of the
    transfer.
 5. ABORT, or the end of the socket, fails what is under way. A ticket that ends badly is answered at once, by whoever
    ended it, so that its sender stops.

Exactly one acknowledgement answers a transfer: whoever takes it out of its link's table sends it. What comes for it
later is dropped. A peer that sends what is no frame loses its link, and with it its own transfers only.
"""

import contextlib
import logging
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable

import grpc
import torch
from google.protobuf.message import DecodeError

from kv_transfer.base import Answer, ChunkHeader, TransferBroken, TransferError, TransferUnfit
from kv_transfer.control import (
    MAX_BACKLOG,
    NO_TRANSFER,
    address,
    new_name,
    new_socket,
    pack_answer,
    receive,
    stranger,
)
from kv_transfer.frames import Ack, Frame, Kind
from kv_transfer.receiver import Receiver
from protos import kv_transfer_pb2 as kv

MAX_LINKS = 256
MAX_TRANSFERS = 4096  # of one link
_MAX_READ = 64  # packets of one link before the others have their turn
_log = logging.getLogger(__name__)
OnCommit = Callable[[kv.CommitRequest, Callable[[Answer], None]], None]


def no_commits(request: kv.CommitRequest, tell: Callable[[Answer], None]) -> None:
    """Of a receiver that nobody adopts from: benchmarks, tests of transfers alone."""
    tell(Answer(grpc.StatusCode.UNIMPLEMENTED.value[0], "nothing is committed here"))


class ControlServer:
    """Serves from its construction to `close`."""

    def __init__(self, receiver: Receiver, on_commit: OnCommit = no_commits) -> None:
        """`on_commit` is called with a COMMIT's request and whom to tell the answer, once and on any thread; on the
        server's, so it must not block. Raises OSError where there are no such sockets."""
        self.name = new_name()
        self._receiver = receiver
        self._on_commit = on_commit
        self._listener = new_socket()
        self._listener.bind(address(self.name))
        self._listener.listen(MAX_LINKS)
        self._listener.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closing = False
        self._links: set[_Link] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="kv-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Blocks until the thread has ended, for one check at most. What is under way fails. Idempotent."""
        if self._is_closing:
            return
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    # On the thread

    def _serve(self) -> None:
        if self._receiver.memory.slab.is_cuda:
            torch.cuda.set_device(self._receiver.memory.slab.device)
        try:
            while not self._is_closing:
                for key, _ in self._selector.select():
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data is not None:
                        self._read(key.data)
                    else:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(self._wake)
                self._flush()
        finally:
            for link in list(self._links):
                self._drop(link, TransferBroken("the receiver stops"))
            self._selector.close()
            self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has left already
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            if (who := stranger(connection)) or len(self._links) >= MAX_LINKS:
                _log.warning("a control link was refused: %s", who or f"{MAX_LINKS} are open")
                connection.close()
                return
            link = _Link(connection, self._receiver, self._on_commit, self._wake)
            self._links.add(link)
            self._selector.register(connection, selectors.EVENT_READ, link)

    def _read(self, link: "_Link") -> None:
        if link not in self._links:
            return
        try:
            is_open = link.read()
        except TransferError as error:
            _log.warning("a control link was cut off: %s", error)
            link.answer(NO_TRANSFER, Ack(0, error))
            self._drop(link, error)
        except OSError:
            self._drop(link, TransferBroken("the sender is gone"))
        except Exception as error:
            _log.exception("a control link was cut off")
            self._drop(link, TransferUnfit(f"the receiver failed: {error!r}"))
        else:
            if not is_open:
                self._drop(link, TransferBroken("the sender is gone"))

    def _flush(self) -> None:
        """Sends what peers that read late have not taken yet."""
        for link in [link for link in self._links if link.has_news]:
            try:
                is_all = link.flush()
            except (OSError, TransferError) as error:
                self._drop(link, TransferBroken(f"the sender takes no answers: {error}"))
            else:
                events = selectors.EVENT_READ | (0 if is_all else selectors.EVENT_WRITE)
                self._selector.modify(link.connection, events, link)

    def _drop(self, link: "_Link", error: TransferError) -> None:
        self._links.discard(link)
        self._selector.unregister(link.connection)
        link.close(error)


class _Link:
    """One sender's socket, and its transfers under way."""

    def __init__(self, connection: socket.socket, receiver: Receiver, on_commit: OnCommit, wake: int) -> None:
        self.connection = connection
        self.has_news = False
        self._receiver = receiver
        self._on_commit = on_commit
        self._wake = wake
        self._is_closed = False
        self._lock = threading.Lock()  # of backlog and table; watchers take it inside a ticket's lock
        self._backlog: deque[bytes] = deque()
        self._num_chunks: dict[bytes, int] = {}  # of each transfer under way, checked
        self._placed: dict[bytes, list[ChunkHeader]] = {}  # not looked at yet

    def read(self) -> bool:
        """Takes what has come; False at the end. Raises OSError, TransferError for what is no frame."""
        is_open = True
        try:
            for _ in range(_MAX_READ):
                packet = receive(self.connection)
                if packet is None:
                    break
                if not packet:
                    is_open = False
                    break
                self._take(Frame.parse(packet))
        finally:
            for transfer_id in list(self._placed):
                self._check(transfer_id)
        return is_open

    def answer(self, transfer_id: bytes, answer: Ack | Answer) -> None:
        """On any thread; does not block."""
        packet = pack_answer(transfer_id, answer)
        with self._lock:
            if self._is_closed:
                return
            if not self._backlog:
                try:
                    self.connection.send(packet)
                    return
                except BlockingIOError:
                    pass
                except OSError:  # reading will tell
                    return
            self._backlog.append(packet)
            self.has_news = True
            os.eventfd_write(self._wake, 1)

    def flush(self) -> bool:
        """Whether nothing is left. Raises OSError, TransferBroken when too much is."""
        with self._lock:
            while self._backlog:
                if len(self._backlog) > MAX_BACKLOG:
                    raise TransferBroken(f"{len(self._backlog)} wait: at most {MAX_BACKLOG} may")
                try:
                    self.connection.send(self._backlog[0])
                except BlockingIOError:
                    return False
                self._backlog.popleft()
            self.has_news = False
            return True

    def close(self, error: TransferError) -> None:
        with self._lock:
            self._is_closed, self.has_news = True, False
            self.connection.close()
        for transfer_id in list(self._num_chunks):
            self._end(transfer_id, error)

    def _take(self, frame: Frame) -> None:
        transfer_id = frame.transfer_id
        if frame.kind in (Kind.CHUNK, Kind.TOKEN):
            raise TransferBroken(f"{frame.kind.name} on a control socket")
        if frame.kind is Kind.BEGIN:
            return self._begin(frame)
        if frame.kind is Kind.COMMIT:
            return self._commit(frame)
        if transfer_id not in self._num_chunks:
            if frame.kind is not Kind.ABORT:  # sent before our word for it had been read, or out of order
                self.answer(transfer_id, Ack(0, TransferBroken(f"{frame.kind.name} of a transfer not under way")))
            return None
        if frame.kind is Kind.PLACED:
            self._placed.setdefault(transfer_id, []).append(frame.header)
            return None
        self._check(transfer_id)
        if frame.kind is Kind.ABORT:
            text = frame.payload.tobytes().decode(errors="replace")
            return self._end(transfer_id, TransferBroken(f"the sender is gone: {text}"))
        return self._try(transfer_id, lambda: self._finish(transfer_id, frame))

    def _begin(self, frame: Frame) -> None:
        transfer_id = frame.transfer_id
        if transfer_id in self._num_chunks:
            return self._end(transfer_id, TransferBroken("a second BEGIN"))
        if len(self._num_chunks) >= MAX_TRANSFERS:
            raise TransferBroken(f"more than {MAX_TRANSFERS} transfers at once")
        try:
            self._receiver.begin(transfer_id, frame.source())
        except TransferError as error:  # says nothing of a transfer of that name that may be under way
            return self.answer(transfer_id, Ack(0, error))
        self._num_chunks[transfer_id] = 0
        return self._try(
            transfer_id, lambda: self._receiver.watch(transfer_id, lambda error: self._tell(transfer_id, error))
        )

    def _commit(self, frame: Frame) -> None:
        try:
            request = kv.CommitRequest.FromString(frame.payload.tobytes())
        except DecodeError:
            raise TransferBroken("COMMIT holds no CommitRequest") from None
        if request.transfer_id != frame.transfer_id:
            raise TransferBroken("COMMIT of another transfer than its frame's")
        self._check(frame.transfer_id)
        self._on_commit(request, lambda answer: self.answer(frame.transfer_id, answer))

    def _check(self, transfer_id: bytes) -> None:
        headers = self._placed.pop(transfer_id, None)
        if headers and transfer_id in self._num_chunks:
            self._try(transfer_id, lambda: self._receiver.placed(transfer_id, headers))
            with self._lock:
                if transfer_id in self._num_chunks:
                    self._num_chunks[transfer_id] += len(headers)

    def _finish(self, transfer_id: bytes, frame: Frame) -> None:
        self._receiver.end(transfer_id, frame.manifest())
        self._tell(transfer_id)

    def _try(self, transfer_id: bytes, call) -> None:
        try:
            call()
        except TransferError as error:
            self._end(transfer_id, error)
        except Exception as error:
            _log.exception("a transfer failed")
            self._end(transfer_id, TransferUnfit(f"the receiver failed: {error!r}"))

    def _end(self, transfer_id: bytes, error: TransferError) -> None:
        """Fails a transfer under way, unless its ticket has heard already; the watcher or we tell the sender."""
        self._receiver.fail(transfer_id, error)
        self._tell(transfer_id, error)

    def _tell(self, transfer_id: bytes, error: TransferError | None = None) -> None:
        with self._lock:
            num_chunks = self._num_chunks.pop(transfer_id, None)
        if num_chunks is not None:
            self.answer(transfer_id, Ack(num_chunks, error))
