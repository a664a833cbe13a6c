"""Who may write into our pages by itself: the processes that shook hands, where a transport needs to know."""

from collections import OrderedDict

import grpc

from kv_transfer import locality
from kv_transfer.choose import EQUAL_BLOCKS, ONE_SIDED
from kv_transfer.create import Transports
from kv_transfer.refusal import Refusal
from protos import kv_transfer_pb2 as kv

MAX_SOURCES = 4096


class Writers:
    """Of one receiving worker."""

    def __init__(self, transports: Transports, block_size: int) -> None:
        self._transports = transports
        self._block_size = block_size
        self._processes: OrderedDict[tuple[str, str], str] = OrderedDict()

    def met(self, request: kv.HandshakeRequest) -> None:
        # It speaks: one that seems to have ended is out of our sight (hidden by /proc), and will never be seen to end.
        process = "" if locality.is_gone(request.process) else request.process
        self._processes[(request.source.worker_id, request.source.incarnation)] = process
        while len(self._processes) > MAX_SOURCES:
            self._processes.popitem(last=False)

    def find(self, request: kv.ReserveRequest | kv.OfferRequest | kv.CanaryRequest) -> str | None:
        """The `writer` of a grant that answers `request`: a process, or None where the transport is two-sided. Refusal
        if this worker does not have the transport, or not for blocks of that size."""
        if request.block_size < 1:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"block_size {request.block_size}: must be at least 1")
        if request.transport not in self._transports.speaks:
            text = f"transport {request.transport!r}: this worker has {', '.join(self._transports.speaks)}"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, text)
        if request.transport not in ONE_SIDED:
            return None
        if request.transport in EQUAL_BLOCKS and request.block_size != self._block_size:
            text = f"block_size {request.block_size}: {request.transport} needs this worker's, {self._block_size}"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, text)
        return self._processes.get((request.source.worker_id, request.source.incarnation), "")
