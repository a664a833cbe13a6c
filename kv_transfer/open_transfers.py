"""The transfers that a worker sends, by ticket: what it answers a receiver that asks which of them it still writes."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from kv_transfer.base import Outgoing, TransferRefused

MAX_DISOWNED = 4096


class OpenTransfers:
    """To all peers of one worker. On one event loop."""

    def __init__(self) -> None:
        self._open: dict[bytes, Outgoing] = {}
        self._disowned: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, transfer_id: bytes, begin: Callable[[], Outgoing]) -> Outgoing:
        """Begins a transfer and knows of it until it is closed. Raises TransferRefused for a disowned ticket."""
        if transfer_id in self._disowned:
            raise TransferRefused("the receiver gave the ticket up before its answer arrived here")
        outgoing = self._open[transfer_id] = begin()
        outgoing.add_closed_callback(lambda _: self._closed(transfer_id))
        return outgoing

    def disown(self, transfer_ids: Iterable[bytes]) -> list[bytes]:
        """These tickets are over at their receiver: gives up those in use, and returns them, since they may be writing
        until they are closed. The others will never be used, not even if the answer that grants one is still on its
        way."""
        in_use = []
        for transfer_id in transfer_ids:
            self._disowned[transfer_id] = None
            if transfer_id in self._open:
                self._open[transfer_id].abort("the receiver gave the ticket up")
                in_use.append(transfer_id)
        while len(self._disowned) > MAX_DISOWNED:
            self._disowned.popitem(last=False)
        return in_use

    def _closed(self, transfer_id: bytes) -> None:
        del self._open[transfer_id]
