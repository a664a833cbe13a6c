"""KV hand-off between two processes on this machine's CPU, GB/s until the manifest is verified.

    python -m benchmarks.transfer [--rounds 7] [--layout smollm2|llama-8b] [--without-ray]

Each round moves the same scattered blocks, a whole prompt's, by every path in turn; medians over the rounds:

    copy        one process copies the blocks from one pool into another: what memory allows for one pass
    tcp         sendall of each block, recv_into of each block, no checksum: what a socket allows
    local       the reference transport, sender and receiver in one process
    grpc        raw frames on one stream; floor: tcp. Per byte it copies four times where tcp copies twice, and takes
                two checksums
    ray_store   through Ray's shared memory; floor: two copies
    nixl        written by NIXL over UCX shared memory, where the package is installed; floor: copy

Two cores: a sender and a receiver have one each, so background load shows directly. Prints the figure, its floor and
the ratio, and one JSON line last.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple
from functools import partial
from importlib.metadata import version

import grpc.aio
import numpy as np
import torch

import kv_transfer
from kv_transfer import nixl
from kv_transfer.base import BlockMemory, Endpoint, Link, Manifest, ObjectStore, Placement, Sender
from kv_transfer.control_server import ControlServer
from kv_transfer.guards import Guards
from kv_transfer.receiver import Receiver
from protos.grpc_options import SERVER_OPTIONS

SOURCE = ("sender", "0")
SEED = 0
# name: layers, bytes of one layer of one 16-token block (K and V), blocks in the pool, blocks moved
LAYOUTS = {
    "smollm2": (30, 2 * 3 * 64 * 4 * 16, 320, 256),  # SmolLM2-135M, float32: 720 KiB a block, 4096 tokens
    "llama-8b": (32, 2 * 8 * 128 * 2 * 16, 160, 128),  # Llama-3.1-8B, bfloat16: 2 MiB a block, 2048 tokens
}

# path: (what it is measured beside, share of it, target). Through shared memory every byte is copied in and out again,
# so half of what one copy reaches is the ceiling on one core.
BESIDE: dict[str, list[tuple[str, float, float | None]]] = {
    "local": [("copy", 1, None)],
    "grpc": [("tcp", 1, 0.45), ("tcp", 1, 0.6)],
    "ray_store": [("copy", 0.5, 0.5), ("grpc", 1, 2.5)],
    "nixl": [("copy", 1, None), ("grpc", 1, None)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--receiver", nargs=2, metavar=("LAYOUT", "RAY_ADDRESS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.receiver:
        asyncio.run(receive(*args.receiver))
        return
    ray_address = "" if args.without_ray else start_ray()
    results = {layout: asyncio.run(measure(layout, args.rounds, ray_address)) for layout in args.layout or LAYOUTS}
    for layout, figures in results.items():
        report(layout, figures)
    if ray_address:
        import ray

        ray.shutdown()
    packages = {name: version(name) for name in ("torch", "grpcio", "ray", "numpy", "awscrt")}
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    config = {"rounds": args.rounds, "seed": SEED, "chunk_bytes": kv_transfer.create.CHUNK_BYTES}
    print(json.dumps({"benchmark": "transfer", "gb_per_s": results, "config": config, **machine, "packages": packages}))


def report(layout: str, figures: dict[str, float]) -> None:
    layers, layer_bytes, _, count = LAYOUTS[layout]
    print(
        f"\n{layout}: {count} blocks of {layers} x {layer_bytes >> 10} KiB, {layers * layer_bytes * count / 1e6:.0f} MB"
    )
    print(f"{'path':<12}{'GB/s':>8}  {'beside':<12}{'ratio':>8}  target")
    for path, figure in figures.items():
        print(f"{path:<12}{figure:>8.2f}", end="")
        for i, (beside, share, target) in enumerate(BESIDE.get(path, ())):
            if beside in figures:
                name = f"{beside} / 2" if share == 0.5 else beside
                ratio = figure / (figures[beside] * share)
                text = "" if target is None else f"{target:g} {'met' if ratio >= target else 'missed'}"
                print(f"{' ' * 20 if i else ''}  {name:<12}{ratio:>8.2f}  {text}")
        if not any(beside in figures for beside, _, _ in BESIDE.get(path, ())):
            print()


async def measure(layout: str, rounds: int, ray_address: str) -> dict[str, float]:
    """Medians in GB/s by path."""
    source, target = make_memory(layout, seed=SEED), make_memory(layout)
    count = LAYOUTS[layout][3]
    rng = random.Random(SEED)
    source_ids = rng.sample(range(source.num_blocks), count)
    target_ids = rng.sample(range(source.num_blocks), count)
    num_bytes = count * source.layer_offsets[-1]
    store = ray_store() if ray_address else None
    peer = await Peer.start(layout, ray_address)
    local = Receiver(target, kv_transfer.MAX_CHUNK_BYTES)
    stop = kv_transfer.serve("local", local, None, None, "here")
    senders: dict[str, Sender] = {
        "local": kv_transfer.create_sender("local", source, SOURCE),
        "grpc": kv_transfer.create_sender("grpc", source, SOURCE),
    }
    if store is not None:
        senders["ray_store"] = kv_transfer.create_sender("ray_store", source, SOURCE, store)

    if "nixl" in peer.ways:
        senders["nixl"] = kv_transfer.create_sender("nixl", source, SOURCE)
    ways = {"local": ("here", ""), **peer.ways}
    links: dict[str, Link] = {}
    for name, sender in senders.items():
        address, data = ways[name]
        links[name] = await sender.connect(address, Endpoint(name, data=bytes.fromhex(data)))

    async def by_copy() -> float:
        started_s = time.perf_counter()
        from_pages, to_pages = source.slab.numpy(), target.slab.numpy()
        for source_id, target_id in zip(source_ids, target_ids, strict=True):
            to_pages[target_id] = from_pages[source_id]
        return time.perf_counter() - started_s

    async def by_tcp() -> float:
        await peer.ask("tcp", target_ids)
        with socket.create_connection(("127.0.0.1", peer.tcp_port)) as connection:
            return await asyncio.to_thread(send_blocks, connection, source, source_ids)

    async def by_transport(name: str) -> float:
        placement = None
        if name == "local":
            transfer_id = local.grant("owner", SOURCE, target_ids, 0, 60)
        else:
            ticket, place = await peer.ask("grant", name, target_ids)
            transfer_id, placement = bytes.fromhex(ticket), Placement(*place) if place else None
        started_s = time.perf_counter()
        outgoing = links[name].open(transfer_id, placement=placement)
        outgoing.push(source_ids, 0, 0, source.num_layers)
        manifest = await outgoing.finish()
        if name == "local":
            await local.commit(transfer_id, manifest)
        else:
            await peer.ask(
                "commit", name, transfer_id.hex(), manifest.num_chunks, manifest.num_bytes, manifest.digest.hex()
            )
        return time.perf_counter() - started_s

    paths: dict[str, Callable[[], Awaitable[float]]] = {"copy": by_copy, "tcp": by_tcp}
    paths |= {name: partial(by_transport, name) for name in senders}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for index in range(rounds + 1):
        for name, path in paths.items():
            elapsed_s = await path()
            if index:  # the first round faults memory in and opens connections
                seconds[name].append(elapsed_s)
    for sender in senders.values():
        await sender.close()
    stop()
    await peer.close()
    return {name: round(num_bytes / statistics.median(values) / 1e9, 3) for name, values in seconds.items()}


class Peer:
    """The receiving process, asked in lines of JSON over its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.ways: dict[str, tuple[str, str]] = {}  # by transport: address, endpoint data in hex
        self.tcp_port = 0

    @classmethod
    async def start(cls, layout: str, ray_address: str) -> "Peer":
        command = [sys.executable, "-m", "benchmarks.transfer", "--receiver", layout, ray_address]
        pipe = asyncio.subprocess.PIPE
        peer = cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
        peer.ways, peer.tcp_port = await peer._answer()
        return peer

    async def ask(self, *question):
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return await self._answer()

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def _answer(self):
        assert self._process.stdout is not None
        return json.loads(await self._process.stdout.readline())


async def receive(layout: str, ray_address: str) -> None:
    """The receiving process: one server per transport, and a plain socket."""
    memory = make_memory(layout)
    stores: dict[str, ObjectStore | None] = {"grpc": None}
    if ray_address:
        import ray

        ray.init(address=ray_address, log_to_driver=False, logging_level="error")
        stores["ray_store"] = ray_store()
    agent = None
    if not nixl.missing():
        stores["nixl"], agent = None, nixl.agent_of(memory)  # held as long as senders may write
    receivers, ways, servers = {}, {}, []
    for name, store in stores.items():
        receivers[name] = Receiver(memory, kv_transfer.MAX_CHUNK_BYTES, guards=Guards())
        server = grpc.aio.server(options=SERVER_OPTIONS)
        data = b""
        if name == "nixl":
            data = nixl.export(memory, receivers[name].guards_name, ControlServer(receivers[name]).name)
        ways[name] = (f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", data.hex())
        # A one-sided transport's stream, where the control socket is out of reach, is that of grpc.
        kv_transfer.serve("grpc" if name == "nixl" else name, receivers[name], server, store)
        await server.start()
        servers.append(server)
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps([ways, listener.getsockname()[1]]), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        what, *args = json.loads(line)
        answer: object = None
        if what == "tcp":
            threading.Thread(target=receive_blocks, args=(listener, memory, args[0])).start()
        elif what == "grant":
            receiver, writer = receivers[args[0]], "" if args[0] == "nixl" else None
            ticket = receiver.grant("owner", SOURCE, args[1], 0, 60, writer)
            placement = receiver.placement(ticket)
            answer = [ticket.hex(), astuple(placement) if placement else None]
        else:
            name, transfer_id, num_chunks, num_bytes, digest = args
            manifest = Manifest(num_chunks, num_bytes, bytes.fromhex(digest))
            await receivers[name].commit(bytes.fromhex(transfer_id), manifest)
        print(json.dumps(answer), flush=True)
    for server in servers:
        await server.stop(None)
    del agent


def send_blocks(connection: socket.socket, memory: BlockMemory, block_ids: Sequence[int]) -> float:
    pages = memory.slab.numpy()
    started_s = time.perf_counter()
    for block_id in block_ids:
        connection.sendall(pages[block_id].data)
    assert connection.recv(1) == b"!"
    return time.perf_counter() - started_s


def receive_blocks(listener: socket.socket, memory: BlockMemory, block_ids: Sequence[int]) -> None:
    pages = memory.slab.numpy()
    connection, _ = listener.accept()
    with connection:
        for block_id in block_ids:
            block = pages[block_id].data
            filled = 0
            while filled < len(block):
                filled += connection.recv_into(block[filled:])
        connection.sendall(b"!")


def make_memory(layout: str, seed: int | None = None) -> BlockMemory:
    num_layers, layer_bytes, num_blocks, _ = LAYOUTS[layout]
    pages = np.zeros((num_blocks, num_layers * layer_bytes), np.uint8)
    if seed is not None:
        pages[:] = np.random.default_rng(seed).integers(0, 256, pages.shape, np.uint8)
    else:
        pages.fill(1)  # touched, so that no path pays for the first page faults
    return BlockMemory(torch.from_numpy(pages), tuple(layer_bytes * index for index in range(num_layers + 1)))


def ray_store() -> ObjectStore:
    from cluster.object_store import RayObjectStore

    return RayObjectStore()


def start_ray() -> str:
    import ray

    os.environ.setdefault("RAY_free_objects_period_milliseconds", "10")  # cluster/object_store.py says why
    store = {"include_dashboard": False, "object_store_memory": 512 << 20}
    return ray.init(address="local", num_cpus=1, log_to_driver=False, logging_level="error", **store).address_info[
        "address"
    ]


if __name__ == "__main__":
    main()
