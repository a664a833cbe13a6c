"""The block pool and the prefix hashes: fixed vectors, and a model of what a pool should be."""

from collections import Counter
from hashlib import sha256
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.prefix import block_hashes, root


def test_prefix_vectors() -> None:
    assert root().hex() == "c443197e0f65a7d882bc4f4211d7fa3ff665a77ab32be7a0c1530fc36441b1be"
    assert [h.hex() for h in block_hashes(range(32), 16)] == [
        "d09481be8f58a164992669e5241ca9843d38638e9abc983ed751293a60914d67",
        "3fc65c3e364333f4261ff0eb55f053f6d73c3fc27f20ab82be7366f78eaba0cd",
    ]
    assert (
        block_hashes(range(32), 16, b"tenant-a")[1].hex()
        == "7aefb678d227281c062784ccbee1c92c8665b0ac641815e2cb6849ad2f582cd6"
    )


def test_block_hash_is_that_of_its_last_unit() -> None:
    link = root(b"x")
    for unit in range(8):
        link = sha256(link + pack("<16I", *range(unit * 16, unit * 16 + 16))).digest()
    assert block_hashes(range(130), 64, b"x")[-1] == link == block_hashes(range(130), 16, b"x")[7]
    assert block_hashes(range(130), 64, b"x", block_hashes(range(70), 64, b"x")) == block_hashes(range(130), 64, b"x")
    assert block_hashes(range(63), 64) == []


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None and pool.num_free == 3
    blocks = pool.allocate(3)
    assert blocks is not None and sorted(blocks) == [0, 1, 2] and pool.allocate(1) is None
    pool.release(blocks)
    pool.check(Counter())


def test_least_recently_used_prefix_goes_first_and_its_tail_before_its_head() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    assert old and new
    for blocks, names in ((old, (b"o0", b"o1")), (new, (b"n0", b"n1"))):
        for block, name in zip(blocks, names, strict=True):
            pool.commit(block, name)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.match([b"o0", b"o1"]) == [old[0]]
    assert pool.match([b"n0", b"n1"]) == new
    pool.check(Counter({old[0]: 1, old[1]: 1, new[0]: 1, new[1]: 1}))


def test_a_second_block_of_the_same_content_is_not_cached() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(1), pool.allocate(1)
    assert a and b
    pool.commit(a[0], b"same")
    pool.commit(b[0], b"same")
    assert pool.release(b) == b and pool.release(a) == []
    assert pool.match([b"same"]) == a


def test_misuse_is_our_bug() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError):
        pool.release([0])
    with pytest.raises(AssertionError):
        pool.retain([0])
    with pytest.raises(AssertionError):
        pool.commit(0, b"x")


class PoolMachine(RuleBasedStateMachine):
    """Owners allocate, share, commit and release at random; the pool must agree with the list of owners."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.owners: list[list[int]] = []
        self.content: dict[int, int] = {}  # block -> what its owner wrote there

    @rule(n=st.integers(0, 7))
    def allocate(self, n: int) -> None:
        room = self.pool.num_free
        blocks = self.pool.allocate(n)
        assert (blocks is None) == (n > room)
        if blocks is not None:
            held = {block for owner in self.owners for block in owner}
            assert not held & set(blocks)
            self.owners.append(blocks)
            for block in blocks:
                self.content.pop(block, None)

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), name=st.integers(0, 9))
    def commit(self, data: st.DataObject, name: int) -> None:
        block = data.draw(st.sampled_from([b for owner in self.owners for b in owner]))
        if block not in self.content:
            self.pool.commit(block, bytes([name]))
            self.content[block] = name

    @rule(names=st.lists(st.integers(0, 9), max_size=3))
    def match(self, names: list[int]) -> None:
        blocks = self.pool.match(bytes([name]) for name in names)
        assert [self.content[block] for block in blocks] == names[: len(blocks)]
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @invariant()
    def consistent(self) -> None:
        self.pool.check(Counter(block for owner in self.owners for block in owner))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200), st.sampled_from([16, 32, 64]), st.binary(max_size=8))
def test_hashes_extend(tokens: list[int], block_size: int, namespace: bytes) -> None:
    hashes = block_hashes(tokens, block_size, namespace)
    assert len(hashes) == len(tokens) // block_size
    for known in range(len(hashes) + 1):
        assert block_hashes(tokens, block_size, namespace, hashes[:known]) == hashes
