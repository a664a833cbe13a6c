"""How a KV block's bytes are laid out, and the fingerprint by which two workers know that theirs mean the same.

    block = [layer 0 | layer 1 | ..]   layer = [K | V]   K = [kv_head, token, key_dim]   V = [kv_head, token, value_dim]

Blocks are contiguous and layers within a block in order, so any layer range of a block is one run of bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby

from protos import kv_transfer_pb2 as pb

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    dtype: str
    block_size: int  # tokens per block
    groups: tuple[KVGroup, ...]

    @classmethod
    def of(
        cls, model: str, weights_digest: str, rope_digest: str, dtype: str, block_size: int, layers: list[LayerShape]
    ):
        groups = [
            KVGroup(len(list(run)), s.num_kv_heads, s.key_dim, s.value_dim, s.window) for s, run in groupby(layers)
        ]
        return cls(model, weights_digest, rope_digest, dtype, block_size, tuple(groups))

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
        item = ITEM_BYTES[self.dtype]
        sizes = [g.num_kv_heads * self.block_size * (g.key_dim + g.value_dim) * item for g in self.layers]
        return tuple(accumulate(sizes, initial=0))

    @property
    def tiles(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each layer its K and its V: number of tiles [block_size, dim], bytes of a token's row in one."""
        item = ITEM_BYTES[self.dtype]
        return tuple(tuple((g.num_kv_heads, dim * item) for dim in (g.key_dim, g.value_dim)) for g in self.layers)

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
            block_size=self.block_size,
            groups=[pb.KvGroup(**asdict(group)) for group in self.groups],
            rope_digest=self.rope_digest,
            block_bytes=self.block_bytes,
            fingerprint=self.fingerprint,
        )
