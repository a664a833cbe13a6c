"""What the device can do, measured, and each operation of the model against it.

read: one pass over 4 GiB; matmul: the model's products of 8192 rows in layer order, for two seconds, the median of the
second half (the device lowers its clock under them: `burst` is what the first hundred milliseconds gave).
"""

import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from benchmarks.engine_cuda_shapes import Shape

BF16 = torch.bfloat16


def ceilings(shape: Shape) -> dict[str, float]:
    """Bytes/s and operations/s."""
    read, copied = _bandwidths()
    torch.cuda.empty_cache()
    sets = [_weights(shape) for _ in range(4)]
    inputs = {k: torch.randn(8192, k, device="cuda", dtype=BF16) for _, k in shape.products.values()}
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(61)]
    rounds = 12
    for mark in marks:
        mark.record()
        for i in range(rounds):
            for name, (_, k) in shape.products.items():
                F.linear(inputs[k], sets[i % 4][name])
    torch.cuda.synchronize()
    operations = rounds * sum(2.0 * 8192 * n * k for n, k in shape.products.values())
    rates = [operations / (a.elapsed_time(b) / 1e3) for a, b in pairwise(marks)]
    return dict(copy=copied, read=max(read, copied), matmul=statistics.median(rates[30:]), burst=max(rates[:4]))


def operations(shape: Shape, limits: dict[str, float]) -> list[dict[str, float | str]]:
    """Each operation by itself, weights and caches rotating so that none stays in the device's L2."""
    from engine import ops

    found: list[dict[str, float | str]] = []

    def note(name: str, rows: int, call: Callable[[int], object], size_bytes: float, count: float) -> None:
        took = _replayed(call)
        floor = max(size_bytes / limits["read"], count / limits["matmul"])
        found.append(
            dict(op=name, rows=rows, us=took * 1e6, floor_us=floor * 1e6, ratio=took / floor)
            | dict(tb_s=size_bytes / took / 1e12, tflop_s=count / took / 1e12)
        )

    sets = [_weights(shape) for _ in range(4)]
    head = torch.randn(shape.vocab_size, shape.hidden, device="cuda", dtype=BF16)
    norm = ops.Norm(torch.ones(shape.hidden, device="cuda", dtype=BF16), 1e-5)
    activation = "gelu_tanh" if shape.config["model_type"] == "gemma2" else "silu"
    for rows in (1, 64, 256, 2048, 8192):
        for name, (n, k) in shape.products.items():
            x = torch.randn(rows, k, device="cuda", dtype=BF16)

            def product(i: int, x: torch.Tensor = x, name: str = name) -> torch.Tensor:
                return F.linear(x, sets[i % 4][name])

            note(name, rows, product, 2.0 * (n * k + rows * (n + k)), 2.0 * rows * n * k)
        if rows <= 256:
            x = torch.randn(rows, shape.hidden, device="cuda", dtype=BF16)
            cells = rows * shape.vocab_size
            note("head", rows, lambda i, x=x: F.linear(x, head), 2.0 * (head.numel() + cells), 2.0 * cells * x.shape[1])
            _decode(shape, rows, note)
        else:
            _prefill(shape, rows, note)
        x, residual = torch.randn(2, rows, shape.hidden, device="cuda", dtype=BF16)
        both = torch.randn(rows, 2 * shape.wide, device="cuda", dtype=BF16)
        note("add_norm", rows, lambda i, x=x, r=residual: ops.add_norm(x, r, norm), 8.0 * x.numel(), 0.0)
        note("gated", rows, lambda i, b=both: ops.gated(b, activation), 3.0 * both.numel(), 0.0)
    return found


def _decode(shape: Shape, rows: int, note: Callable) -> None:
    from engine.paged_attention import Call, Singles, Workspace, attend_singles, count_tiles

    blocks = 1024 // 64
    cache = _cache(shape, 2 * rows * blocks)
    space = Workspace(cache, 256, shape.num_heads)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    sums = [i * count_tiles(1024, 0, space.tile) for i in range(rows + 1)]
    starts = ints([i * blocks for i in range(rows)])
    halves = [
        Singles(ints([1024] * rows), ints([half * rows * blocks + i for i in range(rows * blocks)]), starts, {})
        for half in range(2)
    ]
    for half in halves:
        half.tiles[0] = ints(sums)
    query = torch.randn(rows, shape.num_heads, shape.dim, device="cuda", dtype=BF16)
    call = Call(0, shape.dim**-0.5, 0, shape.config.get("attn_logit_softcapping"))
    size = rows * 1024 * 4 * shape.kv_heads
    count = rows * 1024 * 4.0 * shape.heads
    note("attention of 1024", rows, lambda i: attend_singles(query, call, halves[i % 2], cache, space), size, count)


def _prefill(shape: Shape, rows: int, note: Callable) -> None:
    from engine.inputs import Inputs
    from engine.paged_attention import Call, Workspace
    from engine.paged_batch import PagedBatch
    from engine.verify import dummy_row

    cache = _cache(shape, rows // 64)
    space = Workspace(cache, 256, shape.num_heads)
    inputs = Inputs(torch.device("cuda"), rows, 1, rows // 64, [0], space.tile, space.queries)
    chunks = inputs.fill([dummy_row(rows, rows // 64)], rows, 1, 1, {}, 64)
    tensors = inputs.views(rows, 1, 1)
    batch = PagedBatch(tensors, tensors.ids, tensors.positions, tensors.last, 0, chunks, cache, space)
    qkv = torch.randn(rows, shape.num_heads + 2 * shape.num_kv_heads, shape.dim, device="cuda", dtype=BF16)
    q, k, v = qkv.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    call = Call(0, shape.dim**-0.5, 0, shape.config.get("attn_logit_softcapping"))
    size = 2.0 * qkv.numel() + 2.0 * rows * shape.heads
    note("attention, causal", rows, lambda i: batch.attend_written(q, k, v, call), size, 2.0 * rows**2 * shape.heads)


def _cache(shape: Shape, num_blocks: int):
    from engine.kv_cache import KVCache
    from engine.kv_layout import KVLayout, LayerShape

    layer = LayerShape(shape.num_kv_heads, shape.dim, shape.dim)
    cache = KVCache(KVLayout.of("floors", "", "", "bfloat16", 64, [layer]), num_blocks, torch.device("cuda"))
    cache.elements.normal_()
    return cache


def _weights(shape: Shape) -> dict[str, torch.Tensor]:
    return {name: torch.randn(*size, device="cuda", dtype=BF16) * 0.02 for name, size in shape.products.items()}


def _bandwidths() -> tuple[float, float]:
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.int64)
    copied = 2 * source.numel() / _timed(lambda: target.copy_(source), 8)
    return source.numel() / _timed(lambda: words.max(), 8), copied


def _timed(call: Callable[[], object], rounds: int) -> float:
    for _ in range(3):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(rounds):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / rounds / 1e3


def _replayed(call: Callable[[int], object], calls: int = 8) -> float:
    """Seconds of one call, inside a captured graph: launches from Python take longer than the small ones."""
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return statistics.median(_timed(graph.replay, 3) for _ in range(3)) / calls
