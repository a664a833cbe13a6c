"""What a pending worker is said to wait for."""

import pytest

from cluster.placement import Demand, Node, waits_for

NODES = [
    Node({"CPU": 4, "GPU": 2}, {"CPU": 4}, {"zone": "a", "gpu": "h100"}),
    Node({"CPU": 16}, {"CPU": 3}, {"zone": "b"}),
]


@pytest.mark.parametrize(
    ("resources", "labels", "reason"),
    [
        ({}, {}, ""),
        ({"CPU": 3}, {}, ""),
        ({"CPU": 3}, {"zone": "b"}, ""),
        ({"CPU": 1}, {"zone": "in(b, c)"}, ""),
        ({"CPU": 1}, {"zone": "!a"}, ""),
        ({}, {"zone": "c"}, "a node with label zone=c: nodes have zone=a, b"),
        ({}, {"rack": "1"}, "a node with label rack=1: none of 2 nodes has a label rack"),
        ({}, {"zone": "!in(a,b)"}, "a node with label zone=!in(a,b): nodes have zone=a, b"),
        ({"TPU": 1}, {}, "1 TPU on one node: the largest node has none"),
        ({"CPU": 32}, {}, "32 CPU on one node: the largest node has 16 at most"),
        ({"CPU": 8}, {"zone": "a"}, "8 CPU on one node: a node with zone=a has 4 at most"),
        ({"GPU": 1}, {}, "1 GPU: in use, 0 of 2 free"),
        ({"CPU": 5, "GPU": 1}, {}, "one node with 5 CPU and 1 GPU: no single node has them all"),
        ({"CPU": 5}, {"zone": "b"}, "5 CPU: in use, 3 of 16 free"),
    ],
)
def test_reasons(resources: dict[str, float], labels: dict[str, str], reason: str) -> None:
    assert waits_for(Demand(resources, labels), NODES) == reason
