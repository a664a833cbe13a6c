"""Attention over the paged cache by our own kernels: rows of one query, and chunks (long ones: torch_prefill.py).

Every function here has its definition in plain torch, which a CPU runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine import ops
from engine.attention import plain_attention
from engine.kv_cache import KVCache, Table

if TYPE_CHECKING:
    from engine.inputs import StepTensors


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer asks for beside its tensors, as it arrives through transformers' attention interface."""

    layer: int
    scale: float
    window: int = 0  # 0: full attention
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [num_heads]


@dataclass(slots=True)
class Singles:
    """Rows of one query each. Device tensors, int32; rows without KV come last."""

    kv_lens: torch.Tensor  # [num_rows]
    tables: torch.Tensor  # block ids of all rows, one after the other
    starts: torch.Tensor  # [num_rows], where each row's begin
    tiles: dict[int, torch.Tensor]  # window -> [num_rows + 1], running sum of each row's tiles


@dataclass(slots=True)
class Chunk:
    """One row of several queries, the last of its `kv_len` tokens."""

    start: int  # of its tokens in the step
    num_queries: int
    kv_len: int
    table: torch.Tensor  # int32, its block ids


class Workspace:
    """Partial results of rows that several programs share, and the shape of the grid. One per device and cache."""

    def __init__(self, cache: KVCache, max_rows: int, num_heads: int):
        """`num_heads`: the most query heads of any layer."""
        spans, device = cache.spans, cache.elements.device
        self.tile = min(tile_tokens(max(s.key_dim, s.value_dim), cache.dtype) for s in spans)
        is_roomy = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in ROOMY
        self.chunk_tile = chunk_tile(max(max(s.key_dim, s.value_dim) for s in spans), cache.dtype, is_roomy)
        self.queries = self.chunk_tile.queries
        num_kv_heads = max(s.num_kv_heads for s in spans)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        # two programs to an SM: with three, 64 rows of 1024 tokens took 100 us instead of 93
        self.programs = {s.num_kv_heads: max(1, processors * 2 // s.num_kv_heads) for s in spans}
        self.max_rows, self.num_bytes = max_rows, 0
        if device.type != "cuda" and not ops.force_triton:
            return
        slots = max(h * p for h, p in self.programs.items()) * 2
        group = max(16, ops.power_of_two(-(-num_heads // min(s.num_kv_heads for s in spans))))
        width = max(ops.power_of_two(s.value_dim) for s in spans)
        self.partial = torch.empty(slots * group * width, dtype=torch.float32, device=device)
        self.stats = torch.empty(slots * group * 2, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)
        self.num_bytes = 4 * (self.partial.numel() + self.stats.numel() + self.arrived.numel())


def tile_tokens(dim: int, dtype: torch.dtype) -> int:
    """Tokens per tile of the decode kernel: two tiles of K and V in flight must fit an SM's shared memory."""
    return 64 if ops.power_of_two(dim) * dtype.itemsize <= 512 else 32


@dataclass(frozen=True, slots=True)
class ChunkTile:
    """What a program of the prefill kernel takes at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int = 2


ROOMY = (9, 10)  # major compute capabilities whose SMs have 227 KiB of shared memory


def chunk_tile(dim: int, dtype: torch.dtype, is_roomy: bool) -> ChunkTile:
    """As measured on an H100, in bfloat16: of 8192 tokens, heads of 128 at 407 TFLOP/s (with 128 queries 374), heads of
    256 with soft caps at 446 (with 32 keys 315); those need an SM with room for 192 KiB.
    """
    item = ops.power_of_two(dim) * dtype.itemsize
    if dtype.itemsize == 2 and 256 < item <= 512 and is_roomy:
        return ChunkTile(128, 64, 8)
    return ChunkTile(64 if item <= 512 else 32, 64 if item <= 256 else 32, 4 if item <= 256 else 8)


def chunk_widths(key_dim: int, value_dim: int, is_scaled: bool) -> tuple[int, int]:
    """How wide the prefill kernel's tiles of K and V are: powers of two that hold them.

    K and V of float8 become 16 bits wide in one shared buffer after another at the same address, where Hopper's matrix
    instructions want rows of up to 128 bytes swizzled by their width. If K's differ from V's, ptxas 12.8 takes the
    address of all of V's slices but the first from a register that nobody has set (tests/sass.py): so they are alike.
    """
    key, value = max(16, ops.power_of_two(key_dim)), ops.power_of_two(value_dim)  # a dot sums over at least 16
    return (max(key, min(value, 64)), max(value, min(key, 64))) if is_scaled else (key, value)


def count_tiles(kv_len: int, window: int, tile: int) -> int:
    """How many tiles a row of one query reads. Those wholly before its window are skipped."""
    skipped = max(kv_len - window, 0) // tile if window else 0
    return -(-kv_len // tile) - skipped


def attend_singles(
    query: torch.Tensor,  # [num_rows, num_heads, key_dim], any strides but the last
    call: Call,
    rows: Singles,
    cache: KVCache,
    workspace: Workspace,
    out: torch.Tensor | None = None,  # [num_rows, num_heads, value_dim]
) -> torch.Tensor:
    """[num_rows, num_heads, value_dim]. What rows without KV get is left as it was."""
    span = cache.spans[call.layer]
    num_heads = query.shape[1]
    if out is None:
        out = query.new_empty(*query.shape[:2], span.value_dim)
    if not ops.uses_triton(query):
        return _reference_singles(query, call, rows, cache, out)
    from engine.triton_decode import decode_kernel

    group = num_heads // span.num_kv_heads
    wide = max(span.key_dim, span.value_dim) * query.element_size() > 256
    decode_kernel[(span.num_kv_heads, workspace.programs[span.num_kv_heads])](
        query,
        cache.elements,
        cache.slab,
        out,
        workspace.partial,
        workspace.stats,
        workspace.arrived,
        rows.kv_lens,
        rows.tables,
        rows.starts,
        rows.tiles[call.window],
        out if call.sinks is None else call.sinks,
        rows.kv_lens.shape[0],
        query.stride(0),
        query.stride(1),
        span.first,
        span.scales,
        cache.elements.stride(0),
        call.scale,
        call.softcap or 0.0,
        call.window,
        MIN_SHARE,
        span.num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, ops.power_of_two(group)),
        KEY_DIM=span.key_dim,
        KEY_BLOCK=max(16, ops.power_of_two(span.key_dim)),  # what a dot sums over is 16 wide at least
        VALUE_DIM=span.value_dim,
        VALUE_BLOCK=ops.power_of_two(span.value_dim),
        BLOCK_SIZE=cache.layout.block_size,
        BLOCK=workspace.tile,
        ROWS=max(16, ops.power_of_two(workspace.max_rows)),  # one compilation for all batches
        HAS_WINDOW=call.window > 0,
        HAS_CAP=bool(call.softcap),
        HAS_SINKS=call.sinks is not None,
        SCALED=cache.is_scaled,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=2 if wide else 3,
        num_warps=4,
    )
    return out


MIN_SHARE = 2  # tiles per program, below which a row is not split: a lone one of 1024 took 10.0 us so, 11.8 with 1


def attend_chunks(
    query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
    call: Call,
    tensors: "StepTensors",
    chunks: Sequence[Chunk],  # the same for the host; what a captured graph lacks
    cache: KVCache,
    workspace: Workspace,
    out: torch.Tensor,  # [num_tokens, num_heads, value_dim]
) -> None:
    """Fills in the tokens of all chunks, each causal, its last query seeing all of its tokens."""
    span = cache.spans[call.layer]
    if not ops.uses_triton(query):
        for chunk in chunks:
            here = slice(chunk.start, chunk.start + chunk.num_queries)
            reference_chunk(query[here], call, chunk, cache, out[here])
        return
    from engine.triton_prefill import prefill_kernel

    num_heads = query.shape[1]
    tile = workspace.chunk_tile
    key_block, value_block = chunk_widths(span.key_dim, span.value_dim, cache.is_scaled)
    prefill_kernel[(num_heads, tensors.work.shape[0])](
        query,
        cache.elements,
        cache.slab,
        out,
        tensors.work,
        tensors.chunks,
        tensors.singles.tables,
        out if call.sinks is None else call.sinks,
        query.stride(0),
        query.stride(1),
        span.first,
        span.scales,
        cache.elements.stride(0),
        call.scale,
        call.softcap or 0.0,
        call.window,
        span.num_kv_heads,
        GROUP=num_heads // span.num_kv_heads,
        KEY_DIM=span.key_dim,
        KEY_BLOCK=key_block,
        VALUE_DIM=span.value_dim,
        VALUE_BLOCK=value_block,
        BLOCK_SIZE=cache.layout.block_size,
        QUERIES=tile.queries,
        BLOCK=tile.keys,
        HAS_WINDOW=call.window > 0,
        HAS_CAP=bool(call.softcap),
        HAS_SINKS=call.sinks is not None,
        SCALED=cache.is_scaled,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


def _reference_singles(
    query: torch.Tensor, call: Call, rows: Singles, cache: KVCache, out: torch.Tensor
) -> torch.Tensor:
    size = cache.layout.block_size
    for i, (kv_len, start) in enumerate(zip(rows.kv_lens.tolist(), rows.starts.tolist(), strict=True)):
        if kv_len:
            table = rows.tables[start : start + -(-kv_len // size)]
            chunk = Chunk(i, 1, kv_len, table)
            reference_chunk(query[i : i + 1], call, chunk, cache, out[i : i + 1])
    return out


def reference_chunk(query: torch.Tensor, call: Call, chunk: Chunk, cache: KVCache, out: torch.Tensor) -> torch.Tensor:
    k, v = cache.layers[call.layer].gather(Table(chunk.table[None].long()))  # [1, num_kv_heads, tokens, dim]
    k, v = k[:, :, : chunk.kv_len, :], v[:, :, : chunk.kv_len, :]
    num_kv_heads = k.shape[1]
    q = query.transpose(0, 1)[None].unflatten(1, (num_kv_heads, -1))
    last = torch.arange(chunk.kv_len - chunk.num_queries, chunk.kv_len, device=query.device)[:, None]
    token = torch.arange(chunk.kv_len, device=query.device)
    hidden = token > last
    if call.window:
        hidden |= token <= last - call.window
    mask = torch.zeros(hidden.shape, device=query.device).masked_fill_(hidden, float("-inf"))
    sinks = None if call.sinks is None else call.sinks.view(num_kv_heads, -1, 1, 1)
    got = plain_attention(q, k[:, :, None], v[:, :, None], mask, call.scale, call.softcap, sinks)
    return out.copy_(got.flatten(1, 2)[0].transpose(0, 1))
