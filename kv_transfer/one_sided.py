"""Senders and links of every one-sided transport: a peer's pool mapped at the handshake, a transfer per ticket."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from kv_transfer.base import Endpoint, Placement, TransferBroken, TransferRefused
from kv_transfer.control_link import ControlLink
from kv_transfer.grpc_announcer import GrpcAnnouncer
from kv_transfer.memory import BlockMemory
from kv_transfer.open_link import OpenLink
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


class _Link(OpenLink):
    def __init__(
        self, sender: OneSidedSender, address: str, pool: MappedPool, control: ControlLink | None, note: str
    ) -> None:
        super().__init__(sender.transport, address, note)
        self._sender = sender
        self._pool = pool
        self._control = control

    def _start(self, transfer_id: bytes, max_chunk_bytes: int | None, placement: Placement | None) -> PlacedOutgoing:
        if placement is None or not self._pool.holds(placement):
            raise TransferRefused(f"a grant without pages of the receiver's pool: {placement}")
        sender = self._sender
        writer = self._pool.writer(placement)
        return PlacedOutgoing(
            sender.memory,
            writer,
            self._announcer(transfer_id),
            transfer_id,
            placement,
            sender.threads,
            sender.progress_s,
            max_chunk_bytes or sender.max_write_bytes,
        )

    async def _let_go(self) -> None:
        if self._control is not None:
            self._control.close()
        await super()._let_go()
        await asyncio.get_running_loop().run_in_executor(self._sender.threads.launching, self._pool.close)

    def _announcer(self, transfer_id: bytes) -> Announcer:
        if self._control is not None and not self._control.is_over:
            return self._control.open(transfer_id)
        channel = self._connected(CHANNEL_OPTIONS)
        return GrpcAnnouncer(channel, transfer_id, self._sender.source, self._sender.progress_s)


def _let_go(mapping: "Future[MappedPool]") -> None:
    """On the launching thread, of a pool that was mapped for nobody."""
    if not mapping.cancelled() and mapping.exception() is None:
        mapping.result().close()
