"""Requests in flight on this router: their labels, their number, and whether more are let in."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from protos import inference_pb2 as pb
from router.errors import RequestError, clip
from router.pipeline import Pipeline


class Ticket:
    """One request's place, from its first byte of work to its end. `pipeline` is None until it is validated."""

    __slots__ = ("is_aborted", "pipeline", "request_id")

    def __init__(self, request_id: str):
        self.request_id = request_id
        self.is_aborted = False
        self.pipeline: Pipeline | None = None

    def begin(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        if self.is_aborted:
            pipeline.abort()

    def abort(self) -> None:
        self.is_aborted = True
        if self.pipeline is not None:
            self.pipeline.abort()


class Admission:
    """At most `max_in_flight` requests at once, each with a label of its own."""

    def __init__(self, max_in_flight: int):
        self.is_closed = False
        self._max_in_flight = max_in_flight
        self._tickets: dict[str, Ticket] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_in_flight(self) -> int:
        return len(self._tickets)

    @contextmanager
    def enter(self, request_id: str) -> Iterator[Ticket]:
        """Holds a place for the block. RequestError DRAINING, DUPLICATE_REQUEST_ID or QUEUE_FULL if there is none."""
        if self.is_closed:
            raise RequestError(pb.ERROR_REASON_DRAINING, "this router is draining; another one takes requests")
        if request_id in self._tickets:
            raise RequestError(
                pb.ERROR_REASON_DUPLICATE_REQUEST_ID, f"request_id {clip(request_id)} is in flight already"
            )
        if len(self._tickets) >= self._max_in_flight:
            raise RequestError(
                pb.ERROR_REASON_QUEUE_FULL,
                f"{len(self._tickets)} requests are in flight; max_queued_requests is {self._max_in_flight}",
            )
        ticket = self._tickets[request_id] = Ticket(request_id)
        self._empty.clear()
        try:
            yield ticket
        finally:
            del self._tickets[request_id]
            if not self._tickets:
                self._empty.set()

    def close(self) -> None:
        self.is_closed = True

    async def wait_empty(self) -> None:
        await self._empty.wait()

    def abort(self, request_id: str) -> bool:
        """Whether there was something to end."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            ticket.abort()
        return ticket is not None

    def pipelines(self) -> list[Pipeline]:
        return [t.pipeline for t in self._tickets.values() if t.pipeline is not None]

    def run_ids(self) -> set[str]:
        return {p.run_id for p in self.pipelines()}

    def phases(self) -> dict[str, int]:
        return dict(Counter("validating" if t.pipeline is None else t.pipeline.phase for t in self._tickets.values()))
