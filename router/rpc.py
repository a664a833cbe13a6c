"""gRPC plumbing of the public service: handlers from the descriptor, requests that cannot break grpc, errors to status.

grpcio turns an exception in a request deserializer into UNKNOWN with the exception's text. Ours never raise: a request
that does not parse (invalid UTF-8 in a string, say) arrives as Malformed and ends with INVALID_ARGUMENT.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from protos import inference_pb2 as pb
from router.errors import InvalidRequest, RequestError, bug, to_status

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]


class Malformed:
    """Bytes that are no message of the type the method takes."""

    def __init__(self, why: str):
        self.why = why


def generic_handler(servicer: Any) -> Any:
    """A handler for every method of InferenceService. `servicer.Method(request, context)` is a coroutine; streaming
    methods send through context.write. A RequestError they raise becomes its status, any other exception INTERNAL."""
    handlers = {}
    for method in SERVICE.methods:
        behavior = _behavior(getattr(servicer, method.name), method.server_streaming)
        build = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = build(
            behavior,
            request_deserializer=_deserializer(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


def _deserializer(message: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return message.FromString(data)
        except DecodeError as error:
            return Malformed(f"is not a {message.DESCRIPTOR.full_name} (strings must be valid UTF-8): {error}")

    return parse


def _behavior(method: Callable[[Any, Any], Any], is_streaming: bool) -> Any:
    async def call(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, Malformed):
                raise InvalidRequest("request", request.why)
            return await method(request, context)
        except RequestError as error:
            status = to_status(error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s failed by a bug", SERVICE.full_name)
            status = to_status(bug())
        await context.abort(status.code, status.details, status.trailing_metadata)

    return call
