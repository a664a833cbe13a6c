"""A link to one peer, over any transport: the transfers under way, which end with it."""

import asyncio

import grpc.aio

from kv_transfer.base import Outgoing, Placement, TransferBroken


class OpenLink:
    """A `Link` but for how a transfer starts, and what is let go of behind the last one."""

    def __init__(self, transport: str, address: str, note: str = "") -> None:
        self.transport = transport
        self.note = note
        self._address = address
        self._open: set[Outgoing] = set()
        self._channel: grpc.aio.Channel | None = None
        self._is_closed = False

    def open(
        self, transfer_id: bytes, max_chunk_bytes: int | None = None, placement: Placement | None = None
    ) -> Outgoing:
        if self._is_closed:  # and a mapped pool is out of reach
            raise TransferBroken("the link is closed")
        outgoing = self._start(transfer_id, max_chunk_bytes, placement)
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
        await self._let_go()

    def _start(self, transfer_id: bytes, max_chunk_bytes: int | None, placement: Placement | None) -> Outgoing:
        raise NotImplementedError

    async def _let_go(self) -> None:
        """No transfer is under way any more."""
        if self._channel is not None:
            await self._channel.close(None)

    def _connected(self, options: list[tuple[str, int]]) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=options)
        return self._channel
