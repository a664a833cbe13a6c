"""Ray's object store behind the `ray_store` transport: arrays in, an opaque token out, their bytes back.

A token is the object's id, its owner's address, its state, as Ray's own serializer would send them, without pickle on
our wire, and the node it lies on. The owner is the worker that put the object: it holds the reference until `drop`, so
the object outlives the hand-over whoever reads it, on this node (mapped, no copy) or on another (copied there once).

An object costs Ray half a millisecond and fresh pages to make, and as much to free. So one that its reader has mapped
is filled again for the next chunk: only that reader and we ever had its token, neither passes it on, and the reader has
said that it is done. Ray's own mutable objects (ray.experimental.channel) share memory between workers in the same way.
A copy on another node would not follow, so there every chunk is an object of its own.
"""

import ctypes
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
from ray._private.worker import global_worker

from kv_transfer.base import TransferBroken
from kv_transfer.checksum import copy_crc32c

_LENGTHS = struct.Struct("<HHHH")  # of the four parts, which follow
_MIN_ROOM_BYTES = 64 << 10  # objects are powers of two, so that few sizes serve all chunks
_MAX_IDLE_BYTES = 64 << 20  # kept to be filled again, by one worker
_MAX_MAPPED_BYTES = 128 << 20  # of others' objects kept mapped; more are mapped anew at each use


@dataclass(frozen=True, slots=True)
class _Room:
    """An object of ours: its memory, writable, as long as the reference is held."""

    token: bytes
    ref: ray.ObjectRef
    mapped: np.ndarray  # read-only, as Ray gives it: keeps the mapping
    memory: np.ndarray  # the same bytes


class RayObjectStore:
    """An `ObjectStore` (kv_transfer/base.py) for a process that is connected to Ray. Thread-safe.

    `put` waits for room when the store is full of objects in use. By default Ray frees objects once a second, which at
    a GB/s to another node is a GB of them: start Ray with RAY_free_objects_period_milliseconds=10 in the environment.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rooms: dict[bytes, _Room] = {}  # filled, by token
        self._idle: dict[int, list[_Room]] = {}  # to be filled again, by size
        self._num_idle_bytes = 0
        self._mapped: OrderedDict[bytes, np.ndarray] = OrderedDict()  # of others on this node, by token
        self._num_mapped_bytes = 0
        self._node = bytes.fromhex(ray.get_runtime_context().get_node_id())

    @property
    def num_objects(self) -> int:
        """Objects put here and not dropped."""
        return len(self._rooms)

    @property
    def num_idle(self) -> int:
        """Objects that the next puts may fill again."""
        return sum(map(len, self._idle.values()))

    def put(self, arrays: Sequence[np.ndarray]) -> tuple[bytes, int]:
        room = self._room(sum(map(len, arrays)))
        at, checksum = 0, 0
        for array in arrays:
            checksum = copy_crc32c(array, room.memory[at : at + len(array)], checksum)
            at += len(array)
        with self._lock:
            self._rooms[room.token] = room
        return room.token, checksum

    def get(self, token: bytes, num_bytes: int, timeout_s: float) -> tuple[np.ndarray, bool]:
        with self._lock:
            array = self._mapped.get(token)
            if array is not None:
                self._mapped.move_to_end(token)
        if array is not None:
            return array[:num_bytes], True
        ref, node = _borrow(token)
        try:
            array = ray.get(ref, timeout=timeout_s)
        except ray.exceptions.RayError as error:
            raise TransferBroken(f"the chunk's object is not to be had: {error}") from error
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
            raise TransferBroken("the chunk's object is no array of bytes")
        if node == self._node:
            self._keep(token, array)
        return array[:num_bytes], node == self._node

    def drop(self, token: bytes, mapped: bool = False) -> None:
        with self._lock:
            room = self._rooms.pop(token, None)
            if room is not None and mapped and self._num_idle_bytes + len(room.memory) <= _MAX_IDLE_BYTES:
                self._idle.setdefault(len(room.memory), []).append(room)
                self._num_idle_bytes += len(room.memory)

    def _room(self, num_bytes: int) -> _Room:
        size = max(_MIN_ROOM_BYTES, 1 << (num_bytes - 1).bit_length())
        with self._lock:
            if idle := self._idle.get(size):
                self._num_idle_bytes -= size
                return idle.pop()
        ref = ray.put(np.zeros(size, np.uint8))
        mapped = ray.get(ref)
        _, owner, state = global_worker.core_worker.serialize_object_ref(ref)
        parts = (ref.binary(), owner, state, self._node)
        token = _LENGTHS.pack(*map(len, parts)) + b"".join(parts)
        return _Room(token, ref, mapped, _writable(mapped))

    def _keep(self, token: bytes, array: np.ndarray) -> None:
        with self._lock:
            if token not in self._mapped:
                self._mapped[token] = array
                self._num_mapped_bytes += len(array)
            while self._num_mapped_bytes > _MAX_MAPPED_BYTES:
                self._num_mapped_bytes -= len(self._mapped.popitem(last=False)[1])


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory to write to. Ray's client maps the whole store for writing and hands out arrays that say they are
    read-only; were its pages really so, this says it rather than let the first write end the process."""
    address = array.ctypes.data
    with open("/proc/self/maps") as maps:
        for line in maps:
            bounds, access = line.split(maxsplit=2)[:2]
            start, stop = (int(bound, 16) for bound in bounds.split("-"))
            if start <= address < stop and "w" in access:
                return np.ctypeslib.as_array((ctypes.c_ubyte * len(array)).from_address(address))
    raise RuntimeError(
        f"Ray {ray.__version__} maps its object store read-only: the ray_store transport cannot fill objects"
    )


def _borrow(token: bytes) -> tuple[ray.ObjectRef, bytes]:
    """The reference a token stands for, registered with its owner: what Ray does for a reference it deserializes; and
    the node it lies on."""
    sizes = _LENGTHS.unpack_from(token) if len(token) >= _LENGTHS.size else (0, 0, 0, 0)
    if not all(sizes) or _LENGTHS.size + sum(sizes) != len(token):
        raise TransferBroken(f"token of {len(token)} bytes is no object reference")
    parts, at = [], _LENGTHS.size
    for size in sizes:
        parts.append(token[at : at + size])
        at += size
    object_id, owner, state, node = parts
    ref = ray.ObjectRef(object_id, owner)
    nested_in = ray.ObjectRef.nil()
    global_worker.core_worker.deserialize_and_register_object_ref(object_id, nested_in, owner, state)
    return ref, node
