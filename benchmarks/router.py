"""What the router adds to a token's way: stub workers that timestamp, with and without the router between, in one run.

    python -m benchmarks.router [--rate 20] [--output-tokens 64] [--itl-ms 20] [--prompt-tokens 512] [--rounds 3]

Three processes on one host, so one monotonic clock: stub workers (no engine; a step every `itl-ms` carries a token of
every running sequence, as an engine's does), the router, and this client. Requests start open loop at `rate`. Rounds
alternate between the router and a direct client that speaks to the stubs as the router does, over the same gRPC.

    added TTFT      (client's wait for the first token - the time it spent inside the stub), less the direct P50
    added delivery  (a later token's receipt at the client - its sending by the stub), less the direct P50
    added ITL       (the gap between two tokens at the client - the same gap at the stub)

The floor is the direct hop itself: one gRPC message through two Python processes, about 0.3 ms here. Targets at P50:
TTFT 3 ms, ITL 1 ms. With `rate` 20 and 64 tokens at 20 ms about 26 sequences run, whose tokens leave in one step: the
last one of a step waits for the other 25 at the router, which the delivery's P99 shows.
"""

import argparse
import asyncio
import itertools
import json
import platform
import random
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.stats import percentile, table
from cluster.models import resolve
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc, worker_pb2_grpc
from protos import kv_transfer_pb2 as kpb
from protos import worker_pb2 as wpb
from router.config import RouterConfig
from router.server import Router
from tests.stub_workers import StubCluster

TTFT_TARGET_MS = 3.0
ITL_TARGET_MS = 1.0


@dataclass(slots=True)
class Settings:
    rate: float = 20.0
    output_tokens: int = 64
    itl_ms: float = 20.0
    prompt_tokens: int = 512
    round_s: float = 5.0
    rounds: int = 3
    seed: int = 1


@dataclass(slots=True)
class Seen:
    """One request at the client; its seed names it at the stubs."""

    seed: int
    sent_at: float
    received_at: list[float] = field(default_factory=list)  # by output position


@dataclass(slots=True)
class Delays:
    """In ms, of all requests of one way."""

    ttft: list[float] = field(default_factory=list)
    delivery: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)

    def add(self, seen: Seen, inside: dict[str, Any]) -> None:
        sent = inside["sent"]
        assert len(seen.received_at) == len(sent), "every token was seen at both ends"
        self.ttft.append(1e3 * (seen.received_at[0] - seen.sent_at - (sent[0] - inside["received"])))
        delays = [1e3 * (r - s) for r, s in zip(seen.received_at, sent, strict=True)]
        self.delivery.extend(delays[1:])
        self.itl.extend(b - a for a, b in itertools.pairwise(delays[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer the router loads")
    parser.add_argument("--serve", choices=["stubs", "router"], help=argparse.SUPPRESS)
    parser.add_argument("--members", help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    model, serve, members = arguments.pop("model"), arguments.pop("serve"), arguments.pop("members")
    settings = Settings(**arguments)
    if serve == "stubs":
        asyncio.run(serve_stubs(settings))
    elif serve == "router":
        asyncio.run(serve_router(model, members))
    else:
        report(settings, *asyncio.run(measure(settings, model)))


async def measure(settings: Settings, model: str) -> tuple[Delays, Delays, float]:
    """(through the router, direct, router's CPU ms per token message)."""
    routed, direct = Delays(), Delays()
    async with _child("stubs", settings, model) as stubs:
        members = json.loads(await _line(stubs))
        async with _child("router", settings, model, "--members", json.dumps(members)) as router:
            address = (await _line(router)).strip()
            async with RouterClient(address) as through, DirectClient(members) as straight:
                await through.warm_up(settings)
                await straight.warm_up(settings)
                cpu_s, num_messages = 0.0, 0
                for round_ in range(settings.rounds):
                    for client, delays in ((straight, direct), (through, routed)):
                        before = await _ask(router, "cpu")
                        seen = await open_loop(client, settings, settings.seed + round_)
                        after = await _ask(router, "cpu")
                        inside = await _ask(stubs, "times")
                        for one in seen:
                            delays.add(one, inside[str(one.seed)])
                        if client is through:
                            cpu_s += after - before
                            num_messages += sum(len(one.received_at) for one in seen)
    return routed, direct, 1e3 * cpu_s / max(1, num_messages)


async def open_loop(client: "RouterClient | DirectClient", settings: Settings, seed: int) -> list[Seen]:
    """Poisson arrivals for `round_s`; a start never waits for an earlier answer."""
    rng = random.Random(seed)
    start, at, running = time.monotonic(), 0.0, []
    while (at := at + rng.expovariate(settings.rate)) < settings.round_s:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        running.append(asyncio.create_task(client.generate(settings)))
    return list(await asyncio.gather(*running))


class RouterClient:
    def __init__(self, address: str):
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> "RouterClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def warm_up(self, settings: Settings) -> None:
        watch = health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        watch.cancel()
        await asyncio.gather(*(self.generate(settings) for _ in range(4)))

    async def generate(self, settings: Settings) -> Seen:
        request = pb.GenerateRequest(
            text=_text(settings.prompt_tokens),
            sampling=pb.SamplingParams(seed=secrets.randbits(62)),
            stopping=pb.StoppingCriteria(max_tokens=settings.output_tokens, ignore_eos=True),
        )
        seen = Seen(request.sampling.seed, time.monotonic())
        call = self._stub.GenerateStream(request, timeout=120)
        while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            seen.received_at.extend([time.monotonic()] * message.delta.num_tokens)
        return seen


class DirectClient:
    """The router's two calls and nothing else: Expect on a shared session, and a Prefill stream per request."""

    def __init__(self, members: list[dict[str, Any]]):
        self._members = [json_format.ParseDict(m, wpb.Member()) for m in members]
        self._channels = [grpc.aio.insecure_channel(m.address) for m in self._members]
        self._prefill = worker_pb2_grpc.PrefillServiceStub(self._channels[0])
        self._session = worker_pb2_grpc.DecodeServiceStub(self._channels[1]).Session()
        self._runs: dict[str, tuple[Seen, asyncio.Event, int]] = {}
        self._write = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "DirectClient":
        await self._session.write(wpb.SessionCommand(hello=wpb.Hello(router_id="direct", incarnation="0")))
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._session.cancel()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def warm_up(self, settings: Settings) -> None:
        await asyncio.gather(*(self.generate(settings) for _ in range(4)))

    async def generate(self, settings: Settings) -> Seen:
        run_id, done = secrets.token_hex(16), asyncio.Event()
        seen = Seen(secrets.randbits(62), time.monotonic())
        self._runs[run_id] = (seen, done, settings.output_tokens)
        request = wpb.EngineRequest(
            run_id=run_id,
            token_ids=[5] * settings.prompt_tokens,
            num_prompt_tokens=settings.prompt_tokens,
            sampling=pb.SamplingParams(seed=seen.seed, num_sequences=1),
            stopping=pb.StoppingCriteria(max_tokens=settings.output_tokens, ignore_eos=True),
        )
        source, target = (kpb.WorkerRef(worker_id=m.worker_id, incarnation=m.incarnation) for m in self._members)
        async with self._write:
            await self._session.write(wpb.SessionCommand(expect=wpb.Expect(request=request, source=source)))
        call = self._prefill.Prefill(wpb.PrefillRequest(request=request, target=target), timeout=120)
        while (event := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            if event.WhichOneof("event") == "first_tokens":
                seen.received_at.append(time.monotonic())
        await done.wait()
        return seen

    async def _read(self) -> None:
        while (step := await self._session.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            now = time.monotonic()
            for entry in step.entries:
                seen, done, num_tokens = self._runs[entry.run_id]
                seen.received_at.extend([now] * len(entry.token_ids))
                if len(seen.received_at) == num_tokens:
                    done.set()


async def serve_stubs(settings: Settings) -> None:
    async with StubCluster() as cluster:
        prefill, decode = await cluster.add("p0", "prefill"), await cluster.add("d0", "decode")
        decode.faults.step_s = settings.itl_ms / 1e3
        print(json.dumps([json_format.MessageToDict(m) for m in cluster.members()]), flush=True)
        async for _ in _commands():
            times = {}
            for request in prefill.requests:
                sent = [
                    (prefill if offset == 0 else decode).sent_at[request.run_id, 0, offset]
                    for offset in range(request.stopping.max_tokens)
                ]
                times[request.sampling.seed] = {"received": prefill.received_at[request.run_id], "sent": sent}
            for worker in (prefill, decode):
                worker.requests.clear()
                worker.sent_at.clear()
                worker.received_at.clear()
                worker.log.clear()
            print(json.dumps(times), flush=True)


async def serve_router(model: str, members: str) -> None:
    router = Router(RouterConfig("benchmark"), resolve(model))
    print(await router.start(), flush=True)
    router.set_members([json_format.ParseDict(m, wpb.Member()) for m in json.loads(members)])
    async for _ in _commands():
        print(json.dumps(time.process_time()), flush=True)
    await router.stop()


def report(settings: Settings, routed: Delays, direct: Delays, cpu_ms: float) -> None:
    """A table for people, one JSON line last."""
    rows, result = [], {}
    for name, label in (("ttft", "TTFT"), ("delivery", "delivery of later tokens"), ("itl", "ITL less the stub's")):
        ours, floor = getattr(routed, name), getattr(direct, name)
        base = percentile(floor, 50)
        added = (percentile(ours, 50) - base, percentile(ours, 99) - base)
        rows.append(
            [label, percentile(floor, 50), percentile(floor, 99), percentile(ours, 50), percentile(ours, 99), *added]
        )
        result[name] = {
            "direct_p50": base,
            "direct_p99": percentile(floor, 99),
            "added_p50": added[0],
            "added_p99": added[1],
        }
    print(f"{settings.rate:g} requests/s, {settings.prompt_tokens} prompt and {settings.output_tokens} output tokens,")
    print(f"{settings.itl_ms:g} ms per step, {len(routed.ttft)} requests through the router; ms")
    header = ["", "direct P50", "P99", "router P50", "P99", "added P50", "P99"]
    print(table(header, rows))
    print(f"router CPU per token: {cpu_ms:.3f} ms")
    for name, target in (("ttft", TTFT_TARGET_MS), ("itl", ITL_TARGET_MS)):
        met = "met" if result[name]["added_p50"] <= target else "MISSED"
        print(f"target: {name} at most {target:g} ms at P50: {met}")
    versions = {"python": platform.python_version(), "grpcio": grpc.__version__}
    line = {"benchmark": "router", **asdict(settings), "ms": result, "router_cpu_ms_per_token": cpu_ms, **versions}
    print(json.dumps(line))


def _text(num_tokens: int) -> str:
    """About so many tokens, different each time, so that no cache of words helps more than in life."""
    rng = random.Random()
    return " ".join(rng.choice(_WORDS) for _ in range(num_tokens))


_WORDS = tuple("the a sea sky old man boat night wind under over blue quick light and or from with".split())  # noqa: SIM905


@asynccontextmanager
async def _child(kind: str, settings: Settings, model: str, *more: str) -> AsyncIterator[asyncio.subprocess.Process]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    command = [sys.executable, "-m", "benchmarks.router", "--serve", kind, "--model", model, *options, *more]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=2**28, cwd=Path(__file__).parent.parent
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the child ends with its input
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()


async def _ask(process: asyncio.subprocess.Process, command: str) -> Any:
    assert process.stdin is not None
    process.stdin.write(f"{command}\n".encode())
    return json.loads(await _line(process))


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 60)
    if not line:
        raise RuntimeError("a child process of the benchmark ended early; its error is above")
    return line.decode()


async def _commands() -> AsyncIterator[str]:
    """Lines of this process's input, until it ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield line.strip()


if __name__ == "__main__":
    main()
