"""A receiving pool on a GPU in a process of its own: what benchmarks/transfer_cuda.py and the GPU tests push into.

    python -m benchmarks.cuda_peer DEVICE BLOCK_SIZE NUM_BLOCKS NUM_LAYERS NUM_HEADS DIM [ITEM_BYTES]

One JSON object per line: commands come on stdin, answers go to stdout. Other processes that receive answer more
commands beside these (benchmarks/decode_peer.py).
"""

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import torch

import kv_transfer
from benchmarks.unchecked import read_back
from kv_transfer.base import BlockMemory, Endpoint, Manifest, Placement, TransferError
from kv_transfer.choose import ONE_SIDED
from kv_transfer.guards import Guards
from kv_transfer.receiver import Receiver
from kv_transfer.relayout import Tiles
from protos.grpc_options import SERVER_OPTIONS

SOURCE = ("sender", "0")
SWITCH_S = 2e-4  # as in workers: how long a thread may keep Python to itself


def make_memory(
    device: str,
    block_size: int,
    num_blocks: int,
    num_layers: int,
    num_heads: int,
    dim: int,
    item_bytes: int = 2,
    seed: int | None = None,
) -> BlockMemory:
    """Pages of bfloat16 or, where an element has one byte, of float8 with its scales; random bytes or zeros."""
    values = Tiles(num_heads, dim * item_bytes)
    tiles = ((values, values) if item_bytes == 2 else (values, values, Tiles(2 * num_heads, 1)),) * num_layers
    layer = block_size * sum(entry.num_tiles * entry.row_bytes for entry in tiles[0])
    slab = torch.zeros(num_blocks, num_layers * layer, dtype=torch.uint8, device=device)
    if seed is not None:
        torch.manual_seed(seed)
        slab.view(torch.int64).random_()
    dtype = torch.bfloat16 if item_bytes == 2 else torch.float8_e4m3fn
    return BlockMemory(slab, tuple(layer * i for i in range(num_layers + 1)), block_size, tiles, dtype)


class Peer:
    """The parent's side. Every method waits for the answer."""

    def __init__(self, process: asyncio.subprocess.Process, hello: dict[str, Any]) -> None:
        self.process = process
        self._asking = asyncio.Lock()
        self.address: str = hello["address"]
        self.endpoints = [Endpoint(e["transport"], e["locality"], bytes.fromhex(e["data"])) for e in hello["endpoints"]]

    @classmethod
    async def start(cls, *arguments: object, module: str = "benchmarks.cuda_peer") -> "Peer":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *map(str, arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        return cls(process, json.loads(await _line(process)))

    async def ask(self, what: str, **fields: Any) -> Any:
        assert self.process.stdin is not None
        async with self._asking:
            self.process.stdin.write(json.dumps({"what": what, **fields}).encode() + b"\n")
            answer = json.loads(await _line(self.process))
        if "error" in answer:
            raise getattr(kv_transfer, answer["kind"])(answer["error"])
        return answer["answer"]

    async def grant(
        self, block_ids, transport: str, lease_s: float = 60.0, sent: tuple[int, int] | None = None
    ) -> tuple[bytes, Placement | None]:
        answer = await self.ask("grant", block_ids=list(block_ids), transport=transport, lease_s=lease_s, sent=sent)
        placement = answer["placement"]
        return bytes.fromhex(answer["transfer_id"]), Placement(
            tuple(placement[0]), *placement[1:]
        ) if placement else None

    async def commit(self, transfer_id: bytes, manifest: Manifest) -> float:
        """When the receiver had verified the manifest, by time.perf_counter, which processes of a host share."""
        fields = {"num_chunks": manifest.num_chunks, "num_bytes": manifest.num_bytes, "digest": manifest.digest.hex()}
        return await self.ask("commit", transfer_id=transfer_id.hex(), **fields)

    async def stop(self) -> None:
        if self.process.returncode is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            await self.process.wait()


async def _line(process: asyncio.subprocess.Process) -> bytes:
    """The next answer. Libraries write to stdout, too."""
    assert process.stdout is not None
    while not (line := await asyncio.wait_for(process.stdout.readline(), 120)).startswith(b"{"):
        assert line, "the receiving process has died"
        print(line.decode().rstrip(), file=sys.stderr)
    return line


async def main(device: str, numbers: list[int]) -> None:
    sys.setswitchinterval(SWITCH_S)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    await serve(make_memory(device, *numbers))


class TimedReceiver(Receiver):
    """Knows when it has verified what."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.verified_s: dict[bytes, float] = {}  # by transfer, until it is committed

    def end(self, transfer_id: bytes, manifest: Manifest) -> None:
        super().end(transfer_id, manifest)
        self.verified_s[transfer_id] = time.perf_counter()


async def serve(
    memory: BlockMemory, also: Callable[[dict[str, Any]], Awaitable[Any]] | None = None, setting: str = "auto"
) -> None:
    """Until stdin ends. `also` answers the commands that are not known here."""
    receiver = TimedReceiver(memory, kv_transfer.MAX_CHUNK_BYTES, guards=Guards())
    transports = kv_transfer.Transports(setting, receiver, ("receiver", "0"))
    server = grpc.aio.server(options=SERVER_OPTIONS)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    transports.serve(server, address)
    await server.start()
    endpoints = [{"transport": e.transport, "locality": e.locality, "data": e.data.hex()} for e in transports.endpoints]
    print(json.dumps({"address": address, "endpoints": endpoints}), flush=True)
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        try:
            answer = {"answer": await _answer(receiver, json.loads(line), also)}
        except TransferError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        print(json.dumps(answer), flush=True)
    await server.stop(None)
    await transports.close()


async def _answer(
    receiver: TimedReceiver, asked: dict[str, Any], also: Callable[[dict[str, Any]], Awaitable[Any]] | None
) -> Any:
    transfer_id = bytes.fromhex(asked.get("transfer_id", ""))
    match asked["what"]:
        case "grant":
            writer = "sender" if asked["transport"] in ONE_SIDED else None
            sent = tuple(asked["sent"]) if asked["sent"] else None
            transfer_id = receiver.grant("owner", SOURCE, asked["block_ids"], 0, asked["lease_s"], writer, sent)
            placement = receiver.placement(transfer_id)
            where = [placement.page_ids, placement.guard, placement.generation] if placement else None
            return {"transfer_id": transfer_id.hex(), "placement": where}
        case "commit":
            await receiver.commit(
                transfer_id, Manifest(asked["num_chunks"], asked["num_bytes"], bytes.fromhex(asked["digest"]))
            )
            return receiver.verified_s.pop(transfer_id)
        case "release":
            return receiver.release(transfer_id)
        case "fence":
            return receiver.quarantine.fence(transfer_id)
        case "pages":
            pages = receiver.memory.slab[asked["block_ids"]]
            return [hashlib.sha256(page.cpu().numpy().tobytes()).hexdigest() for page in pages]
        case "flip":
            receiver.memory.slab[asked["block_id"], asked["at"]] ^= 1
            torch.cuda.synchronize()
            return None
        case "digests":
            return read_back(asked["is_on"])
        case "check":
            receiver.check()
            return len(receiver.quarantine)
    assert also is not None, asked
    return await also(asked)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [int(number) for number in sys.argv[2:]]))
