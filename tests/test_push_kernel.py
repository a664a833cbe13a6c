"""The kernel that moves and digests pages, against plain torch, in Triton's interpreter or on a GPU."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from kv_transfer.push_kernel import Side, divider, launch
from kv_transfer.relayout import TileRange, Tiles, tile_ranges
from tests.interpreter import patch as patch_interpreter
from tests.interpreter import total

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        patch_interpreter(monkeypatch)


def digest_of(rows: dict[tuple[int, int], bytes]) -> int:
    """By (tile, token): what the kernel's docstring says, in Python."""
    result = 0
    for (tile, token), row in rows.items():
        weight = (tile * 0xBF58476D1CE4E5B9 + token * 0x94D049BB133111EB) & MASK | 1
        for column, word in enumerate(np.frombuffer(row, np.uint8 if len(row) % 4 else np.uint32).tolist()):
            key = ((column + 1) * 0x9E3779B97F4A7C15 & MASK) >> 32 | 1
            result += word * key * weight
    return result & MASK


class Pool:
    def __init__(self, block_size: int, layers, num_blocks: int, seed: int | None = None) -> None:
        self.block_size, self.layers = block_size, layers
        size = block_size * sum(t.num_tiles * t.row_bytes for layer in layers for t in layer)
        self.slab = torch.zeros(num_blocks, size, dtype=torch.uint8, device=DEVICE)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            self.slab.copy_(torch.randint(0, 256, (num_blocks, size), dtype=torch.uint8, generator=generator))

    def side(self, pages: torch.Tensor, first_block: int = 0) -> Side:
        return Side(self.slab.data_ptr(), self.slab.shape[1], self.block_size, pages.data_ptr(), first_block)

    def rows(self, pages: list[int], tokens: range, layers: tuple[int, int]) -> dict[tuple[int, int], bytes]:
        """By (tile, token) of the layers' tiles."""
        size, found, tile, before = self.block_size, {}, 0, 0
        for index, layer in enumerate(self.layers):
            for tiles in layer:
                for _ in range(tiles.num_tiles):
                    for token in tokens if layers[0] <= index < layers[1] else ():
                        at = before * size + token % size * tiles.row_bytes
                        row = self.slab[pages[token // size], at : at + tiles.row_bytes]
                        found[tile, token] = row.cpu().numpy().tobytes()
                    tile, before = tile + 1, before + tiles.row_bytes
        return found


def ids(pages: list[int]) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int32, device=DEVICE)


def move(source: Pool, target: Pool | None, pages, target_pages, tokens, layers, guard=None, generation=0) -> int:
    """All tile ranges of the layers; returns the digest."""
    result, mine, theirs = 0, ids(pages), ids(target_pages)
    for found in tile_ranges(source.layers, *layers):
        sums = torch.full((3,), 77, dtype=torch.int64, device=DEVICE)
        launch(
            source.side(mine),
            target.side(theirs) if target is not None else None,
            (tokens.start, tokens.stop),
            found,
            sums.data_ptr(),
            3,
            guard.data_ptr() if guard is not None else 0,
            generation,
        )
        result += total(sums.cpu())
    return result & MASK


EVEN = ((Tiles(2, 32), Tiles(2, 32)),) * 3
FOUR = ((Tiles(4, 32), Tiles(4, 32)),) * 2
# Other widths for K and V, one layer of its own, rows that are no power of two.
UNEVEN = ((Tiles(2, 24), Tiles(2, 40)), (Tiles(1, 64), Tiles(1, 64)), (Tiles(2, 24), Tiles(2, 40)))
# As float8 with its scales, and rows long enough for chunks that are runs.
SCALED = ((Tiles(2, 32), Tiles(2, 32), Tiles(4, 1)),) * 3
LONG = ((Tiles(2, 256), Tiles(2, 256), Tiles(4, 1)), (Tiles(4, 256), Tiles(4, 256)), (Tiles(4, 256), Tiles(4, 256)))


# A GPU compiles kernels for each pair of sizes: the rows that matter most are laid in all of them.
SOME, ALL = [(16, 16), (64, 16), (32, 48)], [(16, 16), (48, 48), (64, 64), (16, 64), (64, 16), (32, 48)]
LAID = {"even": (EVEN, ALL), "long": (LONG, ALL), "uneven": (UNEVEN, SOME), "scaled": (SCALED, SOME)}


@pytest.mark.parametrize("name, sizes", [(name, pair) for name, (_, pairs) in LAID.items() for pair in pairs], ids=str)
@pytest.mark.parametrize("part", [(0, 3), (1, 2)], ids=str)
def test_rows_land_where_they_belong(name: str, sizes: tuple[int, int], part: tuple[int, int]):
    layers, _ = LAID[name]
    source, target = Pool(sizes[0], layers, 12, seed=1), Pool(sizes[1], layers, 12)
    pages, target_pages = [7, 3, 11, 0, 5, 2, 9, 1, 4, 6, 8, 10], [5, 9, 2, 8, 1, 11, 0, 3, 6, 4, 7, 10]
    tokens = range(64, 192) if sizes == (64, 64) else range(48, 96) if sizes == (48, 48) else range(16, 96)
    digest = move(source, target, pages, target_pages, tokens, part)
    sent = source.rows(pages, tokens, part)
    assert target.rows(target_pages, tokens, part) == sent
    assert digest == digest_of(sent) == move(target, None, target_pages, target_pages, tokens, part)
    # nothing else was touched
    assert int(target.slab.count_nonzero()) == sum(np.count_nonzero(np.frombuffer(r, np.uint8)) for r in sent.values())


def test_division_by_multiplication():
    rng = np.random.default_rng(0)
    for divisor in (*range(1, 300), *rng.integers(300, 1 << 20, 300).tolist()):
        by, bits = divider(divisor)
        assert by < 1 << 31
        most = ((1 << 30) - 1) // divisor
        for times in (0, 1, most - 1, most, int(rng.integers(most))):
            for number in (times * divisor, min(times * divisor + divisor - 1, (1 << 30) - 1)):
                assert number * by >> bits == number // divisor


def test_a_slice_of_heads():
    """Two of four heads become the second half of a pool that has four of its own."""
    source = Pool(16, FOUR, 4, seed=2)
    target = Pool(32, FOUR, 4)
    mine, theirs = ids([2, 0]), ids([3])
    sums = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    launch(
        source.side(mine),
        target.side(theirs),
        (0, 32),
        TileRange(1, 8, 32, 32, 2, 4, 128),
        sums.data_ptr(),
        2,
        target_tiles=TileRange(2, 8, 32, 64, 2, 4, 128),
    )
    sent, landed = source.rows([2, 0], range(32), (0, 2)), target.rows([3], range(32), (0, 2))
    for part in range(4):
        for token in range(32):
            for head in range(2):
                assert landed[part * 4 + 2 + head, token] == sent[part * 4 + 1 + head, token]
                assert not any(landed[part * 4 + head, token])


def test_every_damage_is_seen():
    pool, pages = Pool(16, EVEN, 6, seed=3), [4, 1, 3]
    tokens, layers = range(48), (0, 3)

    def digest() -> int:
        return move(pool, None, pages, pages, tokens, layers)

    right, slab = digest(), pool.slab.clone()
    rng = np.random.default_rng(0)
    for _ in range(24):  # any bit
        page, at, bit = rng.choice(pages), rng.integers(slab.shape[1]), rng.integers(8)
        pool.slab[page, at] ^= 1 << bit
        assert digest() != right
        pool.slab.copy_(slab)
    pool.slab[[4, 1]] = slab[[1, 4]]  # two pages swapped
    assert digest() != right
    pool.slab.copy_(slab)
    pool.slab[3, :32], pool.slab[3, 32:64] = slab[3, 32:64], slab[3, :32]  # two tokens swapped
    assert digest() != right
    pool.slab.copy_(slab)
    pool.slab[1] = slab[5]  # stale page
    assert digest() != right
    pool.slab.copy_(slab)
    pool.slab[5] = 0  # not one of them
    assert digest() == right


def test_a_revoked_guard_stops_every_write():
    source, target = Pool(16, EVEN, 4, seed=4), Pool(16, EVEN, 4)
    guard = torch.tensor([41], dtype=torch.int64, device=DEVICE)
    assert move(source, target, [0, 1], [2, 3], range(32), (0, 3), guard, 42) == 0
    assert not target.slab.any()
    assert move(source, target, [0, 1], [2, 3], range(32), (0, 3), guard, 41) != 0
    assert target.slab[[2, 3]].equal(source.slab[[0, 1]])
