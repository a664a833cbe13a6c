"""Two pools of blocks and a transport between them: what the transfer tests share."""

import asyncio
import contextlib
import dataclasses
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from unittest import mock

import grpc.aio
import numpy as np
import pytest
import torch

import kv_transfer
from kv_transfer import choose, cuda_driver, nixl
from kv_transfer.base import BlockMemory, ChunkHeader, Endpoint, Link, ObjectStore, Outgoing, Placement, ReadyEvent
from kv_transfer.checksum import crc32c
from kv_transfer.control_server import ControlServer, OnCommit, no_commits
from kv_transfer.guards import Guards, open_guards
from kv_transfer.receiver import Receiver
from kv_transfer.relayout import Tiles
from protos.grpc_options import SERVER_OPTIONS
from tests.one_sided import CpuSender, CpuWriter

SOURCE = ("prefill-0", "incarnation-a")
# Uneven layers, and padding behind the last: nothing may assume that they are alike.
LAYER_OFFSETS = (0, 1024, 2048, 4096, 4608, 8192)
BLOCK_BYTES = 8200
NUM_LAYERS = len(LAYER_OFFSETS) - 1
PLACED = ("placed", "placed over grpc")  # a writer on the CPU: told over the control socket, or a Push stream
ONE_SIDED = choose.ONE_SIDED | {*PLACED}
needs_nixl = pytest.mark.skipif(not any(map(find_spec, nixl.PACKAGES)), reason="NIXL is not installed")
# Not by asking torch: who has asked cannot fork processes that use a GPU (tests/transfer_peer.py).
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="needs a CUDA device")]
CUDA_IPC = pytest.param("cuda_ipc", marks=NEEDS_GPU)
TRANSPORTS = ["local", "grpc", "ray_store", *PLACED, pytest.param("nixl", marks=needs_nixl), CUDA_IPC]


def make_memory(
    num_blocks: int, seed: int | None = None, offsets: Sequence[int] = LAYER_OFFSETS, device: str = "cpu"
) -> BlockMemory:
    """Random bytes from `seed` on, or zeros."""
    shape = (num_blocks, offsets[-1] + BLOCK_BYTES - LAYER_OFFSETS[-1])
    slab = torch.zeros(shape, dtype=torch.uint8)
    if seed is not None:
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed), out=slab)
    if device == "cpu":
        return BlockMemory(slab, tuple(offsets))
    # What moves by a kernel is rows of words, as long ones as a layer's 16 tokens have, and nothing behind the layers.
    widths = [(stop - start) // 16 for start, stop in pairwise(offsets)]
    tiles = tuple((Tiles(width // (row := math.gcd(width, 256)), row),) for width in widths)
    return BlockMemory(slab[:, : offsets[-1]].contiguous().to(device), tuple(offsets), 16, tiles)


def memories(transport: str, num_blocks: int = 32, offsets: Sequence[int] = LAYER_OFFSETS) -> list[BlockMemory]:
    """A sender's pool and a receiver's: for cuda_ipc on the first GPU and on the last."""
    source, target = devices(transport)
    return [make_memory(num_blocks, 1, offsets, source), make_memory(num_blocks, None, offsets, target)]


def devices(transport: str) -> tuple[str, str]:
    return ("cuda:0", f"cuda:{torch.cuda.device_count() - 1}") if transport == "cuda_ipc" else ("cpu", "cpu")


def make_tiled(num_blocks: int, block_size: int, seed: int | None = None, device: str = "cpu") -> BlockMemory:
    """Blocks of that many tokens, in layers of uneven tiles. The rows of a layer's K and V differ, too."""
    shapes: list = [((2, 64), (2, 64)), ((3, 32), (3, 48)), ((2, 64), (2, 64)), ((1, 16), (1, 16), (2, 1))]
    if device != "cpu":  # a kernel moves words, and takes a block to be what its tokens take
        shapes[-1] = shapes[-1][:2]
    tiles = tuple(tuple(Tiles(*entry) for entry in layer) for layer in shapes)
    sizes = [block_size * sum(count * row for count, row in layer) for layer in shapes]
    plain = make_memory(num_blocks, seed, tuple(accumulate(sizes, initial=0)))
    slab = plain.slab if device == "cpu" else plain.slab[:, : plain.layer_offsets[-1]].contiguous().to(device)
    return BlockMemory(slab, plain.layer_offsets, block_size, tiles)


def tokens(memory: BlockMemory, block_ids: Sequence[int]) -> torch.Tensor:
    """What blocks hold of each token, in order: uint8 [tokens, bytes of all layers], whatever the blocks' size."""
    rows, at = [], 0
    for entry in (entry for layer in memory.tiles for entry in layer):
        stop = at + entry.num_tiles * entry.row_bytes * memory.block_size
        tiles = memory.slab.cpu()[list(block_ids), at:stop]
        tiles = tiles.view(len(block_ids), entry.num_tiles, memory.block_size, entry.row_bytes)
        rows.append(tiles.transpose(1, 2).reshape(-1, entry.num_tiles * entry.row_bytes))
        at = stop
    return torch.cat(rows, dim=1)


def make_chunk(memory: BlockMemory, sequence: int, block_ids: Sequence[int], block_start: int, layers: tuple[int, int]):
    """What a sender would make of these pages: header and arrays."""
    pages = memory.read(block_ids, *layers)
    count, size = layers[1] - layers[0], sum(map(len, pages))
    header = ChunkHeader(sequence, layers[0], count, block_start, len(block_ids), size, crc32c(pages))
    return header, pages


class Passing:
    """A ReadyEvent that a test lets pass."""

    def __init__(self) -> None:
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        assert self.passed.wait(10)


@dataclass
class Pair:
    """A sender's pool, a receiver's pool, and the way from one to the other."""

    source: BlockMemory
    target: BlockMemory
    receiver: Receiver
    sender: kv_transfer.base.Sender
    link: kv_transfer.base.Link
    address: str
    endpoint: Endpoint  # of the receiver

    def grant(
        self,
        block_ids: Sequence[int],
        first_block: int = 0,
        lease_s: float = 30.0,
        owner: str = "owner",
        sent: tuple[int, int] | None = None,
    ) -> bytes:
        for device in {memory.slab.device for memory in (self.source, self.target) if memory.slab.is_cuda}:
            torch.cuda.synchronize(device)  # what the test has done to the pools is behind us
        writer = "this process" if self.is_one_sided else None
        return self.receiver.grant(owner, SOURCE, block_ids, first_block, lease_s, writer, sent)

    @property
    def is_one_sided(self) -> bool:
        return self.link.transport in ONE_SIDED

    def open(self, transfer_id: bytes, max_chunk_bytes: int | None = None) -> Outgoing:
        placement = None
        if self.is_one_sided:
            with contextlib.suppress(kv_transfer.TransferRefused):  # forged: then the sender makes up the rest, too
                placement = self.receiver.placement(transfer_id)
            placement = placement or Placement((0,), 0, 1)
        return self.link.open(transfer_id, max_chunk_bytes, placement)

    async def give_up(self, outgoing: Outgoing, transfer_id: bytes) -> None:
        """As the workers do; the ticket's pages are free to go afterwards, whoever wrote to them."""
        outgoing.abort("given up")
        assert self.receiver.release(transfer_id)
        if self.is_one_sided:
            assert transfer_id in self.receiver.quarantine
            await outgoing.wait_closed()
            assert self.receiver.quarantine.fence(transfer_id) is not None

    async def connect(self, address: str, endpoint: Endpoint | None = None) -> Link:
        """Another way out of the sender: through a proxy, to another receiver, or to nobody."""
        return await self.sender.connect(address, endpoint or self.endpoint)

    def late(self) -> tuple[ReadyEvent, Callable[[], object]]:
        """Of pages that are not final yet, and what returns when they are."""
        if not self.source.slab.is_cuda:
            passing = Passing()
            return passing, passing.passed.set
        event = torch.cuda.Event()
        with torch.cuda.device(self.source.slab.device):
            torch.cuda._sleep(10**9)  # clocks: more than half a second
            event.record()
        return event, event.synchronize

    async def received(self, num_bytes: int) -> None:
        """Returns when the receiver has placed that many bytes."""
        name = "placed" if self.is_one_sided else "chunk"
        place, there = getattr(self.receiver, name), asyncio.Event()
        loop = asyncio.get_running_loop()

        def placed(*args) -> None:
            place(*args)
            loop.call_soon_threadsafe(there.set)

        setattr(self.receiver, name, placed)
        try:
            async with asyncio.timeout(10):
                while self.receiver.bytes_received < num_bytes:
                    there.clear()
                    with contextlib.suppress(TimeoutError):  # a call that had begun before tells nobody
                        await asyncio.wait_for(there.wait(), 0.05)
        finally:
            setattr(self.receiver, name, place)

    def pages(self, memory: BlockMemory, block_ids: Sequence[int]) -> torch.Tensor:
        return memory.slab[list(block_ids), : memory.layer_offsets[-1]].cpu()

    def is_equal(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> bool:
        return torch.equal(self.pages(self.source, source_ids), self.pages(self.target, target_ids))


@contextlib.asynccontextmanager
async def transfer_pair(
    transport: str,
    object_store: ObjectStore | None = None,
    source: BlockMemory | None = None,
    target: BlockMemory | None = None,
    max_chunk_bytes: int | None = None,
    progress_s: float = 5.0,
    receiver_store: ObjectStore | None = None,
    on_commit: OnCommit = no_commits,
) -> AsyncIterator[Pair]:
    if source is None or target is None:
        source, target = memories(transport)
    guards = Guards() if transport in ONE_SIDED else None
    receiver = Receiver(target, kv_transfer.MAX_CHUNK_BYTES, progress_s=progress_s, guards=guards)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    stream = "grpc" if guards is not None else transport  # one-sided transports announce what they wrote
    stop = kv_transfer.serve(stream, receiver, server, receiver_store or object_store, address)
    await server.start()
    control = ControlServer(receiver, on_commit) if guards is not None else None
    endpoint, agent, sender = Endpoint(transport), None, None
    if transport in PLACED:
        assert guards is not None and control is not None
        endpoint = Endpoint(transport, data=control.name.encode() if transport == "placed" else b"")
        sender = CpuSender(transport, CpuWriter(source, target, open_guards(guards.name)), SOURCE, progress_s)
    elif transport == "nixl":
        assert control is not None
        agent = nixl.agent_of(target)
        endpoint = Endpoint(transport, data=nixl.export(target, receiver.guards_name, control.name))
    elif transport == "cuda_ipc":
        assert control is not None
        from kv_transfer import cuda_ipc  # Triton is not everywhere

        torch.cuda.set_device(source.slab.device)
        endpoint = Endpoint(transport, data=cuda_ipc.export(target, receiver.guards_name, control.name))
    sender = sender or kv_transfer.create_sender(transport, source, SOURCE, object_store, max_chunk_bytes, progress_s)
    reach = contextlib.ExitStack()
    try:
        reach.enter_context(within_reach(source, target, endpoint))
        link = await sender.connect(address, endpoint)
        yield Pair(source, target, receiver, sender, link, address, endpoint)
        receiver.check()
    finally:
        await sender.close()
        reach.close()
        if control is not None:
            control.close()
        stop()
        await server.stop(None)
        if guards is not None:
            guards.close()
        del agent  # the receiver's: senders could write as long as it was there


@contextlib.contextmanager
def within_reach(source: BlockMemory, target: BlockMemory, endpoint: Endpoint) -> Iterator[None]:
    """The driver maps no allocation into the process that has it: here the mapping is the pool itself, written to by
    the other GPU. Between two processes it is the driver's: test_transfer_kills.py, test_cuda_ipc.py."""
    if endpoint.transport != "cuda_ipc":
        yield
        return
    from kv_transfer import cuda_ipc

    handle = cuda_ipc.PoolHandle.decode(endpoint.data)
    own, begin = bytes.fromhex(handle.memory), target.slab.data_ptr() - handle.offset
    one, other = (torch.zeros(1, device=memory.slab.device) for memory in (source, target))
    one.copy_(other), other.copy_(one)  # torch gives GPUs access to each other's memory as it copies
    really_open, really_close = cuda_driver.open_memory, cuda_driver.close_memory

    def open_memory(memory: bytes, device: int) -> int:
        return begin if memory == own else really_open(memory, device)

    def close_memory(address: int, device: int) -> None:
        if address != begin:
            really_close(address, device)

    with mock.patch.multiple(cuda_driver, open_memory=open_memory, close_memory=close_memory):
        yield


def from_afar(endpoint: Endpoint) -> Endpoint:
    """A nixl endpoint as a sender on another host has it: guards and control socket are out of its reach."""
    handle = nixl.PoolHandle.decode(endpoint.data)
    return Endpoint("nixl", data=dataclasses.replace(handle, host="another host", control="").encode())


class DictStore:
    """An object store within one process, for tests that need no Ray."""

    def __init__(self) -> None:
        self.objects: dict[bytes, np.ndarray] = {}
        self.num_put = 0
        self.max_objects = 0

    def put(self, arrays: Sequence[np.ndarray]) -> tuple[bytes, int]:
        self.num_put += 1
        token = b"object-%d" % self.num_put
        self.objects[token] = np.concatenate(arrays)
        self.max_objects = max(self.max_objects, len(self.objects))
        return token, crc32c(arrays)

    def get(self, token: bytes, num_bytes: int, timeout_s: float) -> tuple[np.ndarray, bool]:
        if token not in self.objects:
            raise kv_transfer.TransferBroken("no such object")
        return self.objects[token], False

    def drop(self, token: bytes, mapped: bool = False) -> None:
        self.objects.pop(token, None)


class ActorStore:
    """Puts and drops in another process, so that this one only borrows."""

    def __init__(self, actor) -> None:
        self._actor = actor

    def put(self, arrays: Sequence[np.ndarray]) -> tuple[bytes, int]:
        import ray

        return ray.get(self._actor.put.remote([np.array(array) for array in arrays]))

    def get(self, token: bytes, num_bytes: int, timeout_s: float) -> tuple[np.ndarray, bool]:
        raise AssertionError("the sender never reads")

    def drop(self, token: bytes, mapped: bool = False) -> None:
        self._actor.drop.remote(token, mapped)
