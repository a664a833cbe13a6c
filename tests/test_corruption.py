"""KV that changed on its way never becomes an answer: the check fails, the pages go, the request is tried once more."""

import asyncio
from collections.abc import Callable

import pytest

from kv_transfer.local import LocalWire
from kv_transfer.receiver import Receiver
from tests.service import request, service
from tests.transfer import needs_nixl


@pytest.mark.parametrize("transport", ["grpc", "local", pytest.param("nixl", marks=needs_nixl)])
async def test_a_flipped_bit_costs_a_retry_and_nothing_else(smollm2, transport: str, monkeypatch: pytest.MonkeyPatch):
    """Commit does not wait for the check of the last pages: it hears of a failure all the same."""
    async with service(smollm2, transport=transport) as s:
        asked = [request(list(range(20 + i, 150 + i)), 8, ignore_eos=True) for i in range(3)]
        expected = [(await s.generate(one)).token_ids for one in asked]
        receiver = s.worker("decode")._receiver
        memory, num_flips = receiver.memory, 0
        name = "placed" if transport == "nixl" else "chunk"
        place = getattr(receiver, name)

        def damaged(transfer_id: bytes, headers, *rest) -> None:
            nonlocal num_flips
            if not num_flips:
                num_flips += 1
                if name == "placed":
                    memory.slab[receiver.placement(transfer_id).page_ids[headers[0].block_start], 3] ^= 16
                else:
                    rest = ([array.copy() for array in rest[0]],)
                    rest[0][0][3] ^= 16
            place(transfer_id, headers, *rest)

        monkeypatch.setattr(receiver, name, damaged)
        answers = await asyncio.gather(*(s.generate(one) for one in asked))
        assert [answer.token_ids for answer in answers] == expected
        assert num_flips == 1 and sum(answer.timings.retries for answer in answers) == 1
        assert s.worker("decode").status()["transfers_corrupt"] == 1 and not s.worker("prefill")._receiver.num_corrupt
        await s.settle()


class Damage:
    """What the `local` transport brings is damaged, while `is_on`."""

    def __init__(self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_on = True
        pack, chunk = LocalWire.pack, receiver.chunk

        def packed(wire, header, pages):
            header, (_, arrays) = pack(wire, header, pages)
            return header, (header, [array.copy() for array in arrays])

        def placed(transfer_id: bytes, header, arrays) -> None:
            if self.is_on and arrays[0].flags.owndata:  # of the local transport
                arrays[0][3] ^= 16
            chunk(transfer_id, header, arrays)

        monkeypatch.setattr(LocalWire, "pack", packed)
        monkeypatch.setattr(receiver, "chunk", placed)


def links(worker) -> dict[str, str]:
    return {link["transport"]: link["why"] for link in worker.status()["links"]}


async def test_a_transport_whose_first_transfer_is_not_verified_is_left(smollm2, monkeypatch: pytest.MonkeyPatch):
    async with service(smollm2, transport="auto") as s:
        prefill = s.worker("prefill")
        Damage(s.worker("decode")._receiver, monkeypatch)
        asked = request(list(range(20, 150)), 8, ignore_eos=True)
        answer = await s.generate(asked)
        assert answer.timings.retries == 1 and answer.timings.kv_transport == "grpc"
        assert "local: a transfer was not verified: chunk 0: checksum differs" in links(prefill)["grpc"]
        again = await s.generate(asked)
        assert again.timings.retries == 0 and again.token_ids == answer.token_ids
        await s.settle()


async def test_a_test_transfer_tells_as_well(smollm2, monkeypatch: pytest.MonkeyPatch):
    async with service(smollm2, transport="auto") as s:
        prefill = s.worker("prefill")
        Damage(s.worker("decode")._receiver, monkeypatch)
        first = await prefill.canary("decode-1", 4)
        assert not first["ok"] and "checksum differs" in first["error"]
        second = await prefill.canary("decode-1", 4)
        assert second["ok"] and second["transport"] == "grpc" and "local: a transfer was not" in second["why"]
        await s.settle()


async def test_a_transport_that_has_worked_is_left_after_two_failures(smollm2, monkeypatch: pytest.MonkeyPatch):
    async with service(smollm2, transport="auto") as s:
        prefill, damage = s.worker("prefill"), Damage(s.worker("decode")._receiver, monkeypatch)
        for is_on, transport in ((False, "local"), (True, "local"), (False, "local"), (True, "local"), (True, "grpc")):
            damage.is_on = is_on
            assert (await prefill.canary("decode-1", 4))["ok"] is not is_on
            await prefill._peers.connect(prefill._peers.find("decode-1"))  # it may be shaking hands anew
            assert list(links(prefill)) == [transport], (is_on, transport)
        await s.settle()


async def test_the_only_transport_is_kept(smollm2, monkeypatch: pytest.MonkeyPatch):
    async with service(smollm2, transport="local") as s:
        prefill, damage = s.worker("prefill"), Damage(s.worker("decode")._receiver, monkeypatch)
        for _ in range(4):
            assert not (await prefill.canary("decode-1", 4))["ok"]
        assert sum(map(len, prefill._peers._replaced.values())) == 1
        damage.is_on = False
        assert (await prefill.canary("decode-1", 4))["ok"]
        await s.settle()


@pytest.mark.parametrize("transport", ["grpc", pytest.param("nixl", marks=needs_nixl)])
async def test_a_check_that_fails_by_itself_is_the_transports_fault(
    smollm2, transport: str, monkeypatch: pytest.MonkeyPatch
):
    """A kernel that does not run at the receiver, say: the sender hears that another transport may work."""
    async with service(smollm2, transport=transport) as s:
        prefill, receiver = s.worker("prefill"), s.worker("decode")._receiver
        told: list[str] = []
        peer = await prefill._peers.connect(prefill._peers.find("decode-1"))
        peer.is_unfit = told.append
        fail: Callable[..., None] = lambda *args: 1 / 0  # noqa: E731
        monkeypatch.setattr(receiver, "placed" if transport == "nixl" else "chunk", fail)
        assert not (await prefill.canary("decode-1", 4))["ok"]
        assert told and "ZeroDivisionError" in told[0]
