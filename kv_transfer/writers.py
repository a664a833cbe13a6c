"""Who may write into our pages by itself: the processes that shook hands, where a transport needs to know."""

from collections import OrderedDict

import grpc

from kv_transfer.choose import ONE_SIDED
from kv_transfer.create import Transports
from kv_transfer.refusal import Refusal
from protos import kv_transfer_pb2 as kv

MAX_SOURCES = 4096


class Writers:
    """Of one receiving worker."""

    def __init__(self, transports: Transports) -> None:
        self._transports = transports
        self._processes: OrderedDict[tuple[str, str], str] = OrderedDict()

    def met(self, request: kv.HandshakeRequest) -> None:
        self._processes[(request.source.worker_id, request.source.incarnation)] = request.process
        while len(self._processes) > MAX_SOURCES:
            self._processes.popitem(last=False)

    def find(self, request: kv.ReserveRequest | kv.OfferRequest | kv.CanaryRequest) -> str | None:
        """The `writer` of a grant that answers `request`: a process, or None where the transport is two-sided. Refusal
        if this worker does not have the transport."""
        if request.transport not in self._transports.speaks:
            text = f"transport {request.transport!r}: this worker has {', '.join(self._transports.speaks)}"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, text)
        if request.transport not in ONE_SIDED:
            return None
        return self._processes.get((request.source.worker_id, request.source.incarnation), "")
