"""How requests fail, and the one place where that becomes a gRPC status.

    RequestError            reason, message, retry_after_s: what the caller hears
    ├── InvalidRequest      a field is missing, malformed or out of range; names the field
    └── AttemptFailed       workers failed one attempt; the pipeline may try again when `retryable`

Every status carries google.rpc.ErrorInfo(domain "pdserve", reason); INVALID_ARGUMENT a BadRequest with the field;
reasons after which trying again makes sense a RetryInfo.
"""

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import inference_pb2 as pb

DOMAIN = "pdserve"
# Statuses travel in HTTP/2 trailers, which peers bound at 8 KiB or so.
MAX_MESSAGE_CHARS = 1500
_PREFIX = "ERROR_REASON_"

Reason = pb.ErrorReason

_STATUS: dict[int, tuple[grpc.StatusCode, float | None]] = {  # reason -> (status, default RetryInfo in seconds)
    pb.ERROR_REASON_INVALID_PARAMETER: (grpc.StatusCode.INVALID_ARGUMENT, None),
    pb.ERROR_REASON_PROMPT_TOO_LONG: (grpc.StatusCode.INVALID_ARGUMENT, None),
    pb.ERROR_REASON_MODEL_NOT_FOUND: (grpc.StatusCode.NOT_FOUND, None),
    pb.ERROR_REASON_DUPLICATE_REQUEST_ID: (grpc.StatusCode.ALREADY_EXISTS, None),
    pb.ERROR_REASON_QUEUE_FULL: (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0),
    pb.ERROR_REASON_KV_CACHE_EXHAUSTED: (grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    pb.ERROR_REASON_DEADLINE_EXCEEDED: (grpc.StatusCode.DEADLINE_EXCEEDED, None),
    pb.ERROR_REASON_DRAINING: (grpc.StatusCode.UNAVAILABLE, 1.0),
    pb.ERROR_REASON_NO_HEALTHY_WORKER: (grpc.StatusCode.UNAVAILABLE, 1.0),
    pb.ERROR_REASON_PREFILL_WORKER_LOST: (grpc.StatusCode.UNAVAILABLE, 1.0),
    pb.ERROR_REASON_DECODE_WORKER_LOST: (grpc.StatusCode.UNAVAILABLE, 1.0),
    pb.ERROR_REASON_KV_TRANSFER_FAILED: (grpc.StatusCode.UNAVAILABLE, 1.0),
    pb.ERROR_REASON_KV_TRANSFER_CORRUPT: (grpc.StatusCode.DATA_LOSS, None),
    pb.ERROR_REASON_INCOMPATIBLE_WORKERS: (grpc.StatusCode.FAILED_PRECONDITION, None),
    pb.ERROR_REASON_NON_FINITE_LOGITS: (grpc.StatusCode.INTERNAL, None),
    pb.ERROR_REASON_CANCELLED: (grpc.StatusCode.CANCELLED, None),
    pb.ERROR_REASON_INTERNAL: (grpc.StatusCode.INTERNAL, None),
    pb.ERROR_REASON_NO_GRANT: (grpc.StatusCode.UNAVAILABLE, 1.0),
    pb.ERROR_REASON_OUT_OF_MEMORY: (grpc.StatusCode.UNAVAILABLE, 1.0),
}


class RequestError(Exception):
    """A request's failure as its caller will hear it."""

    def __init__(self, reason: Reason, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        # A reason of a newer peer that we do not know is our inability, not the client's.
        self.reason = reason if reason in _STATUS else pb.ERROR_REASON_INTERNAL
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "..."
        self.retry_after_s = _STATUS[self.reason][1] if retry_after_s is None else retry_after_s
        self.field = ""

    @property
    def code(self) -> grpc.StatusCode:
        return _STATUS[self.reason][0]


class InvalidRequest(RequestError):
    """`field` (dotted path in GenerateRequest) is not acceptable; the message names value and allowed range."""

    def __init__(self, field: str, problem: str, reason: Reason = pb.ERROR_REASON_INVALID_PARAMETER):
        super().__init__(reason, f"{field}: {problem}")
        self.field = field
        self.problem = problem


class AttemptFailed(RequestError):
    """One attempt at the workers failed. `at_fault` are ids of workers that the next attempt should avoid."""

    def __init__(self, reason: Reason, message: str, retryable: bool, at_fault: frozenset[str] = frozenset()):
        super().__init__(reason, message)
        self.retryable = retryable
        self.at_fault = at_fault


def bug() -> RequestError:
    """What a caller hears of an exception that nobody expected."""
    return RequestError(pb.ERROR_REASON_INTERNAL, "a bug of the router; its log says more")


def reason_name(reason: int) -> str:
    """INVALID_PARAMETER for ERROR_REASON_INVALID_PARAMETER: what ErrorInfo.reason holds."""
    return pb.ErrorReason.Name(reason).removeprefix(_PREFIX)  # type: ignore[arg-type]


def clip(value: object, limit: int = 60) -> str:
    """repr of a client's value, short enough for a message."""
    text = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def to_status(error: RequestError) -> Any:
    """grpc.Status with google.rpc details in its trailing metadata."""
    details = [error_details_pb2.ErrorInfo(reason=reason_name(error.reason), domain=DOMAIN)]
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.problem[:MAX_MESSAGE_CHARS]
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    packed = [any_pb2.Any() for _ in details]
    for box, detail in zip(packed, details, strict=True):
        box.Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=error.code.value[0], message=error.message, details=packed))


def to_pb(error: RequestError) -> pb.Error:
    """The same failure as an item of a batch."""
    return pb.Error(code=error.code.value[0], message=error.message, reason=error.reason)
