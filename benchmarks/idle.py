"""What a deployment costs while nobody asks it anything, and what its workers' memory is made of.

    python -m benchmarks.idle [--seconds 30]

Starts 1 prefill + 1 decode worker of the demo model on a local Ray cluster, lets it settle, then sums the CPU time of
all our processes (controller, router, workers) over the given time. Target: under 2% of one core. Beside it an actor
that does nothing, which is the floor of each of our four, since Ray wakes it a hundred times a second; and Ray's own
daemons. Memory: after prompts that fill both block pools, the resident size of each worker less what torch and
transformers take before anything is loaded (measured in a process of its own), the weights and the pool; and how much
three times as many prompts add to it. One JSON line last.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time

import psutil
import ray

from benchmarks import serving
from benchmarks.traces import Arrival
from cluster import launch
from cluster.config import DeploymentConfig
from cluster.launch import parts

MIB = 1 << 20
_IMPORTS = """
import psutil, torch, grpc, ray, transformers
from transformers import AutoModelForCausalLM
print(psutil.Process().memory_info().rss)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--num-blocks", type=int, default=256)
    arguments = parser.parse_args()
    imports_mib = int(subprocess.check_output([sys.executable, "-c", _IMPORTS])) / MIB

    pool = {"num_blocks": arguments.num_blocks}
    config = DeploymentConfig.model_validate(
        {"name": "idle", "router": {"port": 0}, "pools": {"prefill": pool, "decode": pool}}
    )
    launch.connect(print, start=True, join_running=False)
    try:
        deployment = launch.up(config, print)
        try:
            report = measure(deployment.status(), arguments.seconds, arguments.num_blocks, imports_mib)
        finally:
            deployment.down()
    finally:
        launch.stop_local_ray(print)
    print(json.dumps({"benchmark": "idle", **report}))


def measure(status: dict, seconds: float, num_blocks: int, imports_mib: float) -> dict:
    ours = {part["id"]: psutil.Process(part["pid"]) for part in parts(status)}
    ours["controller"] = psutil.Process(status["controller"]["pid"])
    nobody = ray.remote(Nobody).remote()
    bare = psutil.Process(ray.get(nobody.pid.remote()))
    pids = {process.pid for process in (*ours.values(), bare)}
    raylet = ours["controller"].parent()
    daemons = [p for p in (*raylet.parent().children(recursive=True),) if p.pid not in pids] if raylet else []
    time.sleep(5.0)
    before, ray_before, started = {name: cpu_s(p) for name, p in ours.items()}, sum(map(cpu_s, daemons)), time.time()
    bare_before = cpu_s(bare)
    time.sleep(seconds)
    elapsed = time.time() - started
    percent = {name: 100 * (cpu_s(p) - before[name]) / elapsed for name, p in ours.items()}
    ray_percent = 100 * (sum(map(cpu_s, daemons)) - ray_before) / elapsed
    bare_percent = 100 * (cpu_s(bare) - bare_before) / elapsed
    ray.kill(nobody)
    for name, value in percent.items():
        print(f"{name:<12} {value:6.2f}% of a core")
    total = sum(percent.values())
    floor = bare_percent * len(ours)
    print(f"{'ours':<12} {total:6.2f}%   target 2%   floor {floor:.2f}% ({len(ours)} actors that do nothing)")
    print(f"{'Ray daemons':<12} {ray_percent:6.2f}%")

    pool_mib, weights_mib = num_blocks * 737_280 / MIB, 513.0  # fp32 SmolLM2: 46,080 bytes a token, 134.5M parameters
    print(f"\nimports {imports_mib:.0f} MiB, weights {weights_mib:.0f} MiB, block pool {pool_mib:.0f} MiB")
    target, count = status["router"]["address"], num_blocks * 16 // 256 + 2
    workers = {name: process for name, process in ours.items() if name.startswith(("prefill", "decode"))}
    asyncio.run(fill(target, count, 0))
    filled = {name: process.memory_info().rss / MIB for name, process in workers.items()}
    asyncio.run(fill(target, 3 * count, 1))
    growth = {name: process.memory_info().rss / MIB - filled[name] for name, process in workers.items()}
    rest = {name: rss - imports_mib - weights_mib - pool_mib for name, rss in filled.items()}
    for name, rss in filled.items():
        print(f"{name:<12} {rss:6.0f} MiB resident, {rest[name]:+.0f} MiB beyond these; then {growth[name]:+.0f} MiB")
    return {
        "cpu_percent": percent,
        "total_cpu_percent": total,
        "bare_actor_cpu_percent": bare_percent,
        "ray_cpu_percent": ray_percent,
        "rest_mib": rest,
        "growth_mib": growth,
    }


class Nobody:
    """An actor with an event loop, as ours have."""

    async def pid(self) -> int:
        return os.getpid()


async def fill(target: str, count: int, seed: int) -> None:
    """Prompts of 256 random tokens, one after the other: each leaves its blocks in both prefix caches."""
    for number in range(count):
        (result,) = await serving.run(target, [Arrival(0.0, 256, 4)], seed=1000 * seed + number)
        assert not result.error, result.error


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
    ray.shutdown()
