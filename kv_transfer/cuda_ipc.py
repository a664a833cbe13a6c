"""Transport `cuda_ipc`: a kernel of the sender's GPU writes into the receiver's pool, mapped at the handshake.

The receiver exports its pool's allocation; the sender, another process of the same host, maps it and pushes pages with
one launch per stretch of layers, on a stream of its own, behind the event of the layers' computation. The copy engine
does so where it is faster (kv_transfer/cuda_copy.py). A kernel takes the digest of what is read; the receiver that of
what landed (kv_transfer/push_kernel.py). Both processes must see both GPUs.
"""

import json
import logging
import mmap
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kv_transfer import cuda_copy, cuda_driver, locality, round_kernel
from kv_transfer.base import Endpoint, Placement, ReadyEvent, TransferBroken, TransferRefused
from kv_transfer.control import is_name
from kv_transfer.cuda_pages import MAX_PROGRAMS, PageTables, digest_programs, first_of_each_shape, warm_up
from kv_transfer.cuda_slot import Looks, Slot, Slots
from kv_transfer.guards import NUM_SLOTS, open_guards
from kv_transfer.memory import BlockMemory
from kv_transfer.one_sided import OneSidedSender
from kv_transfer.placed import Threads
from kv_transfer.push_kernel import Side, launch
from kv_transfer.rect import Rect
from kv_transfer.rounding import RoundedMemory
from kv_transfer.staging import side_stream

NUM_PROGRAMS = 32  # of a push: what fills NVLink and leaves the model its multiprocessors (docs/performance.md)
LIFE_S = 0.005  # for which a process that was seen to live is taken to
_GUARDS = re.compile(r"/proc/\d+/fd/\d+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolHandle:
    """A pool as another process can map it."""

    memory: str  # the allocation's handle, in hex
    offset: int  # of block 0 inside it
    num_blocks: int
    block_bytes: int
    block_size: int  # tokens
    device: str  # UUID of the GPU
    guards: str  # path of the guard table
    process: str  # that holds the pool (kv_transfer/locality.py)
    control: str  # name of the control socket; empty: there is none

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> "PoolHandle":
        """Raises TransferBroken for what is no handle."""
        try:
            handle = cls(**json.loads(data))
            numbers = (handle.offset, handle.num_blocks, handle.block_bytes, handle.block_size)
            is_whole = all(type(number) is int and number >= 0 for number in numbers)
            if not is_whole or len(bytes.fromhex(handle.memory)) != cuda_driver.HANDLE_BYTES:
                raise ValueError("a field is out of range")
            if not _GUARDS.fullmatch(handle.guards):
                raise ValueError(f"guards {handle.guards!r}")
            if handle.control and not is_name(handle.control):
                raise ValueError(f"control {handle.control!r}")
        except (TypeError, ValueError) as error:
            raise TransferBroken(f"the receiver's pool handle cannot be read: {error}") from error
        return handle


def missing(memory: BlockMemory) -> str:
    """Why this worker cannot take part; empty if it can."""
    if not memory.slab.is_cuda:
        return "the pool is not in GPU memory"
    if not memory.tiles:
        return "what the blocks consist of is not known"
    try:
        cuda_driver.export(memory.slab.data_ptr(), memory.slab.device.index)
    except (cuda_driver.DriverError, OSError) as error:
        return f"the pool cannot be exported: {error}"
    return ""


def export(memory: BlockMemory, guards: str, control: str = "") -> bytes:
    """What a sender needs to map the pool. Compiles what checking its pages takes."""
    warm_up(memory)
    device = memory.slab.device.index
    handle, offset = cuda_driver.export(memory.slab.data_ptr(), device)
    num_blocks, block_bytes = memory.slab.shape
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return PoolHandle(
        handle.hex(), offset, num_blocks, block_bytes, memory.block_size, uuid, guards, locality.process(), control
    ).encode()


class CudaIpcSender(OneSidedSender):
    """Its links share a stream and two threads."""

    def __init__(
        self,
        memory: BlockMemory,
        source: tuple[str, str],
        progress_s: float = 10.0,
        num_programs: int = NUM_PROGRAMS,
    ) -> None:
        def map_pool(endpoint: Endpoint) -> "_Pool":
            return _Pool(memory, PoolHandle.decode(endpoint.data), num_programs)

        threads = Threads("kv-push", lambda: torch.cuda.set_device(memory.slab.device))
        super().__init__("cuda_ipc", memory, source, progress_s, threads, map_pool)


class _Pool:
    """The receiver's pool, mapped."""

    def __init__(self, memory: BlockMemory, handle: PoolHandle, num_programs: int) -> None:
        """Raises TransferBroken."""
        self.num_programs = num_programs
        self.memory = memory
        self._ranges: Callable[[int, int], Sequence[Any]] = memory.tile_ranges
        self._launch: Callable[..., None] = lambda *args: launch(*args)  # as it is found then: benchmarks replace it
        if isinstance(memory, RoundedMemory):
            self._ranges = memory.rounded_ranges
            self._launch = partial(round_kernel.launch, dtype=memory.rows_dtype)
        self.handle = handle
        self.control = handle.control
        self.device = memory.slab.device
        self.stream = side_stream(self.device, "push")
        width = memory.layer_offsets[-1] // memory.block_size * handle.block_size
        if width != handle.block_bytes:
            raise TransferBroken(f"blocks of {handle.block_bytes} bytes: {width} were expected")
        theirs = _visible_device(handle.device)
        if theirs != self.device.index and not torch.cuda.can_device_access_peer(self.device.index, theirs):
            raise TransferBroken(f"GPU {self.device.index} has no peer access to GPU {theirs}")
        try:
            self.guards = open_guards(handle.guards)
        except OSError as error:
            raise TransferBroken(f"the receiver's guard table cannot be mapped: {error}") from error
        try:
            self._mapped = cuda_driver.open_memory(bytes.fromhex(handle.memory), self.device.index)
        except cuda_driver.DriverError as error:
            raise TransferBroken(f"the receiver's pool cannot be mapped: {error}") from error
        self.address = self._mapped + handle.offset
        self.life = locality.Life(handle.process)
        self._lived_s = 0.0  # when it was last seen to live
        self._slots, self._looks = Slots(self.device, MAX_PROGRAMS), Looks(self.stream)
        self._guards_at = _register(self.guards)
        self._beside: torch.cuda.Stream | None = None  # for digests of what the copy engine moves, if it does
        self._warm_up()
        is_alike = handle.block_size == memory.block_size and not isinstance(memory, RoundedMemory)
        if is_alike and cuda_copy.works(self.address, self.device):
            warm_up(memory)
            self._beside = side_stream(self.device, "push digest")

    def holds(self, placement: Placement) -> bool:
        return max(placement.page_ids, default=0) < self.handle.num_blocks and 0 <= placement.guard < NUM_SLOTS

    def writer(self, placement: Placement) -> "_Writer":
        return _Writer(self, placement)

    def require(self, placement: Placement) -> None:
        """Raises TransferError unless the pages are there to be written."""
        if int(self.guards[placement.guard]) != placement.generation:
            raise TransferRefused("the receiver has revoked the ticket")
        # Its guards stay as they were. Asking takes Python's lock away for a while, and a write that comes too late
        # harms nobody: the pool stays mapped.
        if (now_s := time.monotonic()) > self._lived_s + LIFE_S:
            if self.life.is_over:
                raise TransferBroken("the receiver's process has ended")
            self._lived_s = now_s

    def tables(self, placement: Placement) -> PageTables:
        num_tokens = len(placement.page_ids) * self.handle.block_size
        return PageTables(placement.page_ids, -(-num_tokens // self.memory.block_size), self.device)

    def push(self, rect: Rect, tokens: tuple[int, int], pages: PageTables, placement: Placement) -> "_Write":
        """Launches on the side stream, one after the other."""
        ranges = self._ranges(rect.layer_start, rect.layer_stop)
        if self._is_copied(rect) and (write := self._copy(rect, tokens, pages, placement)):
            return write
        with torch.cuda.stream(self.stream):
            slot = self._slots.take(len(ranges), self.num_programs)
            pages.fill(rect.block_start, rect.block_ids, self.stream)
            source, target, guard = self._source(pages), self._target(pages), 0
            # What is launched on an idle stream begins at once: our own look, just now, is as good.
            if self._guards_at and (rect.after is not None or not self.stream.query()):
                guard = slot.word
                self._looks.look(self._guards_at + 8 * placement.guard, slot, rect.after)  # type: ignore[arg-type]
            elif rect.after is not None:
                self.stream.wait_event(rect.after)  # type: ignore[arg-type]  # a torch.cuda.Event, where CUDA is
            self._looks.begins(slot)
            at = slot.address
            for tiles in ranges:
                self._launch(source, target, tokens, tiles, at, self.num_programs, guard, placement.generation)
                at += slot.row_bytes
            slot.done.record(self.stream)
        return _Write(rect.after, slot, len(ranges), self._slots, pages)

    def _source(self, pages: PageTables) -> Side:
        slab = self.memory.slab
        return Side(slab.data_ptr(), slab.shape[1], self.memory.block_size, pages.ours, 0)

    def _target(self, pages: PageTables) -> Side:
        return Side(self.address, self.handle.block_bytes, self.handle.block_size, pages.theirs, 0)

    def _is_copied(self, rect: Rect) -> bool:
        run = self.memory.width(rect.layer_start, rect.layer_stop)
        is_final = rect.after is None or rect.after.query()
        return self._beside is not None and run >= cuda_copy.MIN_RUN_BYTES and is_final

    def _copy(self, rect: Rect, tokens: tuple[int, int], pages: PageTables, placement: Placement) -> "_Write | None":
        """By the copy engine, and by the kernel a digest on a stream beside, neither of which waits for the other.
        None: it cannot, now or later."""
        offsets, beside = self.memory.layer_offsets, self._beside
        assert beside is not None
        ranges = self._ranges(rect.layer_start, rect.layer_stop)
        run = offsets[rect.layer_start], offsets[rect.layer_stop]
        num_programs = digest_programs(len(rect.block_ids) * (run[1] - run[0]))
        slot = self._slots.take(len(ranges), num_programs)
        slab = self.memory.slab
        page_ids = placement.page_ids[rect.block_start : rect.block_start + len(rect.block_ids)]
        places = (slab.data_ptr(), slab.shape[1], rect.block_ids), (self.address, self.handle.block_bytes, page_ids)
        try:
            cuda_copy.copy_blocks(*places, run, self.stream, lambda: self._looks.begins(slot))
        except cuda_driver.DriverError as error:
            _log.warning("the copy engine is left out from now on: %s", error)
            self._beside = None
            self._slots.give_back(slot)
            return None
        slot.done.record(self.stream)
        with torch.cuda.stream(beside):
            pages.fill(rect.block_start, rect.block_ids, beside)
            source = self._source(pages)
            at = slot.address
            for tiles in ranges:
                self._launch(source, None, tokens, tiles, at, num_programs)
                at += slot.row_bytes
            slot.digested.record(beside)
        return _Write(None, slot, len(ranges), self._slots, pages, slot.digested)

    def synchronize(self) -> None:
        """Returns when all that has been launched is done."""
        self.stream.synchronize()
        if self._beside is not None:
            self._beside.synchronize()

    def close(self) -> None:
        self.synchronize()
        cuda_driver.close_memory(self._mapped, self.device.index)
        if self._guards_at:
            torch.cuda.cudart().cudaHostUnregister(self._guards_at)
        self.life.close()

    def _warm_up(self) -> None:
        """Compiles the kernels now, not within the first prompt's transfer: a push of no tokens."""
        nothing = Placement((0,), 0, 2**31 - 1)
        pages = self.tables(nothing)
        with torch.cuda.device(self.device):
            passed = torch.cuda.Event()
            passed.record()
        for layer in first_of_each_shape(self.memory.tiles):
            for after in (None, passed):  # without and with a look at the guard
                self.push(Rect((0,), 0, layer, layer + 1, after), (0, 0), pages, nothing).wait()


class _Writer:
    """Of one transfer."""

    is_instant = True

    def __init__(self, pool: _Pool, placement: Placement) -> None:
        self._pool = pool
        self._pages = pool.tables(placement)

    def write(self, rect: Rect, placement: Placement) -> "_Write":
        """What our last, partly filled block has behind the receiver's last page is left out."""
        pool, ours, theirs = self._pool, self._pool.memory.block_size, self._pool.handle.block_size
        last = (rect.block_start + len(rect.block_ids)) * ours
        tokens = rect.block_start * ours, min(last, len(placement.page_ids) * theirs)
        if last - tokens[1] >= ours:
            raise TransferBroken(f"token {last - 1} is pushed: {len(placement.page_ids)} blocks were granted")
        pool.require(placement)
        try:
            return pool.push(rect, tokens, self._pages, placement)
        except BaseException:
            pool.synchronize()  # nobody waits for what of it has been launched
            raise


@dataclass(frozen=True, slots=True)
class _Write:
    after: ReadyEvent | None
    slot: Slot
    num_ranges: int
    slots: Slots
    pages: PageTables  # kept until they have been read
    digested: torch.cuda.Event | None = None  # where that is not part of the write

    def wait(self) -> int:
        # Asleep while the layers are computed, which may take long; polling, in the driver, for the push itself.
        if self.after is not None:
            self.after.synchronize()
        self.slot.done.synchronize()
        if self.digested is not None:
            self.digested.synchronize()
        digest = self.slot.digest(0, self.num_ranges)
        self.slots.give_back(self.slot)
        return digest


def _visible_device(uuid: str) -> int:
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    raise TransferBroken(f"GPU {uuid} of the receiver is not visible to this process")


def _register(guards: np.ndarray) -> int:
    """Where kernels find the table, as host memory; 0 where the driver does not map it, and only the host looks."""
    address = guards.ctypes.data
    status = torch.cuda.cudart().cudaHostRegister(address, -(-guards.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, 2)
    if int(status) != 0:
        _log.warning("the guard table cannot be registered (%s): writes are stopped from the host only", status)
        return 0
    return address
