"""Senders and receivers in processes of their own, to be killed.

    python -m tests.transfer_peer

imports what they need once, then forks a child for every line on stdin, so that a child is there in a moment. A child
prints one line of JSON when it is ready to be killed. Lines are JSON lists, after an environment:

    send      transport, Ray's address or "", the receiver's address, endpoint data and ticket in hex, the ticket's
              placement or null, number of chunks
    receive   transport, Ray's address or ""
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple

import torch

import kv_transfer
from kv_transfer.base import Endpoint, ObjectStore, Placement
from tests.transfer import LAYER_OFFSETS, NUM_LAYERS, SOURCE, Pair, devices, make_memory, transfer_pair


class Nursery:
    """The process that forks them, asked from a test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @contextlib.contextmanager
    def child(self, *line: object) -> Iterator[tuple[int, list]]:
        """Its pid, and what it said; it is killed at the end if it has not been."""
        assert self._process.stdin is not None and self._process.stdout is not None
        settings = {
            name: value for name, value in os.environ.items() if name.startswith("RAY_")
        }  # Ray's since it began
        self._process.stdin.write(json.dumps([settings, *line]) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        try:
            yield pid, json.loads(self._process.stdout.readline())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, "-m", "tests.transfer_peer"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Nursery(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


async def send(
    transport: str, ray_address: str, address: str, data: str, ticket: str, placement: list | None, num_chunks: int
) -> None:
    """Pushes that many chunks, a block each, then waits."""
    memory = make_memory(32, seed=1, device=devices(transport)[0])
    if transport == "cuda_ipc":
        torch.cuda.set_device(memory.slab.device)
    sender = kv_transfer.create_sender(transport, memory, SOURCE, store_at(ray_address))
    link = await sender.connect(address, Endpoint(transport, data=bytes.fromhex(data)))
    where = Placement(*placement) if placement else None
    outgoing = link.open(bytes.fromhex(ticket), LAYER_OFFSETS[-1], where)
    if num_chunks:
        outgoing.push(range(num_chunks), 0, 0, NUM_LAYERS)
    say(["pushed"])
    await outgoing.wait_closed()


async def receive(transport: str, ray_address: str) -> None:
    """Says its address, its endpoint's data, the ticket of 8 blocks and its placement."""
    async with transfer_pair(transport, store_at(ray_address)) as pair:
        ticket = pair.grant(range(8), lease_s=600)
        say([pair.address, pair.endpoint.data.hex(), ticket.hex(), where(pair, ticket)])
        await asyncio.Event().wait()


def where(pair: Pair, transfer_id: bytes) -> tuple | None:
    """The ticket's placement, as a child is told of it."""
    placement = pair.receiver.placement(transfer_id)
    return astuple(placement) if placement is not None else None


def store_at(ray_address: str) -> ObjectStore | None:
    if not ray_address:
        return None
    import ray

    from cluster.object_store import RayObjectStore

    ray.init(address=ray_address, log_to_driver=False, logging_level="error")
    return RayObjectStore()


def say(words: list) -> None:
    print(json.dumps(words), flush=True)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    for line in sys.stdin:
        settings, what, *rest = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Ray starts processes of its own
            os.environ.update(settings)
            asyncio.run({"send": send, "receive": receive}[what](*rest))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
