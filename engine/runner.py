"""One model and its KV cache on one device: a plan in, its rows' results out, KV reported as layers are written."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from engine.batch import Batch
from engine.compile_ahead import compile_ahead
from engine.config import EngineConfig
from engine.device import (
    GRAPH_BYTES,
    Memory,
    asked_blocks,
    blocks_that_fit,
    no_room_for,
    no_room_for_weights,
    pick_device,
    room_for_blocks,
)
from engine.imports import import_transformers
from engine.kv_cache import KVCache
from engine.kv_layout import FP8, KVLayout
from engine.model import Model, load
from engine.prove import fuse_model
from engine.request import Token
from engine.sampler import sample
from engine.sequence import Plan, Row, RowResult
from engine.shrink import OutOfMemory, compute_in_parts, is_out_of_memory
from engine.steps import Flight, Steps
from engine.torch_prefill import plans
from engine.verify import UnsupportedModel, dummy_row

log = logging.getLogger(__name__)

REPORT_BYTES = 1 << 20  # a report covers at least this much KV, or all layers


class KVSink(Protocol):
    """Hooks for one prompt whose KV leaves this engine. Called on the engine's thread: they must not block."""

    @property
    def receiver(self) -> str:
        """Who takes it: prompts that wait for one receiver's pages hold up none of another's."""

    def wanted(self) -> None:
        """The prompt would be computed next: get pages at the receiver, then `Engine.grant`."""

    def ready(
        self, block_ids: Sequence[int], block_start: int, layer_start: int, layer_stop: int, after: Any = None
    ) -> None:
        """Logical blocks block_start.. (pool ids `block_ids`) hold the final KV of layers [layer_start, layer_stop),
        once the torch.cuda.Event `after` has passed; None: now."""

    def sampled(self, token: Token) -> None:
        """A sequence's first token, before anybody else hears of it."""


class Handle(Protocol):
    """One launched step."""

    def result(self) -> list[RowResult]:
        """In the order of the plan's rows; waits. Raises whatever the step did: it is lost then."""


class Runner:
    """Keeps model and cache behind one call, so that they can move to other processes or graphs."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] = lambda line: None):
        self.device = pick_device(config)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        started = time.monotonic()
        self._memory = Memory.of(self.device, collect=True) if self.device.type == "cuda" else None
        block_size = config.block_size or (16 if self.device.type == "cpu" else 64)
        paged = self.device.type == "cuda" if config.paged is None else config.paged
        is_cuda = self.device.type == "cuda"
        compiled = compile_ahead(config, self.device, block_size) if paged and is_cuda else None
        if compiled is None:
            import_transformers()
        try:
            self.model: Model = _load(config, self.device, progress)
        finally:
            loading = time.monotonic()
            if compiled is not None:
                compiled()
        self.load_s = loading - started
        self.last_layer_at = started  # the clock of the last sign of life inside a step
        model = self.model
        self.layout = KVLayout.of(
            model.info.name,
            model.weights_digest,
            model.rope_digest,
            model.info.dtype,
            block_size,
            model.layers,
            FP8 if config.kv_cache_dtype == "fp8" else None,
        )
        clock = [loading, time.monotonic()]
        if paged and config.fuse:
            progress(
                str(fuse_model(model, self.device, block_size, min(config.max_num_seqs, config.max_num_batched_tokens)))
            )
            gc.collect(1)  # the copies of layers that were compared
        clock.append(time.monotonic())
        self.cache = self._cache(config, paged)
        self.steps = self._steps(config, self.cache) if paged else None
        clock.append(time.monotonic())
        if self.steps is not None and is_cuda and config.cuda_graphs:
            self._capture(config, self.steps)
            free = torch.cuda.mem_get_info(self.device)[0] / 2**30
            progress(f"{len(self.steps.graphs)} CUDA graphs, {free:.2f} GiB of the device left free")
        self._ahead = self._plans(config)
        clock.append(time.monotonic())
        compile_s, fuse_s, pool_s, graphs_s = (b - a for a, b in pairwise(clock))
        progress(
            f"weights {self.load_s:.1f} s, compiling {compile_s:.1f} more, fusing {fuse_s:.1f}, pool {pool_s:.1f}, "
            f"graphs {graphs_s:.1f}"
        )

    @property
    def runs_ahead(self) -> bool:
        """Whether a plan may be launched before the results of the one before are taken in."""
        return self.steps is not None

    def launch(self, plan: Plan, sinks: Mapping[str, KVSink]) -> Handle:
        """Starts the plan's rows. Raises what the host meets; what the device meets is raised by result().

        After OutOfMemory, `compute_in_parts` computes the plan all the same.
        """
        if not torch.is_inference_mode_enabled():  # the engine's thread never leaves it
            with torch.inference_mode():
                return self.launch(plan, sinks)
        reports = [_Report(row, sinks[row.sequence.request.id], self.layout) for row in plan.rows if row.report]
        try:
            return self._execute(plan, reports) if self.steps is None else self._start(self.steps, plan, reports)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Here and not above: the error holds the frames, and with them the tensors, of what failed.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory({id(report.row) for report in reports if report.layer})

    def compute_in_parts(self, plan: Plan, sinks: Mapping[str, KVSink], announced: set[int]) -> list[RowResult]:
        """For a plan that raised OutOfMemory, with what that told, once all plans before it are taken in. Waits."""

        def compute(rows: list[Row]) -> list[RowResult]:
            return self.launch(Plan(rows), sinks).result()

        return compute_in_parts(plan.rows, announced, self.layout.block_size, compute)

    def warm_next(self) -> bool:
        """Makes one thing that the first prompt of some length would wait for; on the thread that will launch its step.
        False: nothing is left to make."""
        task = next(self._ahead, None)
        if task is None:
            return False
        try:
            with torch.inference_mode():
                task()
        except Exception as error:  # whoever needs it will see
            log.debug("not made ahead: %s: %s", type(error).__name__, error)
            self._ahead = iter(())
        return True

    def _start(self, steps: Steps, plan: Plan, reports: "list[_Report]") -> Handle:
        """The device path: returns when the step is launched."""
        tell = _Teller(self, reports)
        flight = steps.launch(plan, tell)
        tell.rest()
        return _InFlight(plan, flight, reports)

    def _execute(self, plan: Plan, reports: "list[_Report]") -> Handle:
        """The reference: one step from end to end."""
        tell = _Teller(self, reports)
        batch = Batch(plan.rows, self.cache, tell)
        logits = self.model.logits(batch)
        results = dict(zip(map(id, batch.rows), sample(logits, batch.rows, self.model.info.eos_token_ids), strict=True))
        tell.rest()
        return _Done(_in_order(plan, results, reports))

    def apply(self, memory_ops: list[tuple[int | None, int]]) -> None:
        """Copies and wipes blocks, in order, before anything else touches them."""
        if not memory_ops:
            return
        with torch.inference_mode():
            for source, target in memory_ops:
                if source is None:
                    self.cache.zero_block(target)
                else:
                    self.cache.copy_block(source, target)
        if any(source is None for source, _ in memory_ops):
            self._settle()  # a peer may be the next to write there, and does not wait for our stream

    def event(self) -> Any:
        """Passes when everything launched so far has been done; None on a CPU, where it has."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    def _settle(self) -> None:
        """A sink reads the slab from the host's side, so what was launched must have been written."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _cache(self, config: EngineConfig, paged: bool) -> KVCache:
        """The block pool's memory: as many blocks as were asked for, or as fit beside the weights and a step."""
        block_bytes, name = self.layout.block_bytes, self.model.info.name
        num_blocks = asked_blocks(config, block_bytes, self.device)
        if num_blocks is None:
            assert self._memory is not None, "on a CPU the configuration says how many"
            torch.cuda.empty_cache()
            step, graphs = self._warm_up(config, paged)
            room = room_for_blocks(config.gpu_memory_utilization, self._memory, Memory.of(self.device), step, graphs)
            num_blocks = blocks_that_fit(config, block_bytes, room, name)
        try:
            return KVCache(self.layout, num_blocks, self.device)
        except (torch.OutOfMemoryError, OSError, OverflowError):
            raise no_room_for(config, num_blocks, block_bytes, self.device) from None

    def _plans(self, config: EngineConfig) -> Iterator[Callable[[], object]]:
        fused = self.model.fused
        if fused is None:  # nobody knows how its tensors lie
            return iter(())
        calls, num_heads = [layer.call for layer in fused.layers], fused.layers[0].num_heads
        max_len = self._max_len(config, self.cache)
        return plans(calls, num_heads, self.cache, config.max_num_batched_tokens, max_len)

    def _max_len(self, config: EngineConfig, cache: KVCache) -> int:
        return min(config.max_model_len or self.model.info.max_model_len, cache.num_blocks * self.layout.block_size)

    def _steps(self, config: EngineConfig, cache: KVCache) -> Steps:
        max_len = self._max_len(config, cache)
        max_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        width = -(-max_len // self.layout.block_size)
        return Steps(self.model, cache, max(config.max_num_batched_tokens, max_rows), max_rows, max_rows * width)

    @torch.inference_mode()
    def _warm_up(self, config: EngineConfig, paged: bool) -> tuple[int, int]:
        """Bytes beside weights and cache: of a prompt of the largest size, and of the graphs to capture."""
        size = min(config.max_num_batched_tokens, self.model.info.max_model_len - 1)
        try:
            num_blocks = -(-size // self.layout.block_size)
            cache = KVCache(self.layout, num_blocks, self.device)
            steps = self._steps(config, cache) if paged else None
            step = self._peak(cache, steps, [dummy_row(size, num_blocks)])
            if steps is None:
                return step, 0
            graphs = 0
            if config.cuda_graphs:
                graphs = self._peak(cache, steps, [dummy_row(1, 1) for _ in range(steps.max_rows)])
                graphs += GRAPH_BYTES * len(steps.bucket_shapes()) + steps.logits.nbytes
            return step + steps.num_bytes, graphs
        except torch.OutOfMemoryError:
            raise ValueError(
                f"max_num_batched_tokens: a step of {size} tokens finds no memory beside the weights of "
                f"{self.model.info.name}; lower it"
            ) from None

    def _peak(self, cache: KVCache, steps: Steps | None, rows: list[Row]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        if steps is None:
            self.model.logits(Batch(rows, cache))
        else:
            steps.launch(Plan(rows)).wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    @torch.inference_mode()
    def _capture(self, config: EngineConfig, steps: Steps) -> None:
        try:
            steps.capture()
        except torch.OutOfMemoryError:
            raise ValueError(
                f"gpu_memory_utilization: {config.gpu_memory_utilization} leaves no memory for CUDA graphs; lower it, "
                "or set cuda_graphs to false"
            ) from None
        except RuntimeError as error:
            raise UnsupportedModel(
                f"{self.model.info.architectures[0]}: a decode step cannot be captured as a CUDA graph: "
                f"{str(error).splitlines()[0]}; set cuda_graphs to false to run without"
            ) from error


def _load(config: EngineConfig, device: torch.device, progress: Callable[[str], None]) -> Model:
    try:
        return load(config, device, progress=progress)
    except torch.OutOfMemoryError:
        raise no_room_for_weights(config, device) from None


@dataclass(slots=True)
class _Done:
    results: list[RowResult]

    def result(self) -> list[RowResult]:
        return self.results


class _InFlight:
    def __init__(self, plan: Plan, flight: Flight, reports: "list[_Report]"):
        self._plan, self._flight, self._reports = plan, flight, reports

    def result(self) -> list[RowResult]:
        return _in_order(self._plan, self._flight.results(), self._reports)


def _in_order(plan: Plan, results: dict[int, RowResult], reports: "list[_Report]") -> list[RowResult]:
    for report in reports:
        if report.error is not None:
            results[id(report.row)] = RowResult(error=("INTERNAL", f"KV sink failed: {report.error}"))
    return [results[id(row)] for row in plan.rows]


class _Teller:
    """Called with each layer whose KV is being written. Sinks hear of it when the next one comes: a step's memory has
    its peak behind the attention of its first layer, and what was told would not be computed again (engine/shrink.py).
    """

    def __init__(self, runner: Runner, reports: "list[_Report]"):
        self._runner, self._reports = runner, reports
        self._held: tuple[int, Any] | None = None  # the layer that ends a stretch, and the event behind it

    def __call__(self, layer: int) -> None:
        self._runner.last_layer_at = time.monotonic()
        self.rest()
        if any(report.is_due(layer + 1) for report in self._reports):
            self._held = layer + 1, self._runner.event()

    def rest(self) -> None:
        if self._held is not None:
            (stop, after), self._held = self._held, None
            for report in self._reports:
                if report.is_due(stop):
                    report.send(stop, after)


class _Report:
    """Reports one row's final blocks, a stretch of layers at a time. A sink's exception fails only its request."""

    def __init__(self, row: Row, sink: KVSink, layout: KVLayout):
        assert row.report is not None
        self.row, self.sink = row, sink
        self.error: Exception | None = None
        self.start, stop = row.report
        self.block_ids = tuple(row.sequence.block_ids[self.start : stop])
        per_layer = max(1, len(self.block_ids) * layout.block_bytes // layout.num_layers)
        self.stride = min(layout.num_layers, -(-REPORT_BYTES // per_layer))
        self.layer, self._num_layers = 0, layout.num_layers

    def is_due(self, layer_stop: int) -> bool:
        return layer_stop % self.stride == 0 or layer_stop == self._num_layers

    def send(self, layer_stop: int, after: Any) -> None:
        try:
            if self.error is None:
                self.sink.ready(self.block_ids, self.start, self.layer, layer_stop, after)
        except Exception as error:
            log.exception("the KV sink of %s failed", self.row.sequence.request.id)
            self.error = error
        self.layer = layer_stop
