"""Frames of /pdserve.v1.KvTransferService/Push, one gRPC message each, and of one host's control socket, a packet each
(kv_transfer/control.py): little-endian, no protobuf.

    offset size
      0     2   magic "KV"
      2     1   version, 4
      3     1   kind: 1 BEGIN, 2 CHUNK, 3 TOKEN, 4 END, 5 PLACED, 6 ABORT, 7 COMMIT
      4    16   transfer id
     20     4   sequence           ─┐
     24     2   layer_start         │ ChunkHeader; in BEGIN, END,
     26     2   layer_count         │ ABORT and COMMIT only num_bytes
     28     4   block_start         │ and checksum are used, of the
     32     4   block_count         │ payload below
     36     4   num_bytes           │
     40     8   checksum           ─┘
     48     …   payload

    BEGIN   u16 length + UTF-8 worker id, u16 length + UTF-8 incarnation, of the sender
    CHUNK   the chunk's bytes
    TOKEN   u32 crc32c of the token, then the token under which an object store has the chunk's bytes
    END     the manifest: u32 number of chunks, u64 number of bytes, 32 bytes digest
    PLACED  nothing: a one-sided transport has written the chunk's bytes into the pages, all of them, and `checksum` is
            the digest of what it read, which the receiver compares with its own of what landed
    ABORT   UTF-8 text: the sender gives up. On the control socket only; a gRPC stream is cancelled
    COMMIT  a serialized CommitRequest (protos/kv_transfer.proto): the call of that name, for which a socket between
            threads needs no event loop of the sender's. On the control socket only, behind END

A stream is BEGIN, chunks numbered from 0, END; all with one transfer id. The receiver answers with acknowledgements

      0     4   number of chunks placed so far
      4     1   verdict: 0 fine, 1 refused, 2 broken, 3 corrupt, 4 unfit
      5     1   1: the objects of this stream are mapped here, not copied
      6     …   UTF-8 text of an error

one for every TOKEN, so that the sender can fill the object again or let it go, and one at the end: for END, when all
that the manifest counts has been verified, or for what is wrong. The verdict travels in the stream and not as its
status because a sender that is just writing when the status comes is told "internal error" instead.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kv_transfer.base import (
    ChunkHeader,
    Manifest,
    TransferBroken,
    TransferCorrupt,
    TransferError,
    TransferRefused,
    TransferUnfit,
)
from kv_transfer.checksum import crc32c

_PREFIX = struct.Struct("<2sBB16s")
_MAGIC, _VERSION = b"KV", 4
_END = struct.Struct("<IQ32s")
_U32 = struct.Struct("<I")
_ACK = struct.Struct("<IBB")
_VERDICTS = (TransferRefused, TransferBroken, TransferCorrupt, TransferUnfit)
HEADER_BYTES = _PREFIX.size + ChunkHeader.STRUCT.size
MAX_TOKEN_BYTES = 4096
MAX_REASON_BYTES = 512


class Kind(IntEnum):
    BEGIN = 1
    CHUNK = 2
    TOKEN = 3
    END = 4
    PLACED = 5
    ABORT = 6
    COMMIT = 7


_PLAIN = (Kind.BEGIN, Kind.END, Kind.ABORT, Kind.COMMIT)


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    transfer_id: bytes
    header: ChunkHeader
    payload: np.ndarray  # uint8, a view of the message

    @classmethod
    def parse(cls, message: bytes) -> "Frame":
        """Raises TransferBroken for what is no frame of this version, TransferCorrupt for a damaged BEGIN, END,
        ABORT or COMMIT.

        A CHUNK's payload is not checked here: the receiver does so where it places it.
        """
        if len(message) < HEADER_BYTES:
            raise TransferBroken(f"frame of {len(message)} bytes: at least {HEADER_BYTES} needed")
        magic, version, kind, transfer_id = _PREFIX.unpack_from(message)
        if magic != _MAGIC or version != _VERSION or kind not in Kind.__members__.values():
            raise TransferBroken(f"frame starts with {message[:4]!r}: not a frame of version {_VERSION}")
        header = ChunkHeader.unpack(message, _PREFIX.size)
        payload = np.frombuffer(message, np.uint8, offset=HEADER_BYTES)
        frame = cls(Kind(kind), transfer_id, header, payload)
        if frame.kind in _PLAIN and (header.num_bytes, header.checksum) != (
            len(payload),
            crc32c([payload]),
        ):
            raise TransferCorrupt(f"{frame.kind.name} frame's checksum differs")
        return frame

    def source(self) -> tuple[str, str]:
        """Of a BEGIN frame: worker id and incarnation."""
        data = self.payload.tobytes()
        try:
            size = int.from_bytes(data[:2], "little")
            worker_id, rest = data[2 : 2 + size], data[2 + size :]
            size = int.from_bytes(rest[:2], "little")
            return worker_id.decode(), rest[2 : 2 + size].decode()
        except UnicodeDecodeError as error:
            raise TransferBroken(f"BEGIN names a source that is no UTF-8: {error}") from None

    def token(self) -> bytes:
        """Of a TOKEN frame. A damaged token could name no object at all, and waiting for it would never end."""
        if not 4 < len(self.payload) <= 4 + MAX_TOKEN_BYTES:
            raise TransferBroken(f"token of {len(self.payload) - 4} bytes: must be in [1, {MAX_TOKEN_BYTES}]")
        token = self.payload[4:]
        if int.from_bytes(self.payload[:4].tobytes(), "little") != crc32c([token]):
            raise TransferCorrupt(f"token of chunk {self.header.sequence}: checksum differs")
        return token.tobytes()

    def manifest(self) -> Manifest:
        """Of an END frame."""
        if len(self.payload) != _END.size:
            raise TransferBroken(f"END payload of {len(self.payload)} bytes: must be {_END.size}")
        return Manifest(*_END.unpack(self.payload.tobytes()))


def begin_frame(transfer_id: bytes, source: tuple[str, str]) -> bytes:
    payload = b"".join(struct.pack("<H", len(part)) + part for part in (name.encode() for name in source))
    return _frame(Kind.BEGIN, transfer_id, _plain_header(payload), [payload])


def chunk_frame(transfer_id: bytes, header: ChunkHeader, pages: Sequence[np.ndarray]) -> bytes:
    """The one copy between the pages and gRPC: header and pages joined into a message."""
    return _frame(Kind.CHUNK, transfer_id, header, [page.data for page in pages])


def token_frame(transfer_id: bytes, header: ChunkHeader, token: bytes) -> bytes:
    return _frame(Kind.TOKEN, transfer_id, header, [_U32.pack(crc32c([np.frombuffer(token, np.uint8)])), token])


def placed_frame(transfer_id: bytes, header: ChunkHeader) -> bytes:
    return _frame(Kind.PLACED, transfer_id, header, [])


def end_frame(transfer_id: bytes, manifest: Manifest) -> bytes:
    payload = _END.pack(manifest.num_chunks, manifest.num_bytes, manifest.digest)
    return _frame(Kind.END, transfer_id, _plain_header(payload), [payload])


def commit_frame(transfer_id: bytes, claim: bytes) -> bytes:
    return _frame(Kind.COMMIT, transfer_id, _plain_header(claim), [claim])


def abort_frame(transfer_id: bytes, reason: str) -> bytes:
    payload = reason.encode()[:MAX_REASON_BYTES]
    return _frame(Kind.ABORT, transfer_id, _plain_header(payload), [payload])


@dataclass(frozen=True, slots=True)
class Ack:
    num_chunks: int
    error: TransferError | None = None
    is_mapped: bool = False

    def pack(self) -> bytes:
        if self.error is None:
            return _ACK.pack(self.num_chunks, 0, self.is_mapped)
        verdict = 1 + _VERDICTS.index(type(self.error))
        return _ACK.pack(self.num_chunks, verdict, self.is_mapped) + str(self.error).encode()

    @classmethod
    def parse(cls, message: bytes) -> "Ack":
        if len(message) < _ACK.size or message[4] > len(_VERDICTS):
            return cls(0, TransferBroken(f"the receiver answers {message[:8]!r}: not an acknowledgement"))
        num_chunks, verdict, is_mapped = _ACK.unpack_from(message)
        if verdict == 0:
            return cls(num_chunks, None, bool(is_mapped))
        return cls(num_chunks, _VERDICTS[verdict - 1](message[_ACK.size :].decode(errors="replace")))


def _plain_header(payload: bytes) -> ChunkHeader:
    return ChunkHeader(0, 0, 0, 0, 0, len(payload), crc32c([np.frombuffer(payload, np.uint8)]))


def _frame(kind: Kind, transfer_id: bytes, header: ChunkHeader, parts: Sequence[bytes | memoryview]) -> bytes:
    return b"".join([_PREFIX.pack(_MAGIC, _VERSION, kind, transfer_id), header.pack(), *parts])
