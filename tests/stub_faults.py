"""What a stub worker can be told to do wrong."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb


@dataclass(slots=True)
class Faults:
    """Off by default. `failure` is sent as Failed where the worker would have gone on."""

    prefill_delay_s: float = 0.0
    transfer_delay_s: float = 0.0
    step_s: float = 0.001
    stall_prefill: bool = False  # never answers
    stall_transfer: bool = False  # first tokens, then nothing
    stall_decode: bool = False  # adopts, then nothing
    die_after_first_tokens: bool = False
    end_prefill_early: bool = False
    refuse_prefill: grpc.StatusCode | None = None
    prefill_failure: wpb.Failed | None = None
    decode_failure: wpb.Failed | None = None  # instead of adoption
    fail_after_tokens: int | None = None  # of one sequence, then `decode_failure` or the session breaks
    skip_offset: int | None = None  # leaves a gap there
    repeat_offset: int | None = None
    hold_first_tokens_s: float = 0.0  # so that decode overtakes them
    full: bool = False  # of a decode worker: grants no pages
    tells_load: bool = True  # its reports say that it is full
    lose_first_tokens: str = ""  # decode adopts, then instead of them: "break", "end", "fail" or "silence"
    finish_at: dict[int, int] = field(default_factory=dict)  # sequence index -> position of its EOS
    jump_step: bool = False


async def lose_first_tokens(how: str, context: Any) -> None:
    """Ends a Prefill stream as `how` says, once decode's news of the adoption has had time to overtake it."""
    await asyncio.sleep(0.05)
    if how == "break":
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the stub dies")
    elif how == "fail":
        failed = wpb.Failed(reason=pb.ERROR_REASON_KV_TRANSFER_FAILED, message="a stub's fault", retryable=True)
        await context.write(wpb.PrefillEvent(failed=failed))
    elif how == "silence":
        await asyncio.Event().wait()


async def wait_for_pages(target: Faults, request: wpb.PrefillRequest, context: Any) -> bool:
    """As a prefill worker waits for a grant. False: none in the time that the router gave, which has been told."""
    within_s = request.grant_within.ToNanoseconds() / 1e9 if request.HasField("grant_within") else None
    try:
        async with asyncio.timeout(within_s):
            while target.full:
                await asyncio.sleep(0.01)
    except TimeoutError:
        failed = wpb.Failed(reason=pb.ERROR_REASON_NO_GRANT, message="no pages", retryable=True)
        await context.write(wpb.PrefillEvent(failed=failed))
        return False
    return True
