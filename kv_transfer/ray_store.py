"""Transport `ray_store`: chunks go through an object store that both workers share, their tokens through a Push stream.

The sender copies a chunk's pages into an object and sends its token; the receiver maps the object, places and checks
its bytes, and acknowledges; then the sender fills the object again, or lets it go if the receiver had it as a copy. At
most `WINDOW` chunks of a transfer are in the store and not acknowledged. The store is injected: `cluster.object_store`
implements it with Ray's.
"""

from collections.abc import Sequence
from dataclasses import replace

import grpc.aio
import numpy as np

from kv_transfer.base import ChunkHeader, Manifest, ObjectStore
from kv_transfer.frames import token_frame
from kv_transfer.grpc_stream import GrpcWire

WINDOW = 3  # one being placed, one on its way, one to spare


class RayStoreWire:
    """A Push stream of tokens."""

    def __init__(
        self, channel: grpc.aio.Channel, transfer_id: bytes, source: tuple[str, str], object_store: ObjectStore
    ) -> None:
        self._stream = GrpcWire(channel, transfer_id, source)
        self._transfer_id = transfer_id
        self._object_store = object_store
        self._tokens: dict[int, bytes] = {}  # by sequence: objects the receiver may still need
        self._num_sent = 0

    async def begin(self) -> None:
        await self._stream.begin()

    def pack(self, header: ChunkHeader, pages: Sequence[np.ndarray]) -> tuple[ChunkHeader, bytes]:
        token, checksum = self._object_store.put(pages)
        self._tokens[header.sequence] = token
        header = replace(header, checksum=checksum)
        return header, token_frame(self._transfer_id, header, token)

    async def send(self, packed: bytes) -> None:
        await self._stream.wait_acked(self._num_sent + 1 - WINDOW)
        self._drop(self._stream.num_acked)
        self._num_sent += 1
        await self._stream.send(packed)

    async def end(self, manifest: Manifest) -> None:
        await self._stream.end(manifest)

    async def answered(self, num_chunks: int | None) -> None:
        await self._stream.answered(num_chunks)
        self._drop(self._num_sent)

    async def lost(self) -> None:
        await self._stream.lost()

    async def close(self, error: BaseException | None) -> None:
        await self._stream.close(error)
        for token in self._tokens.values():
            self._object_store.drop(token)  # who knows whether it is still being read
        self._tokens.clear()

    def _drop(self, stop: int) -> None:
        for sequence in [sequence for sequence in self._tokens if sequence < stop]:
            self._object_store.drop(self._tokens.pop(sequence), self._stream.is_mapped)
