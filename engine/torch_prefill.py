"""Long chunks through cuDNN's attention, as torch offers it. No mask is ever built.

It is the fastest there is here, but builds a plan for every new shape (55 ms a thread), so lengths are padded to whole
STEPs, and a cached prefix is cut into a few sizes, each read into memory of its own:

    keys     [cached: pieces][rest][chunk][padding]
    queries   the chunk sees all of each piece           [rest][chunk][padding]  causal, the square of these

The answers are merged by their log-sum-exps. What the rest's rows give is thrown away, and nobody sees the padding.
Whole prompts of one length go together in one call. A plan also holds for one way to lie in memory, so what is padded
lies as a fused layer's q, k and v do, [num_tokens, q heads + 2 * kv heads, dim]; `plans` makes plans before their need.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from engine import ops
from engine.kv_cache import KVCache
from engine.paged_attention import Call, Chunk

STEP = 512
BIG_STEP, MAX_PIECE = 8192, 32768  # pieces of a prefix: whole BIG_STEPs, then powers of two


def cudnn_takes(query: torch.Tensor, call: Call, chunks: Sequence[Chunk], cache: KVCache) -> bool:
    """Whether cuDNN knows what this layer asks of these chunks."""
    return (
        not ops.force_reference
        and query.dtype == cache.dtype
        and _knows(call, cache)
        and not 0 < call.window < max(chunk.kv_len for chunk in chunks)
    )


def _knows(call: Call, cache: KVCache) -> bool:
    span = cache.spans[call.layer]
    return (
        cache.slab.is_cuda
        and cache.dtype in (torch.bfloat16, torch.float16)
        and not call.softcap
        and call.sinks is None
        and span.key_dim == span.value_dim <= 128
        and span.key_dim % 8 == 0
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(cache.slab.device) >= (9, 0)
    )


def equal_runs(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """The chunks in order, those together that one call can take; in powers of two, for each number is a plan."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        if runs and _is_equal(runs[-1][0], chunk):
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    parts = []
    for run in runs:
        start = 0
        while start < len(run):
            size = 1 << (len(run) - start).bit_length() - 1
            parts.append(run[start : start + size])
            start += size
    return parts


def _is_equal(a: Chunk, b: Chunk) -> bool:
    return a.num_queries == a.kv_len == b.num_queries == b.kv_len and not a.num_queries % STEP


def attend_run(
    query: torch.Tensor,  # [num_queries of all, num_heads, dim]
    key: torch.Tensor,  # [num_queries of all, num_kv_heads, dim]: the chunks' own
    value: torch.Tensor,
    call: Call,
    run: Sequence[Chunk],  # of equal_runs
    cache: KVCache,
) -> torch.Tensor:
    """[num_queries of all, num_heads, dim], each causal, its last query seeing all its `kv_len` tokens."""
    if cache.is_scaled:  # attention sees what the cache holds, whatever chunks a prompt comes in
        parts = [gather(chunk, call.layer, cache, chunk.kv_len - chunk.num_queries, chunk.kv_len) for chunk in run]
        key, value = (torch.cat(both) for both in zip(*parts, strict=True))
    if len(run) > 1:
        q, k, v = (x.unflatten(0, (len(run), -1)) for x in (query, key, value))
        return _cudnn(q, k, v, call.scale, True)[0].flatten(0, 1)
    return _attend_one(query, key, value, call, run[0], cache)


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, chunk: Chunk, cache: KVCache
) -> torch.Tensor:
    num_queries = query.shape[0]
    cached = chunk.kv_len - num_queries
    whole = cached // STEP * STEP
    rest = cached - whole
    old = gather(chunk, call.layer, cache, whole, cached) if rest else None
    q, k, v = _square(query, key, value, old)
    out, lse = (x[0] for x in _cudnn(q[None], k[None], v[None], call.scale, True))
    out, lse = out[rest : rest + num_queries], lse[:, rest:]
    if not whole:
        return out
    del q, k, v
    if num_queries % STEP:
        packed = _packed(query, key, 0)
        packed[:num_queries, : query.shape[1]] = query
        query = packed[:, : query.shape[1]]
    start = 0
    while start < whole:
        stop = start + _piece(whole - start)
        k, v = gather(chunk, call.layer, cache, start, stop)
        other, other_lse = _cudnn(query[None], k[None], v[None], call.scale, False)
        ops.merge(out, lse, other[0, :num_queries], other_lse[0])
        start = stop
    return out


def _square(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, old: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each of one length, a whole number of STEPs: `old` keys and values, ours, zeros."""
    rest = 0 if old is None else old[0].shape[0]
    num_tokens, num_heads, num_kv_heads = *query.shape[:2], key.shape[1]
    if old is None and num_tokens % STEP == 0 and query.stride(0) == key.stride(0):
        return query, key, value
    packed = _packed(query, key, rest)
    q, k, v = packed.split([num_heads, num_kv_heads, num_kv_heads], 1)
    q[:rest] = 0
    if old is not None:
        k[:rest], v[:rest] = old
    for padded, x in ((q, query), (k, key), (v, value)):
        padded[rest : rest + num_tokens] = x
    return q, k, v


def _packed(query: torch.Tensor, key: torch.Tensor, rest: int) -> torch.Tensor:
    """Room for `rest` tokens and ours, [whole STEPs, q heads + 2 * kv heads, dim]; what lies behind them is zero."""
    num_tokens = rest + query.shape[0]
    packed = query.new_empty(-(-num_tokens // STEP) * STEP, query.shape[1] + 2 * key.shape[1], query.shape[2])
    packed[num_tokens:] = 0
    return packed


def _piece(left: int) -> int:
    """Of `left` tokens, whole STEPs."""
    return min(MAX_PIECE, left // BIG_STEP * BIG_STEP) or 1 << left.bit_length() - 1


def gather(chunk: Chunk, layer: int, cache: KVCache, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens [start, stop) of the row, K and V, [num_tokens, num_kv_heads, dim]: a copy with heads before tokens."""
    span, size = cache.spans[layer], cache.layout.block_size
    first = start // size
    both = ops.gather(chunk.table[first : -(-stop // size)], cache, layer).view(2, span.num_kv_heads, -1, span.key_dim)
    key, value = both[:, :, start - first * size : stop - first * size].transpose(1, 2).unbind(0)
    return key, value


def plans(
    calls: Sequence[Call], num_heads: int, cache: KVCache, max_tokens: int, max_len: int
) -> Iterator[Callable[[], object]]:
    """What the first chunk of each length would wait for, most likely lengths first: each makes one plan, on the thread
    that calls it. Chunks are of up to `max_tokens` tokens, rows of up to `max_len`."""
    # layers of one kind share their plans
    kinds = {
        (cache.spans[c.layer].num_kv_heads, cache.spans[c.layer].key_dim, c.window) for c in calls if _knows(c, cache)
    }
    sizes = range(STEP, -(-min(max_tokens, max_len) // STEP) * STEP + 1, STEP)
    largest = -(-min(max_tokens + STEP - 1, max_len) // STEP) * STEP  # a square has the rest of a prefix, too
    pieces = sorted({_piece(whole) for whole in range(STEP, max_len, STEP)}, reverse=True)
    squares = [(size, 0) for size in range(STEP, largest + 1, STEP)]
    behind = [(size, piece) for size in [sizes[-1], *sizes[:-1]] for piece in pieces if size + piece < max_len + STEP]
    for size, piece in squares + behind:
        for num_kv_heads, dim, window in kinds:
            if not 0 < window < size + piece:
                yield partial(_plan, size, piece, num_heads, num_kv_heads, dim, cache.dtype, cache.slab.device)


def _plan(
    size: int, piece: int, num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    packed = torch.zeros(size, num_heads + 2 * num_kv_heads, dim, dtype=dtype, device=device)
    q, k, v = packed.split([num_heads, num_kv_heads, num_kv_heads], 1)
    if piece:
        both = torch.zeros(2, num_kv_heads, piece, dim, dtype=dtype, device=device)
        k, v = both.transpose(1, 2).unbind(0)
    _cudnn(q[None], k[None], v[None], 1.0, not piece)


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, num_queries, num_heads, dim] and float32 [batch, num_heads, num_queries]. Grouped heads as they are."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return out.transpose(1, 2), lse[..., 0]
