"""Tickets that are over while their one-sided writers may still be writing.

    released, expired ──► held ──fence(): the writer has stopped, or never began──► out
                            └───fence_gone(): it has ended for certain────────────► out

The pages of a held ticket's owner must not be used again. Who asks the writers: decode_worker/fencing.py; who ends one
that does not answer: cluster/fencing.py.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.guards import Guards
from kv_transfer.ticket import Ticket


@dataclass(frozen=True, slots=True)
class SilentWriter:
    """One whose word is missing."""

    source: tuple[str, str]  # worker id and incarnation
    process: str  # its name (kv_transfer/locality.py), empty if it is not known
    transfer_ids: tuple[bytes, ...]
    age_s: float  # of the oldest of them


class Quarantine:
    """One per receiver. Thread-safe. `num_held` counts tickets since the start."""

    def __init__(self, guards: Guards | None, clock: Callable[[], float]) -> None:
        self.num_held = 0
        self._guards = guards
        self._clock = clock
        self._lock = threading.Lock()
        self._tickets: dict[bytes, Ticket] = {}
        self._since_s: dict[bytes, float] = {}

    def __contains__(self, transfer_id: bytes) -> bool:
        """Whether the ticket is over, but its writer may still be writing."""
        return transfer_id in self._tickets

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets[ticket.transfer_id] = ticket
            self._since_s[ticket.transfer_id] = self._clock()
            self.num_held += 1

    def fence(self, transfer_id: bytes) -> str | None:
        """The writer will not write any more: returns the owner whose pages are free to go, None if none are."""
        with self._lock:
            ticket = self._tickets.pop(transfer_id, None)
            self._since_s.pop(transfer_id, None)
        if ticket is None:
            return None
        assert self._guards is not None and ticket.placement is not None
        self._guards.free(ticket.placement.guard)
        return ticket.owner

    def fence_gone(self, is_gone: Callable[[tuple[str, str], str], bool]) -> list[str]:
        """Asks of each writer, (worker id, incarnation) and process, whether it has ended for certain; returns the
        owners whose pages are free to go."""
        gone = [ticket.transfer_id for ticket in self.tickets().values() if is_gone(ticket.source, ticket.writer)]
        owners = [self.fence(transfer_id) for transfer_id in gone]
        return [owner for owner in owners if owner is not None]

    def writers(self) -> list[SilentWriter]:
        """Whom the tickets wait for."""
        with self._lock:
            held = [(self._tickets[transfer_id], since_s) for transfer_id, since_s in self._since_s.items()]
        own: dict[tuple[tuple[str, str], str], list[tuple[float, bytes]]] = {}
        for ticket, since_s in held:
            own.setdefault((ticket.source, ticket.writer), []).append((since_s, ticket.transfer_id))
        return [
            SilentWriter(source, process, tuple(i for _, i in tickets), self._clock() - min(tickets)[0])
            for (source, process), tickets in own.items()
        ]

    def tickets(self) -> dict[bytes, Ticket]:
        """A copy."""
        with self._lock:
            return dict(self._tickets)
