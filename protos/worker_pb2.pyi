import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from protos import inference_pb2 as _inference_pb2
from protos import kv_transfer_pb2 as _kv_transfer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
    WORKER_ROLE_BOTH: _ClassVar[WorkerRole]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_UNHEALTHY: _ClassVar[WorkerState]
    WORKER_STATE_STOPPED: _ClassVar[WorkerState]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_ROLE_BOTH: WorkerRole
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_UNHEALTHY: WorkerState
WORKER_STATE_STOPPED: WorkerState

class Member(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address", "role", "state")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    address: str
    role: WorkerRole
    state: WorkerState
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., state: _Optional[_Union[WorkerState, str]] = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class GetWorkerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWorkerResponse(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "layout", "model", "total_kv_blocks", "transport")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOTAL_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: WorkerRole
    layout: _kv_transfer_pb2.KvLayout
    model: _inference_pb2.ModelInfo
    total_kv_blocks: int
    transport: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., layout: _Optional[_Union[_kv_transfer_pb2.KvLayout, _Mapping]] = ..., model: _Optional[_Union[_inference_pb2.ModelInfo, _Mapping]] = ..., total_kv_blocks: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("state", "num_running", "num_waiting", "num_waiting_tokens", "total_blocks", "free_blocks", "reserved_blocks", "pinned_blocks", "transfers_in_flight", "steps", "prompt_tokens_computed", "prompt_tokens_cached", "tokens_generated", "preemptions", "kv_bytes_sent", "kv_bytes_received", "num_runs", "kv_returned_bytes", "kv_returned_blocks", "kv_returns_refused", "kv_returns_dropped", "prompt_tokens_returned", "quarantined_blocks", "links", "tickets_quarantined", "transfers_corrupt")
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_CACHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_GENERATED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNS_FIELD_NUMBER: _ClassVar[int]
    KV_RETURNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_RETURNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_RETURNS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    KV_RETURNS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_RETURNED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    TICKETS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    state: WorkerState
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    total_blocks: int
    free_blocks: int
    reserved_blocks: int
    pinned_blocks: int
    transfers_in_flight: int
    steps: int
    prompt_tokens_computed: int
    prompt_tokens_cached: int
    tokens_generated: int
    preemptions: int
    kv_bytes_sent: int
    kv_bytes_received: int
    num_runs: int
    kv_returned_bytes: int
    kv_returned_blocks: int
    kv_returns_refused: int
    kv_returns_dropped: int
    prompt_tokens_returned: int
    quarantined_blocks: int
    links: _containers.RepeatedCompositeFieldContainer[LinkLoad]
    tickets_quarantined: int
    transfers_corrupt: int
    def __init__(self, state: _Optional[_Union[WorkerState, str]] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., reserved_blocks: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., transfers_in_flight: _Optional[int] = ..., steps: _Optional[int] = ..., prompt_tokens_computed: _Optional[int] = ..., prompt_tokens_cached: _Optional[int] = ..., tokens_generated: _Optional[int] = ..., preemptions: _Optional[int] = ..., kv_bytes_sent: _Optional[int] = ..., kv_bytes_received: _Optional[int] = ..., num_runs: _Optional[int] = ..., kv_returned_bytes: _Optional[int] = ..., kv_returned_blocks: _Optional[int] = ..., kv_returns_refused: _Optional[int] = ..., kv_returns_dropped: _Optional[int] = ..., prompt_tokens_returned: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkLoad, _Mapping]]] = ..., tickets_quarantined: _Optional[int] = ..., transfers_corrupt: _Optional[int] = ...) -> None: ...

class LinkLoad(_message.Message):
    __slots__ = ("worker_id", "transport", "why", "gb_per_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transport: str
    why: str
    gb_per_s: float
    def __init__(self, worker_id: _Optional[str] = ..., transport: _Optional[str] = ..., why: _Optional[str] = ..., gb_per_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining_runs",)
    REMAINING_RUNS_FIELD_NUMBER: _ClassVar[int]
    remaining_runs: int
    def __init__(self, remaining_runs: _Optional[int] = ...) -> None: ...

class EngineRequest(_message.Message):
    __slots__ = ("run_id", "attempt", "token_ids", "num_prompt_tokens", "sampling", "stopping", "logprobs", "cache_namespace", "bypass_prefix_cache", "priority", "remaining")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BYPASS_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    attempt: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _inference_pb2.SamplingParams
    stopping: _inference_pb2.StoppingCriteria
    logprobs: int
    cache_namespace: bytes
    bypass_prefix_cache: bool
    priority: int
    remaining: _duration_pb2.Duration
    def __init__(self, run_id: _Optional[str] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[_inference_pb2.StoppingCriteria, _Mapping]] = ..., logprobs: _Optional[int] = ..., cache_namespace: _Optional[bytes] = ..., bypass_prefix_cache: bool = ..., priority: _Optional[int] = ..., remaining: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request", "target", "grant_within")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    GRANT_WITHIN_FIELD_NUMBER: _ClassVar[int]
    request: EngineRequest
    target: _kv_transfer_pb2.WorkerRef
    grant_within: _duration_pb2.Duration
    def __init__(self, request: _Optional[_Union[EngineRequest, _Mapping]] = ..., target: _Optional[_Union[_kv_transfer_pb2.WorkerRef, _Mapping]] = ..., grant_within: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("started", "first_tokens", "transferred", "failed")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    started: PrefillStarted
    first_tokens: FirstTokens
    transferred: Transferred
    failed: Failed
    def __init__(self, started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., first_tokens: _Optional[_Union[FirstTokens, _Mapping]] = ..., transferred: _Optional[_Union[Transferred, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("cached_tokens", "returned_tokens")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETURNED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    returned_tokens: int
    def __init__(self, cached_tokens: _Optional[int] = ..., returned_tokens: _Optional[int] = ...) -> None: ...

class FirstTokens(_message.Message):
    __slots__ = ("tokens", "prefill")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    prefill: _duration_pb2.Duration
    def __init__(self, tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., prefill: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "logprob", "finish_info")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    FINISH_INFO_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: _inference_pb2.TokenLogprob
    finish_info: _inference_pb2.FinishInfo
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[_Union[_inference_pb2.TokenLogprob, _Mapping]] = ..., finish_info: _Optional[_Union[_inference_pb2.FinishInfo, _Mapping]] = ...) -> None: ...

class Transferred(_message.Message):
    __slots__ = ("num_bytes", "transport", "cached_tokens")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    transport: str
    cached_tokens: int
    def __init__(self, num_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("reason", "message", "retryable", "num_bytes")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    reason: _inference_pb2.ErrorReason
    message: str
    retryable: bool
    num_bytes: int
    def __init__(self, reason: _Optional[_Union[_inference_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ..., retryable: bool = ..., num_bytes: _Optional[int] = ...) -> None: ...

class SessionCommand(_message.Message):
    __slots__ = ("hello", "expect", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EXPECT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    expect: Expect
    cancel: Cancel
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., expect: _Optional[_Union[Expect, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "incarnation")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    incarnation: str
    def __init__(self, router_id: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Expect(_message.Message):
    __slots__ = ("request", "source")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    request: EngineRequest
    source: _kv_transfer_pb2.WorkerRef
    def __init__(self, request: _Optional[_Union[EngineRequest, _Mapping]] = ..., source: _Optional[_Union[_kv_transfer_pb2.WorkerRef, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("run_id", "attempt", "is_finished")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    IS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    attempt: int
    is_finished: bool
    def __init__(self, run_id: _Optional[str] = ..., attempt: _Optional[int] = ..., is_finished: bool = ...) -> None: ...

class SessionStep(_message.Message):
    __slots__ = ("step", "entries")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    step: int
    entries: _containers.RepeatedCompositeFieldContainer[StepEntry]
    def __init__(self, step: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[StepEntry, _Mapping]]] = ...) -> None: ...

class StepEntry(_message.Message):
    __slots__ = ("run_id", "attempt", "sequence_index", "token_offset", "token_ids", "logprobs", "finish_info", "adopted", "preempted", "failed", "started")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_INFO_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    attempt: int
    sequence_index: int
    token_offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprob]
    finish_info: _inference_pb2.FinishInfo
    adopted: Adopted
    preempted: Preempted
    failed: Failed
    started: PrefillStarted
    def __init__(self, run_id: _Optional[str] = ..., attempt: _Optional[int] = ..., sequence_index: _Optional[int] = ..., token_offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprob, _Mapping]]] = ..., finish_info: _Optional[_Union[_inference_pb2.FinishInfo, _Mapping]] = ..., adopted: _Optional[_Union[Adopted, _Mapping]] = ..., preempted: _Optional[_Union[Preempted, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., started: _Optional[_Union[PrefillStarted, _Mapping]] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Preempted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
