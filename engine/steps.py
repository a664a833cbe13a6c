"""Steps on the device, launched without waiting: inputs sent, model run or its graph replayed, tokens on their way.

launch n    inputs -> [prepare, model, pick] -> draws of rows that ask for more -> tokens to the host, event
launch n+1  reads its ids from the tokens that n left on the device, before the host has seen them
result n    waits for n's event only
"""

import logging
from bisect import insort
from collections.abc import Callable, Sequence

import torch

from engine import ops
from engine.device_sampler import Drawn, Draws, Picker
from engine.inputs import Inputs, StepTensors
from engine.kv_cache import KVCache
from engine.model import Model
from engine.paged_attention import Chunk, Workspace
from engine.paged_batch import PagedBatch
from engine.prove import num_query_heads
from engine.sequence import Plan, Row, RowResult

log = logging.getLogger(__name__)

BAD = RowResult(error=("NON_FINITE_LOGITS", "the model's logits hold NaN or Inf"))


class Landing:
    """Where a step's tokens arrive on the host, and the event that says so: used again once they have been read, for
    to make either anew takes longer than to launch a graph."""

    def __init__(self, max_rows: int, is_cuda: bool):
        self.tokens = torch.empty(max_rows, dtype=torch.int64, pin_memory=is_cuda)
        self.event = torch.cuda.Event(blocking=True) if is_cuda else None

    def fetch(self, tokens: torch.Tensor) -> None:
        self.tokens.copy_(tokens, non_blocking=True)
        if self.event is not None:
            self.event.record()


class Flight:
    """One launched step. `free` takes its landing back."""

    def __init__(self, rows: Sequence[Row], landing: Landing, drawn: Drawn | None, free: list[Landing]):
        self.rows, self._landing, self._drawn, self._free = rows, landing, drawn, free

    def wait(self) -> None:
        if self._landing.event is not None:
            self._landing.event.synchronize()

    def results(self) -> dict[int, RowResult]:
        """By id of the row. Waits for the step; to be asked once."""
        self.wait()
        tokens = self._landing.tokens.tolist()[: len(self.rows)]
        results = [RowResult() for _ in self.rows]
        special: dict[int, list] = {}
        for index, token, logprob in self._drawn.read() if self._drawn is not None else ():
            special.setdefault(index, []).append((token, logprob))
        for i, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if token < 0:
                results[i] = RowResult(error=BAD.error)
            elif row.samples:
                results[i].tokens = special.get(i) or [(token, None)]
        self._free.append(self._landing)
        return {id(row): result for row, result in zip(self.rows, results, strict=True)}


class Steps:
    """Owns what outlives a step on the device: input buffers, workspace, the last tokens, captured graphs."""

    def __init__(self, model: Model, cache: KVCache, max_tokens: int, max_rows: int, max_table: int):
        device = cache.slab.device
        self.model, self.cache, self.max_rows, self.max_tokens = model, cache, max_rows, max_tokens
        self.workspace = space = Workspace(cache, max_rows, num_query_heads(model))
        windows = [layer.window for layer in model.layers]
        self.inputs = Inputs(device, max_tokens, max_rows, max_table, windows, space.tile, space.queries)
        self.picker = Picker(max_rows, model.info.vocab_size, device)
        self.graphs: dict[tuple[int, int, int], _Graph] = {}  # by numbers of tokens, rows and chunks
        self._shapes: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}  # theirs, by whether with chunks
        self.num_bytes = self.inputs.num_bytes + self.workspace.num_bytes
        # of replayed graphs: if each kept its own, they would take a GiB
        dtype = cache.dtype
        num_logits = max_rows * model.info.vocab_size if device.type == "cuda" else 0
        self.logits = torch.empty(num_logits, dtype=dtype, device=device).view(-1, model.info.vocab_size)
        self._previous: dict[int, int] = {}  # id(sequence) -> its row in the step launched last
        self._landings: list[Landing] = []  # that are free

    def launch(self, plan: Plan, on_layer: Callable[[int], None] = lambda layer: None) -> Flight:
        """`on_layer(i)` is called when layer i has been launched; by a replayed graph only for the last one."""
        rows = [row for row in plan.rows if row.num_tokens == 1] + [row for row in plan.rows if row.num_tokens > 1]
        num_tokens = sum(row.num_tokens for row in rows)
        num_chunks = sum(row.num_tokens > 1 for row in rows)
        shape = (num_tokens, len(rows), num_chunks)
        graph = self._graph(*shape)
        shape = shape if graph is None else graph.shape
        chunks = self.inputs.fill(rows, *shape, self._previous, self.cache.layout.block_size)
        if graph is not None:
            graph.replay()
            on_layer(self.model.info.num_layers - 1)
            logits, batch = graph.logits, graph.batch
        else:
            batch = self._batch(self.inputs.views(*shape), len(rows) - num_chunks, chunks, rows, on_layer)
            logits = self._compute(batch)
        drawn = None
        draws = Draws(rows, self.model.info.vocab_size, self.model.info.eos_token_ids, self.cache.slab.device)
        if draws.draws:
            drawn = draws.launch(logits, batch.input_ids[0][batch.last], self.picker)
        self._previous = {id(row.sequence): i for i, row in enumerate(rows)}
        landing = self._landings.pop() if self._landings else Landing(self.max_rows, self.cache.slab.is_cuda)
        landing.fetch(self.picker.tokens)
        return Flight(rows, landing, drawn, self._landings)

    def capture(self) -> None:
        """A graph for each bucket, the largest first: the others then fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.cache.slab.device)  # torch's own for captures is the first device's for good
        for shape in self.bucket_shapes():
            is_first = not self._shapes[shape[2] > 0]
            self.graphs[shape] = _Graph(self, shape, pool, stream, is_first)
            insort(self._shapes[shape[2] > 0], shape)

    def bucket_shapes(self) -> list[tuple[int, int, int]]:
        """Of decode steps, and of steps with small chunks, whose kernels end before the host could launch the next."""
        most = self.max_rows
        decodes = [(size, size, 0) for size in [*[size for size in DECODE_BUCKETS if size < most], most]]
        mixed = [(size, min(most, size), min(MAX_CHUNKS, most)) for size in MIXED_BUCKETS if size <= self.max_tokens]
        return [*reversed(mixed), *reversed(decodes)]

    def _graph(self, num_tokens: int, num_rows: int, num_chunks: int) -> "_Graph | None":
        for shape in self._shapes[num_chunks > 0]:  # the smallest first
            if shape[0] >= num_tokens and shape[1] >= num_rows and shape[2] >= num_chunks:
                return self.graphs[shape]
        return None

    def _batch(
        self,
        tensors: StepTensors,
        num_singles: int,
        chunks: Sequence[Chunk],
        rows: Sequence[Row] = (),
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> PagedBatch:
        ids, positions, last = tensors.ids, tensors.positions, tensors.last
        if num_singles or self.model.fused is None:  # else no token is the step before's, and int32 will do
            ids, positions, last = ops.prepare(ids, tensors.sources, positions, last, self.picker.tokens)
        return PagedBatch(
            tensors,
            ids[None],
            positions[None],
            last,
            num_singles,
            chunks,
            self.cache,
            self.workspace,
            rows,
            on_layer,
        )

    def _compute(self, batch: PagedBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.model.raw_logits(batch, out)
        tensors = batch.tensors
        self.picker.pick(logits, tensors.keys, tensors.temperatures, self.picker.tokens[: logits.shape[0]])
        return logits


class _Graph:
    """A captured step for up to so many tokens, rows and chunks. Its tensors stay where they are."""

    def __init__(self, steps: Steps, shape: tuple[int, int, int], pool, stream: torch.cuda.Stream, is_first: bool):
        """`is_first` of its kind: it runs once before, which compiles kernels and fills caches."""
        self.shape = shape
        tensors = steps.inputs.views(*shape)

        def run() -> tuple[PagedBatch, torch.Tensor]:
            batch = steps._batch(tensors, shape[1], ())
            return batch, steps._compute(batch, steps.logits[: shape[1]])

        steps.inputs.fill([], *shape, {}, steps.cache.layout.block_size)
        if is_first:
            run()
            torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # relaxed: a library may load a kernel that only this size needs
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="relaxed"):
            self.batch, self.logits = run()

    def replay(self) -> None:
        self._graph.replay()


# Batch sizes close together where padding costs most; tokens of a step with chunks in steps of a matmul's tile.
DECODE_BUCKETS = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 1025, 64)]
MIXED_BUCKETS = [*range(64, 641, 64), 768, 896, 1024]
MAX_CHUNKS = 16  # rows of several tokens in one of those
