"""What disaggregation costs the first token and gives the others, beside the same number of colocated workers.

    python -m benchmarks.disaggregation [--prompt-tokens 512] [--rounds 5] [--transport grpc]

Starts two deployments of the demo model on one local Ray cluster, with equal processes and threads: 1 prefill and 1
decode worker, and 2 colocated ones. Then, in alternating rounds:

    low load   one request at a time: TTFT and TPOT. Target: disaggregated TTFT at most 1.15 of colocated, both medians.
               Prefill is the floor of both; a disaggregated first token adds one reservation before it.
    arrivals   one long answer streams while prompts with max_tokens 2 arrive: gaps between its tokens, P50 and P99.

A table for each, one JSON line last.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time

import grpc

from benchmarks import serving
from benchmarks.stats import percentile, table
from benchmarks.traces import Arrival
from cluster import launch
from cluster.config import DeploymentConfig
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

SETUPS = {
    "disaggregated": {"prefill": 1, "decode": 1, "colocated": 0},
    "colocated": {"prefill": 0, "decode": 0, "colocated": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="per round and deployment, one at a time")
    parser.add_argument("--transport", choices=("grpc", "ray_store"), default="grpc")
    parser.add_argument("--chunk", type=int, default=256, help="the colocated workers' prefill chunk, tokens")
    options = parser.parse_args()

    launch.connect(print, start=True, transport=options.transport, join_running=False)
    deployments = {}
    try:
        for name, sizes in SETUPS.items():
            deployments[name] = launch.up(_config(name, sizes, options), print)
        targets = {name: deployment.status()["router"]["address"] for name, deployment in deployments.items()}
        report = asyncio.run(compare(targets, options))
    finally:
        for deployment in deployments.values():
            deployment.down()
        launch.stop_local_ray(print)
    print(json.dumps({"benchmark": "disaggregation", "config": vars(options), **report}))


async def compare(targets: dict[str, str], options: argparse.Namespace) -> dict:
    low: dict[str, list[serving.Result]] = {name: [] for name in targets}
    gaps: dict[str, list[float]] = {name: [] for name in targets}
    for target in targets.values():  # the first requests of a process pay for what it has not touched yet
        await one_at_a_time(target, 2, options.prompt_tokens, -1)
    for number in range(options.rounds):
        for name, target in targets.items():
            low[name] += await one_at_a_time(target, options.requests, options.prompt_tokens, number)
        for name, target in targets.items():
            gaps[name] += await stream_among_arrivals(target, options.prompt_tokens, number)
    ttft = {name: statistics.median(1e3 * r.ttft_s for r in results) for name, results in low.items()}
    tpot = {name: statistics.median(1e3 * (r.tpot_s or 0.0) for r in results) for name, results in low.items()}
    itl = {name: [percentile(values, p) for p in (50, 99)] for name, values in gaps.items()}
    ratio = ttft["disaggregated"] / ttft["colocated"]
    rows = [[name, ttft[name], tpot[name], *itl[name]] for name in targets]
    print(table(["medians, ms", "TTFT", "TPOT", "ITL P50 among arrivals", "ITL P99"], rows))
    print(f"TTFT disaggregated / colocated: {ratio:.3f}, target 1.15")
    return {"ttft_ms": ttft, "tpot_ms": tpot, "itl_p50_p99_ms": itl, "ttft_ratio": ratio}


async def one_at_a_time(target: str, count: int, prompt_tokens: int, seed: int) -> list[serving.Result]:
    results = []
    for number in range(count):
        results += await serving.run(target, [Arrival(0.0, prompt_tokens, 16)], seed=1000 * seed + number)
    failed = [result.error for result in results if result.error]
    assert not failed, failed
    return results


async def stream_among_arrivals(target: str, prompt_tokens: int, seed: int, num_tokens: int = 64) -> list[float]:
    """Gaps in ms between the tokens of one answer while prompts arrive one after the other."""
    ids = [(7919 * (seed + 2) + i) % 40_000 for i in range(32)]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        stopping=pb.StoppingCriteria(max_tokens=num_tokens, ignore_eos=True),
    )
    times: list[float] = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def arrive() -> None:
            number = 0
            while True:
                number += 1
                await serving.run(target, [Arrival(0.0, prompt_tokens, 2)], seed=10_000 * (seed + 1) + number)

        arriving = None
        async for message in stub.GenerateStream(request, timeout=120.0):
            if message.delta.num_tokens:
                times.append(time.monotonic())
                arriving = arriving or asyncio.create_task(arrive())
        if arriving is not None:
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)
    return [1e3 * (b - a) for a, b in itertools.pairwise(times)]


def _config(name: str, sizes: dict[str, int], options: argparse.Namespace) -> DeploymentConfig:
    pool = {"num_threads": 1, "num_blocks": 1024}
    pools = {role: {**pool, "replicas": count} for role, count in sizes.items()}
    pools["colocated"]["max_num_batched_tokens"] = options.chunk
    return DeploymentConfig.model_validate(
        {
            "name": f"bench-{name}",
            "model": {"path": options.model},
            "pools": pools,
            "router": {"port": 0},
            "transport": options.transport,
        }
    )


if __name__ == "__main__":
    main()
