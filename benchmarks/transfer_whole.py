"""Whole transfers of scattered pages into a peer's pool, from their push until the manifest is verified there.

What benchmarks/transfer_cuda.py reports and benchmarks/transfer_trace.py takes apart. All layers are there already, as
a prefix is that the prefill worker had cached, or a turn that goes back: they are pushed at once, or as four stretches
of eight. Grants, and commits of rounds that follow each other, are not timed; opening, which in service comes with the
grant, before the prompt is computed, is timed apart.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence

from benchmarks.cuda_peer import Peer
from kv_transfer.base import BlockMemory, Link, Manifest, Outgoing, Placement

TOKENS = 8192
STRETCHES = 4
LANES = 2  # transfers in flight, back to back
WARM_UP = 3


def num_pages(block_size: int) -> int:
    return TOKENS // block_size


def pool_size(block_size: int) -> int:
    """Blocks of a pool that the pages of every lane are scattered in."""
    return LANES * max(128, num_pages(block_size)) + 32


def push(outgoing: Outgoing, block_ids: Sequence[int], num_layers: int, stretches: int) -> None:
    step = num_layers // stretches
    for layer in range(0, num_layers, step):
        outgoing.push(block_ids, 0, layer, layer + step)


async def transfers(
    source: BlockMemory, peer: Peer, link: Link, rounds: int, count: int, stretches: int = 1
) -> tuple[float, float, float, float]:
    """GB/s, medians: from the push of `count` pages until the receiver has verified their manifest; the same from
    `open` on; from there until the sender has heard so; until the commit is answered."""
    verified, opened, heard, committed = [], [], [], []
    for index in range(rounds + WARM_UP):
        mine, theirs = (random.Random(index + seed).sample(range(source.num_blocks), count) for seed in (0, 1000))
        transfer_id, placement = await peer.grant(theirs, link.transport)
        started_s = time.perf_counter()
        outgoing = link.open(transfer_id, placement=placement)
        pushed_s = time.perf_counter()
        push(outgoing, tuple(mine), source.num_layers, stretches)
        manifest = await outgoing.finish()
        heard.append(time.perf_counter() - started_s)
        verified_s = await peer.commit(transfer_id, manifest)
        verified.append(verified_s - pushed_s)
        opened.append(verified_s - started_s)
        committed.append(time.perf_counter() - started_s)
    gb = count * source.width(0, source.num_layers) / 1e9
    medians = (statistics.median(each[WARM_UP:]) for each in (verified, opened, heard, committed))
    return tuple(gb / median for median in medians)  # type: ignore[return-value]


async def steady(source: BlockMemory, peer: Peer, link: Link, rounds: int, count: int) -> float:
    """GB/s of transfers back to back, `LANES` of them in flight, all verified."""
    pages = [random.Random(lane).sample(range(source.num_blocks), LANES * count) for lane in (0, 1)]
    lanes = [tuple(part[lane * count : (lane + 1) * count] for part in pages) for lane in range(LANES)]
    grants = [[await peer.grant(theirs, link.transport) for _ in range(rounds)] for _, theirs in lanes]

    async def run(mine: list[int], granted: list[tuple[bytes, Placement | None]]) -> list[Manifest]:
        manifests = []
        for transfer_id, placement in granted:
            outgoing = link.open(transfer_id, placement=placement)
            push(outgoing, tuple(mine), source.num_layers, 1)
            manifests.append(await outgoing.finish())
        return manifests

    started_s = time.perf_counter()
    results = await asyncio.gather(*(run(mine, granted) for (mine, _), granted in zip(lanes, grants, strict=True)))
    seconds = time.perf_counter() - started_s
    for granted, manifests in zip(grants, results, strict=True):
        for (transfer_id, _), manifest in zip(granted, manifests, strict=True):
            await peer.commit(transfer_id, manifest)
    return LANES * rounds * count * source.width(0, source.num_layers) / 1e9 / seconds
