"""One test body over every transport; `local` is the reference. `ray_store` runs over a real Ray, the sender's objects
put by an actor and read by this process. `placed` is a one-sided writer on the CPU, `nixl` one over shared memory,
`cuda_ipc` the kernel from one GPU to another (NEEDS_GPU). Each promise of a transfer, and where it is shown:

    equality, scattered blocks            here        all
    a prefix that is there already        here        all
    prompt chunks and layers              here        all
    other block sizes                     _sizes      all but nixl and placed, which copy bytes: auto takes grpc then
    given up after every chunk            here        all
    sender killed after every chunk       _kills      grpc ray_store nixl cuda_ipc; local has no second process
    receiver killed                       _kills      as above
    a byte flipped in flight              _faults     grpc, through a proxy; ray_store, in the store. Nothing can come
                                                      between one-sided writers and memory: what landed is changed there
                                                      instead (test_placed, test_nixl, test_cuda_ipc), and what they say
                                                      of it in a proxy. local has no flight
    chunks twice, out of order            _faults     grpc ray_store placed; over the control socket test_control, for
                                                      nixl and cuda_ipc say the same. local calls what _receiver calls
    tickets expired, forged, replayed     here        all
    a writer delayed past release         here        all; of another host, which no guard stops: test_nixl
    1,000 small ones through 24 blocks    here        all
    bounded memory                        _sizes      all

(`_x` is test_transfer_x.py.)"""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import torch

import kv_transfer
from kv_transfer.base import BlockMemory, Manifest
from tests.transfer import (
    LAYER_OFFSETS,
    NUM_LAYERS,
    SOURCE,
    TRANSPORTS,
    Pair,
    make_memory,
    transfer_pair,
)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def pair(transport: str, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    stores = request.getfixturevalue("ray_stores") if transport == "ray_store" else (None, None)
    async with transfer_pair(transport, stores[0], receiver_store=stores[1]) as pair:
        yield pair


async def test_scattered_blocks_arrive(pair: Pair):
    source_ids, target_ids = [7, 3, 30, 0, 12], [1, 31, 2, 17, 4]
    before = pair.target.slab.cpu().clone()
    transfer_id = pair.grant(target_ids)
    outgoing = pair.open(transfer_id)
    outgoing.push(source_ids, 0, 0, NUM_LAYERS)
    manifest = await outgoing.finish()
    await pair.receiver.commit(transfer_id, manifest)

    assert pair.is_equal(source_ids, target_ids)
    assert manifest.num_bytes == 5 * LAYER_OFFSETS[-1] == pair.receiver.bytes_received
    others = [block for block in range(32) if block not in target_ids]
    assert torch.equal(pair.target.slab.cpu()[others], before[others])
    assert pair.receiver.num_active == 0
    await pair.receiver.commit(transfer_id, manifest)  # repeats its answer
    with pytest.raises(kv_transfer.TransferRefused):
        await pair.receiver.commit(transfer_id, Manifest(9, 9, b""))


async def test_blocks_already_there_are_not_sent(pair: Pair):
    source_ids, target_ids = [5, 6, 7, 8], [8, 7, 6, 5]
    pair.target.slab[8], pair.target.slab[7] = 111, 112
    transfer_id = pair.grant(target_ids, first_block=2)
    outgoing = pair.open(transfer_id)
    outgoing.push(source_ids[2:], 2, 0, NUM_LAYERS)
    await pair.receiver.commit(transfer_id, await outgoing.finish())
    assert pair.is_equal(source_ids[2:], target_ids[2:])
    assert (pair.target.slab[8] == 111).all() and (pair.target.slab[7] == 112).all()

    if pair.is_one_sided:
        return  # a writer is trusted with the pages it was told of
    transfer_id = pair.grant(target_ids, first_block=2)
    outgoing = pair.open(transfer_id)
    outgoing.push(source_ids, 0, 0, NUM_LAYERS)  # would overwrite what others may be reading
    with pytest.raises(kv_transfer.TransferBroken, match=r"must lie in \[2, 4\)"):
        await outgoing.finish()
    assert (pair.target.slab[8] == 111).all() and pair.receiver.release(transfer_id)


async def test_layers_and_prompt_chunks_as_they_are_computed(pair: Pair):
    source_ids, target_ids = list(range(10)), list(range(20, 30))
    transfer_id = pair.grant(target_ids)
    outgoing = pair.open(transfer_id)
    for start, stop in ((0, 4), (4, 7), (7, 10)):
        for layer in range(NUM_LAYERS):
            outgoing.push(source_ids[start:stop], start, layer, layer + 1)
            await asyncio.sleep(random.choice((0, 0.002)))  # sometimes the wire keeps up, sometimes layers queue
    await pair.receiver.commit(transfer_id, await outgoing.finish())
    assert pair.is_equal(source_ids, target_ids)


@pytest.mark.parametrize("max_chunk_bytes", [3584, 5000, 8192, 20000])
async def test_chunks_stay_within_the_limit(pair: Pair, max_chunk_bytes: int, monkeypatch: pytest.MonkeyPatch):
    if pair.is_one_sided:
        pytest.skip("nothing is staged, so nothing need be small")
    sizes = []
    place = pair.receiver.chunk
    monkeypatch.setattr(pair.receiver, "chunk", lambda *chunk: (sizes.append(chunk[1].num_bytes), place(*chunk)))
    transfer_id = pair.grant(range(6))
    outgoing = pair.open(transfer_id, max_chunk_bytes)
    outgoing.push(range(6, 12), 0, 0, NUM_LAYERS)
    manifest = await outgoing.finish()
    await pair.receiver.commit(transfer_id, manifest)
    assert pair.is_equal(range(6, 12), range(6))
    assert len(sizes) == manifest.num_chunks > 1 and max(sizes) <= max_chunk_bytes and sum(sizes) == manifest.num_bytes


async def test_nothing_to_send_is_a_transfer_too(pair: Pair):
    transfer_id = pair.grant([1, 2], first_block=2)
    await pair.receiver.commit(transfer_id, await pair.open(transfer_id).finish())


async def test_missing_pages_are_never_committed(pair: Pair):
    transfer_id = pair.grant([1, 2])
    outgoing = pair.open(transfer_id)
    outgoing.push([1], 0, 0, NUM_LAYERS)
    outgoing.push([2], 1, 0, NUM_LAYERS - 1)
    with pytest.raises(kv_transfer.TransferCorrupt, match="1 of 10"):
        await outgoing.finish()
    for _ in range(2):  # the first answer is repeated
        with pytest.raises(kv_transfer.TransferCorrupt, match="1 of 10"):
            await pair.receiver.commit(transfer_id, Manifest(2, 9, b""))
    assert pair.receiver.num_active == 1  # its owner still holds the pages
    assert pair.receiver.release(transfer_id) and not pair.receiver.release(transfer_id)


async def test_commit_waits_for_chunks_under_way(pair: Pair):
    if pair.is_one_sided:
        pytest.skip("which layers go together is up to the threads")
    reference = pair.open(wanted := pair.grant([1, 2]))
    reference.push([3, 4], 0, 0, 2)
    reference.push([3, 4], 0, 2, NUM_LAYERS)
    await asyncio.sleep(0)
    manifest = await reference.finish()
    pair.receiver.release(wanted)

    transfer_id = pair.grant([5, 6])
    outgoing = pair.open(transfer_id)
    if manifest.num_chunks == 2:
        outgoing.push([3, 4], 0, 0, 2)
    commit = asyncio.create_task(pair.receiver.commit(transfer_id, manifest))
    await asyncio.sleep(0.05)
    assert not commit.done()
    outgoing.push([3, 4], 0, 2 if manifest.num_chunks == 2 else 0, NUM_LAYERS)
    await commit
    assert await outgoing.finish() == manifest and pair.is_equal([3, 4], [5, 6])


@pytest.mark.parametrize("num_pushed", range(NUM_LAYERS + 1))
async def test_abort_at_every_chunk(pair: Pair, num_pushed: int):
    transfer_id = pair.grant(range(8))
    outgoing = pair.open(transfer_id)
    for layer in range(num_pushed):
        outgoing.push(range(8, 16), 0, layer, layer + 1)
        await pair.received(8 * LAYER_OFFSETS[layer + 1])
    outgoing.abort("test")
    outgoing.abort("again")
    await outgoing.wait_closed()
    outgoing.push(range(8, 16), 0, 0, 1)  # the engine may not know yet
    with pytest.raises(kv_transfer.TransferBroken, match="aborted: test"):
        await outgoing.finish()
    if num_pushed:  # else the stream may never have begun, and the lease has to tell
        with pytest.raises(kv_transfer.TransferBroken):
            await asyncio.wait_for(pair.receiver.commit(transfer_id, Manifest(9, 9, b"")), 4)
    await pair.give_up(outgoing, transfer_id)
    pair.receiver.check()
    assert pair.receiver.num_active == 0


async def test_tickets_are_refused(pair: Pair, transport: str):
    async def attempt(transfer_id: bytes) -> None:
        outgoing = pair.open(transfer_id)
        outgoing.push([1], 0, 0, NUM_LAYERS)
        await outgoing.finish()

    # A writer may see its guard before the receiver's word. What an expired ticket let it write lies in quarantine.
    word = "|revoked" if pair.is_one_sided else ""
    before = pair.target.slab.cpu().clone()
    with pytest.raises(kv_transfer.TransferRefused, match="unknown" + word):
        await attempt(b"forged forged!!!")
    with pytest.raises(kv_transfer.TransferRefused, match="lease" + word):
        await attempt(pair.grant([1], lease_s=0))
    with pytest.raises(kv_transfer.TransferRefused, match="not to"):
        writer = "another" if pair.is_one_sided else None
        await attempt(pair.receiver.grant("other", (SOURCE[0], "another incarnation"), [2], 0, 30, writer))
    released = pair.grant([3])
    assert pair.receiver.release(released)
    with pytest.raises(kv_transfer.TransferRefused, match="released" + word):
        await attempt(released)
    untouched = [0, *range(3, 32)] if pair.is_one_sided else range(32)
    assert torch.equal(pair.target.slab.cpu()[untouched], before[untouched])

    used = pair.grant([4])
    await attempt(used)
    with pytest.raises(kv_transfer.TransferRefused, match="once"):
        await attempt(used)
    assert pair.receiver.expire() == ["owner"] and pair.receiver.num_active == 2


async def test_release_during_receive_ends_all_writing(pair: Pair):
    transfer_id = pair.grant(range(8))
    outgoing = pair.open(transfer_id)
    outgoing.push(range(8, 16), 0, 0, 1)
    await pair.received(8 * LAYER_OFFSETS[1])
    assert pair.receiver.release(transfer_id)
    if pair.is_one_sided:
        await outgoing.wait_closed()
        assert pair.receiver.quarantine.fence(transfer_id)
    pair.target.slab[:8] = 99  # the pages are somebody else's now
    for layer in range(1, NUM_LAYERS):
        outgoing.push(range(8, 16), 0, layer, layer + 1)
    with pytest.raises(kv_transfer.TransferRefused, match="released"):
        await outgoing.finish()
    assert (pair.target.slab[:8] == 99).all()


async def test_a_writer_delayed_past_release_writes_nowhere(pair: Pair):
    """Its pages are final only after the ticket has been released, and its pages are somebody else's."""
    transfer_id = pair.grant(range(8))
    outgoing = pair.open(transfer_id)
    after, passes = pair.late()
    outgoing.push(range(8, 16), 0, 0, NUM_LAYERS, after)
    await asyncio.sleep(0.05)
    assert pair.receiver.release(transfer_id) and pair.receiver.bytes_received == 0
    assert (transfer_id in pair.receiver.quarantine) == pair.is_one_sided
    pair.target.slab[:8] = 99
    await asyncio.to_thread(passes)
    with pytest.raises(kv_transfer.TransferError):
        await outgoing.finish()
    await outgoing.wait_closed()
    assert (pair.target.slab[:8] == 99).all()


async def test_an_idle_stream_to_a_refusing_receiver_closes(pair: Pair, transport: str):
    """The refusal is noticed though nothing more is pushed, where there is a stream to notice it on."""
    if transport == "local":
        pytest.skip("a refusal comes with the next call")
    outgoing = pair.open(b"forged forged!!!")
    await asyncio.wait_for(outgoing.wait_closed(), 4)
    with pytest.raises(kv_transfer.TransferRefused):
        await outgoing.finish()


async def test_release_ends_an_idle_stream(pair: Pair, transport: str):
    """The sender hears of a release at once, not with its next chunk."""
    if transport == "local":
        pytest.skip("a refusal comes with the next call")
    transfer_id = pair.grant(range(8))
    outgoing = pair.open(transfer_id)
    outgoing.push(range(8, 16), 0, 0, 1)
    await pair.received(8 * LAYER_OFFSETS[1])
    assert pair.receiver.release(transfer_id)
    await asyncio.wait_for(outgoing.wait_closed(), 4)
    with pytest.raises(kv_transfer.TransferRefused, match="released"):
        await outgoing.finish()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
async def test_pages_on_a_gpu_are_staged(transport: str):
    if transport not in ("local", "grpc"):
        pytest.skip("the store sees arrays, wherever they came from; others have tests of their own")
    source, target = (BlockMemory(make_memory(8, seed).slab.cuda(), LAYER_OFFSETS) for seed in (1, None))
    async with transfer_pair(transport, source=source, target=target) as pair:
        transfer_id = pair.grant([5, 1, 7])
        outgoing = pair.open(transfer_id, 8192)
        outgoing.push([0, 6, 2], 0, 0, NUM_LAYERS)
        await pair.receiver.commit(transfer_id, await outgoing.finish())
        assert pair.is_equal([0, 6, 2], [5, 1, 7])


async def test_a_closed_link_opens_nothing(pair: Pair):
    """A grant may arrive just as its peer leaves: what it would be written to is no longer mapped."""
    transfer_id = pair.grant([1])
    await pair.link.close()
    with pytest.raises(kv_transfer.TransferBroken, match="the link is closed"):
        pair.open(transfer_id)


async def test_nobody_there():
    async with transfer_pair("grpc", progress_s=2.0) as pair:
        outgoing = (await pair.connect("127.0.0.1:9")).open(pair.grant([1]))
        outgoing.push([1], 0, 0, NUM_LAYERS)
        with pytest.raises(kv_transfer.TransferBroken):
            await outgoing.finish()
    async with transfer_pair("local") as pair:
        with pytest.raises(kv_transfer.TransferBroken):
            await (await pair.connect("elsewhere")).open(pair.grant([1])).finish()


async def test_many_small_transfers_through_few_blocks(pair: Pair):
    """1,000 transfers, each checked, through 24 blocks that change hands all the time; a fifth of them given up."""
    free, room = list(range(24)), asyncio.Condition()
    verified = 0

    async def one(index: int) -> None:
        nonlocal verified
        rng = random.Random(index)
        count = rng.randint(1, 4)
        async with room:
            await room.wait_for(lambda: len(free) >= count)
            target_ids = [free.pop(rng.randrange(len(free))) for _ in range(count)]
        source_ids = rng.sample(range(32), count)
        transfer_id = pair.grant(target_ids, owner=str(index))
        outgoing = pair.open(transfer_id, rng.choice((4096, 8192, None)))
        for layer in range(NUM_LAYERS):
            outgoing.push(source_ids, 0, layer, layer + 1)
        if index % 5 == 0:
            await asyncio.sleep(rng.random() * 0.01)
            await pair.give_up(outgoing, transfer_id)
            pair.target.slab[target_ids] = 0
            await outgoing.wait_closed()
        else:
            await pair.receiver.commit(transfer_id, await outgoing.finish())
            assert pair.is_equal(source_ids, target_ids)
            verified += 1
        async with room:
            free.extend(target_ids)
            room.notify_all()

    async with asyncio.TaskGroup() as group:
        for index in range(1000):
            group.create_task(one(index))
    assert verified == 800 and sorted(free) == list(range(24)) and pair.receiver.num_active == 0
    pair.receiver.check()


def test_settings_are_checked():
    memory = make_memory(2)
    with pytest.raises(ValueError, match="transport 'pigeon': must be one of local, grpc, ray_store"):
        kv_transfer.create_sender("pigeon", memory, SOURCE)
    with pytest.raises(ValueError, match="object_store"):
        kv_transfer.create_sender("ray_store", memory, SOURCE)
    with pytest.raises(ValueError, match=r"max_chunk_bytes 100: must be in \[3584"):
        kv_transfer.create_sender("local", memory, SOURCE, max_chunk_bytes=100)
    with pytest.raises(ValueError, match="layer_offsets"):
        make_memory(2, offsets=(0, 5, 5))
