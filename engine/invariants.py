"""What must hold between any two steps: tests call it after each, and `Engine.check` on demand."""

from collections import Counter

from engine.scheduler import Scheduler
from engine.sequence import Sequence, Status


def check(scheduler: Scheduler) -> None:
    """Every invariant, those of the pool included. AssertionError says which one is broken."""
    owned: Counter[int] = Counter()
    for run in scheduler._runs.values():
        assert bool(run.live) != (run.pinned is not None), f"{run.request.id}: neither alive nor pinned"
        owned.update(run.pinned or ())
        for sequence in run.live:
            owned.update(sequence.block_ids)
            waiting, running = sequence in scheduler.admission.queue, sequence in scheduler._running
            assert waiting == (sequence.status is Status.WAITING), f"{run.request.id}: queue and status differ"
            assert running == (sequence.status is Status.RUNNING), f"{run.request.id}: batch and status differ"
            assert running or not sequence.block_ids, f"{run.request.id}: holds blocks while it waits"
            capacity = len(sequence.block_ids) * scheduler.block_size
            assert not running or sequence.num_computed <= capacity, f"{run.request.id}: KV outside its blocks"
            assert sequence.num_pending >= 1, f"{run.request.id}: nothing left to compute"
            flying = [row for plan in scheduler._flying for row in plan.rows if row.sequence is sequence]
            assert sequence.num_launched == sum(row.num_tokens for row in flying), f"{run.request.id}: in flight"
            assert sequence.num_unknown == sum(row.samples for row in flying), f"{run.request.id}: unknown tokens"
    for plan, block_ids, _ in scheduler.blocks.late:
        assert plan in scheduler._flying, "blocks wait for a plan that is not in flight"
        owned.update(block_ids)
    for held in scheduler.admission.held.values():
        owned.update(held.block_ids)
        owned.update(held.growth)
    owned.update(scheduler.loans.block_ids())
    for block_ids in scheduler.admission.quarantined.values():
        owned.update(block_ids)
    live = sum(len(run.live) for run in scheduler._runs.values())
    assert live == len(scheduler._running) + sum(isinstance(e, Sequence) for e in scheduler.admission.queue), (
        "a sequence has no run"
    )
    assert scheduler.admission.queue == sorted(scheduler.admission.queue, key=lambda e: e.order), (
        "the queue is out of order"
    )
    assert sum(r.forks for r in scheduler._running) <= scheduler.max_num_seqs, "more sequences than seats"
    scheduler.pool.check(owned)
