"""Guard table of a receiver: one word per granted one-sided ticket, which its writer looks at before it writes.

    slot[i] == generation    the ticket is live: write
    anything else            it is over: a write that comes late must not happen

Memory of the receiver that processes of the same host map (a memfd, so it goes with its owner). A guard stops what has
not begun; what has begun is waited for (kv_transfer/quarantine.py).
"""

import mmap
import os
import threading

import numpy as np

NUM_SLOTS = 4096  # live and quarantined one-sided tickets at most; 8 bytes each


class Guards:
    """The receiver's side. Thread-safe."""

    def __init__(self) -> None:
        size = NUM_SLOTS * 8
        self._fd = os.memfd_create("pdserve-guards", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self.words = np.frombuffer(mmap.mmap(self._fd, size), np.uint64)
        self._free = list(range(NUM_SLOTS - 1, -1, -1))
        self._taken: set[int] = set()
        self._generation = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """How a process of the same user and host finds the table."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def take(self) -> tuple[int, int]:
        """A slot and the generation that it now holds. Raises MemoryError when every slot is taken."""
        with self._lock:
            if not self._free:
                raise MemoryError(
                    f"all {NUM_SLOTS} guards are taken: too many one-sided tickets are live or quarantined"
                )
            slot = self._free.pop()
            self._taken.add(slot)
            self._generation += 1
            self.words[slot] = self._generation
            return slot, self._generation

    def revoke(self, slot: int) -> None:
        """From now on no write under this slot begins. The slot stays taken until `free`. Idempotent."""
        self.words[slot] = 0

    def free(self, slot: int) -> None:
        """Its writer has stopped: the slot may serve another ticket."""
        with self._lock:
            self._taken.remove(slot)
            self.words[slot] = 0
            self._free.append(slot)

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    def close(self) -> None:
        os.close(self._fd)


def open_guards(name: str) -> np.ndarray:
    """The writer's side: uint64 [NUM_SLOTS], read only by convention. Raises OSError."""
    fd = os.open(name, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(fd, NUM_SLOTS * 8), np.uint64)
    finally:
        os.close(fd)
