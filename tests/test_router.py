"""Requests through the router over stub workers: streams, batches, several sequences, stops, admission, membership."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from tests.router_front import Front, routed
from tests.stub_tokens import token
from tests.stub_workers import StubWorker


def ask(max_tokens: int = 8, seed: int = 7, n: int = 1, **fields: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(seed=seed, num_sequences=n),
        stopping=pb.StoppingCriteria(max_tokens=max_tokens),
        response=pb.ResponseOptions(token_ids=True),
    )
    request.MergeFrom(pb.GenerateRequest(**{"text": "a prompt", **fields}))
    return request


def expected(num_tokens: int, seed: int = 7, index: int = 0) -> list[int]:
    return [token(seed, index, p) for p in range(num_tokens)]


async def read(call: Any) -> list[pb.GenerateStreamResponse]:
    messages = [message async for message in call]
    assert messages[0].HasField("prompt_info") and not any(m.HasField("prompt_info") for m in messages[1:])
    assert messages[-1].HasField("usage") and messages[-1].HasField("timings")
    assert len({m.request_id for m in messages}) == 1
    offsets: Counter[int] = Counter()
    for message in messages:
        if message.HasField("delta"):
            assert message.delta.token_offset == offsets[message.delta.index]
            offsets[message.delta.index] += message.delta.num_tokens
    assert offsets.total() == messages[-1].usage.completion_tokens
    return messages


def ids_of(messages: list[pb.GenerateStreamResponse], index: int = 0) -> list[int]:
    return [i for m in messages if m.HasField("delta") and m.delta.index == index for i in m.delta.token_ids]


def text_of(messages: list[pb.GenerateStreamResponse], index: int = 0) -> str:
    return "".join(m.delta.text for m in messages if m.delta.index == index)


def finish_of(messages: list[pb.GenerateStreamResponse], index: int = 0) -> pb.FinishInfo:
    found = [m.finish_info for m in messages if m.HasField("finish_info") and m.finish_info.index == index]
    assert len(found) == 1
    return found[0]


async def test_stream(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        messages = await read(front.client.GenerateStream(ask(20, request_id="my-id"), timeout=10))
        assert ids_of(messages) == expected(20)
        assert text_of(messages) == front.router.tokenizer.decode(expected(20), True)
        assert messages[0].request_id == "my-id"
        finish = finish_of(messages)
        assert (finish.finish_reason, finish.seed) == (pb.FINISH_REASON_LENGTH, 7)
        timings = messages[-1].timings
        assert (timings.prefill_worker, timings.decode_worker, timings.retries) == ("p0", "d0", 0)
        assert timings.kv_transfer_bytes > 0 and timings.kv_transport == "local" and not timings.local_prefill
        assert timings.time_to_first_token.ToNanoseconds() > 0 and timings.decode.ToNanoseconds() > 0
        request = front.cluster.workers["p0"].requests[0]
        assert list(request.token_ids) == front.router.tokenizer.encode("a prompt")
        assert 0 < request.remaining.ToSeconds() <= 10 and not request.stopping.stop
        assert front.cluster.workers["d0"].events() == ["expect", "adopted", "finished"]


async def test_the_first_token_does_not_wait_for_the_transfer(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["p0"].faults.transfer_delay_s = 0.3
        call = front.client.GenerateStream(ask(3), timeout=10)
        first = await asyncio.wait_for(anext(aiter(call)), 0.2)
        assert list(first.delta.token_ids) == expected(1)
        rest = [m async for m in call]
        assert [i for m in rest for i in m.delta.token_ids] == expected(3)[1:]
        assert rest[-1].timings.kv_transfer.ToMilliseconds() >= 250


async def test_decode_may_overtake_the_first_token(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["p0"].faults.hold_first_tokens_s = 0.1
        messages = await read(front.client.GenerateStream(ask(5), timeout=10))
        assert ids_of(messages) == expected(5)
        assert messages[0].delta.token_offset == 0


async def test_unary_equals_stream(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        answer = await front.client.Generate(ask(12, n=2), timeout=10)
        for index, output in enumerate(answer.outputs):
            assert list(output.token_ids) == expected(12, index=index)
            assert output.text == front.router.tokenizer.decode(output.token_ids, True)
            assert output.finish_info.finish_reason == pb.FINISH_REASON_LENGTH
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 24)


async def test_sequences_end_on_their_own(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        for worker in front.cluster.workers.values():
            worker.faults.finish_at = {0: 0, 1: 3}
        messages = await read(front.client.GenerateStream(ask(8, n=3), timeout=10))
        assert [len(ids_of(messages, i)) for i in range(3)] == [1, 4, 8]
        assert finish_of(messages, 0).eos_token_id == finish_of(messages, 1).eos_token_id == 2
        assert finish_of(messages, 2).finish_reason == pb.FINISH_REASON_LENGTH
        assert text_of(messages, 0) == ""


async def test_one_token_needs_no_decode_worker(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        messages = await read(front.client.GenerateStream(ask(1), timeout=10))
        assert ids_of(messages) == expected(1)
        timings = messages[-1].timings
        assert (timings.decode_worker, timings.kv_transfer_bytes, timings.kv_transport) == ("", 0, "")
        assert front.cluster.workers["d0"].log == []


async def test_over_by_the_first_token(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["p0"].faults.finish_at = {0: 0}
        messages = await read(front.client.GenerateStream(ask(8), timeout=10))
        assert finish_of(messages).finish_reason == pb.FINISH_REASON_STOP
        assert messages[-1].timings.decode_worker == "" and messages[-1].usage.completion_tokens == 1
        decode = front.cluster.workers["d0"]
        await front.until(lambda: decode.events() == ["expect", "cancel"])


async def test_stop_string_across_tokens(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        whole = front.router.tokenizer.decode(expected(12), True)
        ends = [len(front.router.tokenizer.decode(expected(n), True)) for n in range(13)]
        stop = whole[ends[5] - 2 : ends[6] + 1]  # the end of token 4, all of token 5, the start of token 6
        request = ask(200, stopping=pb.StoppingCriteria(stop=["never in there", stop]))
        messages = await read(front.client.GenerateStream(request, timeout=10))
        assert text_of(messages) == whole[: whole.index(stop)]
        assert finish_of(messages).stop_string == stop
        assert messages[-1].usage.completion_tokens == 7
        decode = front.cluster.workers["d0"]
        await front.until(lambda: decode.events("cancel") == ["cancel"])
        request.stopping.include_stop_str_in_output = True
        assert text_of(await read(front.client.GenerateStream(request, timeout=10))).endswith(stop)
        request.stopping.min_tokens = 9
        request.stopping.max_tokens = 20
        messages = await read(front.client.GenerateStream(request, timeout=10))
        assert finish_of(messages).finish_reason == pb.FINISH_REASON_LENGTH and len(ids_of(messages)) == 20


async def test_stop_token(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        stop = expected(5)[4]
        stopping = pb.StoppingCriteria(stop_token_ids=[stop])
        messages = await read(front.client.GenerateStream(ask(9, stopping=stopping), timeout=10))
        assert ids_of(messages) == expected(5) and finish_of(messages).stop_token_id == stop
        assert text_of(messages) == front.router.tokenizer.decode(expected(4), True)


async def test_response_options(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        options = pb.ResponseOptions(text=False, logprobs=2, prompt_token_ids=True, token_ids=True)
        messages = await read(front.client.GenerateStream(ask(4, response=options), timeout=10))
        assert text_of(messages) == ""
        logprobs = [lp for m in messages for lp in m.delta.logprobs]
        assert [lp.token_id for lp in logprobs] == expected(4)
        spell = front.router.tokenizer.vocabulary.token_bytes
        assert all(lp.token == spell(lp.token_id) and len(lp.top) == 2 for lp in logprobs)
        assert all(t.token == spell(t.token_id) for lp in logprobs for t in lp.top)
        assert list(messages[0].prompt_info.token_ids) == front.router.tokenizer.encode("a prompt")


async def test_colocated_worker_alone(smollm2: Path) -> None:
    async with routed(smollm2, prefill=0, decode=0, both=1) as front:
        messages = await read(front.client.GenerateStream(ask(6, n=2), timeout=10))
        assert ids_of(messages, 1) == expected(6, index=1)
        timings = messages[-1].timings
        assert timings.local_prefill and timings.kv_transfer_bytes == 0
        assert (timings.prefill_worker, timings.decode_worker) == ("b0", "b0")


async def test_mixed_cluster_uses_the_idle_colocated_worker(smollm2: Path) -> None:
    async with routed(smollm2, both=1, decode_slack_sequences=1) as front:
        for worker in front.cluster.workers.values():
            worker.faults.step_s = 0.02
        calls = [front.client.Generate(ask(10, seed=i), timeout=10) for i in range(8)]
        answers = await asyncio.gather(*calls)
        assert {a.timings.decode_worker for a in answers} == {"d0", "b0"}


async def test_load_spreads_and_sessions_stick(smollm2: Path) -> None:
    async with routed(smollm2, prefill=2, decode=3) as front:
        for worker in front.cluster.workers.values():
            worker.faults.step_s = 0.01
        answers = await asyncio.gather(*(front.client.Generate(ask(20, seed=i), timeout=10) for i in range(24)))
        assert {a.timings.decode_worker for a in answers} == {"d0", "d1", "d2"}
        for name in ("one", "two", "three"):
            used = set()
            for i in range(4):
                answer = await front.client.Generate(ask(2, text=f"text {i}", session_id=name), timeout=10)
                used.add((answer.timings.prefill_worker, answer.timings.decode_worker))
            assert len(used) == 1


async def test_batch(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        requests = [ask(3 + i, seed=i) for i in range(6)]
        requests[2].sampling.top_p = 0
        requests[3].request_id = requests[4].request_id = "same"
        call = front.client.GenerateBatch(pb.GenerateBatchRequest(requests=requests), timeout=10)
        results = {r.index: r async for r in call}
        assert sorted(results) == list(range(6))
        for i in (0, 1, 3, 5):
            assert list(results[i].response.outputs[0].token_ids) == expected(3 + i, seed=i)
        assert results[2].error.reason == pb.ERROR_REASON_INVALID_PARAMETER
        assert results[2].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert results[4].error.reason == pb.ERROR_REASON_DUPLICATE_REQUEST_ID


async def test_abort(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["d0"].faults.step_s = 0.02
        call = front.client.GenerateStream(ask(1000, n=2, request_id="long"), timeout=20)
        head = [await anext(aiter(call)) for _ in range(6)]
        answer = await front.client.Abort(pb.AbortRequest(request_ids=["long", "long", "unknown"]), timeout=5)
        assert answer.aborted == 1
        messages = head + [m async for m in call]
        assert [finish_of(messages, i).finish_reason for i in range(2)] == [pb.FINISH_REASON_ABORTED] * 2
        assert messages[-1].usage.completion_tokens == sum(m.delta.num_tokens for m in messages)
        decode = front.cluster.workers["d0"]
        await front.until(lambda: decode.events("cancel") == ["cancel"])
        front.cluster.workers["p0"].faults.stall_prefill = True
        call = front.client.GenerateStream(ask(10, request_id="early"), timeout=20)
        await front.until(lambda: "early" in front.router.admission._tickets)
        await front.client.Abort(pb.AbortRequest(request_ids=["early"]), timeout=5)
        messages = [m async for m in call]
        assert finish_of(messages).finish_reason == pb.FINISH_REASON_ABORTED
        assert messages[-1].usage.completion_tokens == 0


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_duplicate_and_full_queue(smollm2: Path) -> None:
    from router.config import Limits

    async with routed(smollm2, limits=Limits(max_queued_requests=2)) as front:
        front.cluster.workers["p0"].faults.stall_prefill = True
        calls = [front.client.Generate(ask(request_id=f"r{i}"), timeout=30) for i in range(2)]
        await front.until(lambda: front.router.admission.num_in_flight == 2)
        code, words = await failure(front.client.Generate(ask(request_id="r0"), timeout=5))
        assert code is grpc.StatusCode.ALREADY_EXISTS and "'r0'" in words
        code, words = await failure(front.client.Generate(ask(request_id="r2"), timeout=5))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "max_queued_requests is 2" in words
        for call in calls:
            call.cancel()
        await front.settled()
        front.cluster.workers["p0"].faults.stall_prefill = False
        await front.client.Generate(ask(request_id="r0"), timeout=5)


async def test_prompt_that_never_fits(smollm2: Path) -> None:
    async with routed(smollm2, decode=0) as front:
        await front.cluster.add("d0", "decode", num_blocks=4)
        front.router.set_members(front.cluster.members())
        await front.until(lambda: front.router.pool.num_ready() == (1, 1))
        long = pb.TokenIds(ids=[5] * 64)
        code, words = await failure(front.client.Generate(ask(token_ids=long), timeout=5))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "needs 5 KV blocks; worker 'd0' has 4" in words
        await front.client.Generate(ask(2, token_ids=pb.TokenIds(ids=[5] * 63)), timeout=5)


async def test_no_worker_and_starting_worker(smollm2: Path) -> None:
    async with routed(smollm2, decode=0, start_wait_s=5.0) as front:
        code, words = await failure(front.client.Generate(ask(), timeout=5))
        assert code is grpc.StatusCode.UNAVAILABLE and "1 prefill and 0 decode workers" in words
        late = await front.cluster.add("d0", "decode", start=False)
        late.state = wpb.WORKER_STATE_STARTING
        await late.start()
        front.router.set_members([*(w.member() for w in front.cluster.workers.values())])
        call = front.client.Generate(ask(), timeout=5)
        await asyncio.sleep(0.2)
        late.set_state(wpb.WORKER_STATE_READY)
        assert list((await call).outputs[0].token_ids) == expected(8)


async def test_incompatible_workers(smollm2: Path) -> None:
    async with routed(smollm2, decode=0) as front:
        await front.cluster.add("d0", "decode", fingerprint="e" * 64)
        front.router.set_members(front.cluster.members())
        await front.until(lambda: front.router.pool.num_ready() == (1, 1))
        code, words = await failure(front.client.Generate(ask(), timeout=5))
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "ffffffffffff" in words and "eeeeeeeeeeee" in words


def with_state(worker: StubWorker, state: wpb.WorkerState, front: Front) -> list[wpb.Member]:
    others = [w.member() for w in front.cluster.workers.values() if w is not worker]
    return [*others, worker.member(state)]


@pytest.mark.parametrize("told_by", ["membership", "worker"])
async def test_draining_worker_finishes_what_it_has(smollm2: Path, told_by: str) -> None:
    async with routed(smollm2, prefill=2, decode=2) as front:
        for worker in front.cluster.workers.values():
            worker.faults.step_s = 0.01
        call = front.client.GenerateStream(ask(60, session_id="s"), timeout=20)
        head = [await anext(aiter(call)) for _ in range(4)]
        client = next(c for c in front.router.pool.workers.values() if c.num_sequences)
        draining = front.cluster.workers[client.worker_id]
        if told_by == "membership":
            front.router.set_members(with_state(draining, wpb.WORKER_STATE_DRAINING, front))
        else:
            draining.set_state(wpb.WORKER_STATE_DRAINING)  # news may come late: a refused Expect is retried
        answers = await asyncio.gather(
            *(front.client.Generate(ask(4, seed=i, session_id="s"), timeout=10) for i in range(4))
        )
        assert {a.timings.decode_worker for a in answers}.isdisjoint({draining.worker_id})
        messages = head + [m async for m in call]
        assert ids_of(messages) == expected(60)
        assert messages[-1].timings.decode_worker == draining.worker_id


async def test_router_drain(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["d0"].faults.step_s = 0.01
        call = front.client.Generate(ask(30), timeout=10)
        await front.until(lambda: front.router.admission.num_in_flight == 1)
        drain = asyncio.create_task(front.router.drain())
        await asyncio.sleep(0)
        code, _ = await failure(front.client.Generate(ask(), timeout=5))
        assert code is grpc.StatusCode.UNAVAILABLE and not drain.done()
        assert list((await call).outputs[0].token_ids) == expected(30)
        await drain


async def test_many_at_once(smollm2: Path) -> None:
    async with routed(smollm2, prefill=2, decode=2) as front:
        calls = [read(front.client.GenerateStream(ask(5 + i % 20, seed=i), timeout=30)) for i in range(100)]
        for i, messages in enumerate(await asyncio.gather(*calls)):
            assert ids_of(messages) == expected(5 + i % 20, seed=i)


async def test_tokenizer_methods(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        client, tokenizer = front.client, front.router.tokenizer
        answer = await client.Tokenize(pb.TokenizeRequest(text="é 🦜", return_token_bytes=True))
        assert list(answer.token_ids) == tokenizer.encode("é 🦜") and b"".join(answer.token_bytes) == "é 🦜".encode()
        assert answer.max_model_len == 8192
        chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hi")])
        ids = (await client.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
        text = (await client.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text
        assert "<|im_start|>user\nHi<|im_end|>" in text
        text = (await client.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=True))).text
        assert "<|im_start|>" not in text
        code, words = await failure(client.Detokenize(pb.DetokenizeRequest(token_ids=[49152])))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "49152" in words
        code, _ = await failure(client.Tokenize(pb.TokenizeRequest(model="x", text="y")))
        assert code is grpc.StatusCode.NOT_FOUND
        long = "word " * 20_000
        assert len((await client.Tokenize(pb.TokenizeRequest(text=long))).token_ids) == len(tokenizer.encode(long))


async def test_models_and_server_info(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["d0"].max_model_len = 8192
        (model,) = (await front.client.ListModels(pb.ListModelsRequest())).models
        assert (model.id, model.vocab_size, model.max_model_len) == ("stub", 49152, 8192)
        assert model.supports_chat and list(model.eos_token_ids) == [2]
        info = await front.client.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.ready_prefill_workers, info.ready_decode_workers) == (1, 1)
        assert info.limits.max_request_bytes == 4 * 1024 * 1024
