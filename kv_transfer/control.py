"""The control socket of one-sided transfers on one host: what the Push stream says, with no event loop in between.

One SOCK_SEQPACKET Unix socket per pair of workers, for all transfers between them; every packet is a frame
(kv_transfer/frames.py), one way, or an answer, the other way. The address is abstract: it has no file, and is gone with
the process that bound it. Nobody guesses it, 128 random bits that only the handshake tells, and either end turns a peer
of another user away. A ticket is needed all the same.

    sender (control_link.py)                         receiver (control_server.py)
    any thread      BEGIN, PLACED ..., END  ──►      a thread of its own: begin, placed, end
    the event loop         acknowledgement  ◄──
    any thread                      COMMIT  ──►      the same thread; then who adopts (decode_worker/kv_service.py)
    the event loop                  answer  ◄──      any thread

An answer is

      0    16   transfer id
     16     1   0: an acknowledgement, 1: the answer to COMMIT
     17     …   acknowledgement (kv_transfer/frames.py), or u8 gRPC status and UTF-8 text of a refusal
"""

import os
import re
import secrets
import socket
import struct

from kv_transfer.base import Answer, TransferBroken
from kv_transfer.frames import Ack

MAX_PACKET_BYTES = 4096
MAX_BACKLOG = 4096  # packets that wait for a peer which reads none; then it is cut off
NO_TRANSFER = bytes(16)  # an acknowledgement for the whole link, which ends with it
_NAME = re.compile(r"pdserve-[0-9a-f]{32}")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def new_name() -> str:
    return f"pdserve-{secrets.token_hex(16)}"


def is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name))


def address(name: str) -> bytes:
    return b"\0" + name.encode()


def new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def stranger(connection: socket.socket) -> str:
    """Who the peer is if it is not a process of our own user; empty if it is."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return "" if uid == os.geteuid() else f"process {pid} of user {uid}: this is user {os.geteuid()}"


def receive(connection: socket.socket) -> bytes | None:
    """The next packet, empty at the end, None: none has come. Raises OSError, TransferBroken for one too long."""
    try:
        packet, _, flags, _ = connection.recvmsg(MAX_PACKET_BYTES)
    except BlockingIOError:
        return None
    if flags & socket.MSG_TRUNC:
        raise TransferBroken(f"a packet of more than {MAX_PACKET_BYTES} bytes")
    return packet


def pack_answer(transfer_id: bytes, answer: Ack | Answer) -> bytes:
    if isinstance(answer, Ack):
        packet = transfer_id + b"\0" + answer.pack()
    else:
        packet = transfer_id + b"\1" + bytes([answer.code]) + answer.text.encode()
    return packet[:MAX_PACKET_BYTES]


def parse_answer(packet: bytes) -> tuple[bytes, Ack | Answer]:
    transfer_id, kind, rest = packet[:16], packet[16:17], packet[17:]
    if kind == b"\1" and rest:
        return transfer_id, Answer(rest[0], rest[1:].decode(errors="replace"))
    return transfer_id, Ack.parse(rest if kind == b"\0" else b"")
