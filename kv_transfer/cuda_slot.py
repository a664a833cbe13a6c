"""What a launch needs beside its pages, made once and used again: events, where its sums go, its look at the guard."""

from collections import deque

import torch

from kv_transfer import cuda_driver

MAX_RANGES = 8  # launches of one write; more get a slot of their own


class Slot:
    """Pinned rows for the sums of a few kernels, and the events around them."""

    def __init__(self, num_rows: int, most_programs: int, device: torch.device) -> None:
        sums = torch.empty(num_rows, most_programs, dtype=torch.int64, pin_memory=True)
        self.most_programs = self.num_programs = most_programs
        self.address = sums.data_ptr()
        self.row_bytes = 8 * most_programs
        self._sums = sums.numpy()  # keeps them
        self._word = torch.empty(1, dtype=torch.int64, device=device)
        self.word = self._word.data_ptr()  # on the device: what a guard held when it was looked at
        self.looked, self.began, self.done = torch.cuda.Event(), torch.cuda.Event(), torch.cuda.Event()
        self.digested = torch.cuda.Event()  # where another stream takes the digest

    def digest(self, first: int, stop: int) -> int:
        """What the launches whose sums are in rows [first, stop) have digested, modulo 2^64."""
        return int(self._sums[first:stop, : self.num_programs].sum()) % 2**64  # int64 wraps around


class Slots:
    """Of one device and purpose. Any thread takes; who has waited for what the slot was taken for gives it back."""

    def __init__(self, device: torch.device, most_programs: int = 0) -> None:
        self._device = device
        self._most_programs = most_programs  # that a slot has room for at least
        self._free: deque[Slot] = deque()

    def take(self, num_rows: int, num_programs: int) -> Slot:
        try:
            slot = self._free.pop()
        except IndexError:
            slot = None
        if slot is None or slot.most_programs < num_programs or num_rows > MAX_RANGES:
            most_programs = max(num_programs, self._most_programs)
            slot = Slot(max(num_rows, MAX_RANGES), most_programs, self._device)
        slot.num_programs = num_programs
        return slot

    def give_back(self, slot: Slot) -> None:
        self._free.append(slot)


class Looks:
    """Looks at guard words, in host memory, on behalf of the writes on one stream.

    A kernel that looked for itself would wait for the bus in each of its programs. So a copy brings the word to the
    device on a stream of its own: not before the pages are final, and while the write before is under way.
    """

    def __init__(self, writes: torch.cuda.Stream) -> None:
        self._writes = writes
        self._stream = torch.cuda.Stream(writes.device)
        self._before: torch.cuda.Event | None = None  # the write launched last has begun

    def look(self, guard: int, slot: Slot, after: torch.cuda.Event | None) -> None:
        """The next launch on the stream of writes, once `after` has passed, finds the word at address `guard` in the
        slot."""
        if self._before is not None:
            self._stream.wait_event(self._before)
        if after is not None:
            self._stream.wait_event(after)
        cuda_driver.copy_to_device(slot.word, guard, 8, self._stream)
        slot.looked.record(self._stream)
        self._writes.wait_event(slot.looked)

    def begins(self, slot: Slot) -> None:
        """The slot's write is what the stream of writes comes to next."""
        slot.began.record(self._writes)
        self._before = slot.began
