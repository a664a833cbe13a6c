"""KV hand-off between two GPUs of one host, GB/s until the receiver has verified the manifest.

    python -m benchmarks.transfer_cuda [--rounds 9] [--block-sizes 16 64 128] [--programs 32 64 132]

The pages are those of Llama-3.1-8B (32 layers of 8 kv heads x 128, bf16), 8192 tokens scattered in both pools, pushed
at once. The receiver is another process. In one run, the physical bound first:

    copy       one contiguous peer copy of 1 GiB by the copy engine
    kernel     the push kernel alone, by GPU events, without and with taking the digest
    transfer   cuda_ipc from the push until the receiver has verified the manifest; from `open` on, which in service
               comes before the prompt is computed; from there until the sender has heard so; with the commit's answer;
               pushed as four stretches of 8 layers; back to back, two in flight; of 128 pages. `unchecked`: as if
               nobody took digests
    nixl       the same by our transport `nixl` over UCX, where the package is installed
    nccl       256 MiB of contiguous bytes, and the same pages gathered, sent and scattered (benchmarks/nccl_cuda.py)
    cost       a matrix product of 8192^3 alone, and while pages are pushed at full speed; the same for a stretch of
               memory-bound work, as decode is

Ceiling: 18 links of NVLink 4 move 450 GB/s each way, of which a copy reaches about 390. Prints a table and one JSON
line last.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cuda_peer import SOURCE, SWITCH_S, Peer, make_memory
from benchmarks.transfer_whole import STRETCHES, num_pages, pool_size, steady, transfers
from benchmarks.unchecked import no_digest_taken
from kv_transfer.base import BlockMemory, Link
from kv_transfer.create import create_sender
from kv_transfer.cuda_ipc import CudaIpcSender
from kv_transfer.nixl import try_agent
from kv_transfer.push_kernel import Side, launch
from kv_transfer.relayout import TileRange
from kv_transfer.staging import indices

LAYERS, HEADS, DIM = 32, 8, 128
TARGETS = {16: 0.75, 64: 0.88}  # of the peer copy, for a whole transfer, by tokens a page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--programs", type=int, nargs="+", default=[32, 64, 132])
    args = parser.parse_args()
    assert torch.cuda.device_count() >= 2, "two GPUs are needed"
    sys.setswitchinterval(SWITCH_S)
    torch.cuda.set_device(0)
    found: dict[str, Any] = {"copy": peer_copy()}
    print(f"{'contiguous peer copy':<56}{found['copy']:8.1f} GB/s", flush=True)
    for block_size in args.block_sizes:
        found[str(block_size)] = asyncio.run(measure(block_size, args.programs, args.rounds, found["copy"]))
    found["nccl"] = asyncio.run(nccl(args.block_sizes))
    for name, figure in found["nccl"].items():
        said = "256 MiB contiguous" if name == "contiguous" else f"{name} tokens a page, gathered and scattered"
        print(f"{f'NCCL, {said}':<64}{figure:8.1f} GB/s {figure / found['copy']:5.2f}", flush=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "transfer_cuda", "gb_per_s": found, "rounds": args.rounds, **machine}))


async def measure(block_size: int, programs: list[int], rounds: int, copy: float) -> dict[str, Any]:
    shape = (block_size, pool_size(block_size), LAYERS, HEADS, DIM)
    source, count = make_memory("cuda:0", *shape, seed=1), num_pages(block_size)
    peer = await Peer.start("cuda:1", *shape)
    found: dict[str, Any] = {}
    endpoint = next(e for e in peer.endpoints if e.transport == "cuda_ipc")
    for num_programs in programs:
        sender = CudaIpcSender(source, SOURCE, num_programs=num_programs)
        link = await sender.connect(peer.address, endpoint)
        kernels = (kernel(source, link, num_programs, with_digest) for with_digest in (False, True))
        figures = dict(zip(("kernel", "kernel_digest"), kernels, strict=True))
        whole = await transfers(source, peer, link, rounds, count)
        names = ("transfer", "transfer_opened", "transfer_heard", "transfer_committed")
        figures |= dict(zip(names, whole, strict=True))
        figures["transfer_stretches"] = (await transfers(source, peer, link, rounds, count, STRETCHES))[0]
        figures["transfer_steady"] = await steady(source, peer, link, rounds, count)
        if count != 128:
            figures["transfer_128_pages"] = (await transfers(source, peer, link, rounds, 128))[0]
        await peer.ask("digests", is_on=False)
        with no_digest_taken():
            figures["transfer_unchecked"] = (await transfers(source, peer, link, rounds, count))[0]
        await peer.ask("digests", is_on=True)
        if block_size == 64:
            figures |= cost(source, link, num_programs)
        for name, figure in figures.items():
            is_rate = not name.startswith("cost")
            said = f"{figure:8.1f} GB/s {figure / copy:5.2f}" if is_rate else f"{figure:8.3f} of alone"
            said += f", target {TARGETS[block_size]}" if name == "transfer" and block_size in TARGETS else ""
            print(f"{block_size:>4} tokens a page, {num_programs:>3} programs: {name:<24}{said}", flush=True)
        found[str(num_programs)] = figures
        await sender.close()
    over_nixl = await nixl(source, peer, rounds)
    if over_nixl is not None:
        found["nixl"] = over_nixl
        print(f"{block_size:>4} tokens a page, NIXL{over_nixl:48.1f} GB/s {over_nixl / copy:5.2f}", flush=True)
    await peer.stop()
    return found


def peer_copy() -> float:
    num_bytes = 1 << 30
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=f"cuda:{i}") for i in (0, 1))
    torch.cuda.set_device(0)
    return num_bytes / 1e6 / milliseconds(lambda: target.copy_(source, non_blocking=True))


def milliseconds(work: Callable[[], Any], rounds: int = 5) -> float:
    """Median by GPU events, after one to warm up."""
    took = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end))
    return statistics.median(took[1:])


def pusher(source: BlockMemory, link: Link, num_programs: int, with_digest: bool) -> Callable[[], None]:
    """Launches one push of all layers of the pages into the receiver's pool, which no ticket uses then."""
    pool, device = link._pool, source.slab.device  # type: ignore[attr-defined]
    size, width, count = source.block_size, source.slab.shape[1], num_pages(source.block_size)
    pages = (random.Random(i).sample(range(source.num_blocks), count) for i in (0, 1))
    mine, theirs = (indices(ids, device, torch.int32) for ids in pages)
    sums = torch.empty(num_programs, dtype=torch.int64, pin_memory=True)
    sides = (
        Side(source.slab.data_ptr(), width, size, mine.data_ptr(), 0),
        Side(pool.address, width, size, theirs.data_ptr(), 0),
    )
    tiles = TileRange(0, LAYERS * 2 * HEADS, DIM * 2, 0)

    def push(_keep: tuple = (mine, theirs, sums)) -> None:
        launch(*sides, (0, count * size), tiles, sums.data_ptr(), num_programs, with_digest=with_digest)

    return push


def kernel(source: BlockMemory, link: Link, num_programs: int, with_digest: bool) -> float:
    num_bytes = num_pages(source.block_size) * source.slab.shape[1]
    return num_bytes / 1e6 / milliseconds(pusher(source, link, num_programs, with_digest))


def cost(source: BlockMemory, link: Link, num_programs: int) -> dict[str, float]:
    """Time of work on the sender's GPU while it pushes, against its time alone."""
    a = torch.randn(8192, 8192, device="cuda:0", dtype=torch.bfloat16)
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    works = {"cost_matmul": lambda: torch.mm(a, a), "cost_memory": lambda: big.bitwise_not_()}
    push, stream = pusher(source, link, num_programs, True), torch.cuda.Stream(priority=-1)

    def ratio(work: Callable[[], Any]) -> float:
        alone = milliseconds(lambda: [work() for _ in range(20)])

        def beside() -> None:
            # Enough pushes to outlast the work; milliseconds() waits for them before it starts again.
            with torch.cuda.stream(stream):
                for _ in range(int(alone * 1.3 / 3) + 2):
                    push()
            for _ in range(20):
                work()

        return milliseconds(beside) / alone

    return {name: ratio(work) for name, work in works.items()}


async def nixl(source: BlockMemory, peer: Peer, rounds: int) -> float | None:
    """None where NIXL, here or there, is not installed or does not take the pool."""
    endpoint = next((e for e in peer.endpoints if e.transport == "nixl"), None)
    agent = try_agent(source) if endpoint is not None else "the receiver does not have it"
    if endpoint is None or isinstance(agent, str):
        print(f"NIXL: {agent}", flush=True)
        return None
    sender = create_sender("nixl", source, SOURCE)
    link = await sender.connect(peer.address, endpoint)
    verified, *_ = await transfers(source, peer, link, rounds, num_pages(source.block_size))
    await sender.close()
    return verified


async def nccl(block_sizes: list[int]) -> dict[str, float]:
    """By benchmarks/nccl_cuda.py."""
    command = (sys.executable, "-m", "benchmarks.nccl_cuda")
    pipe = asyncio.subprocess.PIPE
    ranks = [
        await asyncio.create_subprocess_exec(*command, str(rank), *map(str, block_sizes), stdout=pipe)
        for rank in (0, 1)
    ]
    output, _ = await asyncio.wait_for(ranks[0].communicate(), 120)
    await ranks[1].communicate()
    return json.loads(output.splitlines()[-1]) if output else {}


if __name__ == "__main__":
    main()
