"""A whole service in one process for tests: real workers, real gRPC on free ports, a real router; no Ray."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.worker import Role, Worker
from engine.config import EngineConfig
from kv_transfer.base import ObjectStore
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.server import Router

NOTHING_LEFT = (
    "num_running",
    "num_waiting",
    "num_waiting_tokens",
    "reserved_blocks",
    "pinned_blocks",
    "quarantined_blocks",
    "transfers_in_flight",
    "num_runs",
)


@dataclass
class Answer:
    """One finished GenerateStream, put together."""

    text: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    finish: dict[int, pb.FinishInfo] = field(default_factory=dict)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    prompt_info: pb.PromptInfo | None = None
    usage: pb.Usage | None = None
    timings: pb.Timings | None = None


@dataclass
class Service:
    stub: inference_pb2_grpc.InferenceServiceStub
    router: Router
    workers: list[Worker]
    build: Callable[[str, Role], Worker]

    async def kill(self, worker: Worker) -> None:
        """Breaks the worker's streams without a word and puts another incarnation in its place."""
        await worker._server.stop(None)
        self.workers.remove(worker)
        self.tell()
        await worker.stop()
        self.workers.append(successor := self.build(worker.me.worker_id, worker.role))
        await successor.start()
        self.tell()

    def tell(self) -> None:
        """Router and workers hear of the workers there are."""
        members = [worker.member() for worker in self.workers if worker.address]
        for part in (self.router, *self.workers):
            part.set_members(members)

    def worker(self, role: Role) -> Worker:
        return next(worker for worker in self.workers if worker.role == role)

    async def generate(self, request: pb.GenerateRequest, timeout: float = 60.0) -> Answer:
        return await collect(self.stub.GenerateStream(request, timeout=timeout), request.sampling.num_sequences or 1)

    async def settle(self, within_s: float = 10.0) -> None:
        """Every block, reservation, lease and run is given back, and every pool's invariants hold."""
        deadline = asyncio.get_running_loop().time() + within_s
        while left := self.left():
            assert asyncio.get_running_loop().time() < deadline, f"not given back after {within_s} s: {left}"
            await asyncio.sleep(0.02)
        for worker in self.workers:
            await worker.check()
        self.router.check()

    def left(self) -> dict:
        left = {}
        for worker in self.workers:
            status = worker.status()
            held = {name: status[name] for name in NOTHING_LEFT if status[name]}
            if status["free_blocks"] != status["total_blocks"]:
                held["free_blocks"] = f"{status['free_blocks']} of {status['total_blocks']}"
            if held:
                left[worker.me.worker_id] = held
        if running := self.router.status()["running_requests"]:
            left["router"] = running
        return left


async def collect(stream, num_sequences: int = 1) -> Answer:
    """Reads a GenerateStream to its end, checking that the offsets of each sequence are contiguous."""
    answer = Answer(text=[""] * num_sequences, token_ids=[[] for _ in range(num_sequences)])
    counted = [0] * num_sequences
    async for message in stream:
        if message.HasField("prompt_info"):
            answer.prompt_info = message.prompt_info
        if message.HasField("delta"):
            delta = message.delta
            assert delta.token_offset == counted[delta.index], (delta.token_offset, counted)
            counted[delta.index] += delta.num_tokens
            answer.text[delta.index] += delta.text
            answer.token_ids[delta.index] += delta.token_ids
            answer.logprobs += delta.logprobs
        if message.HasField("finish_info"):
            answer.finish[message.finish_info.index] = message.finish_info
        if message.HasField("usage"):
            answer.usage, answer.timings = message.usage, message.timings
    assert answer.usage is not None and sum(counted) == answer.usage.completion_tokens
    assert sorted(answer.finish) == list(range(num_sequences))
    return answer


@asynccontextmanager
async def service(
    model: Path,
    prefill: int = 1,
    decode: int = 1,
    both: int = 0,
    transport: str = "grpc",
    engine: dict | None = None,
    decode_engine: dict | None = None,
    router: dict | None = None,
    kv_return: bool = False,
    object_store: ObjectStore | None = None,
) -> AsyncIterator[Service]:
    """`engine` are EngineConfig fields of every worker, `decode_engine` more of them for the decode workers."""
    roles: list[Role] = ["prefill"] * prefill + ["decode"] * decode + ["both"] * both  # type: ignore[list-item]
    settings = {"num_blocks": 256, "num_threads": 1, "max_num_batched_tokens": 256, **(engine or {})}
    workers: list[Worker] = []

    def build(worker_id: str, role: Role) -> Worker:
        own = {**settings, **(decode_engine or {})} if role == "decode" else settings
        config = EngineConfig(model=str(model), **own)
        return Worker(worker_id, role, config, transport, object_store=object_store, kv_return=kv_return)

    front = Router(RouterConfig(served_model_name="test-model", **(router or {})), model)
    try:
        for number, role in enumerate(roles):
            workers.append(build(f"{role}-{number}", role))
            await workers[-1].start()
        address = await front.start()
        async with grpc.aio.insecure_channel(address) as channel:
            built = Service(inference_pb2_grpc.InferenceServiceStub(channel), front, workers, build)
            built.tell()
            await _ready(built, len(roles))
            yield built
            await built.settle()
    finally:
        await front.stop()
        for worker in workers:
            await worker.stop()


async def _ready(built: Service, num_workers: int) -> None:
    for _ in range(500):
        info = await built.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=5.0)
        both = sum(worker.role == "both" for worker in built.workers)
        if info.ready_prefill_workers + info.ready_decode_workers >= num_workers + both:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the router sees no ready workers: {built.router.status()}")


def tiny_model(smollm2: Path, directory: Path, **config) -> Path:
    """A random Llama of two small layers with the demo model's tokenizer: starts in a moment, speaks nonsense."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(smollm2 / name, directory / name)
    content = json.loads((smollm2 / "config.json").read_text())
    content |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        **config,
    }
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def request(
    prompt: str | list[int],
    max_tokens: int = 16,
    *,
    seed: int = 1,
    temperature: float = 0.0,
    num_sequences: int = 1,
    ignore_eos: bool = False,
    **fields,
) -> pb.GenerateRequest:
    """A GenerateRequest with token ids in the answer; more message fields by name."""
    message = pb.GenerateRequest(
        sampling=pb.SamplingParams(temperature=temperature, seed=seed, num_sequences=num_sequences),
        stopping=pb.StoppingCriteria(max_tokens=max_tokens, ignore_eos=ignore_eos),
        response=pb.ResponseOptions(token_ids=True),
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    message.MergeFrom(pb.GenerateRequest(**fields))
    return message
