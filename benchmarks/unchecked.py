"""Transfers as they would be without checksums: what the benchmarks measure beside those with."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from kv_transfer import cuda_ipc
from kv_transfer.memory import BlockMemory
from kv_transfer.push_kernel import launch

_read_back = BlockMemory.digests


class _Any(int):
    """A digest that no other differs from."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def read_back(is_on: bool) -> None:
    """Whether receivers of this process digest what is said to be placed, or take its word."""
    BlockMemory.digests = _read_back if is_on else lambda self, pages: [_Any()] * len(pages)  # type: ignore[method-assign]


@contextmanager
def no_digest_taken() -> Iterator[None]:
    """cuda_ipc pushes of this process digest nothing meanwhile."""
    cuda_ipc.launch = partial(launch, with_digest=False)
    try:
        yield
    finally:
        cuda_ipc.launch = launch
