"""KV that changed on its way never becomes an answer: the check fails, the pages go, the request is tried once more."""

import asyncio

import pytest

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
