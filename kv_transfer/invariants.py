"""What must hold of a receiver's tickets at any time: tests check it after each operation, workers on demand."""

from collections.abc import Mapping

import numpy as np

from kv_transfer.guards import Guards
from kv_transfer.memory import BlockMemory
from kv_transfer.ticket import LIVE, State, Ticket


def check(
    memory: BlockMemory,
    guards: Guards | None,
    live: Mapping[bytes, Ticket],
    dead: Mapping[bytes, Ticket],
    quarantined: Mapping[bytes, Ticket],
) -> None:
    """AssertionError says what is broken."""
    assert not live.keys() & quarantined.keys() and not live.keys() & dead.keys()
    if guards is not None:
        held = [t.placement.guard for t in [*live.values(), *quarantined.values()] if t.placement is not None]
        assert len(held) == len(set(held)) == guards.num_taken, "a guard has no ticket, or two"
        assert not any(guards.words[t.placement.guard] for t in quarantined.values() if t.placement)
    writable = [block_id for ticket in live.values() for block_id in ticket.block_ids[ticket.first_block :]]
    assert len(writable) == len(set(writable)), "two live tickets may write the same page"
    for ticket in live.values():
        with ticket.lock:
            assert ticket.num_covered == int(ticket.covered.sum())
            layers = range(memory.num_layers)
            widths = np.array([memory.width(i, i + 1, ticket.block_size) for i in layers], np.int64)
            assert ticket.received.num_bytes == int((ticket.covered * widths).sum())
            assert (ticket.error is not None) == (ticket.state is State.FAILED)
            assert ticket.state is not State.GRANTED or ticket.received.num_chunks == 0
    for ticket in dead.values():
        assert ticket.state not in LIVE and not ticket.waiters and not ticket.block_ids
