"""How a KV block's bytes are laid out, and the fingerprint by which two workers know that theirs mean the same.

    block = [layer 0 | layer 1 | ..]   layer = [K | V]   K = [kv_head, token, key_dim]   V = [kv_head, token, value_dim]
    in float8: layer = [K | V | scales of K | scales of V]      scales = [kv_head, token], a byte each (engine/fp8.py)

Blocks are contiguous and layers within a block in order, so any layer range of a block is one run of bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby

from protos import kv_transfer_pb2 as pb

FP8 = "float8_e4m3fn"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FP8: 1}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer caches per token, as seen in a dummy step."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0  # sliding window in tokens, 0: full attention


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Consecutive layers of one shape."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    model: str
    weights_digest: str
    rope_digest: str
    dtype: str  # that the model computes in
    kv_dtype: str  # that K and V are kept in: the same, or FP8
    block_size: int  # tokens per block
    groups: tuple[KVGroup, ...]

    @classmethod
    def of(
        cls,
        model: str,
        weights_digest: str,
        rope_digest: str,
        dtype: str,
        block_size: int,
        layers: list[LayerShape],
        kv_dtype: str | None = None,
    ):
        groups = [
            KVGroup(len(list(run)), s.num_kv_heads, s.key_dim, s.value_dim, s.window) for s, run in groupby(layers)
        ]
        return cls(model, weights_digest, rope_digest, dtype, kv_dtype or dtype, block_size, tuple(groups))

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.groups)

    @property
    def layers(self) -> list[KVGroup]:
        """Each layer's group, in order."""
        return [group for group in self.groups for _ in range(group.num_layers)]

    @property
    def layer_offsets(self) -> tuple[int, ...]:
        """num_layers + 1 byte offsets inside a block: layer i is the bytes from [i] to [i + 1]."""
        sizes = [self.block_size * sum(num_tiles * row for num_tiles, row in layer) for layer in self.tiles]
        return tuple(accumulate(sizes, initial=0))

    @property
    def tiles(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """What each layer is made of, in order: number of tiles, bytes of a token's row in one."""
        item, found = ITEM_BYTES[self.kv_dtype], []
        for g in self.layers:
            values = (g.num_kv_heads, g.key_dim * item), (g.num_kv_heads, g.value_dim * item)
            found.append((*values, (2 * g.num_kv_heads, 1)) if self.kv_dtype == FP8 else values)
        return tuple(found)

    @property
    def block_bytes(self) -> int:
        return self.layer_offsets[-1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the bytes mean, in canonical JSON: all of the above but the size of blocks, into which the
        same bytes can be laid anew."""
        meaning = asdict(self)
        del meaning["block_size"]
        canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_pb(self) -> pb.KvLayout:
        return pb.KvLayout(
            model=self.model,
            weights_digest=self.weights_digest,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            groups=[pb.KvGroup(**asdict(group)) for group in self.groups],
            rope_digest=self.rope_digest,
            block_bytes=self.block_bytes,
            fingerprint=self.fingerprint,
            float8_fingerprint="" if self.kv_dtype == FP8 else replace(self, kv_dtype=FP8).fingerprint,
        )
