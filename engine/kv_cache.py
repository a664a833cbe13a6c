"""The KV memory of one device: one slab of bytes, and per layer the ways in (write) and out (gather)."""

import mmap
from dataclasses import dataclass

import torch

from engine import fp8
from engine.kv_layout import FP8, KVGroup, KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FP8: fp8.DTYPE}


@dataclass(frozen=True, slots=True)
class Span:
    """Where a layer's K and V begin inside a block, for kernels that address the slab themselves."""

    first: int  # elements into the block: K [num_kv_heads, block_size, key_dim], then V
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scales: int  # bytes into the block: float8's [2 (K, V), num_kv_heads, block_size], else where they would be


class KVCache:
    """`slab`: uint8 [num_blocks, block_bytes]. `layers[i]` reads and writes layer i inside it."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device):
        self.layout, self.num_blocks = layout, num_blocks
        self.slab = _zeros(num_blocks * layout.block_bytes, device).view(num_blocks, layout.block_bytes)
        self.dtype = DTYPES[layout.dtype]  # of what goes in and comes out
        self.is_scaled = layout.kv_dtype == FP8
        dtype = DTYPES[layout.kv_dtype]
        self.elements = self.slab.view(dtype)  # [num_blocks, elements per block]
        self.spans = [
            Span(
                offset // dtype.itemsize,
                shape.num_kv_heads,
                shape.key_dim,
                shape.value_dim,
                offset + shape.num_kv_heads * layout.block_size * (shape.key_dim + shape.value_dim) * dtype.itemsize,
            )
            for shape, offset in zip(layout.layers, layout.layer_offsets, strict=False)
        ]
        # float8 is moved as bytes: torch has few operations for it
        elements = self.slab if self.is_scaled else self.elements
        self.layers: list[TiledLayer | StridedLayer | ScaledLayer] = []
        for shape, span in zip(layout.layers, self.spans, strict=True):
            layer = _plain_layer(elements, shape, layout.block_size, span.first)
            if self.is_scaled:
                self.layers.append(ScaledLayer(layer, self.slab, span, layout.block_size, self.dtype))
            else:
                self.layers.append(layer)

    def copy_block(self, source: int, target: int) -> None:
        self.slab[target].copy_(self.slab[source])

    def zero_block(self, block_id: int) -> None:
        self.slab[block_id].zero_()


class Slots:
    """Where one step's tokens go: block and offset of each, and per kind of layer what follows from them."""

    def __init__(self, blocks: torch.Tensor, offsets: torch.Tensor):
        self.blocks = blocks  # int64 [num_tokens]
        self.offsets = offsets  # int64 [num_tokens], inside the block
        self.memo: dict = {}


class Table:
    """The blocks of some rows, [num_rows, width]; a short row repeats its own last block, never another's."""

    def __init__(self, block_ids: torch.Tensor):
        self.block_ids = block_ids  # int64
        self.memo: dict = {}


class TiledLayer:
    """A layer whose K and V are tiles [token, dim] of one size, at whole multiples of it: the common case.

    The slab is then one table of tiles, and a gather is one index_select that lands as [K|V, row, kv_head, token, dim].
    """

    def __init__(self, elements: torch.Tensor, num_heads: int, block_size: int, dim: int, first_tile: int):
        self.num_heads, self.block_size, self.dim, self.first_tile = num_heads, block_size, dim, first_tile
        self.tiles = elements.view(-1, block_size * dim)
        self.rows = elements.view(-1, dim)
        self.tiles_per_block = elements.shape[1] // (block_size * dim)
        self.kind = (num_heads, block_size, dim)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: Slots) -> None:
        """key, value: [num_tokens, num_heads, dim]."""
        base = slots.memo.get(self.kind)
        if base is None:
            heads = torch.arange(self.num_heads, device=key.device)
            tiles = (slots.blocks * self.tiles_per_block)[:, None] + heads
            base = slots.memo[self.kind] = (tiles * self.block_size + slots.offsets[:, None]).flatten()
        first = base + self.first_tile * self.block_size
        self.rows.index_copy_(0, first, key.reshape(-1, self.dim))
        self.rows.index_copy_(0, first + self.num_heads * self.block_size, value.reshape(-1, self.dim))

    def gather(self, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as [num_rows, num_heads, width * block_size, dim]."""
        base = table.memo.get(self.kind)
        num_rows, width = table.block_ids.shape
        if base is None:
            heads = torch.arange(2 * self.num_heads, device=table.block_ids.device).view(2, 1, self.num_heads, 1)
            base = table.memo[self.kind] = (table.block_ids[None, :, None] * self.tiles_per_block + heads).flatten()
        both = self.tiles.index_select(0, base + self.first_tile)
        key, value = both.view(2, num_rows, self.num_heads, width * self.block_size, self.dim).unbind(0)
        return key, value


class StridedLayer:
    """Any other layer (K and V of different widths, odd offsets): two gathers and a transposing copy."""

    def __init__(
        self, elements: torch.Tensor, num_heads: int, block_size: int, key_dim: int, value_dim: int, start: int
    ):
        def view(dim: int, offset: int) -> torch.Tensor:
            strides = (elements.stride(0), block_size * dim, dim, 1)
            return elements.as_strided((elements.shape[0], num_heads, block_size, dim), strides, offset)

        self.keys = view(key_dim, start)  # [num_blocks, num_heads, block_size, dim]
        self.values = view(value_dim, start + num_heads * block_size * key_dim)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: Slots) -> None:
        self.keys[slots.blocks, :, slots.offsets] = key
        self.values[slots.blocks, :, slots.offsets] = value

    def gather(self, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, width = table.block_ids.shape

        def rows(cache: torch.Tensor) -> torch.Tensor:
            picked = cache.index_select(0, table.block_ids.flatten()).unflatten(0, (num_rows, width))
            return picked.transpose(1, 2).flatten(2, 3)

        return rows(self.keys), rows(self.values)


class ScaledLayer:
    """Bytes of float8 with a scale for each token and head: what goes in is rounded, what comes out is `dtype`."""

    def __init__(
        self, values: TiledLayer | StridedLayer, slab: torch.Tensor, span: Span, block_size: int, dtype: torch.dtype
    ):
        self._values, self._dtype = values, dtype
        shape = (slab.shape[0], 2, span.num_kv_heads, block_size)
        strides = (slab.stride(0), span.num_kv_heads * block_size, block_size, 1)
        self.scales = slab.as_strided(shape, strides, span.scales)  # uint8

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: Slots) -> None:
        (key, key_scale), (value, value_scale) = fp8.quantise(key), fp8.quantise(value)
        self._values.write(key.view(torch.uint8), value.view(torch.uint8), slots)
        self.scales[slots.blocks, :, :, slots.offsets] = torch.stack([key_scale, value_scale], 1)

    def gather(self, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self.scales[table.block_ids]  # [num_rows, width, 2, num_heads, block_size]
        scales = scales.permute(2, 0, 3, 1, 4).flatten(3)
        key, value = (
            fp8.dequantise(x.view(fp8.DTYPE), scale, self._dtype)
            for x, scale in zip(self._values.gather(table), scales, strict=True)
        )
        return key, value


def _plain_layer(elements: torch.Tensor, shape: KVGroup, block_size: int, start: int) -> TiledLayer | StridedLayer:
    tile = block_size * shape.key_dim
    if shape.key_dim == shape.value_dim and start % tile == 0 and elements.shape[1] % tile == 0:
        return TiledLayer(elements, shape.num_kv_heads, block_size, shape.key_dim, start // tile)
    return StridedLayer(elements, shape.num_kv_heads, block_size, shape.key_dim, shape.value_dim, start)


def _zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed bytes. On CPU pages are mapped as they are first touched, so an unused pool costs no memory."""
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)
