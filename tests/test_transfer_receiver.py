"""The receiver's tickets: every wrong chunk, the lease, commit, and random walks over its state machine."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

import kv_transfer
from kv_transfer.base import ChunkHeader, Manifest, ManifestBuilder, TransferError
from kv_transfer.receiver import MAX_TOMBSTONES, Receiver
from tests.transfer import NUM_LAYERS, SOURCE, make_chunk, make_memory

LEASE_S = 10.0


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def receiver(clock: Clock) -> Receiver:
    return Receiver(make_memory(16), 1 << 20, clock, progress_s=0.2)


SENT = make_memory(16, seed=3)


def receiving(receiver: Receiver, block_ids=(4, 5, 6), first_block=0) -> bytes:
    transfer_id = receiver.grant("owner", SOURCE, block_ids, first_block, LEASE_S)
    receiver.begin(transfer_id, SOURCE)
    return transfer_id


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sequence": 2}, "chunk 2 came: 1 was next"),
        ({"sequence": 0}, "chunk 0 came: 1 was next"),
        ({"layer_start": NUM_LAYERS}, "layers"),
        ({"layer_count": 0}, "layers"),
        ({"layer_count": 60000}, "layers"),
        ({"block_start": 3}, "blocks"),
        ({"block_count": 0}, "blocks"),
        ({"block_count": 2**32 - 1}, "blocks"),
        ({"block_start": 0}, "overlaps"),
        ({"num_bytes": 5}, "bytes came"),
        ({"checksum": 1}, "checksum"),
    ],
)
def test_a_wrong_chunk_fails_the_transfer(receiver: Receiver, change: dict, error: str):
    transfer_id = receiving(receiver)
    receiver.chunk(transfer_id, *make_chunk(SENT, 0, [1], 0, (0, 2)))
    before = receiver.memory.slab.clone()
    header, pages = make_chunk(SENT, 1, [2], 1, (0, 2))
    kind = kv_transfer.TransferCorrupt if "checksum" in change else kv_transfer.TransferBroken
    with pytest.raises(kind, match=error):
        receiver.chunk(transfer_id, replace(header, **change), pages)
    elsewhere = torch.ones(16, dtype=torch.bool)
    elsewhere[5] = "checksum" not in change  # what is checked is what landed, in a page that stays the ticket's own
    assert before[elsewhere].equal(receiver.memory.slab[elsewhere])
    before = receiver.memory.slab.clone()
    with pytest.raises(kind, match=error):  # nor anything after it
        receiver.chunk(transfer_id, header, pages)
    assert before.equal(receiver.memory.slab)
    receiver.check()
    assert receiver.heartbeat([transfer_id]) == [transfer_id]
    assert receiver.release(transfer_id)


def test_a_chunk_may_not_exceed_the_limit():
    receiver = Receiver(make_memory(16), 2000)
    with pytest.raises(kv_transfer.TransferBroken, match="at most 2000"):
        receiver.chunk(receiving(receiver), *make_chunk(SENT, 0, [1], 0, (0, 2)))


async def test_an_expired_lease_is_never_renewed(receiver: Receiver, clock: Clock):
    first, second = receiving(receiver, [1]), receiving(receiver, [2])
    clock.now_s += LEASE_S - 1
    assert receiver.heartbeat([first, b"?"]) == [b"?"]
    clock.now_s += 2  # over for the second only, and nobody has collected it yet
    header, pages = make_chunk(SENT, 0, [1], 0, (0, NUM_LAYERS))
    with pytest.raises(kv_transfer.TransferRefused, match="lease"):
        receiver.chunk(second, header, pages)
    assert receiver.heartbeat([first, second]) == [second]
    with pytest.raises(kv_transfer.TransferRefused, match="lease"):
        await receiver.commit(second, manifest_of(header))
    assert receiver.num_active == 2 and receiver.expire() == ["owner"] and receiver.expire() == []
    with pytest.raises(kv_transfer.TransferRefused, match="lease"):  # its first answer
        await receiver.commit(second, manifest_of(header))
    receiver.chunk(first, header, pages)
    await receiver.commit(first, manifest_of(header))
    assert receiver.num_active == 0 and not receiver.release(first) and receiver.heartbeat([first]) == [first]


async def test_commit_gives_up_when_nothing_comes(receiver: Receiver, clock: Clock):
    transfer_id = receiving(receiver)
    clock.now_s += 1
    commit = asyncio.create_task(receiver.commit(transfer_id, Manifest(3, 3, b"")))
    await asyncio.sleep(0)
    clock.now_s += 0.2
    with pytest.raises(kv_transfer.TransferBroken, match=r"no chunk came for 0\.2 s"):
        await commit
    receiver.check()


@pytest.mark.parametrize("end", ["release", "expire", "fail"])
async def test_a_waiting_commit_hears_of_the_end(receiver: Receiver, clock: Clock, end: str):
    transfer_id = receiving(receiver)
    commits = [asyncio.create_task(receiver.commit(transfer_id, Manifest(3, 3, b""))) for _ in range(2)]
    await asyncio.sleep(0.01)
    if end == "release":
        assert receiver.release(transfer_id)
    elif end == "fail":
        receiver.fail(transfer_id, kv_transfer.TransferBroken("the sender is gone"))
    else:
        clock.now_s += LEASE_S
        assert receiver.expire() == ["owner"]
    for commit in commits:
        with pytest.raises(TransferError, match={"release": "released", "expire": "expired", "fail": "gone"}[end]):
            await commit
    receiver.check()


async def test_the_manifest_must_agree(receiver: Receiver):
    for change in ({"digest": bytes(32)}, {"num_bytes": 1}, {"num_chunks": 0}):
        transfer_id = receiving(receiver, [1])
        header, pages = make_chunk(SENT, 0, [1], 0, (0, NUM_LAYERS))
        receiver.chunk(transfer_id, header, pages)
        wrong = replace(manifest_of(header), **change)
        with pytest.raises(kv_transfer.TransferCorrupt):
            await receiver.commit(transfer_id, wrong)
        with pytest.raises(kv_transfer.TransferRefused, match="earlier"):
            await receiver.commit(transfer_id, manifest_of(header))
        assert receiver.release(transfer_id)
    receiver.check()


def test_end_must_agree_and_is_the_end(receiver: Receiver):
    transfer_id = receiving(receiver, [1])
    header, pages = make_chunk(SENT, 0, [1], 0, (0, NUM_LAYERS))
    receiver.chunk(transfer_id, header, pages)
    receiver.end(transfer_id, manifest_of(header))
    with pytest.raises(kv_transfer.TransferRefused):
        receiver.chunk(transfer_id, *make_chunk(SENT, 1, [1], 0, (1, 2)))
    receiver.fail(transfer_id, kv_transfer.TransferBroken("too late to matter"))
    for wrong, error in (
        (replace(manifest_of(header), num_chunks=2), kv_transfer.TransferBroken),
        (replace(manifest_of(header), digest=bytes(32)), kv_transfer.TransferCorrupt),
        (replace(manifest_of(header), num_bytes=4), kv_transfer.TransferCorrupt),
    ):
        other = receiving(receiver, [9])
        receiver.chunk(other, header, pages)
        with pytest.raises(error):
            receiver.end(other, wrong)
        assert receiver.release(other)


def test_release_waits_for_the_chunk_being_placed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    """When release returns, nothing writes any more: it may have to wait for one chunk."""
    transfer_id = receiving(receiver, [1])
    placing, go_on = threading.Event(), threading.Event()
    write = type(receiver.memory).write

    def slow_write(*args) -> int:
        placing.set()
        assert go_on.wait(5)
        return write(*args)

    monkeypatch.setattr(type(receiver.memory), "write", slow_write)
    placer = threading.Thread(target=receiver.chunk, args=(transfer_id, *make_chunk(SENT, 0, [1], 0, (0, 1))))
    placer.start()
    assert placing.wait(5)
    releaser = threading.Thread(target=receiver.release, args=(transfer_id,))
    releaser.start()
    releaser.join(0.05)
    assert releaser.is_alive() and receiver.num_active == 1
    go_on.set()
    releaser.join(5)
    placer.join(5)
    assert receiver.num_active == 0 and receiver.bytes_received == 1024
    receiver.check()


def test_tombstones_are_bounded(receiver: Receiver):
    first = receiver.grant("owner", SOURCE, [1], 0, LEASE_S)
    receiver.release(first)
    for _ in range(MAX_TOMBSTONES):
        receiver.release(receiver.grant("owner", SOURCE, [1], 0, LEASE_S))
    receiver.check()
    with pytest.raises(kv_transfer.TransferRefused, match="unknown"):
        receiver.begin(first, SOURCE)


def manifest_of(*headers: ChunkHeader) -> Manifest:
    builder = ManifestBuilder()
    for header in headers:
        builder.add(header)
    return builder.manifest()


class Walk(RuleBasedStateMachine):
    """Random operations on a few tickets, against a model that says which are live and what their pages must hold."""

    transfers = Bundle("transfers")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.receiver = Receiver(make_memory(16), 1 << 20, self.clock, progress_s=0.0)
        self.free = set(range(16))
        self.live: dict[bytes, dict] = {}
        self.foreign: dict[int, int] = {}  # block -> byte its present owner has put there

    @rule(
        target=transfers,
        count=st.integers(1, 4),
        skip=st.integers(0, 4),
        lease_s=st.floats(1, 20),
        begun=st.sampled_from([True, True, True, False]),
    )
    def grant(self, count: int, skip: int, lease_s: float, begun: bool) -> bytes:
        if len(self.free) < count:
            return b"no ticket at all"
        blocks = [self.free.pop() for _ in range(count)]
        for block in blocks:
            self.foreign.pop(block, None)
        first = min(skip, count)
        transfer_id = self.receiver.grant(str(blocks), SOURCE, blocks, first, lease_s)
        cells = np.zeros((count, NUM_LAYERS), bool)
        cells[:first] = True
        self.live[transfer_id] = {
            "blocks": blocks,
            "lease_s": lease_s,
            "until_s": self.clock.now_s + lease_s,
            "state": "granted",
            "cells": cells,
            "headers": [],
        }
        if begun:
            self.begin(transfer_id, SOURCE)
        return transfer_id

    @rule(transfer_id=transfers, source=st.sampled_from([SOURCE, ("prefill-0", "an older one")]))
    def begin(self, transfer_id: bytes, source: tuple[str, str]) -> None:
        ticket = self.usable(transfer_id, "granted")
        if ticket and source == SOURCE:
            self.receiver.begin(transfer_id, source)
            ticket["state"] = "receiving"
        else:
            with pytest.raises(kv_transfer.TransferRefused):
                self.receiver.begin(transfer_id, source)

    @rule(
        transfer_id=transfers,
        block=st.integers(0, 3),
        layer=st.integers(0, NUM_LAYERS - 1),
        gap=st.sampled_from([0, 0, 0, 0, 1, -1]),
        flip=st.sampled_from([False, False, False, True]),
    )
    def chunk(self, transfer_id: bytes, block: int, layer: int, gap: int, flip: bool) -> None:
        ticket = self.usable(transfer_id, "receiving")
        sequence = max(len(ticket["headers"]) + gap if ticket else 0, 0)
        header, pages = make_chunk(SENT, sequence, [block], block, (layer, layer + 1))
        header = replace(header, checksum=header.checksum ^ flip)
        good = (
            ticket
            and sequence == len(ticket["headers"])
            and block < len(ticket["blocks"])
            and not ticket["cells"][block, layer]
            and not flip
        )
        if good:
            self.receiver.chunk(transfer_id, header, pages)
            ticket["cells"][block, layer] = True
            ticket["headers"].append(header)
        else:
            with pytest.raises(TransferError):
                self.receiver.chunk(transfer_id, header, pages)
            if ticket:
                ticket["state"] = "failed"

    @rule(transfer_id=transfers)
    def fill(self, transfer_id: bytes) -> None:
        """Everything that is missing, so that walks get as far as a commit that agrees."""
        if (ticket := self.usable(transfer_id, "receiving")) is not None:
            for block, layer in np.argwhere(~ticket["cells"]).tolist():
                self.chunk(transfer_id, block, layer, 0, False)

    @rule(transfer_id=transfers, wrong=st.sampled_from([False, False, True]))
    def commit(self, transfer_id: bytes, wrong: bool) -> None:
        ticket = self.live.get(transfer_id)
        manifest = manifest_of(*ticket["headers"]) if ticket else Manifest(0, 0, b"")
        manifest = replace(manifest, digest=bytes(32)) if wrong else manifest
        usable = self.usable(transfer_id, "receiving") or self.usable(transfer_id, "granted")
        if usable and usable["cells"].all() and not wrong and usable.get("manifest", manifest) == manifest:
            asyncio.run(self.receiver.commit(transfer_id, manifest))
            asyncio.run(self.receiver.commit(transfer_id, manifest))
            self.give_back(transfer_id)
        elif ticket:
            with pytest.raises(TransferError):
                asyncio.run(self.receiver.commit(transfer_id, manifest))
            ticket.setdefault("manifest", manifest)
            if usable and ticket["manifest"] == manifest:
                ticket["state"] = "failed"

    @rule(transfer_id=transfers)
    def fail(self, transfer_id: bytes) -> None:
        self.receiver.fail(transfer_id, kv_transfer.TransferBroken("gone"))
        if (ticket := self.live.get(transfer_id)) is not None:
            ticket["state"] = "failed"

    @rule(transfer_id=transfers)
    def release(self, transfer_id: bytes) -> None:
        assert self.receiver.release(transfer_id) == (transfer_id in self.live)
        self.give_back(transfer_id)

    @rule(transfer_id=transfers)
    def heartbeat(self, transfer_id: bytes) -> None:
        ticket = self.usable(transfer_id, "granted") or self.usable(transfer_id, "receiving")
        assert self.receiver.heartbeat([transfer_id]) == ([] if ticket else [transfer_id])
        if ticket:
            ticket["until_s"] = self.clock.now_s + ticket["lease_s"]

    @rule(seconds=st.floats(0, 15))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def expire(self) -> None:
        over = {key: ticket for key, ticket in self.live.items() if self.clock.now_s >= ticket["until_s"]}
        assert sorted(self.receiver.expire()) == sorted(str(ticket["blocks"]) for ticket in over.values())
        for transfer_id in over:
            self.give_back(transfer_id)

    @invariant()
    def holds(self) -> None:
        self.receiver.check()
        assert self.receiver.num_active == len(self.live)
        pages = self.receiver.memory.slab
        for block, value in self.foreign.items():
            assert (pages[block] == value).all(), "a page was written after its transfer had ended"

    def usable(self, transfer_id: bytes, state: str) -> dict | None:
        ticket = self.live.get(transfer_id)
        return ticket if ticket and ticket["state"] == state and self.clock.now_s < ticket["until_s"] else None

    def give_back(self, transfer_id: bytes) -> None:
        ticket = self.live.pop(transfer_id, None)
        for block in ticket["blocks"] if ticket else ():
            self.foreign[block] = block + 100
            self.receiver.memory.slab[block] = block + 100
            self.free.add(block)

    def teardown(self) -> None:
        for transfer_id in list(self.live):
            assert self.receiver.release(transfer_id)
        assert self.receiver.num_active == 0
        self.receiver.check()


Walk.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestWalk = Walk.TestCase
