"""Where the microseconds of a whole transfer go: every step at sender and receiver, on one clock.

    python -m benchmarks.transfer_trace [--block-size 64] [--programs 32 132] [--stretches 1 4] [--rounds 15]

The same transfers as benchmarks/transfer_cuda.py, with time stamps around the calls that make them; both processes
read the host's one monotonic clock. Prints every event of the median transfer in microseconds since `open`, and the
medians of the stretches between; of further numbers of programs and stretches the medians only. The stamps cost about
a microsecond each.
"""

import argparse
import asyncio
import functools
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cuda_peer import SOURCE, SWITCH_S, Peer, make_memory, serve
from benchmarks.transfer_whole import STRETCHES, WARM_UP, num_pages, pool_size, push
from kv_transfer import create
from kv_transfer.base import BlockMemory, Link
from kv_transfer.control_link import ControlLink, ControlStream
from kv_transfer.frames import Kind
from kv_transfer.receiver import Receiver

Stamp = tuple[float, str]
stamps: list[Stamp] = []  # of this process
LAYERS, HEADS, DIM = 32, 8, 128
WRITTEN = "landed; the GPU wrote for"


def stamp(name: str) -> None:
    stamps.append((time.perf_counter(), name))


def around(owner: Any, method: str, before: str = "", after: str = "") -> None:
    """Stamps calls of `owner`'s method."""
    call = getattr(owner, method)

    @functools.wraps(call)
    def stamped(*args: Any, **options: Any) -> Any:
        if before:
            stamp(before)
        try:
            return call(*args, **options)
        finally:
            if after:
                stamp(after)

    setattr(owner, method, stamped)


def trace_sender(transport: str) -> None:
    if transport == "cuda_ipc":
        from kv_transfer import cuda_copy, cuda_ipc, cuda_pages

        writer, write = cuda_ipc._Writer, cuda_ipc._Write
        time_writes()
        around(cuda_pages.PageTables, "fill", after="page ids on their way")
        around(cuda_copy, "copy_blocks", "copying", "copy called")
    else:
        from kv_transfer import nixl

        writer, write = nixl._Pool, nixl._Write  # type: ignore[assignment]
    around(writer, "write", "launching", "launched")
    around(write, "wait", after="landed, digest known")
    around(ControlStream, "settle", "answer read")
    send = ControlLink.send

    def sent(self: ControlLink, frame: bytes) -> None:
        send(self, frame)
        stamp(f"{Kind(frame[3]).name} sent")

    ControlLink.send = sent  # type: ignore[method-assign]


def time_writes() -> None:
    """How long the GPU had for each write, from where its stream came to it to its end. Before the first one."""
    from kv_transfer.cuda_slot import Looks, Slot

    torch.cuda.Event = functools.partial(torch.cuda.Event, enable_timing=True)  # type: ignore[assignment, misc]
    begins, digest = Looks.begins, Slot.digest
    writes: set[Slot] = set()  # other slots are of digests alone

    def begun(self: Looks, slot: Slot) -> None:
        writes.add(slot)
        begins(self, slot)

    def timed(self: Slot, first: int, stop: int) -> int:
        if self in writes:
            stamp(f"{WRITTEN} {self.began.elapsed_time(self.done) * 1e3:.0f} us")
        return digest(self, first, stop)

    Looks.begins = begun  # type: ignore[method-assign]
    Slot.digest = timed  # type: ignore[method-assign]


def trace_receiver(is_cuda: bool) -> None:
    around(Receiver, "placed", "  PLACED received", "  checked")
    around(Receiver, "end", "  END received", "  manifest verified")
    if is_cuda:
        from kv_transfer import cuda_pages

        around(cuda_pages, "launch", "  digest launching", "  digest launched")
        from kv_transfer.cuda_slot import Slot

        around(Slot, "digest", "  digest done")
    else:
        around(BlockMemory, "digests", "  digest begun", "  digest done")


async def peer_main(device: str, *numbers: str) -> None:
    is_cuda = device.startswith("cuda")
    sys.setswitchinterval(SWITCH_S)
    if is_cuda:
        torch.cuda.set_device(device)
    memory = make_memory(device, *map(int, numbers))
    trace_receiver(is_cuda)

    async def answer(asked: dict[str, Any]) -> Any:
        assert asked["what"] == "stamps", asked
        found, stamps[:] = list(stamps), []
        return found

    await serve(memory, answer, "auto" if is_cuda else "nixl")


async def traced(args: argparse.Namespace) -> None:
    is_cuda = args.device == "cuda"
    transport = "cuda_ipc" if is_cuda else "nixl"
    here, there = ("cuda:0", f"cuda:{torch.cuda.device_count() - 1}") if is_cuda else ("cpu", "cpu")
    shape = (args.block_size, pool_size(args.block_size), LAYERS, HEADS, DIM if is_cuda else 16)
    source = make_memory(here, *shape, seed=1)
    peer = await Peer.start("--peer", there, *shape, module="benchmarks.transfer_trace")
    endpoint = next(e for e in peer.endpoints if e.transport == transport)
    trace_sender(transport)
    sender = create.create_sender(transport, source, SOURCE)
    link = await sender.connect(peer.address, endpoint)
    for index, (stretches, programs) in enumerate(itertools.product(args.stretches, args.programs)):
        if is_cuda and programs:
            link._pool.num_programs = programs  # type: ignore[attr-defined]
        way = link.note or "control socket"
        print(f"{transport}, {way}: {programs or 'default'} programs, pushed as {stretches}", flush=True)
        report(await measure(args, source, peer, link, stretches), source, args.block_size, is_whole=not index)
    await sender.close()
    await peer.stop()


async def measure(
    args: argparse.Namespace, source: BlockMemory, peer: Peer, link: Link, stretches: int
) -> list[list[Stamp]]:
    found, count = [], num_pages(args.block_size)
    for index in range(args.rounds + WARM_UP):
        mine, theirs = (random.Random(index + seed).sample(range(source.num_blocks), count) for seed in (0, 1000))
        transfer_id, placement = await peer.grant(theirs, link.transport)
        await peer.ask("stamps")
        stamps.clear()
        stamp("open")
        outgoing = link.open(transfer_id, placement=placement)
        stamp("opened")
        push(outgoing, tuple(mine), source.num_layers, stretches)
        stamp("all pushed")
        manifest = await outgoing.finish()
        stamp("finished")
        kept = list(stamps)
        await peer.commit(transfer_id, manifest)
        kept += [(s, name) for s, name in await peer.ask("stamps")]
        found.append(sorted(kept))
    return found[WARM_UP:]


def report(found: list[list[Stamp]], source: BlockMemory, block_size: int, is_whole: bool) -> None:
    num_bytes = num_pages(block_size) * source.width(0, source.num_layers)

    def at(events: list[Stamp], name: str, which: Callable = max) -> float:
        return which(when for when, what in events if what == name)

    def took(events: list[Stamp]) -> float:
        return at(events, "finished") - events[0][0]

    middle = sorted(found, key=took)[len(found) // 2]
    for when, what in middle if is_whole else []:
        print(f"{(when - middle[0][0]) * 1e6:9.0f} us  {what}")
    names = [
        ("open -> first launch done", "open", "launched", min),
        ("first launch done -> last landed", "launched", "landed, digest known", min),
        ("last landed -> announced", "landed, digest known", "PLACED sent", max),
        ("announced -> received", "PLACED sent", "  PLACED received", max),
        ("received -> digest done", "  PLACED received", "  digest done", max),
        ("digest done -> manifest verified", "  digest done", "  manifest verified", max),
        ("verified -> answer read", "  manifest verified", "answer read", max),
        ("answer read -> finished", "answer read", "finished", max),
    ]
    stretches = {}
    for name, first, last, which in names:
        each = [at(events, last, max if first != "open" else min) - at(events, first, which) for events in found]
        stretches[name] = round(statistics.median(each) * 1e6, 1)
        print(f"{stretches[name]:9.1f} us  {name}")
    writes = [[int(what.split()[-2]) for _, what in events if what.startswith(WRITTEN)] for events in found]
    print(f"{statistics.median(map(sum, writes)):9.1f} us  of which the GPU wrote")
    total = statistics.median(map(took, found))
    print(f"{total * 1e6:9.1f} us  in all: {num_bytes / 1e9 / total:.1f} GB/s")
    print(json.dumps({"benchmark": "transfer_trace", "us": stretches, "gb_per_s": num_bytes / 1e9 / total}))


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        return asyncio.run(peer_main(*sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--programs", type=int, nargs="+", default=[0], help="of a push; 0: as in service")
    parser.add_argument("--stretches", type=int, nargs="+", default=[1, STRETCHES], help="pushes a transfer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: smaller pages, by nixl")
    sys.setswitchinterval(SWITCH_S)
    return asyncio.run(traced(parser.parse_args()))


if __name__ == "__main__":
    main()
