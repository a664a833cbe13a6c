"""One model and its KV cache on one device: a plan in, its rows' results out, KV reported as layers are written."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from engine.batch import Batch
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.kv_layout import KVLayout
from engine.model import Model, load
from engine.sampler import sample
from engine.sequence import Plan, Row, RowResult

log = logging.getLogger(__name__)

REPORT_BYTES = 1 << 20  # a report covers at least this much KV, or all layers


class KVSink(Protocol):
    """Hooks for one prompt whose KV leaves this engine. Called on the engine's thread: they must not block."""

    @property
    def receiver(self) -> str:
        """Who takes it: prompts that wait for one receiver's pages hold up none of another's."""

    def wanted(self) -> None:
        """The prompt would be computed next: get pages at the receiver, then `Engine.grant`."""

    def ready(self, block_ids: Sequence[int], block_start: int, layer_start: int, layer_stop: int) -> None:
        """Logical blocks block_start.. (pool ids `block_ids`) hold the final KV of layers [layer_start, layer_stop)."""


class Runner:
    """Keeps model and cache behind one call, so that they can move to other processes or graphs."""

    def __init__(self, config: EngineConfig):
        self.device = _device(config.device)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        started = time.monotonic()
        self.model: Model = load(config, self.device)
        self.load_s = time.monotonic() - started
        self.last_layer_at = started  # the clock of the last sign of life inside a step
        model = self.model
        block_size = config.block_size or (16 if self.device.type == "cpu" else 64)
        self.layout = KVLayout.of(
            model.info.name, model.weights_digest, model.rope_digest, model.info.dtype, block_size, model.layers
        )
        self.cache = KVCache(self.layout, self._num_blocks(config), self.device)

    @torch.inference_mode()
    def execute(self, plan: Plan, sinks: Mapping[str, KVSink]) -> list[RowResult]:
        """Computes the plan's rows, in the plan's order. Raises whatever the model raises: the step is lost then."""
        reports = [_Report(row, sinks[row.sequence.request.id], self.layout) for row in plan.rows if row.report]

        def on_layer(layer: int) -> None:
            self.last_layer_at = time.monotonic()
            for report in reports:
                if (layer + 1) % report.stride == 0 or layer + 1 == self.layout.num_layers:
                    self._settle()
                    report.send(layer + 1)

        batch = Batch(plan.rows, self.cache, on_layer)
        logits = self.model.logits(batch)
        results = dict(zip(map(id, batch.rows), sample(logits, batch.rows, self.model.info.eos_token_ids), strict=True))
        for report in reports:
            if report.error is not None:
                results[id(report.row)] = RowResult(error=("INTERNAL", f"KV sink failed: {report.error}"))
        return [results[id(row)] for row in plan.rows]

    def apply(self, memory_ops: list[tuple[int | None, int]]) -> None:
        """Copies and wipes blocks, in order, before anything else touches them."""
        with torch.inference_mode():
            for source, target in memory_ops:
                if source is None:
                    self.cache.zero_block(target)
                else:
                    self.cache.copy_block(source, target)

    def _settle(self) -> None:
        """A sink reads the slab from the host's side, so what was launched must have been written."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _num_blocks(self, config: EngineConfig) -> int:
        block_bytes = self.layout.block_bytes
        if config.num_blocks is not None:
            return config.num_blocks
        if config.kv_cache_gib is not None or self.device.type == "cpu":
            num_blocks = int((config.kv_cache_gib or 1.0) * 2**30) // block_bytes
            if num_blocks < 1:
                raise ValueError(f"kv_cache_gib: {config.kv_cache_gib!r} is less than one block of {block_bytes} bytes")
            return num_blocks
        self._warm_up(config)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        activations = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        room = free - activations - int(total * (1 - config.gpu_memory_utilization))
        if room < block_bytes:
            raise ValueError(
                f"gpu_memory_utilization: {config.gpu_memory_utilization} leaves {room / 2**30:.2f} GiB for the KV "
                f"cache of {self.model.info.name}; raise it (at most 1.0) or lower max_num_batched_tokens"
            )
        return room // block_bytes

    def _warm_up(self, config: EngineConfig) -> None:
        """One step of the largest size, so that the peak of its activations is known."""
        from engine.verify import dummy_row

        size = min(config.max_num_batched_tokens, self.model.info.max_model_len - 1)
        num_blocks = -(-size // self.layout.block_size)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.inference_mode():
            cache = KVCache(self.layout, num_blocks, self.device)
            self.model.logits(Batch([dummy_row(size, num_blocks)], cache))


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
        self.layer = 0

    def send(self, layer_stop: int) -> None:
        try:
            if self.error is None:
                self.sink.ready(self.block_ids, self.start, self.layer, layer_stop)
        except Exception as error:
            log.exception("the KV sink of %s failed", self.row.sequence.request.id)
            self.error = error
        self.layer = layer_stop


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} is not available: torch sees no CUDA device")
    return torch.device(name if name != "cuda" else f"cuda:{torch.cuda.current_device()}")
