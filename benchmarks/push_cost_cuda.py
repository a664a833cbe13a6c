"""What a push of KV costs the two GPUs at work: the one that prefills and pushes, and the one that decodes meanwhile.

    python -m benchmarks.push_cost_cuda [--rounds 5] [--programs 8 16 32 132] [--digests 16,-1 64,0] [--only wire]

Two engines of Llama-3.1-8B's shape (bf16, random weights, graphs), each a process with a GPU; rounds alternate.

    prefill  a prompt from its start to its first token, alone; with a sink that is told of its KV and ignores it; and
             with one that pushes every layer into the other GPU's pool, by so many programs. Single, and three back to
             back, where the pushes of one prompt's last layers run beside the next one's first. Target: 1.03.
    decode   a step of a full batch in windows that alternate with quiet ones: while layers of a prompt come at the rate
             that one prefill GPU makes them (target 1.02); prompts as fast as transfers go; and while the push kernel
             alone writes at the wire's full speed, and the receiver's digest reads as many bytes (target 1.10), by so
             many programs on a stream of that priority. Beside them without digests. Each window is compared with the
             quiet ones beside it.

Floor of both ratios: 1; at the wire's speed the memory is written as fast, and read as fast by digests: of the 4.8 TB/s
that an H200 has, 370 GB/s each, or 1.08 and 1.15. `--shape toy --devices cpu cpu` shows over grpc that the script runs.
Prints a table, and one JSON line last.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_peer import Peer
from benchmarks.engine_cuda_shapes import SHAPES, Shape
from benchmarks.push_source import LANES, Prefill, Pushes, WirePushes
from benchmarks.stats import percentile

BACK_TO_BACK = 3
PREFILL_TARGET = 1.03
RATE, TRANSFERS, WIRE = "one prefill's rate", "transfers as fast as they go", "the wire's speed"
IN_SERVICE = "0,-1"  # digests
TARGETS = {RATE: 1.02, WIRE: 1.10}  # of a quiet step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", type=int, nargs="+", default=[8, 16, 32, 132], help="of the push kernel")
    parser.add_argument("--priorities", type=int, nargs="+", default=[-1], help="of the push's stream; the model has 0")
    parser.add_argument("--digests", nargs="+", default=[IN_SERVICE], help="programs (0: as in service), priority")
    parser.add_argument("--only", choices=("prefill", "decode", "wire"), help="one part; wire: of decode's")
    parser.add_argument("--wire-programs", type=int, default=132, help="for the wire's speed beside decode")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--window-s", type=float, default=0.35)
    parser.add_argument("--gb-per-s", type=float, default=7.0, help="what one prefill GPU makes")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--kv-gib", type=float, default=24.0)
    asyncio.run(measure(parser.parse_args()))


async def measure(args: argparse.Namespace) -> None:
    sys.setswitchinterval(2e-4)
    is_cuda = args.devices[0] != "cpu"
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_config(folder, args.shape)
        arguments = (folder, args.devices[1], args.kv_gib, max(args.prompt, args.context))
        starting = asyncio.create_task(Peer.start(*arguments, module="benchmarks.decode_peer"))
        if is_cuda:
            torch.cuda.set_device(args.devices[0])
        prefill = await asyncio.to_thread(Prefill, folder, args.devices[0], args.kv_gib, args.prompt)
        await prefill.connect(await starting, max(LANES, BACK_TO_BACK) + 2)
    print(f"both engines ready after {time.perf_counter() - started_s:.1f} s", flush=True)
    found = {}
    if args.only in (None, "prefill"):
        found["prefill"] = await prefills(prefill, args)
    else:
        await prefill.run(args.prompt, 1, has_sink=True, does_push=True)  # pages to push from
    if args.only != "prefill":
        found["decode"] = await decodes(prefill, args)
    await prefill.close()
    machine = {"device": torch.cuda.get_device_name() if is_cuda else "cpu", "torch": torch.__version__}
    found = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 4))
    print(json.dumps({"benchmark": "push_cost_cuda", **found, "config": vars(args), **machine}))


def write_config(folder: str, shape: str) -> None:
    Path(folder, "config.json").write_text(json.dumps(Shape(shape).config))


async def prefills(prefill: "Prefill", args: argparse.Namespace) -> dict[str, Any]:
    pushed = list(product(args.programs, args.priorities))
    names = [f"pushed by {programs}" + f", priority {priority}" * (priority != -1) for programs, priority in pushed]
    ways: dict[str, tuple[int, int] | None] = {"alone": None, "a sink that ignores it": None}
    ways |= dict(zip(names, pushed, strict=True))
    took: dict[str, dict[str, list[float]]] = {way: {"single": [], "back_to_back": []} for way in ways}
    for index in range(args.rounds + 1):
        for way in random.Random(index).sample(list(ways), len(ways)):
            if (how := ways[way]) is not None:
                prefill.use(*how)
            for kind, count in (("single", 1), ("back_to_back", BACK_TO_BACK)):
                ms = await prefill.run(args.prompt, count, way != "alone", how is not None)
                if index:  # the first round compiles, and makes plans
                    took[way][kind].append(ms)
    title = f"prefill of {args.prompt} tokens, ms"
    print(f"\n{title:<36}{'single':>9}{'ratio':>8}{'3 in a row':>13}{'ratio':>8}{'target':>9}")
    found = {}
    for way, kinds in took.items():
        figures: dict[str, float] = {}
        for kind, values in kinds.items():
            figures[kind] = statistics.median(values)
            pairs = zip(values, took["alone"][kind], strict=True)
            figures[f"{kind}_ratio"] = statistics.median(mine / alone for mine, alone in pairs)
        found[way] = figures
        target = f"{PREFILL_TARGET:>9}" if way.startswith("pushed") else ""
        print(
            f"{way:<36}{figures['single']:>9.2f}{figures['single_ratio']:>8.3f}{figures['back_to_back']:>13.2f}"
            f"{figures['back_to_back_ratio']:>8.3f}{target}",
            flush=True,
        )
    return found


async def decodes(prefill: "Prefill", args: argparse.Namespace) -> dict[str, Any]:
    names = [f"{kind}{how}" for kind in (RATE, TRANSFERS) for how in ("", ", no digests") if args.only != "wire"]
    readers = {WIRE if how == IN_SERVICE else f"{WIRE}, digests by {how}": how.split(",") for how in args.digests}
    names += [f"{WIRE}, no digests", *readers] if args.devices[0] != "cpu" else []
    steps: dict[str, list[float]] = {name: [] for name in ("quiet", *names)}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    moved: dict[str, list[float]] = {name: [] for name in names}
    prefill.use(args.wire_programs)
    wire_lot, wire_gb_per_s = await prefill.lots.get(), 0.0

    async def quiet() -> float:
        found = await window(prefill.peer, args.window_s)
        steps["quiet"] += found
        return statistics.median(found)

    for index in range(args.rounds):
        await prefill.peer.ask("batch", size=args.batch, context=args.context, name=f"round-{index}")
        before = await quiet()
        # The wire's speed is known when the digests are to keep up with it.
        for name in sorted(random.Random(index).sample(names, len(names)), key=lambda name: name in readers):
            pushes: Pushes | WirePushes
            if name.startswith(WIRE):
                pushes = WirePushes(prefill, wire_lot)
                if name in readers:
                    reading = dict(zip(("programs", "priority"), map(int, readers[name]), strict=True))
                    await prefill.peer.ask("reading", block_ids=wire_lot, gb_per_s=wire_gb_per_s, **reading)
            else:
                await prefill.peer.ask("digests", is_on=name in (RATE, TRANSFERS))
                pushes = Pushes(prefill, args.gb_per_s if name.startswith(RATE) else None)
            await asyncio.sleep(0.05)
            pushes.num_bytes, started_s = 0, time.perf_counter()
            found = await window(prefill.peer, args.window_s)
            moved[name].append(pushes.num_bytes / 1e9 / (time.perf_counter() - started_s))
            await pushes.stop()
            await prefill.peer.ask("reading", block_ids=[], gb_per_s=0)
            await prefill.peer.ask("digests", is_on=True)
            wire_gb_per_s = moved[name][-1] if name.startswith(WIRE) else wire_gb_per_s
            after = await quiet()
            steps[name] += found
            ratios[name].append(statistics.median(found) / ((before + after) / 2))
            before = after
    title = f"step of {args.batch} at context {args.context}, ms"
    print(f"\n{title:<36}{'median':>9}{'P99':>9}{'ratio':>8}{'target':>9}{'GB/s':>8}")
    found = {}
    for name, values in steps.items():
        figures = found[name] = {"median": statistics.median(values), "p99": percentile(values, 99)}
        line = f"{name:<36}{figures['median']:>9.2f}{figures['p99']:>9.2f}"
        if name in ratios:
            figures |= {"ratio": statistics.median(ratios[name]), "gb_per_s": statistics.median(moved[name])}
            line += f"{figures['ratio']:>8.3f}{TARGETS.get(name, ''):>9}{figures['gb_per_s']:>8.1f}"
        print(line, flush=True)
    return found


async def window(peer: Peer, seconds: float) -> list[float]:
    start_s = time.monotonic()
    await asyncio.sleep(seconds)
    return await peer.ask("steps", start_s=start_s, stop_s=time.monotonic())


if __name__ == "__main__":
    main()
