"""The KV blocks of one engine: reference counts, and a prefix cache over blocks nobody uses any more.

    free --allocate--> in use --commit--> in use, cached --release--> unused, cached --evict--> free
                          \\--release--> free                  ^--match-- (a hit takes a reference again)

Plain Python, no torch. A block with references is never evicted; unused cached blocks go least recently used first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Whoever allocates or matches a block releases it, once per reference."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._returned: set[int] = set()  # cached, with KV that a decode worker made
        self._free = list(range(num_blocks - 1, -1, -1))  # never cached, or evicted
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached without references, oldest first

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can hand out: free ones and evictable ones."""
        return len(self._free) + len(self._unused)

    def allocate(self, n: int) -> list[int] | None:
        """`n` blocks with one reference each, or None (and nothing changes) when there are not enough."""
        if n > self.num_free:
            return None
        block_ids = []
        for _ in range(n):
            block_id = self._free.pop() if self._free else self._evict()
            self._refs[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix of `hashes`, each with one more reference."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        self.retain(block_ids)
        return block_ids

    def commit(self, block_id: int, block_hash: bytes, returned: bool = False) -> None:
        """Make a filled block findable. If another block has this hash already, that one stays the cached one.

        `returned`: its KV came back from a decode worker; `num_returned` counts such blocks.
        """
        assert self._refs[block_id] > 0, f"block {block_id} is committed without an owner"
        if block_hash not in self._by_hash and self._hash[block_id] is None:
            self._hash[block_id] = block_hash
            self._by_hash[block_hash] = block_id
            if returned:
                self._returned.add(block_id)

    def num_returned(self, block_ids: Iterable[int]) -> int:
        return sum(block_id in self._returned for block_id in block_ids)

    def retain(self, block_ids: Iterable[int]) -> None:
        """One more reference to each block; unused cached ones come back into use."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                assert self._hash[block_id] is not None, f"block {block_id} is free"
                del self._unused[block_id]
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> list[int]:
        """One reference less to each block. Returns those that became free outright (not cached).

        Blocks are given in logical order and become evictable from the last on: a prefix outlives what follows it.
        """
        freed = []
        for block_id in reversed(block_ids):
            assert self._refs[block_id] > 0, f"block {block_id} is released twice"
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                if self._hash[block_id] is None:
                    self._free.append(block_id)
                    freed.append(block_id)
                else:
                    self._unused[block_id] = None
        return freed

    def _evict(self) -> int:
        block_id, _ = self._unused.popitem(last=False)
        block_hash = self._hash[block_id]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hash[block_id] = None
        self._returned.discard(block_id)
        return block_id

    def check(self, owned: Counter[int] | None = None) -> None:
        """Every invariant; with `owned`, that the references are exactly those. AssertionError names the block."""
        free, unused = set(self._free), set(self._unused)
        assert len(free) == len(self._free) and not free & unused, "a block is free twice"
        for block_id in range(self.num_blocks):
            refs, cached = self._refs[block_id], self._hash[block_id] is not None
            assert refs >= 0, f"block {block_id} has {refs} references"
            assert (block_id in free) == (refs == 0 and not cached), f"block {block_id}: free list is wrong"
            assert (block_id in unused) == (refs == 0 and cached), f"block {block_id}: unused list is wrong"
            if owned is not None:
                assert refs == owned[block_id], f"block {block_id}: {refs} references, {owned[block_id]} owners"
        for block_hash, block_id in self._by_hash.items():
            assert self._hash[block_id] == block_hash, f"block {block_id}: the hash table disagrees"
        assert all(self._hash[block_id] is not None for block_id in self._returned), "a returned block is not cached"
        assert len(self._by_hash) == sum(h is not None for h in self._hash), "a cached block cannot be found"
