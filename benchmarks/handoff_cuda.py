"""The hand-off as a client sees it: a whole service on two GPUs, one prefill and one decode worker, each a process.

    python -m benchmarks.handoff_cuda [--transport auto] [--rounds 15] [--seconds 12] [--tokenizer DIRECTORY]

Llama-3.1-8B shape, bf16, random weights, blocks of 64 tokens, no prefix cache; router and client in the parent.

    second token    from the first token's arrival at the client to the second's, prompts of 512, 2048 and 8192 tokens
                    on an idle decode worker; the first token goes out at once. Target 12 ms.
    exposed         from the last layer's keys and values, computed at the prefill worker, to the decode worker's first
                    step with them, launched; and every moment between (benchmarks/handoff_marks.py). Target 2 ms for
                    8192 tokens.
    gaps            of 32 running answers with contexts of 1024 tokens: P50 and P99 alone, and while 8192-token prompts
                    with max_tokens 2 arrive one behind the other. Target 1.3 for the ratio of the P99s.
    link            its test transfer, as a worker measures it for its load (64 MiB), asked for in the end.

Floor of the second token: one decode step, 6 ms, and the last layer's pages, 0.1 ms. Prints a table, and one JSON line
last. `--shape toy --devices cpu cpu --kv-gib 0.5` shows that the script runs.
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

from benchmarks.engine_cuda_shapes import SHAPES, Shape
from benchmarks.handoff_marks import MARKS, START, STOP, Marks
from benchmarks.stats import percentile
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from protos.worker_pb2 import Member, Members

RUNNING, CONTEXT = 32, 1024
SECOND_TARGET, EXPOSED_TARGET, GAPS_TARGET = 12, 2, 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--tokenizer", type=Path, help="a model's directory; default: the demo model's")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--kv-gib", type=float, default=30.0)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        asyncio.run(work(*args.worker))
    else:
        asyncio.run(measure(args))


async def work(role: str, device: str, model: str, transport: str, kv_gib: str) -> None:
    """A worker's process: members come on stdin, its own goes to stdout, and its marks when it is asked."""
    from cluster.worker import MEASURED_BYTES, Worker
    from engine.config import EngineConfig

    sys.setswitchinterval(2e-4)
    engine = EngineConfig(
        model=model,
        device=device,
        load_format="dummy",
        dtype="bfloat16" if device != "cpu" else "float32",
        num_threads=None if device != "cpu" else 1,
        block_size=64,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        max_model_len=16384,
        kv_cache_gib=float(kv_gib),
        enable_prefix_caching=False,
    )
    marks = Marks("P" if role == "prefill" else "D", device)
    worker = Worker(f"{role}-0", role, engine, transport)  # type: ignore[arg-type]
    member = await worker.start()
    print(member.SerializeToString().hex(), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "links":  # measured now: the worker would do so by itself in some idle second, beside what is timed
            sent = await worker.canary("decode-0", max(1, MEASURED_BYTES // worker.engine.slab.shape[1]))
            print(json.dumps([{**link, "error": sent["error"]} for link in worker.status()["links"]]), flush=True)
        elif line == "marks":
            print(json.dumps(marks.take()), flush=True)
            marks.clear()
        else:
            worker.set_members(list(Members.FromString(bytes.fromhex(line)).members))
    await worker.stop()


async def measure(args: argparse.Namespace) -> None:
    from router.config import RouterConfig
    from router.server import Router

    with tempfile.TemporaryDirectory() as directory:
        model = checkpoint(Path(directory), args.tokenizer, args.shape)
        started_s = time.perf_counter()
        workers = [
            await start(role, device, str(model), args.transport, str(args.kv_gib))
            for role, device in zip(("prefill", "decode"), args.devices, strict=True)
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
                "second_token_ms": await second_tokens(stub, workers, args.prompts, args.rounds),
                "gaps_ms": await gaps(stub, args.seconds),
            }
        links = await ask(workers[0], "links")
        print("link:", links, flush=True)
        await router.stop()
        for process in workers:
            process.stdin.close()  # type: ignore[union-attr]
            await process.wait()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 3))
    config = {"transport": links[0]["transport"], "rounds": args.rounds, "shape": args.shape}
    print(json.dumps({"benchmark": "handoff_cuda", **found, **config, "device": device, "torch": torch.__version__}))


def checkpoint(directory: Path, tokenizer: Path | None, shape: str) -> Path:
    from cluster.models import resolve

    source = tokenizer or resolve("smollm2", print)
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text(json.dumps(Shape(shape).config))
    return directory


async def start(*arguments: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "benchmarks.handoff_cuda", "--worker", *arguments)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)


async def ask(worker: asyncio.subprocess.Process, what: str) -> Any:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(what.encode() + b"\n")
    return json.loads(await worker.stdout.readline())


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


async def second_tokens(
    stub: Any, workers: list[asyncio.subprocess.Process], prompts: list[int], rounds: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    columns = ("second token, median", "P99", "target", "step", "exposed", "P99", "target")
    print(f"{'prompt':>8}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns) + "  ms", flush=True)
    for length in prompts:
        seconds, steps, moments = [], [], []
        for index in range(rounds + 3):
            times, _ = await arrivals(stub, request(length, 12, 1000 * length + index))
            marks: dict[str, float] = {}
            for worker in workers:
                marks |= await ask(worker, "marks")
            if index >= 3:
                seconds.append(times[1] - times[0])
                steps.append((times[-1] - times[2]) / (len(times) - 3))
                moments.append({mark: (at - marks[START]) * 1e3 for mark, at in marks.items()})
        after = {mark: [one[mark] for one in moments if mark in one] for mark, _, _ in MARKS}
        figures = {
            "median": statistics.median(seconds),
            "p99": percentile(seconds, 99),
            "max": max(seconds),
            "step": statistics.median(steps),
            "exposed": statistics.median(after[STOP]),
            "exposed_p99": percentile(after[STOP], 99),
            "moments": {mark: statistics.median(times) for mark, times in after.items() if times},
        }
        found[str(length)] = figures
        print(
            f"{length:>8}{figures['median']:>22.2f}{figures['p99']:>9.2f}{SECOND_TARGET:>9}{figures['step']:>9.2f}"
            f"{figures['exposed']:>9.2f}{figures['exposed_p99']:>9.2f}{EXPOSED_TARGET:>9}",
            flush=True,
        )
    print(
        "\nsince the last layer's keys and values were there, medians, ms"
        + " " * 13
        + "".join(f"{n:>8}" for n in found)
    )
    longest = found[str(prompts[-1])]["moments"]
    for mark, where, text in sorted(MARKS, key=lambda row: longest.get(row[0], 0)):
        cells = [one["moments"].get(mark) for one in found.values()]
        if any(cell is not None for cell in cells):
            row = "".join(f"{'-':>8}" if cell is None else f"{cell:>8.2f}" for cell in cells)
            print(f"  {where}  {text:<70}{row}", flush=True)
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
    found["ratio"] = found["busy"]["p99"] / found["quiet"]["p99"]
    print(
        f"ratio of P99: {found['ratio']:.2f}, target {GAPS_TARGET}; {found['prompts_per_s']:.1f} prompts/s", flush=True
    )
    return found


if __name__ == "__main__":
    main()
