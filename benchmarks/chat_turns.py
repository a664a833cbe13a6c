"""What returning an answer's KV to the prefill worker saves the next turn of a chat, and what it costs those beside it.

    python -m benchmarks.chat_turns [--prompt-tokens 256] [--answer-tokens 128] [--message-tokens 32] [--rounds 5]

Two deployments of the demo model on one local Ray cluster, 1 prefill and 1 decode worker each, equal but for
`kv_return`. In alternating rounds:

    chats     turn 1, a pause (people read), turn 2 = turn 1's prompt + answer + a new message: TTFT of turn 2.
    beside    one long answer streams on the decode worker while short ones come and go: the gaps between its tokens.

Without returns, turn 2 computes answer + message; with them, message and at most one block more, so the ratio of TTFT
can be no better than (message + block) / (answer + message) of prefill time, plus what a request costs anyway.
A table, the ratio on / off, one JSON line last.
"""

import argparse
import asyncio
import itertools
import json
import platform
import random
import statistics
import time
from dataclasses import dataclass

import grpc
import torch

from benchmarks.stats import percentile, table
from cluster import launch
from cluster.config import DeploymentConfig
from cluster.launch import Deployment, parts
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

SETTINGS = {"off": False, "on": True}
BESIDE_TOKENS = 96  # of the long answer
SHORT_CHATS = 4  # at once, beside it


@dataclass(frozen=True, slots=True)
class Answer:
    ttft_s: float
    token_ids: list[int]
    gaps_s: list[float]
    cached_tokens: int
    timings: pb.Timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--message-tokens", type=int, default=32)
    parser.add_argument("--pause-s", type=float, default=1.0, help="between the turns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chats", type=int, default=3, help="per round and deployment, one at a time")
    parser.add_argument("--transport", default="grpc")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    launch.connect(print, start=True, transport=options.transport, join_running=False)
    deployments: dict[str, Deployment] = {}
    try:
        for name in SETTINGS:
            deployments[name] = launch.up(_config(name, options), print)
        targets = {name: deployment.status()["router"]["address"] for name, deployment in deployments.items()}
        report = asyncio.run(compare(targets, options))
        report["returned"] = {name: _returned(deployment) for name, deployment in deployments.items()}
    finally:
        for deployment in deployments.values():
            deployment.down()
        launch.stop_local_ray(print)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "chat_turns", "config": vars(options), **versions, **report}))


async def compare(targets: dict[str, str], options: argparse.Namespace) -> dict:
    seconds: dict[str, list[Answer]] = {name: [] for name in targets}
    gaps: dict[str, list[float]] = {name: [] for name in targets}
    for target in targets.values():  # the first requests of a process pay for what it has not touched yet
        await chat(target, random.Random(-1), options)
    for number in range(options.rounds):
        for name, target in targets.items():
            rng = random.Random(1000 * options.seed + number)
            seconds[name] += [await chat(target, rng, options) for _ in range(options.chats)]
        for name, target in targets.items():
            gaps[name] += await stream_beside_chats(target, random.Random(f"{options.seed}/{number}"), options)
    assert [a.token_ids for a in seconds["on"]] == [a.token_ids for a in seconds["off"]], "the tokens differ"
    ttft = {name: statistics.median(1e3 * a.ttft_s for a in answers) for name, answers in seconds.items()}
    cached = {name: statistics.median(a.cached_tokens for a in answers) for name, answers in seconds.items()}
    itl = {name: [percentile([1e3 * gap for gap in values], p) for p in (50, 99)] for name, values in gaps.items()}
    rows = [[name, ttft[name], cached[name], *itl[name]] for name in targets]
    print(table(["kv_return", "turn 2: TTFT, ms", "tokens cached", "beside: ITL P50, ms", "ITL P99"], rows))
    ratio = ttft["on"] / ttft["off"]
    print(f"TTFT of turn 2, on / off: {ratio:.3f}; ITL beside chats, on / off: {itl['on'][0] / itl['off'][0]:.3f}")
    return {"ttft_ms": ttft, "cached_tokens": cached, "itl_p50_p99_ms": itl, "ttft_ratio": ratio}


async def chat(target: str, rng: random.Random, options: argparse.Namespace) -> Answer:
    """Two turns, one after the other; the second turn's answer."""
    prompt = _tokens(rng, options.prompt_tokens)
    first = await ask(target, prompt, options.answer_tokens)
    await asyncio.sleep(options.pause_s)
    return await ask(target, [*prompt, *first.token_ids, *_tokens(rng, options.message_tokens)], 8)


async def stream_beside_chats(target: str, rng: random.Random, options: argparse.Namespace) -> list[float]:
    """Gaps in s between the tokens of one answer while short turns end, each leaving something to return."""

    async def come_and_go() -> None:
        while True:
            await ask(target, _tokens(rng, 15), 18)  # two whole blocks of 16

    long = asyncio.create_task(ask(target, _tokens(rng, 32), BESIDE_TOKENS))
    others = asyncio.gather(*(come_and_go() for _ in range(SHORT_CHATS)))
    try:
        return (await long).gaps_s
    finally:
        others.cancel()
        await asyncio.gather(others, return_exceptions=True)


async def ask(target: str, token_ids: list[int], max_tokens: int) -> Answer:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=token_ids),
        stopping=pb.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
        response=pb.ResponseOptions(token_ids=True),
        sampling=pb.SamplingParams(temperature=0.0),
    )
    times, answer, cached = [], [], 0
    timings = pb.Timings()
    async with grpc.aio.insecure_channel(target) as channel:
        sent = time.monotonic()
        async for message in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request, timeout=300.0):
            if message.delta.num_tokens:
                times.append(time.monotonic())
                answer += message.delta.token_ids
            if message.HasField("usage"):
                cached, timings = message.usage.cached_tokens, message.timings
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return Answer(times[0] - sent, answer, gaps, cached, timings)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(40_000) for _ in range(count)]


def _returned(deployment: Deployment) -> dict[str, int]:
    reports = [part["report"] for part in parts(deployment.status()) if "kv_returned_bytes" in part["report"]]
    names = ("kv_returned_bytes", "kv_returned_blocks", "kv_returns_refused", "kv_returns_dropped")
    return {name: sum(report[name] for report in reports) for name in (*names, "prompt_tokens_returned")}


def _config(name: str, options: argparse.Namespace) -> DeploymentConfig:
    pool = {"num_threads": 1, "num_blocks": 1024, "replicas": 1}
    return DeploymentConfig.model_validate(
        {
            "name": f"bench-{name}",
            "model": {"path": options.model},
            "pools": {"prefill": pool, "decode": pool},
            "router": {"port": 0},
            "transport": options.transport,
            "kv_return": SETTINGS[name],
        }
    )


if __name__ == "__main__":
    main()
