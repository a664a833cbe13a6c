"""A prefill engine in this process and the way from its pool into a peer's: the near side of push_cost_cuda.py."""

import asyncio
import threading
import time
from collections import deque

import torch

from benchmarks.cuda_peer import SOURCE, Peer
from benchmarks.decode_peer import make_engine, make_request
from cluster.worker import memory_of
from engine.request import Event, Failed, Started, Token
from kv_transfer.base import BlockMemory, Link, Outgoing, Sender
from kv_transfer.create import create_sender
from kv_transfer.cuda_slot import Looks
from kv_transfer.staging import indices

LANES = 3  # transfers at once, where they go as fast as the wire takes them


class Prefill:
    """The engine of this process, and the way from its pool into the peer's."""

    link: Link
    peer: Peer

    def __init__(self, model: str, device: str, kv_gib: float, prompt: int):
        """`prompt`: tokens of what will be pushed; a step's, too. Blocks."""
        self.engine = make_engine(model, device, kv_gib, prompt, self._listen)
        self.memory: BlockMemory = memory_of(self.engine)
        self.transport = "grpc" if device == "cpu" else "cuda_ipc"
        self.lots: asyncio.Queue[list[int]] = asyncio.Queue()  # pages of the peer, each for a prompt
        self.block_ids: tuple[int, ...] = ()  # that held a prompt's KV
        self._num_blocks = -(-prompt // self.memory.block_size)
        self._started: dict[str, float] = {}
        self._ended: dict[str, asyncio.Future[float]] = {}
        self._num_prompts = 0
        self._ways: dict[tuple[int, int], tuple[torch.cuda.Stream, Looks]] = {}

    async def connect(self, peer: Peer, num_lots: int) -> None:
        self.peer, self.loop = peer, asyncio.get_running_loop()
        self._sender: Sender = create_sender(self.transport, self.memory, SOURCE)
        endpoint = next(e for e in peer.endpoints if e.transport == self.transport)
        self.link = await self._sender.connect(peer.address, endpoint)
        for lot in await peer.ask("lots", num_blocks=self._num_blocks, count=num_lots):
            self.lots.put_nowait(lot)

    async def close(self) -> None:
        await self._sender.close()
        self.engine.stop()
        await self.peer.stop()

    def use(self, num_programs: int, priority: int = -1) -> None:
        """Of the push kernel and of its stream, where it is one that moves the pages; nothing is under way."""
        pool = getattr(self.link, "_pool", None)
        if pool is None:
            return
        if (num_programs, priority) not in self._ways:
            stream = torch.cuda.Stream(pool.device, priority=priority)
            self._ways[num_programs, priority] = stream, Looks(stream)
        pool.num_programs = num_programs
        pool.stream, pool._looks = self._ways[num_programs, priority]

    async def run(self, num_tokens: int, count: int, has_sink: bool, does_push: bool) -> float:
        """ms a prompt: of `count` at once, from the first one's start to the last one's first token. A sink that does
        not push is told of everything, and ignores it."""
        names = [f"prompt-{self._num_prompts + index}" for index in range(count)]
        self._num_prompts += count
        self._ended = {name: self.loop.create_future() for name in names}
        sinks = [Sink(self, name, does_push) if has_sink else None for name in names]
        for name, sink in zip(names, sinks, strict=True):
            self.engine.submit(make_request(name, num_tokens, 1), sink)
        ends = await asyncio.wait_for(asyncio.gather(*self._ended.values()), 60)
        took = max(ends) - min(self._started[name] for name in names)
        for name, sink in zip(names, sinks, strict=True):
            if sink is not None:
                await sink.finish()
                self.engine.release(name)
        return took / count * 1e3

    def _listen(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Started):
                self._started[event.request_id] = now
            elif isinstance(event, Token):
                self.loop.call_soon_threadsafe(self._ended[event.request_id].set_result, now)
            elif isinstance(event, Failed):
                error = RuntimeError(f"{event.request_id}: {event.message}")
                self.loop.call_soon_threadsafe(self._ended[event.request_id].set_exception, error)


class Sink:
    """The KVSink of one prompt."""

    receiver = "peer"

    def __init__(self, prefill: Prefill, name: str, does_push: bool):
        self._prefill, self._name, self._does_push = prefill, name, does_push
        self._transfer: Transfer | None = None

    def wanted(self) -> None:
        self._prefill.loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._grant()))

    def sampled(self, token) -> None:
        pass

    def ready(self, block_ids, block_start, layer_start, layer_stop, after=None) -> None:
        self._prefill.block_ids = block_ids
        if self._transfer is not None:
            self._transfer.outgoing.push(block_ids, block_start, layer_start, layer_stop, after)

    async def finish(self) -> None:
        if self._transfer is not None:
            await self._transfer.finish()

    async def _grant(self) -> None:
        if self._does_push:
            self._transfer = await Transfer.begin(self._prefill)
        self._prefill.engine.grant(self._name, 0)


class Transfer:
    """Of a whole prompt, into a lot of the peer's pages."""

    outgoing: Outgoing

    def __init__(self, prefill: Prefill, lot: list[int], transfer_id: bytes):
        self._prefill, self._lot, self._transfer_id = prefill, lot, transfer_id

    @classmethod
    async def begin(cls, prefill: Prefill) -> "Transfer":
        lot = await prefill.lots.get()
        transfer_id, placement = await prefill.peer.grant(lot, prefill.link.transport)
        self = cls(prefill, lot, transfer_id)
        self.outgoing = prefill.link.open(transfer_id, placement=placement)
        return self

    async def finish(self) -> int:
        manifest = await self.outgoing.finish()
        await self._prefill.peer.commit(self._transfer_id, manifest)
        self._prefill.lots.put_nowait(self._lot)
        return manifest.num_bytes


class Pushes:
    """A prompt's layers transferred again and again until `stop`: a layer at a time at a rate, or whole prompts as fast
    as they go, LANES at once."""

    def __init__(self, prefill: Prefill, gb_per_s: float | None):
        self.num_bytes = 0  # of what was announced
        self._prefill, self._is_over = prefill, False
        lanes = 1 if gb_per_s else LANES
        self._lanes = [asyncio.create_task(self._push(gb_per_s)) for _ in range(lanes)]

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._lanes)

    async def _push(self, gb_per_s: float | None) -> None:
        prefill, loop = self._prefill, self._prefill.loop
        memory, block_ids = prefill.memory, prefill.block_ids
        stretch = 1 if gb_per_s else max(1, memory.num_layers // 4)
        due_s = loop.time()
        while not self._is_over:
            transfer, before = await Transfer.begin(prefill), 0
            for layer in range(0, memory.num_layers, stretch):
                if gb_per_s:
                    await asyncio.sleep(due_s - loop.time())
                    due_s += len(block_ids) * memory.width(layer, layer + 1) / 1e9 / gb_per_s
                transfer.outgoing.push(block_ids, 0, layer, min(layer + stretch, memory.num_layers))
                self.num_bytes += transfer.outgoing.num_bytes - before
                before = transfer.outgoing.num_bytes
            self.num_bytes += await transfer.finish() - before


class WirePushes:
    """The push kernel alone, launch behind launch into pages of the peer that no ticket uses: what NVLink takes. On a
    thread; a CPU has none."""

    def __init__(self, prefill: Prefill, lot: list[int]):
        self.num_bytes = 0  # of what has landed
        self._is_over = False
        self._thread = threading.Thread(target=self._push, args=(prefill, lot))
        self._thread.start()

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.to_thread(self._thread.join)

    def _push(self, prefill: Prefill, lot: list[int]) -> None:
        from kv_transfer.push_kernel import Side, launch  # Triton is not everywhere

        memory, pool = prefill.memory, prefill.link._pool  # type: ignore[attr-defined]
        device, size, width = memory.slab.device, memory.block_size, memory.slab.shape[1]
        torch.cuda.set_device(device)
        with torch.cuda.stream(pool.stream):
            mine, theirs = (indices(ids, device, torch.int32) for ids in (prefill.block_ids, lot))
            sums = torch.empty(pool.num_programs, dtype=torch.int64, device=device)
            sides = (
                Side(memory.slab.data_ptr(), width, size, mine.data_ptr(), 0),
                Side(pool.address, width, size, theirs.data_ptr(), 0),
            )
            under_way: deque[torch.cuda.Event] = deque()
            while not self._is_over or under_way:
                if not self._is_over:
                    for tiles in memory.tile_ranges(0, memory.num_layers):
                        launch(*sides, (0, len(lot) * size), tiles, sums.data_ptr(), pool.num_programs)
                    under_way.append(torch.cuda.Event())
                    under_way[-1].record()
                if self._is_over or len(under_way) > 2:
                    under_way.popleft().synchronize()
                    self.num_bytes += len(lot) * width
