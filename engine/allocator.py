"""Which blocks a prompt takes, and which of them others may find again: the scheduler's arithmetic over the pool."""

import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import islice

from engine.block_pool import BlockPool
from engine.prefix import block_hashes, following
from engine.request import Request
from engine.sequence import Plan, Sequence


class Allocator:
    """`memory_ops` are for the slab, in order and before anything else touches it: (source, block) copies a block,
    (None, block) wipes it."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool):
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.memory_ops: list[tuple[int | None, int]] = []
        self.late: list[tuple[Plan, list[int], bool]] = []  # blocks to release after that plan, and whether to wipe

    def take(
        self, request: Request, token_ids: Seq[int], hashes: list[bytes], num_tokens: int, spare: int, align: int = 1
    ) -> tuple[int, list[int], list[bytes]] | None:
        """(number of hits, blocks, hashes) for `num_tokens`, if `spare` blocks remain after it; else None.

        Hits stop at the last whole block of the first n - 1 tokens: the last token is always computed, for its logits;
        and at a multiple of `align` blocks. Hashes are computed up to the first that is no hit: the others can wait
        for `commit`, and the prompt cannot.
        """
        hits: list[int] = []
        if self.caches(request):
            first, hashes = hashes, list(hashes)

            def each() -> Iterator[bytes]:
                yield from first
                for block_hash in following(token_ids, self.block_size, request.namespace, first):
                    hashes.append(block_hash)
                    yield block_hash

            hits = self.match(islice(each(), (len(token_ids) - 1) // self.block_size), align)
        needed = self.num_blocks(num_tokens) - len(hits)
        fresh = self.pool.allocate(needed) if needed + spare <= self.pool.num_free else None
        if fresh is None:
            self.pool.release(hits)
            return None
        return len(hits), hits + fresh, hashes

    def match(self, hashes: Iterable[bytes], align: int) -> list[int]:
        """The cached blocks of the longest known prefix of `hashes`, a multiple of `align`, with a reference each."""
        hits = self.pool.match(hashes)
        whole = len(hits) // align * align
        self.pool.release(hits[whole:])
        return hits[:whole]

    def commit(self, sequence: Sequence) -> None:
        """Offers the blocks filled so far to the prefix cache. Their logits were finite, or their manifest verified."""
        request = sequence.request
        if self.caches(request):
            filled = sequence.num_computed // self.block_size
            if filled > len(sequence.hashes):
                sequence.hashes = block_hashes(sequence.token_ids, self.block_size, request.namespace, sequence.hashes)
            for i in range(sequence.num_committed, filled):
                self.pool.commit(sequence.block_ids[i], sequence.hashes[i])
            sequence.num_committed = filled

    def fork(self, sequence: Sequence, fork: Sequence) -> bool:
        """Shares the full blocks and copies the partial one. False, and nothing changes, when no block is left."""
        full, tail = divmod(sequence.num_computed, self.block_size)
        own = self.pool.allocate(1) if tail else []
        if own is None:
            return False
        self.pool.retain(sequence.block_ids[:full])
        fork.block_ids = sequence.block_ids[:full] + own
        fork.num_computed, fork.num_committed = sequence.num_computed, sequence.num_committed
        if own:
            self.memory_ops.append((sequence.block_ids[full], own[0]))
        return True

    def release(self, block_ids: list[int], wipe: bool = False, after: Plan | None = None) -> None:
        """Gives one reference to each block back, at once or once the plan `after` is taken in: its rows may still
        write there. `wipe`: they may hold NaN, and attention masks a stale slot by adding -inf, which NaN survives.
        """
        if after is not None:
            self.late.append((after, block_ids, wipe))
            return
        freed = self.pool.release(block_ids)
        if wipe:
            self.memory_ops += [(None, block_id) for block_id in freed]

    def land(self, plan: Plan) -> None:
        """That plan is taken in: what waited for it is released."""
        due = [entry for entry in self.late if entry[0] is plan]
        self.late = [entry for entry in self.late if entry[0] is not plan]
        for _, block_ids, wipe in due:
            self.release(block_ids, wipe)

    def align(self, num_tokens: int) -> int:
        """The fewest blocks whose tokens are a multiple of `num_tokens`."""
        return math.lcm(num_tokens, self.block_size) // self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def hashes(self, request: Request, known: list[bytes]) -> list[bytes]:
        """Of all full blocks of its tokens."""
        if not self.caches(request):
            return known
        return block_hashes(request.token_ids, self.block_size, request.namespace, known)

    def caches(self, request: Request) -> bool:
        return self.enable_prefix_caching and request.use_prefix_cache
