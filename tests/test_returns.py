"""The way back: what a decode worker returns, the prefill worker's next turn of the chat does not compute."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from engine.prefix import block_hashes
from engine.wire import token_hash
from prefill_worker import offers
from protos import inference_pb2 as pb
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc
from tests.references import load
from tests.service import Answer, Service, collect, request, service
from tests.transfer import DictStore, needs_nixl

BLOCK = 16
DUMMY = {"load_format": "dummy", "num_blocks": 64}
COUNTERS = ("kv_returned_bytes", "kv_returned_blocks", "kv_returns_refused", "kv_returns_dropped")


async def counters(s: Service) -> list[int]:
    """Bytes and blocks returned, returns refused and dropped, once none waits or is under way."""
    await s.settle()
    reports = [worker.status() for worker in s.workers]
    return [sum(report[name] for report in reports) for name in COUNTERS]


async def chat(
    s: Service, prompt: list[int], message: list[int], max_tokens: int = 24, **fields
) -> tuple[Answer, Answer, list[int]]:
    """Two turns, the second of which is the first's prompt and answer and a new message; and the second's prompt."""
    first = await s.generate(request(prompt, max_tokens, ignore_eos=True, **fields))
    await s.settle()
    again = [*prompt, *first.token_ids[0], *message]
    return first, await s.generate(request(again, max_tokens, ignore_eos=True, **fields)), again


@pytest.mark.parametrize("transport", ["local", "grpc", "ray_store", pytest.param("nixl", marks=needs_nixl)])
async def test_the_next_turn_computes_only_the_new_message(smollm2, transport: str):
    rows = [load()[i] for i in (0, 4, 10)]
    message = load()[1]["prompt"][-12:]
    tokens: dict[bool, list[list[int]]] = {}
    for kv_return in (False, True):
        store = DictStore() if transport == "ray_store" else None
        async with service(smollm2, transport=transport, object_store=store, kv_return=kv_return) as s:

            async def turns(prompts: list[list[int]], s: Service = s) -> list[Answer]:
                answers = await asyncio.gather(*(s.generate(request(p, 24, ignore_eos=True)) for p in prompts))
                await s.settle()
                return answers

            firsts = await turns([row["prompt"] for row in rows])
            prompts = [[*row["prompt"], *a.token_ids[0], *message] for row, a in zip(rows, firsts, strict=True)]
            before = s.worker("prefill").status()
            seconds = await turns(prompts)
            after = s.worker("prefill").status()
            for row, second in zip(rows, seconds, strict=True):
                own = len(row["prompt"]) // BLOCK * BLOCK
                held = (len(row["prompt"]) + 23) // BLOCK * BLOCK  # the answer's last token was never fed back
                assert held > own and second.prompt_info.num_cached_tokens == (held if kv_return else own)
                assert second.timings.returned_tokens == (held - own if kv_return else 0)
            computed = after["prompt_tokens_computed"] - before["prompt_tokens_computed"]
            assert computed == sum(map(len, prompts)) - sum(a.prompt_info.num_cached_tokens for a in seconds)
            num_bytes, num_blocks, refused, dropped = await counters(s)
            assert refused == dropped == 0 and (num_blocks > 0) == kv_return
            assert num_bytes == num_blocks * s.worker("prefill").engine.layout.block_bytes
            assert num_bytes == s.worker("prefill").status()["kv_bytes_received"]
            for worker in s.workers:
                assert {link["transport"] for link in worker.status()["links"]} <= {transport}
            tokens[kv_return] = [answer.token_ids[0] for answer in (*firsts, *seconds)]
    assert tokens[True] == tokens[False]


@pytest.mark.parametrize(("prefill", "decode"), [(32, 16), (16, 32), (64, 16)])
async def test_blocks_of_different_sizes(tiny, prefill, decode):
    """What is returned ends at a whole block of both sizes."""
    sizes = {"engine": {**DUMMY, "block_size": prefill}, "decode_engine": {"block_size": decode}}
    prompt, larger = list(range(40)), max(prefill, decode)
    async with service(tiny, engine=DUMMY) as s:
        *_, again = await chat(s, prompt, [5], 80)
        expected = (await s.generate(request(again, 20, ignore_eos=True))).token_ids
    async with service(tiny, **sizes, kv_return=True) as s:
        first = await s.generate(request(prompt, 80, ignore_eos=True))
        assert [*prompt, *first.token_ids[0], 5] == again and (await counters(s))[2:] == [0, 0]
        second = await s.generate(request(again, 20, ignore_eos=True))
        assert second.prompt_info.num_cached_tokens == (40 + 79) // larger * larger
        assert second.timings.returned_tokens == second.prompt_info.num_cached_tokens - 40 // prefill * prefill
        assert second.token_ids == expected
        await s.generate(request(list(range(500, 540)), 20, ignore_eos=True))  # 48 of 59 tokens are whole blocks of 16
        assert (await counters(s))[2:] == [0, 0]


async def test_what_is_not_returned(tiny):
    """Bypassed caches, several answers to one prompt, cancelled runs, runs without a new whole block, local prefill."""
    prompt = list(range(40))
    async with service(tiny, engine=DUMMY, both=0, kv_return=True) as s:
        await s.generate(request(prompt, 24, ignore_eos=True, cache=pb.CacheOptions(bypass_prefix_cache=True)))
        await s.generate(request(prompt, 24, ignore_eos=True, num_sequences=2))
        await s.generate(request(prompt, 8, ignore_eos=True))
        await s.generate(request(prompt, 1, ignore_eos=True))
        call = s.stub.GenerateStream(request(prompt, 500, ignore_eos=True))
        for _ in range(40):
            await call.read()
        call.cancel()
        assert await counters(s) == [0, 0, 0, 0]
    async with service(tiny, prefill=0, decode=0, both=1, engine=DUMMY, kv_return=True) as s:
        await s.generate(request(prompt, 24, ignore_eos=True))
        assert await counters(s) == [0, 0, 0, 0]


async def test_an_answer_that_a_stop_string_ended_is_returned(tiny):
    prompt = list(range(40))
    async with service(tiny, engine=DUMMY, kv_return=True) as s:
        sampled = {"ignore_eos": True, "temperature": 1.0}
        whole = await s.generate(request(prompt, 30, **sampled, cache=pb.CacheOptions(cache_salt="a")))
        assert (await counters(s))[1] == 2
        stop = whole.text[0][-20:]
        stopped = await s.generate(request(prompt, 500, **sampled, stopping=pb.StoppingCriteria(stop=[stop])))
        assert stopped.finish[0].stop_string == stop
        kept = len(stopped.token_ids[0])
        assert 20 < kept <= 30 and (await counters(s))[1] > 2
        second = await s.generate(request([*prompt, *stopped.token_ids[0], 7], 2, ignore_eos=True))
        assert second.timings.returned_tokens == (40 + kept) // BLOCK * BLOCK - 32


async def test_tenants_do_not_share_what_is_returned(tiny):
    prompt = list(range(40))
    salted = pb.CacheOptions(cache_salt="a")
    async with service(tiny, engine=DUMMY, kv_return=True) as s:
        _, second, again = await chat(s, prompt, [5], cache=salted)
        assert second.prompt_info.num_cached_tokens == 48
        for other in (pb.CacheOptions(), pb.CacheOptions(cache_salt="b"), pb.CacheOptions(bypass_prefix_cache=True)):
            answer = await s.generate(request(again, 4, ignore_eos=True, cache=other))
            assert answer.prompt_info.num_cached_tokens == 0 and answer.token_ids[0] == second.token_ids[0][:4]


async def test_the_prompt_is_sent_back_too_where_it_was_evicted(tiny):
    """A pool of 12 blocks that other prompts went through meanwhile: the return brings what is missing there."""
    small = {**DUMMY, "num_blocks": 12, "max_model_len": 160}
    async with service(tiny, engine=small, decode_engine={"num_blocks": 64}, kv_return=True) as s:
        call = s.stub.GenerateStream(request(list(range(40)), 100, ignore_eos=True))
        reader = asyncio.create_task(collect(call))
        while s.worker("decode").status()["tokens_generated"] < 3:
            await asyncio.sleep(0.005)
        for i in range(4):
            await s.generate(request(list(range(1000 * i + 500, 1000 * i + 640)), 1))
        first = await reader
        _, num_blocks, refused, dropped = await counters(s)
        assert num_blocks == (40 + 99) // BLOCK and not refused and not dropped
        second = await s.generate(request([*range(40), *first.token_ids[0], 7], 2, ignore_eos=True))
        assert second.timings.returned_tokens == second.prompt_info.num_cached_tokens == 128


async def test_a_busy_prefill_worker_refuses(tiny):
    async with service(tiny, engine=DUMMY, kv_return=True) as s:
        engine = s.worker("prefill").engine
        await asyncio.wrap_future(engine.reserve_cache("hog", block_hashes(range(46 * BLOCK), BLOCK)))
        await s.generate(request(list(range(1000, 1030)), 55, ignore_eos=True))
        while s.worker("decode").status()["transfers_in_flight"]:
            await asyncio.sleep(0.005)
        engine.release("hog")
        assert await counters(s) == [0, 0, 1, 0]


async def test_returns_end_with_the_workers(tiny):
    """A prefill worker that left gets none, a draining one takes none, a draining decode worker drops its own."""
    async with service(tiny, prefill=2, engine=DUMMY, kv_return=True) as s:
        gone, stays = (worker for worker in s.workers if worker.role == "prefill")
        decode = s.worker("decode")
        call = s.stub.GenerateStream(request(list(range(40)), 60, ignore_eos=True))
        reader = asyncio.create_task(collect(call))
        while decode.status()["tokens_generated"] < 3:
            await asyncio.sleep(0.005)
        source = next(iter(decode._decoder.runs)).source.worker_id
        decode.set_members([worker.member() for worker in s.workers if worker.me.worker_id != source])
        await reader
        assert await counters(s) == [0, 0, 0, 1]
        decode.set_members([worker.member() for worker in s.workers])
        for worker in (gone, stays):
            worker._offers.is_open = False
        await s.generate(request(list(range(40)), 60, ignore_eos=True))
        assert await counters(s) == [0, 0, 0, 2]
        await decode._returns.close()
        await s.generate(request(list(range(40)), 60, ignore_eos=True))
        assert await counters(s) == [0, 0, 0, 3]


@asynccontextmanager
async def offering(s: Service) -> AsyncIterator[kv_grpc.KvTransferServiceStub]:
    """The prefill worker as its peers see it."""
    async with grpc.aio.insecure_channel(s.worker("prefill").address) as channel:
        yield kv_grpc.KvTransferServiceStub(channel)


def an_offer(s: Service, num_tokens: int = 48, **fields) -> kv.OfferRequest:
    tokens = range(num_tokens)
    return kv.OfferRequest(
        **{
            "source": s.worker("decode").me,
            "target": s.worker("prefill").me,
            "token_ids": tokens,
            "transport": "grpc",
            "block_size": 16,
            **fields,
        }
    )


def a_commit(transfer_id: bytes, **fields) -> kv.CommitRequest:
    tokens = list(range(48))
    return kv.CommitRequest(
        transfer_id=transfer_id, num_tokens=48, **{"token_hash": token_hash(tokens), "digest": b"wrong", **fields}
    )


async def test_offers_are_checked(tiny):
    stranger = kv.WorkerRef(worker_id="decode-1", incarnation="of another life")
    cases = [
        ({"source": stranger}, grpc.StatusCode.PERMISSION_DENIED, "not a member"),
        ({"target": stranger}, grpc.StatusCode.FAILED_PRECONDITION, "this is prefill-0"),
        ({"num_tokens": 47}, grpc.StatusCode.INVALID_ARGUMENT, "47 is not a multiple of 16"),
        ({"num_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "0 is not a multiple of 16"),
        ({"num_tokens": 16 * 100}, grpc.StatusCode.INVALID_ARGUMENT, "1600 is not a multiple of 16 in"),
        ({"token_ids": [10**6] * 16}, grpc.StatusCode.INVALID_ARGUMENT, "token id 1000000"),
        ({"num_tokens": 16 * 50}, grpc.StatusCode.RESOURCE_EXHAUSTED, "no room for 50 blocks"),
    ]
    async with service(tiny, engine=DUMMY, kv_return=True) as s, offering(s) as stub:
        for fields, code, words in cases:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Offer(an_offer(s, **fields), timeout=5.0)
            assert refused.value.code() == code and words in refused.value.details()
        held = [await stub.Offer(an_offer(s, token_ids=[i] * 16), timeout=5.0) for i in range(offers.MAX_AT_ONCE)]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Offer(an_offer(s), timeout=5.0)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for granted in held:
            release = kv.ReleaseRequest(transfer_id=granted.transfer_id)
            assert (await stub.Release(release, timeout=5.0)).found
            assert not (await stub.Release(release, timeout=5.0)).found
        await s.settle()
    async with service(tiny, engine=DUMMY) as s, offering(s) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Offer(an_offer(s), timeout=5.0)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_nothing_is_visible_unless_it_was_verified(tiny):
    async with service(tiny, engine=DUMMY, kv_return=True) as s, offering(s) as stub:
        cases = [
            ({}, grpc.StatusCode.DATA_LOSS),  # not a byte came
            ({"num_chunks": 1, "num_bytes": 7}, grpc.StatusCode.ABORTED),
            ({"token_hash": token_hash([1] * 48)}, grpc.StatusCode.DATA_LOSS),
        ]
        s.worker("prefill")._receiver.progress_s = 0.1
        for fields, code in cases:
            granted = await stub.Offer(an_offer(s), timeout=5.0)
            assert granted.cached_tokens == 0
            for _ in range(2):  # the second answer repeats the first
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Commit(a_commit(granted.transfer_id, **fields), timeout=5.0)
                assert refused.value.code() == code, refused.value.details()
            await s.settle()
        answer = await s.generate(request(list(range(50)), 4, ignore_eos=True))
        assert answer.prompt_info.num_cached_tokens == 0
        # What the prompt left is now known there: nothing need be sent.
        assert await stub.Offer(an_offer(s), timeout=5.0) == kv.OfferResponse(cached_tokens=48)


async def test_an_offer_whose_writer_vanished_expires(tiny, monkeypatch):
    monkeypatch.setattr(offers, "LEASE_S", 1.0)
    async with service(tiny, engine=DUMMY, kv_return=True) as s, offering(s) as stub:
        granted = await stub.Offer(an_offer(s), timeout=5.0)
        assert granted.transfer_id and s.worker("prefill").status()["transfers_in_flight"] == 1
        await s.settle()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Commit(a_commit(granted.transfer_id), timeout=5.0)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_the_next_turn_finds_the_worker_that_got_the_return(tiny):
    """Chats that begin with fewer tokens than their routing goes by, over three prefill workers."""
    fresh = {"load_interval_s": 0.01}  # a worker that seems busy is passed over
    async with service(tiny, prefill=3, decode=2, engine=DUMMY, router=fresh, kv_return=True) as s:
        for number in range(12):
            first, second, _ = await chat(s, list(range(100 * number, 100 * number + 9)), [5], 40)
            assert first.timings.prefill_worker == second.timings.prefill_worker
            assert first.timings.decode_worker == second.timings.decode_worker
            assert second.timings.returned_tokens == second.prompt_info.num_cached_tokens == 48
