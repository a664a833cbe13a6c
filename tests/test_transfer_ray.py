"""`ray_store` as it is deployed: sender and receiver in actors of their own, on one node and on two."""

import asyncio

import pytest
import ray

import kv_transfer
from cluster.object_store import RayObjectStore
from kv_transfer.base import Manifest
from tests.transfer import SOURCE, make_memory, transfer_pair

# Pages of 256 KiB a layer: stored as they are. The small layer in front makes other chunks be joined first.
OFFSETS = (0, 4096, 4096 + (256 << 10), 4096 + (512 << 10))
NUM_BLOCKS = 24


class Receiving:
    """A receiver behind its gRPC server."""

    async def start(self) -> str:
        target = make_memory(NUM_BLOCKS, offsets=OFFSETS)
        self._context = transfer_pair("ray_store", RayObjectStore(), make_memory(1, offsets=OFFSETS), target)
        self._pair = await self._context.__aenter__()
        return self._pair.address

    async def grant(self, block_ids: list[int]) -> bytes:
        return self._pair.grant(block_ids)

    async def commit(self, transfer_id: bytes, num_chunks: int, num_bytes: int, digest: bytes) -> list[list[int]]:
        """The sums of the pages, by block."""
        await self._pair.receiver.commit(transfer_id, Manifest(num_chunks, num_bytes, digest))
        return sums(self._pair.target)


class Sending:
    """A sender of seeded pages."""

    def __init__(self) -> None:
        self._store = RayObjectStore()

    async def push(self, address: str, transfer_id: bytes, block_ids: list[int], seed: int) -> tuple:
        memory = make_memory(NUM_BLOCKS, seed, OFFSETS)
        store = self._store
        sender = kv_transfer.create_sender("ray_store", memory, SOURCE, store, max_chunk_bytes=2 << 20)
        outgoing = (await sender.connect(address, kv_transfer.base.Endpoint("ray_store"))).open(transfer_id)
        for layer in range(len(OFFSETS) - 1):
            outgoing.push(block_ids, 0, layer, layer + 1)
            await asyncio.sleep(0.01)
        manifest = await outgoing.finish()
        await sender.close()
        return manifest.num_chunks, manifest.num_bytes, manifest.digest, sums(memory), store.num_objects, store.num_idle


def sums(memory) -> list[list[int]]:
    return memory.slab[:, : OFFSETS[-1]].long().view(memory.num_blocks, -1, 4096).sum(-1).tolist()


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_actors_hand_over_pages(two_nodes, pool: str):
    """From a sender on the same node, whose objects are filled again, and from one on the other, whose are not."""
    receiving = ray.remote(Receiving).options(num_cpus=0, label_selector={"pool": "prefill"}).remote()
    sending = ray.remote(Sending).options(num_cpus=0, label_selector={"pool": pool}).remote()
    address = ray.get(receiving.start.remote(), timeout=60)
    source_ids, target_ids = list(range(20)), list(range(NUM_BLOCKS - 1, NUM_BLOCKS - 21, -1))
    for seed in range(6):  # 10 MB each through stores of 80 MB
        transfer_id = ray.get(receiving.grant.remote(target_ids), timeout=30)
        pushed = ray.get(sending.push.remote(address, transfer_id, source_ids, seed), timeout=60)
        num_chunks, num_bytes, digest, source_sums, num_objects, num_idle = pushed
        target_sums = ray.get(receiving.commit.remote(transfer_id, num_chunks, num_bytes, digest), timeout=30)
        assert num_bytes == 20 * OFFSETS[-1] and num_chunks >= 6 and num_objects == 0
        assert 0 < num_idle <= 8 if pool == "prefill" else num_idle == 0
        assert [target_sums[block] for block in target_ids] == [source_sums[block] for block in source_ids]
    ray.kill(receiving)
    ray.kill(sending)


def test_what_is_no_token_is_refused(two_nodes):
    store = RayObjectStore()
    for token in (b"", b"short", bytes(40), b"\x01\x00" * 4 + b"abcde"):
        with pytest.raises(kv_transfer.TransferBroken, match="no object reference"):
            store.get(token, 1, 1.0)
