"""What goes wrong behind or before the router: the request is retried, resumed, or fails with a reason; nothing hangs,
nothing wrong or twice reaches the client, and nothing is left at any worker."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from protos import worker_pb2 as wpb
from tests.router_front import Front, routed
from tests.test_router import ask, expected, failure, finish_of, ids_of, read, text_of

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def failed(reason: pb.ErrorReason, retryable: bool) -> wpb.Failed:
    return wpb.Failed(reason=reason, message="a stub's fault", retryable=retryable)


def attempts(front: Front) -> list[int]:
    return sorted(r.attempt for w in front.cluster.workers.values() if w.role == "prefill" for r in w.requests)


FAULTS: dict[str, dict[str, Any]] = {
    "dies": {"die_after_first_tokens": True},
    "ends early": {"end_prefill_early": True},
    "unavailable": {"refuse_prefill": UNAVAILABLE},
    "full": {"refuse_prefill": grpc.StatusCode.RESOURCE_EXHAUSTED},
    "fails": {"prefill_failure": failed(pb.ERROR_REASON_INTERNAL, True)},
    "silent": {"stall_prefill": True},
    "silent transfer": {"stall_transfer": True},
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_prefill_fault_is_retried_elsewhere(smollm2: Path, fault: str) -> None:
    async with routed(smollm2, prefill=2, progress_s=0.5) as front:
        for name, value in FAULTS[fault].items():
            setattr(front.cluster.workers["p0"].faults, name, value)
        seeds = [0, 1, 2, 3]
        calls = [read(front.client.GenerateStream(ask(10, seed=i, text=f"{i} text"), timeout=20)) for i in seeds]
        results = await asyncio.gather(*calls)
        for i, messages in zip(seeds, results, strict=True):
            assert ids_of(messages) == expected(10, seed=i)
            assert messages[-1].timings.prefill_worker == "p1"
        retried = [m for m in results if m[-1].timings.retries]
        assert len(retried) == len(front.cluster.workers["p0"].requests)
        decode = front.cluster.workers["d0"]
        await front.until(lambda: decode.events().count("cancel") == len(retried))


async def test_decode_fault_before_adoption_is_retried_elsewhere(smollm2: Path) -> None:
    async with routed(smollm2, decode=2) as front:
        front.cluster.workers["d0"].faults.decode_failure = failed(pb.ERROR_REASON_KV_TRANSFER_FAILED, True)
        for i in range(4):
            messages = await read(front.client.GenerateStream(ask(10, seed=i, text=f"{i} text"), timeout=20))
            assert ids_of(messages) == expected(10, seed=i)
            assert messages[-1].timings.decode_worker == "d1"


@pytest.mark.parametrize("how", ["session", "failure", "death"])
@pytest.mark.parametrize("at", [1, 5, 9])
async def test_a_stream_resumes_on_another_decode_worker(smollm2: Path, how: str, at: int) -> None:
    async with routed(smollm2, decode=2) as front:
        bad = front.cluster.workers["d0"]
        bad.faults.step_s = 0.005
        if how != "death":
            bad.faults.fail_after_tokens = at
        if how == "failure":
            bad.faults.decode_failure = failed(pb.ERROR_REASON_DECODE_WORKER_LOST, True)
        stop = front.router.tokenizer.decode(expected(10)[8:], True)
        # Which worker a key prefers is a hash's choice: take a session that prefers the bad one.
        session = await prefers(front, "d0")
        call = front.client.GenerateStream(
            ask(10, session_id=session, response=pb.ResponseOptions(logprobs=1)), timeout=20
        )
        if how == "death":
            reading = asyncio.create_task(read(call))
            await front.until(lambda: any(offset >= at for _, _, offset in bad.sent_at))
            await bad.stop()
            messages = await reading
        else:
            messages = await read(call)
        assert ids_of(messages) == expected(10)
        assert [lp.token_id for m in messages for lp in m.delta.logprobs] == expected(10)
        assert text_of(messages).endswith(stop)
        if how != "death" or at < 9:
            timings = messages[-1].timings
            assert (timings.retries, timings.decode_worker) == (1, "d1" if at < 9 else "")
            last = front.cluster.workers["p0"].requests[-1]
            assert last.attempt == 1 and len(last.token_ids) - last.num_prompt_tokens >= at
            assert list(last.token_ids[last.num_prompt_tokens :]) == expected(len(last.token_ids) - 2)


async def prefers(front: Front, worker_id: str) -> str:
    from router.policy import _score

    names = sorted(
        w.worker_id for w in front.cluster.workers.values() if w.role == front.cluster.workers[worker_id].role
    )
    for i in range(1000):
        if max(names, key=lambda n: _score(b"s" + str(i).encode(), n)) == worker_id:
            return str(i)
    raise AssertionError(worker_id)


async def test_a_stop_string_may_span_the_cut(smollm2: Path) -> None:
    async with routed(smollm2, decode=2) as front:
        front.cluster.workers["d0"].faults.fail_after_tokens = 5
        tokenizer = front.router.tokenizer
        stop = tokenizer.decode(expected(5)[4:], True)[-2:] + tokenizer.decode(expected(6)[5:], True)
        request = ask(session_id=await prefers(front, "d0"), stopping=pb.StoppingCriteria(max_tokens=50, stop=[stop]))
        messages = await read(front.client.GenerateStream(request, timeout=20))
        assert finish_of(messages).stop_string == stop
        assert messages[-1].timings.retries == 1 and messages[-1].usage.completion_tokens == 6
        whole = tokenizer.decode(expected(6), True)
        assert text_of(messages) == whole[: whole.index(stop)]


async def test_several_sequences_cannot_resume(smollm2: Path) -> None:
    async with routed(smollm2, decode=2) as front:
        for name in ("d0", "d1"):
            front.cluster.workers[name].faults.fail_after_tokens = 5
        code, words = await failure(front.client.Generate(ask(n=2), timeout=20))
        assert code is UNAVAILABLE and "was lost" in words


async def test_attempts_are_bounded(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["p0"].faults.prefill_failure = failed(pb.ERROR_REASON_KV_TRANSFER_FAILED, True)
        code, words = await failure(front.client.Generate(ask(), timeout=20))
        assert code is UNAVAILABLE and "a stub's fault" in words
        assert attempts(front) == [0, 1, 2]
        decode = front.cluster.workers["d0"]
        await front.until(lambda: decode.events("cancel") == ["cancel"] * 3)


async def test_what_must_not_be_retried_is_not(smollm2: Path) -> None:
    async with routed(smollm2, prefill=2) as front:
        for name in ("p0", "p1"):
            front.cluster.workers[name].faults.prefill_failure = failed(pb.ERROR_REASON_NON_FINITE_LOGITS, False)
        code, words = await failure(front.client.Generate(ask(), timeout=20))
        assert code is grpc.StatusCode.INTERNAL and "a stub's fault" in words
        assert attempts(front) == [0]


@pytest.mark.parametrize("fault", ["skip_offset", "repeat_offset"])
async def test_gaps_and_repeats_are_never_forwarded(smollm2: Path, fault: str) -> None:
    async with routed(smollm2) as front:
        setattr(front.cluster.workers["d0"].faults, fault, 4)
        call = front.client.GenerateStream(ask(10), timeout=20)
        got = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for message in call:
                got.extend(message.delta.token_ids)
        assert caught.value.code() is grpc.StatusCode.INTERNAL and "token offset" in caught.value.details()
        assert got == expected(4)


async def test_a_jump_in_the_session_is_a_loss(smollm2: Path) -> None:
    async with routed(smollm2, max_attempts=1) as front:
        front.cluster.workers["d0"].faults.jump_step = True
        code, words = await failure(front.client.Generate(ask(), timeout=20))
        assert code is UNAVAILABLE and "jumped from step" in words


PHASES: dict[str, dict[str, dict[str, Any]]] = {
    "prefilling": {"p0": {"stall_prefill": True}},
    "transferring": {"p0": {"stall_transfer": True}},
    "decoding": {"d0": {"stall_decode": True}},
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline"])
async def test_the_client_leaves_in_any_phase(smollm2: Path, phase: str, how: str) -> None:
    async with routed(smollm2) as front:
        for name, values in PHASES[phase].items():
            for field, value in values.items():
                setattr(front.cluster.workers[name].faults, field, value)
        address = front.router.address
        channel = grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        client = inference_pb2_grpc.InferenceServiceStub(channel)
        call = client.GenerateStream(ask(), timeout=1.0 if how == "deadline" else 30)
        await front.until(lambda: front.router.admission.phases() == {phase: 1})
        await front.until(lambda: bool(front.cluster.workers["p0"].requests))
        if how == "cancel":
            call.cancel()
        elif how == "disconnect":
            await channel.close(None)
        else:
            code, _ = await failure(read(call))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await front.settled()
        prefill, decode = front.cluster.workers["p0"], front.cluster.workers["d0"]
        await front.until(lambda: decode.events("cancel") == ["cancel"])
        if phase != "decoding":
            await front.until(lambda: prefill.events("prefill_cancelled") == ["prefill_cancelled"])
        await channel.close(None)


async def test_the_deadline_travels_and_a_batch_item_tells_it(smollm2: Path) -> None:
    async with routed(smollm2, max_run_s=0.3) as front:
        front.cluster.workers["d0"].faults.stall_decode = True
        call = front.client.GenerateBatch(pb.GenerateBatchRequest(requests=[ask()]), timeout=20)
        (result,) = [r async for r in call]
        assert result.error.reason == pb.ERROR_REASON_DEADLINE_EXCEEDED
        assert front.cluster.workers["p0"].requests[0].remaining.ToMilliseconds() <= 300


async def test_a_batch_leaves_nothing_when_its_client_goes(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["d0"].faults.stall_decode = True
        call = front.client.GenerateBatch(pb.GenerateBatchRequest(requests=[ask(seed=i) for i in range(8)]), timeout=20)
        await front.until(lambda: front.router.admission.num_in_flight == 8)
        call.cancel()
        await front.settled()


async def test_a_silent_decode_worker_is_given_up(smollm2: Path) -> None:
    async with routed(smollm2, decode=2, progress_s=0.3) as front:
        front.cluster.workers["d0"].faults.stall_decode = True
        session = await prefers(front, "d0")
        messages = await read(front.client.GenerateStream(ask(session_id=session), timeout=20))
        assert ids_of(messages) == expected(8) and messages[-1].timings.retries == 1


async def test_a_restarted_worker_under_its_old_name(smollm2: Path) -> None:
    async with routed(smollm2, retry_wait_s=10) as front:
        front.cluster.workers["d0"].faults.step_s = 0.01
        reading = asyncio.create_task(read(front.client.GenerateStream(ask(40), timeout=30)))
        await front.until(lambda: front.router.admission.phases() == {"decoding": 1})
        old = front.cluster.workers["d0"]
        await front.cluster.restart("d0")
        await front.until(lambda: front.router.pool.num_ready() == (1, 0))
        early = front.client.Generate(ask(), timeout=15)  # before anybody has said that the worker is lost
        await front.until(lambda: front.router.admission.num_in_flight == 2)
        lost = wpb.Member(worker_id="d0", role=wpb.WORKER_ROLE_DECODE, state=wpb.WORKER_STATE_STARTING)
        front.router.set_members([front.cluster.workers["p0"].member(), lost])
        late = front.client.Generate(ask(), timeout=15)
        await front.until(lambda: front.router.admission.num_in_flight == 3)
        await asyncio.sleep(0.2)
        assert front.router.admission.phases() == {"routing": 3}
        front.router.set_members(front.cluster.members())
        messages = await reading
        for call in (early, late):
            assert list((await call).outputs[0].token_ids) == expected(8)
        assert ids_of(messages) == expected(40) and messages[-1].timings.retries == 1
        assert old.incarnation != front.cluster.workers["d0"].incarnation


async def test_a_request_waits_for_a_restart_no_longer_than_it_should(smollm2: Path) -> None:
    async with routed(smollm2, start_wait_s=0.3) as front:
        lost = wpb.Member(worker_id="d0", role=wpb.WORKER_ROLE_DECODE, state=wpb.WORKER_STATE_STARTING)
        prefill = front.cluster.workers["p0"].member()
        for members, least_s in (([prefill, lost], 0.3), ([prefill], 0.0)):
            front.router.set_members(members)
            begun = time.monotonic()
            code, words = await failure(front.client.Generate(ask(), timeout=10))
            assert code is UNAVAILABLE and "no healthy worker" in words
            assert least_s <= time.monotonic() - begun < least_s + 1.0


async def test_another_incarnation_at_the_old_address_is_refused(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        old = front.cluster.workers["d0"]
        port = int(old.address.rpartition(":")[2])
        await old.stop()
        fresh = await front.cluster.add("d0", "decode", start=False)
        await fresh.start(port)
        client = front.router.pool.workers["d0"]
        await front.until(lambda: "answers at its address" in client.last_error)
        assert front.router.pool.num_ready() == (1, 0)
        front.router.set_members(front.cluster.members())
        await front.until(lambda: front.router.pool.num_ready() == (1, 1))
        assert (await front.client.Generate(ask(), timeout=10)).usage.completion_tokens == 8


async def test_a_removed_worker_hands_its_runs_on(smollm2: Path) -> None:
    async with routed(smollm2, decode=2) as front:
        session = await prefers(front, "d0")
        front.cluster.workers["d0"].faults.step_s = 0.01
        reading = asyncio.create_task(read(front.client.GenerateStream(ask(40, session_id=session), timeout=30)))
        await front.until(lambda: front.router.admission.phases() == {"decoding": 1})
        front.router.set_members([m for m in front.cluster.members() if m.worker_id != "d0"])
        messages = await reading
        assert ids_of(messages) == expected(40) and messages[-1].timings.decode_worker == "d1"


async def test_a_prefill_worker_lost_after_adoption_changes_nothing(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["d0"].faults.step_s = 0.01
        reading = asyncio.create_task(read(front.client.GenerateStream(ask(40), timeout=30)))
        await front.until(lambda: front.router.admission.phases() == {"decoding": 1})
        await front.cluster.workers["p0"].stop()
        messages = await reading
        assert ids_of(messages) == expected(40) and messages[-1].timings.retries == 0


@pytest.mark.parametrize("how", ["break", "end", "fail", "silence"])
async def test_an_adopted_run_without_first_tokens_is_retried(smollm2: Path, how: str) -> None:
    async with routed(smollm2, prefill=2) as front:
        bad, decode = front.cluster.workers["p0"], front.cluster.workers["d0"]
        bad.faults.lose_first_tokens = how
        front.router.pool.workers["p1"].queued_prompt_tokens += 1_000_000
        reading = asyncio.create_task(read(front.client.GenerateStream(ask(40), timeout=5)))
        await front.until(lambda: "adopted" in decode.events())
        front.router.pool.workers["p1"].queued_prompt_tokens -= 1_000_000
        if how == "silence":
            await bad.stop()
        messages = await reading
        assert ids_of(messages) == expected(40)
        assert (messages[-1].timings.retries, messages[-1].timings.prefill_worker) == (1, "p1")
        assert ("cancel", decode.log[0][1], 0) in decode.log


@pytest.mark.parametrize("when", ["starting", "between attempts"])
async def test_an_abort_without_an_attempt_wins_at_once(smollm2: Path, when: str) -> None:
    async with routed(smollm2, start_wait_s=20, retry_wait_s=20) as front:
        decode = front.cluster.workers["d0"]
        decode.faults.step_s = 0.02
        if when == "starting":
            decode.set_state(wpb.WORKER_STATE_STARTING)
            await front.until(lambda: front.router.pool.num_ready() == (1, 0))
        reading = asyncio.create_task(read(front.client.GenerateStream(ask(500, request_id="x"), timeout=30)))
        if when == "between attempts":
            await front.until(lambda: front.router.admission.phases() == {"decoding": 1})
            front.router.set_members([])
        await front.until(lambda: front.router.admission.phases() == {"routing": 1})
        begun = time.monotonic()
        assert (await front.client.Abort(pb.AbortRequest(request_ids=["x"]), timeout=5)).aborted == 1
        messages = await reading
        assert time.monotonic() - begun < 1.0
        assert finish_of(messages).finish_reason == pb.FINISH_REASON_ABORTED
        assert ids_of(messages) == expected(messages[-1].usage.completion_tokens)
        assert (when == "starting") == (messages[-1].usage.completion_tokens == 0)


def narrow(front: Front) -> Any:
    """A client whose connection takes little ahead of what is read."""
    options = (
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 16384),
        ("grpc.use_local_subchannel_pool", 1),
    )
    return inference_pb2_grpc.InferenceServiceStub(grpc.aio.insecure_channel(front.router.address, options=options))


async def test_a_slow_client_gets_fewer_larger_messages_and_stalls_nobody(smollm2: Path) -> None:
    async with routed(smollm2, max_buffered_tokens=100_000) as front:
        front.cluster.workers["d0"].faults.step_s = 0.0005
        long = ask(3000, response=pb.ResponseOptions(logprobs=20))
        call = narrow(front).GenerateStream(long, timeout=60)
        messages = [await anext(aiter(call))]
        started = time.monotonic()
        other = await front.client.Generate(ask(50, seed=1), timeout=10)
        assert list(other.outputs[0].token_ids) == expected(50, seed=1) and time.monotonic() - started < 5
        pipeline = front.router.admission.pipelines()[0]
        await front.until(lambda: len(pipeline.sequences[0].token_ids) == 3000, within_s=30)
        messages += [m async for m in call]
        assert ids_of(messages) == expected(3000)
        assert max(m.delta.num_tokens for m in messages) > 10


async def test_a_client_that_never_reads_is_ended(smollm2: Path) -> None:
    async with routed(smollm2, max_buffered_tokens=200) as front:
        front.cluster.workers["d0"].faults.step_s = 0.0005
        call = narrow(front).GenerateStream(ask(6000, response=pb.ResponseOptions(logprobs=20)), timeout=60)
        await anext(aiter(call))
        await front.settled()
        assert front.cluster.workers["d0"].events("cancel") == ["cancel"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the client does not read" in caught.value.details()


async def test_a_queued_run_waits_while_its_workers_serve_others(smollm2: Path) -> None:
    async with routed(smollm2, progress_s=1.0) as front:
        prefill, decode = front.cluster.workers["p0"], front.cluster.workers["d0"]
        decode.faults.step_s = 0.02
        busy = asyncio.create_task(read(front.client.GenerateStream(ask(150), timeout=20)))
        await front.until(lambda: front.router.admission.phases() == {"decoding": 1})
        prefill.faults.stall_prefill = True
        queued = front.client.Generate(ask(3, seed=1), timeout=20)
        await front.until(lambda: len(prefill.requests) == 2)
        await asyncio.sleep(2.2)
        assert front.router.admission.num_in_flight == 2 and len(prefill.requests) == 2
        await busy
        prefill.faults.stall_prefill = False
        assert list((await queued).outputs[0].token_ids) == expected(3, seed=1)
        assert attempts(front) == [0, 0, 1]
