"""Long chunks through cuDNN's attention, as torch offers it. No mask is ever built.

It is the fastest there is here, but builds a plan for every new shape (55 ms), so lengths are padded to whole STEPs,
and a cached prefix is cut into a few sizes:

    keys     [cached: pieces][rest][chunk][padding]
    queries   the chunk sees all of each piece           [rest][chunk][padding]  causal, the square of these

The answers are merged by their log-sum-exps. What the rest's rows give is thrown away, and nobody sees the padding.
Whole prompts of one length go together in one call.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from engine import ops
from engine.kv_cache import KVCache
from engine.paged_attention import Call, Chunk

STEP = 512
BIG_STEP, MAX_PIECE = 8192, 32768  # pieces of a prefix: whole BIG_STEPs, then powers of two


def cudnn_takes(query: torch.Tensor, call: Call, chunks: Sequence[Chunk], cache: KVCache) -> bool:
    """Whether cuDNN knows what this layer asks of these chunks."""
    span = cache.spans[call.layer]
    return (
        query.is_cuda
        and not ops.force_reference
        and query.dtype in (torch.bfloat16, torch.float16)
        and not call.softcap
        and call.sinks is None
        and span.key_dim == span.value_dim <= 128
        and span.key_dim % 8 == 0
        and not 0 < call.window < max(chunk.kv_len for chunk in chunks)
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(query.device) >= (9, 0)
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
        parts = [gather(chunk, call.layer, cache, chunk.kv_len) for chunk in run]
        key, value = (
            torch.cat([x[-chunk.num_queries :] for x, chunk in zip(both, run, strict=True)])
            for both in zip(*parts, strict=True)
        )
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
    if cached:
        old_key, old_value = gather(chunk, call.layer, cache, cached)
    if rest:
        key, value = torch.cat([old_key[whole:], key]), torch.cat([old_value[whole:], value])
    square = -(-key.shape[0] // STEP) * STEP
    q, k, v = _padded(query, rest, square), _padded(key, 0, square), _padded(value, 0, square)
    out, lse = (x[0] for x in _cudnn(q[None], k[None], v[None], call.scale, True))
    out, lse = out[rest : rest + num_queries], lse[:, rest:]
    if not whole:
        return out
    q = _padded(query, 0, -(-num_queries // STEP) * STEP)
    start = 0
    while start < whole:
        stop = start + _piece(whole - start)
        other, other_lse = _cudnn(q[None], old_key[None, start:stop], old_value[None, start:stop], call.scale, False)
        ops.merge(out, lse, other[0, :num_queries], other_lse[0])
        start = stop
    return out


def _piece(left: int) -> int:
    """Of `left` tokens, whole STEPs."""
    return min(MAX_PIECE, left // BIG_STEP * BIG_STEP) or 1 << left.bit_length() - 1


def gather(chunk: Chunk, layer: int, cache: KVCache, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row's first K and V, [num_tokens, num_kv_heads, dim], strided: a copy of the blocks, heads before tokens."""
    span, size = cache.spans[layer], cache.layout.block_size
    both = ops.gather(chunk.table[: -(-num_tokens // size)], cache, layer)
    key, value = both.view(2, span.num_kv_heads, -1, span.key_dim)[:, :, :num_tokens].transpose(1, 2).unbind(0)
    return key, value


def _padded(x: torch.Tensor, before: int, size: int) -> torch.Tensor:
    """[size, heads, dim]: `before` rows of zeros, x, zeros."""
    return F.pad(x, (0, 0, 0, 0, before, size - before - x.shape[0])) if size > x.shape[0] else x


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, num_queries, num_heads, dim] and float32 [batch, num_heads, num_queries]. Grouped heads as they are."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return out.transpose(1, 2), lse[..., 0]
