"""One request from admission to its last message.

    routing -> prefilling -> (tokens flow) -> finished
       ^            |              |
       +--- retry --+--- resume ---+         any: failed, cancelled

A retry repeats what never reached the client; a resume prefills prompt + committed tokens and goes on at the next
offset, which gives the same tokens because random numbers depend on (seed, sequence, position) alone. A request of
several sequences cannot be resumed from one prompt: once tokens are committed it fails with UNAVAILABLE.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.attempt import Attempt
from router.config import RouterConfig
from router.errors import AttemptFailed, RequestError
from router.policy import Need
from router.pool import Pool
from router.sequence import Sequence
from router.stop import Stops, StopScanner
from router.timings import Record, to_duration
from router.tokenizer import Tokenizer
from router.validate import Accepted

Send = Callable[[pb.GenerateStreamResponse], Awaitable[Any]]

TRANSFER_REPORT_WAIT_S = 0.25  # the last message names the bytes moved; P's report may lag behind D's tokens
RETRY_DELAYS_S = (0.0, 0.05, 0.25, 1.0)
MAX_DRAIN_REFUSALS = 16
MAX_GRANT_DOUBLINGS = 4  # a full deployment is not asked in circles: each round keeps its place in a queue for longer


class Pipeline:
    """`run` drives the request; `abort`, `fail` and the attempt's streams reach it from other tasks of the loop.

    `deadline` and `received_at` are time.monotonic().
    """

    def __init__(
        self,
        accepted: Accepted,
        pool: Pool,
        tokenizer: Tokenizer,
        config: RouterConfig,
        received_at: float,
        deadline: float,
    ):
        self.accepted = accepted
        self.run_id = secrets.token_hex(16)
        stops = Stops.build(accepted.stopping.stop, accepted.stopping.include_stop_str_in_output)
        self.sequences = [
            Sequence(i, accepted, tokenizer, StopScanner(stops) if stops.strings else None)
            for i in range(accepted.num_sequences)
        ]
        self.attempt: Attempt | None = None
        self._pool = pool
        self._config = config
        self._record = Record(received_at)
        self._deadline = deadline
        self._stopping = _worker_stopping(accepted)
        self._wake = asyncio.Event()
        self._aborted = False
        self._between: asyncio.Timeout | None = None  # while there is no attempt: what an abort cuts short
        self._failure: RequestError | None = None
        self._task: asyncio.Task[Any] | None = None
        self._num_sent = 0  # messages

    async def run(self, send: Send) -> None:
        """Sends every message of the request, the last one with usage and timings. RequestError if it fails.

        However it ends, cancellation included, both workers are left and know it.
        """
        self._task = asyncio.current_task()
        try:
            async with asyncio.timeout_at(self._loop_time(self._deadline)):
                await self._run(send)
        except TimeoutError:
            raise RequestError(
                pb.ERROR_REASON_DEADLINE_EXCEEDED,
                f"deadline exceeded after {time.monotonic() - self._record.received_at:.3f} s",
            ) from None
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            if self._task is not None:
                self._task.uncancel()
            raise self._failure from None
        finally:
            self._task = None
            self._leave()

    def abort(self) -> None:
        """Ends the request with what it has; its sequences finish as ABORTED."""
        self._aborted = True
        self._wake.set()
        if self._between is not None:
            self._between.reschedule(0)

    def fail(self, error: RequestError) -> None:
        """Ends the request from outside, even while it is stuck in a write to a client that does not read."""
        if self._failure is None and self._task is not None:
            self._failure = error
            self._leave()
            self._task.cancel()

    def on_news(self) -> None:
        self._wake.set()
        num_pending = sum(s.num_pending for s in self.sequences)
        if num_pending > self._config.max_buffered_tokens:
            self.fail(
                RequestError(
                    pb.ERROR_REASON_QUEUE_FULL,
                    f"the client does not read: {num_pending} tokens wait for it;"
                    f" at most {self._config.max_buffered_tokens} may",
                )
            )

    def check_progress(self, now: float) -> None:
        """Fails an attempt that has been silent for too long; called about once a second.

        A queued or preempted run is silent while its workers serve others, which their steps show. Between first token
        and adoption there is nothing to queue for.
        """
        attempt = self.attempt
        if attempt is None or now - attempt.last_news_at <= self._config.progress_s:
            return
        prefill, decode = attempt.route.prefill, attempt.route.decode
        workers = [worker for worker in (prefill, decode) if worker is not None]
        is_handing_over = self.phase == "transferring"
        others_go_on = any(now - worker.stepped_at <= self._config.progress_s for worker in workers)
        if not is_handing_over and others_go_on and now - attempt.last_news_at <= self._config.max_silence_s:
            return
        if is_handing_over:
            reason = pb.ERROR_REASON_KV_TRANSFER_FAILED
        elif prefill is not None and attempt.started_at is None and decode is not None:
            reason = pb.ERROR_REASON_KV_TRANSFER_FAILED  # either P does not compute it, or D does not take it
        elif prefill is not None and attempt.first_tokens_at is None:
            reason, workers = pb.ERROR_REASON_PREFILL_WORKER_LOST, [prefill]
        else:
            reason, workers = pb.ERROR_REASON_DECODE_WORKER_LOST, workers[-1:]
        names = frozenset(worker.worker_id for worker in workers)
        message = f"no progress for {now - attempt.last_news_at:.1f} s at {' and '.join(map(repr, sorted(names)))}"
        attempt.fail(AttemptFailed(reason, message, True, names))

    @property
    def phase(self) -> str:
        """For status: where the request is."""
        attempt = self.attempt
        if attempt is None:
            return "routing"
        if attempt.first_tokens_at is None:
            return "prefilling"
        return "decoding" if attempt.adopted_at is not None or attempt.is_local else "transferring"

    async def _run(self, send: Send) -> None:
        failures = refusals = shortages = 0
        avoid: frozenset[str] = frozenset()
        full: frozenset[str] = frozenset()  # had no pages for the attempt before
        cause: AttemptFailed | None = None
        while not self._aborted:
            try:
                async with self._until_abort():
                    await self._start_attempt(avoid, full, shortages, cause)
                if self.attempt is not None:
                    await self._forward(send)
                    return
            except AttemptFailed as error:
                self._leave_for_retry()
                full, cause = frozenset(), error
                if error.reason == pb.ERROR_REASON_NO_GRANT and error.retryable:
                    # A matter of load, not a fault: it costs none of the attempts, and only the deadline bounds it.
                    pause_s = RETRY_DELAYS_S[min(shortages, len(RETRY_DELAYS_S) - 1)]
                    shortages += 1
                    full = error.at_fault
                elif error.reason == pb.ERROR_REASON_DRAINING and error.retryable and refusals < MAX_DRAIN_REFUSALS:
                    refusals += 1
                    avoid, pause_s = avoid | error.at_fault, 0.01
                else:
                    self._give_up_or_continue(error, failures + 1)
                    pause_s = RETRY_DELAYS_S[min(failures, len(RETRY_DELAYS_S) - 1)]
                    failures += 1
                    avoid |= error.at_fault
                async with self._until_abort():
                    await asyncio.sleep(pause_s)
        await self._finish(self._take_messages() + self._abort_messages(), send)

    @asynccontextmanager
    async def _until_abort(self) -> AsyncIterator[None]:
        """What is waited for inside ends early, without an error, when the request is aborted."""
        try:
            async with asyncio.timeout(None) as self._between:
                yield
        except TimeoutError:
            if not self._aborted:
                raise
        finally:
            self._between = None

    def _give_up_or_continue(self, error: AttemptFailed, failures: int) -> None:
        """Raises what the caller will hear, unless another attempt makes sense."""
        if not error.retryable or failures >= self._config.max_attempts:
            raise error
        if len(self.sequences) > 1 and any(s.token_ids for s in self.sequences):
            raise error

    async def _start_attempt(
        self, avoid: frozenset[str], full: frozenset[str], shortages: int, cause: AttemptFailed | None
    ) -> None:
        """`cause` is the failure of the attempt before, which the caller hears if no worker is left to try."""
        accepted = self.accepted
        committed = self.sequences[0].token_ids if len(self.sequences) == 1 else []
        token_ids = (*accepted.token_ids, *committed)
        need = Need(
            key=self._pool.affinity.key(accepted.session_id, accepted.token_ids),
            num_tokens=len(token_ids),
            num_total_tokens=len(accepted.token_ids) + accepted.stopping.max_tokens,
            num_sequences=len(self.sequences),
            first_token_only=accepted.stopping.max_tokens - len(committed) == 1,
        )
        wait_s = self._config.start_wait_s if cause is None else self._config.retry_wait_s
        try:
            route = await self._pool.route(need, avoid, full, wait_s, wait_for_any=cause is not None)
        except RequestError as error:
            raise cause if cause is not None and error.reason == pb.ERROR_REASON_NO_HEALTHY_WORKER else error from None
        remaining_s = max(0.001, self._deadline - time.monotonic())
        request = wpb.EngineRequest(
            run_id=self.run_id,
            attempt=self._record.num_attempts,
            token_ids=token_ids,
            num_prompt_tokens=len(accepted.token_ids),
            sampling=accepted.sampling,
            stopping=self._stopping,
            logprobs=accepted.logprobs,
            cache_namespace=accepted.cache_namespace,
            bypass_prefix_cache=accepted.bypass_prefix_cache,
            priority=accepted.priority,
            remaining=to_duration(remaining_s),
        )
        grant_within_s = self._config.grant_wait_s * 2 ** min(shortages, MAX_GRANT_DOUBLINGS)
        self.attempt = Attempt(self, request, route, remaining_s, grant_within_s if route.has_other_decode else None)
        self._record.num_attempts += 1
        self.attempt.start()

    async def _forward(self, send: Send) -> None:
        """Passes on what the attempt commits, until the request is over. AttemptFailed if the attempt is."""
        assert self.attempt is not None
        while True:
            await self._wake.wait()
            self._wake.clear()
            messages = self._take_messages()
            if self._aborted:
                messages += self._abort_messages()
            is_over = all(s.finish is not None for s in self.sequences)
            if is_over:
                await self._finish(messages, send)
                return
            for message in messages:
                await self._send(message, send)
            if self.attempt.failure is not None:
                raise self.attempt.failure

    def _take_messages(self) -> list[pb.GenerateStreamResponse]:
        messages = []
        for sequence in self.sequences:
            delta, finish = sequence.take_delta()
            if delta is not None or finish is not None:
                messages.append(pb.GenerateStreamResponse(delta=delta, finish_info=finish))
        return messages

    def _abort_messages(self) -> list[pb.GenerateStreamResponse]:
        running = [s for s in self.sequences if s.finish is None]
        return [pb.GenerateStreamResponse(finish_info=s.abort()) for s in running]

    async def _finish(self, messages: list[pb.GenerateStreamResponse], send: Send) -> None:
        """The last messages; usage and timings ride on the last one, whose text is not held up by a late report."""
        attempt, accepted = self.attempt, self.accepted
        if len(self.sequences) == 1:
            self._pool.affinity.answered(accepted.session_id, accepted.token_ids, self.sequences[0].token_ids)
        if attempt is not None and self._lacks_report(attempt):
            for message in messages:
                await self._send(message, send)
            messages = [pb.GenerateStreamResponse()]
            await attempt.transfer_report(TRANSFER_REPORT_WAIT_S)
        for message in messages[:-1]:
            await self._send(message, send)
        last = messages[-1]
        if last.HasField("delta"):
            self._record.sent()
        last.usage.CopyFrom(self._usage())
        last.timings.CopyFrom(self._record.timings(attempt))
        self._leave()
        await self._send(last, send)

    def _lacks_report(self, attempt: Attempt) -> bool:
        moves_kv = attempt.route.prefill is not None and attempt.route.decode is not None
        return moves_kv and attempt.first_tokens_at is not None and attempt.transferred is None and not self._aborted

    async def _send(self, message: pb.GenerateStreamResponse, send: Send) -> None:
        message.request_id = self.accepted.request_id
        if self._num_sent == 0:
            message.prompt_info.CopyFrom(self._prompt_info())
        if message.HasField("delta"):
            self._record.sent()
        self._num_sent += 1
        await send(message)

    def _prompt_info(self) -> pb.PromptInfo:
        accepted = self.accepted
        return pb.PromptInfo(
            num_prompt_tokens=len(accepted.token_ids),
            num_cached_tokens=self._cached_tokens(),
            token_ids=accepted.token_ids if accepted.want_prompt_token_ids else (),
            model=accepted.model,
        )

    def _cached_tokens(self) -> int:
        found = self.attempt.cached_tokens if self.attempt is not None else None
        return min(found or 0, len(self.accepted.token_ids))

    def _usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=len(self.accepted.token_ids),
            completion_tokens=sum(s.num_sent for s in self.sequences),
            cached_tokens=self._cached_tokens(),
        )

    def _leave(self) -> None:
        if self.attempt is not None:
            self.attempt.close()

    def _leave_for_retry(self) -> None:
        """Closes the attempt, keeping its counts for the timings."""
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            attempt.close()
            self._record.add(attempt)

    def _loop_time(self, monotonic: float) -> float:
        return asyncio.get_running_loop().time() + monotonic - time.monotonic()


def _worker_stopping(accepted: Accepted) -> pb.StoppingCriteria:
    stopping = pb.StoppingCriteria()
    stopping.CopyFrom(accepted.stopping)
    stopping.ClearField("stop")
    return stopping
