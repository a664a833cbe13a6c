"""A continuously batching engine over one model, stepping in a thread of its own.

Life of a request here:
1. `submit` checks it, and leaves it in the inbox. The engine's thread empties the inbox between steps.
2. The scheduler queues it; when seats, blocks and token budget allow, its prompt enters a step, whole or in chunks.
3. The runner computes the step: one packed batch of single tokens and chunks, KV written to the block pool's slab.
4. The sampler turns the last rows into tokens; the scheduler appends them and reports; `on_events` hears of it.
5. The next step feeds the token back, until EOS, a stop id, max_tokens or max_model_len.
A prompt with a sink is computed once its receiver granted pages; its KV is reported layer by layer, and after its first
tokens its blocks stay pinned until `release`. On the receiving side `reserve` gets the pages and `adopt` makes them
running sequences, which go on at 4.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from operator import methodcaller
from typing import Any

import torch

from engine.config import EngineConfig
from engine.flights import Flights
from engine.imports import no_collections
from engine.invariants import check
from engine.limits import Limits
from engine.model import ModelInfo
from engine.request import Event, Failed, FirstToken, Request, Reservation, Token
from engine.runner import KVSink, Runner
from engine.scheduler import Scheduler
from engine.sequence import EngineStats, Plan

log = logging.getLogger(__name__)

IDLE_BEAT_S = 0.5


class Engine:
    """All calls are thread-safe, return at once and take effect between steps, in the order they were made."""

    def __init__(
        self,
        config: EngineConfig,
        on_events: Callable[[list[Event]], None],
        progress: Callable[[str], None] | None = None,
    ):
        """Loads the model. Raises ValueError for what the configuration asks, UnsupportedModel for the model.

        `on_events` is called on the engine's thread, once per step that has news; it must not block.
        """
        say = progress or (lambda line: None)
        say(f"loading {config.served_model_name or config.model}")
        self.config = config
        with no_collections():
            self._runner = runner = Runner(config, say)
        self.layout, self.slab = runner.layout, runner.cache.slab
        self.load_s = runner.load_s
        self.is_warm = False  # True: nothing is left to make, while idle, for the first prompts of some lengths
        num_blocks = runner.cache.num_blocks
        self.model_info: ModelInfo = _fit(config, runner.model.info, num_blocks * self.layout.block_size)
        self._scheduler = Scheduler(
            num_blocks,
            self.layout.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self.model_info.max_model_len,
            self.model_info.eos_token_ids,
            config.enable_prefix_caching,
        )
        self._limits = Limits(
            self.model_info.vocab_size,
            self.model_info.max_model_len,
            self._scheduler.max_num_seqs,
            num_blocks,
            self.layout.block_size,
        )
        say(
            f"{self.model_info.name}: {self.model_info.num_parameters / 1e6:.0f}M parameters in {runner.load_s:.1f} s, "
            f"{num_blocks} blocks of {self.layout.block_size} tokens"
        )
        self._on_events = on_events
        self._sinks: dict[str, KVSink] = {}  # engine thread only
        self._grants: dict[str, Future[Reservation]] = {}  # engine thread only
        self._adopted: list[Future[None]] = []  # engine thread only: to be answered
        self._flights = Flights(runner, self._scheduler)  # engine thread only
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []  # guarded by _wake, as is all below
        self._ids: set[str] = set()
        self._stopping = False
        self._stats = self._scheduler.stats()
        self._beat = time.monotonic()
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- life

    def start(self) -> None:
        assert self._thread is None, "the engine was started already"
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step under way. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request, sink: KVSink | None = None) -> None:
        """Without a sink: generates to the end. With one: computes the prompt after `grant`, emits Started and each
        sequence's first Token, then holds the prompt's blocks for `request.id` until `release`.

        ValueError: a parameter out of range, an id in use, or a request that can never fit.
        """
        (self._limits.check_submit if sink is None else self._limits.check_sink)(request)
        with self._wake:
            if request.id in self._ids:
                raise ValueError(f"id: {request.id!r} is in this engine already")
            self._ids.add(request.id)
            self._do(lambda: self._add(request, sink))

    def grant(self, request_id: str, first_block: int) -> None:
        """A sink prompt's receiver has pages for it, and already holds the logical blocks before `first_block`."""
        self._do(lambda: self._scheduler.grant(request_id, first_block))

    def reserve(self, owner: str, request: Request, num_tokens: int, cached_multiple: int = 1) -> "Future[Reservation]":
        """Asks for pages for `num_tokens` >= len(token_ids), and room for one more token of each sequence.

        Granted in order of priority, then first come first served, after preempted sequences, never by preempting.
        `block_ids` covers exactly `num_tokens`, of which the cached ones, pinned at the front, are a multiple of
        `cached_multiple`; the room to grow stays inside. ValueError at once if it can never fit;
        `release(owner)` takes the question back.
        """
        self._limits.check_reserve(request, num_tokens)
        future: Future[Reservation] = Future()

        def ask() -> None:
            self._scheduler.reserve(owner, request, num_tokens, cached_multiple)
            self._grants[owner] = future

        self._do(ask, future)
        return future

    def adopt(self, owner: str, request: Request, first_tokens: Sequence[FirstToken]) -> "Future[None]":
        """Makes a reservation whose blocks now hold the prompt's KV into running sequences, and its blocks into
        prefix-cache entries. The future raises KeyError if the reservation is gone, ValueError if it does not match.
        """
        future: Future[None] = Future()

        def take() -> None:
            with self._wake:
                if request.id in self._ids:
                    raise ValueError(f"id: {request.id!r} is in this engine already")
                self._scheduler.adopt(owner, request, first_tokens)
                self._ids.add(request.id)
            self._adopted.append(future)

        self._do(take, future)
        return future

    def retain(self, owner: str, hashes: Sequence[bytes]) -> "Future[tuple[int, ...]]":
        """Pins the cached blocks of the longest known prefix of `hashes` (engine/prefix.py) until `release`.

        Best effort, never at a request's cost: no blocks while few are free.
        """
        return self._ask(lambda: self._scheduler.loans.retain(owner, hashes))

    def reserve_cache(
        self, owner: str, hashes: Sequence[bytes], cached_multiple: int = 1
    ) -> "Future[Reservation | None]":
        """Blocks for all of `hashes`, to be filled behind `num_cached_tokens` and then made cache entries by `insert`.

        Answered at once, as no request may wait for it: None while blocks are short. `release` gives them back.
        """
        return self._ask(
            lambda: self._scheduler.loans.reserve(owner, hashes, self._scheduler.blocks.align(cached_multiple))
        )

    def insert(self, owner: str) -> "Future[None]":
        """The blocks of `reserve_cache` hold their KV, verified: the prefix cache has them now. KeyError: released."""
        return self._ask(lambda: self._scheduler.loans.insert(owner))

    def quarantine(self, owner: str) -> None:
        """Keeps the pages of a reservation or loan, into which a peer may still write, from everybody until `release`;
        the rest of it, its seat included, is freed. Idempotent, without effect on what is no granted reservation."""
        self._do(lambda: self._scheduler.quarantine(owner))

    def release(self, owner: str) -> None:
        """Frees a reservation (queued, held, quarantined), a loan, or pinned prompt blocks, which stay as cache."""

        def free() -> None:
            self._scheduler.release(owner)
            if (waiting := self._grants.pop(owner, None)) is not None:
                waiting.cancel()

        self._do(free)

    def abort(self, request_id: str) -> None:
        """Ends a request in any phase, its reservation included. Idempotent; no events after the current step."""

        def end() -> None:
            for owner in self._scheduler.abort(request_id):
                if (waiting := self._grants.pop(owner, None)) is not None:
                    waiting.cancel()

        self._do(end)

    # ---------------------------------------------------------------- observation

    def stats(self) -> EngineStats:
        """As of the end of the last step; num_requests counts what was submitted since, too."""
        with self._wake:
            return replace(self._stats, num_requests=len(self._ids) + self._stats.num_reservations)

    def weights(self) -> Iterator[torch.Tensor]:
        """The model's parameters, for whoever counts their bytes."""
        return self._runner.model.module.parameters()

    def heartbeat_age_s(self) -> float:
        """Seconds since the engine's thread last showed life; inf when it has died or was never started."""
        if self._thread is None or not self._thread.is_alive():
            return math.inf
        return time.monotonic() - max(self._beat, self._runner.last_layer_at)

    def check(self) -> "Future[None]":
        """Runs every invariant check on the engine's thread; the future raises AssertionError."""
        future: Future[None] = Future()

        def run() -> None:
            check(self._scheduler)
            _resolve(future, None)

        self._do(run, future)
        return future

    # ---------------------------------------------------------------- the engine's thread

    @torch.inference_mode()  # once, as entering it takes 0.05 ms
    def _loop(self) -> None:
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)  # the count belongs to the thread
        if self.slab.is_cuda:
            torch.cuda.set_device(self.slab.device)  # so does the device, and with it where kernels and events go
        idle, quiet = True, False
        while True:
            with self._wake:
                while idle and not self._inbox and not self._stopping and not (quiet and not self.is_warm):
                    quiet = not self._wake.wait(IDLE_BEAT_S)
                    self._beat = time.monotonic()
                if self._stopping:
                    break
                inbox, self._inbox = self._inbox, []
            for command in inbox:
                command()
            idle = not self._step()
            quiet = quiet and idle
            if quiet and not self.is_warm:
                self.is_warm = not self._runner.warm_next()
            self._beat = time.monotonic()
        for future in self._grants.values():
            future.cancel()

    def _step(self) -> bool:
        """Schedules and launches one step, and takes in the results of those before it; of this one too, unless the
        runner goes ahead. False: nothing can run before the inbox brings something.
        """
        self._apply()
        plan = self._scheduler.schedule()
        if plan.events:
            self._answer_adopted()
            self._emit(plan.events)  # before the step: who hears Started takes the time
        self._tell_sinks(plan)
        is_busy = bool(plan.rows or self._flights)
        ahead = self._runner.runs_ahead and plan.rows and not plan.must_settle and not any(r.report for r in plan.rows)
        events = self._flights.launch(plan, self._sinks) if plan.rows else []
        self._answer_adopted()
        events += self._flights.take_in(1 if ahead else 0)
        for event in events:
            if isinstance(event, Token) and event.request_id in self._sinks:
                self._call_sink(event.request_id, methodcaller("sampled", event))
        self._apply()
        self._settle()
        if events:
            self._emit(events)
        return is_busy

    def _answer_adopted(self) -> None:
        """Only once their first step is launched: whoever wakes would want Python's lock while it is."""
        adopted, self._adopted = self._adopted, []
        for future in adopted:
            _resolve(future, None)

    def _tell_sinks(self, plan: Plan) -> None:
        for reservation in plan.granted:
            future = self._grants.pop(reservation.owner, None)
            if future is None or not _resolve(future, reservation):
                self._scheduler.release(reservation.owner)  # whoever asked has gone
        for request_id in plan.wanted:
            self._call_sink(request_id, lambda sink: sink.wanted())
        for request_id, start, block_ids in plan.cached:
            layers = self.layout.num_layers
            report = partial(_report_cached, tuple(block_ids), start, layers, self._runner.event())
            self._call_sink(request_id, report)

    def _call_sink(self, request_id: str, call: Callable[[Any], None]) -> None:
        try:
            call(self._sinks[request_id])
        except Exception as error:
            log.exception("the KV sink of %s failed", request_id)
            self._do(partial(self._fail, request_id, f"KV sink failed: {error}"))

    def _fail(self, request_id: str, message: str) -> None:
        if request_id in self._sinks:
            self._scheduler.abort(request_id)
            self._emit([Failed(request_id, "INTERNAL", message)])

    def _add(self, request: Request, sink: KVSink | None) -> None:
        if sink is not None:
            self._sinks[request.id] = sink
        self._scheduler.add(request, sink.receiver if sink is not None else None)

    def _ask(self, question: Callable[[], Any]) -> Future:
        """Asks the scheduler between two steps. Wipes go before the answer: whoever gets blocks may write at once."""
        future: Future = Future()

        def answer() -> None:
            self._apply()
            _resolve(future, question())

        self._do(answer, future)
        return future

    def _apply(self) -> None:
        ops, self._scheduler.blocks.memory_ops = self._scheduler.blocks.memory_ops, []
        self._runner.apply(ops)

    def _settle(self) -> None:
        """Publishes counters and forgets what is over."""
        ended, self._scheduler.ended = self._scheduler.ended, []
        stats = self._scheduler.stats()
        with self._wake:
            self._ids.difference_update(ended)
            self._stats = stats
        for request_id in ended:
            self._sinks.pop(request_id, None)

    def _emit(self, events: list[Event]) -> None:
        try:
            self._on_events(events)
        except Exception:
            log.exception("the listener failed on %d events", len(events))

    def _do(self, command: Callable[[], None], future: "Future | None" = None) -> None:
        """Leaves a command for the engine's thread; its exception goes to `future`, or to the log."""

        def guarded() -> None:
            try:
                command()
            except Exception as error:
                if future is None:
                    log.exception("an engine command failed")
                elif future.set_running_or_notify_cancel():
                    future.set_exception(error)

        with self._wake:
            self._inbox.append(guarded)
            self._wake.notify()


def _fit(config: EngineConfig, info: ModelInfo, num_tokens: int) -> ModelInfo:
    """max_model_len as the pool of `num_tokens` allows: lowered when it was left open, as asked for otherwise."""
    if config.max_model_len is not None or info.max_model_len <= num_tokens:
        return info
    log.warning("max_model_len lowered from %d to %d: the KV cache holds no more", info.max_model_len, num_tokens)
    return replace(info, max_model_len=num_tokens)


def _report_cached(block_ids: tuple[int, ...], start: int, num_layers: int, after: Any, sink: KVSink) -> None:
    sink.ready(block_ids, start, 0, num_layers, after)


def _resolve(future: Future, value: object) -> bool:
    """False when the asker cancelled."""
    if not future.set_running_or_notify_cancel():
        return False
    future.set_result(value)
    return True
