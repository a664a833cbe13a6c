"""Ray's object store behind the `ray_store` transport: arrays in, an opaque token out, arrays back.

A token is the object's id, its owner's address and its state, as Ray's own serializer would send them, without pickle
on our wire. The owner is the worker that put the object: it holds the reference until `drop`, so the object outlives
the hand-over whoever reads it, on this node (mapped, no copy) or on another (Ray copies it there once).
"""

import struct
import threading
from collections.abc import Sequence
from pickle import PickleBuffer  # a buffer that Ray stores out of band: nothing is pickled for our own sockets

import numpy as np
import ray
from ray._private.worker import global_worker

from kv_transfer.base import TransferBroken

_LENGTHS = struct.Struct("<HHH")  # of the three parts, which follow
# Ray stores each buffer of a list as it is, without a gathering copy, but at 20 us apiece: small ones are first joined.
# From 1 MiB on it starts six threads per buffer to copy it, which beside busy cores takes several times as long.
_MIN_ARRAY_BYTES = 256 << 10
_MAX_ARRAY_BYTES = (1 << 20) - 4096


class RayObjectStore:
    """An `ObjectStore` (kv_transfer/base.py) for a process that is connected to Ray. Thread-safe; both calls block.

    `put` waits for room when the store is full of objects in use. By default Ray frees objects once a second, so that
    every put goes to fresh memory, at a third of the speed, until the store is full and stalls for a quarter of a
    second: start Ray with RAY_free_objects_period_milliseconds=10 in the environment.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refs: dict[bytes, ray.ObjectRef] = {}

    @property
    def num_objects(self) -> int:
        """Objects put here and not dropped."""
        return len(self._refs)

    def put(self, arrays: Sequence[np.ndarray]) -> bytes:
        if min(map(len, arrays)) < _MIN_ARRAY_BYTES:
            arrays = [np.frombuffer(b"".join(array.data for array in arrays), np.uint8)]
        size = _MAX_ARRAY_BYTES
        ref = ray.put(
            [PickleBuffer(array[at : at + size].data) for array in arrays for at in range(0, len(array), size)]
        )
        _, owner, state = global_worker.core_worker.serialize_object_ref(ref)
        parts = (ref.binary(), owner, state)
        token = _LENGTHS.pack(*map(len, parts)) + b"".join(parts)
        with self._lock:
            self._refs[token] = ref
        return token

    def get(self, token: bytes, timeout_s: float) -> list[np.ndarray]:
        try:
            return [np.frombuffer(part, np.uint8) for part in ray.get(_borrow(token), timeout=timeout_s)]
        except ray.exceptions.RayError as error:
            raise TransferBroken(f"the chunk's object is not to be had: {error}") from error

    def drop(self, token: bytes) -> None:
        with self._lock:
            self._refs.pop(token, None)


def _borrow(token: bytes) -> ray.ObjectRef:
    """The reference a token stands for, registered with its owner: what Ray does for a reference it deserializes."""
    sizes = _LENGTHS.unpack_from(token) if len(token) >= _LENGTHS.size else (0, 0, 0)
    if not all(sizes) or _LENGTHS.size + sum(sizes) != len(token):
        raise TransferBroken(f"token of {len(token)} bytes is no object reference")
    id_end = _LENGTHS.size + sizes[0]
    object_id, owner, state = (
        token[_LENGTHS.size : id_end],
        token[id_end : id_end + sizes[1]],
        token[id_end + sizes[1] :],
    )
    ref = ray.ObjectRef(object_id, owner)
    nested_in = ray.ObjectRef.nil()
    global_worker.core_worker.deserialize_and_register_object_ref(object_id, nested_in, owner, state)
    return ref
