"""A worker's transports: what it can receive by, what it can send by, and the link to each peer."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc.aio

from kv_transfer import local, locality
from kv_transfer.base import (
    Endpoint,
    Link,
    ObjectStore,
    Sender,
    TransferError,
    TransferRefused,
)
from kv_transfer.choose import AUTO, ONE_SIDED, candidates, wanted
from kv_transfer.control_server import ControlServer, OnCommit, no_commits
from kv_transfer.grpc_stream import push_handler
from kv_transfer.heap import keep_freed_pages
from kv_transfer.memory import BlockMemory
from kv_transfer.receiver import Receiver
from kv_transfer.rounding import RoundedMemory
from kv_transfer.two_sided import TwoSidedSender

# What a sender makes its chunks of: a message's buffers and their copies stay in the processor's cache; an object's
# fixed cost of most of a millisecond is spread over more bytes.
CHUNK_BYTES = {"local": 1 << 20, "grpc": 1 << 20, "ray_store": 8 << 20}
TRANSPORTS = tuple(CHUNK_BYTES)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """The link to a peer, and what was passed over for it."""

    link: Link
    why: str


class Transports:
    """Every transport that `setting` (one's name, or auto) allows in this worker. Made and used on one event loop.

    `endpoints` is what peers are told at the handshake, `speaks` what this worker can send over.
    """

    def __init__(
        self,
        setting: str,
        receiver: Receiver,
        source: tuple[str, str],
        object_store: ObjectStore | None = None,
        progress_s: float = 10.0,
    ) -> None:
        """Raises ValueError for a setting that cannot be had here."""
        self._setting = setting
        self._receiver = receiver
        self._source = source
        self._object_store = object_store
        self._progress_s = progress_s
        self._senders: dict[tuple[str, bool], Sender] = {}  # by transport, and whether they round
        self._undo: list[Callable[[], None]] = []
        self._control: ControlServer | None = None
        self.missing = {name: why for name in wanted(setting) if (why := _missing(name, receiver.memory, object_store))}
        if setting == AUTO and not receiver.memory.slab.is_cuda:
            self.missing.setdefault("nixl", "asked for by name where pools are in CPU memory: an idle agent costs CPU")
        self._agent: object = None  # of NIXL: who was told of it can write for as long as it is held
        if "nixl" in wanted(setting) and "nixl" not in self.missing:
            from kv_transfer import nixl

            self._agent = agent = nixl.try_agent(receiver.memory)
            if isinstance(agent, str):
                self.missing["nixl"] = agent
        self.speaks = tuple(name for name in wanted(setting) if name not in self.missing)
        if not self.speaks:
            raise ValueError(f"transport {setting!r}: {'; '.join(self.missing.values())}")
        self.endpoints: list[Endpoint] = []

    def serve(self, server: grpc.aio.Server, address: str, on_commit: OnCommit = no_commits) -> None:
        """Makes the receiver reachable. Before the server starts. A transport that cannot be offered, a kernel of which
        does not compile, say, is left out with the reason; ValueError when there is no other."""
        control = ""
        if set(self.speaks) & ONE_SIDED:
            try:
                self._control = ControlServer(self._receiver, on_commit)
                control = self._control.name
            except OSError as error:
                _log.warning("no control socket, one-sided transfers are announced over gRPC: %s", error)
        for name in self.speaks:
            try:
                self.endpoints.append(Endpoint(name, _locality(name), _export(name, self._receiver, control)))
            except Exception as error:
                _log.exception("transport %s is left out", name)
                self.missing[name] = f"it cannot be offered: {_first_line(error)}"
        self.speaks = tuple(name for name in self.speaks if name not in self.missing)
        if not self.speaks:
            if self._control is not None:
                self._control.close()
            raise ValueError(f"transport {self._setting!r}: {'; '.join(self.missing.values())}")
        if "local" in self.speaks:
            self._undo.append(serve("local", self._receiver, None, None, address))
        if set(self.speaks) - {"local"}:
            keep_freed_pages()
            server.add_generic_rpc_handlers((push_handler(self._receiver, self._object_store),))

    async def connect(
        self,
        address: str,
        endpoints: Sequence[Endpoint],
        block_size: int,
        is_rounded: bool = False,
        unfit: Mapping[str, str] | None = None,
    ) -> Connection:
        """The best link to the receiver at `address`, whose blocks hold `block_size` tokens. `is_rounded`: it keeps
        float8, and we do not. `unfit`: transports that are only for want of others, and why. Raises TransferRefused
        when there is none."""
        has_equal_blocks = block_size == self._receiver.memory.block_size and not is_rounded
        mine = {name: _locality(name) for name in self.speaks}
        chosen, left_out = candidates(self._setting, mine, self.missing, endpoints, has_equal_blocks)
        unfit = unfit or {}
        chosen.sort(key=lambda one: one.transport in unfit)
        for endpoint in chosen:
            try:
                link = await self._sender(endpoint.transport, is_rounded).connect(address, endpoint)
            except TransferError as error:
                left_out.append(f"{endpoint.transport}: {error}")
            except Exception as error:
                _log.exception("transport %s to %s is passed over", endpoint.transport, address)
                left_out.append(f"{endpoint.transport}: {_first_line(error)}")
            else:
                behind = chosen[chosen.index(endpoint) + 1 :]
                left_out += [f"{one.transport}: {unfit[one.transport]}" for one in behind if one.transport in unfit]
                return Connection(link, "; ".join([*left_out, link.note] if link.note else left_out))
        raise TransferRefused(f"no transport leads to {address}: {'; '.join(left_out)}")

    async def close(self) -> None:
        await asyncio.gather(*(sender.close() for sender in self._senders.values()))
        for undo in self._undo:
            undo()
        if self._control is not None:
            await asyncio.to_thread(self._control.close)

    def _sender(self, transport: str, is_rounded: bool) -> Sender:
        key = transport, is_rounded
        if key not in self._senders:
            memory = RoundedMemory.of(self._receiver.memory) if is_rounded else self._receiver.memory
            self._senders[key] = create_sender(
                transport, memory, self._source, self._object_store, progress_s=self._progress_s
            )
        return self._senders[key]


def create_sender(
    transport: str,
    memory: BlockMemory,
    source: tuple[str, str],
    object_store: ObjectStore | None = None,
    max_chunk_bytes: int | None = None,
    progress_s: float = 10.0,
) -> Sender:
    """A sender of `memory`'s pages in the name of `source`, (worker id, incarnation). Make it on the loop that uses it.

    `progress_s` bounds how long a peer may take nothing. Raises ValueError naming field, value and allowed range.
    """
    if transport == "cuda_ipc":
        from kv_transfer.cuda_ipc import CudaIpcSender

        return CudaIpcSender(memory, source, progress_s)
    if transport == "nixl":
        from kv_transfer import nixl

        return nixl.NixlSender(nixl.agent_of(memory), source, progress_s)
    _check(transport, object_store)
    limit = CHUNK_BYTES[transport] if max_chunk_bytes is None else max_chunk_bytes
    if transport != "local":
        keep_freed_pages()
    return TwoSidedSender(transport, memory, source, object_store, limit, progress_s)


def serve(
    transport: str,
    receiver: Receiver,
    server: grpc.aio.Server | None,
    object_store: ObjectStore | None = None,
    address: str = "",
) -> Callable[[], None]:
    """Makes `receiver` reachable: over `server`, or for `local` under `address` in this process. Call the result to
    end a local registration; a server's ends with the server."""
    _check(transport, object_store)
    if transport == "local":
        return local.register(address, receiver)
    assert server is not None
    keep_freed_pages()
    server.add_generic_rpc_handlers((push_handler(receiver, object_store),))
    return lambda: None


def _missing(transport: str, memory: BlockMemory, object_store: ObjectStore | None) -> str:
    """Why this worker does not have the transport; empty if it does."""
    if transport == "ray_store" and object_store is None:
        return "no object store was given"
    if transport == "cuda_ipc":
        if not memory.slab.is_cuda:
            return "the pool is not in GPU memory"
        from kv_transfer import cuda_ipc  # Triton is not everywhere

        return cuda_ipc.missing(memory)
    if transport == "nixl":
        from kv_transfer import nixl  # an extra

        return nixl.missing()
    return "" if transport in CHUNK_BYTES else "not in this version"


def _first_line(error: Exception) -> str:
    """A compiler's error has many."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _locality(transport: str) -> str:
    """Our value of what must be equal on both sides."""
    return {"local": locality.process, "cuda_ipc": locality.host}.get(transport, str)()


def _export(transport: str, receiver: Receiver, control: str) -> bytes:
    """What a sender needs beside the address. `control`: name of the control socket, if there is one."""
    if transport == "cuda_ipc":
        from kv_transfer import cuda_ipc

        return cuda_ipc.export(receiver.memory, receiver.guards_name, control)
    if transport == "nixl":
        from kv_transfer import nixl

        return nixl.export(receiver.memory, receiver.guards_name, control)
    return b""


def _check(transport: str, object_store: ObjectStore | None) -> None:
    if transport not in TRANSPORTS:
        raise ValueError(f"transport {transport!r}: must be one of {', '.join(TRANSPORTS)}")
    if (transport == "ray_store") != (object_store is not None):
        raise ValueError(
            f"object_store {object_store!r} with transport {transport!r}: ray_store needs one, others none"
        )
