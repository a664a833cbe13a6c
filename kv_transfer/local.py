"""Transport `local`: sender and receiver in one process, found by address. The reference for all the others."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from kv_transfer.base import ChunkHeader, Manifest, TransferBroken
from kv_transfer.checksum import crc32c
from kv_transfer.receiver import Receiver

_Chunk = tuple[ChunkHeader, Sequence[np.ndarray]]

_receivers: dict[str, Receiver] = {}


def register(address: str, receiver: Receiver) -> Callable[[], None]:
    """Makes `receiver` reachable under `address`; call the result to end that."""
    assert address not in _receivers, address
    _receivers[address] = receiver

    def unregister() -> None:
        _receivers.pop(address, None)

    return unregister


class LocalWire:
    """Hands each chunk to the receiver as the pages themselves."""

    def __init__(self, address: str, transfer_id: bytes, source: tuple[str, str]) -> None:
        self._address = address
        self._transfer_id = transfer_id
        self._source = source

    async def begin(self) -> None:
        self._receiver().begin(self._transfer_id, self._source)

    def pack(self, header: ChunkHeader, pages: Sequence[np.ndarray]) -> tuple[ChunkHeader, _Chunk]:
        header = replace(header, checksum=crc32c(pages))
        return header, (header, pages)

    async def send(self, packed: _Chunk) -> None:
        self._receiver().chunk(self._transfer_id, *packed)
        await asyncio.sleep(0)  # other transfers and the caller get their turn between chunks

    async def end(self, manifest: Manifest) -> None:
        self._receiver().end(self._transfer_id, manifest)

    async def answered(self, num_chunks: int | None) -> None:
        """`end` has answered."""

    async def lost(self) -> None:
        await asyncio.Event().wait()

    async def close(self, error: BaseException | None) -> None:
        if error is not None and (receiver := _receivers.get(self._address)) is not None:
            receiver.fail(self._transfer_id, TransferBroken(f"the sender gave up: {error}"))

    def _receiver(self) -> Receiver:
        try:
            return _receivers[self._address]
        except KeyError:
            raise TransferBroken(f"no receiver at {self._address!r} in this process") from None
