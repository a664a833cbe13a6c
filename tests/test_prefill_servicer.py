"""The prefill servicer alone, over a hand-off that does nothing."""

import asyncio

import pytest

from engine.request import Finish, FinishReason, Request, SamplingParams, Token
from prefill_worker.handoff import HandoffFailed
from prefill_worker.servicer import PrefillServicer
from protos import inference_pb2

REQUEST = Request("r", (1, 2, 3), 3, SamplingParams(max_tokens=8))


class FakeHandoff:
    num_bytes, transport, cached_tokens = 7, "grpc", 0

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_called, self.may_end = asyncio.Event(), asyncio.Event()

    async def commit(self, first_tokens) -> None:
        await self._call(f"commit {[token.token_id for token in first_tokens]}")

    async def abandon(self) -> None:
        await self._call("abandon")

    async def _call(self, what: str) -> None:
        self.calls.append(what)
        self.is_called.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.calls.append("cancelled")
            raise


def begin(*events):
    """A run whose events are there: its hand-off, and what it tells the router."""
    queue: asyncio.Queue = asyncio.Queue()
    for event in events:
        queue.put_nowait(event)
    handoff = FakeHandoff()
    servicer = PrefillServicer(None, None, None)  # type: ignore[arg-type]
    return handoff, servicer._run(REQUEST, handoff, queue)  # type: ignore[arg-type]


async def test_commit_does_not_wait_until_the_first_tokens_are_written():
    handoff, told = begin(Token("r", 0, 0, 42))
    assert [token.token_id for token in (await anext(told)).first_tokens.tokens] == [42]
    assert not handoff.calls, "the first tokens go first"
    async with asyncio.timeout(5):
        await handoff.is_called.wait()  # nobody has asked for what follows them
    handoff.may_end.set()
    assert (await anext(told)).transferred.num_bytes == 7
    assert handoff.calls == ["commit [42]"]


async def test_a_first_token_that_was_the_last_leaves_nothing_to_commit():
    handoff, told = begin(Token("r", 0, 0, 42, finish=Finish(FinishReason.LENGTH)))
    await anext(told)
    handoff.may_end.set()
    await anext(told)
    assert handoff.calls == ["abandon"]


async def test_a_run_that_is_left_while_it_commits_cancels_that():
    handoff, told = begin(Token("r", 0, 0, 42))
    await anext(told)
    await handoff.is_called.wait()
    await told.aclose()
    await asyncio.sleep(0)
    assert handoff.calls == ["commit [42]", "cancelled"]


async def test_a_hand_off_that_fails_before_the_first_token_ends_the_run():
    error = HandoffFailed(inference_pb2.ERROR_REASON_NO_GRANT, "no pages", True)
    handoff, told = begin(error)
    with pytest.raises(HandoffFailed, match="no pages"):
        await anext(told)
    assert not handoff.calls
