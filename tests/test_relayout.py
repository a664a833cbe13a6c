"""Tokens between blocks of two sizes, against a table of single tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.relayout import Run, Tiles, copy_rows, merge, runs, whole_blocks

sizes = st.sampled_from([1, 2, 3, 4, 16, 24, 64])


@given(start=st.integers(0, 200), count=st.integers(0, 200), source_size=sizes, target_size=sizes)
def test_runs_are_the_tokens_in_order(start: int, count: int, source_size: int, target_size: int):
    tokens = []
    for run in runs(start, start + count, source_size, target_size):
        assert run.num_rows > 0
        assert run.source_row + run.num_rows <= source_size and run.target_row + run.num_rows <= target_size
        first = run.source_block * source_size + run.source_row
        assert first == run.target_block * target_size + run.target_row
        tokens += range(first, first + run.num_rows)
    assert tokens == list(range(start, start + count))


def test_runs_are_as_long_as_they_can_be():
    assert list(runs(64, 128, 16, 64)) == [Run(4 + i, 0, 1, 16 * i, 16) for i in range(4)]
    assert list(runs(0, 20, 64, 16)) == [Run(0, 0, 0, 0, 16), Run(0, 16, 1, 0, 4)]
    assert list(runs(48, 48, 16, 64)) == []


def test_whole_blocks():
    assert [whole_blocks(n, 16, 64) for n in (0, 63, 64, 130, 192)] == [0, 0, 64, 128, 192]
    assert whole_blocks(100, 32, 48) == 96 and whole_blocks(47, 16) == 32


def test_equal_layers_are_one_entry():
    assert merge([Tiles(2, 128), Tiles(2, 128), Tiles(1, 64), Tiles(1, 128)]) == [
        Tiles(4, 128),
        Tiles(1, 64),
        Tiles(1, 128),
    ]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@given(
    source_size=sizes,
    target_size=sizes,
    tiles=st.lists(st.builds(Tiles, st.integers(1, 3), st.sampled_from([4, 6])), min_size=1, max_size=3),
    start=st.integers(0, 70),
    count=st.integers(1, 70),
    data=st.data(),
)
def test_every_token_lands_in_its_row(
    kind: str, source_size: int, target_size: int, tiles: list[Tiles], start: int, count: int, data: st.DataObject
):
    stop = start + count
    width, margin = sum(t.num_tiles * t.row_bytes for t in tiles), 3
    shape = [-(-stop // size) for size in (source_size, target_size)]
    pages = data.draw(st.permutations(range(shape[1])))
    rng = np.random.default_rng(0)
    # Slices of wider slabs, as some layers of a pool are.
    from_slab = rng.integers(1, 256, (shape[0], margin + width * source_size), np.uint8)
    to_slab = np.zeros((shape[1], width * target_size + margin), np.uint8)
    rows = [replace(run, target_block=pages[run.target_block]) for run in runs(start, stop, source_size, target_size)]
    source, target = from_slab[:, margin:], to_slab[:, : width * target_size]
    if kind == "numpy":
        copy_rows(source, source_size, target, target_size, tiles, rows)
    else:
        copy_rows(torch.from_numpy(source), source_size, torch.from_numpy(target), target_size, tiles, rows)

    expected, first = np.zeros_like(to_slab), 0
    for entry in tiles:
        for tile in range(entry.num_tiles):
            for token in range(start, stop):
                block, row = divmod(token, source_size)
                at = first * source_size + (tile * source_size + row) * entry.row_bytes
                value = source[block, at : at + entry.row_bytes]
                block, row = divmod(token, target_size)
                at = first * target_size + (tile * target_size + row) * entry.row_bytes
                expected[pages[block], at : at + entry.row_bytes] = value
        first += entry.num_tiles * entry.row_bytes
    assert np.array_equal(to_slab, expected)
