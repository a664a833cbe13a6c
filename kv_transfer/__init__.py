"""KV blocks from one worker's pool to another's, verified. Takes memory and block ids, knows no requests."""

from kv_transfer.base import ObjectStore, TransferBroken, TransferCorrupt, TransferError, TransferRefused
from kv_transfer.create import MAX_CHUNK_BYTES, TRANSPORTS, Transports, create_sender, serve

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
