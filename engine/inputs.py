"""A step's numbers for the device: written into one pinned buffer, sent by one copy, read in place by captured graphs.

    [ids | sources | positions | slots | last | kv_lens | starts | tiles per window | keys | temperatures
     | chunks | work | tables]

All int32. Offsets follow from the numbers of tokens and rows, so a graph captured for a bucket finds its own again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.paged_attention import Chunk, Singles, count_tiles
from engine.sampler import GREEDY_BELOW, row_key
from engine.sequence import Row

_M32 = 2**32 - 1


@dataclass(slots=True)
class StepTensors:
    """Views of the device buffer for one number of tokens and rows."""

    ids: torch.Tensor  # [num_tokens]
    sources: torch.Tensor  # [num_tokens]: the row of the step before that sampled this token, -1: `ids` has it
    positions: torch.Tensor  # [num_tokens]
    slots: torch.Tensor  # [num_tokens], -1: padding
    last: torch.Tensor  # [num_rows], each row's last token
    keys: torch.Tensor  # [2, num_rows]: the random key's halves
    temperatures: torch.Tensor  # float32 [num_rows], 0: greedy
    singles: Singles  # of all rows; those of several tokens have no tiles
    tails: Singles  # of all rows, each one's last token as its one query; tiles for the last layer's window only
    chunks: torch.Tensor  # [num_chunks, 4] and
    work: torch.Tensor  # [num_tiles, 2]: see triton_prefill


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
        size = self._offsets(max_tokens, max_rows, max_rows)["tables"][0] + max_table
        pinned = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._turn = 0
        self.num_bytes = 4 * size

    def views(self, num_tokens: int, num_rows: int, num_chunks: int) -> StepTensors:
        """`num_chunks`: how many rows of several tokens there can be."""
        at = self._offsets(num_tokens, num_rows, num_chunks)

        def view(name: str) -> torch.Tensor:
            return self._device[slice(*at[name])]

        singles = Singles(view("kv_lens"), view("tables"), view("starts"), {w: view(f"tiles{w}") for w in self.windows})
        tails = singles
        if num_chunks:
            tails = Singles(view("tail_lens"), singles.tables, singles.starts, {self._last_window: view("tail_tiles")})
        return StepTensors(
            view("ids"),
            view("sources"),
            view("positions"),
            view("slots"),
            view("last"),
            view("keys").view(2, num_rows),
            view("temperatures").view(torch.float32),
            singles,
            tails,
            view("chunks").view(-1, 4),
            view("work").view(-1, 2),
        )

    def fill(
        self,
        rows: Sequence[Row],  # those of one token first
        num_tokens: int,  # of the step or its bucket
        num_rows: int,
        num_chunks: int,
        sources: Mapping[int, int],  # id(sequence) -> the row of the step before that samples its next token
        block_size: int,
    ) -> list[Chunk]:
        """Writes and sends. Returns the rows of several tokens, for attention that is launched row by row."""
        at = self._offsets(num_tokens, num_rows, num_chunks)
        self._turn ^= 1
        buffer = self._host[self._turn]
        host = buffer.numpy()

        def part(name: str) -> np.ndarray:
            return host[slice(*at[name])]

        ids, positions, slots, last = part("ids"), part("positions"), part("slots"), part("last")
        tables, starts = part("tables"), part("starts")
        ids[:] = positions[:] = 0
        slots[:] = part("sources")[:] = -1
        kv_lens = part("kv_lens")
        kv_lens[:] = 0
        token = width = 0
        spans = []
        table: list[int] = []
        for i, row in enumerate(rows):
            block_ids, stop = row.sequence.block_ids, row.stop
            starts[i] = len(table)
            table += block_ids[: -(-stop // block_size)]
            if row.num_tokens == 1:
                place = row.start
                token_ids = row.sequence.token_ids
                if place < len(token_ids):
                    ids[token] = token_ids[place]
                else:
                    ids[token] = 0
                    part("sources")[token] = sources[id(row.sequence)]
                positions[token] = place
                slots[token] = block_ids[place // block_size] * block_size + place % block_size
                kv_lens[i] = stop
            else:
                places = np.arange(row.start, stop)
                here = slice(token, token + row.num_tokens)
                ids[here] = row.sequence.token_ids[row.start : stop]
                positions[here] = places
                blocks = np.array(block_ids)
                slots[here] = blocks[places // block_size] * block_size + places % block_size
                spans.append((token, row.num_tokens, stop, int(starts[i]), len(table)))
            token += row.num_tokens
            last[i] = token - 1
        width = len(table)
        tables[:width] = table
        last[len(rows) :] = 0
        for window in self.windows:
            counts = [count_tiles(row.stop, window, self._tile) if row.num_tokens == 1 else 0 for row in rows]
            _fill_sums(part(f"tiles{window}"), counts)
        if num_chunks:
            stops = [row.stop for row in rows]
            part("tail_lens")[: len(rows)] = stops
            part("tail_lens")[len(rows) :] = 0
            _fill_sums(part("tail_tiles"), [count_tiles(stop, self._last_window, self._tile) for stop in stops])
            self._fill_chunks(spans, part("chunks").reshape(-1, 4), part("work").reshape(-1, 2))
        self._fill_sampling(rows, part("keys").reshape(2, -1), part("temperatures").view(np.float32))
        sent = at["tables"][0] + width
        self._device[:sent].copy_(buffer[:sent], non_blocking=True)
        first = at["tables"][0]
        return [
            Chunk(start, count, stop, self._device[first + low : first + high])
            for start, count, stop, low, high in spans
        ]

    def _fill_sampling(self, rows: Sequence[Row], keys: np.ndarray, temperatures: np.ndarray) -> None:
        temperatures[:] = 0
        for i, row in enumerate(rows):
            sampling = row.sequence.request.sampling
            if row.samples and sampling.temperature >= GREEDY_BELOW:
                offset = row.stop - row.sequence.request.num_prompt_tokens
                key = row_key(sampling.seed, row.sequence.index, offset)
                keys.view(np.uint32)[:, i] = key & _M32, key >> 32
                temperatures[i] = sampling.temperature

    def _fill_chunks(self, spans: list[tuple[int, int, int, int, int]], chunks: np.ndarray, work: np.ndarray) -> None:
        work[:] = -1
        tiles = []
        for i, (start, count, stop, low, _) in enumerate(spans):
            chunks[i] = start, count, stop, low
            tiles += [(stop - count + q, i, q // self._queries) for q in range(0, count, self._queries)]
        if tiles:
            tiles.sort(reverse=True)  # those with the most keys first, or the last one to start ends alone
            work[: len(tiles)] = np.array(tiles)[:, 1:]

    def _offsets(self, num_tokens: int, num_rows: int, num_chunks: int) -> dict[str, tuple[int, int]]:
        sizes = dict(ids=num_tokens, sources=num_tokens, positions=num_tokens, slots=num_tokens)
        sizes |= dict(last=num_rows, kv_lens=num_rows, starts=num_rows)
        sizes |= {f"tiles{window}": num_rows + 1 for window in self.windows}
        sizes |= dict(tail_lens=num_rows, tail_tiles=num_rows + 1) if num_chunks else {}
        sizes |= dict(keys=2 * num_rows, temperatures=num_rows, chunks=4 * num_chunks)
        sizes |= dict(work=2 * (num_tokens // self._queries + num_chunks) if num_chunks else 0)
        found, at = {}, 0
        for name, size in sizes.items():
            found[name] = (at, at + size)
            at += -(-size // 4) * 4  # 16-byte starts
        found["tables"] = (at, None)  # type: ignore[assignment]
        return found


def _fill_sums(sums: np.ndarray, counts: Sequence[int]) -> None:
    """The running sum, from 0 on; what lies behind stays at the total."""
    sums[0] = 0
    sums[1 : len(counts) + 1] = np.cumsum(counts)
    sums[len(counts) + 1 :] = sums[len(counts)]
