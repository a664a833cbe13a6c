"""The hand-off as a client sees it: a whole service on two GPUs, one prefill and one decode worker, each a process.

    python -m benchmarks.handoff_cuda [--transport auto] [--rounds 15] [--seconds 12] [--tokenizer DIRECTORY]

Llama-3.1-8B shape, bf16, random weights, blocks of 64 tokens, no prefix cache; router and client in the parent.

    second token    from the first token's arrival at the client to the second's, prompts of 512, 2048 and 8192 tokens
                    on an idle decode worker; the first token goes out at once. Beside it the router's own spans: first
                    token sampled -> KV adopted, and adopted -> the decode worker's first token.
    gaps            of 32 running answers with contexts of 1024 tokens: P50 and P99 alone, and while 8192-token prompts
                    with max_tokens 2 arrive one behind the other

Floor of the second token: one decode step, 6 ms, and the last layer's pages, 0.1 ms. Prints a table, and one JSON line
last.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio
import torch

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from protos.worker_pb2 import Member, Members

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}
PROMPTS = (512, 2048, 8192)
RUNNING, CONTEXT = 32, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--tokenizer", type=Path, help="a model's directory; default: the demo model's")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        asyncio.run(work(*args.worker))
    else:
        asyncio.run(measure(args))


async def work(role: str, device: str, model: str, transport: str) -> None:
    """A worker's process: members come on stdin, its own goes to stdout."""
    from cluster.worker import Worker
    from engine.config import EngineConfig

    sys.setswitchinterval(2e-4)
    engine = EngineConfig(
        model=model,
        device=device,
        load_format="dummy",
        dtype="bfloat16",
        block_size=64,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        max_model_len=16384,
        kv_cache_gib=30.0,
        enable_prefix_caching=False,
    )
    worker = Worker(f"{role}-0", role, engine, transport)  # type: ignore[arg-type]
    member = await worker.start()
    print(member.SerializeToString().hex(), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "links":
            print(json.dumps(worker.status()["links"]), flush=True)
        else:
            worker.set_members(list(Members.FromString(bytes.fromhex(line)).members))
    await worker.stop()


async def measure(args: argparse.Namespace) -> None:
    from router.config import RouterConfig
    from router.server import Router

    with tempfile.TemporaryDirectory() as directory:
        model = checkpoint(Path(directory), args.tokenizer)
        started_s = time.perf_counter()
        workers = [
            await start(role, f"cuda:{i}", model, args.transport) for i, role in enumerate(("prefill", "decode"))
        ]
        members = [Member.FromString(bytes.fromhex((await process.stdout.readline()).decode())) for process in workers]  # type: ignore[union-attr]
        print(f"both workers ready after {time.perf_counter() - started_s:.1f} s", flush=True)
        router = Router(RouterConfig(served_model_name="llama"), model)
        address = await router.start()
        line = Members(members=members).SerializeToString().hex() + "\n"
        router.set_members(members)
        for process in workers:
            process.stdin.write(line.encode())  # type: ignore[union-attr]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            found = {
                "second_token_ms": await second_tokens(stub, args.rounds),
                "gaps_ms": await gaps(stub, args.seconds),
            }
        workers[0].stdin.write(b"links\n")  # type: ignore[union-attr]
        links = json.loads(await workers[0].stdout.readline())  # type: ignore[union-attr]
        print("link:", links, flush=True)
        await router.stop()
        for process in workers:
            process.stdin.close()  # type: ignore[union-attr]
            await process.wait()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    config = {"transport": links[0]["transport"], "rounds": args.rounds}
    print(json.dumps({"benchmark": "handoff_cuda", **found, **config, **machine}))


def checkpoint(directory: Path, tokenizer: Path | None) -> Path:
    from cluster.models import resolve

    source = tokenizer or resolve("smollm2", print)
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | SHAPE))
    return directory


async def start(role: str, device: str, model: Path, transport: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "benchmarks.handoff_cuda", "--worker", role, device, str(model), transport)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)


def request(num_tokens: int, max_tokens: int, seed: int) -> pb.GenerateRequest:
    message = pb.GenerateRequest(
        sampling=pb.SamplingParams(temperature=0.0, seed=seed),
        stopping=pb.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
    )
    rng = random.Random(seed)
    message.token_ids.ids.extend(rng.randrange(1000, 40000) for _ in range(num_tokens))
    return message


async def arrivals(stub: Any, message: pb.GenerateRequest) -> tuple[list[float], pb.Timings]:
    """When each token came, in ms; and what the router says of the run."""
    times, timings = [], pb.Timings()
    async for answer in stub.GenerateStream(message, timeout=300):
        if answer.HasField("delta") and answer.delta.num_tokens:
            times.append(time.perf_counter() * 1e3)
        if answer.HasField("timings"):
            timings = answer.timings
    return times, timings


async def second_tokens(stub: Any, rounds: int) -> dict[str, Any]:
    found = {}
    print(
        f"{'prompt':>8}{'second token, median':>22}{'max':>8}{'adopted after':>15}{'decode after':>14}{'step':>8}  ms"
    )
    for length in PROMPTS:
        seconds, adopted, decoded, steps = [], [], [], []
        for index in range(rounds + 3):
            times, timings = await arrivals(stub, request(length, 12, 1000 * length + index))
            if index >= 3:
                seconds.append(times[1] - times[0])
                adopted.append(timings.kv_transfer.ToNanoseconds() / 1e6)
                decoded.append(timings.decode_queue.ToNanoseconds() / 1e6)
                steps.append((times[-1] - times[2]) / (len(times) - 3))
        figures = {
            "median": statistics.median(seconds),
            "max": max(seconds),
            "adopted": statistics.median(adopted),
            "decoded": statistics.median(decoded),
            "step": statistics.median(steps),
        }
        found[str(length)] = figures
        print(
            f"{length:>8}" + "".join(f"{v:{w}.2f}" for v, w in zip(figures.values(), (22, 8, 15, 14, 8), strict=True)),
            flush=True,
        )
    return found


async def gaps(stub: Any, seconds: float) -> dict[str, Any]:
    running: list[list[float]] = [[] for _ in range(RUNNING)]
    stopping, all_run = asyncio.Event(), asyncio.Event()

    async def run(index: int) -> None:
        stream = stub.GenerateStream(request(CONTEXT, 8000, index), timeout=600)
        async for answer in stream:
            if answer.HasField("delta") and answer.delta.num_tokens:
                running[index].append(time.perf_counter() * 1e3)
                if min(map(len, running)) > 20:
                    all_run.set()
            if stopping.is_set():
                stream.cancel()
                return

    def between(start: float, stop: float) -> dict[str, float]:
        every = sorted(b - a for times in running for a, b in pairwise(times) if a >= start and b <= stop)
        picked = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {name: every[min(len(every) - 1, int(len(every) * part))] for name, part in picked.items()}

    tasks = [asyncio.create_task(run(index)) for index in range(RUNNING)]
    await asyncio.wait_for(all_run.wait(), 60)
    quiet_from = time.perf_counter() * 1e3
    await asyncio.sleep(seconds)
    busy_from, num_prompts = time.perf_counter() * 1e3, 0

    async def arrive(lane: int) -> None:
        nonlocal num_prompts
        while time.perf_counter() * 1e3 < busy_from + seconds * 1e3:
            await arrivals(stub, request(8192, 2, 10**6 * (lane + 1) + num_prompts))
            num_prompts += 1

    await asyncio.gather(arrive(0), arrive(1))  # two lanes, so that the next prompt is there when one is computed
    busy_to = time.perf_counter() * 1e3
    found: dict[str, Any] = {"quiet": between(quiet_from, busy_from), "busy": between(busy_from, busy_to)}
    found |= {"prompts": num_prompts, "prompts_per_s": num_prompts / (busy_to - busy_from) * 1e3}
    stopping.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    for name in ("quiet", "busy"):
        print(
            f"gaps of {RUNNING} running answers, {name}: "
            + ", ".join(f"{k} {v:.2f} ms" for k, v in found[name].items())
        )
    print(
        f"ratio of P99: {found['busy']['p99'] / found['quiet']['p99']:.2f}; {found['prompts_per_s']:.1f} prompts/s",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
