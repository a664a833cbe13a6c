"""A worker in a process of its own, as under Ray but without it: transports that need two processes are tested so.

    python -m tests.worker_process ROLE MODEL TRANSPORT ENGINE_JSON [OPTIONS_JSON]

Prints its member; then takes members, in hex, or "status", "check" or "ended ID INCARNATION", a line each, and answers
all but the first. Options: `host` that it takes itself to be on, `kv_return`, `is_held`: it commits no transfer that
does not fail, `dies_at_commit`: one that comes over a control socket ends its process.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from cluster.worker import Worker
from decode_worker.kv_service import KvTransferServicer
from engine.config import EngineConfig
from kv_transfer import locality
from kv_transfer.base import Manifest, Outgoing
from kv_transfer.peers import Peer
from protos.inference_pb2_grpc import InferenceServiceStub
from protos.worker_pb2 import Member, Members
from router.config import RouterConfig
from router.server import Router


class WorkerProcess:
    """The test's side. Members are told without an answer; everything else waits for it."""

    def __init__(self, process: asyncio.subprocess.Process, member: Member) -> None:
        self._process = process
        self.member = member

    @classmethod
    async def start(cls, role: str, model: str, transport: str, engine: dict, **options) -> "WorkerProcess":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.worker_process", role, model, transport, json.dumps(engine)),
            json.dumps(options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 120)
        return cls(process, Member.FromString(bytes.fromhex(line.decode())))

    def tell(self, members: list[Member]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(Members(members=members).SerializeToString().hex().encode() + b"\n")

    async def ask(self, what: str) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what.encode() + b"\n")
        return json.loads(await asyncio.wait_for(self._process.stdout.readline(), 30))

    async def status_where(self, holds: Callable[[dict], Any], within_s: float = 20.0) -> dict:
        """Its status, once that of which `holds` is true."""
        async with asyncio.timeout(within_s):
            while not holds(status := await self.ask("status")):
                await asyncio.sleep(0.005)  # a transfer's middle is short
            return status

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        """By itself; its exit code."""
        return await self._process.wait()

    async def stop(self) -> None:
        """However it ends: it may have been killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@asynccontextmanager
async def serving(model: Path, *workers: WorkerProcess) -> AsyncIterator[InferenceServiceStub]:
    """The stub of a router over these workers, which end with it."""
    members = [worker.member for worker in workers]
    router = Router(RouterConfig(served_model_name="test-model"), model)
    try:
        address = await router.start()
        router.set_members(members)
        for worker in workers:
            worker.tell(members)
        async with grpc.aio.insecure_channel(address) as channel:
            yield InferenceServiceStub(channel)
    finally:
        await router.stop()
        for worker in workers:
            await worker.stop()


async def main(role: str, model: str, transport: str, engine: str, options: str) -> None:
    settings = json.loads(options)
    if host := settings.pop("host", ""):
        locality.host = lambda: host
    if settings.pop("is_held", False):
        commit = Peer.commit

        async def held(peer: Peer, transfer_id: bytes, outgoing: Outgoing, *rest) -> Manifest:
            await outgoing.wait_closed()
            return await commit(peer, transfer_id, outgoing, *rest)

        Peer.commit = held  # type: ignore[method-assign]
    if settings.pop("dies_at_commit", False):
        KvTransferServicer.commit_from_socket = lambda *args: os._exit(1)  # type: ignore[assignment]
    config = EngineConfig(model=model, **json.loads(engine))
    worker = Worker(f"{role}-0", role, config, transport, **settings)  # type: ignore[arg-type]
    print((await worker.start()).SerializeToString().hex(), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "status":
            print(json.dumps(worker.status()), flush=True)
        elif line == "check":
            await worker.check()
            print("{}", flush=True)
        elif line.startswith("ended "):
            worker.writer_ended(*line.split()[1:])
            print("{}", flush=True)
        else:
            worker.set_members(list(Members.FromString(bytes.fromhex(line)).members))
    await worker.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
