"""What is NIXL's own in its transport; the rest is in the body of tests over every transport (test_transfer.py)."""

import asyncio
import json

import pytest

import kv_transfer
from kv_transfer import nixl
from kv_transfer.guards import Guards
from kv_transfer.nixl import PoolHandle, merged
from kv_transfer.receiver import Receiver
from tests.references import load
from tests.service import request, service
from tests.transfer import LAYER_OFFSETS, NUM_LAYERS, SOURCE, from_afar, make_memory, needs_nixl, transfer_pair


def test_what_follows_on_both_sides_goes_together():
    assert merged([4, 5, 6, 9, 10], [0, 1, 2, 3, 4]) == [(4, 0, 3), (9, 3, 2)]
    assert merged([4, 5, 6], [7, 6, 5]) == [(4, 7, 1), (5, 6, 1), (6, 5, 1)]
    assert merged([], []) == []


def test_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nixl, "PACKAGES", ("no_such_package",))
    receiver = Receiver(make_memory(4), kv_transfer.MAX_CHUNK_BYTES, guards=Guards())
    with pytest.raises(ValueError, match=r"transport 'nixl': NIXL is not installed: pip install 'pdserve\[nixl\]'"):
        kv_transfer.Transports("nixl", receiver, SOURCE)
    auto = kv_transfer.Transports("auto", receiver, SOURCE)
    assert "nixl" not in auto.speaks and "not installed" in auto.missing["nixl"]


@needs_nixl
def test_an_agent_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch):
    def fails(memory) -> None:
        raise RuntimeError("no such backend")

    monkeypatch.setattr(nixl, "Agent", fails)
    receiver = Receiver(make_memory(4), kv_transfer.MAX_CHUNK_BYTES, guards=Guards())
    with pytest.raises(ValueError, match="NIXL cannot serve the pool: no such backend"):
        kv_transfer.Transports("nixl", receiver, SOURCE)


@needs_nixl
def test_auto_starts_no_agent_for_a_pool_in_cpu_memory():
    receiver = Receiver(make_memory(4), kv_transfer.MAX_CHUNK_BYTES, guards=Guards())
    auto = kv_transfer.Transports("auto", receiver, SOURCE)
    assert auto.speaks == ("local", "grpc") and "asked for by name" in auto.missing["nixl"]


@pytest.mark.parametrize("field", ["agent", "address", "num_blocks"])
def test_a_handle_that_cannot_be_read(field: str):
    good = PoolHandle("00ff", 4096, 10, 100, 0, "host", "/proc/1/fd/3", "")
    assert PoolHandle.decode(good.encode()) == good
    fields = json.loads(good.encode())
    for bad in ({**fields, field: "no hex" if field == "agent" else -1}, [1], {"agent": "00"}):
        with pytest.raises(kv_transfer.TransferBroken, match="handle"):
            PoolHandle.decode(json.dumps(bad).encode())


@needs_nixl
async def test_whole_blocks_in_a_row_are_one_descriptor():
    offsets = (0, 4096, 8200)  # no padding behind the last layer
    source, target = make_memory(16, 1, offsets), make_memory(16, None, offsets)
    source = kv_transfer.base.BlockMemory(source.slab[:, :8200].contiguous(), offsets)
    target = kv_transfer.base.BlockMemory(target.slab[:, :8200].contiguous(), offsets)
    async with transfer_pair("nixl", None, source, target) as pair:
        transfer_id = pair.grant([3, 4, 5, 9, 10])
        outgoing = pair.open(transfer_id)
        outgoing.push([7, 8, 9, 1, 2], 0, 0, 2)
        await pair.receiver.commit(transfer_id, await outgoing.finish())
        assert pair.is_equal([7, 8, 9, 1, 2], [3, 4, 5, 9, 10])
        assert not target.slab[[0, 1, 2, 6, 7, 8, 11]].any()


@needs_nixl
async def test_a_byte_that_did_not_land_is_never_committed(monkeypatch: pytest.MonkeyPatch):
    async with transfer_pair("nixl") as pair:
        transfer_id = pair.grant([4, 5])
        check = pair.receiver.placed

        def late(*args) -> None:
            pair.target.slab[5, LAYER_OFFSETS[1]] ^= 8
            check(*args)

        monkeypatch.setattr(pair.receiver, "placed", late)
        outgoing = pair.open(transfer_id)
        outgoing.push([1, 2], 0, 0, NUM_LAYERS)
        with pytest.raises(kv_transfer.TransferCorrupt, match="checksum"):
            await outgoing.finish()
        await pair.give_up(outgoing, transfer_id)


@needs_nixl
async def test_a_writer_of_another_host_delayed_past_release():
    """No guard stops it there: what it writes lands in pages that are out of use until it is closed, and says so."""
    async with transfer_pair("nixl") as pair:
        link = await pair.connect(pair.address, from_afar(pair.endpoint))
        assert link.note
        transfer_id = pair.grant([4, 5])
        outgoing = link.open(transfer_id, None, pair.receiver.placement(transfer_id))
        after, passes = pair.late()
        outgoing.push([1, 2], 0, 0, NUM_LAYERS, after)
        await asyncio.sleep(0.05)
        assert pair.receiver.release(transfer_id)
        passes()
        with pytest.raises(kv_transfer.TransferError):
            await outgoing.finish()
        assert transfer_id in pair.receiver.quarantine and pair.is_equal([1, 2], [4, 5])
        await outgoing.wait_closed()
        assert pair.receiver.quarantine.fence(transfer_id) == "owner"
        pair.target.slab[:] = 99
        await asyncio.sleep(0.1)
        assert (pair.target.slab == 99).all()


@needs_nixl
async def test_tokens_over_nixl_are_those_of_transformers(smollm2):
    row = load()[2]
    async with service(smollm2, transport="nixl") as s:
        answer = await s.generate(request(row["prompt"], 32))
        assert answer.token_ids[0] == row["output"] and answer.timings.kv_transport == "nixl"
        result = await s.worker("prefill").canary("decode-1", 4)
        assert result["ok"] and result["transport"] == "nixl", result
