"""Every kernel against its definition in torch: on a GPU where there is one, else in Triton's interpreter, else not."""

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="needs Triton")

from engine import ops  # noqa: E402
from engine.device_sampler import Picker  # noqa: E402
from engine.inputs import Inputs  # noqa: E402
from engine.kv_cache import KVCache  # noqa: E402
from engine.kv_layout import KVLayout, LayerShape  # noqa: E402
from engine.paged_attention import (  # noqa: E402
    Call,
    Singles,
    Workspace,
    attend_chunks,
    attend_singles,
    count_tiles,
)
from engine.request import SamplingParams  # noqa: E402
from engine.sampler import row_key, truncate  # noqa: E402
from engine.sequence import Row  # noqa: E402
from engine.verify import dummy_sequence as sequence  # noqa: E402
from tests.interpreter import patch as patch_interpreter  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

pytestmark = [pytest.mark.gpu] if CUDA else []


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "force_triton", not CUDA)
    if not CUDA:
        patch_interpreter(monkeypatch)
    torch.manual_seed(0)


def both(call, *, cpu_call=None):
    """(the kernel's answer, the definition's)."""
    ours = call(DEVICE)
    force, ops.force_triton = ops.force_triton, False
    try:
        theirs = (cpu_call or call)(torch.device("cpu"))
    finally:
        ops.force_triton = force
    return ours, theirs


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    ours, theirs = ours.cpu().double(), theirs.double()
    error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-30)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 4096])
@pytest.mark.parametrize("kind", ["plain", "add", "before"])
def test_add_norm(dtype: torch.dtype, width: int, kind: str) -> None:
    x, residual, w, b = torch.randn(4, 5, width).to(dtype)
    offset = 1.0 if kind == "before" else 0.0

    def run(device: torch.device):
        r = None if kind == "plain" else residual.clone().to(device)
        before = ops.Norm(b[0].to(device), 1e-6, offset) if kind == "before" else None
        out = ops.add_norm(x.to(device), r, ops.Norm(w[0].to(device), 1e-6, offset), before)
        return out, r

    (ours, added), (theirs, expected) = both(run)
    close(ours, theirs, dtype)
    if added is not None:
        close(added, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated(dtype: torch.dtype, activation: str) -> None:
    x = torch.randn(3, 2 * 1100).to(dtype)
    close(*both(lambda device: ops.gated(x.to(device, copy=True), activation)), dtype)


def make_cache(shapes: list[LayerShape], block_size: int, num_blocks: int, dtype: torch.dtype, device) -> KVCache:
    name = str(dtype).removeprefix("torch.")
    return KVCache(KVLayout.of("m", "", "", name, block_size, shapes), num_blocks, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (8, 8, 64), (6, 2, 24), (16, 4, 128), (0, 8, 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_write(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, normed: bool) -> None:
    tokens, size = 7, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = torch.randn(2, tokens, dim).to(dtype)
    weights = torch.randn(2, dim).to(dtype)
    slots = torch.tensor([5, 16, 47, -1, 0, 33, 63], dtype=torch.int32)
    shapes = [LayerShape(kv_heads, dim, dim)] * 2

    def run(device: torch.device):
        cache = make_cache(shapes, size, 4, dtype, device)
        x = qkv.clone().to(device)
        norms = tuple(ops.Norm(w.to(device), 1e-5, 1.0) for w in weights) if normed else None
        ops.rope_write(x, cos.to(device), sin.to(device), norms, cache, 1, slots.to(device))
        return x, cache.elements.float()

    (x, slab), (x_, slab_) = both(run)
    close(x, x_, dtype)
    close(slab, slab_, dtype)
    assert torch.equal(slab.cpu() == 0, slab_ == 0), "another slot was written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_of_two_widths(dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 5, 24).to(dtype).transpose(0, 1), torch.randn(5, 2, 16).to(dtype)
    slots = torch.tensor([1, -1, 20, 31, 16], dtype=torch.int32)

    def run(device: torch.device):
        cache = make_cache([LayerShape(2, 24, 16)] * 2, 16, 3, dtype, device)
        ops.write_kv(key.to(device), value.to(device), cache, 1, slots.to(device))
        return cache.elements.float().cpu()

    ours, theirs = both(run)
    assert torch.equal(ours, theirs)


SHAPES = {  # heads, kv heads, key dim, value dim
    "gqa": (8, 2, 64, 64),
    "mha": (4, 4, 32, 32),
    "mla": (4, 4, 24, 16),
    "wide": (4, 2, 128, 128),
}
CALLS = {
    "plain": dict(),
    "window": dict(window=70),
    "softcap": dict(softcap=20.0),
    "sinks": dict(sinks=True),
    "all": dict(window=33, softcap=30.0, sinks=True),
}


def filled_cache(shape, block_size: int, num_blocks: int, dtype: torch.dtype) -> KVCache:
    _, kv_heads, key_dim, value_dim = SHAPES[shape]
    cache = make_cache(
        [LayerShape(kv_heads, key_dim, value_dim)] * 2, block_size, num_blocks, dtype, torch.device("cpu")
    )
    cache.elements.copy_(torch.randn(cache.elements.shape))
    return cache


def poison(cache: KVCache, block: int, first: int) -> None:
    """Makes layer 1's slots from `first` on in `block` NaN."""
    span, size, start = cache.spans[1], cache.layout.block_size, cache.spans[1].first
    for dim in (span.key_dim, span.value_dim):
        stop = start + span.num_kv_heads * size * dim
        cache.elements[block, start:stop].view(span.num_kv_heads, size, dim)[:, first:] = torch.nan
        start = stop


def moved(cache: KVCache, device: torch.device) -> KVCache:
    copy = KVCache(cache.layout, cache.num_blocks, device)
    copy.slab.copy_(cache.slab)
    return copy


def make_call(heads: int, dim: int, options: dict, device) -> Call:
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 2, heads).to(device)
    return Call(1, dim**-0.5, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_attend_singles(dtype: torch.dtype, options: str, shape: str, block_size: int) -> None:
    heads, _, key_dim, _ = SHAPES[shape]
    lengths = [1, 500, 64, 0, 129, 63, 300][: 7 if CUDA else 4]
    lengths = sorted(lengths, key=lambda n: n == 0)  # rows without KV come last
    widths = [-(-n // block_size) for n in lengths]
    cache = filled_cache(shape, block_size, sum(widths) + 3, dtype)
    ids = torch.randperm(sum(widths) + 3)[: sum(widths)].to(torch.int32)
    for i, n in enumerate(lengths):  # what lies behind a row's last token must not matter
        if n % block_size:
            offset = sum(widths[: i + 1]) - 1
            poison(cache, int(ids[offset]), n % block_size)
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
        out = torch.empty(0)
        for _ in range(3):  # the counters must be zero again after each launch
            out = attend_singles(query.to(device), call, rows, here, space)
        if hasattr(space, "arrived"):
            assert not space.arrived.any()
        return out[: len(lengths) - 1].clone()

    close(*both(run), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kv_len", "num_queries"), [(40, 40), (130, 37), (100, 2)])
def test_attend_chunks(dtype: torch.dtype, options: str, shape: str, kv_len: int, num_queries: int) -> None:
    heads, _, key_dim, value_dim = SHAPES[shape]
    cache = filled_cache(shape, 16, 12, dtype)
    table = torch.randperm(12)[: -(-kv_len // 16)].to(torch.int32)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [100, 9001])
def test_pick(dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(5, vocab).to(dtype) * 2
    logits[3, vocab // 2] = torch.nan
    logits[4, vocab - 1] = -torch.inf
    logits[0, 7] = logits[0, 3] = 50.0  # of equals the first
    keys = [row_key(seed, 1, 17 * seed) for seed in range(5)]
    halves = torch.tensor([[k % 2**32 for k in keys], [k >> 32 for k in keys]]).to(torch.int32)
    temperatures = torch.tensor([0.0, 0.7, 1.5, 1.0, 0.0])

    def run(device: torch.device):
        picker = Picker(8, vocab, device)
        out = torch.full((5,), 77, device=device)
        picker.pick(logits.to(device), halves.to(device), temperatures.to(device), out)
        return out.cpu()

    ours, theirs = both(run)
    assert torch.equal(ours, theirs) and ours[0] == 3 and ours[3] == ours[4] == -1


def test_truncate() -> None:
    kinds = [dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=50, top_p=0.5, min_p=0.01), dict()]
    kinds += [dict(top_k=3000), dict(top_p=1e-6), dict(top_k=1)]
    scores = torch.randn(len(kinds), 5000 if CUDA else 700) * 3
    expected = scores.clone()
    params = [SamplingParams(**kind) for kind in kinds]
    truncate(expected, params)
    from engine.triton_sample import truncate_kernel

    ours = scores.to(DEVICE)
    columns = [[p.min_p for p in params], [p.top_k for p in params], [p.top_p for p in params]]
    types = (torch.float32, torch.int32, torch.float32)
    sent = [torch.tensor(c, dtype=t, device=DEVICE) for c, t in zip(columns, types, strict=True)]
    truncate_kernel[(len(kinds),)](ours, *sent, scores.shape[1], BLOCK=256)
    assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 5, 4, 24).to(dtype)
    lse, other = torch.randn(2, 4, 9) * 3

    def run(device: torch.device):
        out, sums = a.clone().to(device), lse.clone().to(device)
        ops.merge(out, sums, b.to(device), other.to(device))
        return torch.cat([out.float().flatten(), sums[:, :5].flatten()])

    close(*both(run), dtype)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "lengths", [[(700, 700)], [(2900, 800)], [(600, 200)], [(512, 512)] * 3, [(1024, 1024), (1024, 512), (99, 99)]]
)
def test_attend_by_cudnn(lengths: list[tuple[int, int]]) -> None:
    from engine.paged_attention import Chunk, reference_chunk
    from engine.torch_prefill import attend_run, cudnn_takes, equal_runs, gather

    SHAPES["real"] = (32, 8, 128, 128)
    cache = filled_cache("real", 64, 50, torch.bfloat16)
    query = torch.randn(sum(n for _, n in lengths), 32, 128).bfloat16()
    call = Call(1, 128**-0.5)
    here = moved(cache, DEVICE)
    expected, chunks, keys, values, start = torch.empty_like(query), [], [], [], 0
    for kv_len, num_queries in lengths:
        table = torch.randperm(50)[: -(-kv_len // 64)].to(torch.int32)
        rows = slice(start, start + num_queries)
        reference_chunk(query[rows], call, Chunk(start, num_queries, kv_len, table), cache, expected[rows])
        chunks.append(Chunk(start, num_queries, kv_len, table.to(DEVICE)))
        key, value = (x[-num_queries:] for x in gather(chunks[-1], 1, here, 0, kv_len))
        keys.append(key)
        values.append(value)
        start += num_queries
    assert cudnn_takes(query.to(DEVICE), call, chunks, here)
    key, value = torch.cat(keys), torch.cat(values)
    for run in equal_runs(chunks):
        rows = slice(run[0].start, run[-1].start + run[-1].num_queries)
        found = attend_run(query[rows].to(DEVICE), key[rows], value[rows], call, run, here)
        close(found, expected[rows], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype: torch.dtype) -> None:
    cache = filled_cache("gqa", 48, 9, dtype)
    table = torch.tensor([8, 0, 5, 3], dtype=torch.int32)
    ours, theirs = both(lambda device: ops.gather(table.to(device), moved(cache, device), 1))
    assert torch.equal(ours.cpu(), theirs)


def test_equal_runs() -> None:
    from engine.paged_attention import Chunk
    from engine.torch_prefill import equal_runs

    shapes = [(512, 512)] * 7 + [(512, 1024), (300, 300), (300, 300), (1024, 1024), (1024, 1024)]
    chunks = [Chunk(0, n, kv_len, torch.empty(0)) for n, kv_len in shapes]
    assert [len(run) for run in equal_runs(chunks)] == [4, 2, 1, 1, 1, 1, 2]


def test_prepare() -> None:
    ids = torch.arange(300, dtype=torch.int32)
    sources = torch.full_like(ids, -1)
    sources[[4, 299, 7]] = torch.tensor([2, 0, 1], dtype=torch.int32)
    tokens = torch.tensor([1000, -1, 2000])
    positions, last = ids + 5, torch.tensor([3, 299], dtype=torch.int32)

    def run(device: torch.device):
        found = ops.prepare(*(x.to(device) for x in (ids, sources, positions, last, tokens)))
        return torch.cat([x.cpu() for x in found])

    ours, theirs = both(run)
    assert torch.equal(ours, theirs) and ours[4] == 2000 and ours[7] == 0 and ours[299] == 1000
