"""A worker in a process of its own, as under Ray but without it: transports that need two processes are tested so.

    python -m tests.worker_process ROLE MODEL TRANSPORT ENGINE_JSON

Prints its member; then takes members, in hex, or "status" or "check", a line each, and answers all but the first.
"""

import asyncio
import json
import sys

from cluster.worker import Worker
from engine.config import EngineConfig
from protos.worker_pb2 import Member, Members


class WorkerProcess:
    """The test's side. Members are told without an answer; everything else waits for it."""

    def __init__(self, process: asyncio.subprocess.Process, member: Member) -> None:
        self._process = process
        self.member = member

    @classmethod
    async def start(cls, role: str, model: str, transport: str, engine: dict) -> "WorkerProcess":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.worker_process", role, model, transport, json.dumps(engine)),
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

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def main(role: str, model: str, transport: str, engine: str) -> None:
    worker = Worker(f"{role}-0", role, EngineConfig(model=model, **json.loads(engine)), transport)  # type: ignore[arg-type]
    print((await worker.start()).SerializeToString().hex(), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "status":
            print(json.dumps(worker.status()), flush=True)
        elif line == "check":
            await worker.check()
            print("{}", flush=True)
        else:
            worker.set_members(list(Members.FromString(bytes.fromhex(line)).members))
    await worker.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
