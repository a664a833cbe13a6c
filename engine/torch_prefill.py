"""One long chunk through torch's own attention kernels: cuDNN where it can, flash otherwise. No mask is ever built.

cuDNN was twice as fast as flash at 2048 to 24576 keys, but builds a plan for every new shape (55 ms), so lengths are
padded to whole STEPs, and a cached prefix is cut into a few sizes:

    keys     [cached: pieces of MAX_PIECE .. STEP tokens][rest][chunk][padding]
    queries   the chunk sees all of each piece           [rest][chunk][padding]  causal, the square of these

The answers are merged by their log-sum-exps. What the rest's rows give is thrown away, and nobody sees the padding.
"""

import torch
import torch.nn.functional as F

from engine import ops
from engine.kv_cache import KVCache, Table
from engine.paged_attention import Call, Chunk

STEP = 512
MAX_PIECE = 32768
CUDNN_FROM = 384  # queries


def torch_takes(query: torch.Tensor, call: Call, cache: KVCache) -> bool:
    """Whether torch's kernels know what this layer asks."""
    span = cache.spans[call.layer]
    return (
        query.is_cuda
        and not ops.force_reference
        and query.dtype in (torch.bfloat16, torch.float16)
        and not call.softcap
        and call.sinks is None
        and span.key_dim == span.value_dim <= 256
        and span.key_dim % 8 == 0
    )


def attend_by_torch(
    query: torch.Tensor,  # [num_queries, num_heads, dim]
    key: torch.Tensor,  # [num_queries, num_kv_heads, dim]: the chunk's own
    value: torch.Tensor,
    call: Call,
    chunk: Chunk,
    cache: KVCache,
) -> torch.Tensor:
    """[num_queries, num_heads, dim], causal, the last query seeing all `kv_len` tokens."""
    if chunk.kv_len > chunk.num_queries:
        key, value = gather(chunk, call.layer, cache)
    if _cudnn_takes(query, call, chunk):
        return _cudnn_causal(query, key, value, call.scale)
    return _flash(query, key, value, call)


def gather(chunk: Chunk, layer: int, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The row's K and V so far, [kv_len, num_kv_heads, dim], strided: a copy of the blocks, heads before tokens."""
    key, value = cache.layers[layer].gather(Table(chunk.table[None].long()))
    return key[0, :, : chunk.kv_len].transpose(0, 1), value[0, :, : chunk.kv_len].transpose(0, 1)


def _cudnn_takes(query: torch.Tensor, call: Call, chunk: Chunk) -> bool:
    return (
        chunk.num_queries >= CUDNN_FROM
        and query.shape[-1] <= 128
        and not 0 < call.window < chunk.kv_len
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(query.device) >= (9, 0)
    )


def _cudnn_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    num_queries, num_keys = query.shape[0], key.shape[0]
    cached = num_keys - num_queries
    whole = cached // STEP * STEP
    rest = cached - whole
    square = -(-(num_keys - whole) // STEP) * STEP
    if not cached:
        q, k, v = (_padded(x, 0, square) for x in (query, key, value))
        return _cudnn(q, k, v, scale, True)[0][:num_queries]
    k, v = (_padded(x[whole:], 0, square) for x in (key, value))
    out, lse = _cudnn(_padded(query, rest, square), k, v, scale, True)
    out, lse = out[rest : rest + num_queries], lse[:, rest:]
    q = _padded(query, 0, -(-num_queries // STEP) * STEP)
    start = 0
    while start < whole:
        size = min(MAX_PIECE, 1 << (whole - start).bit_length() - 1)
        other, other_lse = _cudnn(q, key[start : start + size], value[start : start + size], scale, False)
        ops.merge(out, lse, other[:num_queries], other_lse)
        start += size
    return out


def _padded(x: torch.Tensor, before: int, size: int) -> torch.Tensor:
    """[size, heads, dim]: `before` rows of zeros, x, zeros."""
    return F.pad(x, (0, 0, 0, 0, before, size - before - x.shape[0])) if size > x.shape[0] else x


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_queries, num_heads, dim] and float32 [num_heads, num_queries]. Grouped heads as they are."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return out[0].transpose(0, 1), lse[0, :, :, 0]


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
    """Causal from the bottom right, windows in the kernel."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    left = call.window - 1 if 0 < call.window < num_keys else None
    return torch.ops.aten._flash_attention_forward(
        query[None],
        key[None],
        value[None],
        None,
        None,
        num_queries,
        num_keys,
        0.0,
        True,
        False,
        scale=call.scale,
        window_size_left=left,
        window_size_right=0 if left is not None else None,
    )[0][0]
