"""Placement to and from the wire."""

from kv_transfer.base import Placement
from protos import kv_transfer_pb2 as kv


def placement_to_pb(placement: Placement | None) -> kv.Placement | None:
    if placement is None:
        return None
    return kv.Placement(page_ids=placement.page_ids, guard=placement.guard, generation=placement.generation)


def placement_from_pb(answer: kv.ReserveResponse | kv.OfferResponse | kv.CanaryResponse) -> Placement | None:
    if not answer.HasField("placement"):
        return None
    message = answer.placement
    return Placement(tuple(message.page_ids), message.guard, message.generation)
