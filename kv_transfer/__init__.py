"""KV blocks from one worker's pool to another's, verified. Takes memory and block ids, knows no requests."""

from kv_transfer.base import ObjectStore, TransferBroken, TransferCorrupt, TransferError, TransferRefused
from kv_transfer.create import TRANSPORTS, Transports, create_sender, serve
from kv_transfer.two_sided import MAX_CHUNK_BYTES

__all__ = [
    "MAX_CHUNK_BYTES",
    "TRANSPORTS",
    "ObjectStore",
    "TransferBroken",
    "TransferCorrupt",
    "TransferError",
    "TransferRefused",
    "Transports",
    "create_sender",
    "serve",
]
