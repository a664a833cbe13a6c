"""Pages by the copy engine: one driver call for all blocks of a push, each of them one long run of bytes on both sides.

It reaches 0.98 of a contiguous peer copy for whole pages of 8 MiB, where stores of a kernel end at 0.93, and takes no
multiprocessor; below 2 MiB a run the kernel is as good (docs/performance.md). A copy cannot look at a guard: the host
looks when it asks for the copy, of pages that are final by then. What the driver has in its queue may begin after a
release; the quarantine waits for it as for all that has begun.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kv_transfer import cuda_driver
from kv_transfer.cuda_driver import DriverError

MIN_RUN_BYTES = 2 << 20


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [
        ("access_order", ctypes.c_int),  # 1: as the stream orders
        ("locations", ctypes.c_int * 4),  # hints, which peer memory needs none of
        ("flags", ctypes.c_uint),
    ]


def works(address: int, device: torch.device) -> bool:
    """Whether the driver has the call (12.8 on), tried with 16 bytes of the peer's at `address`, which are read."""
    scratch = torch.empty(16, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device)
    here, there = np.array([scratch.data_ptr()], np.uint64), np.array([address], np.uint64)
    try:
        _copy(here, there, 16, stream)
    except (DriverError, AttributeError):
        return False
    stream.synchronize()
    return True


def copy_blocks(
    source: tuple[int, int, Sequence[int]],
    target: tuple[int, int, Sequence[int]],
    run: tuple[int, int],
    stream: torch.cuda.Stream,
    begun: Callable[[], None],
) -> None:
    """Bytes [start, stop) of blocks to others, in order; returns at once. Either side is the address of block 0, bytes
    a block and block ids. The first block is under way, and `begun` called, while the driver is told of the others,
    which takes it a microsecond or two each. Raises DriverError, and then some of them may be on their way."""
    start, stop = run
    there, here = (address + ids[0] * block_bytes + start for address, block_bytes, ids in (target, source))
    cuda_driver.copy_on_device(there, here, stop - start, stream)
    begun()
    if len(source[2]) > 1:
        targets, sources = (
            np.array(ids[1:], np.uint64) * np.uint64(block_bytes) + np.uint64(address + start)
            for address, block_bytes, ids in (target, source)
        )
        _copy(targets, sources, stop - start, stream)


def _copy(targets: np.ndarray, sources: np.ndarray, num_bytes: int, stream: torch.cuda.Stream) -> None:
    copy, tail = _batch_call()
    sizes, first = np.full(len(sources), num_bytes, np.uint64), ctypes.c_size_t(0)
    attributes = _Attributes(access_order=1)
    status = copy(
        *(ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)),
        ctypes.c_size_t(len(sources)),
        *(ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1)),
        *tail(),
        ctypes.c_void_p(stream.cuda_stream),
    )
    if status:
        raise DriverError(f"cuMemcpyBatchAsync: error {status}")


@functools.cache
def _batch_call() -> tuple[Callable[..., int], Callable[[], list]]:
    """The call, and what its first version has more of: where it failed. Raises AttributeError before driver 12.8."""
    driver = cuda_driver.library()
    if hasattr(driver, "cuMemcpyBatchAsync_v2"):
        return driver.cuMemcpyBatchAsync_v2, list
    return driver.cuMemcpyBatchAsync, lambda: [ctypes.byref(ctypes.c_size_t())]
