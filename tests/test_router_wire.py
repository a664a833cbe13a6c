"""The public port as foreign clients see it: bytes that are no message, sizes, error details, health, reflection."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from protos import worker_pb2 as wpb
from router.config import Limits
from router.server import Router
from tests.router_front import Front, routed
from tests.test_router import ask, expected

SERVICE = "pdserve.v1.InferenceService"


async def status_of(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """The status and its google.rpc details by type name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    details = {}
    status = rpc_status.from_call(error)
    for box in status.details if status is not None else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if box.Is(kind.DESCRIPTOR):
                details[kind.DESCRIPTOR.name] = kind.FromString(box.value)
    return error.code(), details


def raw(front: Front, method: str) -> Any:
    return front.channel.unary_unary(f"/{SERVICE}/{method}")


BAD_UTF8 = b"\x1a\x02\xff\xfe"  # field 3 (text), two bytes that are no UTF-8


async def test_bytes_that_are_no_request(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        for data in (BAD_UTF8, b"\x0a", b"\xff" * 10):
            code, details = await status_of(raw(front, "Generate")(data, timeout=5))
            assert code is grpc.StatusCode.INVALID_ARGUMENT, data
            assert details["ErrorInfo"].reason == "INVALID_PARAMETER" and details["ErrorInfo"].domain == "pdserve"
            assert "UTF-8" in details["BadRequest"].field_violations[0].description
        stream = front.channel.unary_stream(f"/{SERVICE}/GenerateStream")(BAD_UTF8, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stream))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert list((await front.client.Generate(ask(), timeout=5)).outputs[0].token_ids) == expected(8)


async def test_five_megabytes(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.client.Generate(ask(text="x" * 5_000_000), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "4194304" in caught.value.details()
        code, details = await status_of(front.client.Generate(ask(text="x " * 2_000_000), timeout=20))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and details["ErrorInfo"].reason == "PROMPT_TOO_LONG"
        assert (await front.client.Generate(ask(), timeout=5)).usage.completion_tokens == 8


BAD: dict[str, tuple[pb.GenerateRequest, grpc.StatusCode, str, str]] = {
    "empty prompt": (ask(text=""), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", "text"),
    "too long": (
        ask(token_ids=pb.TokenIds(ids=[5] * 8192)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "PROMPT_TOO_LONG",
        "token_ids",
    ),
    "token id": (
        ask(token_ids=pb.TokenIds(ids=[49152])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_PARAMETER",
        "token_ids.ids[0]",
    ),
    "nan": (
        ask(sampling=pb.SamplingParams(temperature=float("nan"))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_PARAMETER",
        "sampling.temperature",
    ),
    "top_p": (
        ask(sampling=pb.SamplingParams(top_p=0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_PARAMETER",
        "sampling.top_p",
    ),
    "max_tokens": (ask(2**32 - 1), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", "stopping.max_tokens"),
    "model": (ask(model="other"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", ""),
}


@pytest.mark.parametrize("name", BAD)
async def test_refusals_carry_details(smollm2: Path, name: str) -> None:
    request, code, reason, field = BAD[name]
    async with routed(smollm2) as front:
        got, details = await status_of(front.client.Generate(request, timeout=5))
        assert (got, details["ErrorInfo"].reason) == (code, reason)
        if field:
            (violation,) = details["BadRequest"].field_violations
            assert violation.field == field
            assert "allowed" in violation.description or "needed" in violation.description
        assert front.cluster.workers["p0"].log == [] and front.cluster.workers["d0"].log == []


async def test_what_may_be_tried_again_says_when(smollm2: Path) -> None:
    async with routed(smollm2, decode=0, limits=Limits(max_queued_requests=1)) as front:
        code, details = await status_of(front.client.Generate(ask(), timeout=5))
        assert code is grpc.StatusCode.UNAVAILABLE and details["ErrorInfo"].reason == "NO_HEALTHY_WORKER"
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0


async def test_a_bug_of_ours_is_internal_and_others_go_on(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with routed(smollm2) as front:
        with monkeypatch.context() as patch:
            patch.setattr(front.router.tokenizer, "encode", lambda *_: 1 / 0)
            code, details = await status_of(front.client.Generate(ask(), timeout=5))
        assert code is grpc.StatusCode.INTERNAL and details["ErrorInfo"].reason == "INTERNAL"
        assert (await front.client.Generate(ask(), timeout=5)).usage.completion_tokens == 8


async def test_health_follows_the_pool(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        health = health_pb2_grpc.HealthStub(front.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        states = aiter(watch)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        front.cluster.workers["d0"].set_state(wpb.WORKER_STATE_UNHEALTHY)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        front.cluster.workers["d0"].set_state(wpb.WORKER_STATE_READY)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        await front.router.drain()
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        overall = await health.Check(health_pb2.HealthCheckRequest())
        assert overall.status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_lists_the_service(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        stub = reflection_pb2_grpc.ServerReflectionStub(front.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        answer = await anext(aiter(call))
        names = {s.name for s in answer.list_services_response.service}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_every_method_is_served(smollm2: Path) -> None:
    methods = pb.DESCRIPTOR.services_by_name["InferenceService"].methods
    async with routed(smollm2) as front:
        for method in methods:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(front, method.name)(b"\xff" * 5, timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method.name


async def test_a_taken_port_is_an_error(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        port = int(front.router.address.rpartition(":")[2])
        from router.config import RouterConfig

        second = Router(RouterConfig("m", port=port), smollm2)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            await second.start()
        await second.stop()


async def test_stop_ends_what_runs(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["d0"].faults.stall_decode = True
        async with grpc.aio.insecure_channel(front.router.address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(ask(), timeout=20)
            await front.until(lambda: front.router.admission.phases() == {"decoding": 1})
            await front.router.stop()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_the_router_loads_no_engine() -> None:
    code = (
        "import sys, router.server; print([m for m in ('torch', 'ray', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
