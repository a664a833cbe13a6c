"""Who computes what in the next step, and who holds which blocks. Plain Python: no torch, no clock.

engine/admission.py says who gets in, with all the blocks of its prompt. From there on only a decoding sequence grows,
and when no block is left the lowest-priority, youngest sequence gives up its own and is recomputed later (its full
blocks stay cached). Reservations, pinned prompts and admitted sink prompts are never preempted: they end by adopt,
release or abort.

Plans may be launched ahead: schedule() again before update() of the plan before. A sequence whose next token only the
device knows is then planned on, unless it ends for its length there; an EOS is known one step late, and the row
launched beyond it is dropped. Nobody is preempted while a plan is in flight, and what ends then keeps its blocks until
the last plan of that moment is taken in, for its row may still write there.
"""

from collections.abc import Sequence as Seq
from itertools import count

from engine.admission import Admission
from engine.allocator import Allocator
from engine.loans import Loans
from engine.request import (
    Event,
    Failed,
    FirstToken,
    Preempted,
    Request,
    Token,
    find_finish,
    is_last,
)
from engine.sequence import (
    EngineStats,
    Gate,
    Plan,
    QueuedReservation,
    Row,
    RowResult,
    Run,
    Sequence,
    Status,
)


class Scheduler:
    """Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        enable_prefix_caching: bool = True,
    ):
        self.blocks = Allocator(num_blocks, block_size, enable_prefix_caching)
        self.pool = self.blocks.pool
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # so that each decodes in every step
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.ended: list[str] = []  # requests that are over, for the engine to collect
        self._runs: dict[str, Run] = {}
        self._running: list[Sequence] = []
        self.admission = Admission(self.blocks, self._running, self.max_num_seqs, max_num_batched_tokens)
        self.loans = Loans(self.admission)
        self._flying: list[Plan] = []
        self._arrivals = count()
        self._steps = self._computed = self._generated = self._preemptions = 0

    # ---------------------------------------------------------------- commands, between steps

    def add(self, request: Request, receiver: str | None = None) -> None:
        """`receiver` names who takes the prompt's KV, which makes it a sink prompt; None: it stays here."""
        gate = Gate.OPEN if receiver is None else Gate.CLOSED
        n = request.sampling.num_sequences
        sequence = Sequence(request, 0, list(request.token_ids), next(self._arrivals), n, receiver, gate)
        self._runs[request.id] = Run(request, [sequence])
        self.admission.enqueue(sequence)

    def grant(self, request_id: str, first_block: int) -> None:
        """The receiver has pages for a sink prompt and already holds the blocks before `first_block`."""
        run = self._runs.get(request_id)
        if run is not None and run.live and run.live[0].gate is not Gate.OPEN:
            run.live[0].gate, run.live[0].num_reported = Gate.OPEN, first_block

    def reserve(self, owner: str, request: Request, num_tokens: int, cached_multiple: int = 1) -> None:
        """Queue for pages; a later plan's `granted` has the answer: its cached tokens are such a multiple."""
        if self.admission.is_reserving(owner):
            raise ValueError(f"owner: {owner!r} has a reservation already")
        align = self.blocks.align(cached_multiple)
        self.admission.enqueue(QueuedReservation(owner, request, num_tokens, next(self._arrivals), align))

    def adopt(self, owner: str, request: Request, first_tokens: Seq[FirstToken]) -> None:
        """The reserved blocks hold the prompt's KV now: they become cache entries and running sequences.

        KeyError: no such reservation. ValueError: it was made for another request.
        """
        held = self.admission.held.get(owner)
        if held is None:
            raise KeyError(f"no reservation of {owner!r}")
        same = request is held.request or request.token_ids == held.request.token_ids
        if not same or len(first_tokens) != request.sampling.num_sequences:
            raise ValueError(f"request {request.id!r} is not the one that {owner!r} reserved for")
        if request.id in self._runs:
            raise ValueError(f"id: {request.id!r} is in this engine already")
        del self.admission.held[owner]
        sequence = Sequence(request, 0, list(request.token_ids), next(self._arrivals), forks=len(first_tokens))
        self._runs[request.id] = Run(request, [sequence])
        sequence.block_ids, sequence.hashes = held.block_ids, held.hashes
        sequence.num_computed, sequence.num_committed = len(request.token_ids), held.num_cached
        sequence.was_started, sequence.status = True, Status.RUNNING
        self._running.append(sequence)
        self.blocks.commit(sequence)
        self.pool.release(held.growth)  # for the forks, right below
        lost = self._branch(sequence, [(t.token_id, t.finished) for t in first_tokens])
        assert not lost, "a reservation has room for its forks"

    def quarantine(self, owner: str) -> None:
        """Gives up a held reservation or a loan, but keeps the blocks that a peer was to fill until `release`."""
        self.admission.quarantine(owner)
        self.loans.quarantine(owner)

    def release(self, owner: str) -> None:
        """Frees a reservation (queued, held, quarantined), the pinned blocks of a sink prompt, or a loan."""
        self.loans.release(owner)
        self.admission.unquarantine(owner)
        self.admission.drop_reservations(lambda name, request: name == owner)
        run = self._runs.get(owner)
        if run is not None and run.pinned is not None:
            self._end(run)

    def abort(self, request_id: str) -> list[str]:
        """Ends a request in whatever phase it is. Idempotent. Returns the owners of the reservations this dropped."""
        dropped = self.admission.drop_reservations(lambda name, request: request.id == request_id)
        run = self._runs.get(request_id)
        if run is not None:
            self._end(run)
        return dropped

    # ---------------------------------------------------------------- a step

    def schedule(self) -> Plan:
        """Decodes first, then prefill chunks of what runs, then of what is admitted, up to the token budget."""
        plan = Plan()
        preemptions = self._preemptions
        for sequence in sorted(self._running, key=lambda s: s.rank):
            if sequence.status is Status.RUNNING and sequence.num_pending == 1 and self._continues(sequence, plan):
                self._add_row(plan, sequence, 1)
        budget = self.max_num_batched_tokens - len(plan.rows)
        for sequence in sorted(self._running, key=lambda s: s.rank):
            if sequence.num_pending > 1 and budget > 0:
                budget -= self._add_row(plan, sequence, min(budget, sequence.num_pending))
        self.admission.ask(plan)
        if self._preemptions == preemptions:  # else the blocks just freed would be given away at once
            for sequence, num_tokens in self.admission.admit(plan, budget):
                self._add_row(plan, sequence, num_tokens)
        if plan.rows:
            self._steps += 1
            self._flying.append(plan)
        return plan

    def update(self, plan: Plan, results: list[RowResult]) -> list[Event]:
        """Takes in what the rows gave: commits blocks, appends tokens, forks, ends. Returns the news."""
        events: list[Event] = []
        self._flying = [other for other in self._flying if other is not plan]
        for row, result in zip(plan.rows, results, strict=True):
            sequence = row.sequence
            sequence.num_launched -= row.num_tokens
            sequence.num_unknown -= row.samples
            if sequence.status is Status.ENDED:
                continue  # by a token of the step before, or by a sibling in this very step
            if result.error is not None:
                events.append(self._fail(sequence, *result.error))
                continue
            sequence.num_computed += row.num_tokens
            self._computed += max(0, min(row.stop, len(sequence.request.token_ids)) - row.start)
            self.blocks.commit(sequence)
            if result.tokens:
                self._take_tokens(sequence, result, events)
        self.blocks.land(plan)
        return events

    def fail(self, plan: Plan, reason: str, message: str) -> list[Event]:
        """The whole step went wrong: every request in it fails."""
        return self.update(plan, [RowResult(error=(reason, message)) for _ in plan.rows])

    def stats(self) -> EngineStats:
        admission = self.admission
        return EngineStats(
            num_requests=len(self._runs) + admission.num_reservations,
            num_reservations=admission.num_reservations,
            num_running=len(self._running),
            num_waiting=len(admission.queue),
            num_waiting_tokens=sum(entry.num_tokens for entry in admission.queue),
            total_blocks=self.pool.num_blocks,
            free_blocks=self.pool.num_free,
            reserved_blocks=sum(len(held.block_ids) + len(held.growth) for held in admission.held.values())
            + self.loans.num_reserved,
            quarantined_blocks=sum(map(len, admission.quarantined.values())),
            pinned_blocks=sum(len(run.pinned) for run in self._runs.values() if run.pinned is not None)
            + self.loans.num_pinned,
            steps=self._steps,
            prompt_tokens_computed=self._computed,
            prompt_tokens_cached=admission.num_cached_tokens,
            prompt_tokens_returned=admission.num_returned_tokens,
            tokens_generated=self._generated,
            preemptions=self._preemptions,
        )

    # ---------------------------------------------------------------- running sequences

    def _add_row(self, plan: Plan, sequence: Sequence, num_tokens: int) -> int:
        row = Row(sequence, sequence.num_computed + sequence.num_launched, num_tokens)
        if sequence.is_sink:
            stop = len(sequence.block_ids) if row.samples else row.stop // self.block_size
            if stop > sequence.num_reported:
                row.report = (sequence.num_reported, stop)
                sequence.num_reported = stop
        plan.rows.append(row)
        sequence.num_launched += num_tokens
        sequence.num_unknown += row.samples
        return num_tokens

    def _continues(self, sequence: Sequence, plan: Plan) -> bool:
        """Whether a decoding sequence is in this step: its next token is known, or on the device, and has a place."""
        if sequence.num_unknown:
            offset = len(sequence.token_ids) - sequence.request.num_prompt_tokens
            if sequence.is_sink or sequence.forks > 1 or is_last(sequence.request, offset, self.max_model_len):
                return False
        return self._grow(sequence, plan)

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Makes room for the sequence's next token, preempting others, or itself: then False."""
        while len(sequence.block_ids) * self.block_size < len(sequence.token_ids) + sequence.num_unknown:
            fresh = self.pool.allocate(1)
            if fresh is not None:
                sequence.block_ids += fresh
                continue
            if self._flying:
                plan.must_settle = True
                return False
            victim = max((s for s in self._running if not s.is_sink), key=lambda s: s.rank)
            self._preempt(victim)
            plan.events.append(Preempted(victim.request.id, victim.index))
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        self._running.remove(sequence)
        sequence.block_ids, sequence.num_computed, sequence.num_committed = [], 0, 0
        sequence.status, sequence.was_preempted = Status.WAITING, True
        self._preemptions += 1
        self.admission.enqueue(sequence)

    def _take_tokens(self, sequence: Sequence, result: RowResult, events: list[Event]) -> None:
        request = sequence.request
        offset = len(sequence.token_ids) - request.num_prompt_tokens
        branches = []
        for i, (token_id, logprob) in enumerate(result.tokens):
            finish = find_finish(request, offset, token_id, self.eos_token_ids, self.max_model_len)
            events.append(Token(request.id, sequence.index + i, offset, token_id, logprob, finish))
            branches.append((token_id, finish is not None))
        self._generated += len(branches)
        if sequence.is_sink:
            run = self._runs[request.id]
            self._running.remove(sequence)
            sequence.status = Status.ENDED
            run.live, run.pinned = [], sequence.block_ids
            return
        for lost in self._branch(sequence, branches):
            events.append(Preempted(request.id, lost.index))

    def _branch(self, sequence: Sequence, tokens: list[tuple[int, bool]]) -> list[Sequence]:
        """Appends each (token, finished) to its own sequence: `sequence` takes the first, forks the others.

        Forks share the full blocks and copy the partial one. Returns the forks that found no block: they are queued.
        """
        run = self._runs[sequence.request.id]
        sequence.forks = 1
        lost = []
        for i, (token_id, finished) in enumerate(tokens[1:], start=1):
            if finished:
                continue
            fork = Sequence(sequence.request, i, [*sequence.token_ids, token_id], sequence.arrival, was_started=True)
            fork.hashes = sequence.hashes
            run.live.append(fork)
            if self.blocks.fork(sequence, fork):
                fork.status = Status.RUNNING
                self._running.append(fork)
            else:
                fork.was_preempted = True
                self._preemptions += 1
                self.admission.enqueue(fork)
                lost.append(fork)
        token_id, finished = tokens[0]
        sequence.token_ids.append(token_id)
        if finished:
            self._end_sequence(run, sequence)
        return lost

    # ---------------------------------------------------------------- endings

    def _end_sequence(self, run: Run, sequence: Sequence, wipe: bool = False) -> None:
        """Frees what one sequence holds; the run ends with its last."""
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.admission.queue.remove(sequence)
        sequence.status = Status.ENDED
        run.live.remove(sequence)
        self.blocks.release(sequence.block_ids, wipe, after=self._last_flight)
        sequence.block_ids = []
        if not run.live:
            self._forget(run)

    def _end(self, run: Run, wipe: bool = False) -> None:
        """Frees all that a request holds. `wipe`: what it wrote may not be finite."""
        for sequence in list(run.live):
            self._end_sequence(run, sequence, wipe)
        if run.pinned is not None:
            self.blocks.release(run.pinned, after=self._last_flight)
            self._forget(run)

    @property
    def _last_flight(self) -> Plan | None:
        return self._flying[-1] if self._flying else None

    def _forget(self, run: Run) -> None:
        del self._runs[run.request.id]
        self.ended.append(run.request.id)

    def _fail(self, sequence: Sequence, reason: str, message: str) -> Failed:
        request = sequence.request
        self._end(self._runs[request.id], wipe=True)
        return Failed(request.id, reason, message)
