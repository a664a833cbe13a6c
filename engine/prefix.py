"""Prefix hashes: a SHA-256 chain over units of 16 tokens, whatever the block size, computed without torch.

    h_0 = sha256(b"pdserve-prefix-v1" + namespace)
    h_i = sha256(h_{i-1} + tokens of unit i as uint32 little-endian)

A block's hash is that of its last unit, so router, prefill and decode workers agree whatever their block sizes.
Test vectors, namespace b"", tokens 0, 1, 2, ...:
    h_0 = c443197e0f65a7d882bc4f4211d7fa3ff665a77ab32be7a0c1530fc36441b1be
    h_1 = d09481be8f58a164992669e5241ca9843d38638e9abc983ed751293a60914d67
    h_2 = 3fc65c3e364333f4261ff0eb55f053f6d73c3fc27f20ab82be7366f78eaba0cd
"""

import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256

UNIT = 16  # tokens per link of the chain
_pack = struct.Struct(f"<{UNIT}I").pack


def root(namespace: bytes = b"") -> bytes:
    """The chain's head: requests share cached blocks only when their namespaces are equal."""
    return sha256(b"pdserve-prefix-v1" + namespace).digest()


def block_hashes(
    token_ids: Sequence[int], block_size: int, namespace: bytes = b"", known: Sequence[bytes] = ()
) -> list[bytes]:
    """Hashes of all full blocks of `token_ids`; `known` are those of its first blocks, if at hand."""
    return [*known, *following(token_ids, block_size, namespace, known)]


def following(
    token_ids: Sequence[int], block_size: int, namespace: bytes = b"", known: Sequence[bytes] = ()
) -> Iterator[bytes]:
    """Those behind `known`, each computed as it is asked for: a thousand tokens take 0.1 ms."""
    link = known[-1] if known else root(namespace)
    for start in range(len(known) * block_size, len(token_ids) - block_size + 1, block_size):
        for unit in range(start, start + block_size, UNIT):
            link = sha256(link + _pack(*token_ids[unit : unit + UNIT])).digest()
        yield link
