"""Random lives of requests in the scheduler, on a pretend device that checks every slot and counts every token."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.invariants import check
from engine.limits import Limits
from engine.prefix import block_hashes
from engine.request import FirstToken, Request, Reservation
from engine.sequence import RowResult
from tests.scheduling import Simulator, expected, idle, make_request, next_token


class SchedulerMachine(RuleBasedStateMachine):
    """Random lives of requests on a pool too small for them; slots, offsets and counters are checked at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.sim = self.simulator()
        self.limits = Limits(10**6, 90, 4, 7, 16)
        self.requests: dict[str, Request] = {}
        self.sinks: set[str] = set()
        self.num_loans = 0
        self.read: dict[str, tuple[tuple[int, ...], list[int]]] = {}  # by owner: blocks a transfer reads, their tokens
        self.filled: dict[str, tuple[Reservation, list[int]]] = {}  # blocks that a transfer fills
        self.gone: set[str] = set()  # aborted or failed by us

    def simulator(self) -> Simulator:
        return Simulator(num_blocks=7, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=90)

    def new(self, kind, length, family, n, max_tokens, priority) -> Request | None:
        name = f"{kind}{len(self.requests)}"
        tokens = [1000 * family + i for i in range(length)]
        request = make_request(name, tokens, max_tokens, n, priority)
        checker = {"r": lambda r: self.limits.check_reserve(r, length), "s": self.limits.check_sink}
        try:
            checker.get(kind, self.limits.check_submit)(request)
        except ValueError:
            return None
        self.requests[name] = request
        return request

    shape = dict(  # noqa: RUF012
        length=st.integers(1, 70),
        family=st.integers(0, 2),
        n=st.integers(1, 3),
        max_tokens=st.integers(1, 40),
        priority=st.integers(0, 1),
    )

    @rule(**shape)
    def submit(self, **shape) -> None:
        if request := self.new("q", **shape):
            self.sim.scheduler.add(request)

    @rule(**shape)
    def submit_sink(self, **shape) -> None:
        if request := self.new("s", **shape):
            self.sim.scheduler.add(request, receiver="b")
            self.sinks.add(request.id)

    @rule(**shape)
    def reserve(self, **shape) -> None:
        if request := self.new("r", **shape):
            self.sim.scheduler.reserve(request.id, request, len(request.token_ids))

    @precondition(lambda self: self.sim.wanted)
    @rule(first_block=st.integers(0, 2))
    def grant(self, first_block: int) -> None:
        self.sim.scheduler.grant(self.sim.wanted.pop(0), first_block)

    @precondition(lambda self: self.sim.granted)
    @rule(finished=st.lists(st.booleans(), min_size=3, max_size=3))
    def adopt(self, finished: list[bool]) -> None:
        owner, reservation = self.sim.granted.popitem()
        if not self.sim.scheduler.admission.is_reserving(owner):
            return
        request = self.requests[owner]
        ids, cached = request.token_ids, reservation.num_cached_tokens
        self.sim.verify(reservation.block_ids, ids[:cached], f"{owner}'s cached prefix")
        self.sim.fill(reservation.block_ids, ids, cached)
        n = request.sampling.num_sequences
        first = [next_token(ids, i) for i in range(n)]
        over = [finished[i] or request.sampling.max_tokens == 1 for i in range(n)]
        self.sim.scheduler.adopt(owner, request, [FirstToken(t, f) for t, f in zip(first, over, strict=True)])
        for i in range(n):
            self.sim.outputs[owner, i] = [first[i]]
            if over[i]:
                self.sim.finished.add((owner, i))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), how=st.sampled_from(["abort", "release"]))
    def end(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if how == "abort":
            self.gone.add(name)
        getattr(self.sim.scheduler, how)(name)

    @rule(length=st.integers(16, 90), family=st.integers(0, 2), fills=st.booleans())
    def lend(self, length: int, family: int, fills: bool) -> None:
        token_ids = [1000 * family + i for i in range(length // 16 * 16)]
        self.num_loans += 1
        owner, hashes = f"loan{self.num_loans}", block_hashes(token_ids, 16)
        self.sim.apply()
        if not fills and (block_ids := self.sim.scheduler.loans.retain(owner, hashes)):
            self.read[owner] = block_ids, token_ids
        elif fills and (reservation := self.sim.scheduler.loans.reserve(owner, hashes)):
            self.sim.verify(reservation.block_ids, token_ids[: reservation.num_cached_tokens], owner)
            self.filled[owner] = reservation, token_ids

    @precondition(lambda self: self.filled)
    @rule(is_whole=st.booleans())
    def fill(self, is_whole: bool) -> None:
        owner, (reservation, token_ids) = self.filled.popitem()
        start = reservation.num_cached_tokens
        if is_whole:
            self.sim.fill(reservation.block_ids, token_ids, start)
            self.sim.scheduler.loans.insert(owner)
        else:
            self.sim.fill(reservation.block_ids, [-1] * (start + (len(token_ids) - start) // 2), start)
            self.sim.scheduler.release(owner)

    @precondition(lambda self: self.read)
    @rule()
    def unpin(self) -> None:
        owner, _ = self.read.popitem()
        self.sim.scheduler.release(owner)

    @rule(repeat=st.integers(1, 6))
    def step(self, repeat: int) -> None:
        for _ in range(repeat):
            self.sim.step()

    @rule(which=st.integers(0, 3))
    def step_with_a_bad_row(self, which: int) -> None:
        seen: list[str] = []

        def outcome(row) -> RowResult | None:
            seen.append(row.sequence.request.id)
            return RowResult(error=("NON_FINITE_LOGITS", "")) if len(seen) - 1 == which else None

        self.sim.step(outcome)
        self.gone |= set(self.sim.failed)

    @rule()
    def step_lost(self) -> None:
        self.sim.step(whole="lost")
        self.gone |= set(self.sim.failed)

    @invariant()
    def consistent(self) -> None:
        check(self.sim.scheduler)
        for owner, (block_ids, token_ids) in self.read.items():
            self.sim.verify(block_ids, token_ids[: 16 * len(block_ids)], owner)

    def teardown(self) -> None:
        """Whatever happened: once peers let go, everything ends, and every survivor has its one right output."""
        sim = self.sim
        for owner in (*self.read, *self.filled):
            sim.scheduler.release(owner)
        for _ in range(3000):
            for name in sim.wanted:
                sim.scheduler.grant(name, 0)
            sim.wanted.clear()
            for owner in sim.granted:
                sim.scheduler.release(owner)
            for name in self.sinks:
                if sim.outputs.get((name, 0)):
                    sim.scheduler.release(name)
            plan = sim.step()
            stats = sim.scheduler.stats()
            if not (plan.rows or plan.granted or stats.num_waiting or stats.num_running):
                break
        for name in self.sinks:
            sim.scheduler.release(name)
        idle(sim)
        self.gone |= set(sim.failed)  # a step launched ahead is lost only when it is taken in
        for (name, index), tokens in sim.outputs.items():
            request = self.requests[name]
            right = expected(request, index, sim.max_model_len)
            assert tokens == right[: len(tokens)]
            if name not in self.gone and name not in self.sinks and (name, index) not in sim.finished:
                raise AssertionError(f"{name} never finished")
        for name, blocks in sim.reported.items():
            assert blocks == list(range(blocks[0], blocks[0] + len(blocks))), f"{name}: {blocks} reported"


class AheadMachine(SchedulerMachine):
    """The same lives with each plan launched before the one before is taken in, on a device that works late."""

    def simulator(self) -> Simulator:
        sim = super().simulator()
        sim.ahead, sim.scheduler.eos_token_ids = True, frozenset({7, 11})
        return sim


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestAheadMachine = AheadMachine.TestCase
TestAheadMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
