"""One step's rows as tensors: what the model reads, where its KV goes, and what each row may attend to.

Rows with one new token come first, sorted by context length and cut into groups of similar length, each attended in
one call. The longer chunks follow, one call each. Masks and indices are built once per step and shared by all layers.
"""

from collections.abc import Callable, Sequence

import torch

from engine.attention import attend
from engine.kv_cache import KVCache, Slots, Table
from engine.sequence import Row


class Group:
    """Rows that are attended together: each has `num_queries` new tokens, the last of its `kv_lens`."""

    def __init__(self, rows: Sequence[Row], start: int, device: torch.device):
        self.num_rows, self.num_queries = len(rows), rows[0].num_tokens
        self.start, self.stop = start, start + len(rows) * self.num_queries  # of its tokens in the step
        self.kv_lens = [row.stop for row in rows]
        self.max_kv_len = max(self.kv_lens)
        self.is_fresh = self.num_queries == self.max_kv_len  # nothing cached before: K and V are at hand
        self._rows, self._device = rows, device
        self._table: Table | None = None
        self._masks: dict[tuple[int, torch.dtype], torch.Tensor | None] = {}

    def table(self, block_size: int) -> Table:
        if self._table is None:
            width = -(-self.max_kv_len // block_size)
            padded = []
            for row in self._rows:
                block_ids = row.sequence.block_ids[: -(-row.stop // block_size)]
                padded.append(block_ids + block_ids[-1:] * (width - len(block_ids)))
            self._table = Table(torch.tensor(padded, device=self._device))
        return self._table

    def mask(self, window: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive [num_rows, 1, num_queries, max_kv_len], 0 or -inf; None where every query sees everything."""
        if window >= self.max_kv_len:
            window = 0
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = self._build_mask(window, dtype)
        return self._masks[window, dtype]

    def _build_mask(self, window: int, dtype: torch.dtype) -> torch.Tensor | None:
        if self.num_queries == 1 and not window and min(self.kv_lens) == self.max_kv_len:
            return None
        ends = torch.tensor(self.kv_lens, device=self._device)[:, None] - self.num_queries
        queries = (ends + torch.arange(self.num_queries, device=self._device))[:, :, None]  # positions
        keys = torch.arange(self.max_kv_len, device=self._device)
        hidden = keys > queries
        if window:
            hidden |= keys <= queries - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None]


class Batch:
    """`rows` in the order of their tokens. `on_layer(i)` is called when layer i's KV of this step is in the cache."""

    def __init__(self, rows: Sequence[Row], cache: KVCache, on_layer: Callable[[int], None] = lambda layer: None):
        device, size = cache.slab.device, cache.layout.block_size
        self.cache, self.on_layer = cache, on_layer
        singles = sorted((row for row in rows if row.num_tokens == 1), key=lambda row: row.stop)
        self.rows = singles + [row for row in rows if row.num_tokens > 1]
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        last: list[int] = []
        for row in self.rows:
            ids += row.sequence.token_ids[row.start : row.stop]
            positions += range(row.start, row.stop)
            blocks += [row.sequence.block_ids[position // size] for position in range(row.start, row.stop)]
            last.append(len(ids) - 1)
        self.input_ids = torch.tensor([ids], device=device)  # [1, num_tokens]
        self.positions = torch.tensor([positions], device=device)  # [1, num_tokens]
        self.last = torch.tensor(last, device=device)  # [num_rows], each row's last token
        self.slots = Slots(torch.tensor(blocks, device=device), self.positions[0] % size)
        self.groups = list(self._group(singles, device))

    def attend(self, layer: int, query, key, value, scale, window, softcap, sinks) -> torch.Tensor:
        """[1, num_tokens, num_heads, value_dim]."""
        return attend(layer, query, key, value, self, scale, window, softcap, sinks)

    def _group(self, singles: list[Row], device: torch.device):
        start = 0
        while start < len(singles):  # a group's shortest context is at least half its longest, or both are short
            limit = max(2 * singles[start].stop, 128)
            stop = start + 1
            while stop < len(singles) and singles[stop].stop <= limit:
                stop += 1
            yield Group(singles[start:stop], start, device)
            start = stop
        for row in self.rows[len(singles) :]:
            yield Group([row], start, device)
            start += row.num_tokens
