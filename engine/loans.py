"""Blocks on loan to a transfer: cached ones that leave, or fresh ones that become cache. Plain Python, no torch.

    retain:   cached --> pinned, read by a peer's transfer ------------------------> release
    reserve:  free --> reserved, filled by a peer's transfer --verified--> insert (cached), or release (free again)

No request waits for a loan, and none is made where it could make a request wait: a loan leaves a quarter of the pool, a
block for each sequence that grows, and nothing is lent for filling while anything waits for blocks.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.admission import Admission
from engine.request import Reservation

FREE_SHARE = 4  # one of so many parts of the pool stays free of loans


@dataclass(slots=True)
class Loan:
    block_ids: list[int]  # of the logical blocks 0, 1, ...
    num_cached: int  # leading ones that were cached when it was made
    hashes: list[bytes]


class Loans:
    """By owner. Each ends by `insert` or `release`."""

    def __init__(self, admission: Admission):
        self._admission = admission
        self._pool = admission.blocks.pool
        self._loans: dict[str, Loan] = {}

    def retain(self, owner: str, hashes: Seq[bytes]) -> tuple[int, ...]:
        """Pins the cached blocks of the longest known prefix of `hashes`; none if that would leave too few free."""
        loan = self._match(owner, hashes)
        if not loan.block_ids or self._pool.num_free < self._spare:
            self._pool.release(loan.block_ids)
            return ()
        self._loans[owner] = loan
        return tuple(loan.block_ids)

    def reserve(self, owner: str, hashes: Seq[bytes], align: int = 1) -> Reservation | None:
        """Blocks for all of `hashes`: those cached already, a multiple of `align`, pinned, and fresh ones behind them
        to fill. None: busy."""
        loan = self._match(owner, hashes, align)
        needed = len(hashes) - loan.num_cached
        is_cheap = not self._admission.has_waiting and needed + self._spare <= self._pool.num_free
        is_allowed = self._admission.blocks.enable_prefix_caching and (is_cheap or not needed)
        fresh = self._pool.allocate(needed) if is_allowed else None
        if fresh is None:
            self._pool.release(loan.block_ids)
            return None
        loan.block_ids += fresh
        self._loans[owner] = loan
        cached = loan.num_cached * self._admission.blocks.block_size
        return Reservation(owner, tuple(loan.block_ids), cached, self._admission.next_generation())

    def insert(self, owner: str) -> None:
        """The reserved blocks hold their KV, verified: they become cache entries, unused. KeyError: no such loan."""
        loan = self._loans.pop(owner)
        for i in range(loan.num_cached, len(loan.block_ids)):
            self._pool.commit(loan.block_ids[i], loan.hashes[i], returned=True)
        self._pool.release(loan.block_ids)

    def release(self, owner: str) -> None:
        """Gives the blocks back: cached ones stay cached, others are free. Idempotent."""
        loan = self._loans.pop(owner, None)
        if loan is not None:
            self._admission.blocks.release(loan.block_ids, wipe=True)

    def quarantine(self, owner: str) -> None:
        """Gives a loan up, but keeps the blocks that a peer was to fill, in the admission's quarantine. Idempotent."""
        loan = self._loans.pop(owner, None)
        if loan is not None:
            self._admission.blocks.release(loan.block_ids[: loan.num_cached], wipe=True)
            self._admission.quarantined[owner] = loan.block_ids[loan.num_cached :]

    @property
    def num_pinned(self) -> int:
        """Blocks that are cached."""
        return sum(loan.num_cached for loan in self._loans.values())

    @property
    def num_reserved(self) -> int:
        """Blocks to be filled."""
        return sum(len(loan.block_ids) - loan.num_cached for loan in self._loans.values())

    def block_ids(self) -> Iterator[int]:
        """Every reference that loans hold."""
        for loan in self._loans.values():
            yield from loan.block_ids

    @property
    def _spare(self) -> int:
        return self._admission.headroom + self._pool.num_blocks // FREE_SHARE

    def _match(self, owner: str, hashes: Seq[bytes], align: int = 1) -> Loan:
        if owner in self._loans:
            raise ValueError(f"owner: {owner!r} has a loan already")
        block_ids = self._admission.blocks.match(hashes, align)
        return Loan(block_ids, len(block_ids), list(hashes))
