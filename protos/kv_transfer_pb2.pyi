from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRef(_message.Message):
    __slots__ = ("worker_id", "incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("model", "weights_digest", "dtype", "block_size", "groups", "rope_digest", "block_bytes", "fingerprint", "kv_dtype", "float8_fingerprint")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROPE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FLOAT8_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights_digest: str
    dtype: str
    block_size: int
    groups: _containers.RepeatedCompositeFieldContainer[KvGroup]
    rope_digest: str
    block_bytes: int
    fingerprint: str
    kv_dtype: str
    float8_fingerprint: str
    def __init__(self, model: _Optional[str] = ..., weights_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[KvGroup, _Mapping]]] = ..., rope_digest: _Optional[str] = ..., block_bytes: _Optional[int] = ..., fingerprint: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., float8_fingerprint: _Optional[str] = ...) -> None: ...

class KvGroup(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "key_dim", "value_dim", "window")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., key_dim: _Optional[int] = ..., value_dim: _Optional[int] = ..., window: _Optional[int] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("source", "protocol_version", "layout", "transports", "process")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    source: WorkerRef
    protocol_version: int
    layout: KvLayout
    transports: _containers.RepeatedScalarFieldContainer[str]
    process: str
    def __init__(self, source: _Optional[_Union[WorkerRef, _Mapping]] = ..., protocol_version: _Optional[int] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., process: _Optional[str] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("target", "protocol_version", "layout", "endpoints", "max_chunk_bytes")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    target: WorkerRef
    protocol_version: int
    layout: KvLayout
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    max_chunk_bytes: int
    def __init__(self, target: _Optional[_Union[WorkerRef, _Mapping]] = ..., protocol_version: _Optional[int] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., max_chunk_bytes: _Optional[int] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("transport", "locality", "data")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LOCALITY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    transport: str
    locality: str
    data: bytes
    def __init__(self, transport: _Optional[str] = ..., locality: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("run_id", "attempt", "source", "target", "num_tokens", "transport", "block_size")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    attempt: int
    source: WorkerRef
    target: WorkerRef
    num_tokens: int
    transport: str
    block_size: int
    def __init__(self, run_id: _Optional[str] = ..., attempt: _Optional[int] = ..., source: _Optional[_Union[WorkerRef, _Mapping]] = ..., target: _Optional[_Union[WorkerRef, _Mapping]] = ..., num_tokens: _Optional[int] = ..., transport: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("transfer_id", "cached_tokens", "num_blocks", "lease_ms", "placement")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    cached_tokens: int
    num_blocks: int
    lease_ms: int
    placement: Placement
    def __init__(self, transfer_id: _Optional[bytes] = ..., cached_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., lease_ms: _Optional[int] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("page_ids", "guard", "generation")
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    guard: int
    generation: int
    def __init__(self, page_ids: _Optional[_Iterable[int]] = ..., guard: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("transfer_id", "num_tokens", "token_hash", "num_chunks", "num_bytes", "digest", "first_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    num_tokens: int
    token_hash: bytes
    num_chunks: int
    num_bytes: int
    digest: bytes
    first_tokens: _containers.RepeatedCompositeFieldContainer[AdoptedToken]
    def __init__(self, transfer_id: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., token_hash: _Optional[bytes] = ..., num_chunks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., first_tokens: _Optional[_Iterable[_Union[AdoptedToken, _Mapping]]] = ...) -> None: ...

class AdoptedToken(_message.Message):
    __slots__ = ("token_id", "finished")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    finished: bool
    def __init__(self, token_id: _Optional[int] = ..., finished: bool = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("source", "transfer_ids")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    source: WorkerRef
    transfer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, source: _Optional[_Union[WorkerRef, _Mapping]] = ..., transfer_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("unknown_transfer_ids",)
    UNKNOWN_TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    unknown_transfer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, unknown_transfer_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("transfer_id", "reason", "fenced")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    reason: str
    fenced: bool
    def __init__(self, transfer_id: _Optional[bytes] = ..., reason: _Optional[str] = ..., fenced: bool = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: bool = ...) -> None: ...

class FenceRequest(_message.Message):
    __slots__ = ("source", "target", "transfer_ids")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    source: WorkerRef
    target: WorkerRef
    transfer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, source: _Optional[_Union[WorkerRef, _Mapping]] = ..., target: _Optional[_Union[WorkerRef, _Mapping]] = ..., transfer_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FenceResponse(_message.Message):
    __slots__ = ("open_transfer_ids",)
    OPEN_TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    open_transfer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, open_transfer_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ("source", "target", "token_ids", "cache_namespace", "transport", "block_size")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    source: WorkerRef
    target: WorkerRef
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_namespace: bytes
    transport: str
    block_size: int
    def __init__(self, source: _Optional[_Union[WorkerRef, _Mapping]] = ..., target: _Optional[_Union[WorkerRef, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., cache_namespace: _Optional[bytes] = ..., transport: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class OfferResponse(_message.Message):
    __slots__ = ("transfer_id", "cached_tokens", "lease_ms", "placement")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    cached_tokens: int
    lease_ms: int
    placement: Placement
    def __init__(self, transfer_id: _Optional[bytes] = ..., cached_tokens: _Optional[int] = ..., lease_ms: _Optional[int] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class CanaryRequest(_message.Message):
    __slots__ = ("source", "num_blocks", "transport", "block_size")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    source: WorkerRef
    num_blocks: int
    transport: str
    block_size: int
    def __init__(self, source: _Optional[_Union[WorkerRef, _Mapping]] = ..., num_blocks: _Optional[int] = ..., transport: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class CanaryResponse(_message.Message):
    __slots__ = ("transfer_id", "num_blocks", "placement")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    num_blocks: int
    placement: Placement
    def __init__(self, transfer_id: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...
