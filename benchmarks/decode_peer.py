"""A decode engine at work on a GPU, in a process of its own, whose pool others push into: benchmarks/push_cost_cuda.py.

    python -m benchmarks.decode_peer MODEL DEVICE KV_GIB MAX_TOKENS

Answers, beside what benchmarks/cuda_peer.py does:

    lots     num_blocks, count -> page ids of so many reservations, held for good
    batch    size, context     -> once that many sequences, in place of those before, have got their first tokens
    reading  block_ids, gb_per_s, programs, priority -> from now on these pages are digested, at that rate, by so many
             programs (0: as in service) on a stream of that priority; of no pages: nothing is
    steps    start_s, stop_s   -> lengths in ms of the full batch's steps between two times of CLOCK_MONOTONIC
"""

import asyncio
import itertools
import random
import sys
import threading
import time
from itertools import pairwise
from typing import Any

import torch

from benchmarks.cuda_peer import serve
from cluster.worker import memory_of
from decode_worker.kv_service import canary_request
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Event, Request, SamplingParams, Token
from kv_transfer.memory import BlockMemory, Pages
from kv_transfer.placed import MAX_WRITE_BYTES

WARM_STEPS = 8  # before a batch counts as running


def make_engine(model: str, device: str, kv_gib: float, max_tokens: int, on_events) -> Engine:
    """As a worker's: no prefix cache, so that every prompt is computed; started."""
    config = EngineConfig(
        model,
        device=device,
        dtype="bfloat16" if device != "cpu" else "float32",
        load_format="dummy",
        block_size=64,
        max_num_batched_tokens=max_tokens,
        max_num_seqs=80,
        max_model_len=2 * max_tokens,
        kv_cache_gib=kv_gib,
        enable_prefix_caching=False,
        num_threads=1 if device == "cpu" else None,
    )
    engine = Engine(config, on_events, lambda line: print(f"  {device}: {line}", file=sys.stderr, flush=True))
    engine.start()
    return engine


def make_request(name: str, num_tokens: int, max_tokens: int) -> Request:
    ids = tuple(random.Random(name).choices(range(1000, 30000), k=num_tokens))
    return Request(name, ids, num_tokens, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))


class Batch:
    """The sequences that run. `listen` is for the engine's thread, the rest for the loop."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._names: set[str] = set()
        self._size = 0
        self._ends: list[float] = []  # of steps that gave every sequence a token
        self._loop = asyncio.get_running_loop()
        self._is_running = asyncio.Event()

    def listen(self, events: list[Event]) -> None:
        names = [event.request_id for event in events if isinstance(event, Token)]
        if self._size and len(names) == self._size:
            self._ends.append(time.monotonic())
            if len(self._ends) == WARM_STEPS:
                self._loop.call_soon_threadsafe(self._is_running.set)

    async def start(self, size: int, context: int, name: str) -> None:
        assert self.engine is not None
        for old in self._names:
            self.engine.abort(old)
        self._names = {f"{name}-{index}" for index in range(size)}
        self._size, self._ends = size, []
        self._is_running.clear()
        for new in sorted(self._names):
            self.engine.submit(make_request(new, context, self.engine.model_info.max_model_len - context - 1))
        await asyncio.wait_for(self._is_running.wait(), 100)

    def steps(self, start_s: float, stop_s: float) -> list[float]:
        return [(b - a) * 1e3 for a, b in pairwise(self._ends) if a >= start_s and b <= stop_s]


class Reading:
    """The receiver's digest of some pages, all layers, again and again on a thread; as much at once as a write has."""

    def __init__(self, memory: BlockMemory, block_ids: list[int], gb_per_s: float, programs: int, priority: int):
        self._is_over = threading.Event()
        self._in_service: dict[str, Any] = {}
        if (programs, priority) != (0, -1):
            from kv_transfer import cuda_pages  # Triton is not everywhere

            stream = torch.cuda.Stream(memory.slab.device, priority=priority)
            own = cuda_pages.digest_programs
            replaced = {"side_stream": lambda device, purpose: stream}
            replaced["digest_programs"] = lambda num_bytes: programs or own(num_bytes)
            for name, value in replaced.items():
                self._in_service[name] = getattr(cuda_pages, name)
                setattr(cuda_pages, name, value)
        self._thread = threading.Thread(target=self._read, args=(memory, block_ids, gb_per_s))
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()
        for name, value in self._in_service.items():
            setattr(sys.modules["kv_transfer.cuda_pages"], name, value)

    def _read(self, memory: BlockMemory, block_ids: list[int], gb_per_s: float) -> None:
        width, table = memory.slab.shape[1], memory.table(block_ids)
        step = max(1, MAX_WRITE_BYTES // width)
        starts = itertools.cycle(range(0, len(block_ids), step))
        due_s = time.monotonic()
        while not self._is_over.wait(max(0, due_s - time.monotonic())):
            start = next(starts)
            part = block_ids[start : start + step]
            memory.digests([Pages(part, start, 0, memory.num_layers, table=table)])
            due_s += len(part) * width / 1e9 / gb_per_s


async def main(model: str, device: str, kv_gib: float, max_tokens: int) -> None:
    sys.setswitchinterval(2e-4)
    if device != "cpu":
        torch.cuda.set_device(device)
    batch = Batch()
    engine = batch.engine = make_engine(model, device, kv_gib, max_tokens, batch.listen)

    memory, reading = memory_of(engine), None

    async def answer(asked: dict[str, Any]) -> Any:
        nonlocal reading
        match asked["what"]:
            case "lots":
                probe = asked["num_blocks"] * engine.layout.block_size - 1
                owners = [f"lot-{index}" for index in range(asked["count"])]
                asking = [engine.reserve(owner, canary_request(owner, probe), probe) for owner in owners]
                return [(await asyncio.wrap_future(one)).block_ids for one in asking]
            case "batch":
                return await batch.start(asked["size"], asked["context"], asked["name"])
            case "reading":
                if reading is not None:
                    reading.stop()
                how = (asked[name] for name in ("gb_per_s", "programs", "priority"))
                reading = Reading(memory, asked["block_ids"], *how) if asked["block_ids"] else None
                return None
            case "steps":
                return batch.steps(asked["start_s"], asked["stop_s"])
        raise AssertionError(asked)

    await serve(memory, answer)
    engine.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
