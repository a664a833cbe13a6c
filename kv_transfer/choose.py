"""Which transport a pair of workers uses, decided by the sender at the handshake.

    auto   local > cuda_ipc > nixl > grpc     the first that both have and whose locality is equal
    NAME   that one, or none

nixl is left out by auto for pools in CPU memory: its agent's thread costs 0.7% of a core when nothing moves, where grpc
costs nothing. ray_store is used where it is asked for only: on one node it is twice as fast as grpc
(docs/performance.md), but it takes room in Ray's store and makes every hand-over depend on it.
"""

from collections.abc import Mapping, Sequence

from kv_transfer.base import Endpoint

AUTO = "auto"
ORDER = ("local", "cuda_ipc", "nixl", "grpc")
NAMES = (*ORDER, "ray_store")
ONE_SIDED = frozenset(("cuda_ipc", "nixl"))
EQUAL_BLOCKS = frozenset(("nixl",))  # transports that take blocks as they are: of one size, kept in one dtype
_APART = {"local": "the workers are different processes", "cuda_ipc": "the workers are on different hosts"}


def wanted(setting: str) -> tuple[str, ...]:
    """Transports a setting allows, best first. ValueError names the range."""
    if setting != AUTO and setting not in NAMES:
        raise ValueError(f"transport {setting!r}: must be one of {', '.join((AUTO, *NAMES))}")
    return ORDER if setting == AUTO else (setting,)


def candidates(
    setting: str,
    mine: Mapping[str, str],
    missing: Mapping[str, str],
    endpoints: Sequence[Endpoint],
    has_equal_blocks: bool = True,
) -> tuple[list[Endpoint], list[str]]:
    """Endpoints to try, best first, and why each better or other one is left out.

    `mine`: our locality for every transport we have; `missing`: why we do not have the others; `has_equal_blocks`: the
    receiver's blocks hold as many tokens as ours, kept in the same dtype.
    """
    offered = {endpoint.transport: endpoint for endpoint in endpoints}
    chosen, left_out = [], []
    for name in wanted(setting):
        endpoint = offered.get(name)
        if name not in mine:
            left_out.append(f"{name}: {missing.get(name, 'not here')}")
        elif endpoint is None:
            left_out.append(f"{name}: the receiver has none")
        elif endpoint.locality and endpoint.locality != mine[name]:
            left_out.append(f"{name}: {_APART.get(name, 'out of its reach')}")
        elif name in EQUAL_BLOCKS and not has_equal_blocks:
            left_out.append(f"{name}: the blocks differ in size or dtype")
        else:
            chosen.append(endpoint)
    return chosen, left_out
