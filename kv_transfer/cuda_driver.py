"""The driver calls behind a mapped pool: export an allocation, map another process's. Through ctypes, since torch has
them only behind pickles of whole tensors.

Legacy IPC handles work on what cudaMalloc returned. Memory of torch's expandable segments has none: the export fails.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_NO_CONTEXT = 201


class DriverError(RuntimeError):
    """A driver call failed; its name and what the driver says."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


@functools.cache
def library() -> ctypes.CDLL:
    """The driver, initialised."""
    driver = ctypes.CDLL("libcuda.so.1")
    _check(driver, "cuInit", 0)
    return driver


def _check(driver: ctypes.CDLL, name: str, *args) -> None:
    status = getattr(driver, name)(*args)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


def _call(name: str, *args) -> None:
    _check(library(), name, *args)


@contextmanager
def _context(device: int) -> Iterator[None]:
    """The device's primary context, which torch uses too, current in this thread."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    try:
        _call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        _call("cuDevicePrimaryCtxRelease_v2", handle)


def export(address: int, device: int) -> tuple[bytes, int]:
    """A handle of the allocation that `address` lies in, and the offset there. Raises DriverError."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    with _context(device):
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES), address - base.value


def open_memory(handle: bytes, device: int) -> int:
    """Maps another process's allocation for kernels of `device`; where it begins. Raises DriverError."""
    address, given = ctypes.c_uint64(), _Handle()
    ctypes.memmove(ctypes.addressof(given), handle, HANDLE_BYTES)
    open_handle = library().cuIpcOpenMemHandle_v2
    open_handle.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]
    with _context(device):
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
    return address.value


def copy_to_device(target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    """From pinned host memory, as it is when the stream comes to it. Raises DriverError."""
    _copy("cuMemcpyHtoDAsync", target, source, num_bytes, stream)


def copy_on_device(target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    """From memory of a device to that of the same or a mapped one. Raises DriverError."""
    _copy("cuMemcpyDtoDAsync", target, source, num_bytes, stream)


def _copy(name: str, target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    copy = _copier(name)
    status = copy(target, source, num_bytes, stream.cuda_stream)
    if status == _NO_CONTEXT:  # this thread has called the driver for the first time, and the runtime never
        with _context(stream.device_index):
            status = copy(target, source, num_bytes, stream.cuda_stream)
    if status:
        raise DriverError(f"{name}: error {status}")


@functools.cache
def _copier(name: str) -> Callable[[int, int, int, int], int]:
    copy = library()[f"{name}_v2"]
    copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return copy


def close_memory(address: int, device: int) -> None:
    """Ends a mapping that no kernel uses any more."""
    with _context(device):
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))
