"""One try of a run on one route. It keeps the two workers' streams in step and says to the run what happened.

    disaggregated   Expect -> D, Prefill -> P:   Started  FirstTokens         [D] Adopted  tokens ...
    local           Expect (no source) -> D:                              [D] Started  tokens ...
    one token       Prefill without target -> P: Started  FirstTokens

D's news may overtake P's first tokens, which come on another stream: it is held until they are here. The workers' part
of an attempt ends by itself, or by `close`, which cancels whatever is not over, exactly once.
"""

import asyncio
import logging
import time
from typing import Any, Protocol

import grpc

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.errors import AttemptFailed
from router.policy import Route, blocks_at_start
from router.sequence import Sequence
from router.worker_client import WorkerClient

log = logging.getLogger(__name__)

_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)


class Listener(Protocol):
    """The run, as far as its attempt knows it."""

    sequences: list[Sequence]

    def on_news(self) -> None:
        """Tokens were committed, or the attempt failed: wake up."""


class Attempt:
    """Marks of time are time.monotonic(), None until it happened. `failure` is set at most once.

    `grant_within_s`: how long to wait for D's pages before failing with NO_GRANT; None: as long as the run lasts.
    """

    def __init__(
        self,
        listener: Listener,
        request: wpb.EngineRequest,
        route: Route,
        timeout_s: float,
        grant_within_s: float | None = None,
    ):
        self.run_id = request.run_id
        self.number = request.attempt
        self.route = route
        self.failure: AttemptFailed | None = None
        self.cached_tokens: int | None = None
        self.returned_tokens = 0
        self.started_at: float | None = None
        self.first_tokens_at: float | None = None
        self.prefill_s: float | None = None  # as the prefill worker measured it
        self.adopted_at: float | None = None
        self.decoded_at: float | None = None  # first token of the decode worker
        self.transferred: wpb.Transferred | None = None
        self.lost_bytes = 0  # KV that a failed transfer had moved
        self.num_preemptions = 0
        self.last_news_at = time.monotonic()
        self._listener = listener
        self._request = request
        self._timeout_s = timeout_s
        self._grant_within_s = grant_within_s
        self._held: list[wpb.StepEntry] = []
        self._prefill_call: Any = None
        self._prefill_task: asyncio.Task[None] | None = None
        self._open_at_decode = set(range(request.sampling.num_sequences))  # sequences D has not ended
        self._expected = False  # D was told, and has neither finished nor failed the run
        self._counted_prompt: WorkerClient | None = None
        self._counted_sequences = 0
        self._counted_blocks = 0

    @property
    def is_local(self) -> bool:
        return self.route.prefill is None

    def start(self) -> None:
        """Tells D what to expect and hands the prompt to P, without waiting for either."""
        prefill, decode = self.route.prefill, self.route.decode
        self._counted_prompt = prefill or decode
        assert self._counted_prompt is not None
        self._counted_prompt.queued_prompt_tokens += len(self._request.token_ids)
        if decode is not None:
            decode.admit(self)
            self._counted_sequences = self._request.sampling.num_sequences
            decode.num_sequences += self._counted_sequences
            self._counted_blocks = blocks_at_start(decode, len(self._request.token_ids), self._counted_sequences)
            decode.promised_blocks += self._counted_blocks
            source = prefill.ref if prefill is not None else None
            decode.command(wpb.SessionCommand(expect=wpb.Expect(request=self._request, source=source)))
            self._expected = True
        if prefill is not None:
            prefill.admit(self)
            target = decode.ref if decode is not None else None
            request = wpb.PrefillRequest(request=self._request, target=target)
            if target is not None and self._grant_within_s is not None:
                request.grant_within.FromNanoseconds(int(self._grant_within_s * 1e9))
            self._prefill_call = call = prefill.prefill(request, self._timeout_s)
            self._prefill_task = asyncio.create_task(self._read_prefill(prefill, call))

    def close(self) -> None:
        """Leaves both workers, once: cancels the Prefill call, and sends D Cancel unless the run is over there."""
        if self._prefill_task is not None and not self._prefill_task.done():
            self._prefill_call.cancel()
            self._prefill_task.cancel()
        if self._expected and self.route.decode is not None:
            self._expected = False
            is_finished = all(sequence.ended_by_stop_string for sequence in self._listener.sequences)
            cancel = wpb.Cancel(run_id=self.run_id, attempt=self.number, is_finished=is_finished)
            self.route.decode.command(wpb.SessionCommand(cancel=cancel))
        self._prompt_done()
        self._holds_blocks()
        for worker in (self.route.prefill, self.route.decode):
            if worker is not None:
                worker.dismiss(self)
        if self.route.decode is not None:
            self.route.decode.num_sequences -= self._counted_sequences
            self._counted_sequences = 0

    async def transfer_report(self, timeout_s: float) -> None:
        """Waits for P's Transferred, which may lag behind D's tokens; bounded, and never an error."""
        if self._prefill_task is not None:
            await asyncio.wait([self._prefill_task], timeout=timeout_s)

    def fail(self, error: AttemptFailed) -> None:
        if self.failure is None:
            self.failure = error
            self._listener.on_news()

    def on_worker_lost(self, client: WorkerClient, why: str) -> None:
        is_prefill = client is self.route.prefill
        if is_prefill and (self._lives_at_d or self._is_over()):
            return
        if not is_prefill:
            self._expected = False  # the broken session has already ended it there
        self.fail(_lost(client, is_prefill, why))

    def on_entry(self, entry: wpb.StepEntry) -> None:
        """News from D's session for this attempt. Never raises: the session is other runs' too."""
        try:
            self._on_entry(entry)
        except Exception:
            self._fail_by_bug()

    def _on_entry(self, entry: wpb.StepEntry) -> None:
        self.last_news_at = time.monotonic()
        event = entry.WhichOneof("event")
        if event == "failed":
            self._expected = False
            self._fail_at(self.route.decode, entry.failed)
            return
        if event == "adopted":
            self.adopted_at = self.last_news_at
            self._holds_blocks()
        elif event == "preempted":
            self.num_preemptions += 1
        elif event == "started":
            self.started_at = self.last_news_at
            self.cached_tokens = entry.started.cached_tokens
        if not entry.token_ids and not entry.HasField("finish_info"):
            return
        if self.first_tokens_at is None and not self.is_local:
            self._held.append(entry)
            return
        self._commit_entry(entry)
        self._listener.on_news()

    def _commit_entry(self, entry: wpb.StepEntry) -> None:
        now = self.last_news_at
        if self.is_local and self.first_tokens_at is None:
            self.first_tokens_at = now
            self._prompt_done()
            self._holds_blocks()
        elif self.decoded_at is None:
            self.decoded_at = now
        finish = entry.finish_info if entry.HasField("finish_info") else None
        self._commit(entry.sequence_index, entry.token_offset, entry.token_ids, entry.logprobs, finish)
        if finish is not None:
            self._open_at_decode.discard(entry.sequence_index)
            self._expected = self._expected and bool(self._open_at_decode)

    def _commit(self, index: int, offset: int, token_ids: Any, logprobs: Any, finish: pb.FinishInfo | None) -> None:
        sequences = self._listener.sequences
        try:
            if index >= len(sequences):
                raise AttemptFailed(
                    pb.ERROR_REASON_INTERNAL, f"a worker sent sequence {index} of {len(sequences)}", retryable=False
                )
            sequences[index].accept(offset, token_ids, logprobs, finish)
        except AttemptFailed as error:
            self.fail(error)

    async def _read_prefill(self, worker: WorkerClient, call: Any) -> None:
        try:
            while True:
                event = await call.read()
                if event is grpc.aio.EOF:  # type: ignore[attr-defined]
                    break
                self.last_news_at = time.monotonic()
                self._on_prefill_event(worker, event)
            handed_over = self.transferred is not None and self.first_tokens_at is not None
            if not (handed_over or self._lives_at_d or self._is_over()):
                self.fail(_lost(worker, True, "it ended the prefill stream before the KV was handed over"))
        except grpc.aio.AioRpcError as error:
            self._on_prefill_broken(worker, error)
        except Exception:
            self._fail_by_bug()
        finally:
            worker.dismiss(self)

    def _on_prefill_event(self, worker: WorkerClient, event: wpb.PrefillEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "started":
            self.started_at = self.last_news_at
            self.cached_tokens = event.started.cached_tokens
            self.returned_tokens = event.started.returned_tokens
        elif kind == "first_tokens":
            self._on_first_tokens(event.first_tokens)
        elif kind == "transferred":
            self.transferred = event.transferred
        elif kind == "failed" and not self._lives_at_d:
            self.lost_bytes = event.failed.num_bytes
            self._fail_at(worker, event.failed)

    def _on_first_tokens(self, first: wpb.FirstTokens) -> None:
        sequences = self._listener.sequences
        if len(first.tokens) != len(sequences) or self.first_tokens_at is not None:
            message = f"the prefill worker sent {len(first.tokens)} first tokens for {len(sequences)} sequences"
            self.fail(AttemptFailed(pb.ERROR_REASON_INTERNAL, message, retryable=False))
            return
        self.first_tokens_at = self.last_news_at
        self.prefill_s = first.prefill.ToNanoseconds() / 1e9 if first.HasField("prefill") else None
        self._prompt_done()
        for index, token in enumerate(first.tokens):
            offset = len(self._request.token_ids) - self._request.num_prompt_tokens
            logprobs = [token.logprob] if token.HasField("logprob") else []
            finish = token.finish_info if token.HasField("finish_info") else None
            self._commit(index, offset, [token.token_id], logprobs, finish)
            if finish is not None:
                self._open_at_decode.discard(index)
        held, self._held = self._held, []
        for entry in held:
            self._commit_entry(entry)
        self._listener.on_news()

    def _on_prefill_broken(self, worker: WorkerClient, error: grpc.aio.AioRpcError) -> None:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            worker.suspect(f"a prefill stream broke: {error.details()}")
        if self._lives_at_d or self._is_over():
            return
        why = f"{error.code().name}: {error.details()}"
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.fail(AttemptFailed(pb.ERROR_REASON_DEADLINE_EXCEEDED, "deadline exceeded in prefill", retryable=False))
        elif error.code() in _LOST:
            self.fail(_lost(worker, True, why))
        else:
            message = f"prefill worker {worker.worker_id!r} refused the run: {why}"
            retryable = error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED)
            self.fail(AttemptFailed(pb.ERROR_REASON_INTERNAL, message, retryable, frozenset({worker.worker_id})))

    def _fail_at(self, worker: WorkerClient | None, failed: wpb.Failed) -> None:
        blamed = {
            pb.ERROR_REASON_PREFILL_WORKER_LOST: [self.route.prefill],
            pb.ERROR_REASON_DECODE_WORKER_LOST: [self.route.decode],
            pb.ERROR_REASON_NO_GRANT: [self.route.decode],
            pb.ERROR_REASON_KV_TRANSFER_FAILED: [self.route.prefill, self.route.decode],
            pb.ERROR_REASON_KV_TRANSFER_CORRUPT: [self.route.prefill, self.route.decode],
        }.get(failed.reason, [worker])
        at_fault = {w.worker_id for w in blamed if w is not None}
        name = worker.worker_id if worker is not None else "?"
        message = f"worker {name!r}: {failed.message or 'failed without a message'}"
        self.fail(AttemptFailed(failed.reason, message, failed.retryable, frozenset(at_fault)))

    def _fail_by_bug(self) -> None:
        log.exception("a worker's news could not be taken in")
        message = "a bug of the router; its log says more"
        self.fail(AttemptFailed(pb.ERROR_REASON_INTERNAL, message, retryable=False))

    @property
    def _lives_at_d(self) -> bool:
        """Whether the run goes on without P: D has its KV, and P has nothing more to say that the client needs."""
        return self.adopted_at is not None and (self.is_local or self.first_tokens_at is not None)

    def _is_over(self) -> bool:
        return all(sequence.is_over for sequence in self._listener.sequences)

    def _holds_blocks(self) -> None:
        """What was promised to this attempt at D is now in D's own figures, or given up."""
        if self.route.decode is not None:
            self.route.decode.promised_blocks -= self._counted_blocks
            self._counted_blocks = 0

    def _prompt_done(self) -> None:
        if self._counted_prompt is not None:
            self._counted_prompt.queued_prompt_tokens -= len(self._request.token_ids)
            self._counted_prompt = None


def _lost(worker: WorkerClient, is_prefill: bool, why: str) -> AttemptFailed:
    reason = pb.ERROR_REASON_PREFILL_WORKER_LOST if is_prefill else pb.ERROR_REASON_DECODE_WORKER_LOST
    kind = "prefill" if is_prefill else "decode"
    return AttemptFailed(
        reason, f"{kind} worker {worker.worker_id!r} was lost: {why}", True, frozenset({worker.worker_id})
    )
