"""One worker as the router sees it: its channel, its load, and for decode workers the session shared by all runs.

Life of a connection here:
1. `start` begins a task that lives until `close`: connect, serve, and on any break lose all attempts and connect again.
2. GetWorker says who answers; another incarnation than membership's is refused (its KV and tickets mean nothing).
3. A decode worker gets a Session: Hello first, then Expect and Cancel from an outbox, so that no run waits for a write.
4. WatchLoad's first message makes the worker ready. Silence for `worker_silence_s`, or the end of any stream, is loss.
5. Steps are handed to attempts by run id, in the reading task: one queue hop per step, none per token.

    CONNECTING --first load--> READY --stream breaks--> LOST --first load--> READY      any --close--> CLOSED
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol

import grpc

from protos import kv_transfer_pb2 as kpb
from protos import worker_pb2 as wpb
from protos import worker_pb2_grpc
from protos.grpc_options import CHANNEL_OPTIONS
from router.config import RouterConfig

log = logging.getLogger(__name__)

ROUTER_INCARNATION = secrets.token_hex(8)  # of this process

CONNECT_TIMEOUT_S = 5.0
# The pipeline retries, with a new attempt number; grpc must not.
_OPTIONS = (*CHANNEL_OPTIONS, ("grpc.enable_retries", 0))
_RECONNECT_DELAYS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


class Resident(Protocol):
    """An attempt, as far as its workers know it."""

    run_id: str
    number: int

    def on_entry(self, entry: wpb.StepEntry) -> None: ...
    def on_worker_lost(self, client: "WorkerClient", why: str) -> None: ...


class Connection(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    LOST = "lost"
    CLOSED = "closed"


class WorkerGone(Exception):
    """The worker does not answer as membership says it should."""


class WorkerClient:
    """`member` may be replaced by one of the same incarnation (its state changes). `on_change` hears every change of
    readiness or load."""

    def __init__(self, member: wpb.Member, config: RouterConfig, on_change: Callable[[], None]):
        self.member = member
        self.connection = Connection.CONNECTING
        self.info: wpb.GetWorkerResponse | None = None
        self.load = wpb.WorkerLoad()
        self.stepped_at = time.monotonic()  # when its reports last showed steps of its engine
        self.residents: dict[str, Resident] = {}  # by run id: attempts that hold something at this worker
        self.queued_prompt_tokens = 0  # of our attempts here whose first token is not out yet
        self.num_sequences = 0  # of our attempts that decode here
        self.promised_blocks = 0  # of our attempts that are to decode here and hold nothing yet, as far as we know
        self.last_error = ""
        self._config = config
        self._on_change = on_change
        self._channel = grpc.aio.insecure_channel(member.address, options=_OPTIONS)
        self._worker = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._prefill = worker_pb2_grpc.PrefillServiceStub(self._channel)
        self._decode = worker_pb2_grpc.DecodeServiceStub(self._channel)
        self._outbox: deque[wpb.SessionCommand] = deque()
        self._outbox_filled = asyncio.Event()
        self._session_open = False
        self._task: asyncio.Task[None] | None = None

    @property
    def worker_id(self) -> str:
        return self.member.worker_id

    @property
    def can_prefill(self) -> bool:
        return self.member.role == wpb.WORKER_ROLE_PREFILL

    @property
    def can_decode(self) -> bool:
        return self.member.role == wpb.WORKER_ROLE_DECODE

    @property
    def is_colocated(self) -> bool:
        return self.member.role == wpb.WORKER_ROLE_BOTH

    @property
    def takes_work(self) -> bool:
        """Connected, and neither membership nor the worker itself says otherwise."""
        return (
            self.connection is Connection.READY
            and self.load.state == wpb.WORKER_STATE_READY
            and self.member.state in (wpb.WORKER_STATE_STARTING, wpb.WORKER_STATE_READY)
        )

    @property
    def may_become_ready(self) -> bool:
        """Waiting for it makes sense: it is starting, or its connection is lost and membership has not given it up."""
        if self.member.state not in (wpb.WORKER_STATE_STARTING, wpb.WORKER_STATE_READY):
            return False
        return self.connection is not Connection.READY or self.load.state == wpb.WORKER_STATE_STARTING

    @property
    def ref(self) -> kpb.WorkerRef:
        return kpb.WorkerRef(worker_id=self.member.worker_id, incarnation=self.member.incarnation)

    def start(self) -> None:
        self._task = asyncio.create_task(self._stay_connected(), name=f"worker-{self.worker_id}")

    async def close(self, why: str) -> None:
        """Ends the connection; attempts that live here are told. Idempotent."""
        self.connection = Connection.CLOSED
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._lose(why)
        await self._channel.close(None)

    def admit(self, resident: Resident) -> None:
        """`resident` hears of this worker's loss until `dismiss`, and of its own steps."""
        assert resident.run_id not in self.residents, "two attempts of one run at one worker"
        self.residents[resident.run_id] = resident

    def dismiss(self, resident: Resident) -> None:
        if self.residents.get(resident.run_id) is resident:
            del self.residents[resident.run_id]

    def prefill(self, request: wpb.PrefillRequest, timeout_s: float) -> Any:
        """The call's stream of PrefillEvent; cancelling it aborts the run at the worker."""
        return self._prefill.Prefill(request, timeout=timeout_s)

    def command(self, command: wpb.SessionCommand) -> None:
        """Sends on the session, in order. Dropped without one: the worker aborts a broken session's runs itself."""
        if self._session_open:
            self._outbox.append(command)
            self._outbox_filled.set()

    def suspect(self, why: str) -> None:
        """One of its streams broke: out until it reports its load again."""
        if self.connection is Connection.READY:
            self.connection = Connection.LOST
            self.last_error = why
            self._on_change()

    def check(self) -> None:
        """Counters agree with the residents; with none, they are zero."""
        assert self.residents or self.queued_prompt_tokens == 0, (self.worker_id, self.queued_prompt_tokens)
        assert self.residents or self.num_sequences == 0, (self.worker_id, self.num_sequences)
        assert self.residents or self.promised_blocks == 0, (self.worker_id, self.promised_blocks)
        assert self.queued_prompt_tokens >= 0 and self.num_sequences >= 0, self.worker_id

    async def _stay_connected(self) -> None:
        failures = 0
        while True:
            try:
                await self._serve_connection()
            except* Exception as group:
                why = _describe(group)
            if self.connection is Connection.CLOSED:
                return  # a task group that was breaking anyway has swallowed the cancellation
            was_ready = self.connection is Connection.READY
            self._lose(why)
            failures = 0 if was_ready else failures + 1
            await asyncio.sleep(_RECONNECT_DELAYS_S[min(failures, len(_RECONNECT_DELAYS_S) - 1)])

    async def _serve_connection(self) -> None:
        """Returns only by an exception (group): whatever ended the connection."""
        info = await self._worker.GetWorker(wpb.GetWorkerRequest(), timeout=CONNECT_TIMEOUT_S)
        if (info.worker_id, info.incarnation) != (self.member.worker_id, self.member.incarnation):
            raise WorkerGone(f"worker {info.worker_id!r}, incarnation {info.incarnation!r} answers at its address")
        self.info = info
        watch = self._worker.WatchLoad(self._watch_request())
        session = None if self.can_prefill else self._decode.Session()
        try:
            async with asyncio.TaskGroup() as tasks:
                if session is not None:
                    await session.write(wpb.SessionCommand(hello=self._hello()))
                    self._session_open = True
                    tasks.create_task(self._write_commands(session))
                    tasks.create_task(self._read_steps(session))
                tasks.create_task(self._read_load(watch))
        finally:
            self._session_open = False
            self._outbox.clear()
            watch.cancel()
            if session is not None:
                session.cancel()

    def _watch_request(self) -> wpb.WatchLoadRequest:
        request = wpb.WatchLoadRequest()
        request.interval.FromNanoseconds(int(self._config.load_interval_s * 1e9))
        return request

    def _hello(self) -> wpb.Hello:
        return wpb.Hello(router_id=self._config.router_id, incarnation=ROUTER_INCARNATION)

    async def _read_load(self, watch: Any) -> None:
        while True:
            load = await self._next_load(watch)
            if load is grpc.aio.EOF:  # type: ignore[attr-defined]
                raise WorkerGone("it ended the load stream")
            if load.steps != self.load.steps:
                self.stepped_at = time.monotonic()
            changed = self.connection is not Connection.READY or load.state != self.load.state
            self.load = load
            self.connection = Connection.READY
            if changed:
                self.last_error = ""
                self._on_change()

    async def _next_load(self, watch: Any) -> Any:
        """Waits in two halves: after a pause of our own process, what has arrived meanwhile gets its turn."""
        read = asyncio.ensure_future(watch.read())
        try:
            for _ in range(2):
                done, _ = await asyncio.wait([read], timeout=self._config.worker_silence_s / 2)
                if done:
                    return read.result()
            raise WorkerGone(f"no load report for {self._config.worker_silence_s:g} s")
        finally:
            read.cancel()

    async def _write_commands(self, session: Any) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                try:
                    await session.write(self._outbox.popleft())
                except asyncio.InvalidStateError:
                    raise WorkerGone("the session ended while writing") from None

    async def _read_steps(self, session: Any) -> None:
        next_step = 0
        residents = self.residents
        while True:
            step = await session.read()
            if step is grpc.aio.EOF:  # type: ignore[attr-defined]
                raise WorkerGone("it ended the session")
            if step.step != next_step:
                raise WorkerGone(f"the session jumped from step {next_step} to {step.step}")
            next_step += 1
            for entry in step.entries:
                resident = residents.get(entry.run_id)
                if resident is not None and resident.number == entry.attempt:
                    resident.on_entry(entry)

    def _lose(self, why: str) -> None:
        if self.connection is not Connection.CLOSED:
            self.connection = Connection.LOST
            if why != self.last_error:
                log.warning("worker %s at %s: %s", self.worker_id, self.member.address, why)
        self.last_error = why
        for resident in list(self.residents.values()):
            resident.on_worker_lost(self, why)
        self._on_change()


def _describe(group: BaseExceptionGroup[BaseException]) -> str:
    error = group.exceptions[0]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if not isinstance(error, WorkerGone):
        log.error("a bug ended the connection", exc_info=error)
    return str(error) or repr(error)
