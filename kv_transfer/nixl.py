"""Transport `nixl`: a NIXL agent writes pages into the receiver's pool, over UCX: RDMA, shared memory or TCP.

The receiver registers its pool with its agent and hands the agent's metadata out at the handshake. A write is one NIXL
transfer whose descriptors are merged where blocks follow each other on both sides; its CRC-32C, or a GPU's digest, is
taken of what was read and compared with what landed. Blocks must be of one size. The package is optional:
pip install 'pdserve[nixl]'. Its library and grpcio-tools' generator cannot live in one process.
"""

import contextlib
import importlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from weakref import WeakValueDictionary

import numpy as np
import torch

from kv_transfer import locality
from kv_transfer.base import Endpoint, Placement, TransferBroken, TransferRefused
from kv_transfer.guards import open_guards
from kv_transfer.memory import BlockMemory, Pages
from kv_transfer.one_sided import OneSidedSender
from kv_transfer.placed import Threads
from kv_transfer.rect import Rect

# Of one write: the receiver checks it while the next one is on its way. A GPU checks 64 MiB within a tenth of a
# millisecond, most of which is the call.
MAX_WRITE_BYTES, MAX_GPU_WRITE_BYTES = 16 << 20, 64 << 20
PACKAGES = ("nixl_cu12", "nixl_cu13")
# The agent's own thread looks after connections. Without a pause it takes half a core for doing nothing.
_PROGRESS_US = 1000
# NIXL has no event to wait for: the waiting thread asks, at first often, then every millisecond.
_POLL_S, _MAX_POLL_S = 20e-6, 1e-3


def bindings() -> ModuleType | None:
    """NIXL's own, None where it is not installed."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    for package in PACKAGES:
        try:
            return importlib.import_module(f"{package}._bindings")
        except ImportError:
            continue
    return None


def missing() -> str:
    """Why this worker cannot take part; empty if it can."""
    return "" if bindings() is not None else "NIXL is not installed: pip install 'pdserve[nixl]'"


def export(memory: BlockMemory, guards: str, control: str = "") -> bytes:
    """What a sender needs to write to the pool, while its agent is held."""
    return agent_of(memory).handle(guards, control).encode()


@dataclass(frozen=True, slots=True)
class PoolHandle:
    """A pool as a remote agent can write to it."""

    agent: str  # metadata in hex
    address: int
    num_blocks: int
    block_bytes: int
    device: int
    host: str
    guards: str  # path of the guard table, for writers on the same host
    control: str  # name of the control socket, for them too; empty: there is none

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> "PoolHandle":
        """Raises TransferBroken for what is no handle."""
        try:
            handle = cls(**json.loads(data))
            bytes.fromhex(handle.agent)
            numbers = (handle.address, handle.num_blocks, handle.block_bytes, handle.device)
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("a field is out of range")
        except (TypeError, ValueError) as error:
            raise TransferBroken(f"the receiver's pool handle cannot be read: {error}") from error
        return handle


class Agent:
    """This worker's agent, with its pool registered. Calls may come from any thread."""

    def __init__(self, memory: BlockMemory) -> None:
        nixl = bindings()
        assert nixl is not None
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread, config.pthrDelay = True, False, _PROGRESS_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self.nixl = nixl
        self.memory = memory
        self.kind = nixl.VRAM_SEG if memory.slab.is_cuda else nixl.DRAM_SEG
        self.device = memory.slab.device.index or 0
        self.address = memory.slab.data_ptr()
        # UCX asks the driver about the memory, in whatever context is current.
        with torch.cuda.device(memory.slab.device) if memory.slab.is_cuda else contextlib.nullcontext():
            self.inner = nixl.nixlAgent(uuid.uuid4().hex, config)
            self._backend = self.inner.createBackend("UCX", {})
            self._regions = nixl.nixlRegDList(self.kind, [(self.address, memory.slab.nbytes, self.device, "")])
            self.inner.registerMem(self._regions, [self._backend])

    def handle(self, guards: str, control: str) -> PoolHandle:
        num_blocks, block_bytes = self.memory.slab.shape
        where = self.address, num_blocks, block_bytes, self.device
        return PoolHandle(self.inner.getLocalMD().hex(), *where, locality.host(), guards, control)


_agents: WeakValueDictionary[int, Agent] = WeakValueDictionary()  # by address of the pool


def agent_of(memory: BlockMemory) -> Agent:
    """The one agent of a pool, for both directions, for as long as somebody holds it."""
    agent = _agents.get(memory.slab.data_ptr())
    if agent is None:
        agent = _agents[memory.slab.data_ptr()] = Agent(memory)
    return agent


def try_agent(memory: BlockMemory) -> Agent | str:
    """`agent_of`, or why there can be none: no UCX, or memory that it does not register."""
    try:
        return agent_of(memory)
    except Exception as error:  # NIXL's own kinds, which come from no common class
        return f"NIXL cannot serve the pool: {error}"


class NixlSender(OneSidedSender):
    """Its links share two threads."""

    def __init__(self, agent: Agent, source: tuple[str, str], progress_s: float = 10.0) -> None:
        def map_pool(endpoint: Endpoint) -> "_Pool":
            return _Pool(agent, PoolHandle.decode(endpoint.data))

        slab = agent.memory.slab
        threads = Threads("kv-nixl", (lambda: torch.cuda.set_device(slab.device)) if slab.is_cuda else None)
        size = MAX_GPU_WRITE_BYTES if slab.is_cuda else MAX_WRITE_BYTES
        super().__init__("nixl", agent.memory, source, progress_s, threads, map_pool, size)


class _Pool:
    """The receiver's pool, and a Writer into it. Made and used on the launching thread."""

    def __init__(self, agent: Agent, handle: PoolHandle) -> None:
        """Raises TransferBroken."""
        self.handle = handle
        self._agent = agent
        if handle.block_bytes != agent.memory.slab.shape[1]:
            raise TransferBroken(f"blocks of {handle.block_bytes} bytes there, {agent.memory.slab.shape[1]} here")
        self._guards = None
        self.control = ""
        if handle.host and handle.host == locality.host():  # elsewhere only the quarantine keeps late writes out
            self.control = handle.control
            try:
                self._guards = open_guards(handle.guards)
            except OSError as error:
                raise TransferBroken(f"the receiver's guard table cannot be mapped: {error}") from error
        try:
            self._name = agent.inner.loadRemoteMD(bytes.fromhex(handle.agent))
        except Exception as error:  # NIXL's own kinds, which come from no common class
            raise TransferBroken(f"the receiver's agent cannot be reached: {error}") from error

    def holds(self, placement: Placement) -> bool:
        return all(page < self.handle.num_blocks for page in placement.page_ids)

    def writer(self, placement: Placement) -> "_Pool":
        return self

    @property
    def is_instant(self) -> bool:
        return False

    def write(self, rect: Rect, placement: Placement) -> "_Write":
        stop = rect.block_start + len(rect.block_ids)
        if stop > len(placement.page_ids):
            raise TransferBroken(f"block {stop - 1} is pushed: {len(placement.page_ids)} were granted")
        if rect.after is not None:
            rect.after.synchronize()
        if self._guards is not None and self._guards[placement.guard] != placement.generation:
            raise TransferRefused("the receiver has revoked the ticket")
        agent = self._agent
        ours, theirs = self._descriptors(rect, placement.page_ids[rect.block_start : stop])
        try:
            request = agent.inner.createXferReq(agent.nixl.NIXL_WRITE, ours, theirs, self._name, b"", [])
        except Exception as error:
            raise TransferBroken(f"NIXL cannot write: {error}") from error
        try:
            agent.inner.postXferReq(request, b"")
        except Exception as error:
            agent.inner.releaseXferReq(request)
            raise TransferBroken(f"NIXL cannot write: {error}") from error
        return _Write(agent, request, rect)

    def close(self) -> None:
        self._agent.inner.invalidateRemoteMD(self._name)

    def _descriptors(self, rect: Rect, page_ids: Sequence[int]) -> tuple[object, object]:
        """Our list and theirs, of (address, bytes, device)."""
        agent, memory = self._agent, self._agent.memory
        first, last = memory.layer_offsets[rect.layer_start], memory.layer_offsets[rect.layer_stop]
        size = self.handle.block_bytes
        pairs = merged(rect.block_ids, page_ids) if (first, last) == (0, size) else None
        if pairs is None:
            pairs = [(ours, theirs, 1) for ours, theirs in zip(rect.block_ids, page_ids, strict=True)]
        table = np.array(pairs, np.uint64).reshape(-1, 3)
        lists = []
        for column, base, device in ((0, agent.address, agent.device), (1, self.handle.address, self.handle.device)):
            rows = np.empty_like(table)
            rows[:, 0] = table[:, column] * np.uint64(size) + np.uint64(base + first)
            rows[:, 1] = (table[:, 2] - np.uint64(1)) * np.uint64(size) + np.uint64(last - first)
            rows[:, 2] = device
            lists.append(agent.nixl.nixlXferDList(agent.kind, rows))
        return lists[0], lists[1]


def merged(block_ids: Sequence[int], page_ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first block, first page, number) of the stretches that are consecutive on both sides."""
    stretches: list[tuple[int, int, int]] = []
    for block, page in zip(block_ids, page_ids, strict=True):
        if stretches:
            first_block, first_page, count = stretches[-1]
            if (block, page) == (first_block + count, first_page + count):
                stretches[-1] = (first_block, first_page, count + 1)
                continue
        stretches.append((block, page, 1))
    return stretches


@dataclass(frozen=True, slots=True)
class _Write:
    agent: Agent
    request: object
    rect: Rect

    def wait(self) -> int:
        rect, memory = self.rect, self.agent.memory
        try:  # of pages that stay as they are, so while they are on their way
            (digest,) = memory.digests([Pages(rect.block_ids, rect.block_start, rect.layer_start, rect.layer_stop)])
        finally:
            self._land()
        return digest

    def _land(self) -> None:
        nixl, inner, pause_s = self.agent.nixl, self.agent.inner, _POLL_S
        try:
            # However long it takes: the pages are in use until NIXL says otherwise. A dead peer is UCX's to notice.
            while (status := inner.getXferStatus(self.request)) == nixl.NIXL_IN_PROG:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_POLL_S)
        except Exception as error:
            raise TransferBroken(f"NIXL cannot write: {error}") from error
        finally:
            inner.releaseXferReq(self.request)
        if status != nixl.NIXL_SUCCESS:
            raise TransferBroken(f"NIXL ended the write with status {status}")
