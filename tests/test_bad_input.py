"""Bad input to the whole service: the status names field, value and allowed range, and the engines go on."""

import asyncio
import math
from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import inference_pb2 as pb
from tests.references import load
from tests.service import Service, request, service

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def asked(prompt: list[int] | str = (1, 2, 3), **fields) -> pb.GenerateRequest:  # type: ignore[assignment]
    """A good request but for what `fields` change."""
    good = request(list(prompt) if not isinstance(prompt, str) else prompt, 4)
    good.MergeFrom(pb.GenerateRequest(**fields))
    return good


def sampled(**fields) -> pb.GenerateRequest:
    return asked(sampling=pb.SamplingParams(**fields))


def stopping(**fields) -> pb.GenerateRequest:
    return asked(stopping=pb.StoppingCriteria(**fields))


# name: request, status, field in the BadRequest, words in the message (value and allowed range)
CASES: dict[str, tuple[pb.GenerateRequest, grpc.StatusCode, str, tuple[str, ...]]] = {
    "empty prompt": (pb.GenerateRequest(text=""), INVALID, "text", ("empty",)),
    "no prompt": (pb.GenerateRequest(), INVALID, "prompt", ()),
    "too long": (asked([5] * 300), INVALID, "token_ids", ("300", "255")),
    "token id out of range": (asked([1, 49152]), INVALID, "token_ids", ("49152", "49151")),
    "NaN temperature": (sampled(temperature=math.nan), INVALID, "sampling.temperature", ("nan", "[0, 2]")),
    "infinite bias": (sampled(logit_bias={1: math.inf}), INVALID, "sampling.logit_bias", ("inf", "100")),
    "top_p 0": (sampled(top_p=0.0), INVALID, "sampling.top_p", ("0", "(0, 1]")),
    "top_k -2": (sampled(top_k=-2), INVALID, "sampling.top_k", ("-2",)),
    "n 1000": (sampled(num_sequences=1000), INVALID, "sampling.num_sequences", ("1000", "16")),
    "max_tokens 0": (stopping(max_tokens=0), INVALID, "stopping.max_tokens", ("0",)),
    "max_tokens -1 on the wire": (
        stopping(max_tokens=2**32 - 1),
        INVALID,
        "stopping.max_tokens",
        ("4294967295", "253"),
    ),
    "min_tokens above max": (stopping(min_tokens=9), INVALID, "stopping.min_tokens", ("9", "4")),
    "empty stop string": (stopping(stop=[""]), INVALID, "stopping.stop", ()),
    "unknown model": (asked(model="gpt-5"), grpc.StatusCode.NOT_FOUND, "", ("gpt-5", "test-model")),
    "bad id": (asked(request_id="a b"), INVALID, "request_id", ("a b",)),
    "bad role": (
        pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(content="hi")])),
        INVALID,
        "chat.messages",
        (),
    ),
}


@pytest.fixture(scope="module")
def sizes() -> dict:
    return {"num_blocks": 64, "max_model_len": 256}


async def good_answer(s: Service) -> None:
    row = load()[0]
    assert (await s.generate(request(row["prompt"], 32))).token_ids[0] == row["output"]


async def test_each_bad_field_is_named_and_the_engines_go_on(smollm2, sizes):
    async with service(smollm2, engine=sizes) as s:
        steps = [worker.status()["steps"] for worker in s.workers]
        for name, (bad, code, field, words) in CASES.items():
            for call in (s.stub.Generate, lambda one: drain(s.stub.GenerateStream(one))):
                error = await refusal(call, bad)
                assert error.code() == code, (name, error)
                assert all(word in error.details() for word in words), (name, error.details())
                assert field_of(error).startswith(field), (name, field_of(error))
        assert [worker.status()["steps"] for worker in s.workers] == steps, "nothing bad reached an engine"
        await good_answer(s)


async def test_a_bad_item_fails_alone_in_its_batch(smollm2, sizes):
    row = load()[0]
    items = [request(row["prompt"], 32), sampled(top_p=0.0), request(row["prompt"], 32)]
    async with service(smollm2, engine=sizes) as s:
        results = {}
        async for answer in s.stub.GenerateBatch(pb.GenerateBatchRequest(requests=items), timeout=60.0):
            results[answer.index] = answer
        assert results[1].error.code == INVALID.value[0] and "top_p" in results[1].error.message
        for index in (0, 2):
            assert list(results[index].response.outputs[0].token_ids) == row["output"]


async def test_duplicate_id_while_the_first_runs(smollm2, sizes):
    async with service(smollm2, engine=sizes) as s:
        first = asyncio.create_task(s.generate(request(load()[0]["prompt"], 32, request_id="mine")))
        while not s.router.status()["running_requests"]:
            await asyncio.sleep(0.01)
        error = await refusal(s.stub.Generate, asked(request_id="mine"))
        assert error.code() == grpc.StatusCode.ALREADY_EXISTS and "mine" in error.details()
        assert (await first).token_ids[0] == load()[0]["output"]
        await s.generate(request(load()[0]["prompt"], 2, request_id="mine"))


async def test_bytes_that_are_no_request_and_messages_too_large(smollm2, sizes):
    async with service(smollm2, engine=sizes) as s, grpc.aio.insecure_channel(s.router.address) as channel:
        raw = channel.unary_unary("/pdserve.v1.InferenceService/Generate")  # bytes as they are
        error = await refusal(raw, b"\x1a\x02\xff\xfe")  # field 3, text: no UTF-8
        assert error.code() == INVALID
        error = await refusal(raw, b"\x07\x07\x07")
        assert error.code() == INVALID
        five_megabytes = pb.GenerateRequest(text="a" * 5_000_000).SerializeToString()
        error = await refusal(raw, five_megabytes)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and str(4 << 20) in error.details()
        await good_answer(s)


async def refusal(call: Callable, message) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await asyncio.wait_for(call(message), 10.0)
    return refused.value


async def drain(stream) -> None:
    async for _ in stream:
        pass


def field_of(error: grpc.aio.AioRpcError) -> str:
    """Of the BadRequest; "" where there is none. Every refusal has an ErrorInfo of ours."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    found, domains = "", []
    for box in status.details:
        if box.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            found = error_details_pb2.BadRequest.FromString(box.value).field_violations[0].field
        if box.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            domains.append(error_details_pb2.ErrorInfo.FromString(box.value).domain)
    assert domains == ["pdserve"], error
    return found
