"""How the receiving side's calls end other than well: a refusal carries a gRPC status."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from kv_transfer.base import Manifest, TransferCorrupt, TransferError, TransferUnfit
from kv_transfer.receiver import Receiver
from protos import kv_transfer_pb2 as kv

Answer = TypeVar("Answer")


class Refusal(Exception):
    """Ends a call with a status."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


async def answer(context: grpc.aio.ServicerContext, call: Callable[[], Awaitable[Answer]]) -> Answer:
    """What `call` returns, or the status of its Refusal."""
    try:
        return await call()
    except Refusal as refusal:
        await context.abort(refusal.code, refusal.message)
        raise AssertionError("abort has raised") from None


def check_target(target: kv.WorkerRef, me: kv.WorkerRef) -> None:
    """A call meant for another worker, or for this one's earlier life, is refused."""
    if target != me:
        text = f"target is {target.worker_id} ({target.incarnation}), this is {me.worker_id} ({me.incarnation})"
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, text)


def manifest_of(request: kv.CommitRequest) -> Manifest:
    return Manifest(num_chunks=request.num_chunks, num_bytes=request.num_bytes, digest=request.digest)


async def verify(receiver: Receiver, request: kv.CommitRequest) -> None:
    """Returns once every byte of the transfer lies checked in its pages."""
    try:
        await receiver.commit(request.transfer_id, manifest_of(request))
    except TransferCorrupt as error:
        raise Refusal(grpc.StatusCode.DATA_LOSS, str(error)) from error
    except TransferUnfit as error:
        raise Refusal(grpc.StatusCode.INTERNAL, str(error)) from error
    except TransferError as error:
        raise Refusal(grpc.StatusCode.ABORTED, str(error)) from error
