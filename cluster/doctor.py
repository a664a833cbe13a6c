"""`pdserve doctor`: is the deployment whole, do its processes agree on versions, does KV get from each to each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from cluster.client import Client, ClientError
from cluster.launch import Deployment, parts
from cluster.show import silent_writers


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    ok: bool
    said: str


def examine(deployment: Deployment, num_blocks: int) -> Iterator[Finding]:
    """One finding per check, as each ends."""
    status = deployment.status()
    for part in parts(status):
        detail = part["detail"] or part["last_error"] if part["state"] != "ready" else f"restarts {part['restarts']}"
        yield Finding(part["id"], part["state"] == "ready", f"{part['state']}: {detail}" if detail else part["state"])
    yield _router(status)
    yield _versions(deployment.versions())
    yield _gpus(status)
    yield _writers(status)
    for source, target in pairs(status):
        result = deployment.canary(source, target, num_blocks)
        if result["ok"]:
            speed = result["bytes"] / max(result["seconds"], 1e-9) / 1e9
            said = f"{result['bytes'] / 2**20:.1f} MiB over {result['transport']}, {speed:.2f} GB/s, verified"
            said += f" (passed over: {result['why']})" if result["why"] else ""
        else:
            said = result["error"]
        yield Finding(f"KV {source} -> {target}", result["ok"], said)


def pairs(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Every (prefill, decode) pair of ready workers that a request may take."""
    ready = {
        name: [worker["id"] for worker in pool["workers"] if worker["state"] == "ready"]
        for name, pool in status["pools"].items()
    }
    return [(source, target) for source in ready["prefill"] for target in ready["decode"]]


def _router(status: dict[str, Any]) -> Finding:
    address = status["router"]["address"]
    try:
        with Client(address) as client:
            client.connect()
            info = client.server_info()
    except ClientError as error:
        return Finding("router answers", False, f"{error}; is {address} reachable from this machine?")
    halves = f"sees {info.ready_prefill_workers} prefill and {info.ready_decode_workers} decode workers ready"
    return Finding("router answers", bool(info.ready_decode_workers), f"{address} {halves}")


def _versions(by_worker: dict[str, dict[str, str]]) -> Finding:
    """KV and messages cross process borders, so one deployment runs one set of versions."""
    differing = [
        f"{package}: " + ", ".join(f"{worker} {found[package]}" for worker, found in by_worker.items())
        for package in next(iter(by_worker.values()), {})
        if len({found[package] for found in by_worker.values()}) > 1
    ]
    if differing:
        return Finding("versions agree", False, "; ".join(differing))
    found = next(iter(by_worker.values()), {})
    return Finding("versions agree", True, ", ".join(f"{package} {version}" for package, version in found.items()))


def _writers(status: dict[str, Any]) -> Finding:
    """Pages that nobody may use, since a one-sided writer has not said that it has stopped."""
    workers = [worker for pool in status["pools"].values() for worker in pool["workers"]]
    waiting = [f"{worker['id']} waits for {writer}" for worker in workers for writer in silent_writers(worker)]
    said = "; ".join(waiting) or f"{status['controller']['writers_killed']} workers were killed for theirs"
    return Finding("writes are fenced", not waiting, said)


def _gpus(status: dict[str, Any]) -> Finding:
    total = ray.cluster_resources().get("GPU", 0)
    used = total - ray.available_resources().get("GPU", 0)
    if total and not used:
        return Finding("resources", True, f"{total:g} GPUs idle: set pools.*.num_gpus=1 to use them")
    cpus = ray.cluster_resources().get("CPU", 0)
    return Finding("resources", True, f"{cpus:g} CPUs, {used:g} of {total:g} GPUs in use")
