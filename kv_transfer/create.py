"""A transport by its name: the sender, and what the receiving side needs on its server."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc.aio

from kv_transfer import local
from kv_transfer.base import ObjectStore, Sender
from kv_transfer.grpc_stream import GrpcWire, push_handler
from kv_transfer.heap import keep_freed_pages
from kv_transfer.memory import BlockMemory
from kv_transfer.outgoing import ChunkedOutgoing, Wire
from kv_transfer.ray_store import RayStoreWire
from kv_transfer.receiver import Receiver
from protos.grpc_options import CHANNEL_OPTIONS

# What a sender makes its chunks of: a message's buffers and their copies stay in the processor's cache; an object's
# fixed cost of most of a millisecond is spread over more bytes.
CHUNK_BYTES = {"local": 1 << 20, "grpc": 1 << 20, "ray_store": 8 << 20}
TRANSPORTS = tuple(CHUNK_BYTES)
MAX_CHUNK_BYTES = 16 << 20  # what a receiver takes

# Up to this much a stream buffers, so that the next chunk is packed while the last ones are written.
_KV_CHANNEL_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.http2.write_buffer_size", 4 << 20)]


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
    """Opens transfers; one channel per peer."""

    def __init__(
        self,
        transport: str,
        memory: BlockMemory,
        source: tuple[str, str],
        object_store: ObjectStore | None,
        max_chunk_bytes: int,
        progress_s: float,
    ) -> None:
        self._transport = transport
        self._memory = memory
        self._source = source
        self._object_store = object_store
        self._max_chunk_bytes = max_chunk_bytes
        self._progress_s = progress_s
        # A put may wait for room in the store. What only copies is done at once: a thread costs more than it saves.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="kv-put") if object_store is not None else None
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._open: set[ChunkedOutgoing] = set()

    def open(self, address: str, transfer_id: bytes, max_chunk_bytes: int | None = None) -> ChunkedOutgoing:
        limit = min(self._max_chunk_bytes, max_chunk_bytes or self._max_chunk_bytes)
        _check_chunk_bytes(self._memory, limit)
        outgoing = ChunkedOutgoing(self._memory, self._wire(address, transfer_id), self._pool, limit, self._progress_s)
        self._open.add(outgoing)
        outgoing.add_closed_callback(self._open.discard)
        return outgoing

    async def close(self) -> None:
        outgoings = list(self._open)
        for outgoing in outgoings:
            outgoing.abort("the sender closes")
        await asyncio.gather(*(outgoing.wait_closed() for outgoing in outgoings))
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))
        self._channels.clear()
        if self._pool is not None:
            self._pool.shutdown()

    def _wire(self, address: str, transfer_id: bytes) -> Wire:
        if self._transport == "local":
            return local.LocalWire(address, transfer_id, self._source)
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=_KV_CHANNEL_OPTIONS)
        if self._object_store is not None:
            return RayStoreWire(channel, transfer_id, self._source, self._object_store)
        return GrpcWire(channel, transfer_id, self._source)


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
