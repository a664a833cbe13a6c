"""A step that found no memory, computed in smaller ones: half as many tokens, and half again, down to one.

What makes that safe:

- Nothing of a step is visible before its results are taken in: no block is offered to the prefix cache, no token is
  known, and a request that fails has its blocks wiped. So slots may be written a second time.
- A sink is the exception: bytes it was told of may be on the wire, and the same tokens in chunks of another size may
  give other bits. So a row of which any layer was announced is not computed again: its request fails, and another
  attempt sends everything anew. Rows of which nothing was announced are announced as they are computed in the end,
  each block and layer once. Memory runs out in a step's first layer, where its peak is, and sinks hear of a layer
  when the next one is launched, so the first kind is rare.
- Tokens that only the device knew are taken in before: smaller steps overwrite them there.
"""

from collections.abc import Callable, Sequence

import torch

from engine.sequence import Row, RowResult, Status

REASON = "OUT_OF_MEMORY"


class OutOfMemory(Exception):
    """A step's rows found no memory. `announced` are the ids of the rows of which a sink was told a part."""

    def __init__(self, announced: set[int]):
        super().__init__("no memory for a step")
        self.announced = announced


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the device or the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def compute_in_parts(
    rows: Sequence[Row],
    announced: set[int],
    block_size: int,
    compute: Callable[[list[Row]], list[RowResult]],  # waits; raises OutOfMemory
) -> list[RowResult]:
    """The results of `rows`, which found no memory together."""
    results: dict[int, RowResult] = {}
    left: list[tuple[Row, int]] = []  # a row, and where the rest of it starts
    for row in rows:
        if row.sequence.status is Status.ENDED:
            results[id(row)] = RowResult()  # by a token of the step before; its blocks are on their way out
        elif id(row) in announced:
            results[id(row)] = _failed("after a part of its KV had left")
        else:
            left.append((row, row.start))
    num_tokens = sum(row.num_tokens for row, _ in left)
    limit = max(1, num_tokens // 2)
    while left:
        step, parts, rest = _take(left, limit, block_size)
        try:
            found = compute(parts)
        except OutOfMemory as error:
            size = sum(part.num_tokens for part in parts)
            limit = max(1, size // 2)
            for row, part in zip(step, parts, strict=True):
                if size == 1 or id(part) in error.announced:
                    results[id(row)] = _failed(f"for a step of {size} tokens")
            left = [(row, start) for row, start in left if id(row) not in results]
            continue
        left = rest
        for row, part, result in zip(step, parts, found, strict=True):
            if result.error is not None or part.stop == row.stop:
                results[id(row)] = result
        left = [(row, start) for row, start in left if id(row) not in results]
    return [results[id(row)] for row in rows]


def _take(
    left: list[tuple[Row, int]], limit: int, block_size: int
) -> tuple[list[Row], list[Row], list[tuple[Row, int]]]:
    """The rows of the next step, their parts in it, and what is left after it."""
    rows: list[Row] = []
    parts: list[Row] = []
    for i, (row, start) in enumerate(left):
        if not limit:
            return rows, parts, left[i:]
        stop = min(row.stop, start + limit)
        limit -= stop - start
        rows.append(row)
        parts.append(_part(row, start, stop, block_size))
        if stop < row.stop:
            return rows, parts, [(row, stop), *left[i + 1 :]]
    return rows, parts, []


def _part(row: Row, start: int, stop: int, block_size: int) -> Row:
    """Tokens [start, stop) of a row, with the blocks that become final with them."""
    part = Row(row.sequence, start, stop - start)
    part.samples = row.samples and stop == row.stop
    if row.report is not None:
        first, last = row.report
        low = first if start == row.start else min(max(first, start // block_size), last)
        high = last if stop == row.stop else min(max(first, stop // block_size), last)
        part.report = (low, high) if low < high else None
    return part


def _failed(when: str) -> RowResult:
    return RowResult(
        error=(
            REASON,
            f"the worker ran out of memory {when}: lower its max_num_batched_tokens or gpu_memory_utilization",
        )
    )
