"""What a decode worker does with runs: expect, reserve, adopt, stream, end.

Everything here but `begin_adoption` runs on the event loop; the engine is reached through its thread-safe calls, its
events come back through the Dispatcher.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from decode_worker.runs import Run, RunState, RunTable
from engine.dispatch import Dispatcher
from engine.engine import Engine
from engine.request import Event, Failed, FirstToken, Preempted, Reservation, Started, Token
from engine.wire import finish_to_pb, logprob_to_pb, request_from_pb
from kv_transfer.receiver import Receiver
from protos import inference_pb2, worker_pb2

# The router ends a run at its deadline; this is for a router that has lost its mind or its network.
DEADLINE_GRACE_S = 2.0


class Decoder:
    """The runs of this worker over its engine and its receiver."""

    def __init__(
        self,
        engine: Engine,
        dispatcher: Dispatcher,
        receiver: Receiver,
        on_finished: Callable[[Run], None] = lambda run: None,
    ):
        """`on_finished` hears of each run that ended by itself, after its end."""
        self.engine = engine
        self.receiver = receiver
        self.runs = RunTable()
        self.draining = False
        self._on_finished = on_finished
        self._dispatcher = dispatcher
        dispatcher.after_step(self._flush_step)
        self._touched: dict[str, Run] = {}  # runs with entries of the current step

    # From the router

    async def expect(self, message: worker_pb2.Expect, emit: Callable[[worker_pb2.StepEntry], None]) -> None:
        """Take a run in; refusals are reported as its Failed entry."""
        run_id, attempt = message.request.run_id, message.request.attempt

        def refuse(reason: inference_pb2.ErrorReason, text: str, retryable: bool) -> None:
            failed = worker_pb2.Failed(reason=reason, message=text, retryable=retryable)
            emit(worker_pb2.StepEntry(run_id=run_id, attempt=attempt, failed=failed))

        if self.draining:
            return refuse(inference_pb2.ERROR_REASON_DRAINING, "the decode worker is draining", True)
        if self.runs.is_over(run_id, attempt):
            return refuse(inference_pb2.ERROR_REASON_CANCELLED, f"attempt {attempt} is over here", True)
        older = self.runs.find(run_id)
        if older is not None:
            if older.attempt >= attempt:
                return refuse(inference_pb2.ERROR_REASON_INTERNAL, f"attempt {attempt} is here already", False)
            self.end(older)
        try:
            request = request_from_pb(message.request)
        except ValueError as error:
            return refuse(inference_pb2.ERROR_REASON_INVALID_PARAMETER, str(error), False)
        source = message.source if message.HasField("source") else None
        run = Run(run_id, attempt, request, source, emit, num_open_sequences=request.sampling.num_sequences)
        if message.request.HasField("remaining"):
            delay = message.request.remaining.ToNanoseconds() / 1e9 + DEADLINE_GRACE_S
            run.deadline = asyncio.get_running_loop().call_later(delay, self.end, run)
        self._dispatcher.add(run.owner, lambda event: self._on_event(run, event))
        await self.runs.add(run)
        if source is None:
            run.state = RunState.ADOPTED
            try:
                self.engine.submit(request)
            except ValueError as error:
                self.fail(run, inference_pb2.ERROR_REASON_KV_CACHE_EXHAUSTED, str(error), False)

    async def cancel(self, run_id: str, attempt: int, is_finished: bool = False) -> None:
        """`is_finished`: the router has seen its end, a stop string, and wants no more of it."""
        await self.runs.refuse(run_id, attempt)
        run = self.runs.find(run_id)
        if run is not None and run.attempt <= attempt:
            was_decoding = run.state is RunState.ADOPTED
            self.end(run)
            if is_finished and was_decoding:
                self._on_finished(run)

    # From the prefill worker

    async def reserve(self, run: Run, num_tokens: int, cached_multiple: int) -> Reservation:
        """Waits in the engine's queue; what is cached already ends at a multiple of `cached_multiple` tokens. Raises
        ValueError if it can never fit, CancelledError when the run ends."""
        run.state = RunState.RESERVING
        return await asyncio.wrap_future(self.engine.reserve(run.owner, run.request, num_tokens, cached_multiple))

    async def adopt(self, run: Run, first_tokens: Sequence[FirstToken]) -> None:
        """The KV is verified: make it visible and decode. Raises KeyError or ValueError if that is no longer possible,
        and says so to the router, which counts on the run as soon as it hears Adopted."""
        adopting = self.begin_adoption(run, first_tokens)
        self._announce(run)
        try:
            await asyncio.wrap_future(adopting)
        except (KeyError, ValueError) as error:
            self.fail(run, inference_pb2.ERROR_REASON_INTERNAL, f"the KV could not be adopted: {error}", True)
            raise

    def begin_adoption(self, run: Run, first_tokens: Sequence[FirstToken]) -> "Future[None]":
        """As `adopt`, on any thread, up to where the engine has been asked: who gets here first asks it."""
        with run.lock:
            if run.adopting is None:
                if run.state is not RunState.GRANTED:
                    raise KeyError(run.run_id)
                run.num_open_sequences = sum(not token.finished for token in first_tokens)
                if len(first_tokens) == 1:
                    run.output.append(first_tokens[0].token_id)
                # Set before the engine is told, so that a racing end() aborts what is being adopted.
                run.state = RunState.ADOPTED
                run.adopting = self.engine.adopt(run.owner, run.request, first_tokens)
            return run.adopting

    # Ends

    def end(self, run: Run) -> None:
        """Whatever its phase: pages, reservation and ticket come back, later messages are refused. Idempotent."""
        with run.lock:
            if run.state is RunState.OVER:
                return
            run.state = RunState.OVER
        self._dispatcher.remove(run.owner)
        self._touched.pop(run.owner, None)
        if run.transfer_id:
            # The receiver's lock: after this we write no byte of the transfer.
            self.receiver.release(run.transfer_id)
            if run.transfer_id in self.receiver.quarantine:
                self.engine.quarantine(run.owner)
        self.engine.abort(run.request.id)  # its reservation, held or queued, included
        self.runs.remove(run)

    def fail(self, run: Run, reason: inference_pb2.ErrorReason | str, message: str, retryable: bool) -> None:
        if run.state is not RunState.OVER:
            self.end(run)
            run.emit(run.entry(failed=worker_pb2.Failed(reason=reason, message=message, retryable=retryable)))

    def expire(self, others: Callable[[set[str]], None]) -> None:
        """Ends the runs whose lease ran out: their writer has stopped renewing it. `others` hears all owners."""
        owners = set(self.receiver.expire())
        if not owners:
            return
        others(owners)
        for run in self.runs:
            if run.owner in owners:
                text = "the prefill worker let the lease of its pages run out"
                self.fail(run, inference_pb2.ERROR_REASON_KV_TRANSFER_FAILED, text, True)

    # From the engine

    def _announce(self, run: Run) -> None:
        """Before the engine's first events, so that the router hears Adopted first."""
        with run.lock:  # the engine may be faster than the thread that is asking it
            is_news = run.adopting is not None and run.state is not RunState.OVER and not run.is_announced
            run.is_announced |= is_news
        if is_news:
            run.emit(run.entry(adopted=worker_pb2.Adopted()))

    def _on_event(self, run: Run, event: Event) -> None:
        self._announce(run)
        match event:
            case Token():
                self._add_token(run, event)
            case Started(num_cached_tokens=num_cached):
                run.emit(run.entry(started=worker_pb2.PrefillStarted(cached_tokens=num_cached)))
            case Preempted(sequence_index=index):
                run.emit(run.entry(sequence_index=index, preempted=worker_pb2.Preempted()))
            case Failed() as lost:
                self.fail(run, f"ERROR_REASON_{lost.reason}", lost.message, lost.retryable)

    def _add_token(self, run: Run, token: Token) -> None:
        index = token.sequence_index
        entry = run.entries.get(index)
        if entry is None:
            entry = run.entries[index] = run.entry(sequence_index=index, token_offset=token.offset)
        self._touched[run.owner] = run
        entry.token_ids.append(token.token_id)
        if run.request.sampling.num_sequences == 1:
            run.output.append(token.token_id)
        if token.logprob is not None:
            entry.logprobs.append(logprob_to_pb(token.logprob))
        if token.finish is not None:
            entry.finish_info.CopyFrom(finish_to_pb(index, token.finish, run.request.sampling.seed))
            run.num_open_sequences -= 1

    def _flush_step(self) -> None:
        """One step's tokens go out together; a run whose last sequence ended leaves."""
        touched, self._touched = self._touched, {}
        for run in touched.values():
            entries, run.entries = run.entries, {}
            for entry in entries.values():
                run.emit(entry)
            if run.num_open_sequences == 0:
                self.end(run)
                self._on_finished(run)
