"""A step's numbers for the device: written into one pinned buffer, sent by one copy, read in place by captured graphs.

    [ids | sources | positions | slots | last | kv_lens | starts | tiles per window | keys | temperatures
     | chunks | work | tables]

All int32. Offsets follow from the numbers of tokens and rows, so a graph captured for a bucket finds its own again.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from engine.paged_attention import Chunk, Singles, count_tiles
from engine.sampler import GREEDY_BELOW, row_key
from engine.sequence import Row


class StepTensors:
    """Views of the device buffer for one number of tokens and rows, each made when it is first asked for: all of them
    together take longer than the first kernel's launch."""

    def __init__(self, buffer: torch.Tensor, layout: "_Layout", windows: Sequence[int], last_window: int):
        self._buffer, self._layout, self._windows, self._last_window = buffer, layout, windows, last_window
        self.has_chunks = "tail_lens" in layout.starts

    def _view(self, name: str) -> torch.Tensor:
        start = self._layout.starts[name]
        return self._buffer[start : start + self._layout.sizes[name]]

    @cached_property
    def ids(self) -> torch.Tensor:
        """[num_tokens]"""
        return self._view("ids")

    @cached_property
    def sources(self) -> torch.Tensor:
        """[num_tokens]: the row of the step before that sampled this token, -1: `ids` has it."""
        return self._view("sources")

    @cached_property
    def positions(self) -> torch.Tensor:
        """[num_tokens]"""
        return self._view("positions")

    @cached_property
    def slots(self) -> torch.Tensor:
        """[num_tokens], -1: padding."""
        return self._view("slots")

    @cached_property
    def last(self) -> torch.Tensor:
        """[num_rows], each row's last token."""
        return self._view("last")

    @cached_property
    def keys(self) -> torch.Tensor:
        """[2, num_rows]: the random key's halves."""
        return self._view("keys").view(2, -1)

    @cached_property
    def temperatures(self) -> torch.Tensor:
        """float32 [num_rows], 0: greedy."""
        return self._view("temperatures").view(torch.float32)

    @cached_property
    def singles(self) -> Singles:
        """Of all rows; those of several tokens have no tiles."""
        tables = self._buffer[self._layout.size :]
        tiles = {window: self._view(f"tiles{window}") for window in self._windows}
        return Singles(self._view("kv_lens"), tables, self._view("starts"), tiles)

    @cached_property
    def tails(self) -> Singles:
        """Of all rows, each one's last token as its one query; tiles for the last layer's window only."""
        singles = self.singles
        if not self.has_chunks:
            return singles
        tiles = {self._last_window: self._view("tail_tiles")}
        return Singles(self._view("tail_lens"), singles.tables, singles.starts, tiles)

    @cached_property
    def chunks(self) -> torch.Tensor:
        """[num_chunks, 4]: see triton_prefill, as for `work`."""
        return self._view("chunks").view(-1, 4)

    @cached_property
    def work(self) -> torch.Tensor:
        """[num_tiles, 2]"""
        return self._view("work").view(-1, 2)


class Inputs:
    """Two host buffers take turns: the copy of one may still be under way while the next step's is written."""

    def __init__(
        self,
        device: torch.device,
        max_tokens: int,
        max_rows: int,
        max_table: int,
        windows: Sequence[int],  # of each layer
        tile: int,  # tokens per tile of the decode kernel
        queries: int,  # per program of the prefill kernel
    ):
        self.windows, self._tile, self._queries = sorted(set(windows)), tile, queries
        self._last_window = windows[-1]
        self._layouts: dict[tuple[int, int, int], _Layout] = {}
        size = self._layout(max_tokens, max_rows, max_rows).size + max_table
        pinned = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # of parts that were sent
        self._numbers = [buffer.numpy() for buffer in self._host]
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._turn = 0
        self.num_bytes = 4 * size

    def views(self, num_tokens: int, num_rows: int, num_chunks: int) -> StepTensors:
        """`num_chunks`: how many rows of several tokens there can be."""
        layout = self._layout(num_tokens, num_rows, num_chunks)
        return StepTensors(self._device, layout, self.windows, self._last_window)

    def fill(
        self,
        rows: Sequence[Row],  # those of one token first
        num_tokens: int,  # of the step or its bucket
        num_rows: int,
        num_chunks: int,
        sources: Mapping[int, int],  # id(sequence) -> the row of the step before that samples its next token
        block_size: int,
    ) -> list[Chunk]:
        """Writes and sends. Returns the rows of several tokens, for attention that is launched row by row.

        After a pause all of this is met cold, and one operation on an array costs as much as a hundred numbers: so
        what rows need becomes one list, and only a chunk's tokens are arrays.
        """
        layout = self._layout(num_tokens, num_rows, num_chunks)
        self._turn ^= 1
        host = self._numbers[self._turn]
        ids, late, positions, slots = [], [], [], []  # of rows of one token
        kv_lens, starts, last, spans = [], [], [], []
        table: list[int] = []
        token = 0
        for row in rows:
            sequence, place, stop = row.sequence, row.start, row.stop
            block_ids = sequence.block_ids
            starts.append(len(table))
            table += block_ids[: -(-stop // block_size)]
            if row.num_tokens == 1:
                is_known = place < len(sequence.token_ids)
                ids.append(sequence.token_ids[place] if is_known else 0)
                late.append(-1 if is_known else sources[id(sequence)])
                positions.append(place)
                slots.append(block_ids[place // block_size] * block_size + place % block_size)
                kv_lens.append(stop)
            else:
                spans.append((token, row.num_tokens, stop, starts[-1], len(table)))
                kv_lens.append(0)
            token += row.num_tokens
            last.append(token - 1)
        singles = dict(ids=(ids, 0), sources=(late, -1), positions=(positions, 0), slots=(slots, -1))
        numbers = _Numbers(layout, "last" if num_chunks else "ids")
        for name, (values, padding) in singles.items():
            if num_chunks:
                part = host[layout.starts[name] :][:num_tokens]
                part[: len(values)] = values
                part[len(values) if name == "sources" else token :] = padding
            else:
                numbers.add(name, values, padding)
        numbers.add("last", last)
        numbers.add("kv_lens", kv_lens)
        numbers.add("starts", starts)
        for window in self.windows:
            counts = [count_tiles(n, window, self._tile) for n in kv_lens]
            numbers.add(f"tiles{window}", *_sums(counts))
        if num_chunks:
            stops = [row.stop for row in rows]
            numbers.add("tail_lens", stops)
            numbers.add("tail_tiles", *_sums([count_tiles(stop, self._last_window, self._tile) for stop in stops]))
        sampling = [_sampling(row) for row in rows]
        rest = [0] * (num_rows - len(rows))
        numbers.add("keys", [low for low, _, _ in sampling] + rest + [high for _, high, _ in sampling])
        numbers.add("temperatures", [temperature for _, _, temperature in sampling])
        numbers.add("chunks", [n for span in spans for n in span[:4]])
        numbers.add("work", self._work(spans), -1)
        sent = numbers.write(host, table)
        if num_chunks:
            self._fill_tokens(host, layout, rows, spans, block_size)
        self._send(sent)
        return [
            Chunk(start, count, stop, self._device[layout.size + low : layout.size + high])
            for start, count, stop, low, high in spans
        ]

    def _send(self, count: int) -> None:
        """At least so many numbers of the buffer whose turn it is: whole SENT, for which both views are kept."""
        key = self._turn, -(-count // SENT)
        views = self._views.get(key)
        if views is None:
            some = slice(key[1] * SENT)
            views = self._views[key] = self._device[some], self._host[self._turn][some]
        views[0].copy_(views[1], non_blocking=True)

    def _fill_tokens(
        self, host: np.ndarray, layout: "_Layout", rows: Sequence[Row], spans: Sequence[tuple[int, ...]], size: int
    ) -> None:
        chunks = [row for row in rows if row.num_tokens > 1]
        ids, positions, slots = (host[layout.starts[name] :] for name in ("ids", "positions", "slots"))
        for row, (token, count, stop, _, _) in zip(chunks, spans, strict=True):
            first = row.start // size
            blocks = np.array(row.sequence.block_ids[first : -(-stop // size)], np.int32)
            every = (blocks[:, None] * size + np.arange(size, dtype=np.int32)).ravel()
            here = slice(token, token + count)
            ids[here] = row.sequence.token_ids[row.start : stop]
            positions[here] = np.arange(row.start, stop, dtype=np.int32)
            slots[here] = every[row.start - first * size :][:count]

    def _work(self, spans: Sequence[tuple[int, ...]]) -> list[int]:
        """Tiles of queries, those with the most keys first, or the last one to start ends alone."""
        tiles = []
        for i, (_, count, stop, _, _) in enumerate(spans):
            tiles += [(stop - count + q, i, q // self._queries) for q in range(0, count, self._queries)]
        tiles.sort(reverse=True)
        return [n for _, chunk, part in tiles for n in (chunk, part)]

    def _layout(self, num_tokens: int, num_rows: int, num_chunks: int) -> "_Layout":
        shape = num_tokens, num_rows, num_chunks
        found = self._layouts.get(shape)
        if found is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[shape] = self._lay_out(*shape)
        return found

    def _lay_out(self, num_tokens: int, num_rows: int, num_chunks: int) -> "_Layout":
        sizes = dict(ids=num_tokens, sources=num_tokens, positions=num_tokens, slots=num_tokens)
        sizes |= dict(last=num_rows, kv_lens=num_rows, starts=num_rows)
        sizes |= {f"tiles{window}": num_rows + 1 for window in self.windows}
        sizes |= dict(tail_lens=num_rows, tail_tiles=num_rows + 1) if num_chunks else {}
        sizes |= dict(keys=2 * num_rows, temperatures=num_rows, chunks=4 * num_chunks)
        sizes |= dict(work=2 * (num_tokens // self._queries + num_chunks) if num_chunks else 0)
        starts, stops, at = {}, {}, 0
        for name, size in sizes.items():
            starts[name], stops[name] = at, at + -(-size // 4) * 4  # 16-byte starts
            at = stops[name]
        return _Layout(sizes, starts, stops, at)


SENT = 1024
MAX_LAYOUTS = 512  # that are remembered: of graphs, and of the prompts' lengths that were last


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the parts of a shape lie, in order; tables follow."""

    sizes: dict[str, int]
    starts: dict[str, int]
    stops: dict[str, int]  # rounded up
    size: int  # of all


class _Numbers:
    """Consecutive parts of a layout, from `first` on."""

    def __init__(self, layout: _Layout, first: str):
        self._layout, self._begin = layout, layout.starts[first]
        self._values: list[int] = []

    def add(self, name: str, values: Sequence[int], padding: int = 0) -> None:
        assert self._begin + len(self._values) == self._layout.starts[name], f"{name} is not the next part"
        self._values += values
        self._values += [padding] * (self._layout.stops[name] - self._begin - len(self._values))

    def write(self, host: np.ndarray, table: list[int]) -> int:
        """And the tables behind. Returns where they end."""
        assert self._begin + len(self._values) == self._layout.size, "parts are missing"
        self._values += table
        stop = self._begin + len(self._values)
        host[self._begin : stop] = self._values
        return stop


def _sums(counts: Sequence[int]) -> tuple[list[int], int]:
    """The running sum, from 0 on; what lies behind stays at the total."""
    sums = list(accumulate(counts, initial=0))
    return sums, sums[-1]


def _sampling(row: Row) -> tuple[int, int, int]:
    """The random key's halves and the temperature, as they lie in an int32; zeros: greedy, or no token is wanted."""
    sampling = row.sequence.request.sampling
    if not row.samples or sampling.temperature < GREEDY_BELOW:
        return 0, 0, 0
    key = row_key(sampling.seed, row.sequence.index, row.stop - row.sequence.request.num_prompt_tokens)
    return _KEY.unpack(_BITS.pack(key, sampling.temperature))


_BITS, _KEY = struct.Struct("<Qf"), struct.Struct("<iii")
