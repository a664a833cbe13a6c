"""The whole service in one process: router, prefill and decode workers over real gRPC."""

import asyncio

import grpc
import pytest

from protos import inference_pb2 as pb
from tests.references import load
from tests.service import collect, request, service

DUMMY = {"load_format": "dummy", "num_blocks": 128}


@pytest.mark.parametrize(("transport", "num_prompts"), [("local", 20), ("grpc", 6)])
async def test_greedy_tokens_are_those_of_transformers(smollm2, transport, num_prompts):
    """Two workers in one process. All twenty prompts over the other transports, between processes, in
    test_deployment.py."""
    rows = load()[:num_prompts]
    assert len(rows) == num_prompts
    async with service(smollm2, transport=transport, engine={"max_num_batched_tokens": 64}) as s:
        answers = await asyncio.gather(*(s.generate(request(row["prompt"], 32)) for row in rows))
        for row, answer in zip(rows, answers, strict=True):
            assert answer.token_ids[0] == row["output"], row["question"]
            assert answer.timings.kv_transport == transport
        await s.settle()
        sent = s.worker("prefill").status()["kv_bytes_sent"]
        block_bytes = s.worker("prefill").engine.layout.block_bytes
        assert sent == sum(-(-len(row["prompt"]) // 16) for row in rows) * block_bytes - saved(answers, block_bytes)
        assert sent == s.worker("decode").status()["kv_bytes_received"]
        assert sent == sum(answer.timings.kv_transfer_bytes for answer in answers)


def saved(answers, block_bytes: int) -> int:
    """Bytes the decode worker's prefix cache made unnecessary."""
    return sum(answer.timings.decode_cached_tokens // 16 for answer in answers) * block_bytes


async def test_sampled_tokens_do_not_depend_on_company_or_deployment(smollm2):
    prompt = load()[2]["prompt"]
    asked = request(prompt, 12, temperature=0.9, seed=7, num_sequences=2, ignore_eos=True)
    others = [request(row["prompt"], 12, temperature=1.0, seed=i) for i, row in enumerate(load()[:3])]
    async with service(smollm2) as s:
        alone = await s.generate(asked)
        in_company, *_ = await asyncio.gather(s.generate(asked), *(s.generate(other) for other in others))
    async with service(smollm2, prefill=0, decode=0, both=1) as s:
        colocated = await s.generate(asked)
        assert colocated.timings.local_prefill and colocated.timings.kv_transfer_bytes == 0
    assert alone.token_ids == in_company.token_ids == colocated.token_ids
    assert alone.token_ids[0] != alone.token_ids[1]
    assert len(alone.token_ids[0]) == 12


async def test_second_turn_of_a_chat_computes_and_sends_only_what_is_new(smollm2):
    def chat(*messages: tuple[str, str], **fields) -> pb.GenerateRequest:
        asked = request([], 24, response=pb.ResponseOptions(prompt_token_ids=True), **fields)
        asked.chat.messages.extend(pb.ChatMessage(role=role, content=content) for role, content in messages)
        return asked

    question = ("user", "Name the colours of the rainbow, then say in one sentence why they always come in that order.")
    async with service(smollm2) as s:
        first = await s.generate(chat(question))
        ids = [*first.prompt_info.token_ids, *first.token_ids[0]]
        turns = (question, ("assistant", first.text[0]), ("user", "And at night?"))
        before = {w.role: w.status() for w in s.workers}
        second = await s.generate(chat(*turns))
        await s.settle()
        after = {w.role: w.status() for w in s.workers}
        again = list(second.prompt_info.token_ids)
        kept = ids[:-1]  # the last token was never fed back, so it has no KV
        shared = next((i for i, pair in enumerate(zip(kept, again, strict=False)) if pair[0] != pair[1]), len(kept))
        assert shared >= len(first.prompt_info.token_ids) + 16, "the answer is part of the second prompt"
        # Prefill has the first prompt's whole blocks; decode has those and what it generated.
        at_prefill = len(first.prompt_info.token_ids) // 16 * 16
        at_decode = shared // 16 * 16
        computed = after["prefill"]["prompt_tokens_computed"] - before["prefill"]["prompt_tokens_computed"]
        assert second.prompt_info.num_cached_tokens == at_prefill and computed == len(again) - at_prefill
        assert second.timings.decode_cached_tokens == at_decode > at_prefill
        block_bytes = s.worker("decode").engine.layout.block_bytes
        num_blocks = -(-len(again) // 16) - at_decode // 16
        assert second.timings.kv_transfer_bytes == num_blocks * block_bytes
        assert after["decode"]["kv_bytes_received"] - before["decode"]["kv_bytes_received"] == num_blocks * block_bytes
        for apart in (pb.CacheOptions(cache_salt="other"), pb.CacheOptions(bypass_prefix_cache=True)):
            other = await s.generate(chat(*turns, cache=apart))
            assert other.prompt_info.num_cached_tokens == 0 and other.timings.decode_cached_tokens == 0
            assert other.token_ids == second.token_ids


async def test_small_pools_finish_everything_with_preemptions(smollm2):
    """Eight requests of 5 to 7 blocks each over pools of 10: nothing deadlocks, nothing differs."""
    rows = load()[:8]
    asked = [request(row["prompt"], 40, seed=i, temperature=0.7, ignore_eos=True) for i, row in enumerate(rows)]
    async with service(smollm2) as s:
        expected = await asyncio.gather(*(s.generate(one) for one in asked))
    async with service(smollm2, engine={"num_blocks": 10, "max_model_len": 150}) as s:
        answers = await asyncio.gather(*(s.generate(one) for one in asked))
        assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
        assert s.worker("decode").status()["preemptions"] > 0
        assert sum(answer.timings.preemptions for answer in answers) == s.worker("decode").status()["preemptions"]


async def test_a_request_that_can_never_fit_is_refused_at_once(tiny):
    async with service(tiny, engine={**DUMMY, "num_blocks": 32}, decode_engine={"num_blocks": 8}) as s:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await s.generate(request(list(range(200)), 8))
        assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
        assert (await s.generate(request([1, 2, 3], 4, ignore_eos=True))).usage.completion_tokens == 4


async def test_one_token_moves_no_kv(tiny):
    async with service(tiny, engine=DUMMY) as s:
        answer = await s.generate(request(list(range(40)), 1))
        assert answer.usage.completion_tokens == 1
        assert answer.timings.kv_transfer_bytes == 0 and answer.timings.decode_worker == ""
        assert s.worker("decode").status()["kv_bytes_received"] == 0


async def test_end_of_sequence_as_first_token_adopts_nothing(tiny):
    async with service(tiny, engine=DUMMY) as s:
        forced = request(list(range(40)), 8, sampling=pb.SamplingParams(logit_bias={2: 100.0}))
        answer = await s.generate(forced)
        assert answer.finish[0].eos_token_id == 2 and answer.usage.completion_tokens == 1
        await s.settle()
        # KV leaves while it is computed, so some may have left by then: what is reported is what moved.
        assert answer.timings.kv_transfer_bytes == s.worker("prefill").status()["kv_bytes_sent"]
        assert s.worker("decode").status()["tokens_generated"] == 0


async def test_a_stop_string_in_the_first_token_reports_what_moved(tiny):
    async with service(tiny, engine=DUMMY) as s:
        first = (await s.generate(request(list(range(40)), 1, ignore_eos=True))).text[0]
        again = await s.generate(request(list(range(40)), 8, stopping=pb.StoppingCriteria(stop=[first[:1]])))
        assert again.finish[0].stop_string == first[:1] and again.usage.completion_tokens == 1
        await s.settle()
        moved = s.worker("decode").status()["kv_bytes_received"]
        assert again.timings.kv_transfer_bytes == moved == s.worker("prefill").status()["kv_bytes_sent"] > 0


async def test_many_sequences_of_one_prompt_move_its_kv_once(tiny):
    async with service(tiny, engine=DUMMY) as s:
        answer = await s.generate(request(list(range(40)), 10, temperature=1.0, num_sequences=4, ignore_eos=True))
        assert answer.timings.kv_transfer_bytes == 3 * s.worker("decode").engine.layout.block_bytes
        assert [len(ids) for ids in answer.token_ids] == [10] * 4
        assert len({tuple(ids) for ids in answer.token_ids}) == 4


async def test_logprobs_come_with_every_token(tiny):
    async with service(tiny, engine=DUMMY) as s:
        asked = request(list(range(40)), 6, ignore_eos=True, response=pb.ResponseOptions(logprobs=3))
        answer = await s.generate(asked)
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids[0]
        for entry in answer.logprobs:
            assert entry.rank == 1 and len(entry.top) == 3 and entry.top[0].token_id == entry.token_id
            assert entry.logprob == entry.top[0].logprob <= 0


class TestEndsEarly:
    """Wherever a request stands when its caller goes away, both workers stop and everything comes back."""

    async def test_cancelled_while_queued_for_pages(self, smollm2):
        small = {"num_blocks": 12, "max_model_len": 150}
        async with service(smollm2, engine=small) as s:
            running = asyncio.create_task(s.generate(request(list(range(100)), 50, ignore_eos=True)))
            queued = [s.stub.GenerateStream(request(list(range(i, i + 90)), 50, ignore_eos=True)) for i in range(6)]
            readers = [asyncio.create_task(collect(call)) for call in queued]
            await asyncio.sleep(0.1)
            for call in queued:
                call.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            assert (await running).usage.completion_tokens == 50

    @pytest.mark.parametrize("after_s", [0.0, 0.05, 0.2, 0.4, 0.6, 0.8])
    async def test_cancelled_at_any_moment(self, smollm2, after_s):
        """A 288-token prompt takes about half a second here: these moments fall into prefill, transfer and decode."""
        async with service(smollm2, engine={"max_num_batched_tokens": 64}) as s:
            call = s.stub.GenerateStream(request(load()[18]["prompt"], 200, ignore_eos=True))
            reader = asyncio.create_task(collect(call))
            await asyncio.sleep(after_s)
            call.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await s.settle(5.0)

    @pytest.mark.parametrize("num_messages", [1, 2, 10])
    async def test_cancelled_after_some_messages(self, smollm2, num_messages):
        async with service(smollm2) as s:
            call = s.stub.GenerateStream(request(list(range(40)), 1000, ignore_eos=True))
            for _ in range(num_messages):
                await call.read()
            call.cancel()
            await s.settle(5.0)

    async def test_client_disconnects(self, smollm2):
        async with service(smollm2) as s:
            async with grpc.aio.insecure_channel(s.router.address) as channel:
                stub = type(s.stub)(channel)
                await stub.GenerateStream(request(list(range(40)), 1000, ignore_eos=True)).read()
            await s.settle(5.0)

    async def test_deadline(self, smollm2):
        async with service(smollm2) as s:
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await s.generate(request(list(range(40)), 200, ignore_eos=True), timeout=0.8)
            assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await s.settle(5.0)

    async def test_abort_call(self, smollm2):
        async with service(smollm2) as s:
            asked = request(list(range(40)), 1900, ignore_eos=True, request_id="stop-me")
            call = s.stub.GenerateStream(asked)
            await call.read()
            aborted = await s.stub.Abort(pb.AbortRequest(request_ids=["stop-me", "unknown"]), timeout=5.0)
            assert aborted.aborted == 1
            last = None
            while (message := await call.read()) is not grpc.aio.EOF:
                last = message
            assert last.finish_info.finish_reason == pb.FINISH_REASON_ABORTED
            await s.settle(5.0)


async def test_mismatched_pools_refuse_each_other_with_both_layouts(tiny):
    async with service(tiny, engine=DUMMY, decode_engine={"dtype": "bfloat16"}) as s:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await s.generate(request(list(range(40)), 8))
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        for part in ("prefill-0", "float32", "decode-1", "bfloat16"):
            assert part in refused.value.details()
        # The workers check for themselves: a router is not what keeps wrong bytes out of a pool.
        canary = await s.worker("prefill").canary("decode-1", 4)
        assert not canary["ok"]
        assert "float32, blocks of 16 tokens" in canary["error"] and "bfloat16" in canary["error"]


@pytest.mark.parametrize(("prefill_size", "decode_size"), [(16, 64), (48, 16)])
async def test_pools_of_other_block_sizes_give_the_same_tokens(smollm2, prefill_size, decode_size):
    rows = [load()[index] for index in (0, 2, 18)]
    sizes = {"engine": {"block_size": prefill_size}, "decode_engine": {"block_size": decode_size}}
    async with service(smollm2, **sizes, kv_return=True) as s:
        for _ in range(2):  # the second time the prefix caches of both sides know the prompts
            answers = await asyncio.gather(*(s.generate(request(row["prompt"], 32)) for row in rows))
            for row, answer in zip(rows, answers, strict=True):
                assert answer.token_ids[0] == row["output"], row["question"]
                assert answer.timings.decode_cached_tokens % max(prefill_size, decode_size) == 0
            await s.settle()
        assert sum(answer.timings.decode_cached_tokens for answer in answers) > 0
        result = await s.worker("prefill").canary("decode-1", 3)
        assert result["ok"], result["error"]
        returned = s.worker("decode").status()
        assert returned["kv_returned_blocks"] > 0 and not returned["kv_returns_dropped"], returned


async def test_canary_checks_a_pair_end_to_end(tiny):
    async with service(tiny, engine=DUMMY) as s:
        result = await s.worker("prefill").canary("decode-1", 8)
        assert result["ok"], result["error"]
        assert result["bytes"] == 8 * s.worker("decode").engine.layout.block_bytes
        missing = await s.worker("prefill").canary("nobody", 8)
        assert not missing["ok"] and "nobody" in missing["error"]


async def test_an_idle_worker_measures_its_links_once(tiny):
    async with service(tiny, engine=DUMMY) as s:
        prefill, decode = s.worker("prefill"), s.worker("decode")
        prefill._measures_links = True
        answer = await s.generate(request(list(range(40)), 4, ignore_eos=True))
        async with asyncio.timeout(10):
            while not any(link["gb_per_s"] for link in prefill.status()["links"]):
                await asyncio.sleep(0.05)
        (link,) = prefill.status()["links"]
        assert (link["worker_id"], link["transport"]) == ("decode-1", "grpc")
        measured = link["gb_per_s"]
        heard = {"decode-1": {"transport": "grpc", "gb_per_s": measured}}
        async with asyncio.timeout(5):
            while s.router.status()["workers"]["prefill-0"]["links"] != heard:
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.2)
        assert prefill.status()["links"][0]["gb_per_s"] == measured
        assert decode.status()["kv_bytes_received"] == answer.timings.kv_transfer_bytes


async def test_a_full_decode_worker_does_not_hold_up_another(tiny):
    """The scheduler's budget for prompts that wait for pages is counted for each receiver apart."""
    small = {"num_blocks": 10, "max_model_len": 160}
    async with service(tiny, decode=2, engine={**DUMMY, **small}, router={"decode_slack_sequences": 64}) as s:
        hog = asyncio.create_task(s.generate(request(list(range(64)), 90, ignore_eos=True, session_id="a")))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(s.generate(request(list(range(100, 190)), 60, ignore_eos=True, session_id="a")))
        await asyncio.sleep(0.05)
        quick = [request([i, i + 1, i + 2], 4, ignore_eos=True, session_id=f"s{i}") for i in range(6)]
        await asyncio.gather(*(s.generate(one) for one in quick), hog, waiting)


async def test_timings_say_where_the_time_went(smollm2):
    async with service(smollm2, engine={"max_num_batched_tokens": 64}) as s:
        timings = (await s.generate(request(load()[18]["prompt"], 8, ignore_eos=True))).timings
        spans = {
            name: getattr(timings, name).ToNanoseconds() / 1e9
            for name in ("queue", "prefill", "kv_transfer", "decode_queue", "time_to_first_token", "decode")
        }
        assert all(seconds > 0 for seconds in spans.values()), spans
        assert spans["prefill"] > spans["queue"], "an idle service computes five chunks of 64 tokens; nothing waits"
        assert spans["prefill"] <= spans["time_to_first_token"]


async def test_load_of_many_small_requests(tiny):
    async with service(tiny, prefill=2, decode=2, engine=DUMMY) as s:
        asked = [request([7 * i % 1000 + j for j in range(5 + i % 40)], 1 + i % 9, seed=i) for i in range(150)]
        answers = await asyncio.gather(*(s.generate(one) for one in asked))
        assert all(answer.usage.completion_tokens >= 1 for answer in answers)
        used = {answer.timings.prefill_worker for answer in answers}
        assert used == {"prefill-0", "prefill-1"}
