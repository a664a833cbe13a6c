"""Senders and links of every one-sided transport: a peer's pool mapped at the handshake, a transfer per ticket."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import grpc.aio

from kv_transfer.base import Endpoint, Placement, TransferBroken, TransferRefused
from kv_transfer.control_link import ControlLink
from kv_transfer.grpc_announcer import GrpcAnnouncer
from kv_transfer.memory import BlockMemory
from kv_transfer.placed import MAX_WRITE_BYTES, Announcer, PlacedOutgoing, Threads, Writer
from protos.grpc_options import CHANNEL_OPTIONS


class MappedPool(Protocol):
    """One receiver's pool, within reach. Made and closed on the launching thread."""

    @property
    def control(self) -> str:
        """Name of the receiver's control socket; empty: none within reach."""

    def holds(self, placement: Placement) -> bool:
        """Whether all that `placement` names lies in the pool."""

    def writer(self, placement: Placement) -> Writer:
        """For one transfer. On the event loop."""

    def close(self) -> None:
        """Lets go of the pool; no write is under way."""


class OneSidedSender:
    """Its links share two threads."""

    def __init__(
        self,
        transport: str,
        memory: BlockMemory,
        source: tuple[str, str],
        progress_s: float,
        threads: Threads,
        map_pool: Callable[[Endpoint], MappedPool],
        max_write_bytes: int = MAX_WRITE_BYTES,
    ) -> None:
        """`map_pool` runs on the launching thread and raises TransferError."""
        self.transport = transport
        self.memory = memory
        self.source = source
        self.progress_s = progress_s
        self.threads = threads
        self.max_write_bytes = max_write_bytes
        self._map_pool = map_pool
        self._links: list[_Link] = []

    async def connect(self, address: str, endpoint: Endpoint) -> "_Link":
        mapping = self.threads.launching.submit(self._map_pool, endpoint)
        try:
            pool = await asyncio.shield(asyncio.wrap_future(mapping))
        except asyncio.CancelledError:
            if not mapping.cancel():  # the thread is at it, or has just been
                mapping.add_done_callback(_let_go)
            raise
        control, note = None, "no control socket: transfers are announced over gRPC"
        if pool.control:
            try:
                control = await ControlLink.connect(pool.control, self.source, self.progress_s)
                note = ""
            except TransferBroken as error:
                note = f"transfers are announced over gRPC: {error}"
            except BaseException:
                self.threads.launching.submit(pool.close)
                raise
        self._links.append(_Link(self, address, pool, control, note))
        return self._links[-1]

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))
        self.threads.close()


class _Link:
    def __init__(
        self, sender: OneSidedSender, address: str, pool: MappedPool, control: ControlLink | None, note: str
    ) -> None:
        self.note = note
        self._sender = sender
        self._address = address
        self._pool = pool
        self._control = control
        self._channel: grpc.aio.Channel | None = None
        self._open: set[PlacedOutgoing] = set()
        self._is_closed = False

    @property
    def transport(self) -> str:
        return self._sender.transport

    def open(
        self, transfer_id: bytes, max_chunk_bytes: int | None = None, placement: Placement | None = None
    ) -> PlacedOutgoing:
        if self._is_closed:  # and the pool out of reach
            raise TransferBroken("the link is closed")
        if placement is None or not self._pool.holds(placement):
            raise TransferRefused(f"a grant without pages of the receiver's pool: {placement}")
        sender = self._sender
        writer = self._pool.writer(placement)
        outgoing = PlacedOutgoing(
            sender.memory,
            writer,
            self._announcer(transfer_id),
            transfer_id,
            placement,
            sender.threads,
            sender.progress_s,
            max_chunk_bytes or sender.max_write_bytes,
        )
        self._open.add(outgoing)
        outgoing.add_closed_callback(self._open.discard)
        return outgoing

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        outgoings = list(self._open)
        for outgoing in outgoings:
            outgoing.abort("the link closes")
        await asyncio.gather(*(outgoing.wait_closed() for outgoing in outgoings))
        if self._control is not None:
            self._control.close()
        if self._channel is not None:
            await self._channel.close(None)
        await asyncio.get_running_loop().run_in_executor(self._sender.threads.launching, self._pool.close)

    def _announcer(self, transfer_id: bytes) -> Announcer:
        if self._control is not None:
            return self._control.open(transfer_id)
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        return GrpcAnnouncer(self._channel, transfer_id, self._sender.source, self._sender.progress_s)


def _let_go(mapping: "Future[MappedPool]") -> None:
    """On the launching thread, of a pool that was mapped for nobody."""
    if not mapping.cancelled() and mapping.exception() is None:
        mapping.result().close()
