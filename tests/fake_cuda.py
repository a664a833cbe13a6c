"""Streams, events and kernels of one pretended GPU, whose memory is this process's: what cuda_ipc does on its streams,
and in which order it may happen there, without a GPU. Kernels run in Triton's interpreter.

Work waits on its stream until somebody synchronizes; then each stream goes on as far as the events it waits for let it.
"""

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


class Event:
    """Passes with the work before its latest record; `hold` keeps one back that no stream records."""

    def __init__(self, **options: Any) -> None:
        self.num_recorded = self.num_passed = 0

    def hold(self) -> "Event":
        self.num_recorded += 1
        return self

    def let_pass(self) -> None:
        self.num_passed = self.num_recorded

    def record(self, stream: "Stream | None" = None) -> None:
        self.num_recorded += 1
        number = self.num_recorded

        def passes() -> None:
            self.num_passed = max(self.num_passed, number)

        (stream or Gpu.current()).add(passes)

    def query(self) -> bool:
        Gpu.advance()
        return self.num_passed == self.num_recorded

    def elapsed_time(self, other: "Event") -> float:
        assert self.num_recorded and other.num_recorded
        return 1.0

    def synchronize(self) -> None:
        number, until_s = self.num_recorded, time.monotonic() + 20
        while self.num_passed < number:
            Gpu.advance()
            assert time.monotonic() < until_s, "the GPU stands still"
            time.sleep(0.001)


class Stream:
    cuda_stream, device_index = 7, 0

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device = torch.device("cpu")
        self.work: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        Gpu.streams.append(self)

    def add(self, run: Callable[[], None], may: Callable[[], bool] = lambda: True) -> None:
        self.work.append((may, run))

    def wait_event(self, event: Event) -> None:
        number = event.num_recorded
        self.add(lambda: None, lambda: event.num_passed >= number)

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def query(self) -> bool:
        Gpu.advance()
        return not self.work

    def synchronize(self) -> None:
        event = Event()
        event.record(self)
        event.synchronize()


class Gpu:
    """All streams, and which is whose current one."""

    streams: list[Stream] = []  # noqa: RUF012
    _lock = threading.Lock()  # the interpreter runs one kernel at a time
    _threads = threading.local()

    @classmethod
    def current(cls) -> Stream:
        return cls._threads.stream

    @classmethod
    @contextlib.contextmanager
    def use(cls, stream: Stream) -> Iterator[None]:
        before = getattr(cls._threads, "stream", None)
        cls._threads.stream = stream
        try:
            yield
        finally:
            cls._threads.stream = before

    @classmethod
    def advance(cls) -> None:
        with cls._lock:
            is_moving = True
            while is_moving:
                is_moving = False
                for stream in list(cls.streams):
                    while stream.work and stream.work[0][0]():
                        stream.work.popleft()[1]()
                        is_moving = True


def install(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone: torch.cuda and the driver, as cuda_ipc and what it stands on see them."""
    from kv_transfer import cuda_copy, cuda_driver, cuda_ipc, cuda_pages, cuda_slot, staging
    from kv_transfer.memory import BlockMemory
    from tests.interpreter import patch as patch_interpreter

    patch_interpreter(patch)
    patch.setattr(Gpu, "streams", [])
    default, empty = Stream(), torch.empty
    patch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", Gpu.use)
    patch.setattr(torch.cuda, "device", lambda device: Gpu.use(default))
    patch.setattr(torch.cuda, "can_device_access_peer", lambda mine, theirs: True)
    sides: dict[str, Stream] = {}
    slots: dict[object, cuda_slot.Slots] = {}

    def side_stream(device: torch.device, purpose: str) -> Stream:
        return sides.setdefault(purpose, Stream())

    def launch(*args: Any, real: Callable = cuda_ipc.launch) -> None:
        Gpu.current().add(lambda: real(*args))

    def copy_to_device(target: int, source: int, num_bytes: int, stream: Stream) -> None:
        stream.add(lambda: ctypes.memmove(target, source, num_bytes))

    def copy_batch(targets, sources, num_bytes: int, stream: Stream) -> None:
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
            stream.add(lambda target=target, source=source: ctypes.memmove(target, source, num_bytes))

    def copy_one(target: int, source: int, num_bytes: int, stream: Stream) -> None:
        stream.add(lambda: ctypes.memmove(target, source, num_bytes))

    for module in (cuda_ipc, cuda_pages, staging):
        patch.setattr(module, "side_stream", side_stream)
    for module in (cuda_ipc, cuda_pages):
        patch.setattr(module, "launch", launch)
    for module in (cuda_driver, cuda_pages):
        patch.setattr(module, "copy_to_device", copy_to_device)
    patch.setattr(cuda_pages, "_slots", lambda device: slots.setdefault(device, cuda_slot.Slots(device)))
    patch.setattr(cuda_copy, "_copy", copy_batch)
    patch.setattr(cuda_driver, "copy_on_device", copy_one)
    patch.setattr(cuda_driver, "open_memory", lambda handle, device: int.from_bytes(handle[:8], "little"))
    patch.setattr(cuda_driver, "close_memory", lambda address, device: None)
    patch.setattr(cuda_ipc, "_visible_device", lambda uuid: 0)
    patch.setattr(cuda_ipc, "_register", lambda guards: guards.ctypes.data)
    patch.setattr(torch.cuda, "cudart", lambda: type("Cudart", (), {"cudaHostUnregister": lambda self, at: 0})())
    patch.setattr(torch.cuda, "set_device", lambda device: None)
    patch.setattr(BlockMemory, "digests", cuda_pages.digests)
    patch.setattr(BlockMemory, "table", lambda memory, ids: torch.tensor(list(ids), dtype=torch.int32))
