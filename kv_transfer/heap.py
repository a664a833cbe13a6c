"""Keeps glibc from giving a message's pages back to the system after every message."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_pages(mmap_threshold: int = 32 << 20, trim_threshold: int = 64 << 20) -> None:
    """Serves allocations below `mmap_threshold` bytes (32 MiB is glibc's limit) from the heap, and lets the heap keep
    `trim_threshold` bytes of freed memory at its end. For the whole process; elsewhere than on glibc nothing happens.

    gRPC allocates several buffers per message. By default each is mapped, faulted in page by page, and unmapped, which
    costs as much as every copy together: 1 MiB messages go at half the speed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_M_TRIM_THRESHOLD, trim_threshold)
