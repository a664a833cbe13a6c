"""The runs of a decode worker, from Expect to their last token.

    EXPECTED --Reserve--> RESERVING --grant--> GRANTED --Commit--> ADOPTED --> over
        |                     |                   |                   |
        |  (no source: prefilled here) -------------------------> ADOPTED
        +---------------------+-------------------+-------------------+--> over (cancelled, failed, expired, superseded)

Commit may come on another thread than the event loop, which has the rest: between it and an end, the run's lock
decides. A run that is over leaves a tombstone (run id, attempt), so that what still comes for it is refused.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.request import Request
from engine.wire import token_hash
from protos import kv_transfer_pb2 as kv
from protos import worker_pb2

MAX_TOMBSTONES = 65536


class RunState(Enum):
    EXPECTED = auto()
    RESERVING = auto()
    GRANTED = auto()
    ADOPTED = auto()
    OVER = auto()


@dataclass(slots=True)
class Run:
    """One attempt of one request here. `emit` queues a StepEntry for the router that announced it."""

    run_id: str
    attempt: int
    request: Request
    source: kv.WorkerRef | None  # the prefill worker that may reserve for it; None: prefilled here
    emit: Callable[[worker_pb2.StepEntry], None]
    state: RunState = RunState.EXPECTED
    transfer_id: bytes = b""
    num_open_sequences: int = 0
    output: list[int] = field(default_factory=list)  # tokens after request.token_ids, while there is one sequence
    deadline: asyncio.TimerHandle | None = None
    entries: dict[int, worker_pb2.StepEntry] = field(default_factory=dict)  # of the step being gathered, by sequence
    lock: threading.Lock = field(default_factory=threading.Lock)  # to leave GRANTED, and to be over
    adopting: "Future[None] | None" = None  # the engine's answer, once it has been asked to
    is_announced: bool = False  # as adopted, to the router
    _token_hash: bytes = b""

    @property
    def owner(self) -> str:
        """What the engine knows this attempt's pages by."""
        return self.request.id

    def token_hash(self) -> bytes:
        """What a commit must say its KV is of. Computed once."""
        self._token_hash = self._token_hash or token_hash(self.request.token_ids)
        return self._token_hash

    def entry(self, **fields) -> worker_pb2.StepEntry:
        return worker_pb2.StepEntry(run_id=self.run_id, attempt=self.attempt, **fields)


class RunTable:
    """Live runs by id and by ticket, and the tombstones of those that are over."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._by_transfer: dict[bytes, Run] = {}
        self._tombstones: OrderedDict[str, int] = OrderedDict()
        self._arrived = asyncio.Condition()
        self.idle = asyncio.Event()
        self.idle.set()

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self):
        return iter(list(self._runs.values()))

    def is_over(self, run_id: str, attempt: int) -> bool:
        """Whether this attempt, or a later one, has already ended here."""
        return self._tombstones.get(run_id, -1) >= attempt

    def find(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    def by_transfer(self, transfer_id: bytes) -> Run | None:
        return self._by_transfer.get(transfer_id)

    async def add(self, run: Run) -> None:
        assert run.run_id not in self._runs, run.run_id
        self._runs[run.run_id] = run
        self.idle.clear()
        async with self._arrived:
            self._arrived.notify_all()

    async def wait_for(self, run_id: str, attempt: int, timeout_s: float) -> Run | None:
        """The attempt once the router has announced it, since a Reserve may overtake its Expect; None if too late."""

        def here() -> Run | None:
            run = self._runs.get(run_id)
            return run if run is not None and run.attempt == attempt else None

        try:
            async with asyncio.timeout(timeout_s), self._arrived:
                await self._arrived.wait_for(lambda: here() is not None or self.is_over(run_id, attempt))
        except TimeoutError:
            return None
        return here()

    def granted(self, run: Run, transfer_id: bytes) -> None:
        run.transfer_id = transfer_id
        run.state = RunState.GRANTED
        self._by_transfer[transfer_id] = run

    def remove(self, run: Run) -> None:
        run.state = RunState.OVER
        if run.deadline is not None:
            run.deadline.cancel()
        self._runs.pop(run.run_id, None)
        self._by_transfer.pop(run.transfer_id, None)
        self._bury(run.run_id, run.attempt)
        if not self._runs:
            self.idle.set()

    async def refuse(self, run_id: str, attempt: int) -> None:
        """This attempt and all before it are over, whether or not they were ever here; who waits for one hears it."""
        self._bury(run_id, attempt)
        async with self._arrived:
            self._arrived.notify_all()

    def _bury(self, run_id: str, attempt: int) -> None:
        self._tombstones[run_id] = max(attempt, self._tombstones.get(run_id, -1))
        self._tombstones.move_to_end(run_id)
        while len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
