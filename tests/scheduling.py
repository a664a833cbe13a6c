"""A device that computes nothing: it remembers which token context each KV slot was written for, and insists on it.

The "model" is a hash of the tokens so far, so every sequence has one right continuation whatever was preempted, shared,
forked or handed over on the way; `Simulator.step` checks every slot a row would attend to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from engine.invariants import check
from engine.request import Event, Failed, Preempted, Request, Reservation, SamplingParams, Started, Token
from engine.scheduler import Scheduler
from engine.sequence import Plan, Row, RowResult

VOCAB = 50


def context(token_ids) -> int:
    return hash(tuple(token_ids))


def next_token(token_ids, index: int) -> int:
    """What the pretend model samples for sequence `index` after `token_ids`. Never below 3: ids 0 to 2 are for EOS."""
    return 3 + (hash((*token_ids, index)) % (VOCAB - 3))


def expected(request: Request, index: int, max_model_len: int = 10**9) -> list[int]:
    ids = list(request.token_ids)
    stop = min(request.num_prompt_tokens + request.sampling.max_tokens, max_model_len)
    while len(ids) < stop:
        ids.append(next_token(ids, index))
    return ids[len(request.token_ids) :]


def make_request(name: str, tokens, max_tokens: int = 8, n: int = 1, priority: int = 0, **more) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, num_sequences=n)
    return Request(name, tuple(tokens), len(tokens), sampling, priority=priority, **more)


@dataclass
class Simulator:
    num_blocks: int = 16
    block_size: int = 16
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 24
    max_model_len: int = 200
    eos: frozenset[int] = frozenset()
    caching: bool = True
    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    finished: set[tuple[str, int]] = field(default_factory=set)
    started: dict[str, int] = field(default_factory=dict)
    returned: dict[str, int] = field(default_factory=dict)  # of the tokens cached at the start: returned ones
    failed: dict[str, str] = field(default_factory=dict)
    wanted: list[str] = field(default_factory=list)
    granted: dict[str, Reservation] = field(default_factory=dict)
    reported: dict[str, list[int]] = field(default_factory=dict)  # sink prompt -> logical blocks, in order
    preemptions: int = 0
    ahead: bool = False  # launch each plan before the results of the one before are taken in, as on a GPU
    flying: list[tuple[Plan, list[RowResult], str | None]] = field(default_factory=list)
    launched: list[int] = field(default_factory=list)  # how many works the device has done once each of them is
    device: list[Callable[[], None]] = field(default_factory=list)  # launched, not done yet: it happens late
    num_done: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.num_blocks,
            self.block_size,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_model_len,
            self.eos,
            self.caching,
        )
        self.slots: list[list[int | None]] = [[None] * self.block_size for _ in range(self.num_blocks)]

    def fill(self, block_ids, token_ids, start: int = 0) -> None:
        """Writes the KV of token_ids[start:], as a transfer would."""
        for i in range(start, len(token_ids)):
            self.slots[block_ids[i // self.block_size]][i % self.block_size] = context(token_ids[: i + 1])

    def verify(self, block_ids, token_ids, what: str) -> None:
        for i in range(len(token_ids)):
            found = self.slots[block_ids[i // self.block_size]][i % self.block_size]
            assert found == context(token_ids[: i + 1]), f"{what}: slot {i} holds another context's KV"

    def step(self, outcome: Callable[[Row], RowResult | None] = lambda row: None, whole: str | None = None) -> Plan:
        """One step. `outcome` may replace a row's result; `whole` fails the step."""
        self.apply()
        plan = self.scheduler.schedule()
        assert sum(row.num_tokens for row in plan.rows) <= self.max_num_batched_tokens
        check(self.scheduler)
        self.hear(plan.events)
        self.wanted += plan.wanted
        self.granted |= {r.owner: r for r in plan.granted}
        for name, first, block_ids in plan.cached:
            self.reported.setdefault(name, []).extend(range(first, first + len(block_ids)))
        results = []
        for row in plan.rows:
            sequence = row.sequence
            ids = [*sequence.token_ids, *self.unknown(sequence)]
            self.device.append(partial(self.compute, list(sequence.block_ids), ids, row.start, row.stop))
            if row.report:
                self.reported.setdefault(sequence.request.id, []).extend(range(*row.report))
            result = RowResult()
            if row.samples:
                result.tokens = [(next_token(ids, sequence.index + i), None) for i in range(sequence.forks)]
            results.append(outcome(row) or result)
        self.flying.append((plan, results, whole))
        self.launched.append(self.num_done + len(self.device))
        keep = self.ahead and bool(plan.rows) and not plan.must_settle
        while len(self.flying) > keep:
            self.settle()
        self.apply()
        check(self.scheduler)
        return plan

    def settle(self) -> None:
        """Takes in the oldest plan in flight."""
        plan, results, whole = self.flying.pop(0)
        self.finish_device(max(0, self.launched.pop(0) - self.num_done))
        if whole is not None:
            self.hear(self.scheduler.fail(plan, "INTERNAL", whole))
        else:
            self.hear(self.scheduler.update(plan, results))

    def finish_device(self, n: int | None = None) -> None:
        n = len(self.device) if n is None else n
        done, self.device = self.device[:n], self.device[n:]
        self.num_done += n
        for work in done:
            work()

    def unknown(self, sequence) -> list[int]:
        """Tokens of the sequence that only the device knows yet."""
        return [
            result.tokens[0][0]
            for plan, results, _ in self.flying
            for row, result in zip(plan.rows, results, strict=True)
            if row.sequence is sequence and row.samples and result.tokens
        ]

    def compute(self, block_ids: list[int], ids: list[int], start: int, stop: int) -> None:
        self.fill(block_ids, ids[:stop], start)
        self.verify(block_ids, ids[:stop], "a row")

    def apply(self) -> None:
        ops, self.scheduler.blocks.memory_ops = self.scheduler.blocks.memory_ops, []
        for source, target in ops:
            self.device.append(partial(self.copy, source, target))
        if ops:
            self.finish_device()  # as the runner does: a peer may write there next

    def copy(self, source: int | None, target: int) -> None:
        self.slots[target] = list(self.slots[source]) if source is not None else [None] * self.block_size

    def hear(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Started):
                assert event.request_id not in self.started, "started twice"
                self.started[event.request_id] = event.num_cached_tokens
                self.returned[event.request_id] = event.num_returned_tokens
            elif isinstance(event, Token):
                key = (event.request_id, event.sequence_index)
                assert key not in self.finished, "a token after the last"
                tokens = self.outputs.setdefault(key, [])
                assert event.offset == len(tokens), "offsets are not contiguous"
                tokens.append(event.token_id)
                if event.finish is not None:
                    self.finished.add(key)
            elif isinstance(event, Failed):
                self.failed[event.request_id] = event.reason
            elif isinstance(event, Preempted):
                self.preemptions += 1

    def run(self, max_steps: int = 2000) -> int:
        for steps in range(max_steps):
            if not self.step().rows:
                return steps
        raise AssertionError(f"still busy after {max_steps} steps")


def idle(sim: Simulator) -> None:
    stats = sim.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    assert not (stats.num_requests or stats.num_running or stats.num_waiting or stats.num_waiting_tokens)
    assert not (stats.reserved_blocks or stats.pinned_blocks)
