"""The kernels over a float8 cache against their definitions in torch: what they write, and what they read."""

import pytest
import torch

from engine import fp8
from engine.kv_layout import FP8, KVLayout, LayerShape

pytest.importorskip("triton", reason="needs Triton")

from engine import ops
from engine.inputs import Inputs
from engine.kv_cache import KVCache, Slots, Table
from engine.paged_attention import (
    Call,
    Chunk,
    Singles,
    Workspace,
    attend_chunks,
    attend_singles,
    count_tiles,
    reference_chunk,
)
from engine.sequence import Row
from tests.test_kernels import (
    CALLS,
    CUDA,
    DEVICE,
    DTYPES,
    SHAPES,
    both,
    close,
    kernels,
    make_call,
    moved,
    sequence,
)

assert kernels is not None  # an automatic fixture, by being here
pytestmark = [pytest.mark.gpu] if CUDA else []


def make_cache(shapes: list[LayerShape], block_size: int, num_blocks: int, dtype: torch.dtype, device) -> KVCache:
    name = str(dtype).removeprefix("torch.")
    return KVCache(KVLayout.of("m", "", "", name, block_size, shapes, FP8), num_blocks, device)


def filled_cache(shape: str, block_size: int, num_blocks: int, dtype: torch.dtype) -> KVCache:
    """Rows of very different sizes, so that a scale that is another row's shows."""
    _, kv_heads, key_dim, value_dim = SHAPES[shape]
    cache = make_cache(
        [LayerShape(kv_heads, key_dim, value_dim)] * 2, block_size, num_blocks, dtype, torch.device("cpu")
    )
    every = torch.arange(num_blocks * block_size)
    for layer in cache.layers:
        sizes = torch.randn(len(every), kv_heads, 1).exp2()
        key, value = (torch.randn(len(every), kv_heads, dim) * sizes for dim in (key_dim, value_dim))
        layer.write(key.to(dtype), value.to(dtype), Slots(every // block_size, every % block_size))
    return cache


def poison(cache: KVCache, block: int, first: int) -> None:
    """Makes layer 1's slots from `first` on in `block` NaN, their scales the largest there are."""
    layer, size = cache.layers[1], cache.layout.block_size
    span = cache.spans[1]
    bytes_of = cache.slab[block, span.first : span.scales].view(-1)
    start = 0
    for dim in (span.key_dim, span.value_dim):
        stop = start + span.num_kv_heads * size * dim
        bytes_of[start:stop].view(span.num_kv_heads, size, dim)[:, first:] = 0x7F
        start = stop
    layer.scales[block, :, :, first:] = 255  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype: torch.dtype) -> None:
    cache = filled_cache("gqa", 16, 3, dtype)
    table = torch.tensor([2, 0], dtype=torch.int32)
    ours, theirs = both(lambda device: ops.gather(table.to(device), moved(cache, device), 1))
    assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (6, 2, 24), (16, 4, 128)])
def test_rope_write(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    qkv = torch.randn(7, (heads + 2 * kv_heads) * dim).to(dtype)
    qkv[4] = 0.0
    cos, sin = torch.randn(2, 7, dim).to(dtype)
    slots = torch.tensor([5, 16, 47, -1, 0, 33, 63], dtype=torch.int32)

    def run(device: torch.device):
        cache = make_cache([LayerShape(kv_heads, dim, dim)] * 2, 16, 4, dtype, device)
        ops.rope_write(qkv.clone().to(device), cos.to(device), sin.to(device), None, cache, 1, slots.to(device))
        return cache

    ours, theirs = both(run)
    for found, expected in zip(read(ours), read(theirs), strict=True):
        # a value between two of e4m3's may be rounded to either when its last bit differs
        assert ((found - expected).abs() <= expected.abs() / 7).all()
        assert ((found - expected).abs() > 1e-3 * expected.abs()).float().mean() < (
            0.001 if dtype == torch.float32 else 0.05
        )
    written = [cache.slab.cpu().view(4, -1) != 0 for cache in (ours, theirs)]
    assert written[0].any(1).tolist() == written[1].any(1).tolist() == [True, True, True, True]


def read(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of every slot of layer 1; and nothing is in layer 0."""
    here = moved(cache, torch.device("cpu"))
    assert not here.slab[:, : here.layout.layer_offsets[1]].any()
    return here.layers[1].gather(Table(torch.arange(here.num_blocks)[None]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_rounds_as_fp8_does(dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 6, 24).to(dtype).transpose(0, 1), torch.randn(6, 2, 16).to(dtype)
    key[2, 1, 5], value[3, 0, 2], value[4] = torch.nan, torch.inf, 0.0
    key[0, 0] *= 1e-4
    slots = torch.tensor([1, -1, 20, 31, 16, 17], dtype=torch.int32)

    def run(device: torch.device):
        cache = make_cache([LayerShape(2, 24, 16)] * 2, 16, 3, dtype, device)
        ops.write_kv(key.to(device), value.to(device), cache, 1, slots.to(device))
        return cache

    (k, v), (k_, v_) = (read(cache) for cache in both(run))
    assert torch.equal(k.isnan(), k_.isnan()) and k.isnan().sum() == 1
    assert torch.equal(v.isfinite(), v_.isfinite()) and v.isfinite().sum() == v.numel() - 1
    clean = ~k.isnan().any(-1)  # beside a NaN the scale may be anything: the request fails
    assert torch.equal(k[clean], k_[clean]) and torch.equal(v[v.isfinite()], v_[v_.isfinite()])
    assert torch.equal(k[0, :, 1], fp8.round_trip(key[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_attend_singles(dtype: torch.dtype, options: str, shape: str, block_size: int) -> None:
    heads, _, key_dim, _ = SHAPES[shape]
    lengths = [1, 129, 63, 0]
    widths = [-(-n // block_size) for n in lengths]
    cache = filled_cache(shape, block_size, sum(widths) + 3, dtype)
    ids = torch.randperm(sum(widths) + 3)[: sum(widths)].to(torch.int32)
    for i, n in enumerate(lengths):  # what lies behind a row's last token must not matter
        if n % block_size:
            poison(cache, int(ids[sum(widths[: i + 1]) - 1]), n % block_size)
    starts = [sum(widths[:i]) for i in range(len(widths))]
    query = torch.randn(len(lengths), heads, key_dim).to(dtype)

    def run(device: torch.device):
        here = moved(cache, device)
        call = make_call(heads, key_dim, CALLS[options], device)
        space = Workspace(here, 8, heads)
        counts = [0]
        for n in lengths:
            counts.append(counts[-1] + count_tiles(n, call.window, space.tile))
        rows = Singles(
            *(torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, ids.tolist(), starts)), {}
        )
        rows.tiles[call.window] = torch.tensor(counts, dtype=torch.int32, device=device)
        return attend_singles(query.to(device), call, rows, here, space)[: len(lengths) - 1].clone()

    close(*both(run), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kv_len", "num_queries"), [(40, 40), (130, 37)])
def test_attend_chunks(dtype: torch.dtype, options: str, shape: str, kv_len: int, num_queries: int) -> None:
    heads, _, key_dim, value_dim = SHAPES[shape]
    cache = filled_cache(shape, 16, 12, dtype)
    table = torch.randperm(12)[: -(-kv_len // 16)].to(torch.int32)
    poison(cache, int(table[-1]), kv_len % 16)
    query = torch.randn(num_queries, heads, key_dim).to(dtype)

    def run(device: torch.device):
        here = moved(cache, device)
        space = Workspace(here, 1, heads)
        inputs = Inputs(device, 128, 1, 12, [CALLS[options].get("window", 0)], space.tile, space.queries)
        row = Row(sequence([0] * kv_len, table.tolist()), kv_len - num_queries, num_queries)
        chunks = inputs.fill([row], num_queries + 9, 1, 3, {}, 16)  # padded, as for a graph
        out = torch.zeros(num_queries, heads, value_dim, dtype=dtype, device=device)
        call = make_call(heads, key_dim, CALLS[options], device)
        attend_chunks(query.to(device), call, inputs.views(num_queries + 9, 1, 3), chunks, here, space, out)
        return out

    close(*both(run), dtype)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [[(700, 700)], [(2900, 800)], [(512, 512)] * 3])
def test_attend_by_cudnn(lengths: list[tuple[int, int]]) -> None:
    """What the chunk's own tokens bring along is not looked at: attention sees the cache."""
    from engine.torch_prefill import attend_run, cudnn_takes, equal_runs

    SHAPES["real"] = (32, 8, 128, 128)
    cache = filled_cache("real", 64, 50, torch.bfloat16)
    query = torch.randn(sum(n for _, n in lengths), 32, 128).bfloat16()
    call, here = Call(1, 128**-0.5), moved(cache, DEVICE)
    expected, chunks, start = torch.empty_like(query), [], 0
    for kv_len, num_queries in lengths:
        table = torch.randperm(50)[: -(-kv_len // 64)].to(torch.int32)
        rows = slice(start, start + num_queries)
        reference_chunk(query[rows], call, Chunk(start, num_queries, kv_len, table), cache, expected[rows])
        chunks.append(Chunk(start, num_queries, kv_len, table.to(DEVICE)))
        start += num_queries
    assert cudnn_takes(query.to(DEVICE), call, chunks, here)
    unseen = torch.full((start, 8, 128), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    for run in equal_runs(chunks):
        rows = slice(run[0].start, run[-1].start + run[-1].num_queries)
        found = attend_run(query[rows].to(DEVICE), unseen[rows], unseen[rows], call, run, here)
        close(found, expected[rows], torch.bfloat16)
