"""What an actor asks of a node, and what a pending one waits for: Ray leaves impossible demands pending in silence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.config import Placement, PoolConfig


@dataclass(frozen=True, slots=True)
class Demand:
    resources: dict[str, float] = field(default_factory=dict)  # CPU and GPU among them, in Ray's names
    labels: dict[str, str] = field(default_factory=dict)  # Ray label selectors: "a", "!a", "in(a,b)", "!in(a,b)"

    @classmethod
    def of(cls, placement: Placement) -> "Demand":
        gpus = placement.num_gpus if isinstance(placement, PoolConfig) else 0
        wanted = {"CPU": placement.num_cpus, "GPU": gpus, **placement.resources}
        return cls({name: amount for name, amount in wanted.items() if amount}, dict(placement.label_selector))

    def actor_options(self) -> dict[str, Any]:
        custom = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": self.resources.get("CPU", 0),
            "num_gpus": self.resources.get("GPU", 0),
            "resources": custom,
            **({"label_selector": self.labels} if self.labels else {}),
        }


@dataclass(frozen=True, slots=True)
class Node:
    total: Mapping[str, float]
    available: Mapping[str, float]
    labels: Mapping[str, str]


def waits_for(demand: Demand, nodes: Sequence[Node]) -> str:
    """Which label or resource keeps the demand from every node; empty if some node could take it now."""
    fitting = list(nodes)
    for key, selector in demand.labels.items():
        fitting = [node for node in fitting if _matches(node.labels.get(key), selector)]
        if not fitting:
            return f"a node with label {key}={selector}: {_have_label(key, nodes)}"
    for name, amount in demand.resources.items():
        largest = max((node.total.get(name, 0) for node in fitting), default=0)
        if largest < amount:
            return (
                f"{amount:g} {name} on one node: {_where(demand)} has {f'{largest:g} at most' if largest else 'none'}"
            )
    able = [node for node in fitting if all(node.total.get(n, 0) >= a for n, a in demand.resources.items())]
    if not able:
        return f"one node with {_all(demand)}: no single node has them all"
    for name, amount in demand.resources.items():
        free = max(node.available.get(name, 0) for node in able)
        if free < amount:
            return f"{amount:g} {name}: in use, {free:g} of {max(n.total.get(name, 0) for n in able):g} free"
    if all(any(node.available.get(n, 0) < a for n, a in demand.resources.items()) for node in able):
        return f"{_all(demand)}: not free together on one node"
    return ""


def cluster_nodes() -> list[Node]:
    """The live nodes of the connected Ray cluster."""
    import ray
    from ray._private.state import available_resources_per_node

    available = available_resources_per_node()
    return [
        Node(node["Resources"], available.get(node["NodeID"], {}), node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]


def _matches(value: str | None, selector: str) -> bool:
    negated = selector.startswith("!")
    selector = selector.removeprefix("!")
    if selector.startswith("in(") and selector.endswith(")"):
        wanted = [part.strip() for part in selector[3:-1].split(",")]
    else:
        wanted = [selector]
    return (value in wanted) != negated


def _have_label(key: str, nodes: Sequence[Node]) -> str:
    values = sorted({node.labels[key] for node in nodes if key in node.labels})
    if values:
        return f"nodes have {key}={', '.join(values)}"
    return f"none of {len(nodes)} node{'s' * (len(nodes) != 1)} has a label {key}"


def _where(demand: Demand) -> str:
    labels = ", ".join(f"{key}={selector}" for key, selector in demand.labels.items())
    return f"a node with {labels}" if labels else "the largest node"


def _all(demand: Demand) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in demand.resources.items())
