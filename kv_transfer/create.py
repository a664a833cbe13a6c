"""A worker's transports: what it can receive by, what it can send by, and the link to each peer."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc.aio

from kv_transfer import local, locality
from kv_transfer.base import (
    Endpoint,
    Link,
    ObjectStore,
    Placement,
    Sender,
    TransferBroken,
    TransferError,
    TransferRefused,
)
from kv_transfer.choose import AUTO, ONE_SIDED, candidates, wanted
from kv_transfer.control_server import ControlServer
from kv_transfer.grpc_stream import GrpcWire, push_handler
from kv_transfer.heap import keep_freed_pages
from kv_transfer.memory import BlockMemory
from kv_transfer.outgoing import ChunkedOutgoing, Wire
from kv_transfer.ray_store import RayStoreWire
from kv_transfer.receiver import Receiver
from kv_transfer.rounding import RoundedMemory
from protos.grpc_options import CHANNEL_OPTIONS

# What a sender makes its chunks of: a message's buffers and their copies stay in the processor's cache; an object's
# fixed cost of most of a millisecond is spread over more bytes.
CHUNK_BYTES = {"local": 1 << 20, "grpc": 1 << 20, "ray_store": 8 << 20}
TRANSPORTS = tuple(CHUNK_BYTES)
MAX_CHUNK_BYTES = 16 << 20  # what a receiver takes

# Up to this much a stream buffers, so that the next chunk is packed while the last ones are written.
_KV_CHANNEL_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.http2.write_buffer_size", 4 << 20)]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """The link to a peer, and what was passed over for it."""

    link: Link
    why: str


class Transports:
    """Every transport that `setting` (one's name, or auto) allows in this worker. Made and used on one event loop.

    `endpoints` is what peers are told at the handshake, `speaks` what this worker can send over.
    """

    def __init__(
        self,
        setting: str,
        receiver: Receiver,
        source: tuple[str, str],
        object_store: ObjectStore | None = None,
        progress_s: float = 10.0,
    ) -> None:
        """Raises ValueError for a setting that cannot be had here."""
        self._setting = setting
        self._receiver = receiver
        self._source = source
        self._object_store = object_store
        self._progress_s = progress_s
        self._senders: dict[tuple[str, bool], Sender] = {}  # by transport, and whether they round
        self._undo: list[Callable[[], None]] = []
        self._control: ControlServer | None = None
        self.missing = {name: why for name in wanted(setting) if (why := _missing(name, receiver.memory, object_store))}
        if setting == AUTO and not receiver.memory.slab.is_cuda:
            self.missing.setdefault("nixl", "asked for by name where pools are in CPU memory: an idle agent costs CPU")
        self._agent: object = None  # of NIXL: who was told of it can write for as long as it is held
        if "nixl" in wanted(setting) and "nixl" not in self.missing:
            from kv_transfer import nixl

            self._agent = agent = nixl.try_agent(receiver.memory)
            if isinstance(agent, str):
                self.missing["nixl"] = agent
        self.speaks = tuple(name for name in wanted(setting) if name not in self.missing)
        if not self.speaks:
            raise ValueError(f"transport {setting!r}: {'; '.join(self.missing.values())}")
        self.endpoints: list[Endpoint] = []

    def serve(self, server: grpc.aio.Server, address: str) -> None:
        """Makes the receiver reachable. Before the server starts. A transport that cannot be offered, a kernel of which
        does not compile, say, is left out with the reason; ValueError when there is no other."""
        control = ""
        if set(self.speaks) & ONE_SIDED:
            try:
                self._control = ControlServer(self._receiver)
                control = self._control.name
            except OSError as error:
                _log.warning("no control socket, one-sided transfers are announced over gRPC: %s", error)
        for name in self.speaks:
            try:
                self.endpoints.append(Endpoint(name, _locality(name), _export(name, self._receiver, control)))
            except Exception as error:
                _log.exception("transport %s is left out", name)
                self.missing[name] = f"it cannot be offered: {_first_line(error)}"
        self.speaks = tuple(name for name in self.speaks if name not in self.missing)
        if not self.speaks:
            if self._control is not None:
                self._control.close()
            raise ValueError(f"transport {self._setting!r}: {'; '.join(self.missing.values())}")
        if "local" in self.speaks:
            self._undo.append(serve("local", self._receiver, None, None, address))
        if set(self.speaks) - {"local"}:
            keep_freed_pages()
            server.add_generic_rpc_handlers((push_handler(self._receiver, self._object_store),))

    async def connect(
        self,
        address: str,
        endpoints: Sequence[Endpoint],
        block_size: int,
        is_rounded: bool = False,
        unfit: Mapping[str, str] | None = None,
    ) -> Connection:
        """The best link to the receiver at `address`, whose blocks hold `block_size` tokens. `is_rounded`: it keeps
        float8, and we do not. `unfit`: transports that are only for want of others, and why. Raises TransferRefused
        when there is none."""
        has_equal_blocks = block_size == self._receiver.memory.block_size and not is_rounded
        mine = {name: _locality(name) for name in self.speaks}
        chosen, left_out = candidates(self._setting, mine, self.missing, endpoints, has_equal_blocks)
        unfit = unfit or {}
        chosen.sort(key=lambda one: one.transport in unfit)
        for endpoint in chosen:
            try:
                link = await self._sender(endpoint.transport, is_rounded).connect(address, endpoint)
            except TransferError as error:
                left_out.append(f"{endpoint.transport}: {error}")
            except Exception as error:
                _log.exception("transport %s to %s is passed over", endpoint.transport, address)
                left_out.append(f"{endpoint.transport}: {_first_line(error)}")
            else:
                behind = chosen[chosen.index(endpoint) + 1 :]
                left_out += [f"{one.transport}: {unfit[one.transport]}" for one in behind if one.transport in unfit]
                return Connection(link, "; ".join([*left_out, link.note] if link.note else left_out))
        raise TransferRefused(f"no transport leads to {address}: {'; '.join(left_out)}")

    async def close(self) -> None:
        await asyncio.gather(*(sender.close() for sender in self._senders.values()))
        for undo in self._undo:
            undo()
        if self._control is not None:
            await asyncio.to_thread(self._control.close)

    def _sender(self, transport: str, is_rounded: bool) -> Sender:
        key = transport, is_rounded
        if key not in self._senders:
            memory = RoundedMemory.of(self._receiver.memory) if is_rounded else self._receiver.memory
            self._senders[key] = create_sender(
                transport, memory, self._source, self._object_store, progress_s=self._progress_s
            )
        return self._senders[key]


def create_sender(
    transport: str,
    memory: BlockMemory,
    source: tuple[str, str],
    object_store: ObjectStore | None = None,
    max_chunk_bytes: int | None = None,
    progress_s: float = 10.0,
) -> Sender:
    """A sender of `memory`'s pages in the name of `source`, (worker id, incarnation). Make it on the loop that uses it.

    `progress_s` bounds how long a peer may take nothing. Raises ValueError naming field, value and allowed range.
    """
    if transport == "cuda_ipc":
        from kv_transfer.cuda_ipc import CudaIpcSender

        return CudaIpcSender(memory, source, progress_s)
    if transport == "nixl":
        from kv_transfer import nixl

        return nixl.NixlSender(nixl.agent_of(memory), source, progress_s)
    _check(transport, object_store)
    limit = CHUNK_BYTES[transport] if max_chunk_bytes is None else max_chunk_bytes
    _check_chunk_bytes(memory, limit)
    if transport != "local":
        keep_freed_pages()
    return _Sender(transport, memory, source, object_store, limit, progress_s)


def serve(
    transport: str,
    receiver: Receiver,
    server: grpc.aio.Server | None,
    object_store: ObjectStore | None = None,
    address: str = "",
) -> Callable[[], None]:
    """Makes `receiver` reachable: over `server`, or for `local` under `address` in this process. Call the result to
    end a local registration; a server's ends with the server."""
    _check(transport, object_store)
    if transport == "local":
        return local.register(address, receiver)
    assert server is not None
    keep_freed_pages()
    server.add_generic_rpc_handlers((push_handler(receiver, object_store),))
    return lambda: None


class _Sender:
    """Of a two-sided transport."""

    def __init__(
        self,
        transport: str,
        memory: BlockMemory,
        source: tuple[str, str],
        object_store: ObjectStore | None,
        max_chunk_bytes: int,
        progress_s: float,
    ) -> None:
        self.transport = transport
        self.memory = memory
        self.source = source
        self.object_store = object_store
        self.max_chunk_bytes = max_chunk_bytes
        self.progress_s = progress_s
        # A put may wait for room in the store, and one thread copies faster than a receiver takes. What only copies
        # into a message is done at once: a thread costs more than it saves.
        # GPU pages, and those that are rounded, are read by a thread too, while the chunk before is sent.
        is_slow = object_store is not None or memory.slab.is_cuda or isinstance(memory, RoundedMemory)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="kv-put") if is_slow else None
        self._links: list[_TwoSidedLink] = []

    async def connect(self, address: str, endpoint: Endpoint) -> "_TwoSidedLink":
        self._links.append(_TwoSidedLink(self, address))
        return self._links[-1]

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))
        if self.pool is not None:
            self.pool.shutdown()


class _TwoSidedLink:
    """One channel to one peer."""

    note = ""

    def __init__(self, sender: _Sender, address: str) -> None:
        self._sender = sender
        self._address = address
        self._channel: grpc.aio.Channel | None = None
        self._open: set[ChunkedOutgoing] = set()
        self._is_closed = False

    @property
    def transport(self) -> str:
        return self._sender.transport

    def open(
        self, transfer_id: bytes, max_chunk_bytes: int | None = None, placement: Placement | None = None
    ) -> ChunkedOutgoing:
        if self._is_closed:
            raise TransferBroken("the link is closed")
        sender = self._sender
        limit = min(sender.max_chunk_bytes, max_chunk_bytes or sender.max_chunk_bytes)
        _check_chunk_bytes(sender.memory, limit)
        outgoing = ChunkedOutgoing(sender.memory, self._wire(transfer_id), sender.pool, limit, sender.progress_s)
        self._open.add(outgoing)
        outgoing.add_closed_callback(self._open.discard)
        return outgoing

    async def close(self) -> None:
        self._is_closed = True
        outgoings = list(self._open)
        for outgoing in outgoings:
            outgoing.abort("the link closes")
        await asyncio.gather(*(outgoing.wait_closed() for outgoing in outgoings))
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None

    def _wire(self, transfer_id: bytes) -> Wire:
        sender = self._sender
        if sender.transport == "local":
            return local.LocalWire(self._address, transfer_id, sender.source)
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_KV_CHANNEL_OPTIONS)
        if sender.object_store is not None:
            return RayStoreWire(self._channel, transfer_id, sender.source, sender.object_store)
        return GrpcWire(self._channel, transfer_id, sender.source)


def _missing(transport: str, memory: BlockMemory, object_store: ObjectStore | None) -> str:
    """Why this worker does not have the transport; empty if it does."""
    if transport == "ray_store" and object_store is None:
        return "no object store was given"
    if transport == "cuda_ipc":
        if not memory.slab.is_cuda:
            return "the pool is not in GPU memory"
        from kv_transfer import cuda_ipc  # Triton is not everywhere

        return cuda_ipc.missing(memory)
    if transport == "nixl":
        from kv_transfer import nixl  # an extra

        return nixl.missing()
    return "" if transport in CHUNK_BYTES else "not in this version"


def _first_line(error: Exception) -> str:
    """A compiler's error has many."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _locality(transport: str) -> str:
    """Our value of what must be equal on both sides."""
    return {"local": locality.process, "cuda_ipc": locality.host}.get(transport, str)()


def _export(transport: str, receiver: Receiver, control: str) -> bytes:
    """What a sender needs beside the address. `control`: name of the control socket, if there is one."""
    if transport == "cuda_ipc":
        from kv_transfer import cuda_ipc

        return cuda_ipc.export(receiver.memory, receiver.guards_name, control)
    if transport == "nixl":
        from kv_transfer import nixl

        return nixl.export(receiver.memory, receiver.guards_name, control)
    return b""


def _check(transport: str, object_store: ObjectStore | None) -> None:
    if transport not in TRANSPORTS:
        raise ValueError(f"transport {transport!r}: must be one of {', '.join(TRANSPORTS)}")
    if (transport == "ray_store") != (object_store is not None):
        raise ValueError(
            f"object_store {object_store!r} with transport {transport!r}: ray_store needs one, others none"
        )


def _check_chunk_bytes(memory: BlockMemory, max_chunk_bytes: int) -> None:
    layer = max(memory.width(index, index + 1) for index in range(memory.num_layers))
    if not layer <= max_chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(
            f"max_chunk_bytes {max_chunk_bytes}: must be in [{layer}, {MAX_CHUNK_BYTES}], a layer of a block at least"
        )
