"""Who gets in: the queue of prompts and reservations, and the reservations that were granted. Plain Python.

One queue, in order: preempted sequences, then prompts and reservations by priority, first come first served. Its head
waits for blocks and seats and nothing overtakes it, except that a sink prompt whose receiver has no pages yet holds
nothing and stands aside. A prompt takes all its blocks on admission.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable
from itertools import count

from engine.allocator import Allocator
from engine.limits import num_growth_blocks
from engine.request import Request, Reservation, Started
from engine.sequence import Gate, HeldReservation, Plan, QueuedReservation, Sequence, Status


class Admission:
    """`running` is the scheduler's batch: what is admitted joins it, and what is in it takes seats and will grow."""

    def __init__(self, blocks: Allocator, running: list[Sequence], max_num_seqs: int, max_num_batched_tokens: int):
        self.blocks = blocks
        self.running = running
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.queue: list[Sequence | QueuedReservation] = []
        self.held: dict[str, HeldReservation] = {}  # by owner
        self.quarantined: dict[str, list[int]] = {}  # by owner: blocks of reservations given up, which a peer may write
        self.num_cached_tokens = 0  # of all prompts admitted so far: found in the prefix cache
        self.num_returned_tokens = 0  # those of them whose KV a decode worker made
        self._generations = count(1)

    def enqueue(self, entry: Sequence | QueuedReservation) -> None:
        insort(self.queue, entry, key=lambda e: e.order)

    def is_reserving(self, owner: str) -> bool:
        """Whether `owner` holds a reservation or waits for one."""
        return owner in self.held or any(isinstance(e, QueuedReservation) and e.owner == owner for e in self.queue)

    @property
    def num_reservations(self) -> int:
        """Held and queued."""
        return len(self.held) + sum(isinstance(e, QueuedReservation) for e in self.queue)

    @property
    def has_waiting(self) -> bool:
        """Whether anything in the queue would take blocks now if there were enough."""
        return any(isinstance(e, QueuedReservation) or e.gate is Gate.OPEN for e in self.queue)

    @property
    def headroom(self) -> int:
        """A block for each sequence that grows: what admission must leave, or it would preempt at once."""
        return sum(not s.is_sink for s in self.running)

    def next_generation(self) -> int:
        return next(self._generations)

    def ask(self, plan: Plan) -> None:
        """Lets the next sink prompts get pages: at most one step's worth, always at least one.

        What waits at a receiver counts for that receiver alone, so that a full one holds up nobody else's prompts. The
        first that is too much for its receiver now holds the place for those behind it.
        """
        prompts = [e for e in self.queue if isinstance(e, Sequence) and e.is_sink]
        granted = sum(len(s.token_ids) for s in prompts if s.gate is Gate.OPEN)
        asked: Counter[str | None] = Counter()
        for sequence in prompts:
            if sequence.gate is Gate.ASKED:
                asked[sequence.receiver] += len(sequence.token_ids)
        full: set[str | None] = set()
        for sequence in prompts:
            if sequence.gate is Gate.CLOSED and sequence.receiver not in full:
                before = granted + asked[sequence.receiver]
                if before and before + len(sequence.token_ids) > self.max_num_batched_tokens:
                    full.add(sequence.receiver)
                    continue
                asked[sequence.receiver] += len(sequence.token_ids)
                sequence.gate = Gate.ASKED
                plan.wanted.append(sequence.request.id)

    def admit(self, plan: Plan, budget: int) -> list[tuple[Sequence, int]]:
        """Takes from the queue what fits now. Returns the sequences that joined the batch, each with how many of its
        tokens this step computes; the reservations granted are in `plan`."""
        chosen: list[tuple[Sequence, int]] = []
        admitted = []
        for entry in self.queue:
            if isinstance(entry, QueuedReservation):
                reservation = self._hold(entry)
                if reservation is None:
                    break
                plan.granted.append(reservation)
            elif entry.gate is not Gate.OPEN:
                continue
            elif budget > 0 and self._start(entry, plan):
                chosen.append((entry, min(budget, entry.num_pending)))
                budget -= chosen[-1][1]
            else:
                break
            admitted.append(entry)
        for entry in admitted:
            self.queue.remove(entry)
        return chosen

    def quarantine(self, owner: str) -> None:
        """Gives up a held reservation, but keeps the blocks that a peer was to fill until `unquarantine`."""
        held = self.held.pop(owner, None)
        if held is not None:
            self.blocks.release([*held.block_ids[: held.num_cached], *held.growth], wipe=True)
            self.quarantined[owner] = held.block_ids[held.num_cached :]

    def unquarantine(self, owner: str) -> None:
        self.blocks.release(self.quarantined.pop(owner, []), wipe=True)

    def drop_reservations(self, chosen: Callable[[str, Request], bool]) -> list[str]:
        """Frees those, held or queued, whose owner and request are `chosen`. Returns their owners."""
        dropped = [owner for owner, held in self.held.items() if chosen(owner, held.request)]
        for owner in dropped:
            held = self.held.pop(owner)
            self.blocks.release([*held.block_ids, *held.growth], wipe=True)
        queued = [e for e in self.queue if isinstance(e, QueuedReservation) and chosen(e.owner, e.request)]
        for entry in queued:
            self.queue.remove(entry)
        return dropped + [entry.owner for entry in queued]

    def _start(self, sequence: Sequence, plan: Plan) -> bool:
        """Gives a queued sequence its seat and all the blocks its tokens need, cached ones first."""
        request, token_ids = sequence.request, sequence.token_ids
        blocks = None
        if self._has_seats(sequence.forks):
            blocks = self.blocks.take(request, token_ids, sequence.hashes, len(token_ids), self.headroom)
        if blocks is None:
            return False
        num_hits, sequence.block_ids, sequence.hashes = blocks
        sequence.num_computed, sequence.num_committed = num_hits * self.blocks.block_size, num_hits
        sequence.status, sequence.was_preempted = Status.RUNNING, False
        self.running.append(sequence)
        if not sequence.was_started:
            sequence.was_started = True
            self.num_cached_tokens += sequence.num_computed
            num_returned = self.blocks.pool.num_returned(sequence.block_ids[:num_hits]) * self.blocks.block_size
            self.num_returned_tokens += num_returned
            plan.events.append(Started(request.id, sequence.num_computed, num_returned))
        if sequence.is_sink and sequence.num_reported < num_hits:
            first = sequence.num_reported
            plan.cached.append((request.id, first, sequence.block_ids[first:num_hits]))
            sequence.num_reported = num_hits
        return True

    def _hold(self, entry: QueuedReservation) -> Reservation | None:
        """Grants a reservation: the prompt's blocks, its prefix hits pinned at the front, and room to grow."""
        request, n = entry.request, entry.request.sampling.num_sequences
        growth = num_growth_blocks(n, entry.num_tokens, self.blocks.block_size)
        if not self._has_seats(n):
            return None
        spare = growth + self.headroom
        blocks = self.blocks.take(request, request.token_ids, [], entry.num_tokens, spare, entry.align)
        if blocks is None:
            return None
        num_hits, block_ids, hashes = blocks
        extra = self.blocks.pool.allocate(growth)
        assert extra is not None, "the room to grow was counted"
        hashes = self.blocks.hashes(request, hashes)  # now, and not when it is adopted
        self.held[entry.owner] = HeldReservation(request, block_ids, num_hits, extra, hashes)
        return Reservation(entry.owner, tuple(block_ids), num_hits * self.blocks.block_size, self.next_generation())

    def _has_seats(self, n: int) -> bool:
        taken = sum(s.forks for s in self.running)
        taken += sum(held.request.sampling.num_sequences for held in self.held.values())
        return taken + n <= self.max_num_seqs
