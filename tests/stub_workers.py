"""Workers without an engine, for testing the router: all three worker services, tokens from a pure function, faults.

    async with StubCluster() as cluster:
        prefill = await cluster.add("p0", "prefill")
        decode = await cluster.add("d0", "decode")
        router.set_members(cluster.members())

Token at output position p of sequence i is `token(seed, i, p)` whatever worker, attempt or batch computes it, as the
real engine's. Hand-off between stubs is a method call. `faults` of a worker may be changed at any time.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos import kv_transfer_pb2 as kpb
from protos import worker_pb2 as wpb
from protos import worker_pb2_grpc
from protos.grpc_options import SERVER_OPTIONS
from tests.stub_faults import Faults, lose_first_tokens, wait_for_pages
from tests.stub_tokens import logprob, token

ROLES = {"prefill": wpb.WORKER_ROLE_PREFILL, "decode": wpb.WORKER_ROLE_DECODE, "both": wpb.WORKER_ROLE_BOTH}


@dataclass(slots=True)
class Run:
    request: wpb.EngineRequest
    session: "Session"
    source: kpb.WorkerRef | None
    positions: dict[int, int] = field(default_factory=dict)  # sequence index -> next output position
    adopted: bool = False


class Session:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[list[wpb.StepEntry] | None] = asyncio.Queue()

    def send(self, *entries: wpb.StepEntry) -> None:
        self.queue.put_nowait(list(entries))


class StubWorker:
    """`log` holds (event, run_id, attempt) in order: what tests assert on. `sent_at`: (run, index, offset) -> time."""

    def __init__(self, cluster: "StubCluster", worker_id: str, role: str, num_blocks: int, fingerprint: str):
        self.cluster = cluster
        self.worker_id = worker_id
        self.role = role
        self.num_blocks = num_blocks
        self.fingerprint = fingerprint
        self.incarnation = secrets.token_hex(8)
        self.state = wpb.WORKER_STATE_READY
        self.faults = Faults()
        self.log: list[tuple[str, str, int]] = []
        self.requests: list[wpb.EngineRequest] = []
        self.sent_at: dict[tuple[str, int, int], float] = {}
        self.received_at: dict[str, float] = {}  # run id -> when its Prefill came
        self.runs: dict[str, Run] = {}
        self.address = ""
        self.eos_token_id = 2
        self.max_model_len = 8192
        self.num_steps = 0
        self._server: Any = None
        self._stepper: asyncio.Task[None] | None = None
        self._sessions: set[Session] = set()
        self._state_changed = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
        await server.start()
        self._server = server
        self._stepper = asyncio.create_task(self._step_forever())

    async def stop(self) -> None:
        """At once, as a killed process: streams break, runs are gone."""
        if self._stepper is not None:
            self._stepper.cancel()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self.runs.clear()

    def set_state(self, state: wpb.WorkerState) -> None:
        self.state = state
        self._state_changed.set()

    def member(self, state: wpb.WorkerState = wpb.WORKER_STATE_READY) -> wpb.Member:
        return wpb.Member(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            address=self.address,
            role=ROLES[self.role],
            state=state,
        )

    def events(self, *names: str) -> list[str]:
        return [name for name, _, _ in self.log if not names or name in names]

    # WorkerService

    async def GetWorker(self, request: wpb.GetWorkerRequest, context: Any) -> wpb.GetWorkerResponse:
        answer = wpb.GetWorkerResponse(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=ROLES[self.role],
            total_kv_blocks=self.num_blocks,
            transport="local",
            model=pb.ModelInfo(max_model_len=self.max_model_len, vocab_size=49152, eos_token_ids=[self.eos_token_id]),
        )
        answer.layout.block_size = 16
        answer.layout.model = "stub"
        answer.layout.dtype = "float32"
        answer.layout.fingerprint = self.fingerprint
        return answer

    async def WatchLoad(self, request: wpb.WatchLoadRequest, context: Any) -> None:
        while True:
            await context.write(self.load())
            self._state_changed.clear()
            try:
                async with asyncio.timeout(0.5):
                    await self._state_changed.wait()
            except TimeoutError:
                pass

    def load(self) -> wpb.WorkerLoad:
        running = sum(len(r.positions) for r in self.runs.values() if r.adopted)
        return wpb.WorkerLoad(
            state=self.state,
            num_running=running,
            total_blocks=self.num_blocks,
            free_blocks=0 if self.faults.full and self.faults.tells_load else self.num_blocks,
            num_runs=len(self.runs),
            steps=self.num_steps,
        )

    async def Drain(self, request: wpb.DrainRequest, context: Any) -> wpb.DrainResponse:
        self.set_state(wpb.WORKER_STATE_DRAINING)
        return wpb.DrainResponse(remaining_runs=len(self.runs))

    # PrefillService

    async def Prefill(self, request: wpb.PrefillRequest, context: Any) -> None:
        run, faults = request.request, self.faults
        self._note("prefill", run)
        self.received_at[run.run_id] = time.monotonic()
        self.requests.append(run)
        if faults.refuse_prefill is not None:
            await context.abort(faults.refuse_prefill, "the stub refuses")
        try:
            await self._prefill(request, context)
        except asyncio.CancelledError:
            self._note("prefill_cancelled", run)
            raise

    async def _prefill(self, request: wpb.PrefillRequest, context: Any) -> None:
        run, faults = request.request, self.faults
        if faults.stall_prefill:
            await asyncio.Event().wait()
        target = self.cluster.workers.get(request.target.worker_id)
        if target is not None and not await wait_for_pages(target.faults, request, context):
            return
        await context.write(wpb.PrefillEvent(started=wpb.PrefillStarted(cached_tokens=0)))
        if faults.prefill_delay_s:
            await asyncio.sleep(faults.prefill_delay_s)
        if faults.prefill_failure is not None:
            await context.write(wpb.PrefillEvent(failed=faults.prefill_failure))
            return
        if faults.end_prefill_early:
            return
        first = self._first_tokens(run)
        if not faults.hold_first_tokens_s and not faults.lose_first_tokens:
            await self._write_first(run, first, context)
        if faults.die_after_first_tokens:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the stub dies")
        if not request.HasField("target") or all(t.HasField("finish_info") for t in first.tokens):
            return
        if faults.stall_transfer:
            await asyncio.Event().wait()
        if faults.transfer_delay_s:
            await asyncio.sleep(faults.transfer_delay_s)
        if target is None or target.incarnation != request.target.incarnation:
            failed = wpb.Failed(reason=pb.ERROR_REASON_KV_TRANSFER_FAILED, message="no such target", retryable=True)
            await context.write(wpb.PrefillEvent(failed=failed))
            return
        await target.adopt(self, run, first)
        if faults.lose_first_tokens:
            await lose_first_tokens(faults.lose_first_tokens, context)
            return
        if faults.hold_first_tokens_s:
            await asyncio.sleep(faults.hold_first_tokens_s)
            await self._write_first(run, first, context)
        moved = wpb.Transferred(num_bytes=1000 * len(run.token_ids), transport="local", cached_tokens=0)
        await context.write(wpb.PrefillEvent(transferred=moved))

    async def _write_first(self, run: wpb.EngineRequest, first: wpb.FirstTokens, context: Any) -> None:
        offset = len(run.token_ids) - run.num_prompt_tokens
        for index in range(len(first.tokens)):
            self.sent_at[run.run_id, index, offset] = time.monotonic()
        await context.write(wpb.PrefillEvent(first_tokens=first))

    def _first_tokens(self, run: wpb.EngineRequest) -> wpb.FirstTokens:
        first = wpb.FirstTokens()
        first.prefill.FromMilliseconds(1)
        position = len(run.token_ids) - run.num_prompt_tokens
        for index in range(run.sampling.num_sequences):
            token_id, finish = self._sample(run, index, position)
            first.tokens.add(token_id=token_id, finish_info=finish, logprob=logprob(run, token_id))
        return first

    # DecodeService

    async def Session(self, commands: Any, context: Any) -> None:
        session = Session()
        self._sessions.add(session)
        reader = asyncio.create_task(self._read_commands(commands, session))
        step = 0
        try:
            while True:
                entries = await session.queue.get()
                if entries is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the stub breaks its session")
                await context.write(wpb.SessionStep(step=step, entries=entries))
                step += 2 if self.faults.jump_step else 1
        finally:
            reader.cancel()
            self._sessions.discard(session)
            for run_id in [i for i, r in self.runs.items() if r.session is session]:
                del self.runs[run_id]

    async def _read_commands(self, commands: Any, session: Session) -> None:
        async for command in commands:
            kind = command.WhichOneof("command")
            if kind == "expect":
                self._expect(command.expect, session)
            elif kind == "cancel":
                self.log.append(("cancel", command.cancel.run_id, command.cancel.attempt))
                run = self.runs.get(command.cancel.run_id)
                if run is not None and run.request.attempt <= command.cancel.attempt:
                    del self.runs[command.cancel.run_id]

    def _expect(self, expect: wpb.Expect, session: Session) -> None:
        request = expect.request
        self._note("expect", request)
        if self.state == wpb.WORKER_STATE_DRAINING:
            failed = wpb.Failed(reason=pb.ERROR_REASON_DRAINING, message="draining", retryable=True)
            session.send(wpb.StepEntry(run_id=request.run_id, attempt=request.attempt, failed=failed))
            return
        source = expect.source if expect.HasField("source") else None
        run = self.runs[request.run_id] = Run(request, session, source)
        if source is None:
            self.requests.append(request)
            start = len(request.token_ids) - request.num_prompt_tokens
            run.positions = dict.fromkeys(range(request.sampling.num_sequences), start)
            started = wpb.PrefillStarted(cached_tokens=0)
            session.send(wpb.StepEntry(run_id=request.run_id, attempt=request.attempt, started=started))
            run.adopted = True

    async def adopt(self, source: "StubWorker", request: wpb.EngineRequest, first: wpb.FirstTokens) -> None:
        for _ in range(1000):  # the Expect travels on another connection
            run = self.runs.get(request.run_id)
            if run is not None and run.request.attempt == request.attempt:
                break
            await asyncio.sleep(0.001)
        else:
            return
        assert run.source is not None and run.source.worker_id == source.worker_id
        if self.faults.decode_failure is not None and self.faults.fail_after_tokens is None:
            self._send_failure(run)
            return
        position = len(request.token_ids) - request.num_prompt_tokens + 1
        run.positions = {i: position for i, t in enumerate(first.tokens) if not t.HasField("finish_info")}
        run.session.send(wpb.StepEntry(run_id=request.run_id, attempt=request.attempt, adopted=wpb.Adopted()))
        self._note("adopted", request)
        run.adopted = not self.faults.stall_decode

    async def _step_forever(self) -> None:
        next_at = time.monotonic()
        while True:
            next_at = max(time.monotonic(), next_at + self.faults.step_s)
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            by_session: dict[int, tuple[Session, list[wpb.StepEntry]]] = {}
            for run in list(self.runs.values()):
                if run.adopted:
                    entries = by_session.setdefault(id(run.session), (run.session, []))[1]
                    entries.extend(self._advance(run))
            self.num_steps += bool(by_session)
            for session, entries in by_session.values():
                session.send(*entries)

    def _advance(self, run: Run) -> list[wpb.StepEntry]:
        request, faults, entries = run.request, self.faults, []
        for index, position in list(run.positions.items()):
            if faults.fail_after_tokens is not None and position >= faults.fail_after_tokens:
                if faults.decode_failure is not None:
                    self._send_failure(run)
                else:
                    run.session.queue.put_nowait(None)
                    self.runs.pop(request.run_id, None)
                return entries
            if position == faults.skip_offset:
                position += 1
            token_id, finish = self._sample(request, index, position)
            self.sent_at[request.run_id, index, position] = time.monotonic()
            entry = wpb.StepEntry(
                run_id=request.run_id,
                attempt=request.attempt,
                sequence_index=index,
                token_offset=position - 1 if position == faults.repeat_offset else position,
                token_ids=[token_id],
                finish_info=finish,
            )
            if request.HasField("logprobs"):
                entry.logprobs.append(logprob(request, token_id))
            entries.append(entry)
            run.positions[index] = position + 1
            if finish is not None:
                del run.positions[index]
        if not run.positions:
            self._note("finished", request)
            self.runs.pop(request.run_id, None)
        return entries

    def _send_failure(self, run: Run) -> None:
        request = run.request
        failed = self.faults.decode_failure
        run.session.send(wpb.StepEntry(run_id=request.run_id, attempt=request.attempt, failed=failed))
        self.runs.pop(request.run_id, None)

    def _sample(self, run: wpb.EngineRequest, index: int, position: int) -> tuple[int, pb.FinishInfo | None]:
        stopping = run.stopping
        may_stop = position + 1 >= stopping.min_tokens and not stopping.ignore_eos
        if may_stop and self.faults.finish_at.get(index) == position:
            return self.eos_token_id, pb.FinishInfo(
                finish_reason=pb.FINISH_REASON_STOP, index=index, eos_token_id=self.eos_token_id
            )
        token_id = self.cluster.token(run.sampling.seed, index, position)
        if may_stop and token_id in stopping.stop_token_ids:
            return token_id, pb.FinishInfo(finish_reason=pb.FINISH_REASON_STOP, index=index, stop_token_id=token_id)
        if position + 1 >= stopping.max_tokens:
            return token_id, pb.FinishInfo(finish_reason=pb.FINISH_REASON_LENGTH, index=index)
        return token_id, None

    def _note(self, event: str, request: wpb.EngineRequest) -> None:
        self.log.append((event, request.run_id, request.attempt))


class StubCluster:
    """Stub workers of one process, which find each other here. `token` may be replaced before requests run."""

    def __init__(self) -> None:
        self.workers: dict[str, StubWorker] = {}
        self.token: Callable[[int, int, int], int] = token

    async def add(
        self, worker_id: str, role: str, num_blocks: int = 1024, fingerprint: str = "f" * 64, start: bool = True
    ) -> StubWorker:
        worker = self.workers[worker_id] = StubWorker(self, worker_id, role, num_blocks, fingerprint)
        if start:
            await worker.start()
        return worker

    async def restart(self, worker_id: str) -> StubWorker:
        """A new process under the old name, on another port."""
        old = self.workers[worker_id]
        await old.stop()
        return await self.add(worker_id, old.role, old.num_blocks, old.fingerprint)

    def members(self) -> list[wpb.Member]:
        return [w.member() for w in self.workers.values()]

    async def __aenter__(self) -> "StubCluster":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(w.stop() for w in self.workers.values()))
