"""Pools of the same KV kept in different dtypes: what the tests of rounding on the way share."""

import torch

from engine.kv_cache import DTYPES, KVCache, Slots
from engine.kv_layout import KVLayout, LayerShape
from kv_transfer.base import BlockMemory
from kv_transfer.relayout import Tiles

LAYERS = [LayerShape(2, 16, 16), LayerShape(2, 16, 16), LayerShape(3, 24, 16)]


def memory_of(cache: KVCache) -> BlockMemory:
    layout = cache.layout
    tiles = tuple(tuple(Tiles(*entry) for entry in layer) for layer in layout.tiles)
    return BlockMemory(cache.slab, layout.layer_offsets, layout.block_size, tiles, DTYPES[layout.kv_dtype])


def written(dtype: str, kv_dtype: str | None, block_size: int, block_ids: list[int], num_tokens: int) -> BlockMemory:
    """A pool whose engine has computed the first of 90 tokens, the same whatever it keeps them in."""
    layout = KVLayout.of("m", "w", "r", dtype, block_size, LAYERS, kv_dtype)
    cache, at = KVCache(layout, 12, torch.device("cpu")), torch.arange(num_tokens)
    generator = torch.Generator().manual_seed(0)
    for shape, layer in zip(LAYERS, cache.layers, strict=True):
        heads = shape.num_kv_heads
        key, value = (
            (torch.randn(90, heads, dim, generator=generator) * 30)[:num_tokens].to(DTYPES[dtype])
            for dim in (shape.key_dim, shape.value_dim)
        )
        layer.write(key, value, Slots(torch.tensor(block_ids)[at // block_size], at % block_size))
    return memory_of(cache)
