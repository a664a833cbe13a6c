"""Chunks through cuDNN, whose place a definition takes: pieces and padding give the answer, by plans made before."""

from collections.abc import Iterator

import pytest
import torch

from engine import torch_prefill
from engine.kv_cache import KVCache, Slots
from engine.kv_layout import FP8, KVLayout, LayerShape
from engine.paged_attention import Call, Chunk, reference_chunk

HEADS, KV_HEADS, DIM = 4, 2, 8
Shape = tuple[tuple[int, ...], ...]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Shape]]:
    """Sizes are small; whatever is asked of cuDNN, by shape and strides, which is what it makes a plan for."""
    shapes: list[Shape] = []

    def attend(query, key, value, scale, is_causal):
        shapes.append(tuple((*x.shape, *x.stride()) for x in (query, key, value)))
        assert not (torch.isnan(query).any() or torch.isnan(key).any() or torch.isnan(value).any())
        group = query.shape[2] // key.shape[2]
        k, v = (x.repeat_interleave(group, 2) for x in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, k) * scale
        if is_causal:
            assert query.shape[1] == key.shape[1]
            scores += torch.full(scores.shape[2:], float("-inf")).triu(1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)

    for name, size in dict(STEP=16, BIG_STEP=128, MAX_PIECE=256).items():
        monkeypatch.setattr(torch_prefill, name, size)
    monkeypatch.setattr(torch_prefill, "_cudnn", attend)
    monkeypatch.setattr(torch_prefill, "_knows", lambda call, cache: True)
    empty = torch.Tensor.new_empty  # as memory is: full of what was there before
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: empty(self, *size).fill_(torch.nan))
    yield shapes


def make_cache(block_size: int, kv_dtype: str | None = None) -> KVCache:
    torch.manual_seed(0)
    layout = KVLayout.of("t", "", "", "float32", block_size, [LayerShape(KV_HEADS, DIM, DIM, 0)] * 2, kv_dtype)
    cache = KVCache(layout, 700 // block_size + 1, torch.device("cpu"))
    num_slots = cache.num_blocks * block_size
    for layer in range(2):
        key, value = torch.randn(2, num_slots, KV_HEADS, DIM)
        places = torch.arange(num_slots)
        cache.layers[layer].write(key, value, Slots(places // block_size, places % block_size))
    return cache


def run(cache: KVCache, kv_len: int, num_queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(through pieces, by definition), q, k and v as a fused layer has them."""
    call, size = Call(1, 0.3), cache.layout.block_size
    table = torch.randperm(cache.num_blocks)[: -(-kv_len // size)].int()
    chunk = Chunk(0, num_queries, kv_len, table)
    qkv = torch.randn(num_queries, HEADS + 2 * KV_HEADS, DIM)
    query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
    own = torch_prefill.gather(chunk, 1, cache, kv_len - num_queries, kv_len)
    for mine, stored in zip((key, value), own, strict=True):
        mine[:] = torch.nan if cache.is_scaled else stored  # of a cache that rounds, only what it holds counts
    expected = reference_chunk(query, call, chunk, cache, torch.zeros(num_queries, HEADS, DIM))
    return torch_prefill.attend_run(query, key, value, call, [chunk], cache), expected


@pytest.mark.parametrize("block_size", [16, 48])  # pieces begin inside blocks of the latter
@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize(
    ("kv_len", "num_queries"), [(40, 40), (32, 32), (64, 32), (75, 32), (75, 33), (90, 3), (399, 100), (623, 64)]
)
def test_attend_run(kv_len: int, num_queries: int, block_size: int, kv_dtype: str | None) -> None:
    found, expected = run(make_cache(block_size, kv_dtype), kv_len, num_queries)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kv_dtype", [None, FP8])
def test_plans_are_what_chunks_ask_for(asked: list[Shape], kv_dtype: str | None) -> None:
    cache = make_cache(16, kv_dtype)
    for make in torch_prefill.plans([Call(0, 1.0), Call(1, 1.0)], HEADS, cache, 70, 500):
        make()
    made = set(asked)
    assert len(made) == len(asked), "a plan was made twice"
    for kv_len, num_queries in [(20, 20), (32, 32), (65, 65), (70, 70), (99, 70), (128, 64), (301, 33), (499, 70)]:
        asked.clear()
        run(cache, kv_len, num_queries)
        assert asked and set(asked) <= made, (kv_len, num_queries)


def test_no_plans_behind_a_window(asked: list[Shape]) -> None:
    layout = KVLayout.of("t", "", "", "float32", 16, [LayerShape(KV_HEADS, DIM, DIM, 40)])
    cache = KVCache(layout, 4, torch.device("cpu"))
    for make in torch_prefill.plans([Call(0, 1.0, window=40)], HEADS, cache, 64, 500):
        make()
    assert [shape[0][1] for shape in asked] == [16, 32, 16]
